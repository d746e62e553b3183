"""Real weights: a stage's merged model writes in plain transformers what the stage writes here.

Needs the environment variable MEDLORA_REAL_MODEL, a model's folder with safetensors (`make real-model`); skips without it.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.written import write_here, write_plainly
from medlora.curriculum.chains import Link
from medlora.drivers.export import Export, write_export
from tests.support.tiny_run import configure, run_all

PROMPTS = ["What is insulin?", "한국어로 번역:\nWash your hands.", "Name two causes of fever."]
WRITTEN = 16


def test_the_merged_model_writes_the_stage_s_text(real_model: str, data: Path, tmp_path: Path) -> None:
    config = configure(real_model, data, p00={"max_steps": 2}, p02={"max_steps": 2})
    base = config.base.model_copy(update={"extra_tokens": ()})
    first, _, last = config.phases
    phases = (
        first.model_copy(update={"train_extra_tokens": False}),
        last.model_copy(update={"validation": None}),
    )
    config = config.model_copy(update={"base": base, "phases": phases})
    run_all(config, tmp_path / "run", ("00", "02"))
    chain = [Link(name=name, folder=str(tmp_path / "run" / "phases" / name / "adapter")) for name in ("00", "02")]
    out = tmp_path / "out"
    out.mkdir()
    write_export(Export(base=base, chain=chain, kind="merged", dtype="float32"), out)
    before, after = write_here(base, chain, PROMPTS, WRITTEN)
    assert before != after
    assert write_plainly(out, PROMPTS, WRITTEN) == after
