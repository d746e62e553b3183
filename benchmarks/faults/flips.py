"""Random single bit flips in every ledger and JSON file of ours: no traceback, and no other value is ever taken.

    python benchmarks/faults/flips.py                2,000 flips of each kind of file, some minutes
    python benchmarks/faults/flips.py --flips 200

A ledger gives its rows, or fewer of them. A file gives its content, nothing (it is then written again), or one message.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import Row

from medlora.data.card import read_card
from medlora.errors import InputError
from medlora.evaluation.ledger import FINGERPRINT, REPORT, find_report, name_answer, pack_prediction, read_ledger
from medlora.evaluation.predictions import Prediction
from medlora.runs.environment import get_versions
from medlora.runs.files import (
    append_json,
    read_json_lines,
    read_mapping,
    truncate_json_lines,
    write_bytes,
    write_json,
    write_with_checksum,
)
from medlora.runs.folders import PhaseFolder, find_finished
from medlora.runs.manifests import MANIFEST, commit
from medlora.sweep.ledger import Ledger

NOTHING: tuple[Any, ...] = (None, "refused")
Read = Callable[[Path], Any]


def flip_bits(
    name: str, path: Path, read: Read, is_right: Callable[[Any, Any], bool], flips: int, seed: int = 0
) -> Row:
    """Flip one random bit of a file, `flips` times, each in the whole file; `is_right` compares what was read to the truth."""
    whole = path.read_bytes()
    wanted = read(path)
    drawn, row = random.Random(seed), Row(name)
    for _ in range(flips):
        place, bit = drawn.randrange(len(whole)), drawn.randrange(8)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        found: Any
        try:
            found = read(path)
        except InputError:
            found = "refused"
        except Exception as error:
            row.add(False, f"byte {place} bit {bit}: {error!r}")
            continue
        row.add(found in NOTHING or is_right(found, wanted), f"byte {place} bit {bit}: {str(found)[:200]}")
    path.write_bytes(whole)
    return row


def write_trials(path: Path) -> None:
    """A sweep's ledger: four trials, two scores each, one stopped."""
    ledger = Ledger(path)
    for i in range(4):
        trial = ledger.begin({"lr": 0.1 * i})
        ledger.run(trial.id)
        ledger.add_score(trial.id, 4, 0.5, False)
        ledger.add_score(trial.id, 8, 0.6, i == 1)
        if i != 1:
            ledger.end(trial.id, "finished")


def read_trials(path: Path) -> dict[str, Any]:
    """Every trial's events in order, of the rows that were taken."""
    ledger = Ledger(path)
    return {id: (trial.params, trial.reports, trial.state) for id, trial in ledger.trials.items()}


def are_fewer_trials(found: Any, wanted: Any) -> bool:
    """Whether the trials are those of the truth, cut at some line: the last one may still run."""
    for id, (params, reports, state) in found.items():
        if id not in wanted or params != wanted[id][0] or reports != wanted[id][1][: len(reports)]:
            return False
        if state not in ("running", wanted[id][2]):
            return False
    return list(found) == list(wanted)[: len(found)]


def write_answers(path: Path) -> None:
    """An evaluation's ledger: six batches of two questions and two stages."""
    for k in range(6):
        rows = [
            Prediction(f"q{2 * k + j}", "t", stage, "A", "B", "내과", (0.1, 0.5, 0.4), margin=0.1, options=3)
            for stage in ("a", "b")
            for j in range(2)
        ]
        append_json(path, {"predictions": [pack_prediction(row) for row in rows]})


def read_answers(path: Path) -> dict[Any, Any]:
    """What an evaluation that goes on knows."""
    truncate_json_lines(path, lambda line: True)
    return {name_answer(answer): answer for answer in read_ledger(path, ["a", "b"])}


def read_steps(path: Path) -> dict[int, Any]:
    """A phase's rows by their steps."""
    return {row["step"]: row for row in read_json_lines(path, keys=("segment", "step"))}


def is_subset(found: Any, wanted: Any) -> bool:
    """Whether every value that was read is the true one."""
    return all(key in wanted and wanted[key] == value for key, value in found.items())


def make_files(folder: Path) -> list[tuple[str, Path, Read, Callable[[Any, Any], bool]]]:
    """Each kind of file of ours, how it is read, and how what was read is judged."""
    folder.mkdir(parents=True)
    write_trials(folder / "trials.jsonl")
    write_answers(folder / "ledger.jsonl")
    for step in range(1, 9):
        row = {"segment": "normal", "step": step, "loss": 1 / step, "learning_rate": 1e-4, "grad_norm": 0.5}
        append_json(folder / "metrics.jsonl", row)
    write_with_checksum(folder / "run.json", {"name": "x", "seed": 3, "versions": get_versions()})
    parts = {"training": {"a": {"rows": 3}}, "held_out": {}, "overlap": {"records": 0}, "duplicates": {}}
    write_with_checksum(folder / "data.json", {**parts, "dropped": {}, "personal": {}, "made_from": "x" * 64})
    phase = PhaseFolder(folder / "phases" / "00")
    write_bytes(phase.adapter / "w.bin", b"weights")
    write_with_checksum(phase.fingerprint, {"seed": 1, "data": {"a": "y" * 64}})
    commit(phase.root, {"seconds": {"all": 1.0, "base": 0.5}, "adapter_hash": "z" * 64, "fingerprint": {"seed": 1}})
    scored = folder / "evaluation"
    write_json(scored / REPORT, {"stages": [{"stage": "a", "accuracy": 0.5}], "n": 10})
    write_with_checksum(scored / FINGERPRINT, {"seed": 1})
    commit(scored, {"fingerprint": {"seed": 1}})

    def read_phase(_: Path) -> Any:
        return find_finished(phase)[0]

    def read_report(_: Path) -> Any:
        return find_report(scored, {"seed": 1})

    def same(found: Any, wanted: Any) -> bool:
        return bool(found == wanted)

    return [
        ("trials ledger", folder / "trials.jsonl", read_trials, are_fewer_trials),
        ("evaluation ledger", folder / "ledger.jsonl", read_answers, is_subset),
        ("metrics and validation lines", folder / "metrics.jsonl", read_steps, is_subset),
        ("run.json", folder / "run.json", read_mapping, same),
        ("data.json", folder / "data.json", read_card, same),
        ("fingerprint.json", phase.fingerprint, read_mapping, same),
        ("fingerprint.json of a finished phase", phase.fingerprint, read_phase, same),
        ("manifest.json of a phase", phase.root / MANIFEST, read_phase, same),
        ("adapter of a phase", phase.adapter / "w.bin", read_phase, same),
        ("report.json", scored / REPORT, read_report, same),
        ("manifest.json of an evaluation", scored / MANIFEST, read_report, same),
    ]


WRONG_TYPES = ("[]", "3", '"x"', "null", "true", "[{}]", "{}")


def replace_types(folder: Path) -> Row:
    """Valid JSON of another type in place of every file: the same promise."""
    row = Row("valid JSON of the wrong type")
    for name, path, read, _ in make_files(folder):
        whole = path.read_bytes()
        for content in WRONG_TYPES if path.suffix == ".json" else ():
            path.write_text(content)
            try:
                found = read(path)
                right = found is None or found == json.loads(content)
            except InputError:
                found, right = "refused", True
            except Exception as error:
                found, right = repr(error), False
            row.add(right, f"{name}: {content}: {found}")
        path.write_bytes(whole)
    return row


def main() -> None:
    """Print a table row for each kind of file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=2000)
    flips = parser.parse_args().flips
    logging.getLogger("medlora.run").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        for kind, path, read, is_right in make_files(Path(name) / "a"):
            flip_bits(f"bit flips: {kind}", path, read, is_right, flips).show()
        replace_types(Path(name) / "b").show()


if __name__ == "__main__":
    main()
