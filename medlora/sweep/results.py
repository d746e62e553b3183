"""What came out of a sweep: `sweep.json`, the table of trials, the best config, and the words for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import yaml

from medlora.evaluation.ledger import REPORT as TEST_REPORT
from medlora.evaluation.reports import Report
from medlora.evaluation.statistics import SATURATED, holm, is_saturated
from medlora.runs.environment import get_versions
from medlora.runs.files import read_mapping, write_bytes, write_with_checksum
from medlora.runs.manifests import as_json, check_files, read_manifest
from medlora.sweep.ledger import BEST, PAGE, REPORT, START, TABLE, Ledger, Trial
from medlora.sweep.plan import SweepPlan
from medlora.sweep.population import find_lineage, name_generation
from medlora.sweep.space import format_value
from medlora.sweep.suggest import measure_importance
from medlora.sweep.summary import ComparedPair, ComparedRow, Comparison, Record, Summary, TrialRow


def compare_with_start(report: Report) -> Comparison:
    """From an evaluation's report: accuracy of the unchanged config and of the best trials on all of dev, and each
    trial's paired comparison with the config. `p_holm` is corrected for these comparisons alone."""
    several = len({row["test"] for row in report["stages"]}) > 1
    pairs: list[ComparedPair] = [
        {
            "after": pair["after"],
            "total": pair["total"],
            "difference": pair["difference"],
            "low": pair["low"],
            "high": pair["high"],
            "p_value": pair["p_value"],
            "gained": len(pair["gained"]),
            "lost": len(pair["lost"]),
            "p_holm": pair["p_value"],
        }
        for pair in report["comparisons"]
        if pair["before"] == START and (pair["test"] is None) == several
    ]
    for pair, corrected in zip(pairs, holm([pair["p_value"] for pair in pairs]), strict=True):
        pair["p_holm"] = corrected
    stages: list[ComparedRow] = [
        {"trial": row["stage"], "accuracy": row["micro"], "interval": row["interval"], "n": row["n"]}
        for row in report["overall"]
    ]
    return {"stages": stages, "pairs": pairs, "created": report.get("created")}


def describe_saturation(comparison: Comparison) -> list[str]:
    """A sentence where all trials answer nearly every question of dev; none otherwise."""
    rows = comparison["stages"]
    if not is_saturated([row["accuracy"] for row in rows]):
        return []
    return [
        f"the dev split is saturated: all {len(rows)} trials compared on it answer {SATURATED:.0%} or more of its "
        f"{rows[0]['n']:,} questions right, so it cannot rank them; use a harder or larger dev split"
    ]


def find_winner(comparison: Comparison) -> str:
    """The trial with the best accuracy on all of dev; of equal ones the unchanged config, then the earlier."""
    ranked = sorted(comparison["stages"], key=lambda row: (-row["accuracy"], row["trial"]))
    return str(ranked[0]["trial"])


def read_record(folder: Path) -> Record | None:
    """What the winner scored on the tests, if it ever was: a row a test."""
    report = read_mapping(folder / "test" / TEST_REPORT)
    manifest = read_manifest(folder / "test")
    if report is None or manifest is None or check_files(folder / "test", manifest):
        return None
    rows = [{key: row[key] for key in ("test", "accuracy", "interval", "n")} for row in report["stages"]]
    return cast(Record, {"trial": report["trial"], "created": report["created"], "tests": rows})


def find_summary(folder: Path, plan: SweepPlan, ledger: Ledger, final_test: bool) -> Summary | None:
    """The summary of a sweep in which nothing is left to do; None otherwise."""
    summary = read_mapping(folder / REPORT)
    whole = summary is not None and all((folder / name).is_file() for name in (TABLE, PAGE, BEST))
    if summary is None or not whole or (final_test and summary["test"] is None):
        return None
    ended = [trial for trial in ledger.trials.values() if trial.ended]
    as_planned = len(ended) == len(ledger.trials) >= plan.trials or summary["exhausted"]
    known = len(summary["trials"]) == len(ledger.trials) and summary["config"]["best"] == plan.config.best
    return cast(Summary, summary) if as_planned and known else None


def describe_pair(pair: ComparedPair) -> str:
    """ "better by 2.1 points (95 % -0.3 .. 4.4), McNemar p 0.09", with what correcting for several comparisons makes of it."""
    at = f"n = {pair['total']:,}"
    word = "better" if pair["difference"] > 0 else "worse" if pair["difference"] < 0 else f"not distinguishable at {at}"
    by = f" by {100 * abs(pair['difference']):.1f} points" if pair["difference"] else ""
    return (
        f"{word}{by} (95 % {100 * pair['low']:.1f} .. {100 * pair['high']:.1f}), McNemar p {_format_p(pair['p_value'])}"
        f" (Holm {_format_p(pair['p_holm'])})" + (f", {at}" if pair["difference"] else "")
    )


def _format_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.095 else f"{p:.2f}"


def write_results(
    folder: Path,
    plan: SweepPlan,
    ledger: Ledger,
    comparison: Comparison,
    test: Record | None,
    concurrency: int,
    notes: Sequence[str] = (),
) -> Summary:
    """Write `sweep.json`, `trials.parquet`, `best.yaml` and `sweep.html`; returns the summary that the first holds."""
    trials = list(ledger.trials.values())
    winner = find_winner(comparison)
    importance = measure_importance(plan.space, trials)
    summary: Summary = as_json(
        {
            "name": plan.config.name,
            "created": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "config": plan.config.model_dump(mode="json"),
            "searched": plan.searched,
            "scoring": plan.scoring,
            "space": {key: plan.config.space[key] for key in plan.space},
            "trials": [describe_trial(trial) for trial in trials],
            "states": {state: len(ledger.select(state)) for state in ("finished", "stopped", "failed", "invalid")},
            "importance": importance,
            "winner": winner,
            "dev": comparison,
            "test": test,
            "concurrency": concurrency,
            "notes": [*notes, *describe_saturation(comparison)],
            "exhausted": len(trials) < plan.trials,
            "trial_seconds": round(sum(trial.seconds for trial in trials), 1),
            "versions": get_versions(),
        }
    )
    write_with_checksum(folder / REPORT, summary)
    write_table(folder / TABLE, trials, list(plan.space))
    write_bytes(folder / BEST, make_best(plan, ledger, ledger.trials[winner], comparison).encode())
    return summary


def describe_trial(trial: Trial) -> TrialRow:
    """A trial as plain values."""
    return {
        "id": trial.id,
        "state": trial.state,
        "params": trial.params,
        "about": trial.about,
        "score": trial.score,
        "step": trial.step,
        "reports": trial.reports,
        "seconds": round(trial.seconds, 1),
        "deaths": trial.deaths,
        "why": trial.why,
    }


def write_table(path: Path, trials: Sequence[Trial], keys: Sequence[str]) -> None:
    """A parquet file with a row a trial: id, state, last step and score, seconds, and a column for every key of the space."""
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, object] = {
        "trial": pyarrow.array([trial.id for trial in trials], pyarrow.string()),
        "state": pyarrow.array([trial.state for trial in trials], pyarrow.string()),
        "step": pyarrow.array([trial.step for trial in trials], pyarrow.int64()),
        "score": pyarrow.array([trial.score for trial in trials], pyarrow.float64()),
        "seconds": pyarrow.array([trial.seconds for trial in trials], pyarrow.float64()),
        "why": pyarrow.array([trial.why for trial in trials], pyarrow.string()),
    }
    for key in keys:
        values = [trial.params[key] for trial in trials]
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        columns[key] = pyarrow.array(
            [float(value) if numbers else format_value(value) for value in values],
            pyarrow.float64() if numbers else pyarrow.string(),
        )
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def make_best(plan: SweepPlan, ledger: Ledger, trial: Trial, comparison: Comparison) -> str:
    """The winner as a run config that `jobs/curriculum.py` runs as it is, its reasons in a comment."""
    lineage = find_lineage(ledger, trial)
    raw = plan.make_raw([each.params for each in lineage], whole=not trial.about)
    raw["name"] = f"{str(raw['name'])[: 63 - len(plan.config.name)]}-{plan.config.name}"[:64]
    accuracy = next(row["accuracy"] for row in comparison["stages"] if row["trial"] == trial.id)
    lines = [f"Trial {trial.id} of sweep {plan.config.name}: {accuracy:.1%} on dev, by {plan.scoring}."]
    if trial.id == START:
        lines.append("The unchanged config: no trial was better on all of dev.")
    lines += [
        f"Against the unchanged config: {describe_pair(p)}." for p in comparison["pairs"] if p["after"] == trial.id
    ]
    for each in lineage:
        part = f"{name_generation(plan.scored_phase, each.about['generation'])}: " if len(lineage) > 1 else ""
        lines += [f"{part}{key} = {format_value(value)}" for key, value in each.params.items()]
    header = "".join(f"# {line}\n" for line in lines)
    return header + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=120)
