"""Files of models and adapters, read within bounds: JSON mappings, and the headers of safetensors files.

Nothing of a tensor is read here, and torch is not needed: what a header declares is compared with the size of its file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlora.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of a PEFT adapter."""


_HEADER_BYTES = 48 * 2**20


_TENSORS = 200_000


_CHUNK = 2**22


_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 1),
}


FLOATS = ("F64", "F32", "F16", "BF16")
"""Types that a header gives to plain floating-point numbers."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header of a safetensors file declares for one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Where in the file its numbers begin."""


def find_not_finite(path: Path, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The first tensor of a file that holds NaN or infinity: a number whose exponent's bits are all set."""
    import numpy

    masks = {"F64": (8, 0x7FF0000000000000), "F32": (4, 0x7F800000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}
    content = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    for name, tensor in tensors.items():
        if tensor.dtype not in masks:
            continue
        width, mask = masks[tensor.dtype]
        count = math.prod(tensor.shape)
        for first in range(0, count, _CHUNK):
            begin = tensor.begin + first * width
            part = content[begin : begin + min(_CHUNK, count - first) * width].view(f"<u{width}")
            if ((part & mask) == mask).any():
                return name
    return None


def read_mapping(path: Path, most_bytes: int) -> dict[str, object]:
    """The JSON mapping in a file of at most so many bytes; raises InputError for anything else."""
    if not path.is_file():
        raise InputError(f"{path}: {'is no regular file' if path.exists() else 'is missing'}")
    try:
        if (size := path.stat().st_size) > most_bytes:
            raise InputError(
                f"{path}: has {size:,} bytes, at most {most_bytes:,} are read; a file of this name is smaller"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise InputError(f"{path}: cannot be read: its JSON is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping, found {type(content).__name__}")
    return content


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file holds, by name.

    Raises InputError when the file is no safetensors file, is cut short, or its header is larger than any model's.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'is no regular file' if path.exists() else 'is missing'}")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if length < 2 or length > size - 8:
                raise InputError(
                    f"{path}: cannot be read: it is no safetensors file, or it is cut short ({size:,} bytes)"
                )
            if length > _HEADER_BYTES:
                raise InputError(f"{path}: its header has {length:,} bytes, at most {_HEADER_BYTES:,} are read")
            header = json.loads(file.read(length))
    except RecursionError:
        raise InputError(f"{path}: cannot be read: its header is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: cannot be read: its header is no mapping")
    header.pop("__metadata__", None)
    if len(header) > _TENSORS:
        raise InputError(f"{path}: names {len(header):,} tensors, at most {_TENSORS:,} are read")
    return _read_tensors(path, header, 8 + length, size)


def _read_tensors(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, TensorInfo]:
    """The tensors of a header; raises InputError unless they fill the rest of the file exactly, as the format demands."""
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
            whole = all(type(number) is int and 0 <= number < 2**62 for number in numbers)
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole or not isinstance(dtype, str) or len(shape) > 16:
            raise InputError(f"{path}: cannot be read: the header's entry for {name[:100]!r} is damaged")
        # Types that came after this was written are taken at the size that the header gives them.
        if end - begin != math.prod(shape) * _ITEM_BYTES.get(dtype, 0) and (dtype in _ITEM_BYTES or end < begin):
            raise InputError(
                f"{path}: cannot be read: {name[:100]!r} of type {dtype[:20]} and shape {shape} has {end - begin:,} bytes"
            )
        tensors[name] = TensorInfo(dtype, tuple(shape), start + begin)
        spans.append((begin, end))
    place = 0
    for begin, end in sorted(spans):
        if begin != place:
            raise InputError(f"{path}: cannot be read: its tensors overlap or leave a gap at byte {place:,}")
        place = end
    if place != size - start:
        what = "is cut short" if place > size - start else "is longer than its header says"
        raise InputError(
            f"{path}: {what}: the header names {place:,} bytes of tensors, {size - start:,} are there; copy it again"
        )
    return tensors
