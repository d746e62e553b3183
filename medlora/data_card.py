"""What a run's data is: hashes, counts, test questions found in training, duplicates, personal data. Once, before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from medlora.config import DataConfig, RunConfig, SourceConfig
from medlora.errors import InputError
from medlora.records import McqRecord, Record, TextRecord
from medlora.runs import as_json, hash_json
from medlora.sources import hash_records, read

_SHOWN = 10
"""Pairs that a message or a card names."""


@dataclass(frozen=True, slots=True)
class _Survey:
    overlaps: tuple[Any, ...]
    duplicates: dict[str, tuple[str, ...]]
    personal: tuple[tuple[str, str, Any], ...]


def list_training(config: RunConfig) -> dict[str, SourceConfig]:
    """Every source that a phase learns from, once, by its key in the config."""
    found: dict[str, SourceConfig] = {}
    for i, phase in enumerate(config.phases):
        for j, source in enumerate(phase.sources):
            plain = SourceConfig(source=source.source, kind=source.kind, limit=source.limit)
            if plain not in found.values():
                found[f"phases.{i}.sources.{j}"] = plain
    return found


def list_held_out(config: RunConfig) -> dict[str, SourceConfig]:
    """Every test and dev source of the run, by its key in the config."""
    found: dict[str, SourceConfig] = {}
    for i, phase in enumerate(config.phases):
        for j, source in enumerate(phase.validation.sources if phase.validation else ()):
            found[f"phases.{i}.validation.sources.{j}"] = source
    for i, test in enumerate(config.evaluation.tests if config.evaluation else ()):
        found[f"evaluation.tests.{i}"] = test
    return found


def find_dropped(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Ids of the training records that `data.overlap: drop` and `data.dedupe` leave out, by source; {} without either."""
    if config.data.overlap != "drop" and not config.data.dedupe:
        return {}
    survey = _survey(config.model_dump_json())
    dropped: dict[str, dict[str, None]] = {}
    if config.data.overlap == "drop":
        for hit in survey.overlaps:
            dropped.setdefault(hit.source, {})[hit.record] = None
    if config.data.dedupe:
        for source, ids in survey.duplicates.items():
            dropped.setdefault(source, {}).update(dict.fromkeys(ids))
    return {source: tuple(ids) for source, ids in dropped.items()}


def read_kept(source: SourceConfig, dropped: Mapping[str, Sequence[str]]) -> list[Record]:
    """The records of a training source without those that were dropped; raises InputError when none is left."""
    out = set(dropped.get(source.source, ()))
    kept = [record for record in read(source) if record.id not in out]
    if not kept:
        raise InputError(
            f"{source.source}: every record was dropped by data.overlap or data.dedupe; name another source"
        )
    return kept


def check_data(
    config: RunConfig, known: Mapping[str, Any] | None = None, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The run's data card, as plain JSON values; `known`, the card of an earlier start, is taken where it still stands.

    `tell` hears what is looked through: about 2,500 records are in a second.
    Raises InputError when training data holds test questions and `data.overlap` is `stop`, or when it holds more places
    that look like personal data than `data.max_personal`.
    """
    training, held_out = list_training(config), list_held_out(config)
    sources = {key: _describe(source) for key, source in training.items()}
    tests = {key: _describe(source) for key, source in held_out.items()}
    made_from = hash_json(as_json([sources, tests, config.data.model_dump(mode="json"), _RULES]))
    if known and known.get("made_from") == made_from:
        return dict(known)
    counts = [sum(part["records"] for part in parts.values()) for parts in (sources, tests)]
    tell(f"looking through {counts[0]:,} training records for {counts[1]:,} test and dev questions")
    survey = _survey(config.model_dump_json())
    _stop_at_overlaps(config.data, survey)
    _stop_at_personal(config.data, survey)
    dropped = find_dropped(config)
    records = {(hit.source, hit.record) for hit in survey.overlaps}
    card: dict[str, Any] = as_json(
        {
            "made_from": made_from,
            "training": sources,
            "held_out": tests,
            "overlap": {
                "mode": config.data.overlap,
                "records": len(records),
                "pairs": len(survey.overlaps),
                "kinds": Counter(hit.kind for hit in survey.overlaps),
                "shown": [asdict(hit) for hit in survey.overlaps[:_SHOWN]],
            },
            "duplicates": {source: len(ids) for source, ids in survey.duplicates.items()},
            "dropped": {source: len(ids) for source, ids in dropped.items()},
            "personal": Counter(finding.kind for _, _, finding in survey.personal),
        }
    )
    return card


def describe_overlap(card: Mapping[str, Any]) -> list[str]:
    """What every report made from the run has to say; nothing where no training record held a test question."""
    found = card.get("overlap", {})
    if not found.get("records") or found["mode"] != "allow":
        return []
    return [
        f"{found['records']} training records hold questions of the tests or of dev (data.overlap: allow); "
        "accuracy on them is memory, see data.json of the run"
    ]


def describe_findings(card: Mapping[str, Any]) -> list[str]:
    """What was found and let pass, a sentence each, for the terminal and the log."""
    overlap = card["overlap"]
    said = (
        [f"{overlap['records']} training records hold test or dev questions: {overlap['mode']}"]
        if overlap["records"]
        else []
    )
    said += [f"duplicates in {source}: {n}" for source, n in card["duplicates"].items()]
    said += [f"left out of {source}: {n}" for source, n in card["dropped"].items()]
    said += [f"places that look like a {kind}: {n}" for kind, n in card["personal"].items()]
    return said


_RULES = 1
"""Counts up when overlaps, duplicates or personal data are looked for in another way."""


def _describe(source: SourceConfig) -> dict[str, Any]:
    records = read(source)
    return {"source": source.source, "records": len(records), "hash": hash_records(records)}


@lru_cache(maxsize=2)
def _survey(config_json: str) -> _Survey:
    from medlora.overlap import TestIndex, find_duplicates
    from medlora.personal import find_personal

    config = RunConfig.model_validate_json(config_json)
    questions = {
        key: [record for record in read(source) if isinstance(record, McqRecord)]
        for key, source in list_held_out(config).items()
    }
    index = TestIndex(questions)
    overlaps: list[Any] = []
    personal: list[tuple[str, str, Any]] = []
    duplicates: dict[str, tuple[str, ...]] = {}
    for source in list_training(config).values():
        records = read(source)
        twice = tuple(id for id, _ in find_duplicates(records))
        if twice:
            duplicates[source.source] = twice
        for record in records:
            overlaps += index.find(record, source.source)
            personal += [
                (source.source, record.id, found) for text in _list_texts(record) for found in find_personal(text)
            ]
    return _Survey(tuple(overlaps), duplicates, tuple(personal))


def _list_texts(record: Record) -> Iterator[str]:
    if isinstance(record, TextRecord):
        yield record.text
    elif isinstance(record, McqRecord):
        yield from (record.question, *record.options, *record.rationale.values())
    else:
        yield from (record.english, record.korean)


def _stop_at_overlaps(data: DataConfig, survey: _Survey) -> None:
    if data.overlap != "stop" or not survey.overlaps:
        return
    records = {(hit.source, hit.record) for hit in survey.overlaps}
    shown = "\n  ".join(
        f"{hit.source} {hit.record}: {hit.question} of {hit.test} ({hit.kind}, {hit.score:.0%} of it)"
        for hit in survey.overlaps[:_SHOWN]
    )
    more = f"\n  ... and {len(survey.overlaps) - _SHOWN} more pairs" if len(survey.overlaps) > _SHOWN else ""
    raise InputError(
        f"data.overlap: {len(records)} training records hold questions of the tests or of dev:\n  {shown}{more}\n"
        "take other sources, or say data.overlap=drop (these records are left out and counted) or data.overlap=allow "
        "(every report made from the run says it)"
    )


def _stop_at_personal(data: DataConfig, survey: _Survey) -> None:
    if len(survey.personal) <= data.max_personal:
        return
    shown = "\n  ".join(
        f"{source} {id}, line {found.line}: {found.kind}" for source, id, found in survey.personal[:_SHOWN]
    )
    more = f"\n  ... and {len(survey.personal) - _SHOWN} more" if len(survey.personal) > _SHOWN else ""
    raise InputError(
        f"data.max_personal: {len(survey.personal)} places in the training data look like personal data, allowed are "
        f"{data.max_personal}:\n  {shown}{more}\nremove them from the data, or allow so many with data.max_personal"
    )
