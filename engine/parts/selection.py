"""Choosing single entries among many tensors by a score: the lowest, the highest or random ones, a given number of them, exactly.

Scores are non-negative fp32 tensors, made anew whenever they are read, so that nothing of the size of the model is ever put together:
the border is found by counting the upper and then the lower half of the bits (fp32 numbers that are not negative sort like their bits).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

Scores = Mapping[str, Callable[[], Tensor]]  # tensor name -> its scores, any shape
_HALF = 1 << 16


class Border(NamedTuple):
    """The score that separates: `below` entries lie under it, so the (below + 1)-th lowest has it."""

    score: float
    below: int


def kth_lowest(scores: Scores, k: int) -> Border:
    """The k-th lowest score (1 = the lowest) over all tensors together, and how many lie strictly below it."""
    high = torch.zeros(_HALF, dtype=torch.int64)
    for make in scores.values():
        high += torch.bincount(_bits(make()) >> 16, minlength=_HALF).cpu()
    bucket, before = _bin(high, k)
    low = torch.zeros(_HALF, dtype=torch.int64)
    for make in scores.values():
        bits = _bits(make())
        low += torch.bincount(bits[(bits >> 16) == bucket] & (_HALF - 1), minlength=_HALF).cpu()
    rest, under = _bin(low, k - before)
    value = torch.tensor([(bucket << 16) | rest], dtype=torch.int32).view(torch.float32)
    return Border(float(value), before + under)


def lowest(scores: Scores, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The flat places of the `count` lowest scores, exactly so many; among equal scores at the border the generator draws."""
    border = kth_lowest(scores, count)
    ties = {name: int((make() == border.score).sum()) for name, make in scores.items()}
    drawn = torch.zeros(sum(ties.values()), dtype=torch.bool)
    missing = count - border.below
    drawn[torch.randperm(len(drawn), generator=generator)[:missing]] = True
    places: dict[str, Tensor] = {}
    for (name, make), mine in zip(scores.items(), drawn.split(list(ties.values())), strict=True):
        flat = make().reshape(-1)
        chosen = flat < border.score
        chosen[flat == border.score] = mine.to(chosen.device)
        places[name] = chosen.nonzero().squeeze(1)
    return places


def highest(scores: Scores, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The flat places of the `count` highest scores: what is left when the lowest others are taken away."""
    sizes = {name: make().numel() for name, make in scores.items()}
    others = sum(sizes.values()) - count
    left = lowest(scores, others, generator) if others else {}
    return {name: complement(left[name], size) if others else torch.arange(size) for name, size in sizes.items()}


def complement(places: Tensor, size: int) -> Tensor:
    """The other flat places of a tensor, ascending."""
    mask = torch.ones(size, dtype=torch.bool, device=places.device)
    mask[places] = False
    return mask.nonzero().squeeze(1)


def magnitudes(weights: Mapping[str, Tensor]) -> Scores:
    """|w|, decided in fp32 whatever the weights are stored in."""

    def size(weight: Tensor) -> Tensor:
        return weight.detach().float().abs()

    return {name: partial(size, weight) for name, weight in weights.items()}


def lots(weights: Mapping[str, Tensor], generator: Callable[[str], torch.Generator]) -> Scores:
    """A random score for every entry; `generator(name)` must always be the same fresh one."""

    def draw(name: str, weight: Tensor) -> Tensor:
        return torch.rand(weight.shape, generator=generator(name)).to(weight.device)

    return {name: partial(draw, name, weight) for name, weight in weights.items()}


def _bits(scores: Tensor) -> Tensor:
    return scores.detach().float().contiguous().view(torch.int32).reshape(-1)


def _bin(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th item, and how many items lie in the bins before it."""
    reached = counts.cumsum(0)
    place = int(torch.searchsorted(reached, k))
    return place, int(reached[place - 1]) if place else 0
