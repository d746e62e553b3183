"""An evaluation's folder from its questions to its report: ledger, predictions, report, manifest last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlora import events, prompts
from medlora.config.evaluation import EvaluateConfig, EvaluationConfig
from medlora.config.placement import ActorPlacement
from medlora.data.quarantine import write_quarantine
from medlora.evaluation.ledger import (
    FINGERPRINT,
    LEDGER,
    PAGE,
    PREDICTIONS,
    REPORT,
    SECONDS,
    name_answer,
    pack_prediction,
    plan_batches,
    read_ledger,
    sort_predictions,
)
from medlora.evaluation.plan import EvaluationPlan
from medlora.evaluation.predictions import Prediction, sum_seconds, write_predictions, write_seconds
from medlora.evaluation.stages import Stages
from medlora.events import OnEvent
from medlora.on_ray.answer_questions import AnswersQuestions, answer_on_ray, make_builder
from medlora.on_ray.cluster import Cluster, connect
from medlora.on_ray.placement import check_placement
from medlora.records import McqRecord
from medlora.reporting.page import write_page
from medlora.reporting.report import build_report
from medlora.runs import mirror
from medlora.runs.environment import get_versions
from medlora.runs.files import append_json, truncate_json_lines, write_json, write_sealed
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import commit

_PUSH_EVERY_S = 10.0
"""How often the ledger goes to a run's store: what a driver lost since then is asked again."""


def score_stages(
    folder: Path,
    fingerprint: Mapping[str, Any],
    stages: Stages,
    tests: Mapping[str, Sequence[McqRecord]],
    config: EvaluationConfig,
    build: Callable[[], AnswersQuestions],
    placement: ActorPlacement,
    cluster: Cluster,
    on_event: OnEvent,
    log_file: Path,
    about: Mapping[str, Any],
    seed: int,
    known: Sequence[Prediction] = (),
) -> dict[str, Any]:
    """Ask what is not known yet (see `ask_stages`), and write predictions, report and manifest; returns the report."""
    answered = ask_stages(
        folder, fingerprint, stages, tests, config, build, placement, cluster, on_event, log_file, known
    )
    ordered = sort_predictions(answered.predictions, list(stages), tests)
    left, seconds, first_s = answered.questions, answered.seconds, answered.first_s
    running_s = seconds - (first_s or 0)
    report = build_report(
        ordered,
        {
            **about,
            "created": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "seconds": round(seconds, 2),
            "seconds_to_first_answer": round(first_s, 2) if first_s is not None else None,
            "questions_asked": left,
            "stage_seconds": sum_seconds(ordered),
            "questions_per_s": round(left / running_s, 2) if answered.batches > 1 and running_s > 0 else None,
            "versions": get_versions(),
            "prompts": prompts.version(),
            "hashes": {key: fingerprint[key] for key in ("base_files", "stages", "tests") if key in fingerprint},
        },
        seed,
    )
    write_predictions(folder / PREDICTIONS, ordered)
    write_seconds(folder / SECONDS, ordered)
    write_json(folder / REPORT, report)
    write_page(folder / PAGE, report, ordered, tests)
    ledger = folder / LEDGER
    commit(folder, {"fingerprint": fingerprint, "seconds": round(seconds, 2)}, passing=(ledger,))
    ledger.unlink(missing_ok=True)
    mirror.push(folder)
    return report


@dataclass(frozen=True)
class Asking:
    """The answers of every stage to every question, and what it took to ask what was not known before."""

    predictions: list[Prediction]
    questions: int
    batches: int
    seconds: float
    first_s: float | None
    """Until the first answer came; None where nothing was asked."""


def ask_stages(
    folder: Path,
    fingerprint: Mapping[str, Any],
    stages: Stages,
    tests: Mapping[str, Sequence[McqRecord]],
    config: EvaluationConfig,
    build: Callable[[], AnswersQuestions],
    placement: ActorPlacement,
    cluster: Cluster,
    on_event: OnEvent,
    log_file: Path,
    known: Sequence[Prediction] = (),
) -> Asking:
    """Ask every stage what neither the folder's ledger nor `known` has its answer to.

    Each batch goes into the ledger as it comes back, so that a driver that was killed asks the rest alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / FINGERPRINT, fingerprint)
    ledger = folder / LEDGER
    truncate_json_lines(ledger, lambda line: True)  # drops a torn last line and damaged ones, each named in the log
    answers = {name_answer(p): p for p in [*known, *read_ledger(ledger, list(stages))]}
    batches = plan_batches(tests, config.batch_size, list(stages), set(answers))
    total, left = sum(map(len, tests.values())), sum(len(batch.questions) for batch in batches)
    on_event(events.evaluating(total, total - left))
    started = pushed = time.monotonic()
    first_s: float | None = None
    for answered in answer_on_ray(batches, build, placement, cluster, on_event, log_file):
        first_s = first_s if first_s is not None else time.monotonic() - started
        append_json(ledger, {"predictions": [pack_prediction(p) for p in answered]})
        for prediction in answered:
            if name_answer(prediction) in answers:
                raise RuntimeError(f"{name_answer(prediction)} was answered twice")
            answers[name_answer(prediction)] = prediction
        if time.monotonic() - pushed > _PUSH_EVERY_S:
            mirror.push(folder)
            pushed = time.monotonic()
    return Asking(list(answers.values()), left, len(batches), time.monotonic() - started, first_s)


def run_evaluation(config: EvaluateConfig, plan: EvaluationPlan, out: RunFolder, on_event: OnEvent) -> dict[str, Any]:
    """Connect to Ray and score the plan's stages into `out`; returns the report. The caller holds the folder's lock."""
    began = time.monotonic()
    write_quarantine(out.quarantine, {test.name: test for test in config.evaluation.tests})
    with connect() as cluster:
        seconds = time.monotonic() - began
        on_event(events.cluster_found(str(cluster), cluster.started_here, seconds))
        check_placement(config.placement, cluster, "placement")
        cache = str(Path(config.storage.cache or "~/.cache/medlora").expanduser())
        build = make_builder(
            config.base, cache, config.seed, plan.stages, config.evaluation, plan.asked, config.placement, cluster
        )
        about = {"name": config.name, "config": config.model_dump(mode="json"), "notes": plan.notes}
        return score_stages(
            out.root,
            plan.fingerprint,
            plan.stages,
            plan.asked.tests,
            config.evaluation,
            build,
            config.placement,
            cluster,
            on_event,
            out.log,
            about,
            config.seed,
        )
