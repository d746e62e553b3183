"""Large sources are tokenised by Ray Data's tasks, to the same tokens as in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

CODE = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.support.tiny_run import configure
from medlora.curriculum.jobs import make_job
from medlora.on_ray.cluster import connect
from medlora.on_ray.tokenise import LEAST_RECORDS, prepare_on_ray
from medlora.training.phase import load_phase_tokenizer
from medlora.tokens.cache import plan_preparation, prepare
from medlora.model.base import locate_base

folder = Path({folder!r})
config = configure({base!r}, folder, p00={{"sources": [{{"source": str(folder / "large")}}]}})
config = config.model_copy(update={{"phases": config.phases[:1]}})
job = make_job(config, config.phases[0], ())
with connect() as cluster:
    for again in (1, 2):
        events = []
        prepare_on_ray(job, cluster, events.append)
        print(json.dumps(events, ensure_ascii=False))
tokenizer = load_phase_tokenizer(job, locate_base(job.base, job.cache, 0))
source = job.phase.sources[0]
ours = plan_preparation(source, source.style, tokenizer, Path(job.cache))
assert ours.done
parts = len(list(ours.folder.glob("part-*")))
alone = prepare(plan_preparation(source, source.style, tokenizer, folder / "alone"), tokenizer)
assert list(prepare(ours, tokenizer)) == list(alone)
print(parts, len(alone), LEAST_RECORDS)
"""


def test_ray_makes_the_tokens_that_one_process_makes_once(
    cluster: dict[str, str], bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    for path in data.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "large").mkdir()
    for name in ("a", "b"):
        rows = [{"text": f"{name} 은 췌장 이다 {i}" if i != 7 else ""} for i in range(3000)]
        rows[7]["text"] = "aspirin"
        (tmp_path / "large" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = CODE.format(tests=str(ROOT), folder=str(tmp_path), base=bases["gemma"])
    done = subprocess.run([sys.executable, "-c", code], env=cluster, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, last = [line for line in done.stdout.splitlines() if line]
    events = json.loads(first)
    assert "are made for the first time" in events[0]["text"] and "6,000 records in" in events[-1]["text"]
    assert [event["done"] for event in events if event["event"] == "preparing"][-1] == 6000
    assert json.loads(second) == []
    assert last == "6 6000 5000"
