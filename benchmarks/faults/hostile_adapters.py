"""Adapter folders that somebody spoiled, each loaded in a process of its own: what became of it, in which time.

PYTHONPATH=. python benchmarks/faults/hostile_adapters.py     every case, as a table; exit code 1 where one went wrong

A case is right where it ends with one message in under 2 seconds, or where what was spoiled does not matter and the model
computes what the honest adapter gives. The base must compute the same before and after in either case.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from medlora.artifacts.adapters import fetch_adapter
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.curriculum.chains import Link
from medlora.curriculum.checks import check_adapters
from medlora.errors import InputError
from medlora.model.base import load_base
from medlora.model.chain import activate, add_adapter, load_chain, save_adapter
from medlora.model.tokenizer import load_tokenizer
from tests.support.tiny import build_bases

LIMIT_S, MEMORY_BYTES, TIMEOUT_S = 2.0, 6 * 2**30, 60.0
IDS = torch.arange(3, 19)[None]
Spoil = Callable[[Path], Any]


class Ran:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.mark), "w"))


def set_config(**changes: Any) -> Spoil:
    """Change keys of the adapter's config."""

    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def set_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    """Change the adapter's tensors."""

    def spoil(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)

    return spoil


def write(name: str, content: bytes) -> Spoil:
    """Replace a file, or add one."""
    return lambda folder: (folder / name).write_bytes(content)


def header(content: Any, length: int | None = None) -> Spoil:
    """Replace the weights by a header alone."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return write("adapter_model.safetensors", struct.pack("<Q", len(text) if length is None else length) + text)


def link(name: str, target: str) -> Spoil:
    """Replace a file by a link, or add one."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def fifo(name: str) -> Spoil:
    """Replace a file by a pipe that nobody writes to, or add one."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def first(tensors: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    """The tensors, the first number of the first of them replaced."""
    name, changed = next(iter(tensors.items()))
    changed = changed.clone()
    changed.view(-1)[0] = value
    return {**tensors, name: changed}


def list_cases(mark: Path) -> dict[str, tuple[Spoil, str]]:
    """Every case: what is done to the folder, and whether it is to be `refused` or to give the `same` numbers."""
    hangs, weights = "^(([a-z_0-9])+.?)+Z$", "adapter_model.safetensors"
    prefix = "base_model.model."
    evil = pickle.dumps(Ran(mark))
    refused: dict[str, Spoil] = {
        **{
            f"start {start}": set_config(init_lora_weights=start)
            for start in ("pissa_niter_9", "olora", "corda", "loftq")
        },
        **{f"rank {rank!r}": set_config(r=rank) for rank in (10**9, 10**400, 0, -1, "8", float("nan"))},
        **{f"alpha {alpha}": set_config(lora_alpha=float(alpha)) for alpha in ("inf", "nan")},
        "rank by pattern": set_config(rank_pattern={".*": 10**9}),
        "rank by pattern, too high": set_config(rank_pattern={"q_proj": 8}),
        "target pattern that hangs": set_config(target_modules=hangs),
        "target pattern, look behind": set_config(target_modules="(?<=q)_proj"),
        "targets another layer": set_config(target_modules=["q_proj"]),
        "bias": set_config(bias="all"),
        "whole modules": set_config(modules_to_save=["norm"]),
        "layers twice": set_config(layer_replication=[[0, 2], [0, 2]]),
        "parameters": set_config(target_parameters=["embed_tokens.weight"]),
        "megatron": set_config(megatron_config={"a": 1}),
        "another kind of adapter": set_config(peft_type="PREFIX_TUNING"),
        "rows that are not there": set_config(trainable_token_indices=[10**12]),
        "rows below zero": set_config(trainable_token_indices=[-1]),
        "name with control characters": set_config(base_model_name_or_path="\ud800\x1b[2J"),
        "config of 200 MB": write("adapter_config.json", b'{"x":"' + b"a" * 200_000_000 + b'"}'),
        "config nested deeply": write("adapter_config.json", b"[" * 100_000),
        "config not UTF-8": write("adapter_config.json", b"\xff\xfe\x00"),
        "config is a pipe": fifo("adapter_config.json"),
        "weights are a pipe": fifo(weights),
        "weights are /dev/zero": link(weights, "/dev/zero"),
        "weights are another file": link(weights, "/etc/hostname"),
        "weights are a pickle": write(weights, evil),
        "header of 2^62 bytes": header(b"{}", 2**62),
        "header of 90 MB": header(b'{"a":' + b"[" * 90_000_000),
        "a million tensors": header(
            {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(10**6)}
        ),
        "tensor beyond the file": header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        "weights cut": lambda d: os.truncate(d / weights, (d / weights).stat().st_size // 2),
        "no tensors": set_tensors(lambda t: {}),
        "a tensor less": set_tensors(lambda t: dict(list(t.items())[1:])),
        "a tensor of no layer": set_tensors(lambda t: {**t, f"{prefix}evil.lora_A.weight": torch.ones(2, 2)}),
        "a weight of the base": set_tensors(lambda t: {**t, f"{prefix}model.norm.weight": torch.full((32,), 9.0)}),
        "a weight below an adapter": set_tensors(
            lambda t: {**t, f"{prefix}model.layers.0.self_attn.q_proj.base_layer.weight": torch.zeros(32, 32)}
        ),
        "a path as a name": set_tensors(lambda t: {**t, "../../etc/passwd": torch.ones(2)}),
        "one NaN": set_tensors(lambda t: first(t, float("nan"))),
        "one infinity": set_tensors(lambda t: first(t, float("inf"))),
        "whole numbers": set_tensors(lambda t: {name: tensor.to(torch.int8) for name, tensor in t.items()}),
        "other shapes": set_tensors(lambda t: {name: torch.zeros(len(tensor) + 1, 3) for name, tensor in t.items()}),
        "tokenizer nested deeply": write("tokenizer.json", b"[" * 1_000_000),
        "template that loops": write("chat_template.jinja", b"{% for i in range(10**9) %}{% endfor %}"),
    }
    same: dict[str, Spoil] = {
        "nothing": lambda folder: None,
        "a pickle beside it": write("adapter_model.bin", evil),
        "code beside it": write("modeling.py", f"open({str(mark)!r}, 'w')".encode()),
        "a pipe beside it": fifo("notes.txt"),
        "a link to / beside it": link("root", "/"),
        "a link to itself": link("loop", "."),
        "auto_mapping": set_config(auto_mapping={"parent_library": "os", "base_model_class": "system"}),
        "alpha pattern that hangs": set_config(alpha_pattern={hangs: 3}),
        "excluded pattern that hangs": set_config(exclude_modules=hangs),
        "all-linear": set_config(target_modules="all-linear"),
    }
    return {name: (spoil, "refused") for name, spoil in refused.items()} | {n: (s, "same") for n, s in same.items()}


def try_folder(
    base: BaseModelConfig, folder: Path, expected: torch.Tensor, plain: torch.Tensor
) -> tuple[str, str, float]:
    """What becomes of a folder in a process of its own: the outcome, the message, and the seconds up to it."""
    reader, writer = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        try:
            outcome = load(base, folder, expected, plain)
        except InputError as error:
            outcome = ("refused", str(error))
        except BaseException as error:
            outcome = (type(error).__name__, str(error))
        os.write(writer, json.dumps([*outcome, time.monotonic() - started])[:60_000].encode())
        os._exit(0)
    os.close(writer)
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() - started < TIMEOUT_S:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        found = pipe.read()
    if not found:
        return ("hangs" if done == (0, 0) else f"died of {done[1]}"), "", time.monotonic() - started
    outcome, message, seconds = json.loads(found)
    return outcome, message, seconds


def load(base: BaseModelConfig, folder: Path, expected: torch.Tensor, plain: torch.Tensor) -> tuple[str, str]:
    """Load a folder as an evaluation does, and compare what the stage and the base compute."""
    found = fetch_adapter(str(folder), None)
    check_adapters(base, {"s": [Link(name="s", folder=str(found))]})
    model = load_chain(load_base(base, load_tokenizer(base)), [("s", found)])
    with torch.no_grad():
        stage = model(IDS).logits
        activate(model, [])
        if not torch.equal(model(IDS).logits, plain):
            return "THE BASE CHANGED", ""
    return ("same" if torch.equal(stage, expected) else "OTHER NUMBERS"), ""


def main() -> int:
    """Exit code 0 where every case is right."""
    torch.set_num_threads(1)
    home = Path(tempfile.mkdtemp())
    base = BaseModelConfig(model=build_bases(home / "bases")["gemma"])
    model = load_base(base, load_tokenizer(base))
    with torch.no_grad():
        plain = model(IDS).logits
        model = add_adapter(model, "00", LoraSettings(r=4, alpha=8))
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.fill_(0.05)
        save_adapter(model, "00", home / "honest", None, base.model)
        expected = model(IDS).logits
    table, wrong, mark = Table("case", "outcome", "s", "message", title="Spoiled adapters"), 0, home / "ran"
    cases = list_cases(mark)
    for name, (spoil, wanted) in cases.items():
        folder = home / "spoiled"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(home / "honest", folder)
        spoil(folder)
        outcome, message, seconds = try_folder(base, folder, expected, plain)
        late = outcome == "refused" and seconds > LIMIT_S
        right = outcome == wanted and not late and "\n" not in message and not mark.exists()
        wrong += not right
        shown = message.replace(str(folder), "").lstrip("/: ")
        table.add_row(name, outcome if right else f"WRONG: {outcome}", f"{seconds:.1f}", shown[:90])
        mark.unlink(missing_ok=True)
    Console(width=150, highlight=False, markup=False).print(table)
    print(f"{len(cases) - wrong} of {len(cases)} right")
    shutil.rmtree(home)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
