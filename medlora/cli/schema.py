"""Print the JSON schema of a config: `# yaml-language-server: $schema=...` lets an editor complete and check it."""

from __future__ import annotations

import argparse
import json

from medlora.config.evaluation import EvaluateConfig
from medlora.config.loading.files import schema
from medlora.config.sweep import SweepConfig


def make_schema(config: str) -> dict[str, object]:
    """The schema of a `train`, `evaluate` or `sweep` config."""
    if config == "train":
        return schema()
    return (EvaluateConfig if config == "evaluate" else SweepConfig).model_json_schema()


def main(argv: list[str] | None = None) -> int:
    """Print the schema; exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default="train", choices=["train", "evaluate", "sweep"])
    arguments = parser.parse_args(argv)
    print(json.dumps(make_schema(arguments.config), indent=2, ensure_ascii=False))
    return 0
