"""Ask a stage of a run, or a bare base, questions on the terminal; each question is asked without the ones before it.

medlora chat runs/quickstart:02                    /stage 01 switches, /mcq takes a question with options, /quit ends
medlora chat miniature                             a base without adapters: a folder, a hub id or the miniature
echo "What is insulin?" | medlora chat miniature   lines of a pipe are questions
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from medlora.errors import InputError

if TYPE_CHECKING:
    from medlora.answering.chat import Chat
    from medlora.config.model import BaseModelConfig
    from medlora.curriculum.chains import Link

_HELP = "/stage NAME  another stage answers; /mcq  a question with its options, ended by an empty line; /quit"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", metavar="RUN:STAGE | BASE", help="a finished stage of a run, or a base model")
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="most tokens of an answer (default: 256)"
    )
    parser.add_argument("--quantization", choices=["none", "int8", "nf4"], help="of the base (default: as in the run)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 at /quit or the end of the input; raises InputError for a stage or a base that cannot be loaded."""
    arguments = parse(argv)
    if arguments.max_tokens < 1:
        raise InputError(f"--max-tokens {arguments.max_tokens}: must be 1 or more")
    base, stages, stage, cache, seed = _find(arguments.who)
    if arguments.quantization:
        base = base.model_copy(update={"quantization": arguments.quantization})
    from medlora.curriculum.checks import check_adapters
    from medlora.startup import importing

    check_adapters(base, stages)
    print("loading the base ...", file=sys.stderr)
    with importing():
        from medlora.answering.chat import Chat
        from medlora.model.base import locate_base
    chat = Chat(locate_base(base, cache, seed), stages, arguments.max_tokens)
    chat.switch(stage)
    print(f"stage {stage} of {', '.join(stages)}. {_HELP}", file=sys.stderr)
    talk(chat, _read_lines(chat))
    return 0


def _find(who: str) -> tuple[BaseModelConfig, Mapping[str, Sequence[Link]], str, str, int]:
    """The base, the stages that exist, the one that was asked for, the cache folder and the seed."""
    from medlora.artifacts.bases import check_base_files
    from medlora.config.model import BaseModelConfig
    from medlora.config.placement import find_cache_folder

    folder, colon, stage = who.rpartition(":")
    if not colon or "/" in stage or "\\" in stage:
        base = BaseModelConfig(model=who)
        check_base_files(base)
        return base, {"base": ()}, "base", str(find_cache_folder()), 0
    from medlora.config.loading.files import load
    from medlora.evaluation.stages import find_run, find_trained
    from medlora.runs import mirror
    from medlora.runs.folders import RunFolder

    run = RunFolder(find_run(folder, None))
    mirror.pull(run.root, exclude=("checkpoints", "best", "scoring", "evaluation", ".replaced"))
    if not run.config.is_file():
        raise InputError(f"{who}: {folder} is no run; write RUN:STAGE, e.g. runs/quickstart:02, or name a base")
    config = load(run.config)
    stages = find_trained(run, config)
    if stage not in stages:
        planned = stage in [phase.name for phase in config.phases]
        why = "is not finished; train it first" if planned else f"is no stage of it; there are {', '.join(stages)}"
        raise InputError(f"{who}: {stage} {why}")
    check_base_files(config.base)
    return config.base, stages, stage, str(config.storage.cache_folder), config.seed


def _read_lines(chat: Chat) -> Iterator[str]:
    """Lines of the terminal, behind a prompt that names the stage, or of a pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401 - line editing and history for input()

    while True:
        try:
            yield input(f"{chat.stage}> ")
        except EOFError:
            return


def talk(chat: Chat, lines: Iterator[str]) -> None:
    """Answer line by line until /quit or the end."""
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/stage":
            _switch(chat, rest.strip())
        elif command == "/mcq":
            _weigh(chat, lines, rest)
        elif command.startswith("/"):
            print(f"{command}: no such command. {_HELP}", file=sys.stderr)
        elif command:
            chat.ask(line.strip(), _write)
            print(flush=True)


def _switch(chat: Chat, stage: str) -> None:
    if stage not in chat.stages:
        print(f"/stage {stage}: there is no such stage; there are {', '.join(chat.stages)}", file=sys.stderr)
        return
    chat.switch(stage)
    print(f"stage {stage}", file=sys.stderr)


def _weigh(chat: Chat, lines: Iterator[str], first: str) -> None:
    """Read a question up to an empty line, and print the letters with their probabilities."""
    from medlora.data.rows.pasted import read_pasted
    from medlora.records import RecordError

    print("paste the question and its options, then an empty line", file=sys.stderr)
    pasted = [first] if first else []
    for line in lines:
        if not line.strip():
            break
        pasted.append(line)
    try:
        question = read_pasted("\n".join(pasted))
    except RecordError as error:
        print(f"/mcq: {error}", file=sys.stderr)
        return
    answer = chat.weigh(question)
    if answer.text.strip():
        print(answer.text.strip())
    for letter, option, probability in zip(question.letters, question.options, answer.probabilities, strict=True):
        mark = "*" if letter == answer.choice else " "
        print(f"{mark} {letter}  {probability:6.1%}  {option}", flush=True)


def _write(text: str) -> None:
    print(text, end="", flush=True)
