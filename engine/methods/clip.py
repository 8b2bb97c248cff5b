"""Gradient clipping: no single batch may throw the model far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from engine.core.method import Card, Cost, TrainMethod
from engine.core.params import HyperParams, dial
from engine.core.slots import Slot
from engine.train.parts import GradientRule, PartContext

if TYPE_CHECKING:
    from engine.train.trainables import Trainables


class ClipNorm(GradientRule):
    """Scales all gradients by min(1, max_norm / norm), without waiting for the device."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm
        self.steps = 0
        self.cut: float | Tensor = 0.0  # steps in which the limit acted

    def apply(self, trainables: Trainables, norm: Tensor) -> dict[str, Any]:
        clip_grads_with_norm_(list(trainables), self.max_norm, norm)
        clipped = (norm > self.max_norm).float()
        self.steps += 1
        self.cut = self.cut + clipped
        return {"clipped": clipped}

    def numbers(self) -> Mapping[str, float]:
        return {"clipped_share": float(self.cut) / max(1, self.steps)}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "cut": float(self.cut)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.cut = int(state.get("steps", 0)), float(state.get("cut", 0.0))


class Clip(TrainMethod):
    """Clipping by the global norm."""

    card = Card(
        slug="clip",
        title="Gradient clipping",
        pick_when="Pick this when you want a seat belt: one strange example then cannot throw the model off its path.",
        summary="When all gradients together are longer than a limit they are scaled down to it, direction unchanged. On calm data it does nothing.",
        paper="On the difficulty of training recurrent neural networks",
        year=2012,
        arxiv="1211.5063",
        algorithm=(
            "norm = square root of the sum of the squares of all gradients, after every micro-batch was added.",
            "Multiply every gradient by min(1, max_norm / norm).",
        ),
        avoid_when="The limit would act in every step: then it is only a smaller learning rate, and that is better set directly.",
        traps=(
            "The norm in the log is the one before clipping, or an explosion would look calm.",
            "Clipping each micro-batch by itself changes the gradient of the whole batch; here it acts once, after accumulation.",
        ),
        cost=Cost(time=1, memory=1, size=1),
        family="Gradient rules",
    )
    slots = (Slot.GRADIENT_RULE,)

    class Params(HyperParams):
        """Hyperparameters of clipping."""

        max_norm: float = dial(
            1.0,
            label="Longest step",
            unit="1",
            low=1e-4,
            high=1e4,
            paper=1.0,
            live=True,
            help="Gradients longer than this are scaled down to it.",
        )

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        return [ClipNorm(self.params.max_norm)]
