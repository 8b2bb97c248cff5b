"""DPO: learn directly from pairs of better and worse answers, beside the model as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, Needs, Suggestion, TrainMethod
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.preferences import Referenced, dpo_losses
from engine.tasks.base import Task
from engine.train.parts import PartContext


class LogRatios(Referenced):
    """Loss of the difference of log-ratios to the reference."""

    def __init__(self, task: Task, params: Any) -> None:
        super().__init__(task)
        self.params = params

    def losses(self, sums: Tensor, counts: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        ratios = sums - self.of(batch, sums.device)  # [2B]
        if self.params.normalise:
            ratios = ratios / counts
        better, worse = ratios.chunk(2)
        margin = better - worse  # [B]
        p = self.params
        return dpo_losses(margin, beta=p.beta, kind=p.kind, label_smoothing=p.label_smoothing), p.beta * margin


class DPO(TrainMethod):
    """Direct preference optimisation."""

    card = Card(
        slug="dpo",
        title="Direct preference optimisation (DPO)",
        pick_when="Pick this when you have pairs of a better and a worse answer to the same request, and a model that answers reasonably already.",
        summary="The model is pushed to find the better answer likelier, compared with itself before training, and the worse one less likely. "
        "No judge and no trial answers are needed, only the pairs.",
        paper="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        year=2023,
        arxiv="2305.18290",
        algorithm=(
            "Before the first step, write down the log-probability that the untouched model gives to both answers of every pair.",
            "For each pair take the log-ratio of each answer: how much likelier the model finds it now than then, summed over its tokens.",
            "Loss: -log sigmoid(beta × (log-ratio of the better − log-ratio of the worse)), averaged over the pairs of the whole batch.",
            "Variants: hinge, IPO (a squared distance to a fixed margin), a share of doubt in the labels, ratios per token.",
        ),
        avoid_when="The model cannot answer the requests at all yet: teach it with examples first. Or you only have single good answers.",
        traps=(
            "Both answers can become less likely as long as their distance grows; watch logps_chosen in the log and eval_chosen_loss.",
            "Long answers have longer sums: a preference for length hides in the pairs. Ratios per token, or SimPO, damp it.",
            "The rate must be ten times smaller than for learning from examples, or the model falls apart.",
            "The reference must be the model that the run starts from; here it is taken at step 0, with every adapter still answering like the base.",
        ),
        figures=(Figure(claim="Summaries judged better than the reference summaries, 6B model", paper="61 % against 57 % for PPO (temperature 0)"),),
        cost=Cost(time=3, memory=3, size=1),
        family="Preferences",
    )  # fmt: skip
    needs = Needs(tasks=("preference",))
    slots = (Slot.OBJECTIVE,)
    default = True
    presets = {"tiny": {}, "paper": {"beta": 0.1}}

    class Params(HyperParams):
        """Hyperparameters of DPO."""

        beta: float = dial(
            0.1, label="Leash", unit="1", low=1e-4, high=100.0, tier="basic", paper=0.1, live=True,
            help="How closely the model is held to what it was: larger keeps it nearer, smaller lets it go further.",
        )  # fmt: skip
        kind: Literal["sigmoid", "hinge", "ipo"] = dial(
            "sigmoid", label="Shape of the loss", paper="sigmoid",
            help="sigmoid is the usual one; hinge stops at a margin; ipo aims at a fixed margin and overfits less.",
        )  # fmt: skip
        label_smoothing: float = dial(
            0.0, label="Doubt", unit="share", low=0.0, high=0.49, paper=0.0, live=True,
            help="The share of pairs that are probably the wrong way round; the model is then never pushed to certainty.",
        )  # fmt: skip
        normalise: bool = dial(
            False, label="Per token", paper=False,
            help="Divides each log-ratio by the length of its answer, so that long answers do not count more. Use a beta of 2 to 10 with it.",
        )  # fmt: skip

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        if params.kind != "sigmoid" and params.label_smoothing:
            return [Fault(where="label_smoothing", what=f"Doubt has no meaning with the loss '{params.kind}'.", code="excludes",
                          why="Only the sigmoid loss knows swapped pairs.", way_out="Set it to 0, or choose sigmoid.")]  # fmt: skip
        return []

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        size = facts.model.num_parameters
        rate = 5e-4 if size < 2_000_000 else 2e-4 if size < 200_000_000 else 5e-6
        return [
            Suggestion(where="settings.learning_rate", value=rate,
                       reason=f"Learning from preferences takes small steps; {rate:g} suits a model of {size:,} parameters.")
        ]  # fmt: skip

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        return [LogRatios(ctx.task, self.params)]
