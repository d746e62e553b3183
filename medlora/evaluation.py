"""An evaluation before and after the model: its config, its stages, its batches, its ledger."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from medlora import prompts, runs, storage
from medlora.config import ActorPlacement, BaseModelConfig, EvaluationConfig, Storage
from medlora.config_file import load
from medlora.config_sources import Name, ReadingConfig, Section, SourceConfig
from medlora.data_card import describe_overlap, read_card
from medlora.errors import InputError
from medlora.lineage import (
    Link,
    check_adapters,
    check_base_files,
    check_base_template,
    fetch_adapter,
    find_chain,
    find_stage_doubts,
    identify_base,
    read_source,
)
from medlora.mixture import derive_seed
from medlora.object_store import is_store
from medlora.quarantine import describe_quarantine
from medlora.records import McqRecord, Prediction
from medlora.sources import hash_records

log = logging.getLogger("medlora.run")

Stages = Mapping[str, Sequence[Link]]
"""Stage name -> its chain of adapters; the plain base has none."""

Question = tuple[str, McqRecord]
"""The test that a question belongs to, and the question."""

Answered = tuple[str, str, str]
"""Stage, test and id: what an answer is known by."""


@dataclass(frozen=True)
class Batch:
    """Questions that are asked together, of these stages."""

    questions: tuple[Question, ...]
    stages: tuple[str, ...]


LEDGER, FINGERPRINT, REPORT, PREDICTIONS = "ledger.jsonl", "fingerprint.json", "report.json", "predictions.parquet"
PAGE, SECONDS = "report.html", "seconds.parquet"
"""Files of an evaluation's folder; the ledger goes when the report is there."""


class StageConfig(Section):
    """A stage by its adapters."""

    name: Name
    adapters: tuple[str, ...] = ()
    """Folders or `s3://` / `gs://` URIs of PEFT adapters, all active, oldest first; none = the plain base."""


class EvaluateConfig(Section):
    """What `jobs/evaluate_mcq.py` reads: a base, stages on it, and how they are scored."""

    name: Name
    seed: int = Field(0, ge=0, lt=2**31)
    base: BaseModelConfig
    stages: tuple[str | StageConfig, ...] = Field(min_length=1)
    """Each a mapping of name and adapters, or stages of a finished run: `runs/quickstart:base,00,01,02`."""
    evaluation: EvaluationConfig
    data: ReadingConfig = ReadingConfig()
    placement: ActorPlacement = ActorPlacement()
    storage: Storage = Storage(folder="evaluations")


def load_evaluate_config(path: Path, overrides: Sequence[str] = ()) -> EvaluateConfig:
    """The evaluation config at `path`; raises InputError that names every wrong key."""
    return load(path, overrides, EvaluateConfig)


def find_stages(config: EvaluateConfig) -> dict[str, tuple[Link, ...]]:
    """The stages by name, each adapter found; raises InputError naming the key of what is not there or there twice."""
    stages: dict[str, tuple[Link, ...]] = {}
    for i, stage in enumerate(config.stages):
        for name, chain in _expand(stage, f"stages.{i}", config.storage.cache):
            if name in stages:
                raise InputError(f"stages.{i}: there is a stage {name!r} already; give it another name")
            stages[name] = chain
    return stages


def _expand(stage: str | StageConfig, key: str, cache: str | None) -> list[tuple[str, tuple[Link, ...]]]:
    if isinstance(stage, StageConfig):
        links = [
            _find_link(f"{stage.name}-{j}", folder, f"{key}.adapters.{j}", cache)
            for j, folder in enumerate(stage.adapters)
        ]
        return [(stage.name, tuple(links))]
    folder, colon, names = stage.rpartition(":")
    run = runs.RunFolder(find_run(folder, cache))
    storage.pull(run.root, passing=("checkpoints", "best", "scoring", "evaluation", ".replaced"))
    if not colon or not run.config.is_file():
        raise InputError(f"{key}: {stage!r} names no run; write FOLDER:STAGE,STAGE, e.g. runs/quickstart:base,02")
    found = []
    for name in names.split(","):
        chain = () if name == "base" else find_chain(run, name)
        found.append((name, tuple(_find_link(link.name, link.folder, key, cache) for link in chain)))
    return found


def find_run(folder: str, cache: str | None) -> Path:
    """Where a finished run is read: its folder, or a copy of what is in a store, apart from the one it is trained in."""
    if is_store(folder):
        return storage.find_copy(folder, cache, "read")
    return Path(folder).expanduser().absolute()


def _find_link(name: str, where: str, key: str, cache: str | None) -> Link:
    try:
        return Link(name=name, folder=str(fetch_adapter(where, cache)))
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def find_notes(config: EvaluateConfig) -> list[str]:
    """What the data cards of the runs have to say that the stages were taken from."""
    folders = {stage.rpartition(":")[0] for stage in config.stages if isinstance(stage, str)}
    found = {name: runs.RunFolder(find_run(name, config.storage.cache)) for name in sorted(folders)}
    cards = [(name, read_card(run.data) or {}) for name, run in found.items()]
    return [f"{name}: {note}" for name, card in cards for note in describe_overlap(card)]


def find_doubts(base: BaseModelConfig, stages: Stages, evaluation: EvaluationConfig, seed: int = 0) -> list[str]:
    """What makes the numbers doubtful: an adapter made for another base or to stand on others, or another prompt style."""
    doubts = find_stage_doubts(base, seed, stages)
    for link in {link.folder: link for chain in stages.values() for link in chain}.values():
        styles = _find_trained_styles(Path(link.folder))
        if styles and evaluation.style not in styles:
            doubts.append(
                f"{link.folder} was trained with prompt style {', '.join(sorted(styles))}, not {evaluation.style}"
            )
    return doubts


def describe_other_task(stages: Stages, evaluation: EvaluationConfig) -> list[str]:
    """A sentence where stages that were trained to reason first are scored without their reasoning."""
    if evaluation.scoring not in ("letter", "option_text"):
        return []
    reasoning = [name for name, chain in stages.items() if chain and _was_trained_to_reason(Path(chain[-1].folder))]
    if not reasoning:
        return []
    asks = "the letter at once" if evaluation.scoring == "letter" else "the options' texts without reasoning"
    return [
        f"{', '.join(reasoning)}: trained to reason before the answer, and scored by `{evaluation.scoring}`, which asks for "
        f"{asks}; that is another task than the trained one (`scoring: reason` scores the trained one)"
    ]


def _was_trained_to_reason(adapter: Path) -> bool:
    """Whether one of our phases made the adapter from questions with rationales, in a style that shows them."""
    manifest = runs.read_manifest(adapter.parent) or {}
    return bool(manifest.get("rationale")) and bool(_find_trained_styles(adapter) & {"reasoning", "reasoning_full"})


def _find_trained_styles(adapter: Path) -> set[str]:
    """The styles of the questions that one of our phases trained on; empty for others' adapters and for plain text."""
    manifest = runs.read_manifest(adapter.parent) or {}
    described: dict[str, Any] = next(
        (v for k, v in manifest.get("fingerprint", {}).items() if k.startswith("phases.")), {}
    )
    questions = set(manifest.get("question_sources", []))
    return {source["style"] for source in described.get("sources", []) if source["source"] in questions}


@dataclass(frozen=True)
class Asked:
    """What an evaluation asks: the questions of every test, and what every prompt shows solved before them."""

    tests: dict[str, list[McqRecord]]
    shots: tuple[McqRecord, ...] = ()
    worked: McqRecord | None = None

    @property
    def letters(self) -> str:
        """Every letter that a question can be answered with."""
        return max((record.letters for records in self.tests.values() for record in records), key=len, default="")


def read_asked(evaluation: EvaluationConfig, seed: int, max_bad_fraction: float = 0.0) -> Asked:
    """Everything that prompts are made of; raises InputError naming the key of what cannot be asked or shown.

    A solved question that a test asks too would give its answer away: refused.
    """
    key = "evaluation"
    tests = read_tests(evaluation, max_bad_fraction)
    shots: tuple[McqRecord, ...] = ()
    worked = None
    if few_shot := evaluation.few_shot:
        questions = _read_questions(f"{key}.few_shot", few_shot, max_bad_fraction)
        if len(questions) < few_shot.k:
            raise InputError(
                f"{key}.few_shot: {few_shot.source} has {len(questions)} questions, k asks for {few_shot.k}"
            )
        first = few_shot.choose == "first"
        drawn = random.Random(derive_seed(seed, "few_shot"))
        shots = tuple(questions[: few_shot.k] if first else drawn.sample(questions, few_shot.k))
        _refuse_leaks(f"{key}.few_shot", shots, tests)
    if example := evaluation.worked_example:
        solved = _read_questions(f"{key}.worked_example", example, max_bad_fraction)
        worked = next((record for record in solved if record.rationale), None)
        if worked is None:
            raise InputError(f"{key}.worked_example: {example.source} has no question with a rationale to show")
        _refuse_leaks(f"{key}.worked_example", (worked,), tests)
    return Asked(tests, shots, worked)


def _read_questions(key: str, source: SourceConfig, max_bad_fraction: float) -> list[McqRecord]:
    return [record for record in read_source(key, source, max_bad_fraction) if isinstance(record, McqRecord)]


def _refuse_leaks(key: str, shown: Sequence[McqRecord], tests: Mapping[str, Sequence[McqRecord]]) -> None:
    texts = {record.question.strip(): record.id for record in shown}
    for test, records in tests.items():
        for record in records:
            if (solved := texts.get(record.question.strip())) is not None:
                raise InputError(
                    f"{key}: question {solved} is shown with its answer, and test {test} asks it (as {record.id}); "
                    "take solved questions from another split"
                )


def read_tests(evaluation: EvaluationConfig, max_bad_fraction: float = 0.0) -> dict[str, list[McqRecord]]:
    """The questions of every test; raises InputError for a test without any, or two tests of one name."""
    tests: dict[str, list[McqRecord]] = {}
    for i, test in enumerate(evaluation.tests):
        questions = _read_questions(f"evaluation.tests.{i}", test, max_bad_fraction)
        if not questions:
            raise InputError(
                f"evaluation.tests.{i}.source: {test.source} holds no questions; a test is multiple choice"
            )
        if test.name in tests:
            raise InputError(f"evaluation.tests.{i}.name: there is a test {test.name!r} already; names must differ")
        tests[test.name] = questions
    return tests


def describe_evaluation(
    base: BaseModelConfig,
    seed: int,
    evaluation: EvaluationConfig,
    stages: Stages,
    asked: Asked,
) -> dict[str, Any]:
    """What the answers depend on, as nested plain values: the evaluation's fingerprint."""
    folders = {link.folder for chain in stages.values() for link in chain}
    hashes = {folder: runs.hash_json(runs.hash_files(Path(folder))) for folder in folders}
    described = {
        "evaluation": evaluation.model_dump(mode="json", exclude={"placement", "tests", "beside_training"}),
        "tests": {name: hash_records(records) for name, records in asked.tests.items()},
        "base": base.model_dump(mode="json", exclude={"extra_tokens"}),
        "base_files": identify_base(base),
        "stages": {name: [hashes[link.folder] for link in chain] for name, chain in stages.items()},
        "prompts": prompts.version(),
        "seed": seed,
    }
    if shown := [*asked.shots, *([asked.worked] if asked.worked else [])]:
        described["shown"] = hash_records(shown)
    plain: dict[str, Any] = runs.as_json(described)
    return plain


def plan_batches(
    tests: Mapping[str, Sequence[McqRecord]], size: int, stages: Sequence[str], answered: Set[Answered] = frozenset()
) -> list[Batch]:
    """The questions in batches of `size`, longest first, a function of the questions alone; each of the stages that have
    not answered it.

    Since a batch is asked as a whole wherever and whenever it is asked, its answers have the same bytes whatever the
    number of actors, whichever stages are asked together, and whatever went wrong before.
    """
    questions = [(test, record) for test, records in tests.items() for record in records]
    questions.sort(key=lambda q: (-len(q[1].question) - sum(map(len, q[1].options)), q[0], q[1].id))
    batches = []
    for i in range(0, len(questions), size):
        parts: dict[tuple[str, ...], list[Question]] = {}
        for test, record in questions[i : i + size]:
            left = tuple(stage for stage in stages if (stage, test, record.id) not in answered)
            parts.setdefault(left, []).append((test, record))
        batches += [Batch(tuple(part), left) for left, part in parts.items() if left]
    return batches


def name_batch(batch: Sequence[Question]) -> str:
    """A name for a batch that tells it from every other."""
    return hashlib.sha256("\n".join(f"{test}\t{record.id}" for test, record in batch).encode()).hexdigest()[:16]


def name_answer(prediction: Prediction) -> Answered:
    """What a prediction is known by."""
    return (prediction.stage, prediction.test, prediction.id)


def pack_prediction(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain values for JSON."""
    return asdict(prediction)


def unpack_prediction(row: Mapping[str, Any]) -> Prediction:
    """The prediction that `pack_prediction` packed."""
    return Prediction(**{**row, "probabilities": tuple(row["probabilities"])})


def read_ledger(path: Path, stages: Sequence[str]) -> list[Prediction]:
    """What an earlier driver already knew of these stages: the answers in whole ledger lines, each once."""
    found: dict[Answered, Prediction] = {}
    for line in runs.read_json_lines(path, keys=("predictions",)):
        try:
            predictions = [unpack_prediction(row) for row in line["predictions"]]
            named = [(name_answer(prediction), prediction) for prediction in predictions if prediction.stage in stages]
            for name, prediction in named:
                found.setdefault(name, prediction)
        except (TypeError, KeyError, ValueError) as error:
            log.warning("%s: a line makes no answers (%s); its questions are asked again", path, error)
    return list(found.values())


def describe_progress(folder: Path, stages: Sequence[str]) -> str:
    """How many answers are saved, for whoever ended the evaluation."""
    return f"{len(read_ledger(folder / LEDGER, stages)):,} answers are saved; the same command asks the rest"


def sort_predictions(
    predictions: Sequence[Prediction], stages: Sequence[str], tests: Mapping[str, Sequence[McqRecord]]
) -> list[Prediction]:
    """Predictions in the order of stages, tests and questions; raises RuntimeError unless each is there exactly once."""
    by_key = {name_answer(p): p for p in predictions}
    wanted = [(stage, test, record.id) for stage in stages for test, records in tests.items() for record in records]
    if len(by_key) != len(predictions) or set(by_key) != set(wanted):
        raise RuntimeError(f"{len(predictions)} answers, {len(by_key)} of them different, to {len(wanted)} questions")
    return [by_key[key] for key in wanted]


def find_report(folder: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of a finished evaluation that still stands; None when there is none, or it is of something else."""
    manifest = runs.read_manifest(folder)
    if manifest is None or runs.check_files(folder, manifest):
        return None
    if runs.find_differences(manifest["fingerprint"], fingerprint):
        return None
    return runs.read_mapping(folder / REPORT)


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation whose every part was found: what `jobs/evaluate_mcq.py` hands on."""

    stages: dict[str, tuple[Link, ...]]
    asked: Asked
    fingerprint: dict[str, Any]
    notes: list[str]
    """Doubts that the user overruled with --force, and what the runs' data cards say; the report says them."""


def check_evaluation(config: EvaluateConfig, force: bool) -> EvaluationPlan:
    """Find stages and tests and look for doubts; raises InputError for all that can be wrong before a model is loaded."""
    check_base_files(config.base)
    stages = find_stages(config)
    check_adapters(config.base, stages)
    asked = read_asked(config.evaluation, config.seed, config.data.max_bad_fraction)
    if config.evaluation.style != "kormedmcqa":
        check_base_template(config.base)
    doubts = find_doubts(config.base, stages, config.evaluation, config.seed)
    if doubts and not force:
        shown = "\n  ".join(doubts)
        raise InputError(
            f"these numbers would mislead:\n  {shown}\nmend the config, or say --force; the report will say it too"
        )
    fingerprint = describe_evaluation(config.base, config.seed, config.evaluation, stages, asked)
    return EvaluationPlan(
        stages,
        asked,
        fingerprint,
        [
            *doubts,
            *describe_other_task(stages, config.evaluation),
            *find_notes(config),
            *describe_quarantine(config.evaluation),
        ],
    )


def refuse_other(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Raise InputError when the folder holds another evaluation, finished or not."""
    was = runs.read_mapping(folder / FINGERPRINT)
    if was is not None and (differences := runs.find_differences(was, fingerprint)):
        shown = "\n  ".join(differences[:5])
        raise InputError(f"{folder}: holds another evaluation:\n  {shown}\nchoose another folder with --out")


if __name__ == "__main__":
    print(json.dumps(EvaluateConfig.model_json_schema(), indent=2, ensure_ascii=False))
