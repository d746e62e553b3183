"""Weighted, seeded interleaving: in which order a phase sees its examples."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One source of a mixture: how many examples it has, and its share of all draws.

    `share` None: in proportion to its size, so that one epoch shows every example once.
    """

    size: int
    share: float | None = None


def compute_shares(parts: Mapping[str, Part]) -> dict[str, float]:
    """Each part's share of the draws; they add up to 1.

    Parts with a share get it; the others split what is left by size. Where all have one they are scaled to 1.
    """
    given = sum(part.share for part in parts.values() if part.share is not None)
    free_size = sum(part.size for part in parts.values() if part.share is None)
    if not free_size:
        return {name: (part.share or 0) / given for name, part in parts.items()}
    if given >= 1:
        raise ValueError(f"shares add up to {given}; nothing is left for the parts without one")
    return {
        name: part.share if part.share is not None else (1 - given) * part.size / free_size
        for name, part in parts.items()
    }


def share_tokens(parts: Mapping[str, Part], mean_tokens: Mapping[str, float]) -> dict[str, Part]:
    """The parts with shares of draws such that their shares hold of tokens, given the mean tokens of an example of each."""
    filled = {name: part for name, part in parts.items() if part.size}
    wanted = compute_shares(
        {name: Part(round(part.size * mean_tokens[name]), part.share) for name, part in filled.items()}
    )
    draws = {name: share / mean_tokens[name] for name, share in wanted.items()}
    return {
        name: Part(part.size, draws[name] / sum(draws.values()) if name in draws else part.share)
        for name, part in parts.items()
    }


def interleave(parts: Mapping[str, Part], total: int, seed: int) -> list[tuple[str, int]]:
    """`total` draws of (part name, index in it), a function of the arguments alone.

    The next draw comes from the part that is furthest behind its share, so that shares hold in every stretch. Within a
    part every example is drawn once, in seeded order, before any is drawn again, in another order.
    """
    shares = compute_shares({name: part for name, part in parts.items() if part.size})
    drawn = dict.fromkeys(shares, 0)
    orders: dict[str, list[int]] = {name: [] for name in shares}
    draws = []
    for n in range(1, total + 1):
        name = max(shares, key=lambda name: shares[name] * n - drawn[name])
        if not orders[name]:
            orders[name] = list(range(parts[name].size))
            random.Random(f"{seed}/{name}/{drawn[name]}").shuffle(orders[name])
        draws.append((name, orders[name].pop()))
        drawn[name] += 1
    return draws
