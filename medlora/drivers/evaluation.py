"""An evaluation's folder from its questions to its report: ledger, predictions, report, manifest last."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medlora import events, prompts
from medlora.artifacts.bases import find_base_folder
from medlora.config.evaluation import EvaluateConfig
from medlora.data.quarantine import write_quarantine
from medlora.evaluation.ledger import (
    FINGERPRINT,
    LEDGER,
    PREDICTIONS,
    SECONDS,
    name_answer,
    pack_prediction,
    plan_batches,
    read_ledger,
    sort_predictions,
)
from medlora.evaluation.plan import EvaluationPlan, EvaluationTask, choose_batch_size
from medlora.evaluation.predictions import Prediction, sum_seconds, write_predictions, write_seconds
from medlora.evaluation.reports import PromptShown, Report
from medlora.events import Event, OnEvent
from medlora.miniature.settings import CHAT_TEMPLATE
from medlora.on_ray.answer_questions import Actors, Build, answer_on_ray, make_builder
from medlora.on_ray.cluster import connect
from medlora.on_ray.placement import check_placement, count_gpus
from medlora.reporting.progress import measure_rate
from medlora.reporting.report import build_report
from medlora.reporting.results.files import write_results
from medlora.runs import mirror
from medlora.runs.environment import get_versions
from medlora.runs.files import (
    append_json,
    read_json_lines,
    read_mapping,
    set_aside,
    truncate_json_lines,
    write_with_checksum,
)
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import MANIFEST, commit, find_differences
from medlora.tokens.encode import write_chat, write_plain
from medlora.turns import Render, learn, load_renderer, make_renderer, render_in_time

log = logging.getLogger("medlora.run")


def score_afresh(
    task: EvaluationTask,
    folder: Path,
    actors: Actors,
    about: Mapping[str, object],
    label: str,
    known: Sequence[Prediction] = (),
) -> Report:
    """Score a task into a folder of a run or a sweep, and report its begin and end as those of a phase.

    What another task, or an earlier finished one, left in the folder is moved aside.
    """
    was = read_mapping(folder / FINGERPRINT)
    if find_differences(was, task.fingerprint) or (folder / MANIFEST).exists():
        set_aside(folder)
    actors.on_event(events.phase_started("evaluation", label))
    began = time.monotonic()
    report = score_stages(task, folder, make_builder(task, actors), actors, about, known)
    actors.on_event(events.finished("evaluation", time.monotonic() - began))
    return report


def score_stages(
    task: EvaluationTask,
    folder: Path,
    build: Build,
    actors: Actors,
    about: Mapping[str, object],
    known: Sequence[Prediction] = (),
) -> Report:
    """Ask what is not known yet (see `ask_stages`), and write predictions, report and manifest; returns the report."""
    shown = show_prompt(task)
    answers = ask_stages(task, folder, build, actors, known)
    ordered = sort_predictions(answers.predictions, list(task.stages), task.asked.tests)
    seconds, first_s = answers.seconds, answers.first_s
    fingerprint = task.fingerprint
    report = build_report(
        ordered,
        {
            **about,
            "created": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "seconds": round(seconds, 2),
            "seconds_to_first_answer": round(first_s, 2) if first_s is not None else None,
            "questions_asked": answers.questions,
            "stage_seconds": sum_seconds(ordered),
            "questions_per_s": answers.questions_per_s,
            "versions": get_versions(),
            "prompts": prompts.version(),
            "prompt_shown": shown,
            "hashes": {key: fingerprint[key] for key in ("base_files", "stages", "tests")},
        },
        task.seed,
    )
    write_predictions(folder / PREDICTIONS, ordered, {"weights": answers.weights} if answers.weights else None)
    write_seconds(folder / SECONDS, ordered)
    write_results(folder, report, ordered, task.asked.tests)
    ledger = folder / LEDGER
    commit(folder, {"fingerprint": fingerprint, "seconds": round(seconds, 2)}, exclude=(ledger,))
    ledger.unlink(missing_ok=True)
    mirror.push(folder)
    return report


def show_prompt(task: EvaluationTask) -> PromptShown | None:
    """The first question of the first test as the model saw it; None where the base's template is not on this machine."""
    test, records = next(iter(task.asked.tests.items()))
    example = prompts.render_mcq(records[0], task.config.style, task.asked.worked, task.asked.shots)
    folder = find_base_folder(task.base)
    if folder is None:
        name = "base.model: the chat template of the miniature"
        found: tuple[Render, str] | None = (make_renderer(CHAT_TEMPLATE, {"bos_token": "<bos>"}, name), name)
    elif (folder / "tokenizer_config.json").is_file():
        found = load_renderer(folder)
    else:  # the hub's cache of another machine has it
        return None
    if found is None or not example.chat:
        return {"test": test, "id": records[0].id, "text": write_plain(example), "template": False}
    text = render_in_time(
        found[0], found[1], lambda render: write_chat(render, learn(render, found[1]), example, found[1])
    )
    return {"test": test, "id": records[0].id, "text": text, "template": True}


@dataclass(frozen=True)
class Answers:
    """The answers of every stage to every question, and what it took to ask what was not known before."""

    predictions: list[Prediction]
    questions: int
    seconds: float
    first_s: float | None
    """Until the first answer came; None where nothing was asked."""
    questions_per_s: float | None
    """Once running; None where no actor said how long a batch took."""
    weights: str = ""
    """What actors computed with, where that is not what the config names."""


def ask_stages(
    task: EvaluationTask, folder: Path, build: Build, actors: Actors, known: Sequence[Prediction] = ()
) -> Answers:
    """Ask every stage what neither the folder's ledger nor `known` has its answer to.

    Each batch goes into the ledger as it comes back, so that a driver that was killed asks the rest alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_with_checksum(folder / FINGERPRINT, task.fingerprint)
    ledger = folder / LEDGER
    truncate_json_lines(ledger, lambda line: True)  # drops a torn last line and damaged ones, each named in the log
    weights = {str(line["weights"]) for line in read_json_lines(ledger) if "weights" in line}
    answers = {name_answer(p): p for p in [*known, *read_ledger(ledger, list(task.stages))]}
    size = choose_batch_size(task.config, count_gpus(actors.placement, actors.cluster))
    batches = plan_batches(task.asked.tests, size, list(task.stages), set(answers))
    left = sum(len(batch.questions) for batch in batches)
    actors.on_event(events.evaluating(task.asked.count, task.asked.count - left))
    started = time.monotonic()
    first_s: float | None = None
    told: list[tuple[float, int, float]] = []
    pusher = mirror.Pusher(folder)

    def listen(event: Event) -> None:
        if event["event"] == "note" and event["kind"] == "weights":
            weights.add(event["text"])
        if event["event"] == "evaluation":
            told.append((time.monotonic(), event["questions"], event["seconds"]))
        actors.on_event(event)

    for answered in answer_on_ray(batches, build, replace(actors, on_event=listen)):
        if first_s is None:
            first_s = time.monotonic() - started
            log.info("evaluation: the first answers came after %.1f s, actors and models included", first_s)
        said = {"weights": "; ".join(sorted(weights))} if weights else {}
        append_json(ledger, {"predictions": [pack_prediction(p) for p in answered], **said})
        for prediction in answered:
            if name_answer(prediction) in answers:
                raise RuntimeError(f"{name_answer(prediction)} was answered twice")
            answers[name_answer(prediction)] = prediction
        pusher.push()
    seconds = time.monotonic() - started
    rate = round(measure_rate(told), 2) if told else None
    return Answers(list(answers.values()), left, seconds, first_s, rate, "; ".join(sorted(weights)))


def run_evaluation(config: EvaluateConfig, plan: EvaluationPlan, out: RunFolder, on_event: OnEvent) -> Report:
    """Connect to Ray and score the plan's stages into `out`; returns the report. The caller holds the folder's lock."""
    began = time.monotonic()
    write_quarantine(out.quarantine, {test.name: test for test in config.evaluation.tests})
    with connect() as cluster:
        on_event(events.cluster_found(str(cluster), cluster.started_here, time.monotonic() - began))
        check_placement(config.placement, cluster, "placement")
        actors = Actors(config.placement, cluster, on_event, out.log)
        about = {"name": config.name, "config": config.model_dump(mode="json"), "notes": plan.notes}
        return score_stages(plan.task, out.root, make_builder(plan.task, actors), actors, about)
