"""SimPO: learn from pairs of answers without a reference, by mean log-probability and a margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, Needs, Suggestion, TrainMethod
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.preferences import PairObjective
from engine.tasks.base import Task
from engine.train.parts import PartContext


class MeanMargin(PairObjective):
    """-log σ(β (mean log p better − mean log p worse) − γ), Eq. 6."""

    def __init__(self, task: Task, beta: float, gamma: float) -> None:
        super().__init__(task)
        self.beta, self.gamma = beta, gamma

    def losses(self, sums: Tensor, counts: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        better, worse = (sums / counts).chunk(2)
        margin = self.beta * (better - worse)  # [B]
        return -functional.logsigmoid(margin - self.gamma), margin


class SimPO(TrainMethod):
    """Simple preference optimisation."""

    card = Card(
        slug="simpo",
        title="Preferences without a reference (SimPO)",
        pick_when="Pick this when you have pairs of better and worse answers, and the answers differ much in length or memory is short.",
        summary="The model is pushed to find the better answer likelier per word than the worse one, by a margin. It is not compared with what it was, "
        "so nothing has to be remembered.",
        paper="SimPO: Simple Preference Optimization with a Reference-Free Reward",
        year=2024,
        arxiv="2405.14734",
        algorithm=(
            "Take the mean log-probability per token of both answers of a pair.",
            "Loss: -log sigmoid(beta × (better − worse) − gamma), averaged over the pairs of the whole batch.",
        ),
        avoid_when="The model must stay close to what it was: without a reference nothing holds it. DPO does.",
        traps=(
            "Nothing keeps the model near its start: small rates, few passes, and a look at the general loss.",
            "beta is some twenty times that of DPO, because means are small numbers.",
            "Fragments that do not end must not get an end mark, or the model learns to stop in the middle.",
        ),
        figures=(
            Figure(claim="AlpacaEval 2, length-controlled win rate over DPO", paper="up to 6.4 points (abstract)"),
        ),
        cost=Cost(time=3, memory=2, size=1),
        family="Preferences",
    )
    needs = Needs(tasks=("preference",))
    slots = (Slot.OBJECTIVE,)
    presets = {"tiny": {}, "paper": {"beta": 2.0, "gamma": 1.0}}

    class Params(HyperParams):
        """Hyperparameters of SimPO."""

        beta: float = dial(
            2.5, label="Sharpness", unit="1", low=0.01, high=100.0, tier="basic", paper=2.0, live=True,
            help="How strongly a difference between the two answers counts.",
        )  # fmt: skip
        gamma: float = dial(
            0.5, label="Margin", unit="1", low=0.0, high=20.0, paper=1.0, live=True,
            help="By how much the better answer must be ahead before the model is content.",
        )  # fmt: skip

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        size = facts.model.num_parameters
        rate = 5e-4 if size < 2_000_000 else 2e-4 if size < 200_000_000 else 1e-6
        return [
            Suggestion(where="settings.learning_rate", value=rate,
                       reason=f"Without a reference only small steps keep the model what it is; {rate:g} suits {size:,} parameters.")
        ]  # fmt: skip

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        return [MeanMargin(ctx.task, self.params.beta, self.params.gamma)]
