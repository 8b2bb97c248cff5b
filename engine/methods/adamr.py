"""AdamR: Adam that pulls every weight back to where it started, so that little has changed in the end (DAREx-L2, arXiv 2410.09344)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from engine.core.method import Card, Cost, Figure, TrainMethod
from engine.core.params import dial
from engine.core.slots import Slot
from engine.parts.optimizers import Moments, kernel
from engine.train.parts import OptimizerFactory, PartContext, Remap

if TYPE_CHECKING:
    from engine.train.trainables import Trainables

_START = "reference"  # key of the optimizer's state: the weight before its first step


class PulledAdam(torch.optim.Adam):
    """torch.optim.Adam with a pull towards the start before every step.

    Each weight's start is kept in its own state, by the parameter object, so checkpoints, resuming and remaps carry it. Groups have a "pull" each.
    """

    def __init__(self, params: Any, *, form: Literal["L2", "L1"], **options: Any) -> None:
        super().__init__(params, **options)
        self.form = form

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Pull, then an ordinary Adam step; the first step of a weight remembers where it started."""
        fresh = [
            (parameter, parameter.detach().clone())
            for group in self.param_groups
            if group["pull"]
            for parameter in group["params"]
            if parameter.grad is not None and _START not in self.state[parameter]
        ]
        self._pull()
        loss = super().step(closure)
        for parameter, start in fresh:
            self.state[parameter][_START] = start
        return loss

    def _pull(self) -> None:
        """p <- p - lr * pull / sqrt(mean of v_hat over all weights) * (p - start), with the second moments before this step."""
        scale = self._scale()
        if scale is None:
            return
        for group in self.param_groups:
            if not group["pull"]:
                continue
            rate = group["lr"] * group["pull"] / scale
            for parameter in group["params"]:
                start = self.state[parameter].get(_START)
                if start is None or parameter.grad is None:
                    continue
                distance = parameter - start
                if self.form == "L2":
                    parameter.sub_(distance * rate.clamp(max=1.0))  # never past the start
                else:
                    parameter.sub_(torch.minimum(distance.abs(), rate) * distance.sign())

    def _scale(self) -> Tensor | None:
        """sqrt of the mean of v_hat over all numbers that learn; None before the first step."""
        total, count = None, 0
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "exp_avg_sq" not in state:
                    continue
                second = state["exp_avg_sq"]
                correction = 1 - group["betas"][1] ** state["step"].to(second.device)
                share = second.sum() / correction
                total = share if total is None else total + share
                count += second.numel()
        return None if total is None else (total / count).sqrt() + self.param_groups[0]["eps"]


class AdamRFactory(OptimizerFactory):
    """Builds the pulled Adam. New modules without pretrained weights ("fresh.…") are not pulled: their start means nothing."""

    def __init__(self, *, betas: tuple[float, float], eps: float, pull: float, form: Literal["L2", "L1"]) -> None:
        self.betas, self.eps, self.pull, self.form = betas, eps, pull, form

    def build(self, trainables: Trainables, learning_rate: float) -> torch.optim.Optimizer:
        named = trainables.items()
        groups = [
            {"params": [p for name, p in named if not name.startswith("fresh.")], "pull": self.pull},
            {"params": [p for name, p in named if name.startswith("fresh.")], "pull": 0.0},
        ]
        return PulledAdam(
            [group for group in groups if group["params"]], form=self.form, lr=learning_rate, betas=self.betas, eps=self.eps,
            **kernel(trainables),
        )  # fmt: skip

    def remap(self, optimizer: torch.optim.Optimizer, remap: Remap, trainables: Trainables) -> None:
        """Carry the state along; numbers that are new start from their own first value, not from zero."""
        super().remap(optimizer, remap, trainables)
        for name, fresh in remap.replaced.items():
            start = optimizer.state.get(fresh, {}).get(_START)
            index = remap.tensors.get(name, (None, None))[1]
            if start is not None and index is not None:
                new = (index.reshape(-1) < 0).reshape(fresh.shape).to(fresh.device)
                start[new] = fresh.detach()[new]


class AdamR(TrainMethod):
    """Adam with a pull towards the pretrained weights."""

    card = Card(
        slug="adamr",
        title="AdamR (stay close to the base)",
        pick_when="Pick this when you will store the result as a tiny list of changes, or merge it later, and can still choose how it is trained: it learns the "
        "same with smaller changes.",
        summary="Works like Adam, but before every correction each weight is pulled a little back to the value it had when the training began. What changes in the "
        "end is only what the task needs, so nearly everything can be dropped afterwards. It needs three extra numbers for every weight that learns.",
        paper="DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models (DAREx-L2)",
        year=2024,
        arxiv="2410.09344",
        family="Optimizers",
        algorithm=(
            "The first step of a weight remembers its value p0: the pretrained weight in full fine-tuning.",
            "Before every Adam step, with the second moments so far: p = p - lr * pull / sqrt(mean of v_hat over ALL weights) * (p - p0).",
            "L1 instead: p moves towards p0 by lr * pull / sqrt(mean of v_hat), the same for all, and stops there: to pair with keeping the largest changes.",
            "Then an ordinary Adam step on the loss, without weight decay.",
            "With adapters, p0 is the adapter's own start: where that start changes nothing (LoRA), the pull is towards the untouched model.",
            "New modules without pretrained weights, such as a classifier, are not pulled.",
        ),
        avoid_when="You keep only one copy of the model and memory is tight: the third number for every weight buys nothing then.",
        traps=(
            "The pull that suits depends on the task: too strong and it learns nothing. Compare with a pull of 0.",
            "The paper's program pairs weights with their references by position in a list, which parameter groups break; here each weight holds its own.",
            "The pull never goes past the start, which the printed formula could when gradients are tiny (our deviation).",
        ),
        figures=(
            Figure(
                claim="Digits turned by 25 degrees: accuracy, size of the change, and accuracy lost by dropping 95 % of it",
                paper="same accuracy, smaller change, less lost",
                ours="0.961, 7.2 and 0.458 lost; Adam 0.968, 9.0 and 0.559 (3 seeds, 3 masks each)",
            ),
            Figure(
                claim="Plain dropping at p = 0.99 after training with the pull, encoders",
                paper="about the accuracy of the full model (unconfirmed)",
            ),
        ),
        cost=Cost(time=2, memory=4, size=1),
    )
    slots = (Slot.OPTIMIZER,)
    presets = {"tiny": {"pull": 0.1}, "paper": {"pull": 0.01}}

    class Params(Moments):
        """Hyperparameters of AdamR."""

        pull: float = dial(
            0.01,
            label="Pull towards the start",
            unit="1",
            low=0.0,
            high=10.0,
            tier="basic",
            help="How strongly every weight is drawn back to the value it had at the beginning; 0 is plain Adam, the paper tried 0.001 to 0.1.",
        )
        form: Literal["L2", "L1"] = dial(
            "L2",
            label="Kind of pull",
            help="'L2' pulls far-off weights more, for random dropping; 'L1' pulls all alike and brings many back exactly, for keeping the largest changes.",
        )

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        p = self.params
        return [AdamRFactory(betas=(p.beta1, p.beta2), eps=p.eps, pull=p.pull, form=p.form)]
