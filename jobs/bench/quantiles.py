"""Quantiles with bootstrap intervals, for waiting times."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def interval(
    statistic: Callable[..., float], *samples: Sequence[float], draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic of one or several independent samples."""
    rng = random.Random(seed)
    found = sorted(statistic(*(rng.choices(sample, k=len(sample)) for sample in samples)) for _ in range(draws))
    return found[int(draws * 0.025)], found[int(draws * 0.975)]


def ratio_of_medians(top: Sequence[float], bottom: Sequence[float]) -> float:
    """How many times as long the one takes as the other."""
    return statistics.median(top) / statistics.median(bottom)
