"""The command `medlora`: a map of its subcommands, each imported only when it is asked for."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module

from medlora import __version__

COMMANDS = {
    "init": "write a commented config to start from, with your data in it",
    "plan": "what a run will do: steps, memory, time, disk, without starting it",
    "train": "train a base through a curriculum of phases and score every stage",
    "evaluate": "score stages on multiple-choice tests",
    "sweep": "search hyperparameters, judged on dev",
    "inspect": "look at data sources before anything is trained on them",
    "compare": "compare evaluations, runs and files of other tools, question by question",
    "chat": "ask a stage or a base questions on the terminal",
    "export": "write a stage for other tools: one adapter, or a whole model",
    "schema": "print the JSON schema of a config, for editors",
}
_PLACES = {"init": "starting.init", "plan": "starting.plan", "chat": "using.chat"}
"""Where a command's module is, if not in a module of its own name."""


def describe_commands() -> str:
    """What `medlora --help` prints."""
    lines = [f"  medlora {name:<10}{text}" for name, text in COMMANDS.items()]
    usage = "usage: medlora COMMAND ...   (medlora COMMAND --help; medlora --version)"
    start = "Start with `medlora train`: without a config it trains the built-in miniature on this machine."
    return "\n".join([usage, "", *lines, "", start])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code; 2 for an unknown one."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help", "help"):
        print(describe_commands())
        return 0
    if given[0] == "--version":
        print(f"medlora {__version__}")
        return 0
    command, *rest = given
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"medlora: {command}: no such command; {hint}", file=sys.stderr)
        return 2
    from medlora.endings import run_job

    sys.argv[0] = f"medlora {command}"  # what argparse calls the program
    return run_job(partial(import_module(f"medlora.cli.{_PLACES.get(command, command)}").main, rest))
