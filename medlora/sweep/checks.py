"""All that can be wrong with a sweep, reported before anything starts."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from medlora.config.loading.files import load_raw, validate
from medlora.config.run import RunConfig
from medlora.config.sweep import SweepConfig
from medlora.curriculum.chains import Link, extend_chain, start_chain
from medlora.curriculum.checks import check_inputs, scan_source
from medlora.curriculum.jobs import find_obstacle, make_job
from medlora.data.card import find_dropped
from medlora.data.sources import stream
from medlora.errors import InputError
from medlora.evaluation.stages import find_run
from medlora.records import McqRecord
from medlora.runs import mirror
from medlora.runs.files import read_mapping
from medlora.runs.folders import RunFolder, find_finished
from medlora.runs.manifests import find_differences
from medlora.sweep.ledger import FINGERPRINT
from medlora.sweep.plan import SweepPlan, describe_sweep, list_earlier
from medlora.sweep.space import Choice, Domain, apply_params, is_shape, list_keys, parse_space, read_params

_TEST_SPLIT = re.compile(r"(hf:.*:|miniature:mcq/)test(_\w+)?$")


_COMBINATIONS = 512
"""So many combinations of values are all checked before a sweep starts; of more, each value and the corners."""


def check_sweep(config: SweepConfig, force: bool = False) -> SweepPlan:
    """Find everything that a sweep needs; raises InputError for all that can be wrong before anything starts."""
    path = Path(config.config)
    raw = load_raw(path, config.set)
    try:
        run = validate(path, raw, config.set, RunConfig)
    except InputError as error:
        raise InputError(f"config: {error}") from None
    searched = _find_searched(config, run)
    everything = len(searched) == len(run.phases)
    space = parse_space(config.space, searched, everything)
    _check_search(config, run, searched, space)
    _check_keys(raw, space, searched, everything)
    start = read_params(raw, run, list(space), searched, everything)
    last = run.phase(searched[-1])
    dev = config.dev.sources or (last.validation.sources if last.validation else ())
    if not dev:
        raise InputError(
            f"dev.sources: phase {last.name} of {path} has no validation; name the dev questions trials are scored on"
        )
    scoring = config.dev.scoring or ("reason" if last.full_prompt else "letter")
    plan = SweepPlan(config, raw, run, searched, space, tuple(dev), scoring, start, {})
    _check_values(plan)
    _check_mlflow(config)
    check_inputs(run, force)
    _check_dev(plan)
    plan = replace(plan, dropped=find_dropped(plan.check_against()))
    if config.start:
        find_start(plan)
    return plan


def _find_searched(config: SweepConfig, run: RunConfig) -> tuple[str, ...]:
    names = [phase.name for phase in run.phases]
    if config.phases is None:
        return (names[-1],)
    if config.phases == "all":
        return tuple(names)
    for i, name in enumerate(config.phases):
        if name not in names:
            raise InputError(f"phases.{i}: {name!r} is no phase of {config.config}; phases: {', '.join(names)}")
    first = names.index(config.phases[0]) if config.phases else 0
    if not config.phases or tuple(names[first : first + len(config.phases)]) != config.phases:
        raise InputError(
            f"phases: name phases that follow each other in {', '.join(names)}, found {list(config.phases)}"
        )
    return config.phases


def _check_search(config: SweepConfig, run: RunConfig, searched: Sequence[str], space: dict[str, Domain]) -> None:
    if config.placement.workers != 1:
        raise InputError("placement.workers: a trial trains in one process; concurrency sets how many run at a time")
    if config.scheduler.kind == "pbt":
        _check_population(config, run, searched, space)
    for key, domain in space.items():
        if config.search == "grid" and not isinstance(domain, Choice):
            raise InputError(f"space.{key}: search: grid needs values, not a range; write `choice [...]`")


def _check_population(config: SweepConfig, run: RunConfig, searched: Sequence[str], space: dict[str, Domain]) -> None:
    at = "scheduler.kind: pbt"
    steps = run.phase(searched[-1]).max_steps
    if len(searched) != 1 or steps is None or steps < config.scheduler.generations:
        raise InputError(f"{at}: divides the max_steps of one phase; search one phase, and give it max_steps")
    if config.trials is not None or config.search == "grid":
        raise InputError(
            f"{at}: population x generations sets how many trials there are; remove trials, and search: grid"
        )
    if all(is_shape(key) for key in space):
        raise InputError(f"{at}: changes values while an adapter is trained; the space names only its shape")
    if f"phases.{searched[0]}.max_steps" in space:
        raise InputError(f"{at}: divides phases.{searched[0]}.max_steps; take it out of the space")


def _check_keys(raw: dict[str, object], space: dict[str, Domain], searched: Sequence[str], everything: bool) -> None:
    """Raise InputError for a key that the run config does not have, with the nearest that it has."""
    for key, domain in space.items():
        value = next(iter(domain.list_probes().values()))
        try:
            RunConfig.model_validate(apply_params(raw, {key: value}, searched, everything))
        except ValidationError as error:
            if any(problem["type"] == "extra_forbidden" for problem in error.errors()):
                allowed = list_keys(raw, searched, everything)
                near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed are keys such as {', '.join(allowed[:4])}"
                raise InputError(f"space.{key}: unknown key; {hint}") from None
        except InputError as error:
            raise InputError(f"space.{key}: {error}") from None


def _check_values(plan: SweepPlan) -> None:
    """Raise InputError for values that make no valid config: each alone, then together."""
    for key, domain in plan.space.items():
        for description, value in domain.list_probes().items():
            try:
                plan.make_trial([{**plan.start_params, key: value}], "trial")
            except InputError as error:
                raise InputError(f"space.{key}: {description} makes an invalid config: {error}") from None
    probes = [list(domain.list_probes().values()) for domain in plan.space.values()]
    if math.prod(map(len, probes)) > _COMBINATIONS:
        probes = [[values[0], values[-1]] for values in probes]
    for values in itertools.islice(itertools.product(*probes), _COMBINATIONS):
        params = dict(zip(plan.space, values, strict=True))
        try:
            plan.make_trial([params], "trial")
        except InputError as error:
            shown = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in params.items())
            raise InputError(f"space: {shown} together make an invalid config: {error}") from None


def _check_mlflow(config: SweepConfig) -> None:
    from importlib.util import find_spec

    if config.mlflow and find_spec("mlflow") is None:
        raise InputError("mlflow: is not installed here; pip install mlflow, or remove the key")


def _check_dev(plan: SweepPlan) -> None:
    """Raise InputError when dev holds no questions, or questions of a test: what is tuned on a test measures nothing."""
    from medlora.data.overlap import TestIndex

    tests = plan.run.evaluation.tests if plan.run.evaluation else ()
    named = {test.source: f"evaluation.tests.{i}" for i, test in enumerate(tests)}
    # A test is the same under another path.
    held = {scan_source(f"evaluation.tests.{i}", test).hash: f"evaluation.tests.{i}" for i, test in enumerate(tests)}
    for i, source in enumerate(plan.dev):
        key = f"dev.sources.{i}"
        if _TEST_SPLIT.match(source.source):
            raise InputError(f"{key}.source: {source.source!r} is a test split; a sweep never looks at a test")
        if (test := named.get(source.source) or held.get(scan_source(key, source).hash)) is not None:
            raise InputError(
                f"{key}.source: {source.source!r} is the test {test} of {plan.config.config}; a sweep never looks at a test"
            )
        if scan_source(f"dev.sources.{i}", source).kind != "mcq":
            raise InputError(
                f"dev.sources.{i}.source: {source.source} holds no questions; trials are scored on questions"
            )
    if not tests or plan.run.data.overlap == "allow":
        return
    questions = {test.name: [record for record in stream(test) if isinstance(record, McqRecord)] for test in tests}
    index = TestIndex(questions)
    for i, source in enumerate(plan.dev):
        hits = [hit for record in stream(source) for hit in index.find(record, source.source)]
        if hits:
            shown = ", ".join(f"{hit.record} is {hit.question} of {hit.test} ({hit.kind})" for hit in hits[:3])
            raise InputError(
                f"dev.sources.{i}.source: {source.source} holds {len(hits)} questions of the tests: {shown}; "
                "a sweep never looks at a test: take another dev split"
            )


def find_start(plan: SweepPlan) -> tuple[RunFolder, tuple[Link, ...]]:
    """The run named by `start`, whose earlier phases are finished, and the chain that every trial starts from.

    Raises InputError where they are not, or were made from something else.
    """
    folder = str(plan.config.start)
    run, chain = RunFolder(find_run(folder, plan.config.storage.cache)), start_chain(plan.run)
    mirror.pull(run.root, exclude=("checkpoints", "best", "evaluation", ".replaced"))
    for phase in list_earlier(plan):
        there = run.phase(phase.name)
        if find_finished(there)[0] is None:
            raise InputError(f"start: {folder} has no finished phase {phase.name}; train it first, or remove the key")
        if differences := find_obstacle(make_job(plan.run, phase, chain), there):
            shown = "\n  ".join(differences[:5])
            raise InputError(f"start: phase {phase.name} of {folder} was made from something else:\n  {shown}")
        chain = extend_chain(chain, phase, there.adapter)
    return run, chain


def refuse_other(folder: Path, plan: SweepPlan) -> None:
    """Raise InputError when the folder holds another sweep, finished or not."""
    was = read_mapping(folder / FINGERPRINT)
    if was is not None and (differences := find_differences(was, describe_sweep(plan))):
        shown = "\n  ".join(differences[:5])
        raise InputError(
            f"{mirror.name_place(folder)}: holds another sweep:\n  {shown}\ngive this one another name (--set name=...), or --out"
        )
