"""Measure what the quickstart's curriculum teaches the miniature, over seeds and quantizations, without Ray.

python benchmarks/miniature.py                                        three seeds, none / int8 / nf4: half an hour to an hour
python benchmarks/miniature.py --seeds 0 --quantization nf4 --again   measure this one anew
python benchmarks/miniature.py --set phases.01.max_steps=200 --output /tmp/longer

Writes OUTPUT.json and OUTPUT.md after every measured (seed, quantization). What stands there of the same config, data,
prompts and base is kept; what was measured with others is left out of the new table.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from medlora.config.loading.files import load
from medlora.config.run import RunConfig
from medlora.curriculum.chains import Link, extend_chain
from medlora.curriculum.jobs import make_job
from medlora.data.sources import hash_records, read
from medlora.errors import InputError
from medlora.evaluation.questions import read_asked
from medlora.runs.environment import get_git_commit, get_versions
from medlora.runs.files import read_json, write_bytes, write_json
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import as_json, hash_json

ROOT = Path(__file__).resolve().parent.parent
QUANTIZATIONS = ("none", "int8", "nf4")
ALONE = "{} alone"
"""The stage with only the last adapter of the stack active: what is below it is missing, so it should be at chance."""

# What issue "Curriculum" asks of the quickstart.
MOST_BASE, LEAST_ASKED, LEAST_TEXT_ONLY, MOST_LOST = 0.35, 0.80, 0.50, 0.08

SCORE_KEYS = ("stage", "test", "accuracy", "interval", "n", "correct", "unparsed", "chance")

Result = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quantization", nargs="+", default=list(QUANTIZATIONS), choices=QUANTIZATIONS)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml", metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "miniature", help="path without suffix")
    parser.add_argument("--again", action="store_true", help="measure again what is there already")
    return parser.parse_args(argv)


def identify(config: RunConfig) -> str:
    """A hash of all that a measurement depends on: phases, data, base and prompts, seed, and how it is scored."""
    assert config.evaluation is not None
    tests = {test.name: hash_records(read(test)) for test in config.evaluation.tests}
    phases = [make_job(config, phase, ()).fingerprint for phase in config.phases]
    return hash_json(as_json([phases, tests, config.evaluation.model_dump(mode="json", exclude={"tests"})]))


def measure(config: RunConfig, folder: Path, tell: Callable[[str], None]) -> Result:
    """Train the phases into `folder` and score every stage: accuracies, wall and CPU seconds."""
    from medlora.answering.stage_model import StageModel
    from medlora.model.base import locate_base
    from medlora.reporting.report import summarise
    from medlora.training.phase import run_phase

    assert config.evaluation is not None
    run = RunFolder(folder)
    job = make_job(config, config.phases[0], ())
    # Built beforehand, so that no phase's time holds it.
    base = locate_base(job.base, job.cache, config.seed)
    chain: tuple[Link, ...] = ()
    stages: dict[str, tuple[Link, ...]] = {"base": ()}
    seconds, cpu_seconds = {}, {}
    for phase in config.phases:
        cpu_started = time.process_time()
        manifest = run_phase(make_job(config, phase, chain), run.phase(phase.name), lambda event: None)
        seconds[phase.name] = manifest["seconds"]["all"]
        cpu_seconds[phase.name] = round(time.process_time() - cpu_started, 2)
        chain = stages[phase.name] = extend_chain(chain, phase, run.phase(phase.name).adapter)
        tell(f"{phase.name} {seconds[phase.name]:.0f} s")
    if len(chain) > 1:
        stages[ALONE.format(chain[-1].name)] = chain[-1:]

    started, cpu_started = time.monotonic(), time.process_time()
    asked = read_asked(config.evaluation, config.seed)
    questions = [(test, record) for test, records in asked.tests.items() for record in records]
    model = StageModel(base, stages, config.evaluation, seed=config.seed, shots=asked.shots, worked=asked.worked)
    predictions = model.answer([test for test, _ in questions], [record for _, record in questions])
    seconds["evaluation"] = round(time.monotonic() - started, 2)
    cpu_seconds["evaluation"] = round(time.process_time() - cpu_started, 2)
    stage_rows = [{key: row[key] for key in SCORE_KEYS} for row in summarise(predictions)]
    return {"stages": stage_rows, "seconds": seconds, "cpu_seconds": cpu_seconds}


def describe_machine() -> str:
    """The processor's name where Linux tells it, else its architecture; cores and memory."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {psutil.cpu_count()} cores (one thread used), {psutil.virtual_memory().total / 2**30:.0f} GiB"


def find(result: Result, stage: str, test: str) -> Result:
    """One stage's score on one test."""
    row: Result = next(row for row in result["stages"] if (row["stage"], row["test"]) == (stage, test))
    return row


def last_stages(result: Result) -> tuple[str, str | None]:
    """The name of the last stage, and of its last adapter alone where it was a stack."""
    names = list(dict.fromkeys(row["stage"] for row in result["stages"]))
    alone = names[-1] == ALONE.format(names[-2])
    return (names[-2], names[-1]) if alone else (names[-1], None)


def list_scores(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the big table: a row a seed, stage and test, a column a quantization."""
    quantizations = [q for q in QUANTIZATIONS if any(result["quantization"] == q for result in results)]
    rows = []
    for seed in sorted({result["seed"] for result in results}):
        of_seed = {result["quantization"]: result for result in results if result["seed"] == seed}
        for first in next(iter(of_seed.values()))["stages"]:
            row = [str(seed), first["stage"], first["test"], str(first["n"])]
            for quantization in quantizations:
                if quantization in of_seed:
                    score = find(of_seed[quantization], first["stage"], first["test"])
                    low, high = score["interval"]
                    row.append(f"{score['accuracy']:.1%} ({low:.1%} .. {high:.1%})")
                else:
                    row.append("")
            rows.append(row)
    return ["seed", "stage", "test", "n", *quantizations], rows


def list_seconds(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the times: a row a seed and quantization, a column a phase, CPU seconds in parentheses."""
    parts = list(results[0]["seconds"])
    rows = []
    for result in results:
        both = [(result["seconds"][part], result["cpu_seconds"][part]) for part in parts]
        phases = [sum(column) for column in zip(*both[:-1], strict=True)]
        shown = [f"{wall:.0f} ({cpu:.0f})" for wall, cpu in [*both[:-1], phases, both[-1]]]
        rows.append([str(result["seed"]), result["quantization"], *shown])
    return ["seed", "quantization", *parts[:-1], "all phases", parts[-1]], rows


def check(results: Sequence[Result]) -> Iterator[str]:
    """A line for each target: the worst value measured and whether it is met."""

    def say(what: str, value: float, met: bool) -> str:
        return f"{'met' if met else 'NOT MET'}: {what}: {value:.1%}"

    last, alone = last_stages(results[0])
    tests = list(dict.fromkeys(row["test"] for row in results[0]["stages"]))
    bases = [find(result, "base", test)["accuracy"] for result in results for test in tests]
    yield say(f"base at most {MOST_BASE:.0%} on both tests, highest", max(bases), max(bases) <= MOST_BASE)
    for test, least in (("asked", LEAST_ASKED), ("text-only", LEAST_TEXT_ONLY)):
        lowest = min(find(result, last, test)["accuracy"] for result in results)
        yield say(f"stage {last} at least {least:.0%} on {test}, lowest", lowest, lowest >= least)
    if alone:
        highest = max(find(result, alone, test)["accuracy"] for result in results for test in tests)
        yield say(
            f"{alone} at most {MOST_BASE:.0%} (chance is {results[0]['stages'][0]['chance']:.0%}), highest",
            highest,
            highest <= MOST_BASE,
        )
    plain = {result["seed"]: result for result in results if result["quantization"] == "none"}
    for quantization in QUANTIZATIONS[1:]:
        pairs = [(plain[r["seed"]], r) for r in results if r["quantization"] == quantization and r["seed"] in plain]
        for test in tests if pairs else ():
            lost = [find(a, last, test)["accuracy"] - find(b, last, test)["accuracy"] for a, b in pairs]
            each = ", ".join(f"{value:+.1%}" for value in lost)
            yield say(
                f"{quantization} loses at most {MOST_LOST:.0%} on {test} (by seed {each}), most",
                max(lost),
                max(lost) <= MOST_LOST,
            )


def write(path: Path, command: str, results: Sequence[Result]) -> None:
    """The results as JSON, and as Markdown for people."""
    write_json(path.with_suffix(".json"), {"results": results})
    scores, seconds = (_as_markdown(*table) for table in (list_scores(results), list_seconds(results)))
    made = list(dict.fromkeys((r["machine"], ", ".join(f"{k} {v}" for k, v in r["versions"].items())) for r in results))
    dates = sorted(result["date"] for result in results)
    settings = [f"`--set {setting}`" for setting in results[0]["overrides"]]
    lines = [
        "# The miniature's curriculum, measured",
        "",
        f"Written by `{command}`; measured {dates[0]} to {dates[-1]}.",
        *([f"With {' '.join(settings)}."] if settings else []),
        *(f"\n{machine}; {versions}." for machine, versions in made),
        "",
        "Accuracy of every stage with its 95 % Wilson interval. `asked`: facts that training asks, in new wordings and option",
        "orders. `text-only`: facts that only ever stood in plain text. `alone`: only the last adapter of the stack is active.",
        "",
        *scores,
        "",
        "## Targets",
        "",
        *(f"- {line}" for line in check(results)),
        "",
        "## Seconds",
        "",
        "Wall seconds, in parentheses CPU seconds; one thread, validation and checkpoints included, no Ray.",
        "",
        *seconds,
        "",
    ]
    write_bytes(path.with_suffix(".md"), "\n".join(lines).encode())


def _as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def show(results: Sequence[Result], console: Console) -> None:
    """The big table and the targets."""
    header, rows = list_scores(results)
    table = Table(*header)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*row, end_section=following is None or following[0] != row[0])
    console.print(table)
    for line in check(results):
        console.print(line, markup=False)


def main(argv: list[str] | None = None) -> int:
    """Measure what is asked for and not there yet; exit code 2 when something the user gave is wrong."""
    arguments = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    command = shlex.join(["python", "benchmarks/miniature.py", *(sys.argv[1:] if argv is None else argv)])
    stored: Mapping[str, Any] = read_json(arguments.output.with_suffix(".json")) or {"results": []}
    try:
        configs: dict[tuple[int, str], RunConfig] = {}
        for seed in {*arguments.seeds, *(result["seed"] for result in stored["results"])}:
            for quantization in QUANTIZATIONS:
                chosen = [f"seed={seed}", f"base.quantization={quantization}", *arguments.overrides]
                configs[seed, quantization] = load(arguments.config, chosen)
        identities = {key: identify(config) for key, config in configs.items()}
        results: dict[tuple[int, str], Result] = {}
        for result in stored["results"]:
            key = (result["seed"], result["quantization"])
            if result["identity"] == identities[key]:
                results[key] = result
        for key in [(seed, quantization) for seed in arguments.seeds for quantization in arguments.quantization]:
            if key in results and not arguments.again:
                continue
            label = f"seed {key[0]}, {key[1]}"
            console.print(f"{label}: begins", markup=False)
            with tempfile.TemporaryDirectory(prefix="medlora-") as folder:
                measured = measure(configs[key], Path(folder), lambda text: console.print(f"  {text}", markup=False))
            results[key] = {
                "seed": key[0],
                "quantization": key[1],
                "identity": identities[key],
                "overrides": arguments.overrides,
                "date": time.strftime("%Y-%m-%d %H:%M"),
                "machine": describe_machine(),
                "versions": {k: v for k, v in get_versions().items() if k not in ("medlora", "ray", "datasets")},
                "git_commit": get_git_commit(),
                **measured,
            }
            results = dict(sorted(results.items(), key=lambda item: (item[0][0], QUANTIZATIONS.index(item[0][1]))))
            write(arguments.output, command, list(results.values()))
        write(arguments.output, command, list(results.values()))
    except InputError as error:
        print(f"benchmarks/miniature.py: {error}", file=sys.stderr)
        return 2
    show(list(results.values()), console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
