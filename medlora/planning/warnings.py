"""What to beware of before a run: figures that would mislead, data that are left out, settings that cannot do their part."""

from __future__ import annotations

from collections.abc import Iterator

from medlora.config.run import RunConfig
from medlora.data.card import describe_overlap, read_card
from medlora.data.sources import scan
from medlora.planning.figures import PhasePlan, RunPlan
from medlora.runs.folders import RunFolder
from medlora.runs.object_store import is_store

_MANY_EPOCHS = 5

_MOST_CUT = 0.25
"""Share of dev's answers that may be longer than what a stage may write."""


def find_warnings(config: RunConfig, run: RunFolder, plan: RunPlan) -> Iterator[str]:
    """A sentence for each thing that the user may not want."""
    yield from _warn_of_evaluation(config)
    for phase, planned in zip(config.phases, plan.phases, strict=True):
        kinds = {scan(source).kind for source in phase.sources}
        if "mcq" in kinds and phase.validation is None and planned.is_left:
            yield f"phase {phase.name} has no validation: nothing says when it is good, or how good it was"
        yield from _warn_of_phase(planned, phase.max_tokens)
        if phase.validation is not None and planned.is_left:
            yield from _warn_of_cut_answers(planned, phase.validation.max_tokens)
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


def _warn_of_cut_answers(planned: PhasePlan, max_tokens: int) -> Iterator[str]:
    for source, (cut, answers) in planned.cut_answers.items():
        if cut > _MOST_CUT * answers:
            yield (
                f"phase {planned.name}: {cut:,} of {answers:,} answers in {source} are longer than validation.max_tokens "
                f"{max_tokens}, so dev scores answers that were cut off"
            )
