"""Run the commands whose output the documents show, and write that output into them.

python benchmarks/readme.py                  run, print what the documents would show
python benchmarks/readme.py --write          the same, written into README.md, README.ko.md and docs/evaluation.md

A block that this script owns follows a line `<!-- benchmarks/readme.py: NAME -->`. The run goes to a folder of its own,
so that nothing of an earlier one is reused; the miniature base is built once a machine.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"quickstart": ("README.md", "README.ko.md"), "rotations": ("docs/evaluation.md",)}


def run(folder: Path, *arguments: str) -> str:
    """The table that `medlora` prints, and its verdict."""
    env = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, "-m", "medlora", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    table, end, rest = done.stdout[done.stdout.index("┏") :].partition("┘\n")
    return f"{table}{end}{rest.splitlines()[0]}"


def measure(folder: Path) -> dict[str, str]:
    """The quickstart, and its last two stages under every order of the options."""
    quickstart = run(folder, "train", "--set", f"storage.folder={folder}")
    stages = f'stages=["{folder}/quickstart:01,02"]'
    rotations = ["--set", "evaluation.rotations=true", "--set", stages, "--set", f"storage.folder={folder}/evaluations"]
    return {"quickstart": quickstart, "rotations": run(folder, "evaluate", *rotations)}


def place(text: str, name: str, shown: str) -> str:
    """A document with the block called `name` replaced; a command line at its top stays."""
    pattern = rf"(<!-- benchmarks/readme.py: {name} -->\n```text\n(?:\$ [^\n]*\n)?).*?(\n```)"
    replaced, count = re.subn(pattern, lambda found: found[1] + shown + found[2], text, flags=re.S)
    if count != 1:
        raise ValueError(f"{name}: {count} blocks in the document, expected one")
    return replaced


def main() -> int:
    """Print the blocks, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the blocks into the documents")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shown = measure(Path(folder))
    for name, text in shown.items():
        print(f"{name}\n{text}\n")
        if arguments.write:
            for document in (ROOT / path for path in PLACES[name]):
                document.write_text(place(document.read_text(encoding="utf-8"), name, text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
