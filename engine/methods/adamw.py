"""AdamW: the optimizer that nearly everybody uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from engine.core.method import Card, Cost, Figure, TrainMethod
from engine.core.params import dial
from engine.core.slots import Slot
from engine.parts.optimizers import Moments, decay_groups, kernel
from engine.train.parts import OptimizerFactory, PartContext

if TYPE_CHECKING:
    from engine.train.trainables import Trainables


class AdamWFactory(OptimizerFactory):
    """torch.optim.AdamW with its quickest kernel; biases and norms never decay."""

    def __init__(self, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def build(self, trainables: Trainables, learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            decay_groups(trainables, self.weight_decay),
            lr=learning_rate,
            betas=self.betas,
            eps=self.eps,
            **kernel(trainables),
        )


class AdamW(TrainMethod):
    """Adam with decoupled weight decay."""

    card = Card(
        slug="adamw",
        title="AdamW",
        pick_when="Pick this when you have no reason to pick another optimizer: it is the safe choice for every model here.",
        summary="Each weight gets a step size of its own, from running averages of its gradient and of the gradient's square. It needs two extra "
        "numbers for every weight that learns.",
        paper="Decoupled Weight Decay Regularization",
        year=2017,
        arxiv="1711.05101",
        algorithm=(
            "m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2, for every weight that learns.",
            "Correct both for their start at zero.",
            "w = w - lr * weight_decay * w, for matrices only.",
            "w = w - lr * m / (sqrt(v) + eps).",
        ),
        avoid_when="Memory is so tight that two extra numbers for each learned weight do not fit.",
        traps=(
            "Weight decay pulls a weight towards zero, not towards its pretrained value: for adapters and short runs leave it at 0.",
            "Biases and norms must not decay; they do not here.",
        ),
        figures=(
            Figure(
                claim="Relative improvement of the test error of Adam on image classification",
                paper="about 15 % (unconfirmed)",
            ),
        ),
        cost=Cost(time=2, memory=3, size=1),
        family="Optimizers",
    )
    slots = (Slot.OPTIMIZER,)
    default = True
    presets = {"tiny": {}, "paper": {"weight_decay": 0.01}}

    class Params(Moments):
        """Hyperparameters of AdamW."""

        weight_decay: float = dial(
            0.0,
            label="Pull towards zero",
            unit="1",
            low=0.0,
            high=1.0,
            paper=0.01,
            live=True,
            help="Shrinks the learned matrices a little in every step, against memorising.",
        )

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        p = self.params
        return [AdamWFactory(betas=(p.beta1, p.beta2), eps=p.eps, weight_decay=p.weight_decay)]
