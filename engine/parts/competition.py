"""Parameter competition: how strongly every change of every model is kept, from scores that are normalised over the whole model.

Written over streams of task-vector pieces [n, d_k], so that neither the vectors nor their scores are ever in memory as a whole: the statistics are
gathered in a few passes, and weights follow from the statistics piece by piece. fp32 throughout: scores of about 1e-6 vanish in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil, floor
from typing import Literal

import torch
from torch import Tensor

from engine.parts.merging import order_statistics, top_rank

Variant = Literal["code", "paper"]
Stream = Callable[[], Iterable[Tensor]]


@dataclass(kw_only=True)
class Balance:
    """What has to be known about all changes before any of them can be weighed."""

    variant: Variant
    low: Tensor  # [n, 1] bounds to which |tau| is clamped, which are also its smallest and largest value afterwards
    high: Tensor
    floor: Tensor  # [n, 1] the score that is just not kept
    top: Tensor  # [n, 1] the largest score
    pair_low: (
        Tensor  # [n, n] smallest and largest tau_i * tau_j, and the sum of exp(their min-max), for the paper's form
    )
    pair_high: Tensor
    pair_sum: Tensor

    def clamped(self, vectors: Tensor) -> Tensor:
        """c_i = sign(tau_i) * |tau_i| within the bounds; a change of exactly zero stays zero."""
        return vectors.sign() * vectors.abs().clamp(self.low, self.high)

    def scores(self, vectors: Tensor) -> Tensor:
        """score_i, up to a positive factor and a constant of each row, which the min-max takes out: [n, d]."""
        return self._code(vectors) if self.variant == "code" else self._paper(vectors)

    def weights(self, vectors: Tensor) -> Tensor:
        """w_i in [0, 1]: exactly 0 for what is dropped, 1 for the best: [n, d]."""
        span = self.top - self.floor
        lifted = self.scores(vectors).clamp(min=self.floor) - self.floor
        return torch.where(span > 0, lifted / span.clamp(min=1e-38), 0.0)

    def fuse(self, vectors: Tensor, scales: Tensor) -> Tensor:
        """tau_m = sum_i lambda_i c_i w_i / sum_i w_i: [d]. A place that one model alone keeps gets its change in full."""
        weights = self.weights(vectors)
        total: Tensor = (scales.to(vectors.dtype).unsqueeze(1) * self.clamped(vectors) * weights).sum(0)
        return total / weights.sum(0).clamp(min=1e-12)

    def _code(self, vectors: Tensor) -> Tensor:
        num_models = vectors.shape[0]
        size = vectors.abs().clamp(self.low, self.high)
        unit = (size - self.low) / (self.high - self.low).clamp(min=1e-38)  # min-max, [0, 1]
        intra = torch.exp(
            num_models * (unit.square() - 1)
        )  # exp(n unit^2) up to a factor, so that many models do not overflow
        return intra * torch.tanh(vectors * vectors.sum(0))

    def _paper(self, vectors: Tensor) -> Tensor:
        # softmax over a billion places differs from place to place in its last digits only: fp64, and the constant of an unmoved place subtracted
        num_models, changes = vectors.shape[0], self.clamped(vectors).double()
        intra = torch.empty_like(changes)
        inter = torch.zeros_like(changes)
        scale = self.pair_sum.mean()
        for i in range(num_models):
            for j in range(num_models):
                span = (self.pair_high[i, j] - self.pair_low[i, j]).clamp(min=1e-300)
                unit = (changes[i] * changes[j] - self.pair_low[i, j]) / span  # norm(tau_i tau_j), [0, 1]
                inter[i] += unit.exp() * (scale / self.pair_sum[i, j])
                if i == j:
                    intra[i] = (num_models * unit).exp()
        least = (scale / self.pair_sum).sum(1, keepdim=True)
        return (intra * inter - least).float()


def balance(stream: Stream, size: int, *, variant: Variant, keep: float, clamp: float) -> Balance:
    """Gather the statistics: bounds of |tau| (two passes), for the paper's form the pairs (two more), ranks of the scores (two more).

    size: how many numbers a model has.  keep: share of changes that survives.  clamp: share cut off at either end of |tau|.
    """
    bounds = order_statistics(
        lambda: (piece.abs() for piece in stream()), [1 + floor(clamp * (size - 1)), 1 + ceil((1 - clamp) * (size - 1))]
    )
    num_models = bounds.shape[0]
    nothing = torch.zeros(num_models, 1)
    pairs = torch.zeros(num_models, num_models, dtype=torch.float64)
    found = Balance(
        variant=variant, low=bounds[:, :1], high=bounds[:, 1:], floor=nothing, top=nothing,
        pair_low=pairs, pair_high=pairs, pair_sum=pairs,
    )  # fmt: skip
    if variant == "paper":
        _pairs(found, stream)
    ranked = order_statistics(lambda: (found.scores(piece) for piece in stream()), [top_rank(size, keep), size])
    found.floor, found.top = ranked[:, :1], ranked[:, 1:]
    return found


def _pairs(found: Balance, stream: Stream) -> None:
    num_models = found.low.shape[0]
    low = torch.full((num_models, num_models), float("inf"), dtype=torch.float64)
    high, total = -low, torch.zeros_like(low)
    for piece in stream():
        changes = found.clamped(piece).double()
        for i in range(num_models):
            product = changes[i] * changes  # [n, d_k]
            low[i] = torch.minimum(low[i], product.amin(1))
            high[i] = torch.maximum(high[i], product.amax(1))
    span = (high - low).clamp(min=1e-300)
    for piece in stream():
        changes = found.clamped(piece).double()
        for i in range(num_models):
            total[i] += ((changes[i] * changes - low[i].unsqueeze(1)) / span[i].unsqueeze(1)).exp().sum(1)
    found.pair_low, found.pair_high, found.pair_sum = low, high, total
