"""The learning rate over time: a rise at the start, then a shape. Factors depend on the clock alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.core.params import HyperParams, dial
from engine.train.parts import Schedule

if TYPE_CHECKING:
    from engine.train.clock import Clock


class Rising(HyperParams):
    """Hyperparameters of a schedule that rises and stays."""

    warmup: float = dial(
        0.05,
        label="Gentle start",
        unit="share",
        low=0.0,
        high=0.9,
        help="The learning rate rises step by step over this share of the run, so that the first steps break nothing.",
    )


class Falling(Rising):
    """Hyperparameters of a schedule that rises and falls."""

    final: float = dial(
        0.0,
        label="Rate at the end",
        unit="share",
        low=0.0,
        high=1.0,
        help="The share of the learning rate that is left at the very end.",
    )


Shape = Callable[[float], float]  # share of the way after the rise, 0 ≤ x < 1 -> factor


def level(x: float) -> float:
    """Stay at 1."""
    return 1.0


def falling_line(final: float) -> Shape:
    """From 1 straight down to `final`."""
    return lambda x: 1.0 - (1.0 - final) * x


def falling_cosine(final: float) -> Shape:
    """From 1 down to `final` along half a cosine."""
    return lambda x: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * x))


class Shaped(Schedule):
    """Rise in equal steps over the first share of the run, then follow a shape. No step has the rate zero unless the shape says so."""

    def __init__(self, warmup: float, shape: Shape) -> None:
        self.warmup, self.shape = warmup, shape

    def warmup_steps(self, clock: Clock) -> int:
        """How many steps rise; at least one step is left for the shape."""
        return min(round(self.warmup * clock.total_steps), max(0, clock.total_steps - 1))

    def factor(self, clock: Clock) -> float:
        rise = self.warmup_steps(clock)
        if clock.step < rise:
            return (clock.step + 1) / (rise + 1)
        return self.shape(min(1.0, (clock.step - rise) / max(1, clock.total_steps - rise)))
