"""The space of a sweep: what each key may be, in words, and a run config with values put in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from medlora.config.loading.files import explain, find_node, read_yaml, set_value
from medlora.config.loading.places import name_item
from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.config.phase import CPU_ROWS, GLOBAL_BATCH, PhaseConfig
from medlora.config.run import RunConfig
from medlora.config.sweep import KINDS
from medlora.errors import InputError

_DERIVED = {"alpha_over_r": ("alpha",), "global_batch": ("batch_size", "accumulation"), "share": ("weight",)}
"""Words that are no key of a run config, and the keys that they set."""


_DIGITS = 4
"""Significant digits of a suggested number: what a person would write into a config."""


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[object, ...]

    def list_probes(self) -> dict[str, object]:
        """Values that represent all, and what they are called in a message: here all of them."""
        return {json.dumps(value, ensure_ascii=False): value for value in self.values}

    def holds(self, value: object) -> bool:
        """Whether the value is in the domain."""
        return value in self.values


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `log`: every ratio is as likely as every other."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def list_probes(self) -> dict[str, object]:
        """The two ends."""
        return {f"{self.low:g}, the lower end,": self.low, f"{self.high:g}, the upper end,": self.high}

    def holds(self, value: object) -> bool:
        """Whether the value is in the domain."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def round(self, value: float) -> float:
        """The value in few digits, still inside."""
        if self.whole:
            return int(value)
        return min(self.high, max(self.low, float(f"{value:.{_DIGITS}g}")))


Domain = Choice | Range


Params = Mapping[str, Any]
"""A value for every key of a space."""


def parse_domain(key: str, text: object) -> Domain:
    """`choice [8, 16]`, `uniform 0 0.1`, `loguniform 5e-5 5e-4`, `int 1 8`, `logint 1 64` or a list; raises InputError."""
    at = f"space.{key}"
    if isinstance(text, list):
        return _make_choice(at, text)
    word, _, rest = str(text).strip().partition(" ")
    if word == "choice":
        try:
            values = read_yaml(rest)
        except yaml.YAMLError as error:
            raise InputError(f"{at}: {text!r}: the values are not valid YAML: {error}") from None
        return _make_choice(at, values)
    if word not in ("uniform", "loguniform", "int", "logint"):
        raise InputError(f"{at}: {text!r} is no domain; write {KINDS}")
    whole = word.endswith("int")
    ends = [read_yaml(part) for part in rest.split()]
    if len(ends) != 2 or not all(isinstance(end, int if whole else int | float) for end in ends):
        raise InputError(f"{at}: {text!r}: {word} takes two {'whole ' * whole}numbers, as in `{word} 1 8`")
    low, high = ends
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"{at}: {text!r}: the first number must be below the second")
    log = word.startswith("log")
    if log and low <= 0:
        raise InputError(f"{at}: {text!r}: {word} begins above 0")
    return Range(low, high, log, whole)


def _make_choice(at: str, values: object) -> Choice:
    if not isinstance(values, list) or not values:
        raise InputError(f"{at}: a choice needs a list of values, as in `choice [8, 16, 32]`; found {values!r}")
    if len({json.dumps(value) for value in values}) < len(values):
        raise InputError(f"{at}: a value appears there twice: {values!r}")
    return Choice(tuple(values))


def is_shape(key: str) -> bool:
    """Whether a key shapes the adapter: one that is trained further cannot change it."""
    return "lora" in key.split(".")


def parse_space(space: Mapping[str, object], searched: Sequence[str], everything: bool) -> dict[str, Domain]:
    """The domains by key; raises InputError for keys that a sweep may not search, or that set the same thing.

    `searched` are the phases that are searched, `everything` whether these are all phases of the run.
    """
    if not space:
        raise InputError(f"space: is empty; name keys of the run config, e.g. lora.r: choice [8, 16]; kinds: {KINDS}")
    for key in space:
        first, *others = key.split(".")
        if first == "evaluation":
            raise InputError(f"space.{key}: a sweep never looks at the tests; trials are scored on dev alone")
        if first in ("name", "seed", "storage", "placement", "start", "data", "phase_defaults"):
            raise InputError(f"space.{key}: is no hyperparameter; search keys of lora, phases and base")
        if first == "phases" and others and others[0] not in searched:
            raise InputError(
                f"space.{key}: phase {others[0]} is not searched, every trial has it unchanged; searched: "
                f"{', '.join(searched)} (phases are named, see `phases`)"
            )
        if first == "base" and not everything:
            raise InputError(f"space.{key}: the phases before are trained once on one base; set phases: all")
        last = key.rpartition(".")[2]
        for other in space:
            if other != key and other in [f"{key.rpartition('.')[0]}.{each}" for each in _DERIVED.get(last, ())]:
                raise InputError(f"space.{key}: sets {other}, which the space names too; give one of them")
    return {key: parse_domain(key, text) for key, text in space.items()}


def apply_params(raw: Mapping[str, Any], params: Params, searched: Sequence[str], everything: bool) -> dict[str, Any]:
    """The run config `raw` with values put in; raises InputError where a key leads nowhere.

    Where not every phase is searched, `lora` is that of the adapters that the searched phases begin: the others have
    their own.
    """
    made: dict[str, Any] = _copy(raw)
    derived = [key for key in params if key.rpartition(".")[2] in _DERIVED]
    for key in [*(key for key in params if key not in derived), *derived]:
        for place in _find_places(made, key, searched, everything):
            *parents, last = place.split(".")
            if last == "alpha_over_r":
                node = find_node(made, parents, make=True)
                node["alpha"] = _round(params[key] * node.get("r", LoraSettings().r))
            elif last == "global_batch":
                _set_batch(find_node(made, parents), key, params[key])
            elif last == "share" and parents[-2:-1] == ["sources"]:
                _set_share(made, parents, key, params[key])
            else:
                set_value(made, place, params[key])
    return made


def _find_places(raw: dict[str, Any], key: str, searched: Sequence[str], everything: bool) -> list[str]:
    """The dotted keys of a run config that a key of the space means."""
    first, *others = key.split(".")
    if first == "lora" and not everything:
        begun = [phase for phase in searched if _find_phase(raw, phase).get("chain") != "continue"]
        if not begun:
            raise InputError(f"phase {searched[0]} continues an adapter, whose shape is given; remove {key}")
        keys = [f"phases.{phase}.{key}" for phase in begun]
    else:
        keys = [key]
    for each in keys:
        parts = each.split(".")
        if parts[0] == "phases" and parts[2:3] == ["lora"]:
            phase = _find_phase(raw, parts[1])
            phase["lora"] = {**(raw.get("lora") or {}), **(phase.get("lora") or {})}
    return keys


def _find_phase(raw: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = find_node(raw, ["phases", name])
    return found


def _set_batch(phase: dict[str, Any], key: str, total: object) -> None:
    """Forward passes stay at most as large as they were, and as few as can be."""
    if not isinstance(total, int) or total < 1:
        raise InputError(f"{key}: a global batch is a whole number of sequences, found {total!r}")
    largest = phase.get("batch_size", CPU_ROWS if phase.get("accumulation") else "auto")
    if largest == "auto" or phase.get("global_batch") is not None:
        phase["global_batch"] = total
        return
    size = max(n for n in range(1, min(largest, total) + 1) if total % n == 0)
    phase["batch_size"], phase["accumulation"] = size, total // size


def _set_share(raw: dict[str, Any], parents: Sequence[str], key: str, share: object) -> None:
    """The source's weight for this share of the phase's sources; the ratios of the others do not change."""
    source, sources = find_node(raw, parents), find_node(raw, parents[:-1])
    if any(each.get("weight") is None for each in sources) or len(sources) < 2:
        raise InputError(f"{key}: needs two sources or more, each with a weight")
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise InputError(f"{key}: a share lies between 0 and 1, found {share!r}")
    rest = sum(each["weight"] for each in sources if each is not source)
    for each in sources:
        each["weight"] = share if each is source else _round((1 - share) * each["weight"] / rest)


def read_params(
    raw: Mapping[str, Any], run: RunConfig, keys: Sequence[str], searched: Sequence[str], everything: bool
) -> dict[str, Any]:
    """The values that a config has at the keys of a space: the params of the unchanged config."""
    found = {}
    whole: dict[str, Any] = run.model_dump(mode="json")
    copied = _copy(raw)
    for key in keys:
        place = _find_places(copied, key, searched, everything)[0]
        *parents, last = place.split(".")
        if parents[0] == "phases" and parents[2:3] == ["lora"]:
            phase = find_node(whole, parents[:2])
            phase["lora"] = phase["lora"] or whole["lora"]
        node = find_node(whole, parents)
        if last == "alpha_over_r":
            found[key] = node["alpha"] / node["r"]
        elif last == "global_batch":
            passes = node.get("accumulation")
            found[key] = node["batch_size"] * passes if passes else node.get("global_batch") or GLOBAL_BATCH
        elif last == "share" and parents[-2:-1] == ["sources"]:
            total = sum(each.get("weight") or 0 for each in find_node(whole, parents[:-1]))
            found[key] = (node.get("weight") or 0) / (total or 1)
        else:
            found[key] = node.get(last)
    return found


def list_keys(raw: Mapping[str, Any], searched: Sequence[str], everything: bool) -> list[str]:
    """The keys that a space may name, to find the nearest to one that is none."""
    lora = [f"lora.{name}" for name in (*LoraSettings.model_fields, "alpha_over_r")]
    keys = [*lora, *(f"base.{name}" for name in BaseModelConfig.model_fields if everything)]
    for name in searched:
        phase = find_node(_copy(raw), ["phases", name])
        own = [*PhaseConfig.model_fields, *lora]
        for part in ("sources", "replay"):
            own += [f"{part}.{name_item(item)}.share" for item in phase.get(part) or ()]
        keys += [f"phases.{name}.{key}" for key in own]
    return keys


def validate(raw: Mapping[str, object]) -> RunConfig:
    """The run config of plain values; raises InputError naming every key that is wrong."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise InputError("; ".join(explain(error, RunConfig))) from None


def format_value(value: object) -> str:
    """A value as tables show it: short numbers, lists without quotes."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return re.sub(r"[\"']", "", json.dumps(value, ensure_ascii=False))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _copy(node: Any) -> Any:
    """A copy that shares no object: a YAML anchor makes two phases one object, which `deepcopy` would preserve."""
    if isinstance(node, Mapping):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node


def _round(value: float) -> float:
    return float(f"{value:.6g}")
