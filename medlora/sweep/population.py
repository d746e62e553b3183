"""Population based training as trials that continue each other (arXiv 1711.09846): which continues which, with which
values.

Every trial is a generation of one member: a phase of its own that continues the adapter of the one before. So a schedule
of values is a curriculum of phases, which `best.yaml` can hold and a run can repeat.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from medlora.seeds import derive_seed
from medlora.sweep.ledger import START, Ledger, Trial
from medlora.sweep.space import Choice, Domain, is_shape

WAIT: Literal["wait"] = "wait"
"""Nothing can be proposed before a running trial has ended."""


_FACTORS = (0.8, 1.25)
"""What a number is multiplied with to explore."""


@dataclass(frozen=True)
class Proposal:
    """A trial to run: Optuna's trial if it is a suggestion, its values, and what the ledger records of its place."""

    asked: Any
    params: dict[str, Any]
    about: dict[str, Any]


@dataclass(frozen=True)
class Population:
    """`size` members that train `generations` times in turn; after each, a member of the worst quarter continues from
    one of the best quarter with changed values. What to do next follows from the ledger and the seed alone."""

    space: Mapping[str, Domain]
    size: int
    generations: int
    seed: int

    def propose(
        self, ledger: Ledger, suggest: Callable[[], tuple[object, dict[str, object]] | None]
    ) -> Proposal | Literal["wait"] | None:
        """The next trial; None when there are no more."""
        members = {
            member: [trial for trial in ledger.trials.values() if trial.about.get("member") == member]
            for member in range(self.size)
        }
        busy = any(trial.state == "running" for trial in ledger.trials.values() if trial.id != START)
        for member, own in sorted(members.items(), key=lambda each: (len(each[1]), each[0])):
            if len(own) == self.generations or (own and not own[-1].ended):
                continue
            if not own:
                if (found := suggest()) is None:
                    return None
                return Proposal(*found, {"member": member, "generation": 1, "parent": None})
            peers = [trials[len(own) - 1] for trials in members.values() if len(trials) >= len(own)]
            if proposal := self._continue_member(member, own, [peer for peer in peers if peer.state == "finished"]):
                return proposal
        return WAIT if busy else None

    def _continue_member(self, member: int, own: list[Trial], peers: list[Trial]) -> Proposal | None:
        """The member's next generation; None where it failed and there is none to continue from."""
        generation = len(own) + 1
        draw = random.Random(derive_seed(self.seed, "population", f"{member}-{generation}"))
        ranked = sorted(peers, key=lambda trial: (-(trial.score or 0.0), trial.id))
        cut = max(1, self.size // 4)
        behind = own[-1].state != "finished" or (len(ranked) > cut and own[-1] in ranked[-cut:])
        better = [trial for trial in ranked[:cut] if trial is not own[-1]]
        if not behind or (not better and own[-1].state == "finished"):
            parent, params = own[-1], dict(own[-1].params)
        elif better:
            parent = draw.choice(better)
            params = {key: self._explore(key, value, draw) for key, value in parent.params.items()}
        else:
            return None
        return Proposal(None, params, {"member": member, "generation": generation, "parent": parent.id})

    def _explore(self, key: str, value: Any, draw: random.Random) -> Any:
        domain = self.space[key]
        if is_shape(key):  # an adapter that is trained further cannot change its shape
            return value
        if isinstance(domain, Choice):
            place = domain.values.index(value) + draw.choice((-1, 1))
            return domain.values[min(len(domain.values) - 1, max(0, place))]
        moved = value * draw.choice(_FACTORS)
        return domain.round(min(domain.high, max(domain.low, moved)))


def find_lineage(ledger: Ledger, trial: Trial) -> list[Trial]:
    """The trials that a trial continues, oldest first, itself last."""
    lineage = [trial]
    while (parent := lineage[0].about.get("parent")) is not None:
        lineage.insert(0, ledger.trials[parent])
    return lineage


def name_generation(phase: str, generation: int) -> str:
    """The phase of a generation: `02`, `02-2`, `02-3` ..."""
    return phase if generation == 1 else f"{phase}-{generation}"


def make_schedule(raw: dict[str, Any], lineage: list[dict[str, Any]], phase: str, generations: int) -> dict[str, Any]:
    """A run config whose scored phase is split into generations; `lineage` are the configs with each one's values put
    in.

    The rate stays constant between changes, and warms up once.
    """
    made = dict(raw)
    place = next(i for i, each in enumerate(raw["phases"]) if each["name"] == phase)
    parts = []
    for i, config in enumerate(lineage):
        part = dict(config["phases"][place])
        steps = part["max_steps"]
        part |= {"name": name_generation(phase, i + 1), "schedule": "constant"}
        part["max_steps"] = steps * (i + 1) // generations - steps * i // generations
        if i:
            part |= {"chain": "continue", "lora": None, "full_prompt": None, "warmup_ratio": 0.0}
        parts.append(part)
    made["phases"] = [*lineage[0]["phases"][:place], *parts, *raw["phases"][place + 1 :]]
    return made
