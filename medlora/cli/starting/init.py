"""Write a commented config to start from: a shipped one, or one for a family of bases.

medlora init                                       the quickstart, to quickstart.yaml
medlora init qwen my.yaml --data data/             with the sources that are recognised in data/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from medlora.cli.common import find_config
from medlora.errors import InputError

_KINDS = ("quickstart", "medgemma-4b", "medgemma-27b", "gemma", "qwen", "llama", "exaone", "evaluate", "sweep")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", default="quickstart", metavar="KIND", help=f"one of {', '.join(_KINDS)}")
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="a new file (default: KIND.yaml)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="fill in the sources that are recognised in this folder"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the config is written; raises InputError for a file that exists or data that cannot be used."""
    arguments = parse(argv)
    kind, out = arguments.kind, arguments.out or Path(f"{arguments.kind}.yaml")
    if kind not in _KINDS:
        raise InputError(f"{kind}: there is no such config to start from; there are {', '.join(_KINDS)}")
    if kind == "sweep" and arguments.data:
        raise InputError("--data: a sweep takes its data from the run config that its key `config` names")
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: exists already and is left as it is; name a new file")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.parent}; make it first")
    from medlora.planning.starting.starter import SHIPPED, fill_family

    text = find_config(f"{kind if kind in SHIPPED else 'family'}.yaml").read_text(encoding="utf-8")
    if kind not in SHIPPED:
        text = fill_family(text, kind)
    lines = list[str]()
    if arguments.data:
        text, lines = _fill(text, kind, arguments.data)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    for line in lines:
        print(line)
    command = "evaluate" if kind == "evaluate" else "sweep" if kind == "sweep" else "plan"
    print(f"config: {out}\nnext: medlora {command} --config {out}")
    return 0


def _fill(text: str, kind: str, folder: Path) -> tuple[str, list[str]]:
    """The config with the folder's data, and what to print about it."""
    from medlora.planning.starting.recognise import recognise
    from medlora.planning.starting.starter import fill_data, fill_tests

    data = recognise(folder)
    text, notes = (fill_tests if kind == "evaluate" else fill_data)(text, data)
    unused = data.left_out
    used = [file for file in data.files if file.source not in unused]
    lines = [
        f"{file.source}: {file.records:,} records of {file.kind}, as {file.split}"
        for file in used
        if file.source in text
    ]
    lines += [
        f"left out: {file.source}: an evaluation asks test questions alone" for file in used if file.source not in text
    ]
    lines += [f"left out: {source}: {reason}" for source, reason in unused.items()]
    return text, [*lines, *(f"note: {note}" for note in notes)]
