"""The YAML file of a config: read, `--set` overrides, errors with the dotted key, JSON schema for editors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import BaseModel, ValidationError

from medlora.bounds import name_type
from medlora.config.base import Section
from medlora.config.evaluation import EvaluateConfig
from medlora.config.loading.jobs import refuse_other_job
from medlora.config.loading.places import Places, name_item, refuse_twice
from medlora.config.loading.words import describe_problem, is_key, keys_at, name_key, show_value
from medlora.config.run import RunConfig
from medlora.config.sweep import SweepConfig
from medlora.errors import InputError

Config = TypeVar("Config", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of numbers: `1e-4` is one, `00` and `012` are text, so that phase names need no quotes."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:0|[1-9][0-9]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|(?:0|[1-9][0-9]*)\.?[eE][-+]?[0-9]+|(?:0|[1-9][0-9]*)\.)$"
    ),
    list("-+.0123456789"),
)


_MOST_VALUES = 100_000
"""More than any config has; aliases of aliases make billions of a few lines."""


_MOST_BYTES = 4 * 2**20


def read_yaml(text: str) -> Any:
    """YAML text as plain values, with YAML 1.2 numbers.

    Raises yaml.YAMLError, also for a key that appears twice in one mapping and for aliases that grow without bound.
    """
    try:
        root = yaml.compose(text, _Loader)
        refuse_twice(root)
        values = _count_values(root, {})
        if values > _MOST_VALUES:
            raise yaml.YAMLError(f"its aliases expand to more than {_MOST_VALUES:,} values")
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or an alias holds itself") from None


def _count_values(node: yaml.Node | None, known: dict[yaml.Node, int]) -> int:
    """How many values a node holds once every alias is written out."""
    if node in known:
        return known[node]
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inside = node.value
    elif isinstance(node, yaml.MappingNode):
        inside = [part for pair in node.value for part in pair]
    count = 1 + sum(_count_values(part, known) for part in inside)
    if node is not None:
        known[node] = count
    return count


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path}: is larger than {_MOST_BYTES >> 20} MiB, which no config is")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such config file; see configs/ for complete ones") from None
    except IsADirectoryError:
        raise InputError(f"{path}: cannot be read: is a folder; name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: cannot be read: is not UTF-8 (at byte {error.start + 1}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def load_raw(path: Path, overrides: Sequence[str] = ()) -> dict[str, object]:
    """The config file as a plain mapping with `--set` overrides applied and `phase_defaults` spread over the phases.

    Raises InputError when the file is missing, unreadable or not a mapping, or an override names nothing.
    """
    try:
        raw = read_yaml(_read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise InputError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(raw, dict):
        raise InputError(
            f"{path}: a config is a mapping of keys to values, found {name_type(raw)}; see configs/quickstart.yaml"
        )
    for override in overrides:
        _override(raw, override)
    defaults = raw.pop("phase_defaults", None) or {}
    if not isinstance(defaults, dict):
        raise InputError(f"{path}: phase_defaults must be a mapping of keys to values, found {name_type(defaults)}")
    if isinstance(raw.get("phases"), list):
        raw["phases"] = [{**defaults, **phase} if isinstance(phase, dict) else phase for phase in raw["phases"]]
    return raw


@overload
def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig: ...


@overload
def load(path: Path, overrides: Sequence[str], model: type[Config]) -> Config: ...


def load(path: Path, overrides: Sequence[str] = (), model: type[Any] = RunConfig) -> object:
    """The config at `path` with `KEY=VALUE` overrides; raises InputError that names every wrong key."""
    return validate(path, load_raw(path, overrides), overrides, model)


def validate(path: Path, raw: Mapping[str, object], overrides: Sequence[str], model: type[Config]) -> Config:
    """The config of a file's plain values; raises InputError that names every wrong key with its line."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        refuse_other_job(path, raw, model)
        places = Places(_read_text(path), raw, overrides, _Loader)
        found = [places.describe(line) for line in explain(error, model)]
        more = [f"... and {len(found) - _MOST_LINES} more"] if len(found) > _MOST_LINES else []
        lines = "\n".join(f"  {line}" for line in [*found[:_MOST_LINES], *more])
        raise InputError(f"{path}: the config is not valid:\n{lines}") from None


_MOST_LINES = 20


def _override(raw: dict[str, object], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(f"--set {override}: write KEY=VALUE, e.g. --set phases.01.learning_rate=1e-4")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"--set {override}: the value is not valid YAML: {reason}") from None
    try:
        set_value(raw, key, value)
    except InputError as error:
        raise InputError(f"--set {override}: {error}") from None


def set_value(raw: dict[str, object], key: str, value: object) -> None:
    """Put a value at a dotted key, sections made where they are absent; raises InputError when the key leads nowhere."""
    *parents, last = key.split(".")
    node = find_node(raw, parents, make=True)
    if isinstance(node, list):
        node[_position(node, last)] = value
    else:
        node[last] = value


def find_node(raw: dict[str, object], parts: Sequence[str], make: bool = False) -> Any:
    """The mapping or list at the end of a dotted key's parts, {} where it is absent; raises InputError where there can be none."""
    node: Any = raw
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            node = node[_position(node, part)]
        elif make:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            node = node.get(part) if node.get(part) is not None else {}
        if not isinstance(node, dict | list):
            raise InputError(f"{'.'.join(parts[: depth + 1])} is {show_value(node)}, which has no keys")
    return node


def _position(items: list[object], part: str) -> int:
    """Where `part` points in a list: an item of that name first, then a 0-based index."""
    names = [name_item(item) if isinstance(item, dict) else None for item in items]
    if names.count(part) == 1:
        return names.index(part)
    if re.fullmatch(r"0|[1-9][0-9]*", part) and int(part) < len(items):
        return int(part)
    known = ", ".join(str(name) for name in names if name is not None)
    raise InputError(f"no item {part!r}; there are 0..{len(items) - 1}" + (f" or by name {known}" if known else ""))


def explain(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """A line for every wrong key: what is allowed there, what was found."""
    problems = error.errors(include_url=False)
    seen = set()
    for problem in problems:
        path = [part for part in problem["loc"] if is_key(part)]
        dotted = name_key(problem["loc"])
        # A list whose items are wrong is counted as too short as well; a union complains once a branch.
        deeper = any(other["loc"][: len(problem["loc"])] == problem["loc"] != other["loc"] for other in problems)
        if dotted in seen or deeper:
            continue
        seen.add(dotted)
        if problem["type"] == "extra_forbidden":
            allowed = keys_at(model, path[:-1])
            near = difflib.get_close_matches(str(path[-1]), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(sorted(allowed))}"
            yield f"{dotted}: unknown key; {hint}"
        elif problem["type"] == "value_error":
            yield f"{dotted}: {problem['ctx']['error']}" if dotted else str(problem["ctx"]["error"])
        elif problem["type"] == "missing":
            yield f"{dotted}: is required"
        else:
            same = [other for other in problems if name_key(other["loc"]) == dotted]
            yield f"{dotted}: {describe_problem(same)}"


def schema() -> dict[str, object]:
    """The JSON schema of a run config file, for editors; `phase_defaults` takes any key of a phase."""
    made = RunConfig.model_json_schema()
    phase = made["$defs"]["PhaseConfig"]
    made["properties"]["phase_defaults"] = {
        "type": "object",
        "description": "Values of every phase that does not set its own.",
        "properties": phase["properties"],
        "additionalProperties": False,
    }
    # A phase may take its required keys from phase_defaults, so only its name is required in the list.
    phase["required"] = ["name"]
    return made


def load_evaluate_config(path: Path, overrides: Sequence[str] = ()) -> EvaluateConfig:
    """The evaluation config at `path`; raises InputError that names every wrong key."""
    return load(path, overrides, EvaluateConfig)


def load_sweep_config(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep config at `path`; raises InputError that names every wrong key."""
    return load(path, overrides, SweepConfig)
