"""Damage to our own files: bits that flip, JSON of the wrong type, lines of older versions."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import flips
import pytest

from medlora.errors import InputError
from medlora.runs.checksums import add_checksum, make_line, open_line, remove_checksum
from medlora.runs.files import append_json, read_json_lines, read_mapping, truncate_json_lines, write_bytes
from medlora.runs.folders import PhaseFolder, find_finished
from medlora.runs.manifests import MANIFEST, commit
from medlora.sweep.ledger import Ledger

KINDS = range(11)


@pytest.mark.parametrize("number", KINDS)
def test_a_flipped_bit_is_no_traceback_and_no_other_value(number: int, tmp_path: Path) -> None:
    logging.getLogger("medlora.run").setLevel(logging.CRITICAL)
    kind, path, read, is_right = flips.make_files(tmp_path / "files")[number]
    row = flips.flip_bits(kind, path, read, is_right, flips=60, seed=number)
    assert row.wrong == [] and row.right == 60


def test_every_bit_of_a_short_line_and_file_is_guarded() -> None:
    row = {"a": "간", "n": 1.5}
    line, text = make_line(row).encode(), json.dumps(add_checksum(row)).encode()
    for whole, read in ((line, open_line), (text, lambda content: remove_checksum(json.loads(content)))):
        for bit in range(8 * len(whole)):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            try:
                assert read(bytes(flipped)) in (None, row), bytes(flipped)
            except ValueError:
                continue
    assert open_line(line) == row and remove_checksum(json.loads(text)) == row


def test_valid_json_of_the_wrong_type_is_one_message(tmp_path: Path) -> None:
    assert flips.replace_types(tmp_path / "files").wrong == []
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(InputError, match=r"run.json: must hold a mapping, found list; bring the file back"):
        read_mapping(tmp_path / "run.json")


def test_lines_of_older_versions_are_read_and_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    old = '{"step": 1, "why": "abcd1234", "text": "a\\u2028b"}\n'
    path.write_text(old + '{"step": 2}\n{"step": 3', encoding="utf-8")
    truncate_json_lines(path, lambda row: True)
    append_json(path, {"step": 3, "text": "줄\u2028바꿈"})
    assert path.read_text(encoding="utf-8").startswith(old + '{"step": 2}\n{"step": 3')
    rows = read_json_lines(path)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2] == {"step": 3, "text": "줄\u2028바꿈"}


def test_a_damaged_line_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.jsonl"
    for step in range(3):
        append_json(path, {"step": step})
    path.write_text(path.read_text().replace('"step": 1', '"step": 7'))
    with caplog.at_level(logging.WARNING, "medlora.run"):
        assert [row["step"] for row in read_json_lines(path)] == [0, 2]
    assert f"{path}:2: this line is damaged" in caplog.text


def test_a_damaged_sweep_ledger_is_cut_there_set_aside_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    flips.write_trials(path)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join([*lines[:7], lines[7].replace("0.5", "0.9"), *lines[8:]]))
    ledger = Ledger(path)
    assert f"{path}:8: this line is damaged" in ledger.damage
    assert path.read_text() == "".join(lines[:7])
    assert "0.9" in (tmp_path / ".replaced" / "trials.jsonl-1").read_text()
    assert list(ledger.trials) == ["000", "001"] and ledger.trials["001"].reports == []
    assert ledger.begin({"lr": 9}).id == "002" and Ledger(path).damage == ""


def test_a_torn_finished_phase_resumes_from_its_checkpoints_or_is_refused(tmp_path: Path) -> None:
    phase = PhaseFolder(tmp_path / "00")
    write_bytes(phase.adapter / "w.bin", b"1")
    checkpoint = phase.checkpoints / "normal" / "checkpoint-4"
    write_bytes(checkpoint / "w.bin", b"1")
    commit(checkpoint, {"step": 4})
    assert find_finished(phase) == (None, "")
    about = {"seconds": {"all": 1.0, "base": 0.1}, "fingerprint": {}}
    manifest = commit(phase.root, about, exclude=(phase.checkpoints,))
    assert find_finished(phase) == (manifest, "")
    (phase.adapter / "w.bin").write_bytes(b"")
    assert find_finished(phase) == (None, "adapter/w.bin has changed")
    (phase.root / MANIFEST).write_text("{")
    assert find_finished(phase) == (None, "manifest.json is damaged")
    (checkpoint / "w.bin").write_bytes(b"")
    with pytest.raises(InputError, match="manifest.json is damaged since phase 00 was finished; .* --redo 00"):
        find_finished(phase)
