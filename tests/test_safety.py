"""What medlora refuses, and what it never writes down: tokens, names, pickles, code of others, markup, secrets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from medlora.config.loading.files import load, load_evaluate_config
from medlora.errors import InputError
from medlora.evaluation.plan import check_evaluation
from medlora.records import McqRecord
from medlora.reporting.report import build_report
from medlora.reporting.results.files import write_results
from medlora.runs.folders import RunFolder
from tests.support import ROOT
from tests.support.cluster import CANARIES, read_token
from tests.support.hostile import NAMES, XSS, Markup, write_pickle
from tests.support.predictions import TWO_TESTS

PATIENT = "-".join(("850101", "1234566"))
"""A resident registration number with the right checksum, of nobody; in one piece it stands in no file of the project,
whose working folder other tests upload to the cluster that is searched for it."""


@contextmanager
def refused_at_once(said: str, marker: Path | None = None) -> Iterator[None]:
    """What is inside is refused with `said`, in under a second, and nothing of it ran."""
    started = time.monotonic()
    with pytest.raises(InputError, match=said):
        yield
    assert time.monotonic() - started < 1
    assert marker is None or not marker.exists()


# ---- secrets --------------------------------------------------------------------------------------------------------


def find_text(folder: Path, texts: dict[str, str]) -> list[str]:
    """Which of the texts stand in which files below `folder`, in the bytes of whatever kind of file."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [f"{name} in {path}" for name, text in texts.items() if text.encode() in content]
    return found


def test_secrets_and_a_patient_s_number_are_found_nowhere(
    cluster: dict[str, str], bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    from tests.support.tiny_run import configure

    (tmp_path / "cache").mkdir()
    rows = (data / "text.jsonl").read_text(encoding="utf-8")
    row = json.dumps({"text": f"환자 {PATIENT} 은 아스피린 을 먹는다"}, ensure_ascii=False)
    (tmp_path / "patients.jsonl").write_text(rows + row + "\n", encoding="utf-8")
    phase = {"sources": [{"source": str(tmp_path / "patients.jsonl")}], "checkpoint_every_steps": 2, "max_steps": 4}
    config = configure(bases["gemma"], data, p00=phase).model_dump(mode="json")
    config["phases"] = config["phases"][:1]
    config["storage"]["cache"] = str(tmp_path / "cache")
    config["evaluation"] = {"tests": [{"name": "mcq", "source": str(data / "mcq.jsonl")}]}
    run = tmp_path / "run"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    job = [sys.executable, "jobs/curriculum.py", "--config", str(tmp_path / "c.yaml"), "--run-dir", str(run)]
    env = {**cluster, **CANARIES}

    stopped = subprocess.run(job, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert stopped.returncode == 2 and "patients.jsonl:41: resident number" in stopped.stderr, stopped.stderr
    submit = ["ray", "job", "submit", "--address", cluster["DASHBOARD"], "--"]
    # Checkpoints go when a phase is finished: they are looked at while they are there.
    seen: list[str] = []
    texts = {**CANARIES, "token": read_token(cluster), "patient": PATIENT, "patient's digits": PATIENT.replace("-", "")}
    command = [*submit, "env", "-C", str(ROOT), *job, "--set", "data.max_personal=1"]
    going = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    kept = tmp_path / "checkpoint"
    while going.poll() is None:
        for checkpoint in run.glob("phases/00/checkpoints/*/checkpoint-*/manifest.json"):
            if not kept.exists():
                shutil.copytree(checkpoint.parent, kept)
        time.sleep(0.05)
    out = going.stdout.read() if going.stdout else ""
    assert going.returncode == 0 and (run / "evaluation" / "report.html").is_file(), out
    assert (kept / "optimizer.pt").is_file()
    with urllib.request.urlopen(
        urllib.request.Request(
            f"{cluster['DASHBOARD']}/api/jobs/", headers={"Authorization": f"Bearer {read_token(cluster)}"}
        ),
        timeout=30,
    ) as response:
        metadata = response.read().decode()
    assert "jobs/curriculum.py" in metadata
    for what, text in (("stdout", out), ("stderr", stopped.stderr + stopped.stdout), ("metadata", metadata)):
        seen += [f"{name} in {what}" for name, secret in texts.items() if secret in text]
    for folder in (run, kept, Path(cluster["SESSION"])):
        seen += find_text(folder, texts)
    assert seen == []
    assert find_text(tmp_path, {"patient": PATIENT}) == [f"patient in {tmp_path / 'patients.jsonl'}"]


# ---- files of others ------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_a_pickle_is_refused_unread(finished: Path, tmp_path: Path) -> None:
    from medlora.artifacts.adapters import find_adapter

    folder, marker = tmp_path / "adapter", tmp_path / "ran"
    shutil.copytree(RunFolder(finished).phase("00").adapter, folder)
    (folder / "adapter_model.safetensors").unlink()
    write_pickle(folder / "adapter_model.bin", marker)
    with refused_at_once("adapter_model.bin is a pickle, which can run code on loading", marker):
        find_adapter(folder)
    # The same pickle under the right name is no safetensors file.
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    from medlora.model.adapter_files import read_tensors

    with refused_at_once("adapter_model.safetensors: cannot be read", marker):
        read_tensors(folder)


def test_a_base_that_is_a_pickle_or_brings_code_is_refused_unread(bases: dict[str, str], tmp_path: Path) -> None:
    from medlora.config.model import BaseModelConfig
    from medlora.model.base import load_base
    from medlora.model.tokenizer import load_tokenizer

    honest = BaseModelConfig(model=bases["gemma"])
    tokenizer = load_tokenizer(honest)
    load_base(honest, tokenizer)  # so that what is imported lazily is there
    marker = tmp_path / "ran"
    pickled = tmp_path / "pickled"
    shutil.copytree(bases["gemma"], pickled)
    (pickled / "model.safetensors").unlink()
    write_pickle(pickled / "pytorch_model.bin", marker)
    with refused_at_once("model.safetensors", marker):
        load_base(BaseModelConfig(model=str(pickled)), tokenizer)

    coded = tmp_path / "coded"
    shutil.copytree(bases["gemma"], coded)
    code = f"open({str(marker)!r}, 'w')\nclass Evil: pass\n"
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (coded / name).write_text(code)
    config = json.loads((coded / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
    }
    (coded / "config.json").write_text(json.dumps(config))
    with refused_at_once("it brings code of its own, which base.trust_remote_code", marker):
        load_base(BaseModelConfig(model=str(coded)), tokenizer)
    told = json.loads((coded / "tokenizer_config.json").read_text())
    told |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (coded / "tokenizer_config.json").write_text(json.dumps(told))
    with refused_at_once("it brings code of its own, which base.trust_remote_code", marker):
        load_tokenizer(BaseModelConfig(model=str(coded)))


class Killed(BaseException):
    """What a test raises in the middle of a phase."""


def test_a_poisoned_optimizer_is_never_opened(
    bases: dict[str, str], data: Path, finished: Path, tmp_path: Path
) -> None:
    from medlora.training.trainer import find_checkpoint
    from tests.support.tiny_run import configure, run_all, weights

    config = configure(bases["gemma"], data, p00={"log_every_steps": 1})

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        run_all(config, tmp_path / "run", ("00",), kill)
    checkpoints = RunFolder(tmp_path / "run").phase("00").checkpoints / "normal"
    marker = tmp_path / "ran"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        write_pickle(checkpoints / "checkpoint-4" / name, marker)
    started = time.monotonic()
    assert find_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    assert time.monotonic() - started < 1
    manifest = run_all(config, tmp_path / "run", ("00",))["00"]
    assert manifest["segments"][0]["resumed_from_step"] == 2 and not marker.exists()
    assert weights(tmp_path / "run", "00") == weights(finished, "00")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: !!python/object/apply:os.system ['touch {marker}']", "not valid YAML: could not determine a constr"),
        ("!!python/object/new:open ['{marker}', w]", "not valid YAML: could not determine a constructor"),
        ("name: !!python/name:os.system", "not valid YAML: could not determine a constructor"),
        (BOMB, "not valid YAML: its aliases expand to more than 100,000 values"),
        (f"{BOMB}name: *i", "its aliases expand to more than 100,000 values"),
        ("a: &a\n  <<: [*a]\n", "not valid YAML"),
        ("a: &a [*a]", "not valid YAML: it is nested too deeply, or an alias holds itself"),
    ],
)
@pytest.mark.parametrize("by", ["file", "set"])
def test_yaml_runs_nothing_and_does_not_explode(tmp_path: Path, text: str, said: str, by: str) -> None:
    marker = tmp_path / "ran"
    text = text.replace("{marker}", str(marker))
    path = tmp_path / "c.yaml"
    path.write_text(text if by == "file" else "name: x")
    with refused_at_once(said if by == "file" else "not valid YAML", marker):
        load(path, [] if by == "file" else [f"name={text}"])


def test_ordinary_aliases_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: &a {r: 4}\nb: {<<: *a, alpha: 8}\nc: [*a, *a]\n")
    from medlora.config.loading.files import load_raw

    assert load_raw(tmp_path / "c.yaml") == {"a": {"r": 4}, "b": {"r": 4, "alpha": 8}, "c": [{"r": 4}, {"r": 4}]}


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "phase", "test", "evaluation", "stage", "stage of a run", "redo"])
def test_hostile_names_are_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    assert len(NAMES) >= 40
    test = {"name": "t", "source": str(tmp_path / "rows.jsonl")}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Q?", "A": "a", "B": "b", "answer": 1}) + "\n")
    before = sorted(tmp_path.rglob("*"))
    phase = {"name": "00", "chain": "new", "sources": [{"source": test["source"]}]}
    run = {"name": "x", "base": {"model": "miniature"}, "phases": [phase], "evaluation": {"tests": [test]}}
    scored = {
        "name": "x",
        "base": {"model": "miniature"},
        "stages": [{"name": "base"}],
        "evaluation": {"tests": [test]},
    }
    path = tmp_path.with_suffix(".yaml")
    for name in NAMES:
        config: dict[str, Any] = {
            "run": {**run, "name": name},
            "phase": {**run, "phases": [{**phase, "name": name}]},
            "test": {**run, "evaluation": {"tests": [{**test, "name": name}]}},
            "evaluation": {**scored, "name": name},
            "stage": {**scored, "stages": [{"name": name}]},
            "stage of a run": {**scored, "stages": [f"{tmp_path}:{name}"]},
            "redo": run,
        }[kind]
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        with refused_at_once("name|stages"):
            if kind == "redo":
                RunFolder(tmp_path).phase(name)
            elif kind in ("evaluation", "stage", "stage of a run"):
                check_evaluation(load_evaluate_config(path), force=False)
            else:
                load(path)
    assert sorted(tmp_path.rglob("*")) == before


# ---- pages ----------------------------------------------------------------------------------------------------------


PAGES = ("report.html", "questions.html")


def write_hostile_pages(folder: Path, payload: str) -> dict[str, Markup]:
    """The pages of a report in which a payload stands wherever text comes from outside."""
    predictions = [
        replace(
            p,
            id=p.id + payload,
            stage=p.stage + payload,
            test=p.test + payload,
            subject=p.subject + payload,
            text=payload,
            error=payload if p.choice is None else "",
        )
        for p in TWO_TESTS
    ]
    options = tuple(f"{option} {payload}" for option in "가나다라")
    questions = {
        test + payload: [McqRecord(f"q{i}{payload}", payload, options, "ABCD"[i % 4], payload) for i in range(8)]
        for test in ("one", "two")
    }
    report = build_report(predictions, {"name": payload, "notes": [payload], "config": {payload: payload}}, seed=0)
    write_results(folder, report, predictions, questions)
    return {name: Markup((folder / name).read_text(encoding="utf-8")) for name in PAGES}


def read_beside_tables(page: Path) -> str:
    """The text of a page without its tables for papers, which write names as Markdown and LaTeX want them."""
    return Markup(re.sub(r'<pre id="copy-.*?</pre>', "", page.read_text(encoding="utf-8"), flags=re.S)).text


def test_markup_in_data_names_and_outputs_stays_text(tmp_path: Path) -> None:
    assert len(XSS) >= 50
    plain = write_hostile_pages(tmp_path, "harmless")
    known = r"#[a-z]+\d*|report\.html|questions\.html|figures/[a-z]+\.svg"
    for page in plain.values():
        assert not page.attributes & {"src", "onerror", "onload"}
        assert all(re.fullmatch(known, link or "") for link in page.links)
    usual = {name: read_beside_tables(tmp_path / name).count("harmless") for name in PAGES}
    for at in range(0, len(XSS), 10):
        payloads = XSS[at : at + 10]
        for name, page in write_hostile_pages(tmp_path, " ".join(payloads)).items():
            expected = plain[name]
            assert (page.tags, page.attributes, page.links) == (expected.tags, expected.attributes, expected.links), (
                payloads
            )
            assert (tmp_path / name).read_bytes().count(b"<script") == 1  # medlora's own, known by its hash
            text = read_beside_tables(tmp_path / name)
            for payload in payloads:
                # As often as the harmless word, but for what is shortened: nothing was swallowed or read as markup.
                assert text.count(payload) >= 0.9 * usual[name] > 50, (name, payload)
