"""By what a randomly thinned change is divided: between 1 - p (right on average, noisy) and 1 (little noise, too small)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_STEP = 0.001
_ENOUGH = 0.8  # share of rows that have found their best divisor


def optimal_divisors(contributions: Tensor, drop: float) -> Tensor:
    """The divisor of each row with the least squared error of the row's output: [rows].

    contributions: c_ij = delta_ij * mean input_j [rows, columns]. With S1 = sum_j c and S2 = sum_j c^2 the error of divisor q is
    ((1-p)/q - 1)^2 S1^2 + p(1-p)/q^2 S2, bias and variance; it is least at q = (1-p) + p S2 / S1^2.
    """
    c = contributions.double()
    total, squares = c.sum(1), c.square().sum(1)
    best = (1 - drop) + drop * squares / total.square().clamp(min=1e-300)
    best = torch.where(squares == 0, 1 - drop, best)  # a row without any change
    return best.clamp(1 - drop, 1.0).float()


def bound_divisors(contributions: Tensor, drop: float, *, eta: float, confidence: float) -> Tensor:
    """The divisor of each row by the paper's analytic bound (its Algorithm 5): [rows].

    All rows walk up from 1 - p in steps of 0.001 and stop where their bound rises; when 80 % have stopped, the others stay where they are.
    """
    c = contributions.double()
    total, squares = c.sum(1), c.square().sum(1)
    phi = 0.5 if drop == 0.5 else (1 - 2 * drop) / math.log((1 - drop) / drop) if 0 < drop < 1 else 0.0
    rest = math.log(2 / (1 - confidence))

    def bound(q: float) -> Tensor:
        return (eta * (1 - (1 - drop) / q) * total + eta**2 * phi * squares / (4 * q * q) + rest).abs()

    best = torch.full_like(total, 1 - drop)
    least, done = bound(1 - drop), torch.zeros_like(total, dtype=torch.bool)
    for step in range(1, round(drop / _STEP) + 1):
        q = min(1.0, 1 - drop + step * _STEP)
        now = bound(q)
        done |= now > least
        better = ~done
        best[better], least[better] = q, now[better]
        if done.double().mean() >= _ENOUGH:
            break
    return best.float()


def search_divisor(score: Callable[[float], float], drop: float, tries: int) -> tuple[float, dict[float, float]]:
    """The divisor with the least score, first coarse, then ten times finer around the best: (divisor, every score).

    The coarse divisors are spaced evenly in their logarithm from 1 - p to 1; a walk ends after more than three values without improvement.
    """
    seen: dict[float, float] = {}

    def divisor(place: float) -> float:
        return float(f"{(1 - drop) ** (1 - place / tries):.6g}")

    def ask(place: float) -> float:
        q = divisor(place)
        if q not in seen:
            seen[q] = score(q)
        return seen[q]

    def walk(places: list[float]) -> None:
        misses = 0
        for place in places:
            least = min(seen.values(), default=math.inf)
            misses = 0 if ask(place) < least else misses + 1
            if misses > 3:
                return

    if drop == 0:
        return 1.0, {1.0: score(1.0)}
    walk([float(place) for place in range(tries + 1)])
    middle = min(range(tries + 1), key=lambda place: seen.get(divisor(place), math.inf))
    walk([middle + step / 10 for step in range(1, 10) if middle + step / 10 <= tries])
    walk([middle - step / 10 for step in range(1, 10) if middle - step / 10 >= 0])
    best = min(seen, key=lambda q: (seen[q], q))
    return best, seen
