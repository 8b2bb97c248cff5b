"""Range maps: a number without limits that learns, and the value inside a range that it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_LEAST = 1e-8  # above an open range's lower end
_EDGE = 1e-4  # a start at the very edge would hardly move: the slope of the map vanishes there


@dataclass(frozen=True)
class Range:
    """From raw numbers to values between `low` and `high`; `high` None means open above, `whole` means whole numbers.

    low + (high - low) sigmoid(raw), or low + softplus(raw); whole numbers are the floor of it, and `high` itself belongs to them.
    """

    low: float
    high: float | None
    whole: bool = False

    def __post_init__(self) -> None:
        if self.high is not None and not self.high > self.low:
            raise ValueError(f"The range from {self.low:g} to {self.high:g} is empty.")

    def value(self, raw: Tensor) -> Tensor:
        """The values that raw numbers stand for, of the same shape; always inside the range."""
        if self.high is None:
            value = self.low + functional.softplus(raw)
        else:
            value = self.low + (self.high + (1.0 if self.whole else 0.0) - self.low) * torch.sigmoid(raw)
        if self.whole:
            value = value.floor()
        return value if self.high is None else value.clamp(self.low, self.high)  # rounding may step over an edge

    def raw(self, value: float) -> float:
        """The raw number that stands for `value`; values at an edge are taken a hair inside."""
        above = value - self.low
        if self.high is None:
            return inverse_softplus(max(above, _LEAST))
        width = self.high + (1.0 if self.whole else 0.0) - self.low
        share = min(max(above / width, _EDGE), 1.0 - _EDGE)
        return math.log(share / (1.0 - share))


def inverse_softplus(value: float) -> float:
    """The number whose softplus is `value` > 0, without overflow for large or small ones."""
    return value + math.log(-math.expm1(-value))
