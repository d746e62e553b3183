"""Write a stage of a run for other tools: one PEFT adapter, a whole model, or its chain of adapters.

medlora export runs/quickstart:02 out/                       one adapter for plain PEFT
medlora export runs/quickstart:02 out/ --as merged           a Hugging Face model for any engine
medlora export runs/quickstart:02 out/ --as peft-stack       the adapters of the chain, and how to load them
medlora export runs/quickstart:02 out/ --as merged --push OWNER/NAME
medlora export runs/quickstart:02 out/ --as merged --lm-eval tasks/   and the run's tests as tasks for the command lm_eval
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from medlora.config.loading.files import load
from medlora.config.model import BaseModelConfig
from medlora.config.run import RunConfig
from medlora.curriculum.chains import Link, find_chain
from medlora.errors import InputError
from medlora.evaluation.questions import Asked
from medlora.evaluation.stages import find_run
from medlora.runs import mirror
from medlora.runs.folders import RunFolder

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class Stage:
    """A finished stage of a run."""

    run: RunFolder
    config: RunConfig
    name: str
    chain: tuple[Link, ...]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", metavar="RUN:STAGE", help="a run's folder or URI and one of its phases")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--as", dest="kind", choices=("adapter", "merged", "peft-stack"), default="adapter")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; unset: the base's own, f32 for an adapter")
    parser.add_argument("--base", metavar="FOLDER", help="where the base is now, if not where the run's config says")
    parser.add_argument(
        "--plain-weights", action="store_true", help="merge an int8 or nf4 run into unquantized weights"
    )
    parser.add_argument("--force", action="store_true", help="join adapters that were made for different bases")
    parser.add_argument(
        "--lm-eval", type=Path, metavar="DIR", help="also write the run's tests as tasks of lm-evaluation-harness"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to the Hugging Face hub, private unless --public")
    parser.add_argument("--public", action="store_true", help="make the pushed repository public")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="a hub token; unset: HF_TOKEN or `hf auth login`"
    )
    arguments = parser.parse_args(argv)
    if arguments.dtype and arguments.kind == "peft-stack":
        raise InputError("--dtype: peft-stack copies the adapters as they are; remove it, or export with --as adapter")
    if arguments.plain_weights and arguments.kind != "merged":
        raise InputError("--plain-weights: only --as merged writes weights of the base; remove it")
    if arguments.lm_eval and arguments.kind != "merged":
        raise InputError("--lm-eval: lm_eval opens a whole model alone; add --as merged, or remove it")
    if (arguments.public or arguments.token_file) and not arguments.push:
        raise InputError("--public and --token-file go with --push OWNER/NAME; add it, or remove them")
    for folder in filter(None, (arguments.out, arguments.lm_eval)):
        if folder.exists():
            raise InputError(f"{folder}: is there already; name a new folder")
    return arguments


def find_stage(where: str) -> Stage:
    """The stage of RUN:STAGE; raises InputError when there is no such run or phase, or it is not finished."""
    folder, _, name = where.rpartition(":")
    if not folder or "/" in name:
        raise InputError(f"{where}: write RUN:STAGE, e.g. runs/quickstart:02")
    run = RunFolder(find_run(folder, None))
    mirror.pull(run.root, exclude=("checkpoints", "best", "scoring", ".replaced"))
    if not run.config.is_file():
        raise InputError(f"{folder}: is no run's folder (no config.yaml); name one, e.g. runs/quickstart:02")
    if name == "base":
        raise InputError(f"{where}: the base alone has no adapter, nothing to export; name a phase")
    chain = find_chain(run, name)
    for link in chain:
        if not Path(link.folder).is_dir():
            raise InputError(f"{link.folder}: phase {link.name} is not finished; train it first")
    return Stage(run, load(run.config), name, chain)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when everything is written; raises InputError for a stage or a folder that cannot be."""
    arguments = parse(argv)
    stage = find_stage(arguments.stage)
    if arguments.push:
        from medlora.reporting.hub.upload import check_target

        check_target(arguments.push, arguments.token_file)
    notes = write(stage, arguments)
    print(f"{arguments.kind}: {arguments.out} ({' + '.join(link.name for link in stage.chain)})")
    for note in notes:
        print(f"  {note}")
    if arguments.push:
        from medlora.reporting.hub.upload import upload

        print(f"pushed: {upload(arguments.out, arguments.push, arguments.public, arguments.token_file)}")
    return 0


def write(stage: Stage, arguments: argparse.Namespace) -> list[str]:
    """Write the export and its model card; returns what the user must know."""
    from medlora.curriculum.checks import find_stage_doubts
    from medlora.reporting.hub.card import CardFacts, build_card
    from medlora.runs.manifests import CARD
    from medlora.startup import importing

    with importing():
        from medlora.drivers.export import Export, making, write_export
        from medlora.drivers.lm_eval_tasks import read_tests
        from medlora.model.base import locate_base

    config, base = stage.config, stage.config.base
    if arguments.base:
        base = base.model_copy(update={"model": arguments.base, "revision": None})
    if (
        arguments.base
        and not arguments.force
        and (doubts := find_stage_doubts(base, config.seed, {stage.name: stage.chain}))
    ):
        raise InputError(f"--base {arguments.base}: {doubts[0]}; name the folder of the run's own base")
    asked = read_tests(config) if arguments.lm_eval else None
    with making(arguments.out) as folder:
        located = locate_base(base, str(config.storage.cache_folder), config.seed)
        notes = write_export(
            Export(
                base=located,
                chain=stage.chain,
                kind=arguments.kind,
                dtype=DTYPES.get(arguments.dtype),
                has_plain_weights=arguments.plain_weights,
                force=arguments.force,
            ),
            folder,
        )
        facts = CardFacts(stage.run, config, stage.name, stage.chain, arguments.kind, tuple(notes), arguments.push)
        (folder / CARD).write_text(build_card(facts), encoding="utf-8")
        if asked:
            notes.append(write_lm_eval(stage, located, asked, arguments, folder))
    return notes


def write_lm_eval(
    stage: Stage, base: BaseModelConfig, asked: Asked, arguments: argparse.Namespace, folder: Path
) -> str:
    """Write the tests as tasks for the model in `folder`, which is not in its place yet; returns how to ask them."""
    from medlora.drivers.export import making
    from medlora.drivers.lm_eval_tasks import write_tasks
    from medlora.model.tokenizer import load_base_tokenizer, load_stage_tokenizer

    out, tokenizer = arguments.lm_eval, load_stage_tokenizer(base, stage.chain)
    assert stage.config.evaluation is not None  # `read_tests` has refused what has none
    with making(out) as place:
        exported = load_base_tokenizer(base.model_copy(update={"model": str(folder), "revision": None}))
        tasks = write_tasks(asked, stage.config.evaluation.style, tokenizer, exported, place, out)
    return f"lm-eval: {tasks.questions:,} questions of {', '.join(tasks.names)}; ask them with\n  {tasks.write_command(arguments.out, out)}"
