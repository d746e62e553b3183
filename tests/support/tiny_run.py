"""The curriculum's three phases on tiny data and a tiny random base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medlora.config.run import RunConfig
from medlora.curriculum.chains import extend_chain
from medlora.curriculum.jobs import make_job
from medlora.runs.folders import RunFolder
from medlora.training.phase import run_phase

TERMS = ["아스피린", "인슐린", "aspirin", "insulin", "해열", "췌장"]


def question(i: int, **more: Any) -> dict[str, Any]:
    options = {letter: TERMS[(i + j) % 6] for j, letter in enumerate("ABCDE")}
    return {
        "id": f"q{i}",
        "question": f"{TERMS[i % 6]} 은 어디 에서 나온다 {i}?",
        **options,
        "answer": i % 5 + 1,
        **more,
    }


def write_data(folder: Path) -> Path:
    """text.jsonl, pairs.jsonl, mcq.jsonl (half of it with a rationale) and dev.jsonl."""
    rows = {
        "text": [{"text": f"{TERMS[i % 6]} 은 {TERMS[(i + 1) % 6]} 이다 {i}"} for i in range(40)],
        "pairs": [
            {"english": f"text about {TERMS[i % 6]} {i}", "korean": f"{TERMS[i % 6]} 이다 {i}"} for i in range(10)
        ],
        "mcq": [question(i, **({"rationale": f"{TERMS[i % 6]} 에서 나온다"} if i % 2 else {})) for i in range(24)],
        "dev": [question(i, rationale="췌장 이다") for i in range(100, 106)],
    }
    for name, part in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def configure(base: str, data: Path, **changes: Any) -> RunConfig:
    """The three phases of the curriculum on tiny data; `changes` by phase name, e.g. p02={...}."""
    common = {
        "max_tokens": 160,
        "batch_size": 4,
        "accumulation": 1,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "log_every_steps": 2,
    }
    common |= {"checkpoint_every_steps": 2, "optimizer": "adamw_torch", "max_grad_norm": 1.0}
    dev = {"sources": [{"source": str(data / "dev.jsonl")}], "sample": 4, "max_tokens": 8}
    phases = [
        {"name": "00", "chain": "new", "train_extra_tokens": True, "sources": [{"source": str(data / "text.jsonl")}]},
        {
            "name": "01",
            "chain": "continue",
            "sources": [
                {"source": str(data / "pairs.jsonl"), "weight": 0.7},
                {"source": str(data / "mcq.jsonl"), "weight": 0.3},
            ],
            "replay": [{"phase": "00", "share": 0.1}],
        },
        {"name": "02", "chain": "stack", "sources": [{"source": str(data / "mcq.jsonl")}], "validation": dev},
    ]
    lora = changes.pop("lora", {"r": 4, "alpha": 8, "dropout": 0.1})
    seed = changes.pop("seed", 0)
    phases = [{**common, **phase, **changes.get(f"p{phase['name']}", {})} for phase in phases]
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "seed": seed,
            "base": {"model": base, "extra_tokens": ["고혈압증", "당뇨병성"]},
            "lora": lora,
            "phases": phases,
            "data": {"overlap": "allow"},  # so few words make questions alike
            "storage": {"cache": str(data / "cache")},
        }
    )


def run_all(
    config: RunConfig, folder: Path, names: tuple[str, ...] = ("00", "01", "02"), report: Any = None
) -> dict[str, Any]:
    run, chain, manifests = RunFolder(folder), (), {}
    for phase in config.phases:
        if phase.name in names:
            manifests[phase.name] = run_phase(
                make_job(config, phase, chain), run.phase(phase.name), report or (lambda event: None)
            )
        chain = extend_chain(chain, phase, run.phase(phase.name).adapter)
    return manifests


def weights(folder: Path, phase: str) -> bytes:
    return (RunFolder(folder).phase(phase).adapter / "adapter_model.safetensors").read_bytes()
