"""ScaleLoRA: every kept weight is multiplied by a learned number, so that zeros stay zero by construction (arXiv 2312.15230)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, Needs, Suggestion, TrainMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.masked import MaskedTuning, num_masked
from engine.parts.targets import ALL, TARGETS_HELP, linear_verdict, rank_faults, target_faults, targets, top_blocks_dial
from engine.train.parts import PartContext


class ScaleLoRA(TrainMethod):
    """Element-wise low-rank rescaling."""

    card = Card(
        slug="scalelora",
        title="ScaleLoRA",
        pick_when="Pick this when many of the model's numbers were deleted (pruned) before and the kept ones only need to be turned up or down "
        "a little; deleted numbers can never come back this way.",
        summary="Every weight is multiplied by a number of its own, which starts at one. These numbers come from two thin matrices, so few of them are "
        "learned. Zero times anything is zero: the model stays exactly as sparse as it was.",
        paper="PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
        year=2023,
        arxiv="2312.15230",
        algorithm=(
            "Note the mask of every target layer and freeze W.",
            "Learn A [r, in] and B [out, r]; forward: y = x (W * (B A))^T, element by element.",
            "Start 'first': the first component of A and B is all ones, the other rows of A are random and the other columns of B zero. Then B A is exactly one "
            "everywhere, the model answers exactly as before, and the components get different gradients from the first step on.",
            "Start 'equal', as published: every entry is 1 / sqrt(r), with a little noise so that the components can come apart at all.",
            "The wide product is made again in the backward pass, never remembered.",
            "Merge: W * (B A) in place; removed places are written as exact zeros.",
            "The number of directions really in use is logged as numerical_rank.",
        ),
        avoid_when="The model must learn something new: a weight can be scaled but its sign hardly turns, and nothing can be added.",
        traps=(
            "The published start makes all r components exact copies with equal gradients: they never separate, and whatever r is, one direction learns. "
            "Without noise that is what happens here too.",
            "Small noise hardly helps: to first order the noisy product still has one direction, and the others are as small as the noise squared. It also makes "
            "the start only nearly the same model. The start 'first' is exact and uses every direction after the first step.",
            "The forward pass of the released code calls a method that its class does not have; it cannot run as published.",
            "A kept weight may be scaled to zero: the mask is stored, not read off the zeros.",
            "A rate that suits LoRA moves every weight by that share of itself; the right rate depends on the model.",
        ),
        figures=(
            Figure(
                claim="Close to full retraining at high sparsity, together with the other LoRA variants",
                paper="abstract; tables unconfirmed",
                ours="86 % of the jump comes back, 65 % from the published start (stories260k, 60 % deleted by magnitude, "
                "200 steps, 2 seeds)",
            ),
        ),
        cost=Cost(time=3, memory=2, size=1),
        family="Sparsity",
    )  # fmt: skip
    needs = Needs(linear_layers=True)
    slots = (Slot.PARAMETRIZATION,)
    presets = {"tiny": {"r": 4}, "paper": {"r": 16, "start": "equal", "noise": 0.0}}

    class Params(HyperParams):
        """Hyperparameters of ScaleLoRA."""

        r: int = dial(
            16,
            label="Rank",
            unit="1",
            low=1,
            high=4096,
            tier="basic",
            paper=16,
            help="How freely the scales of a layer can differ from each other: more can learn more and makes a larger file.",
        )
        start: Literal["first", "equal"] = dial(
            "first",
            label="Starting point",
            paper="equal",
            help="'first' starts exactly from the pruned model and lets all directions learn; 'equal' is the published start.",
        )
        noise: float = dial(
            1e-3,
            label="Noise at the start",
            unit="share",
            low=0.0,
            high=0.5,
            paper=0.0,
            help="For the start 'equal' only: how far the entries differ from each other at first. Zero is the published start, which uses one direction.",
        )
        targets: str = dial(ALL, label="Layers", help=TARGETS_HELP, paper=ALL)
        top_blocks: int | None = top_blocks_dial()

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        verdict = linear_verdict(cls.card.title, facts)
        return super().supports(facts) if verdict.ok else verdict

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        limits = [(name, min(shape)) for name, shape in targets(params.targets, facts.model, params.top_blocks).items()]
        return target_faults(params.targets, facts.model, top_blocks=params.top_blocks) + rank_faults(
            params.r, limits, noun="independent directions"
        )

    @classmethod
    def claims(cls, params: Any, facts: Facts) -> frozenset[str]:
        return frozenset(f"{name}.weight" for name in targets(params.targets, facts.model, params.top_blocks))

    @classmethod
    def num_trainable(cls, params: Any, facts: Facts) -> int:
        return num_masked(targets(params.targets, facts.model, params.top_blocks), params.r)

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        size = facts.model.num_parameters
        rate = 3e-2 if size < 2_000_000 else 3e-3 if size < 200_000_000 else 5e-4
        return [
            Suggestion(
                where="settings.learning_rate",
                value=rate,
                reason=f"A step of {rate:g} scales weights by about that share, which suits a model of {size:,} parameters.",
            )
        ]

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        p = self.params
        layers = list(targets(p.targets, ctx.facts.model, p.top_blocks))
        return [MaskedTuning(ctx, layers, r=p.r, kind="scale", scale=1.0, start=p.start, noise=p.noise)]
