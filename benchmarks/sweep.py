"""Wall time of a sweep on Ray Tune beside the same trials trained in a row and beside plain Optuna, on the miniature.

    python benchmarks/sweep.py                      # two cores, 16 trials, some 20 minutes; nothing else should run
    python benchmarks/sweep.py --trials 4 --out /tmp

The space, dev and scheduler of configs/sweep.yaml, trials from the same finished phases 00 and 01, the same seed:

- `ray`: the search of jobs/sweep.py, successive halving, one thread a trial; with and without `reuse_actors`
- `in a row`: the trials of `ray`, each trained to its end by `run_phase`, one after another in one process
- `optuna`: `study.optimize` with TPE and MedianPruner calling `run_phase` in one process

The two peers run with as many threads as trains one trial faster, and do not pay for imports; `ray` pays for its processes.
Not counted for any: Ray's own start, the shared phases, scoring the best on all of dev. Writes sweep.json and sweep.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import optuna
import torch
from evaluation import describe_hardware

from medlora.config.loading.files import load_sweep_config
from medlora.config.run import RunConfig
from medlora.curriculum.chains import Link, extend_chain, start_chain
from medlora.curriculum.jobs import make_job
from medlora.drivers.sweep import run_sweep
from medlora.runs.environment import get_versions
from medlora.runs.files import read_json_lines
from medlora.runs.folders import PhaseFolder, RunFolder, open_run
from medlora.runs.manifests import read_manifest
from medlora.sweep.checks import check_sweep
from medlora.sweep.ledger import FINGERPRINT, Ledger
from medlora.sweep.plan import SweepPlan, list_earlier
from medlora.sweep.space import Choice, Domain
from medlora.sweep.suggest import Suggester
from medlora.training.phase import run_phase

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def train_start(plan: SweepPlan, folder: Path) -> tuple[Link, ...]:
    """The phases that every trial starts from, once, into a run's folder."""
    run, chain = RunFolder(folder), start_chain(plan.run)
    for phase in list_earlier(plan):
        there = run.phase(phase.name)
        if read_manifest(there.root) is None:
            run_phase(make_job(plan.run, phase, chain), there, lambda event: None)
        chain = extend_chain(chain, phase, there.adapter)
    return chain


def train(
    config: RunConfig, chain: tuple[Link, ...], folder: Path, threads: int, report: Callable[[dict[str, Any]], None]
) -> float:
    """One trial from its start to its end; its last dev score."""
    phase = config.phases[-1]
    job = make_job(config, phase, chain).model_copy(update={"threads": threads})
    run_phase(job, PhaseFolder(folder), report)
    return float(read_json_lines(PhaseFolder(folder).validation)[-1]["accuracy"])


def measure_ray(plan: SweepPlan, folder: Path, reuse_actors: bool) -> tuple[Row, list[dict[str, Any]]]:
    """The sweep's search: what it took, the share of the slots' time in which trials held them and trained; its values."""
    marks: dict[str, float] = {}
    spent: dict[str, dict[str, float]] = {}

    def hear(event: dict[str, Any]) -> None:
        if event["event"] in ("search", "searched"):
            marks[event["event"]] = time.time()
        elif event["event"] == "trial-seconds":
            spent[event["trial"]] = event["seconds"]
            said = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in event["seconds"].items())
            print(f"trial {event['trial']}: {said}", file=sys.stderr, flush=True)

    run = open_run(folder, mark=FINGERPRINT)
    ledger = Ledger(folder / "trials.jsonl")
    summary = run_sweep(plan, run, ledger, False, hear, reuse_actors)
    lines = read_json_lines(folder / "trials.jsonl")
    began = min(line["time"] for line in lines if line["event"] == "running")
    ended = max(line["time"] for line in lines)
    slots_s = summary["concurrency"] * (ended - began)
    trained_s = sum(each["train"] + each["score"] for each in spent.values())
    start_s = sum(spent[id]["import"] for id in list(ledger.trials)[: summary["concurrency"]])
    best = ledger.rank()[0]
    row = {
        "who": "ray" if reuse_actors else "ray, reuse_actors: false",
        "seconds": round(marks["searched"] - marks["search"], 1),
        "held": round(sum(trial.seconds for trial in ledger.trials.values()) / slots_s, 3),
        "trained": round(trained_s / slots_s, 3),
        "trained_once_started": round(trained_s / (slots_s - start_s), 3),
        "steps": sum(trial.step for trial in ledger.trials.values()),
        "stopped": len(ledger.select("stopped")),
        "best": best.score,
        "spent": {k: round(sum(each[k] for each in spent.values()) / slots_s, 3) for k in next(iter(spent.values()))},
    }
    return row, [trial.params for trial in ledger.trials.values()]


def measure_in_a_row(
    plan: SweepPlan, chain: tuple[Link, ...], values: list[dict[str, Any]], folder: Path, threads: int
) -> Row:
    """Every trial to its end, one after another."""
    began, scores, steps = time.monotonic(), [], 0
    for i, params in enumerate(values):
        config = plan.make_trial([params], f"trial-{i:03}")
        scores.append(train(config, chain, folder / f"{i:03}", threads, lambda event: None))
        steps += read_json_lines(folder / f"{i:03}" / "metrics.jsonl")[-1]["step"]
    return {
        "who": "in a row",
        "seconds": round(time.monotonic() - began, 1),
        "steps": steps,
        "stopped": 0,
        "best": max(scores),
    }


def suggest(trial: optuna.Trial, key: str, domain: Domain) -> Any:
    """A value by Optuna's own calls."""
    if isinstance(domain, Choice):
        return trial.suggest_categorical(key, domain.values)
    if domain.whole:
        return trial.suggest_int(key, int(domain.low), int(domain.high), log=domain.log)
    return trial.suggest_float(key, domain.low, domain.high, log=domain.log)


def measure_optuna(plan: SweepPlan, chain: tuple[Link, ...], trials: int, folder: Path, threads: int) -> Row:
    """Plain Optuna: TPE, MedianPruner, the config as it stands enqueued first."""
    sampler = Suggester(plan.space, "tpe", plan.config.seed, trials).study.sampler
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.enqueue_trial(plan.start_params)
    steps: dict[int, int] = {}

    def objective(trial: optuna.Trial) -> float:
        params = {key: suggest(trial, key, domain) for key, domain in plan.space.items()}

        def report(event: dict[str, Any]) -> None:
            if event["event"] == "validation":
                trial.report(event["accuracy"], event["step"])
                steps[trial.number] = event["step"]
                if trial.should_prune():
                    raise optuna.TrialPruned

        config = plan.make_trial([params], f"trial-{trial.number:03}")
        return train(config, chain, folder / f"{trial.number:03}", threads, report)

    began = time.monotonic()
    study.optimize(objective, n_trials=trials)
    states = [trial.state.name for trial in study.trials]
    return {
        "who": "optuna",
        "seconds": round(time.monotonic() - began, 1),
        "steps": sum(steps.values()),
        "stopped": states.count("PRUNED"),
        "best": study.best_value,
    }


def render(about: dict[str, Any], rows: list[Row]) -> str:
    """The measurements as Markdown."""
    ours = rows[0]["seconds"]
    lines = ["# A sweep beside its peers", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += [
        "| | s | times `ray` | steps trained | trials stopped | best dev | slots held | slots trained | once started |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        names = ("held", "trained", "trained_once_started")
        shares = [f"{row[name]:.0%}" if name in row else "" for name in names]
        lines.append(
            f"| {row['who']} | {row['seconds']:.0f} | {row['seconds'] / ours:.2f} | {row['steps']:,} | {row['stopped']} | "
            f"{row['best']:.3f} | {' | '.join(shares)} |"
        )
    lines += [""]
    lines += [
        "Held: share of the slots' time, from the first trial's begin to the last one's end, in which a trial had the slot;"
    ]
    lines += [
        "trained: in which it stepped or was scored, by the clock of the trial's process: modules, base, data and saving not"
    ]
    lines += [
        "counted; once started: the same without the time in which a slot's first process got its modules. Of all the slots'"
    ]
    lines += ["time, trials spent in importing, loading, training, scoring, waiting for Tune and saving:", ""]
    shown = [row for row in rows if "spent" in row]
    lines += [f"| | {' | '.join(shown[0]['spent'])} |", "|---" * (1 + len(shown[0]["spent"])) + "|"]
    lines += [f"| {row['who']} | {' | '.join(f'{share:.1%}' for share in row['spent'].values())} |" for row in shown]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "sweep.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    os.chdir(ROOT)
    os.environ.setdefault("RAY_ADDRESS", "local")  # not on a Ray that something else runs on
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the peers; 15, by default, loses to whatever else runs
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        changed = [*arguments.overrides, f"trials={arguments.trials}", "concurrency=2"]
        plan = check_sweep(load_sweep_config(arguments.config, changed))
        chain = train_start(plan, folder / "start")
        plan = check_sweep(load_sweep_config(arguments.config, [*changed, f"start={folder / 'start'}"]))
        one = plan.make_trial([plan.start_params], "trial")
        taken = {}
        for threads in (1, 2):
            began = time.monotonic()
            train(one, chain, folder / f"threads-{threads}", threads, lambda event: None)
            taken[threads] = time.monotonic() - began
        threads = min(taken, key=lambda n: taken[n])
        print(f"one trial: {taken[1]:.1f} s with 1 thread, {taken[2]:.1f} s with 2", file=sys.stderr, flush=True)
        rows = []
        row, values = measure_ray(plan, folder / "ray", reuse_actors=True)
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        rows.append(measure_ray(plan, folder / "fresh", reuse_actors=False)[0])
        print(rows[-1], file=sys.stderr, flush=True)
        rows.append(measure_in_a_row(plan, chain, values, folder / "row", threads))
        print(rows[-1], file=sys.stderr, flush=True)
        rows.append(measure_optuna(plan, chain, arguments.trials, folder / "optuna", threads))
        print(rows[-1], file=sys.stderr, flush=True)
    about = {
        "Date": date.today().isoformat(),
        "Command": " ".join(["python", *sys.argv]),
        "Hardware": f"{describe_hardware(False)}; load average {os.getloadavg()[0]:.1f} at the end",
        "Versions": ", ".join(f"{k} {v}" for k, v in {**get_versions(), "optuna": optuna.__version__}.items()),
        "Trials": f"{arguments.trials}, at most {one.phases[-1].max_steps} steps each, 2 slots of one thread; peers with "
        f"{threads} thread{'s' * (threads > 1)} (one trial: {taken[1]:.1f} s with 1, {taken[2]:.1f} s with 2)",
    }
    report = render(about, rows)
    (arguments.out / "sweep.md").write_text(report, encoding="utf-8")
    document = json.dumps({"about": about, "rows": rows}, indent=1, ensure_ascii=False)
    (arguments.out / "sweep.json").write_text(document + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
