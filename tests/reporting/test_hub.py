"""The model card holds what the run knows, the hub's own classes read it, and the upload reaches a hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from medlora.artifacts.adapter_origin import identify_adapter, read_origin
from medlora.config.run import RunConfig
from medlora.curriculum.chains import Link, extend_chain
from medlora.errors import InputError
from medlora.evaluation.predictions import Prediction
from medlora.reporting.hub.card import CardFacts, build_card, write_phase_cards
from medlora.reporting.hub.upload import check_target
from medlora.reporting.report import build_report
from medlora.runs.files import write_json
from medlora.runs.folders import RunFolder
from medlora.runs.manifests import CARD_MARK, check_files, hash_adapter, hash_files, read_manifest
from tests.support import ROOT
from tests.support.hub_server import serve_hub
from tests.support.tiny_run import configure

CARD = {
    "training": {
        "phases.00.sources.0": {
            "source": "/home/somebody/secret/text.jsonl",
            "licence": "CC-BY-4.0",
            "rows": 1200,
            "records": 1150,
        }
    },
    "held_out": {},
    "overlap": {"mode": "allow", "records": 3, "pairs": 3, "kinds": {}, "shown": []},
    "duplicates": {},
    "dropped": {},
    "personal": {"phone number": 2},
}


def answer(stage: str, i: int, right: bool) -> Prediction:
    return Prediction(
        stage=stage, test="doctor", id=f"q{i}", gold="A", choice="A" if right else "B", text="A", options=5
    )


def make_facts(tmp_path: Path, model: str = "google/gemma-3-1b-it", **changes: Any) -> CardFacts:
    phase = {"name": "00", "chain": "new", "sources": [{"source": "text.jsonl"}], "learning_rate": 2e-4}
    tests = {"tests": [{"name": "doctor", "source": "test.jsonl"}]}
    config = RunConfig.model_validate(
        {
            "name": "korean",
            "seed": 7,
            "base": {"model": model, "revision": "abc123", "quantization": "nf4"},
            "phases": [phase],
            "evaluation": tests,
        }
    )
    run = RunFolder(tmp_path / "run")
    adapter = run.phase("00").adapter
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    write_json(run.data, CARD)
    write_json(run.about, {"versions": {"medlora": "0.2.0", "torch": "2.13.0"}, "git_commit": "f00d"})
    predictions = [answer(stage, i, i < n) for stage, n in (("base", 40), ("00", 60)) for i in range(100)]
    run.evaluation.mkdir()
    write_json(run.evaluation / "report.json", build_report(predictions, {}, 0))
    fields = {"kind": "adapter", "notes": ("merged from nf4",), "repository": "lab/korean-doctor", **changes}
    return CardFacts(run, config, "00", (Link(name="00", folder=str(adapter)),), **fields)


def test_the_hubs_own_classes_read_the_card(tmp_path: Path) -> None:
    data = ModelCard(build_card(make_facts(tmp_path))).data
    (result,) = data.eval_results or ()
    assert (data.model_name, data.base_model, data.library_name) == ("korean-doctor", "google/gemma-3-1b-it", "peft")
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("doctor", "accuracy", 0.6)
    assert data.language == ["ko", "en"] and "medical" in data.tags


def test_the_card_says_what_the_run_knows(tmp_path: Path) -> None:
    text = build_card(make_facts(tmp_path))
    for known in (
        "revision `abc123`",
        "loaded as nf4",
        "| `text.jsonl` | CC-BY-4.0 | 1,200 | 1,150 |",
        "3 training records",
        "phone number 2",
        "| doctor | 100 | 60.0% | 50.2% to 69.1% | 40.0% |",
        "no medical device",
        "torch 2.13.0",
        "f00d",
        "Seed 7",
        "Note: merged from nf4.",
        'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("google/gemma-3-1b-it"), "lab/korean-doctor")',
    ):
        assert known in text, known
    assert "/home/somebody" not in text and str(tmp_path) not in text


def test_a_run_without_data_card_or_scores_has_a_card_too(tmp_path: Path) -> None:
    facts = make_facts(tmp_path)
    facts.run.data.unlink()
    (facts.run.evaluation / "report.json").unlink()
    text = build_card(facts)
    assert "not scored in its run" in text and ModelCard(text).data.eval_results is None


def test_a_folder_as_base_is_no_model_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "my base").mkdir()
    (tmp_path / "my base" / "config.json").write_text("{}")
    text = build_card(make_facts(tmp_path, model=str(tmp_path / "my base")))
    assert ModelCard(text).data.base_model is None and "Base: `my base`" in text and str(tmp_path) not in text


def test_a_card_counts_in_no_hash(tmp_path: Path) -> None:
    text = build_card(make_facts(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text(text)
    assert hash_files(tmp_path / "out") == {}
    assert text.encode().splitlines()[1].startswith(CARD_MARK)
    assert isinstance(yaml.safe_load(text.split("---\n")[1])["medlora"], dict)


def push(folder: Path, address: str, token: str, *more: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """An upload in a process of its own: the hub's library reads its settings when it is imported."""
    code = "import sys\nfrom pathlib import Path\nfrom medlora.endings import run_job\n"
    code += "from medlora.reporting.hub.upload import check_target, upload\n"
    code += "def job():\n    target = sys.argv[2], Path(sys.argv[3]) if len(sys.argv) > 3 else None\n"
    code += (
        "    check_target(*target)\n    print(upload(Path(sys.argv[1]), target[0], False, target[1]))\n    return 0\n"
    )
    code += "sys.exit(run_job(job))"
    env = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(folder.parent / "hf"), "HF_HUB_DISABLE_XET": "1", **environ}
    env |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", code, str(folder), "lab/model", *more]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_an_export_is_pushed_as_a_private_repository(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text(build_card(make_facts(tmp_path)))
    (out / "adapter_config.json").write_text("{}")
    (tmp_path / "token").write_text("hf_right\n")
    with serve_hub() as hub:
        done = push(out, hub.address, "", str(tmp_path / "token"))
        assert done.returncode == 0, done.stderr
        assert hub.created[0]["visibility"] == "private" and hub.created[0]["name"] == "model"
        assert set(hub.files) == {"README.md", "adapter_config.json"}
        assert hub.files["README.md"] == (out / "README.md").read_bytes()
        assert "hf_right" not in done.stdout + done.stderr
        refused = push(out, hub.address, "hf_wrong")
        hub.is_private, hub.files = False, {}
        public = push(out, hub.address, "hf_right")
        assert public.returncode == 2 and "is a public repository" in public.stderr and not hub.files
    assert refused.returncode == 2 and "the hub did not take it" in refused.stderr
    assert "hf_wrong" not in refused.stderr and "Traceback" not in refused.stderr
    gone = push(out, "http://127.0.0.1:9", "hf_right")
    assert gone.returncode == 2 and "the hub did not take it" in gone.stderr and "Traceback" not in gone.stderr


@pytest.mark.parametrize("name", ["model", "lab/", "lab/a b", "../lab", "lab/a/b"])
def test_a_wrong_name_is_refused_before_anything_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(InputError, match="write OWNER/NAME"):
        check_target(name, None)


def test_without_a_token_or_a_hub_nothing_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        check_target("lab/model", None)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(InputError, match="--token-file .*absent: cannot be read"):
        check_target("lab/model", tmp_path / "absent")
    (tmp_path / "token").write_text("two words")
    with pytest.raises(InputError, match="must hold one token"):
        check_target("lab/model", tmp_path / "token")


def test_finished_adapters_have_cards_that_change_no_hash(finished: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished, run.root)
    config = configure("base", tmp_path)
    stages: dict[str, tuple[Link, ...]] = {}
    chain: tuple[Link, ...] = ()
    for phase in config.phases:
        chain = stages[phase.name] = extend_chain(chain, phase, run.phase(phase.name).adapter)
    before = {name: identify_adapter(run.phase(name).adapter) for name in stages}
    (run.phase("00").adapter / "README.md").write_text("mine")
    write_phase_cards(run, config, stages)
    assert (run.phase("00").adapter / "README.md").read_text() == "mine"
    (run.phase("00").adapter / "README.md").unlink()
    assert run.phase("00").adapter / "README.md" not in write_phase_cards(run, config, stages, only_known=True)
    assert len(write_phase_cards(run, config, stages)) == 3
    for name in stages:
        folder = run.phase(name)
        manifest = read_manifest(folder.root)
        assert manifest and check_files(folder.root, manifest) is None
        assert hash_adapter(folder.adapter) == before[name]
        assert ModelCard.load(folder.adapter / "README.md").data.library_name == "peft"
        shutil.copytree(folder.adapter, tmp_path / name)
        copied, original = read_origin(tmp_path / name), read_origin(folder.adapter)
        assert copied and original and (copied.below, copied.base) == (original.below, original.base)
    text = (run.phase("02").adapter / "README.md").read_text()
    assert "**Not for use alone.** It was trained on top of `01`" in text and "exported with" not in text
    assert "| `00` | new | 40 | 6 |" in text and "| `02` | stack | 24 | 6 |" in text


def test_a_pipe_in_place_of_a_card_is_neither_opened_nor_replaced(finished: Path, tmp_path: Path) -> None:
    """Whoever opened the pipe would wait for ever: this test would not end."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished, run.root)
    adapter = run.phase("02").adapter
    before = hash_adapter(adapter)
    (adapter / "README.md").unlink()
    os.mkfifo(adapter / "README.md")
    config = configure("base", tmp_path)
    stages = {"02": (Link(name="02", folder=str(adapter)),)}
    assert write_phase_cards(run, config, stages) == [] and (adapter / "README.md").is_fifo()
    assert hash_adapter(adapter) == before and read_origin(adapter)
    shutil.move(adapter, tmp_path / "alone")
    assert read_origin(tmp_path / "alone") is None and hash_adapter(tmp_path / "alone") == before
