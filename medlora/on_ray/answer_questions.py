"""Batches of questions sharded by Ray Data over actors that each hold one base and the adapters of every stage."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import ray
import ray.data
from ray.data import ActorPoolStrategy

from medlora import endings, events, pulse
from medlora.artifacts.bases import read_extra_tokens
from medlora.config.evaluation import EvaluationConfig
from medlora.config.placement import ActorPlacement
from medlora.errors import InputError, RunError
from medlora.evaluation.ledger import Batch, name_batch, pack_prediction, unpack_prediction
from medlora.evaluation.plan import EvaluationTask
from medlora.evaluation.predictions import Prediction
from medlora.evaluation.questions import Question
from medlora.events import Event, Failed, Failure, OnEvent
from medlora.on_ray.cluster import Cluster, quiet_ray_data
from medlora.on_ray.inbox import Inbox, listen
from medlora.on_ray.placement import count_gpus, report_while_waiting
from medlora.on_ray.workers.attempts import Attempts
from medlora.on_ray.workers.failures import describe_exception, report_failure
from medlora.on_ray.workers.stalls import StallWatch, beating, find_beat_s
from medlora.records import McqRecord
from medlora.runs.disk_errors import explaining
from medlora.startup import enter_folder, importing

log = logging.getLogger("medlora.run")


_WHOLE_TRIES = 2


class AnswersQuestions(Protocol):
    """What an actor holds: `medlora.answering.stage_model.StageModel`, or a fake of it."""

    def answer(self, tests: Sequence[str], records: Sequence[McqRecord], stages: Sequence[str]) -> list[Prediction]:
        """A prediction for each question and each of the stages."""


Build = Callable[[], AnswersQuestions]
"""Makes the model of an actor, in the actor."""


@dataclass(frozen=True)
class Actors:
    """Where the actors of an evaluation run, and where what they report goes."""

    placement: ActorPlacement
    cluster: Cluster
    on_event: OnEvent
    log_file: Path


def build_stages(task: EvaluationTask, letters: str, threads: int, device: str, cwd: str) -> AnswersQuestions:
    """The model of an actor, from what can travel to it; the tests of `task` have stayed behind."""
    enter_folder(cwd)
    with importing():
        import torch

        from medlora.answering.stage_model import StageModel
        from medlora.kernels.memory import keep_freed_memory
        from medlora.model.base import locate_base
        from medlora.runs import mirror

    torch.set_num_threads(threads)
    keep_freed_memory()
    for folder in {Path(link.folder) for chain in task.stages.values() for link in chain}:
        mirror.pull(folder)
        if not folder.is_dir():
            raise InputError(
                f"{folder}: the actor on {socket.gethostname()} does not see this adapter; runs must be on a mount that "
                "every node sees, or in s3:// or gs://"
            )
    located = locate_base(task.base, task.cache, task.seed)
    asked = task.asked
    return StageModel(located, task.stages, task.config, device, task.seed, asked.shots, asked.worked, letters)


def make_builder(task: EvaluationTask, actors: Actors) -> Build:
    """`build_stages` with its arguments, ready to travel into an actor."""
    # Of an evaluation's config its own fields cross alone, and of the questions only those that prompts show.
    fields = task.config.model_dump(include=set(EvaluationConfig.model_fields))
    words = read_extra_tokens(task.base)
    light = replace(
        task,
        base=task.base.model_copy(update={"extra_tokens": words}),
        config=EvaluationConfig.model_validate(fields),
        asked=replace(task.asked, tests={}),
    )
    return partial(
        build_stages,
        light,
        letters=task.asked.letters,
        threads=actors.placement.cpus_per_worker,
        device="cuda" if count_gpus(actors.placement, actors.cluster) else "cpu",
        cwd=os.getcwd(),
    )


def answer_on_ray(batches: Sequence[Batch], build: Build, actors: Actors) -> Iterator[list[Prediction]]:
    """The predictions of each batch as it comes back, in no particular order, every batch exactly once.

    A batch whose actor dies is asked again as a whole, then question by question. A question that raises, or kills its
    actor `placement.retries` times over, is reported as failed (Prediction.error); all others are answered. Raises
    InputError for what only the user can fix, RunError where the model cannot be loaded.
    """
    if not batches:
        return
    quiet_ray_data()
    placement, on_event = actors.placement, actors.on_event
    gpus = count_gpus(placement, actors.cluster)
    most = min(placement.workers, len(batches))
    refusals: list[str] = []
    failed: list[Failed] = []
    weights: set[str] = set()
    begun = threading.Event()

    def receive(event: Event) -> None:
        if event["event"] == "refused":
            refusals.append(event["text"])
        elif event["event"] == "failed":
            failed.append(event)
        elif event["event"] == "beat":
            stalls.receive(event)
        elif event["event"] == "loading":
            begun.set()
        elif event["event"] == "ready":
            if event["weights"] and event["weights"] not in weights:
                weights.add(event["weights"])
                on_event(events.note("evaluation", event["weights"], kind="weights"))
            if actors.cluster.nodes > 1:
                on_event(events.note("evaluation", f"an actor is ready on {event['host']}", kind="actor"))
        else:
            on_event(event)

    attempts = Attempts(most, placement.retries)
    failure: Exception | None = None
    waiting = report_while_waiting(placement, gpus, 1, "evaluation", begun.is_set, on_event)
    stalls = StallWatch(placement, "evaluation", on_event, log)
    with (
        listen(receive, attempts) as inbox,
        waiting,
        stalls.watching(),
        _stderr_to(actors.log_file),
        warnings.catch_warnings(),
    ):
        # Ray 2.60 deprecates free remote arguments and has no other way to let an actor come back.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        constructor = {"build": build, "retries": placement.retries, "inbox": inbox, "beat_s": find_beat_s(placement)}
        answered = _map_batches(batches, placement, gpus, constructor)
        try:
            for row in answered.iter_rows():
                yield [unpack_prediction(prediction) for prediction in json.loads(row["predictions"])]
        except (ray.exceptions.RayError, RuntimeError) as error:
            failure = error
    if refusals:
        raise InputError(refusals[0])
    if failure is not None:
        raise _explain(failure, failed, actors.log_file)


def _explain(failure: Exception, failed: Sequence[Failed], log_file: Path) -> RunError:
    """The one message for an evaluation whose model cannot be loaded; the traceback goes to the log."""
    first: Failure = failed[0] if failed else describe_exception(getattr(failure, "cause", None) or failure)
    log.error("evaluation, on %s:\n%s", first["host"], first["traceback"])
    return RunError(
        f"evaluation: {first['text']} (on {first['host']}, {first['at']}); the traceback is in {log_file}. Once the "
        "cause is fixed, the same command asks only what is not answered yet"
    )


def _map_batches(
    batches: Sequence[Batch], placement: ActorPlacement, gpus: float, constructor: dict[str, object]
) -> ray.data.Dataset:
    """The batches as a Ray Data set whose rows are answered by an actor pool."""
    most = min(placement.workers, len(batches))
    rows = [
        {"batch": json.dumps([[test, asdict(record)] for test, record in batch.questions]), "stages": batch.stages}
        for batch in batches
    ]
    return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        BatchAnswerer,
        fn_constructor_kwargs=constructor,
        batch_size=1,
        compute=ActorPoolStrategy(
            min_size=min(placement.least_workers, most), max_size=most, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=placement.cpus_per_worker,
        num_gpus=gpus or None,
        accelerator_type=placement.accelerator_type,
        label_selector=placement.label_selector or None,
        # Without a bound here, since every death is counted by Attempts, which bounds them by question.
        max_restarts=-1,
        max_task_retries=-1,
    )


class BatchAnswerer:
    """The Ray Data actor: loads the model once, answers batch after batch, and isolates a question that breaks it."""

    def __init__(
        self,
        build: Callable[[], AnswersQuestions],
        retries: int,
        inbox: Inbox,
        beat_s: float = 5.0,
    ) -> None:
        self.retries, self.inbox = retries, inbox
        inbox.put(events.loading())
        # For as long as the process lives: an actor of Ray Data is never notified that it is no longer needed.
        self.beating = beating(inbox, "the actor", beat_s)
        self.beating.__enter__()
        pulse.begin("loads the model", slow=True)
        try:
            if not inbox.call("begin_load"):
                raise RuntimeError("the processes that load the model keep dying; see Ray's logs (out of memory?)")
            with explaining(Path.cwd()):
                self.model = build()
        except InputError as error:
            inbox.put(events.refused(str(error)))
            raise
        except Exception as error:
            report_failure(inbox, error)
            raise
        inbox.call("end_load")
        pulse.begin("")
        inbox.put(events.ready(socket.gethostname(), getattr(self.model, "weights", "")))

    def __call__(self, row: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """One batch as JSON -> its predictions as JSON."""
        batch: list[Question] = []
        for test, record in json.loads(row["batch"][0]):
            batch.append((test, McqRecord(**{**record, "options": tuple(record["options"])})))
        stages = [str(stage) for stage in row["stages"][0]]
        started = time.monotonic()
        pulse.begin(f"answers {len(batch)} questions of {', '.join(dict.fromkeys(test for test, _ in batch))}")
        predictions = self._answer_whole(batch, stages)
        predictions = predictions or [p for question in batch for p in self._answer_one(question, stages)]
        pulse.begin("")
        event = events.answered(len(batch), time.monotonic() - started)
        self.inbox.put(event)
        return {"predictions": [json.dumps([pack_prediction(p) for p in predictions])]}

    def _answer_whole(self, batch: list[Question], stages: list[str]) -> list[Prediction] | None:
        """The batch's predictions, or None when it has to be taken apart."""
        key = name_batch(batch)
        deaths = self.inbox.call("begin", key)
        try:
            if deaths >= _WHOLE_TRIES:
                return None
            return self.model.answer([test for test, _ in batch], [record for _, record in batch], stages)
        except InputError as error:
            self.inbox.put(events.refused(str(error)))
            raise
        except Exception as error:  # any exception of the model at a question is its answer
            self._note(f"a batch is asked one by one after {error!r}")
            return None
        finally:
            self.inbox.call("end", key)

    def _answer_one(self, question: Question, stages: list[str]) -> list[Prediction]:
        test, record = question
        pulse.begin(f"answers question {record.id} of {test}")
        key, reason = f"{test}/{record.id}", "its process died"
        deaths = self.inbox.call("begin", key)
        try:
            if deaths < max(1, self.retries):
                return self.model.answer([test], [record], stages)
        except Exception as error:  # it would come again
            reason = repr(error)
        finally:
            self.inbox.call("end", key)
        self._note(f"question {record.id} of {test} is reported as failed: {reason}")
        options = len(record.options)
        return [
            Prediction(record.id, test, stage, record.answer, None, record.subject, error=reason, options=options)
            for stage in stages
        ]

    def _note(self, text: str) -> None:
        self.inbox.put(events.note("evaluation", text))


_REDIRECTED = threading.Lock()


_redirections: list[int] = []


@contextmanager
def _stderr_to(log_file: Path) -> Iterator[None]:
    """Send what Ray's C++ core writes to this process's stderr into a file: advice about actors no user can act on.

    Of evaluations side by side the first one's file gets it all, until the last one has ended.
    """
    with _REDIRECTED:
        if not _redirections:
            sys.stderr.flush()
            _redirections.append(os.dup(2))
            with log_file.open("ab") as file:
                os.dup2(file.fileno(), 2)
        _redirections.append(0)
    try:
        yield
    finally:
        with _REDIRECTED:
            _redirections.pop()
            if len(_redirections) == 1:
                kept = _redirections.pop()
                if not endings.is_ending():  # which needs no more of Ray's words on the terminal
                    os.dup2(kept, 2)
                os.close(kept)
