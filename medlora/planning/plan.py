"""The plan of a run: what each phase learns from, what is reused, sizes, memory, time, disk, and what to beware of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medlora.artifacts.bases import find_base_folder, identify_base, read_extra_tokens
from medlora.config.phase import PhaseConfig
from medlora.config.run import RunConfig
from medlora.curriculum.chains import Link, extend_chain, start_chain
from medlora.curriculum.jobs import find_obstacle, make_job
from medlora.data.card import find_dropped
from medlora.data.sources import scan
from medlora.miniature import fingerprint, settings
from medlora.planning.figures import PhasePlan, RunPlan
from medlora.planning.lengths import FileTokenizer, Measuring, SourceLengths, open_tokenizer
from medlora.planning.memory import Longest, choose_pass, estimate_memory, find_card_gib, name_stored
from medlora.planning.rates import Rate, choose_rate, find_evaluation_s, find_rates
from medlora.planning.sizes import BaseShape, count_adapter, count_lora, count_rows, read_shape
from medlora.planning.warnings import find_warnings
from medlora.runs.folders import PhaseFolder, RunFolder, find_finished
from medlora.runs.manifests import MANIFEST
from medlora.runs.object_store import is_store
from medlora.seeds import derive_seed
from medlora.tokens.mixture import Part, compute_shares, share_tokens

CHECKPOINTS = 2
"""So many checkpoints of an unfinished phase are on disk."""


@dataclass(frozen=True)
class _Base:
    """What is known of the base before it is loaded."""

    shape: BaseShape | None
    tokenizer: FileTokenizer | None
    is_miniature: bool
    new_words: int
    files: str
    rates: list[Rate]


def make_plan(config: RunConfig, run: RunFolder, device: str) -> RunPlan:
    """The plan of a run whose inputs were checked; nothing is written, and neither torch nor Ray is imported."""
    base, dropped = _look_at_base(config), find_dropped(config)
    phases: list[PhasePlan] = []
    chain = start_chain(config)
    sizes = {link.name: count_adapter(Path(link.folder)) for link in chain}
    for phase in config.phases:
        folder = run.phase(phase.name)
        below = chain
        chain = extend_chain(chain, phase, folder.adapter)
        state = _find_state(config, phase, below, folder, [each.state for each in phases])
        trainable = _count_trainable(config, phase, base, sizes, below)
        if trainable is not None:
            sizes[phase.name] = trainable
        seed = derive_seed(config.seed, "phase", phase.name)
        measuring = Measuring(phase, seed, base.tokenizer, base.is_miniature, dropped, config.storage.cache_folder)
        made = _plan_phase(config, phase, measuring, base.rates)
        made = replace(made, state=state, chain=tuple(link.name for link in chain), trainable=trainable)
        frozen = sum(sizes.get(link.name, 0) for link in chain[:-1])
        phases.append(_add_sizes(made, config, phase, base.shape, frozen, device))
    return _finish(config, run, base, device, phases, sum(map(len, dropped.values())))


def _look_at_base(config: RunConfig) -> _Base:
    is_miniature = config.base.model == "miniature"
    folder = find_base_folder(config.base)
    if is_miniature:
        built = config.storage.cache_folder / f"miniature-{config.seed}-{fingerprint()}"
        folder = built if built.is_dir() else None
    words = read_extra_tokens(config.base)
    tokenizer = open_tokenizer(folder, words if any(phase.train_extra_tokens for phase in config.phases) else ())
    files = identify_base(config.base)
    rates = (
        []
        if is_store(config.storage.folder)
        else find_rates(Path(config.storage.folder), files, config.base.quantization)
    )
    shape = read_shape(folder, settings.SHAPE, settings.VOCABULARY)
    new_words = len(tokenizer.new_words) if tokenizer else len(words)
    return _Base(shape, tokenizer, is_miniature, new_words, files, rates)


def _find_state(
    config: RunConfig, phase: PhaseConfig, below: Sequence[Link], folder: PhaseFolder, before: Sequence[str]
) -> str:
    """Whether the phase is finished and reused, resumes, was made from something else, or is new."""
    if not folder.root.is_dir():
        return "new"
    is_known = all(state == "finished" for state in before)
    job = make_job(config, phase, below if is_known else ())
    if find_obstacle(job, folder, with_parent=is_known):
        return "changed"
    if is_known and (folder.root / MANIFEST).is_file() and find_finished(folder)[0] is not None:
        return "finished"
    return "resumes" if any(folder.checkpoints.glob(f"*/checkpoint-*/{MANIFEST}")) else "new"


def _count_trainable(
    config: RunConfig, phase: PhaseConfig, base: _Base, sizes: dict[str, int], below: Sequence[Link]
) -> int | None:
    """Parameters of the adapter that the phase trains; None where the base's shape is not known."""
    if phase.chain == "continue":
        return sizes.get(below[-1].name)
    if base.shape is None or not base.shape.choose((phase.lora or config.lora).targets):
        return None
    rows = count_rows(base.shape, base.new_words) if phase.train_extra_tokens and phase.chain == "new" else 0
    return count_lora(base.shape, phase.lora or config.lora) + rows


def _plan_phase(config: RunConfig, phase: PhaseConfig, measuring: Measuring, rates: list[Rate]) -> PhasePlan:
    """Sources, steps, tokens and time of a phase."""
    own = [measuring.measure(f"{i}:{source.source}", source) for i, source in enumerate(phase.sources)]
    replayed = [
        (
            replay.share,
            [measuring.measure(f"{replay.phase}.{i}:{source.source}", source) for i, source in enumerate(sources)],
        )
        for replay in phase.replay
        for sources in [config.phase(replay.phase).sources]
    ]
    sources = [*own, *(each for _, group in replayed for each in group)]
    placement = phase.placement or config.placement
    batch = phase.count_batch(placement.workers)
    is_known = all(each.rows is not None for each in sources)
    rows = sum(each.rows or 0 for each in sources) if is_known else None
    steps = phase.max_steps
    if steps is None and rows is not None:
        steps = max(1, round(phase.epochs * rows / batch + 0.499))
    full = phase.full_prompt.max_steps if phase.full_prompt else 0
    tokens = None
    if steps is not None and is_known and rows:
        tokens = round((steps + full) * batch * _mean_tokens(config, phase, own, replayed))
    rate = choose_rate(rates, phase.name)
    return PhasePlan(
        name=phase.name,
        state="new",
        chain=(),
        sources=tuple(sources),
        rows=rows,
        global_batch=batch,
        steps=steps,
        full_prompt_steps=full,
        epochs=round(steps * batch / rows, 2) if steps and rows else None,
        tokens=tokens,
        trainable=None,
        memory_bytes=None,
        pass_rows=None,
        workers=placement.workers,
        adapter_bytes=None,
        checkpoint_bytes=None,
        seconds=round(tokens / rate.tokens_per_s, 1) if tokens is not None and rate else None,
        rate=rate.basis if rate else "not measured yet",
        cut_answers=measuring.count_cut_answers(),
    )


def _mean_tokens(
    config: RunConfig,
    phase: PhaseConfig,
    own: Sequence[SourceLengths],
    replayed: Sequence[tuple[float, Sequence[SourceLengths]]],
) -> float:
    """Tokens of a row, averaged over the mixture as it is drawn."""
    left, weights = (
        1 - sum(replay.share for replay in phase.replay),
        sum(source.weight or 0 for source in phase.sources),
    )
    parts, means = dict[str, Part](), dict[str, float]()
    for i, (source, lengths) in enumerate(zip(phase.sources, own, strict=True)):
        parts[f"own {i}"] = Part(lengths.rows or 0, left * source.weight / weights if source.weight else None)
        means[f"own {i}"] = lengths.mean_tokens
    for replay, (share, group) in zip(phase.replay, replayed, strict=True):
        sources = config.phase(replay.phase).sources
        sizes = [source.weight or lengths.records for source, lengths in zip(sources, group, strict=True)]
        for i, lengths in enumerate(group):
            parts[f"{replay.phase} {i}"] = Part(lengths.rows or 0, share * sizes[i] / sum(sizes))
            means[f"{replay.phase} {i}"] = lengths.mean_tokens
    if phase.weights == "tokens":
        parts = share_tokens(parts, means)
    shares = compute_shares({name: part for name, part in parts.items() if part.size})
    return sum(share * means[name] for name, share in shares.items())


def _add_sizes(
    made: PhasePlan, config: RunConfig, phase: PhaseConfig, shape: BaseShape | None, frozen: int, device: str
) -> PhasePlan:
    """The phase's plan with memory and disk, where the base's shape is known."""
    if shape is None or made.trainable is None:
        return made
    most = phase.max_tokens
    longest = Longest(
        max((each.longest or most for each in made.sources), default=most),
        max((each.longest_document or most for each in made.sources), default=most),
    )
    placement, lora = phase.placement or config.placement, phase.lora or config.lora
    kind, settled = name_stored(config.base), phase.settle(placement.workers)
    if device == "cuda":
        card = find_card_gib(placement)
        settled = choose_pass(shape, settled, kind, lora, (made.trainable, frozen), longest, card)
    memory = estimate_memory(shape, settled, kind, lora, made.trainable, frozen, longest, device)
    adapter = 4 * made.trainable
    return replace(
        made,
        memory_bytes=memory,
        pass_rows=settled.batch_size,
        adapter_bytes=adapter,
        checkpoint_bytes=CHECKPOINTS * (adapter + memory["optimiser"]),
    )


def _finish(
    config: RunConfig, run: RunFolder, base: _Base, device: str, phases: Sequence[PhasePlan], dropped: int
) -> RunPlan:

    evaluation, shape = config.evaluation, base.shape
    questions = {test.name: scan(test).records for test in evaluation.tests} if evaluation else {}
    stages = 1 + bool(config.start) + len(phases)
    times = 1
    if evaluation:
        options = max((n for test in evaluation.tests for n in scan(test).options), default=1)
        times = evaluation.samples * (options if evaluation.rotations else 1)
    asked, evaluation_s = sum(questions.values()) * stages * times, None
    if evaluation and not is_store(config.storage.folder):
        evaluation_s = find_evaluation_s(
            Path(config.storage.folder), base.files, sum(questions.values()) * stages, evaluation
        )
    made = RunPlan(
        name=config.name,
        place=str(run.root),
        base=config.base.model,
        parameters=shape.parameters if shape else None,
        quantization=config.base.quantization,
        shape_basis=shape.basis if shape else "unknown: neither headers nor config.json say it",
        device=device,
        phases=tuple(phases),
        stages=stages,
        questions=questions,
        scoring=evaluation.scoring if evaluation else "",
        asked=asked,
        left_out_records=dropped,
        evaluation_s=evaluation_s,
    )
    return replace(made, warnings=tuple(find_warnings(config, run, made)))
