"""The job that `ckpt-chaos run` (0.1.8, from PyPI) kills at file events: a tiny curriculum of one phase, without Ray.

python benchmarks/faults/ckpt_chaos_job.py PLACE               once: a tiny base, its data and config.yaml
python -m ckpt_chaos run --work WORK --max-points 22 --step-regex 'resumes from step (\\d+)' \\
    --result-file '{out}/phases/00/adapter/adapter_model.safetensors' \\
    -- python benchmarks/faults/ckpt_chaos_job.py PLACE {out}
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]

from bench import drive, make_config  # noqa: E402

from medlora.config.run import RunConfig  # noqa: E402


def main() -> None:
    """Make the place, or train in a folder."""
    place = Path(sys.argv[1]).resolve()
    if len(sys.argv) == 2:
        config = make_config(place)
        (place / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        return
    config = RunConfig.model_validate(yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8")))
    drive(config, Path(sys.argv[2]), lambda event: print(event.get("text", ""), flush=True))


if __name__ == "__main__":
    main()
