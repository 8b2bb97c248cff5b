"""Cosine schedule: the learning rate falls along half a cosine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.core.method import Card, Cost, TrainMethod
from engine.core.slots import Slot
from engine.parts.schedules import Falling, Shaped, falling_cosine
from engine.train.parts import PartContext


class Cosine(TrainMethod):
    """A gentle start, then half a cosine down."""

    card = Card(
        slug="cosine",
        title="Cosine decay",
        pick_when="Pick this when you have no reason to pick another schedule: it learns quickly at first and settles gently at the end.",
        summary="After a gentle start the learning rate stays high for a while, then falls smoothly to its final share.",
        paper="SGDR: Stochastic Gradient Descent with Warm Restarts",
        year=2016,
        arxiv="1608.03983",
        algorithm=(
            "Rise: step t of w warm-up steps uses the factor t / (w + 1).",
            "Then: final + (1 - final) (1 + cos(pi x)) / 2, x the share of the run after the rise.",
            "Without the restarts of the paper.",
        ),
        avoid_when="You may want to train longer afterwards, or stop at a moment that is not planned.",
        traps=("The curve depends on the planned length; stopping early means the rate never came down.",),
        cost=Cost(time=1, memory=1, size=1),
        family="Schedules",
    )
    slots = (Slot.SCHEDULE,)
    default = True
    presets = {"tiny": {}, "paper": {"warmup": 0.0}}

    class Params(Falling):
        """Hyperparameters of the schedule."""

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        return [Shaped(self.params.warmup, falling_cosine(self.params.final))]
