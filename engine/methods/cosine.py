"""Cosine schedule: the learning rate falls along half a cosine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.core.method import Card, Cost, TrainMethod
from engine.core.params import HyperParams, dial
from engine.core.slots import Slot
from engine.parts.schedules import Shaped, falling_cosine
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

    class Params(HyperParams):
        """Hyperparameters of the schedule."""

        warmup: float = dial(
            0.05,
            label="Gentle start",
            unit="share",
            low=0.0,
            high=0.9,
            help="The learning rate rises step by step over this share of the run, so that the first steps break nothing.",
        )
        final: float = dial(
            0.0,
            label="Rate at the end",
            unit="share",
            low=0.0,
            high=1.0,
            help="The share of the learning rate that is left at the very end.",
        )

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        return [Shaped(self.params.warmup, falling_cosine(self.params.final))]
