"""A sweep before and after its trials: the space, what is refused, the ledger, the sampler, the results. No Ray, no torch."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from rich.console import Console

from medlora.config.loading.files import load, load_sweep_config
from medlora.config.run import RunConfig
from medlora.config.sweep import Mlflow
from medlora.errors import InputError
from medlora.reporting.sweep_page import write_sweep_page
from medlora.reporting.sweep_progress import SweepDisplay
from medlora.runs.files import append_json, read_json, write_json
from medlora.runs.folders import PhaseFolder
from medlora.sweep.checks import check_sweep, refuse_other
from medlora.sweep.ledger import Ledger, Trial
from medlora.sweep.plan import SweepPlan
from medlora.sweep.population import WAIT, Population, Proposal, find_lineage
from medlora.sweep.results import (
    compare_with_start,
    describe_pair,
    describe_saturation,
    find_summary,
    find_winner,
    write_results,
)
from medlora.sweep.space import Choice, Range, parse_domain, validate
from medlora.sweep.suggest import Suggester, measure_importance
from tests.support import ROOT
from tests.support.hostile import XSS, Markup


def question(i: int) -> dict[str, Any]:
    words = f"Which of the drugs number {i} {i * 7} {i * 13} lowers fever {i * 31}?"
    return {"id": f"q{i}", "question": words, "A": f"a{i}", "B": f"b{i}", "answer": 1 + i % 2}


def write_rows(path: Path, numbers: range) -> str:
    path.write_text("".join(json.dumps(question(i)) + "\n" for i in numbers), encoding="utf-8")
    return str(path)


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """A run config of three phases as plain values; written to run.yaml by `plan`."""
    train = write_rows(tmp_path / "train.jsonl", range(10))
    other = write_rows(tmp_path / "other.jsonl", range(20, 30))
    dev, test = (
        write_rows(tmp_path / "dev.jsonl", range(100, 105)),
        write_rows(tmp_path / "test.jsonl", range(200, 205)),
    )
    sources = [{"source": train, "weight": 0.8}, {"source": other, "weight": 0.2}]
    return {
        "name": "run",
        "base": {"model": "miniature"},
        "lora": {"r": 8, "alpha": 16},
        "phases": [
            {"name": "00", "chain": "new", "sources": [{"source": train}]},
            {"name": "01", "chain": "continue", "sources": sources, "replay": [{"phase": "00", "share": 0.1}]},
            {
                "name": "02",
                "chain": "stack",
                "batch_size": 4,
                "accumulation": 2,
                "max_steps": 50,
                "sources": sources,
                "replay": [{"phase": "00", "share": 0.2}, {"phase": "01", "share": 0.1}],
                "validation": {"sources": [{"source": dev}]},
            },
        ],
        "evaluation": {"tests": [{"name": "t", "source": test}]},
    }


def plan(tmp_path: Path, run: dict[str, Any], space: Any, **more: Any) -> SweepPlan:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    config = {"name": "sweep", "config": str(tmp_path / "run.yaml"), "space": space, **more}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return check_sweep(load_sweep_config(tmp_path / "sweep.yaml"))


# ---- the space ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("choice [8, 16]", Choice((8, 16))),
        (["attention", "all-linear"], Choice(("attention", "all-linear"))),
        ("uniform 0 0.1", Range(0, 0.1)),
        ("loguniform 5e-5 5e-4", Range(5e-5, 5e-4, log=True)),
        ("int 1 8", Range(1, 8, whole=True)),
        ("logint 1 64", Range(1, 64, log=True, whole=True)),
    ],
)
def test_domains_are_read_from_words(text: Any, domain: Any) -> None:
    assert parse_domain("k", text) == domain


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("normal 0 1", "is no domain; write `choice [8, 16, 32]`"),
        ("uniform 1", "uniform takes two numbers"),
        ("uniform 0.2 0.1", "the first number must be below the second"),
        ("loguniform 0 1", "loguniform begins above 0"),
        ("int 1.5 3", "int takes two whole numbers"),
        ("choice 8", "a choice needs a list of values"),
        ([], "a choice needs a list of values"),
        ("choice [8, 8]", "a value appears there twice"),
    ],
)
def test_what_is_no_domain_is_refused_with_its_key(text: Any, said: str) -> None:
    with pytest.raises(InputError, match=r"space\.lora\.r: ") as error:
        parse_domain("lora.r", text)
    assert said in str(error.value)


def test_values_reach_the_phases_they_mean(tmp_path: Path, run: dict[str, Any]) -> None:
    space = {
        "lora.r": [4, 32],
        "lora.alpha_over_r": [1, 3],
        "phases.02.global_batch": [6, 32],
        "phases.02.replay.00.share": "uniform 0.1 0.4",
        "phases.02.sources.train.share": "uniform 0.1 0.9",
    }
    swept = plan(tmp_path, run, space)
    assert swept.start_params == {
        "lora.r": 8,
        "lora.alpha_over_r": 2.0,
        "phases.02.global_batch": 8,
        "phases.02.replay.00.share": 0.2,
        "phases.02.sources.train.share": 0.8,
    }
    params = dict(zip(space, [32, 3, 6, 0.3, 0.4], strict=True))
    made = validate(swept.make_raw([params]))
    phase = made.phase("02")
    assert phase.lora is not None and (phase.lora.r, phase.lora.alpha) == (32, 96)
    assert (phase.batch_size, phase.accumulation) == (3, 2)
    assert [replay.share for replay in phase.replay] == [0.3, 0.1]
    assert [source.weight for source in phase.sources] == [0.4, 0.6]
    # The phases before are those that every trial starts from; the tests are still the run's.
    assert made.lora.r == 8 and made.phases[:2] == swept.run.phases[:2] and made.evaluation == swept.run.evaluation
    trial = swept.make_trial([params], "trial-001")
    assert trial.evaluation is None and trial.phase("02").validation.sample == 256  # type: ignore[union-attr]


def test_a_sweep_of_all_phases_changes_the_whole_run(tmp_path: Path, run: dict[str, Any]) -> None:
    swept = plan(tmp_path, run, {"lora.r": [4, 8]}, phases="all")
    assert (
        validate(swept.make_raw([{"lora.r": 4}])).lora.r == 4
        and validate(swept.make_raw([{"lora.r": 4}])).phase("02").lora is None
    )


def test_the_config_as_it_stands_is_the_start_whatever_its_values(tmp_path: Path, run: dict[str, Any]) -> None:
    swept = plan(tmp_path, run, {"phases.02.learning_rate": "loguniform 1e-3 1e-2"})
    assert validate(swept.make_raw([swept.start_params])) == swept.run


# ---- what is refused before anything starts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "more", "said"),
    [
        ({"lora.rank": [8]}, {}, "space.lora.rank: unknown key; did you mean 'lora.r'?"),
        ({"phases.02.learning_rat": [1e-3]}, {}, "unknown key; did you mean 'phases.02.learning_rate'?"),
        ({"learning_rate": [1e-3]}, {}, "unknown key; did you mean 'phases.02.learning_rate'?"),
        ({"lora.alpha_over": [1]}, {}, "unknown key; did you mean 'lora.alpha_over_r'?"),
        ({"phases.02.sources.train.shar": [0.5]}, {}, "did you mean 'phases.02.sources.train.share'?"),
        ({"lora.r": 8}, {}, "space: lora.r is 8, which is no domain; write `choice"),
        ({"phases.02.replay.03.share": [0.1]}, {}, "no item '03'; there are 0..1 or by name 00, 01"),
        ({}, {}, "space: is empty"),
        ({"evaluation.scoring": ["letter"]}, {}, "a sweep never looks at the tests"),
        ({"seed": [1, 2]}, {}, "is no hyperparameter"),
        ({"phases.01.learning_rate": [1e-3]}, {}, "phase 01 is not searched"),
        ({"base.quantization": ["nf4"]}, {}, "set phases: all"),
        ({"lora.alpha": [8], "lora.alpha_over_r": [1]}, {}, "sets lora.alpha, which the space names too"),
        ({"lora.r": [8]}, {"phases": ["01"]}, "phase 01 continues an adapter"),
        ({"lora.r": [8]}, {"phases": ["03"]}, "phases.0: '03' is no phase of"),
        ({"lora.r": [8]}, {"phases": ["00", "02"]}, "name phases that follow each other in 00, 01, 02"),
        ({"lora.dropout": "uniform 0 1.5"}, {}, "space.lora.dropout: 1.5, the upper end, makes an invalid config"),
        ({"lora.r": [8, 0]}, {}, "space.lora.r: 0 makes an invalid config"),
        ({"lora.targets": ["attention", 3]}, {}, "space.lora.targets: 3 makes an invalid config"),
        (
            {"phases.02.replay.00.share": [0.2, 0.5], "phases.02.replay.01.share": [0.1, 0.6]},
            {},
            "phases.02.replay.00.share=0.5, phases.02.replay.01.share=0.6 together make an invalid config",
        ),
        ({"lora.r": "int 1 8"}, {"search": "grid"}, "search: grid needs values, not a range"),
        ({"lora.r": [8]}, {"placement": {"workers": 2}}, "placement.workers: a trial trains in one process"),
        ({"lora.r": [8]}, {"start": "nowhere"}, "start: nowhere has no finished phase 00"),
        ({"lora.r": [8]}, {"trails": 3}, "trails: unknown key; did you mean 'trials'?"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, run: dict[str, Any], space: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        plan(tmp_path, run, space, **more)
    assert said in str(error.value)


def test_mlflow_that_is_not_installed_is_refused(
    tmp_path: Path, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match="mlflow: is not installed here; pip install mlflow, or remove the key"):
        plan(tmp_path, run, {"lora.r": [8]}, mlflow={"experiment": "x"})


def test_a_test_cannot_be_named_nor_its_questions_used(tmp_path: Path, run: dict[str, Any]) -> None:
    test = run["evaluation"]["tests"][0]["source"]
    with pytest.raises(InputError, match="is the test evaluation.tests.0 of .*never looks at a test"):
        plan(tmp_path, run, {"lora.r": [8]}, dev={"sources": [{"source": test}]})
    copied = tmp_path / "copied.jsonl"
    write_rows(copied, range(199, 205))
    with pytest.raises(InputError, match="holds 5 questions of the tests: q200 is q200 of t"):
        plan(tmp_path, run, {"lora.r": [8]}, dev={"sources": [{"source": str(copied)}]})
    run["data"] = {"overlap": "allow"}  # what is trained on is one thing, what is tuned on another
    write_rows(copied, range(200, 205))
    with pytest.raises(InputError, match="copied.jsonl' is the test evaluation.tests.0 of"):
        plan(tmp_path, run, {"lora.r": [8]}, dev={"sources": [{"source": str(copied)}]})
    with pytest.raises(InputError, match="miniature:mcq/test_asked' is a test split"):
        plan(tmp_path, run, {"lora.r": [8]}, dev={"sources": [{"source": "miniature:mcq/test_asked"}]})
    with pytest.raises(InputError, match="a phase never reads a test"):
        plan(tmp_path, run, {"phases.02.sources.0.source": [test]})


def test_the_job_says_it_with_code_2_and_without_torch_or_ray(tmp_path: Path, run: dict[str, Any]) -> None:
    plan(tmp_path, run, {"lora.r": [8]})
    code = f"import sys, runpy; sys.argv = ['x', '--config', {str(tmp_path / 'sweep.yaml')!r}, '--set', 'space={{lora.x: [1]}}']\n"
    code += "try: runpy.run_path('jobs/sweep.py', run_name='__main__')\n"
    code += "finally: print('HEAVY', sorted({'torch', 'ray', 'transformers', 'datasets', 'optuna'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("medlora: space.lora.x: unknown key; did you mean 'lora.r'?")
    assert done.stdout == "HEAVY []\n"


def test_the_shipped_sweep_is_valid() -> None:
    swept = check_sweep(load_sweep_config(ROOT / "configs" / "sweep.yaml"))
    assert swept.searched == ("02",) and swept.start_params == {"phases.02.learning_rate": 3e-3, "lora.r": 16}


def test_another_sweep_in_the_folder_is_refused_and_more_trials_are_not(tmp_path: Path, run: dict[str, Any]) -> None:
    from medlora.sweep.plan import describe_sweep

    write_json(tmp_path / "fingerprint.json", describe_sweep(plan(tmp_path, run, {"lora.r": [4, 8]})))
    refuse_other(tmp_path, plan(tmp_path, run, {"lora.r": [4, 8]}, trials=40, best=1, concurrency=2))
    with pytest.raises(InputError, match="holds another sweep:\n  sweep.seed: was 0, now 1"):
        refuse_other(tmp_path, plan(tmp_path, run, {"lora.r": [4, 8]}, seed=1))
    run["phases"][2]["max_steps"] = 60
    with pytest.raises(InputError, match="run.phases.2.max_steps: was 50, now 60"):
        refuse_other(tmp_path, plan(tmp_path, run, {"lora.r": [4, 8]}))


def test_when_a_stall_is_reported_makes_no_other_sweep(tmp_path: Path, run: dict[str, Any]) -> None:
    from medlora.sweep.plan import describe_sweep

    run["phases"][2]["placement"] = {"cpus_per_worker": 1}
    write_json(tmp_path / "fingerprint.json", describe_sweep(plan(tmp_path, run, {"lora.r": [4, 8]})))
    written = read_json(tmp_path / "fingerprint.json")
    assert "stall_s" not in written["run"]["phases"][2]["placement"]
    run["phases"][2]["placement"] |= {"stall_s": 60, "stall_kill_s": 120}
    refuse_other(tmp_path, plan(tmp_path, run, {"lora.r": [4, 8]}))


# ---- ledger and sampler ---------------------------------------------------------------------------------------------


def test_a_ledger_knows_after_a_kill_what_it_knew_before(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trials.jsonl")
    for r in (8, 16, 32):
        ledger.begin({"r": r})
    ledger.run("000")
    ledger.add_score("000", 10, 0.5, stop=False)
    ledger.add_score("001", 10, 0.2, stop=True)
    ledger.add_score("002", 10, 0.4, stop=False)
    ledger.die("002")
    ledger.add_score("002", 10, 0.9, stop=False)  # scored again after a checkpoint: the first score counts
    ledger.add_score("000", 20, 0.75, stop=False)
    ledger.end("000", "finished")
    with ledger.path.open("a") as file:
        file.write('{"event": "ended", "tri')  # killed while it wrote
    again = Ledger(ledger.path)
    strip = {"since": None, "seconds": 0}
    assert [vars(t) | strip for t in again.trials.values()] == [vars(t) | strip for t in ledger.trials.values()]
    assert [trial.state for trial in again.trials.values()] == ["finished", "stopped", "running"]
    assert again.trials["002"].score == 0.4 and again.trials["002"].deaths == 1 and again.rank()[0].id == "000"
    again.end("002", "failed", "its process died")
    assert Ledger(ledger.path).trials["002"].why == "its process died"


def test_scores_that_no_driver_heard_are_told_again(tmp_path: Path) -> None:
    """Of a trial with two segments, which count their steps from 0 each, on top of 10 steps of generations before."""
    from medlora.on_ray.tune_trial import _Clock, _Hook

    folder = PhaseFolder(tmp_path)
    for segment, step, accuracy in (("full", 5, 0.1), ("normal", 3, 0.2), ("normal", 6, 0.3)):
        row = {"segment": segment, "step": step, "accuracy": accuracy}
        append_json(folder.metrics, row)
        append_json(folder.validation, row)
    for known, finished, steps in ((0, False, [15, 18, 21]), (15, True, [18, 21]), (21, True, [])):
        told: list[dict[str, Any]] = []
        hook = _Hook({"id": "001", "offset": 10, "known": known}, folder, told.append, None, _Clock())
        hook.report_again(finished)
        assert [row["step"] for row in told] == steps
        assert [row["last"] for row in told] == [finished and step == 21 for step in steps]


SPACE = {"lr": Range(1e-4, 1e-2, log=True), "r": Choice((8, 16, [1, 2]))}


def drive(suggester: Suggester, ids: range, known: list[Trial]) -> list[Trial]:
    """Trials whose score is better the nearer the rate is to 1e-3."""
    for i in ids:
        found = suggester.suggest()
        assert found is not None
        asked, params = found
        trial = Trial(f"{i:03}", params)
        suggester.begin(trial.id, params, asked)
        score = 1 - abs(params["lr"] - 1e-3) * 50
        suggester.add_score(trial.id, 5, score)
        trial.reports.append({"step": 5, "score": score})
        trial.state = "stopped" if i % 3 == 0 else "finished"
        suggester.end(trial)
        known.append(trial)
    return known


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_the_same_seed_suggests_the_same_and_a_resumed_sampler_goes_on(method: str) -> None:
    first, again = (drive(Suggester(SPACE, method, 3, 16), range(12), []) for _ in range(2))
    assert [trial.params for trial in first] == [trial.params for trial in again]
    other = drive(Suggester(SPACE, method, 4, 16), range(12), [])
    assert [trial.params for trial in other] != [trial.params for trial in first]
    resumed = Suggester(SPACE, method, 3, 16, first)
    assert len(resumed.study.trials) == 12
    assert resumed.study.best_value == max(trial.reports[0]["score"] for trial in first if trial.state == "finished")
    found = resumed.suggest()
    assert found is not None and found[1] not in [trial.params for trial in first]


def test_tpe_learns_from_the_ledger() -> None:
    known = drive(Suggester(SPACE, "random", 0, 40), range(30), [])
    near = [abs(trial.params["lr"] - 1e-3) for trial in drive(Suggester(SPACE, "tpe", 0, 40, known), range(30, 42), [])]
    far = [abs(trial.params["lr"] - 1e-3) for trial in known]
    assert sum(near) / len(near) < 0.5 * sum(far) / len(far)


def test_a_small_space_is_exhausted_and_nothing_is_tried_twice() -> None:
    suggester = Suggester({"r": Choice((1, 2, 3))}, "random", 0, 16)
    suggester.begin("000", {"r": 2})
    tried = [2]
    while found := suggester.suggest():
        suggester.begin(f"{len(tried):03}", found[1], found[0])
        tried.append(found[1]["r"])
    assert sorted(tried) == [1, 2, 3]


def test_what_matters_is_more_important() -> None:
    known = drive(Suggester(SPACE, "random", 0, 60), range(40), [])
    importance = measure_importance(SPACE, known)
    assert list(importance)[0] == "lr" and sum(importance.values()) == pytest.approx(1)
    assert measure_importance(SPACE, known[:3]) == {}


# ---- population based training --------------------------------------------------------------------------------------


def evolve(path: Path, steps: int, size: int = 4, generations: int = 3) -> Ledger:
    """So many proposals of a population whose trials are better the nearer their rate is to 1e-3; one diverges."""
    ledger = Ledger(path)
    population = Population({"lr": Range(1e-4, 1e-2, log=True), "lora.r": Choice((8, 16))}, size, generations, 7)
    if not ledger.trials:
        ledger.begin({"lr": 1e-4, "lora.r": 8})
        ledger.end("000", "finished")
    suggester = Suggester(population.space, "random", 7, 13, list(ledger.trials.values()))
    for _ in range(steps):
        proposal = population.propose(ledger, suggester.suggest)
        assert isinstance(proposal, Proposal)
        trial = ledger.begin(proposal.params, proposal.about)
        if trial.id == "006":
            ledger.end(trial.id, "failed", "the loss is nan")
        else:
            ledger.add_score(trial.id, 10, 1 - abs(trial.params["lr"] - 1e-3) * 50, stop=False)
            ledger.end(trial.id, "finished")
    return ledger


def test_the_worst_of_a_population_go_on_from_the_best_with_changed_values(tmp_path: Path) -> None:
    ledger = evolve(tmp_path / "a.jsonl", 12)
    trials = [trial for trial in ledger.trials.values() if trial.about]
    assert Counter((trial.about["member"], trial.about["generation"]) for trial in trials) == {
        (member, generation): 1 for member in range(4) for generation in (1, 2, 3)
    }
    moved = []
    for trial in trials:
        if trial.about["parent"] is not None:
            parent = ledger.trials[trial.about["parent"]]
            assert parent.state == "finished" and parent.about["generation"] == trial.about["generation"] - 1
            assert trial.params["lora.r"] == parent.params["lora.r"]  # an adapter keeps its shape
            same = parent.about["member"] == trial.about["member"]
            assert (trial.params == parent.params) == same
            moved += [] if same else [trial]
    first = sorted((t for t in trials if t.about["generation"] == 1), key=lambda t: t.score or 0)
    assert first[0].about["member"] in [trial.about["member"] for trial in moved]
    failed = ledger.trials["006"].about["member"]
    assert any(trial.about["member"] == failed and trial.about["generation"] == 3 for trial in moved)
    assert [trial.id for trial in find_lineage(ledger, trials[-1])][-1] == trials[-1].id
    # A killed driver's successor decides the same from the ledger.
    evolve(tmp_path / "b.jsonl", 8)
    resumed = evolve(tmp_path / "b.jsonl", 4)
    assert [(t.params, t.about) for t in resumed.trials.values()] == [
        (t.params, t.about) for t in ledger.trials.values()
    ]


def test_a_population_waits_for_its_members_and_ends(tmp_path: Path) -> None:
    ledger = evolve(tmp_path / "a.jsonl", 2, size=2, generations=2)
    population = Population({"lr": Range(1e-4, 1e-2, log=True), "lora.r": Choice((8, 16))}, 2, 2, 7)
    for _ in range(2):
        proposal = population.propose(ledger, lambda: None)
        assert isinstance(proposal, Proposal)
        ledger.begin(proposal.params, proposal.about)
    assert population.propose(ledger, lambda: None) == WAIT
    for id in ("003", "004"):
        ledger.end(id, "finished")
    assert population.propose(ledger, lambda: None) is None


PBT = {"scheduler": {"kind": "pbt", "population": 4, "generations": 3}}


def test_a_schedule_is_phases_that_continue_each_other(tmp_path: Path, run: dict[str, Any]) -> None:
    swept = plan(tmp_path, run, {"phases.02.learning_rate": "loguniform 1e-4 1e-2", "lora.r": [4, 8]}, **PBT)
    assert swept.trials == 13
    lineage = [{"phases.02.learning_rate": rate, "lora.r": 4} for rate in (1e-3, 2e-3, 3e-3)]
    made = validate(swept.make_raw(lineage, whole=False))
    assert [phase.name for phase in made.phases] == ["00", "01", "02", "02-2", "02-3"]
    assert [phase.chain for phase in made.phases[2:]] == ["stack", "continue", "continue"]
    assert [phase.learning_rate for phase in made.phases[2:]] == [1e-3, 2e-3, 3e-3]
    assert [phase.max_steps for phase in made.phases[2:]] == [16, 17, 17]
    assert made.phases[2].lora is not None and made.phases[2].lora.r == 4
    trial = swept.make_trial(lineage[:2], "t", whole=False)
    assert [phase.name for phase in trial.phases] == ["00", "01", "02", "02-2"] and trial.phases[-1].validation


@pytest.mark.parametrize(
    ("space", "more", "said"),
    [
        ({"lora.r": [4, 8]}, PBT, "the space names only its shape"),
        ({"phases.02.learning_rate": [1e-3, 2e-3]}, {**PBT, "trials": 9}, "sets how many trials there are"),
        ({"phases.02.learning_rate": [1e-3, 2e-3]}, {**PBT, "phases": "all"}, "divides the max_steps of one phase"),
        ({"phases.02.max_steps": [30, 60]}, PBT, "take it out of the space"),
    ],
)
def test_what_a_population_cannot_do_is_refused(
    tmp_path: Path, run: dict[str, Any], space: Any, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as error:
        plan(tmp_path, run, space, **more)
    assert said in str(error.value)


# ---- results --------------------------------------------------------------------------------------------------------


def make_report(accuracies: dict[str, float]) -> dict[str, Any]:
    stages = [{"stage": id, "test": "dev", "accuracy": a} for id, a in accuracies.items()]
    overall = [{"stage": id, "micro": a, "interval": [a - 0.05, a + 0.05], "n": 100} for id, a in accuracies.items()]
    start = accuracies["000"]
    pairs = [
        {
            "before": "000",
            "after": id,
            "test": "dev",
            "total": 100,
            "difference": a - start,
            "low": a - start - 0.024,
            "high": a - start + 0.023,
            "p_value": 0.03 * i,
            "gained": [["dev", "q"]],
            "lost": [],
        }
        for i, (id, a) in enumerate(accuracies.items())
        if id != "000"
    ]
    return {"stages": stages, "overall": overall, "comparisons": pairs, "created": "now"}


def test_a_saturated_dev_split_is_reported() -> None:
    (said,) = describe_saturation(compare_with_start(make_report({"000": 0.992, "004": 1.0})))
    assert said.startswith("the dev split is saturated: all 2 trials compared on it answer 98% or more of its 100")
    assert not describe_saturation(compare_with_start(make_report({"000": 0.97, "004": 1.0})))
    assert not describe_saturation(compare_with_start(make_report({"000": 1.0})))


def test_the_difference_is_said_with_its_doubt() -> None:
    comparison = compare_with_start(make_report({"000": 0.5, "004": 0.521, "002": 0.48}))
    assert describe_pair(comparison["pairs"][0]) == (
        "better by 2.1 points (95 % -0.3 .. 4.4), McNemar p 0.030 (Holm 0.060), n = 100"
    )
    assert describe_pair(comparison["pairs"][1]).startswith("worse by 2.0 points")
    (even,) = compare_with_start(make_report({"000": 0.5, "004": 0.5}))["pairs"]
    assert describe_pair(even) == "not distinguishable at n = 100 (95 % -2.4 .. 2.3), McNemar p 0.030 (Holm 0.030)"
    assert find_winner(comparison) == "004"
    assert find_winner(compare_with_start(make_report({"000": 0.5, "004": 0.5}))) == "000"


NASTY = "</style><script>alert(1)</script>$x$"


@pytest.fixture
def done(tmp_path: Path, run: dict[str, Any]) -> tuple[SweepPlan, Ledger, Path]:
    """A finished sweep of four trials, one of them with a nasty value."""
    swept = plan(tmp_path, run, {"lora.targets": ["all-linear", [NASTY]], "lora.r": [8, 16]}, trials=4)
    folder = tmp_path / "sweep"
    folder.mkdir()
    ledger = Ledger(folder / "trials.jsonl")
    values = [swept.start_params, *({"lora.targets": [NASTY], "lora.r": r} for r in (8, 16)), dict(swept.start_params)]
    for params in values:
        ledger.begin(params)
    for id, score in (("000", 0.5), ("001", 0.6)):
        ledger.add_score(id, 25, score - 0.1, stop=False)
        ledger.add_score(id, 50, score, stop=False)
        ledger.end(id, "finished")
    ledger.add_score("002", 25, 0.2, stop=True)
    ledger.end("003", "failed", f"the loss is nan {NASTY}")
    return swept, ledger, folder


def test_the_results_hold_what_happened_and_the_page_no_markup_of_the_data(
    done: tuple[SweepPlan, Ledger, Path],
) -> None:
    swept, ledger, folder = done
    comparison = compare_with_start(make_report({"000": 0.5, "001": 0.6}))
    summary = write_results(folder, swept, ledger, comparison, None, 2)
    assert read_json(folder / "sweep.json") == summary and summary["winner"] == "001"
    assert summary["states"] == {"finished": 2, "stopped": 1, "failed": 1, "invalid": 0}
    table = pyarrow.parquet.read_table(folder / "trials.parquet").to_pylist()
    assert [row["state"] for row in table] == ["finished", "finished", "stopped", "failed"]
    assert [row["lora.r"] for row in table] == [8, 8, 16, 8] and table[1]["score"] == 0.6
    write_sweep_page(folder / "sweep.html", summary)
    page = (folder / "sweep.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    assert page.count("</style>") == 1 and "http://" not in page and "https://" not in page
    assert "better by 10.0 points" in page and "1 stopped" in page
    assert find_summary(folder, swept, ledger, final_test=False) == summary
    assert find_summary(folder, swept, ledger, final_test=True) is None
    (folder / "best.yaml").unlink()
    assert find_summary(folder, swept, ledger, final_test=False) is None


def test_the_page_has_the_best_config_links_and_what_stopping_saved(done: tuple[SweepPlan, Ledger, Path]) -> None:
    swept, ledger, folder = done
    summary = write_results(folder, swept, ledger, compare_with_start(make_report({"000": 0.5, "001": 0.6})), None, 2)
    (folder / "trials" / "001").mkdir(parents=True)
    write_sweep_page(folder / "sweep.html", summary)
    html = (folder / "sweep.html").read_text(encoding="utf-8")
    shown = [unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", html, flags=re.S)]
    assert (folder / "best.yaml").read_text(encoding="utf-8") in shown
    assert re.findall(r'href="(trials/[^"]*)"', html) == ["trials/001/"]
    # Two trials were trained to step 50; the stopped one ended at step 25.
    assert "Stopping 1 trial early saved 25 of 150 steps (17%)" in html
    titles = [unescape(title) for title in re.findall(r"<title>(trial .*?)</title>", html, flags=re.S)]
    assert any(title.startswith("trial 001, winner, dev 60.0 % at step 50\nlora.targets = ") for title in titles)
    assert len(titles) == 4 + 3  # the failed trial has no score, so no curve


def test_markup_in_values_and_errors_stays_text(tmp_path: Path, run: dict[str, Any]) -> None:
    pages = []
    for name, words in (("plain", ["harmless"] * len(XSS)), ("hostile", list(XSS))):
        words = [f"{word} {i}" for i, word in enumerate(words)]
        swept = plan(tmp_path, run, {"lora.targets": ["all-linear", *([word] for word in words)]}, trials=60)
        (tmp_path / name).mkdir()
        ledger = Ledger(tmp_path / name / "trials.jsonl")
        for n, params in enumerate([swept.start_params, *({"lora.targets": [word]} for word in words)]):
            trial = ledger.begin(params)
            ledger.add_score(trial.id, 25, n / 100, stop=False)
            ledger.end(trial.id, "failed" if n % 5 == 4 else "finished", words[n - 1] if n % 5 == 4 else "")
        comparison = compare_with_start(make_report({"000": 0.5, "001": 0.6}))
        summary = write_results(tmp_path / name, swept, ledger, comparison, None, 2)
        write_sweep_page(tmp_path / name / "sweep.html", summary)
        pages.append(Markup((tmp_path / name / "sweep.html").read_text(encoding="utf-8")))
    plain, hostile = pages
    assert (hostile.tags, hostile.attributes) == (plain.tags, plain.attributes) and "script" not in hostile.tags
    bare = str.maketrans("", "", "\"'\\\n\t\r \0")  # a list is shown with quotes of its own
    shown = hostile.text.translate(bare)
    assert [p for i, p in enumerate(XSS) if f"{p}{i}".translate(bare) not in shown] == []


def test_trials_are_runs_of_mlflow_where_it_is_installed(
    done: tuple[SweepPlan, Ledger, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    from medlora.sweep.trackers import TrialLogs

    swept, ledger, folder = done
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    config = swept.config.model_copy(update={"mlflow": Mlflow(experiment="e")})
    step = {"event": "trial-step", "phase": "02", "step": 10, "loss": 0.5, "learning_rate": 0.1, "grad_norm": 1.0}
    for trial in ("000", "003"):  # a driver each: the second resumes the experiment and its runs
        with TrialLogs(folder, config) as logs:
            logs.show({**step, "tokens_per_s": 7.0, "trial": "000"}, ledger)
            logs.show({"event": "trial", "trial": trial}, ledger)
    client = MlflowClient()
    (first, failed) = client.search_runs([client.get_experiment_by_name("e").experiment_id], order_by=["start_time"])
    assert (first.info.run_name, first.info.status, first.data.tags["medlora.state"]) == (
        "sweep-000",
        "FINISHED",
        "finished",
    )
    assert first.data.params == {"lora.targets": "all-linear", "lora.r": "8"}
    assert first.data.metrics["dev/score"] == 0.5 and first.data.metrics["02/loss"] == 0.5
    scores = client.get_metric_history(first.info.run_id, "dev/score")
    assert [(each.step, each.value) for each in scores] == [(25, 0.4), (50, 0.5)]
    assert (failed.info.run_name, failed.info.status) == ("sweep-003", "FAILED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match="mlflow: the server does not answer as it should"):
        TrialLogs(folder, config)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_one_table_and_a_log_plain_lines(done: tuple[SweepPlan, Ledger, Path], terminal: bool) -> None:
    _, ledger, _ = done
    out, table = io.StringIO(), io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, highlight=False)
    with SweepDisplay(ledger, 5, console) as display:
        display.show({"event": "search", "concurrency": 2})
        trial = ledger.begin({"lora.targets": "all-linear", "lora.r": 8})
        display.show({"event": "trial", "trial": trial.id})
        display.show({"event": "trial-step", "trial": trial.id, "step": 10, "steps": 50})
        Console(file=table, width=120).print(display._draw())
        ledger.add_score(trial.id, 25, 0.7, stop=True)
        display.show({"event": "trial", "trial": trial.id})
        display.show({"event": "trial", "trial": trial.id})
        display.show({"event": "searched"})
    said = out.getvalue()
    assert "4 of 5 trials are done already; none of them is run again" in said
    assert said.count("trial 004  stopped at step 25: dev 0.700; 5 of 5 done, best 0.600 (trial 001)") == 1
    assert ("\x1b[" in said) == terminal
    assert "10/50" in table.getvalue() and "1 running, 2 finished, 1 stopped, 1 failed" in table.getvalue()


def test_the_best_config_is_a_run_config_with_its_reasons(done: tuple[SweepPlan, Ledger, Path]) -> None:
    swept, ledger, folder = done
    write_results(folder, swept, ledger, compare_with_start(make_report({"000": 0.5, "001": 0.6})), None, 2)
    best = load(folder / "best.yaml")
    assert best.phase("02").lora.targets == (NASTY,)  # type: ignore[union-attr]
    expected = validate(swept.make_raw([ledger.trials["001"].params]))
    assert best == RunConfig.model_validate(expected.model_dump() | {"name": "run-sweep"})
    text = (folder / "best.yaml").read_text(encoding="utf-8")
    assert text.startswith(
        "# Trial 001 of sweep sweep: 60.0% on dev, by letter.\n# Against the unchanged config: better"
    )
