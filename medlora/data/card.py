"""What a run's data is: hashes, counts, bad rows, test questions found in training, duplicates, personal data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from medlora.config.run import RunConfig
from medlora.config.sources import DataConfig, SourceConfig
from medlora.data.sources import scan, stream, stream_placed
from medlora.errors import InputError
from medlora.records import McqRecord, Record, TextRecord
from medlora.runs.files import read_mapping
from medlora.runs.manifests import as_json, hash_json

if TYPE_CHECKING:
    from medlora.data.overlap import Overlap
    from medlora.data.personal import Finding

_SHOWN, _RECORDED = 10, 1000
"""Most pairs that a message shows, and that the card holds."""


_PARTS = ("training", "held_out", "overlap", "duplicates", "dropped", "personal")
"""The mappings that a card holds."""


_EXCERPT = 100
"""Characters of a text that are shown beside a pair."""


@dataclass(frozen=True, slots=True)
class _Survey:
    overlaps: tuple[Overlap, ...]
    excerpts: tuple[tuple[str, str, str], ...]
    """Of the first pairs: where the training record is, how it begins, how the question begins."""
    duplicates: dict[str, tuple[str, ...]]
    personal: tuple[tuple[str, Finding], ...]
    """Where a record is, and what was found in it."""


class SourceCard(TypedDict):
    """One source in a data card."""

    source: str
    licence: str | None
    schema: str
    first_option: int | None
    rows: int
    records: int
    hash: str
    quarantine: dict[str, int]
    odd: dict[str, int]


class OverlapCard(TypedDict):
    """Test and dev questions that were found in training data."""

    mode: str
    records: int
    pairs: int
    kinds: dict[str, int]
    shown: list[dict[str, object]]


class DataCard(TypedDict):
    """What `data.json` of a run holds."""

    made_from: str
    training: dict[str, SourceCard]
    held_out: dict[str, SourceCard]
    overlap: OverlapCard
    duplicates: dict[str, int]
    dropped: dict[str, int]
    personal: dict[str, int]


def list_training(config: RunConfig) -> dict[str, SourceConfig]:
    """Every source that a phase learns from, once, by its key in the config."""
    found: dict[str, SourceConfig] = {}
    for i, phase in enumerate(config.phases):
        for j, source in enumerate(phase.sources):
            plain = SourceConfig.model_validate(source.model_dump(include=set(SourceConfig.model_fields)))
            same = next((key for key, each in found.items() if _unlicensed(each) == _unlicensed(plain)), None)
            if same is None or (plain.licence and not found[same].licence):
                found[same or f"phases.{i}.sources.{j}"] = plain
    return found


def _unlicensed(source: SourceConfig) -> SourceConfig:
    """The source as it is read: its licence, which one phase may name and another not, changes nothing."""
    return source.model_copy(update={"licence": None})


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


def stream_kept(source: SourceConfig, dropped: Mapping[str, Sequence[str]]) -> Iterator[Record]:
    """The records of a training source without those that were dropped; raises InputError when none is left."""
    out = set(dropped.get(source.source, ()))
    left = False
    for record in stream(source):
        if record.id not in out:
            left = True
            yield record
    if not left:
        raise InputError(
            f"{source.source}: every record was dropped by data.overlap or data.dedupe; name another source"
        )


def read_card(path: Path) -> DataCard | None:
    """The data card of an earlier start, None when it is absent or damaged; raises InputError when it is something else."""
    card = read_mapping(path)
    for part in _PARTS if card else ():
        if not isinstance((card or {}).get(part, {}), dict):
            raise InputError(f"{path}: {part} must be a mapping; remove the file, it is written again")
    return cast(DataCard, card) if card and set(_PARTS) <= set(card) else None


def check_data(
    config: RunConfig, known: DataCard | None = None, on_begin: Callable[[str], None] = lambda text: None
) -> DataCard:
    """The run's data card, as plain JSON values; `known`, the card of an earlier start, is reused if valid.

    `on_begin` receives what is looked through: about 2,500 records are in a second.
    Raises InputError when training data holds test questions and `data.overlap` is `stop`, or when it holds more places
    that look like personal data than `data.max_personal`.
    """
    training, held_out = list_training(config), list_held_out(config)
    sources = {key: _describe(source) for key, source in training.items()}
    tests = {key: _describe(source) for key, source in held_out.items()}
    made_from = hash_json(as_json([sources, tests, config.data.model_dump(mode="json"), _RULES]))
    if known and known.get("made_from") == made_from:
        return known.copy()
    counts = [sum(part["records"] for part in parts.values()) for parts in (sources, tests)]
    on_begin(f"looking through {counts[0]:,} training records for {counts[1]:,} test and dev questions")
    survey = _survey(config.model_dump_json())
    _stop_at_overlaps(config.data, survey)
    _stop_at_personal(config.data, survey)
    dropped = find_dropped(config)
    records = {(hit.source, hit.record) for hit in survey.overlaps}
    card: DataCard = as_json(
        {
            "made_from": made_from,
            "training": sources,
            "held_out": tests,
            "overlap": {
                "mode": config.data.overlap,
                "records": len(records),
                "pairs": len(survey.overlaps),
                "kinds": Counter(hit.kind for hit in survey.overlaps),
                "shown": _describe_pairs(survey),
            },
            "duplicates": {source: len(ids) for source, ids in survey.duplicates.items()},
            "dropped": {source: len(ids) for source, ids in dropped.items()},
            "personal": Counter(finding.kind for _, finding in survey.personal),
        }
    )
    return card


def describe_overlap(card: DataCard | None) -> list[str]:
    """Notes for every report made from the run; none where no training record held a test question."""
    found = card["overlap"] if card else None
    if not found or not found.get("records") or found["mode"] != "allow":
        return []
    return [
        f"{found['records']} training records hold questions of the tests or of dev (data.overlap: allow); "
        "accuracy on them is memory, see data.json of the run"
    ]


def describe_findings(card: DataCard) -> list[str]:
    """What was found and let pass, a sentence each, for the terminal and the log."""
    overlap = card["overlap"]
    findings = (
        [f"{overlap['records']} training records hold test or dev questions: {overlap['mode']}"]
        if overlap["records"]
        else []
    )
    for part in [*card["training"].values(), *card["held_out"].values()]:
        if bad := sum(part["quarantine"].values()):
            counts = ", ".join(f"{kind} {n}" for kind, n in part["quarantine"].items())
            findings.append(
                f"{part['source']}: {bad} of {part['rows']} rows are no valid records and left out ({counts})"
            )
        if part["first_option"] is not None:
            findings.append(f"{part['source']}: by the data, answers number the first option {part['first_option']}")
        findings += [f"{part['source']}: {kind}: {n}" for kind, n in part["odd"].items()]
    findings += [f"duplicates in {source}: {n}" for source, n in card["duplicates"].items()]
    findings += [f"left out of {source}: {n}" for source, n in card["dropped"].items()]
    findings += [f"places that look like a {kind}: {n}" for kind, n in card["personal"].items()]
    return findings


_RULES = 2
"""Counts up when overlaps, duplicates or personal data are looked for in another way."""


def _describe(source: SourceConfig) -> SourceCard:
    found = scan(source)
    return {
        "source": source.source,
        "licence": source.licence,
        "schema": found.schema,
        "first_option": found.base,
        "rows": found.rows,
        "records": found.records,
        "hash": found.hash,
        "quarantine": dict(found.bad),
        "odd": dict(found.flags),
    }


@lru_cache(maxsize=2)
def _survey(config_json: str) -> _Survey:
    from medlora.data.overlap import Duplicates, TestIndex
    from medlora.data.personal import find_personal

    config = RunConfig.model_validate_json(config_json)
    questions = {
        key: [record for record in stream(source) if isinstance(record, McqRecord)]
        for key, source in list_held_out(config).items()
    }
    index = TestIndex(questions)
    asked = {(key, record.id): record.question for key, records in questions.items() for record in records}
    overlaps: list[Overlap] = []
    excerpts: list[tuple[str, str, str]] = []
    personal: list[tuple[str, Finding]] = []
    duplicates: dict[str, tuple[str, ...]] = {}
    for source in list_training(config).values():
        seen, twice = Duplicates(), []
        for where, record in stream_placed(source):
            if seen.find(record) is not None:
                twice.append(record.id)
            texts = list(_list_texts(record))
            for hit in index.find(record, source.source):
                overlaps.append(hit)
                if len(excerpts) < _RECORDED:
                    excerpts.append((where, _excerpt(texts[0]), _excerpt(asked[hit.test, hit.question])))
            personal += [(where, found) for text in texts for found in find_personal(text)]
        if twice:
            duplicates[source.source] = tuple(twice)
    return _Survey(tuple(overlaps), tuple(excerpts), duplicates, tuple(personal))


def _excerpt(text: str) -> str:
    """How a text begins; personal data in it is named instead of shown."""
    from medlora.data.personal import find_personal

    for found in sorted(find_personal(text), key=lambda found: -found.start):
        text = f"{text[: found.start]}[{found.kind}]{text[found.end :]}"
    flat = " ".join(text.split())
    return flat if len(flat) <= _EXCERPT else f"{flat[:_EXCERPT]}..."


def _list_texts(record: Record) -> Iterator[str]:
    if isinstance(record, TextRecord):
        yield record.text
    elif isinstance(record, McqRecord):
        yield from (record.question, *record.options, *record.rationale.values())
    else:
        yield from (record.english, record.korean)


def _describe_pairs(survey: _Survey) -> list[dict[str, object]]:
    return [
        {**asdict(hit), "where": where, "training_text": training, "question_text": question}
        for hit, (where, training, question) in zip(survey.overlaps, survey.excerpts, strict=False)
    ]


def _stop_at_overlaps(data: DataConfig, survey: _Survey) -> None:
    if data.overlap != "stop" or not survey.overlaps:
        return
    records = {(hit.source, hit.record) for hit in survey.overlaps}
    shown = "\n  ".join(
        f"{pair['where']} ({pair['record']}): {pair['question']} of {pair['test']} ({pair['kind']}, {pair['score']:.0%} of it)\n"
        f"    training: {pair['training_text']}\n    question: {pair['question_text']}"
        for pair in _describe_pairs(survey)[:_SHOWN]
    )
    more = f"\n  ... and {len(survey.overlaps) - _SHOWN} more pairs" if len(survey.overlaps) > _SHOWN else ""
    raise InputError(
        f"data.overlap: {len(records)} training records hold questions of the tests or of dev:\n  {shown}{more}\n"
        "take other sources, or say data.overlap=drop (these records are left out and counted) or data.overlap=allow "
        "(every report made from the run notes it)"
    )


def _stop_at_personal(data: DataConfig, survey: _Survey) -> None:
    if len(survey.personal) <= data.max_personal:
        return
    shown = "\n  ".join(
        f"{where}: {found.kind}" + (f", in line {found.line} of the text" if found.line > 1 else "")
        for where, found in survey.personal[:_SHOWN]
    )
    more = f"\n  ... and {len(survey.personal) - _SHOWN} more" if len(survey.personal) > _SHOWN else ""
    raise InputError(
        f"data.max_personal: {len(survey.personal)} places in the training data look like personal data, allowed are "
        f"{data.max_personal}:\n  {shown}{more}\nremove them from the data, or allow so many with data.max_personal"
    )
