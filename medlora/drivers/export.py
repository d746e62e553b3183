"""A stage as files for other tools: one adapter, a whole model, or the adapters of its chain."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlora.artifacts.adapters import find_adapter, read_adapter_json
from medlora.config.model import BaseModelConfig
from medlora.curriculum.chains import Link
from medlora.errors import InputError
from medlora.model.adapter_files import ChainTensors, read_chain_tensors
from medlora.model.base_weights import BaseWeights, read_base_weights
from medlora.model.export import check_chain, copy_adapter, copy_tokenizer, export_chain
from medlora.model.merge import (
    Merge,
    Vocabulary,
    check_merge,
    copy_base_files,
    find_dtype,
    find_vocabulary,
    start_rows,
    write_configs,
)
from medlora.model.tokenizer import load_base_tokenizer, load_stage_tokenizer
from medlora.reporting.templates import fill_text

STACK_CARD = "LOADING.md"
"""How the adapters of a chain are loaded."""


@dataclass(frozen=True)
class Export:
    """What is asked for."""

    base: BaseModelConfig
    """With a folder or hub id; not `miniature`."""
    chain: Sequence[Link]
    kind: str = "adapter"
    """`adapter`, `merged` or `peft-stack`."""
    dtype: str | None = None
    """Of the weights, as torch names it; unset = the base's own, and float32 for an adapter."""
    has_plain_weights: bool = False
    """Merge into the base's unquantized weights, though the adapters were trained on quantized ones."""
    force: bool = False

    @property
    def folders(self) -> list[Path]:
        """The adapters, oldest first."""
        return [find_adapter(link.folder) for link in self.chain]


@contextmanager
def making(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when everything in it is written, and is removed when something fails."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_export(export: Export, folder: Path) -> list[str]:
    """Write a stage into an empty folder; returns what its reader must know, a sentence each.

    Raises InputError for a chain that this kind cannot hold exactly.
    """
    if not export.chain:
        raise InputError("nothing to export: the base alone has no adapter")
    check_chain(export.folders, folder, export.force)
    if export.kind == "merged":
        return _write_merged(export, folder)
    if export.kind == "peft-stack":
        return _write_stack(export, folder)
    return _write_adapter(export, folder)


def _find_rows(export: Export) -> tuple[Any, BaseWeights, Vocabulary] | None:
    """The stage's tokenizer and the rows of its added words; None where the chain adds none."""
    if not any((folder / "tokenizer_config.json").is_file() for folder in export.folders):
        return None
    tokenizer, weights = load_stage_tokenizer(export.base, export.chain), read_base_weights(export.base)
    return tokenizer, weights, find_vocabulary(weights, tokenizer, load_base_tokenizer(export.base))


def _write_adapter(export: Export, folder: Path) -> list[str]:
    found, rows, notes = _find_rows(export), {}, list[str]()
    if found is not None:
        tokenizer, weights, vocabulary = found
        rows = start_rows(weights, vocabulary)
        if vocabulary.pieces:
            notes = [f"the rows of {len(vocabulary.pieces)} added words are inside"]
        if vocabulary.size > weights.rows:
            notes += _explain_rows(vocabulary.size, weights.rows, len(tokenizer))
    export_chain(export.folders, folder, force=export.force, dtype=export.dtype or "float32", rows=rows)
    return notes + _describe_plain_base(export.base.quantization)


def _explain_rows(needed: int, rows: int, tokens: int) -> list[str]:
    """How PEFT opens an adapter whose words need more vocabulary rows than the base has.

    Raises InputError where the tokenizer counts fewer tokens than rows are needed, since PEFT resizes to its count.
    """
    if tokens < needed:
        raise InputError(
            f"the added words need {needed} vocabulary rows, the base has {rows}, and the tokenizer counts {tokens} tokens, so "
            "PEFT would add too few; write the whole model with --as merged, or the chain with --as peft-stack"
        )
    return [
        f"the base has {rows} vocabulary rows and the added words need {needed}: AutoPeftModelForCausalLM adds them by itself; "
        f"for plain PEFT call model.resize_token_embeddings({tokens}) on the base first"
    ]


def _describe_plain_base(quantization: str) -> list[str]:
    if quantization == "none":
        return []
    return [f"trained and scored on {quantization} weights; load the base in the same way for the same answers"]


def _write_merged(export: Export, folder: Path) -> list[str]:
    weights, chain = read_base_weights(export.base), read_chain_tensors(export.folders)
    check_merge(weights, chain)
    tokenizer = load_stage_tokenizer(export.base, export.chain)
    vocabulary = find_vocabulary(weights, tokenizer, load_base_tokenizer(export.base))
    quantization = "none" if export.has_plain_weights else export.base.quantization
    merge = Merge(weights, chain, vocabulary, find_dtype(export.dtype), quantization)
    is_extended = any((each / "tokenizer_config.json").is_file() for each in export.folders)
    copy_base_files(weights.folder, folder, without_tokenizer=is_extended)
    copy_tokenizer(export.folders, folder)
    write_configs(merge, tokenizer, folder)
    merge.write(folder)
    return _describe_quantization(export.base, export.has_plain_weights)


def _describe_quantization(base: BaseModelConfig, has_plain_weights: bool) -> list[str]:
    if base.quantization == "none":
        return []
    trained = f"the adapters were trained and scored on {base.quantization} weights"
    if has_plain_weights:
        return [f"{trained} and are merged into the unquantized ones, so answers may differ; score this model again"]
    rounded = base.quantization == "int8" and not base.dequantize
    inputs = "; int8 also rounded what goes into each layer, which no weight can hold" if rounded else ""
    return [f"{trained}; merged into what those weights stand for, dequantized{inputs}"]


def _write_stack(export: Export, folder: Path) -> list[str]:
    for place in export.folders[1:]:
        if read_adapter_json(place).get("use_dora"):
            raise InputError(
                f"{place}: DoRA on top of other adapters measures the plain base, which is changed once they are merged; "
                "export with --as merged"
            )
    chain = read_chain_tensors(export.folders)
    found, rows, size = _find_rows(export), {}, None
    if found is not None:
        _, weights, vocabulary = found
        rows = _find_untrained(weights, vocabulary, chain)
        size = vocabulary.size if vocabulary.size > weights.rows else None
    names = [f"{number}-{link.name}" for number, link in enumerate(export.chain, 1)]
    for number, (name, place) in enumerate(zip(names, export.folders, strict=True)):
        copy_adapter(place, folder / name, {} if number else rows)
    if found is not None:
        (folder / "tokenizer").mkdir()
        copy_tokenizer(export.folders, folder / "tokenizer")
    (folder / STACK_CARD).write_text(
        _describe_loading(export.base.model, names, size, found is not None), encoding="utf-8"
    )
    return [f"{STACK_CARD} says how to load {' + '.join(names)}", *_describe_plain_base(export.base.quantization)]


def _find_untrained(weights: BaseWeights, vocabulary: Vocabulary, chain: ChainTensors) -> dict[str, Any]:
    """The rows of added words that no adapter of the chain holds."""
    starts = start_rows(weights, vocabulary)
    left = {
        name: {i: row for i, row in rows.items() if i not in chain.rows.get(name, {})} for name, rows in starts.items()
    }
    return {name: rows for name, rows in left.items() if rows}


def _describe_loading(base: str, names: Sequence[str], size: int | None, has_tokenizer: bool) -> str:
    return fill_text(
        "loading.md",
        base=json.dumps(base, ensure_ascii=False),
        tokenizer='f"{folder}/tokenizer"' if has_tokenizer else "base",
        resize=f"model.resize_token_embeddings({size}, mean_resizing=False)\n" if size else "",
        names=json.dumps(list(names)),
    )
