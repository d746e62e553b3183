"""What a person names on the command line -> logs with names of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from medlora.errors import InputError
from medlora.evaluation.logs import lm_eval
from medlora.evaluation.logs.evaluations import find_evaluation, read_evaluation
from medlora.evaluation.logs.log import Log
from medlora.evaluation.logs.result_logs import LogCounts, read_result_log

KINDS = (
    "an evaluation's or a run's folder, predictions.parquet, samples_*.jsonl, results_*.json or a folder of "
    "lm-evaluation-harness, or a csv log"
)


@dataclass(frozen=True, slots=True)
class Input:
    """`PATH[:STAGE,STAGE][=NAME]`, taken apart."""

    path: Path
    stages: tuple[str, ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """How logs are read: the letters of a csv's options, and whether responses are read anew."""

    letters: str = "ABCDE"
    reparse: bool = False


def parse_input(text: str) -> Input:
    """`runs/a:02=mine` -> the folder, its stage and the name; a path that exists as it is written is taken so."""
    if Path(text).exists():
        return Input(Path(text))
    where, sign, name = text.rpartition("=")
    if not sign:
        where, name = text, ""
    elif not name.strip():
        raise InputError(f"{text}: no name behind =; write PATH=NAME")
    if Path(where).exists():
        return Input(Path(where), (), name)
    path, _, stages = where.rpartition(":")
    if path and Path(path).exists():
        return Input(Path(path), tuple(filter(None, stages.split(","))), name)
    raise InputError(f"{path or where}: is not there; give {KINDS}, as PATH, PATH:STAGE or PATH:STAGE=NAME")


def read_inputs(inputs: Sequence[Input], reading: Reading) -> list[Log]:
    """The logs of all inputs, each with a name of its own; raises InputError where two would share one.

    csv logs alone are read as one exam: what one of them lacks and another has is a failed answer.
    """
    expected: dict[str, str] | None = None
    if all(_is_csv(each) for each in inputs):
        _refuse_same_names([each.name or each.path.stem for each in inputs])
        expected = {}
        for each in inputs:
            for prediction in read_result_log(each.path, letters=reading.letters).predictions:
                expected.setdefault(prediction.id, prediction.gold)
    found: list[tuple[Input, Log]] = []
    for each in inputs:
        found += [(each, log) for log in _read(each, reading, expected)]
    return _name(found)


def list_files(inputs: Sequence[Input]) -> list[Path]:
    """The files that the inputs are read from, for their hashes."""
    files: list[Path] = []
    for each in inputs:
        place = find_evaluation(each.path) if each.path.is_dir() else None
        files += (
            [place / "predictions.parquet"]
            if place
            else lm_eval.find_files(each.path)
            if each.path.is_dir()
            else [each.path]
        )
    return files


def _is_csv(each: Input) -> bool:
    return each.path.is_file() and each.path.suffix not in (".parquet", ".jsonl", ".json")


def _read(each: Input, reading: Reading, expected: dict[str, str] | None) -> list[Log]:
    path = each.path
    if path.is_dir() and (place := find_evaluation(path)):
        return read_evaluation(place, each.stages)
    if path.suffix == ".parquet":
        return read_evaluation(path, each.stages)
    if each.stages:
        raise InputError(f"{path}: holds one stage; only evaluations and runs have several, so write no :STAGE")
    if path.is_dir():
        files = lm_eval.find_files(path)
        if not files:
            raise InputError(f"{path}: no predictions.parquet, evaluation or samples_*.jsonl in it; give {KINDS}")
        return [_read_lm_eval(file, reading) for file in files]
    if path.suffix == ".json":
        return [lm_eval.read_samples(file, reading.reparse) for file in lm_eval.find_samples(path)] or [
            lm_eval.read_results(path)
        ]
    if path.suffix == ".jsonl":
        return [lm_eval.read_samples(path, reading.reparse)]
    log = read_result_log(path, letters=reading.letters, expected=expected, reparse=reading.reparse)
    note = describe_counts(each.name or path.stem, log.counts)
    ordered = tuple(sorted(log.predictions, key=lambda p: p.id))
    return [Log(path.stem, ordered, notes=(note,) if note else ())]


def _read_lm_eval(path: Path, reading: Reading) -> Log:
    return lm_eval.read_results(path) if path.suffix == ".json" else lm_eval.read_samples(path, reading.reparse)


def describe_counts(stage: str, counts: LogCounts) -> str | None:
    """One sentence with everything irregular of a file; None where nothing was."""
    found = {name: value if isinstance(value, int) else len(value) for name, value in asdict(counts).items()}
    odd = [f"{n} {name.replace('_', ' ')}" for name, n in found.items() if n and name not in ("rows", "questions")]
    return f"{stage}: {found['rows']} rows, {found['questions']} questions; {', '.join(odd)}" if odd else None


def _name(found: Sequence[tuple[Input, Log]]) -> list[Log]:
    """The logs under their names; several tasks of one model are one log."""
    several = {id(each): sum(other is each for other, _ in found) for each, _ in found}
    plain = [_choose_name(each, log, several[id(each)]) for each, log in found]
    sources = {
        name: {each.path for (each, _), other in zip(found, plain, strict=True) if other == name} for name in plain
    }
    names = [
        f"{_name_folder(each.path)}:{name}"
        if len(sources[name]) > 1 and not each.name and _is_ours(each.path)
        else name
        for (each, _), name in zip(found, plain, strict=True)
    ]
    logs: dict[str, Log] = {}
    for name, (_, log) in zip(names, found, strict=True):
        renamed = replace(log, stage=name, predictions=tuple(replace(p, stage=name) for p in log.predictions))
        logs[name] = _merge(logs[name], renamed) if name in logs else renamed
    return list(logs.values())


def _choose_name(each: Input, log: Log, several: int) -> str:
    if not each.name:
        return log.stage
    return f"{each.name}:{log.stage}" if several > 1 and _is_ours(each.path) else each.name


def _is_ours(path: Path) -> bool:
    return path.suffix == ".parquet" or path.is_dir() and find_evaluation(path) is not None


def _name_folder(path: Path) -> str:
    folder = path.parent if path.is_file() else path
    return (folder.parent if folder.name == "evaluation" else folder).resolve().name


def _merge(first: Log, second: Log) -> Log:
    """Two tasks of one model; raises InputError where both answer the same question."""
    asked = {(p.test, p.id) for p in first.predictions}
    if not second.predictions or not asked or asked & {(p.test, p.id) for p in second.predictions}:
        _refuse_same_names([first.stage, second.stage])
    return Log(
        first.stage,
        (*first.predictions, *second.predictions),
        {**first.questions, **second.questions},
        tuple(dict.fromkeys((*first.notes, *second.notes))),
        (*first.totals, *second.totals),
    )


def _refuse_same_names(names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"{', '.join(twice)}: several files of that name; rename one, a stage is named by its file, or write PATH=NAME"
        )
