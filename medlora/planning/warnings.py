"""What to beware of before a run: figures that would mislead, data that are left out, settings that cannot do their part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from medlora.config.run import RunConfig
from medlora.data.card import describe_overlap, read_card
from medlora.data.sources import scan
from medlora.planning.figures import PhasePlan, RunPlan
from medlora.runs.folders import RunFolder
from medlora.runs.object_store import is_store

_MANY_EPOCHS = 5

CARD_GIB = {
    **{
        "T4": 16,
        "L4": 24,
        "A10G": 24,
        "L40S": 48,
        "A100-40G": 40,
        "A100-80G": 80,
        "H100": 80,
        "H200": 141,
        "B200": 180,
    },
    **{"RTX-A6000": 48},
}
"""Memory of accelerators by Ray's names for them, as their maker says."""


def find_warnings(config: RunConfig, run: RunFolder, plan: RunPlan) -> Iterator[str]:
    """A sentence for each thing that the user may not want."""
    yield from _warn_of_evaluation(config)
    for phase, planned in zip(config.phases, plan.phases, strict=True):
        kinds = {scan(source).kind for source in phase.sources}
        if "mcq" in kinds and phase.validation is None and planned.is_left:
            yield f"phase {phase.name} has no validation: nothing says when it is good, or how good it was"
        yield from _warn_of_phase(planned, phase.max_tokens)
    card = read_card(run.data)
    if card is not None:
        yield from describe_overlap(card)
    if is_store(config.storage.folder):
        yield "the run is in a store: what is finished there was not looked at, only the copy on this machine"


def _warn_of_evaluation(config: RunConfig) -> Iterator[str]:
    evaluation = config.evaluation
    if evaluation is None:
        yield "there is no evaluation: the run trains and scores nothing"
        return
    if evaluation.scoring not in ("letter", "option_text"):
        return
    reasoning = [
        phase.name
        for phase in config.phases
        if any(source.style == "reasoning" and scan(source).rationale for source in phase.sources)
    ]
    if reasoning:
        yield (
            f"phase {', '.join(reasoning)} learns to reason before the answer, and evaluation.scoring is "
            f"{evaluation.scoring}, which asks for it at once: another task; `reason` scores the trained one"
        )


def _warn_of_phase(planned: PhasePlan, max_tokens: int) -> Iterator[str]:
    if planned.state == "changed":
        yield f"phase {planned.name} in the run's folder was made from something else; train will refuse it"
    for source in planned.sources:
        if source.too_long:
            yield (
                f"phase {planned.name}: {source.too_long:,} of {source.examples:,} examples of {source.source} are longer than "
                f"max_tokens {max_tokens} and left out"
            )
    if planned.epochs is not None and planned.epochs > _MANY_EPOCHS:
        yield f"phase {planned.name} sees its data {planned.epochs:g} times"


def find_memory_warnings(plan: RunPlan, accelerators: Iterable[str]) -> Iterator[str]:
    """A sentence for each phase whose worker is estimated to need more than the largest known card of a cluster has."""
    known = {name: CARD_GIB[name] for name in accelerators if name in CARD_GIB}
    if not known:
        return
    largest = max(known, key=lambda name: known[name])
    for phase in plan.phases:
        needed = sum((phase.memory_bytes or {}).values()) / 2**30
        if phase.is_left and needed > known[largest]:
            yield (
                f"phase {phase.name} is estimated to need {needed:.0f} GiB a worker, and the largest card of the cluster "
                f"({largest}) has {known[largest]}; training lowers batch_size if it must, a smaller base.quantization helps"
            )
