"""LoRA: thin matrices beside the frozen weights, with DoRA, rsLoRA and other starting points as choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, Needs, Suggestion, TrainMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.lowrank import FROM_WEIGHTS, Init, LowRank
from engine.parts.targets import ALL, TARGETS_HELP, linear_verdict, rank_faults, target_faults, targets, top_blocks_dial
from engine.train.parts import PartContext


class LoRA(TrainMethod):
    """Low-rank adaptation."""

    card = Card(
        slug="lora",
        title="LoRA",
        pick_when="Pick this when you want a small file that nearly every other tool can load, and good results without tuning anything.",
        summary="The model stays as it is; beside each chosen layer two thin matrices learn what to add. The result is a file of a few "
        "megabytes that can be put on and taken off, or folded into the model for good.",
        paper="LoRA: Low-Rank Adaptation of Large Language Models",
        year=2021,
        arxiv="2106.09685",
        algorithm=(
            "Freeze the weight W [out, in] of every target layer.",
            "Add A [r, in], random, and B [out, r], zero: y = x W^T + s (x A^T) B^T with s = alpha / r (alpha / sqrt(r) with rsLoRA).",
            "Only A and B learn. At the start B A is zero, so the model answers as before.",
            "DoRA: learn also the length of every row of W + s B A, apart from its direction.",
            "PiSSA starts A and B from the largest singular directions of W, OLoRA from its QR factors, and takes that part out of W.",
            "Export: the pair (A, B) for each layer; for PiSSA and OLoRA the exact difference to the untouched base, at twice the rank.",
            "Merge: W + s B A.",
        ),
        avoid_when="The model must learn much that is new, such as another language, or the step must be as quick as it can be.",
        traps=(
            "Changing alpha changes the strength of every step: rank and alpha are best moved together.",
            "PiSSA and OLoRA change the base weights; an adapter saved as it stands is wrong on the untouched base. Here it is converted first.",
            "Merging into rounded weights loses part of what was learned; the sum is made in fp32.",
            "A new classification layer must be saved with the adapter, or the loaded model guesses at random.",
        ),
        figures=(
            Figure(
                claim="Trainable parameters of GPT-3 175B against full fine-tuning",
                paper="10,000 times fewer (abstract)",
            ),
            Figure(
                claim="Time of a step against peft's own layers of the same rank",
                paper="not measured",
                ours="0.83, 0.86 and 0.95 at rank 2, 8 and 16 (Llama, 13 M, 4 x 256 tokens, one CPU core), with the same numbers to fp32 rounding",
            ),
            Figure(
                claim="GPU memory for training GPT-3 175B against full fine-tuning", paper="3 times less (abstract)"
            ),
        ),
        cost=Cost(time=3, memory=2, size=1),
        family="Adapters",
        first_choice=True,
    )
    needs = Needs(linear_layers=True)
    slots = (Slot.PARAMETRIZATION,)
    presets = {"tiny": {"r": 4, "alpha": 8}, "paper": {"r": 8, "alpha": 16, "targets": "attention"}}

    class Params(HyperParams):
        """Hyperparameters of LoRA."""

        r: int = dial(
            8,
            label="Rank",
            unit="1",
            low=1,
            high=4096,
            tier="basic",
            paper=8,
            help="How much room the addition has: more can learn more and makes a larger file.",
        )
        alpha: float = dial(
            16.0,
            label="Strength",
            unit="1",
            low=0.01,
            high=65536,
            paper=16,
            help="How strongly the addition counts; it is divided by the rank. Twice the rank is usual.",
        )
        dropout: float = dial(
            0.0,
            label="Dropout",
            unit="share",
            low=0.0,
            high=0.9,
            paper=0.0,
            live=True,
            help="This share of the inputs of the addition is left out at random while learning, against memorising.",
        )
        targets: str = dial(ALL, label="Layers", help=TARGETS_HELP, paper="attention")
        top_blocks: int | None = top_blocks_dial()
        init: Init = dial(
            "default",
            label="Starting point",
            paper="default",
            help="default and gaussian start from nothing; pissa and olora start from the strongest part of the weights themselves "
            "and often learn faster at first.",
        )
        use_dora: bool = dial(
            False,
            label="Learn lengths apart (DoRA)",
            help="Learns length and direction of the weights separately: often a little better, always slower.",
        )
        use_rslora: bool = dial(
            False,
            label="Even strength for large ranks (rsLoRA)",
            help="Divides the strength by the square root of the rank, so that large ranks are not held back.",
        )

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        verdict = linear_verdict(cls.card.title, facts)
        return super().supports(facts) if verdict.ok else verdict

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        faults = target_faults(params.targets, facts.model, top_blocks=params.top_blocks)
        limits = [(name, min(shape)) for name, shape in targets(params.targets, facts.model, params.top_blocks).items()]
        faults += rank_faults(params.r, limits, noun="independent directions")
        if params.use_dora and params.init in FROM_WEIGHTS:
            faults.append(
                Fault(
                    where="init",
                    what=f"DoRA cannot start from {params.init}.",
                    code="excludes",
                    why="The result could not be written as an adapter of the untouched base.",
                    way_out="Switch DoRA off, or choose the starting point 'default'.",
                )
            )
        return faults

    @classmethod
    def claims(cls, params: Any, facts: Facts) -> frozenset[str]:
        return frozenset(f"{name}.weight" for name in targets(params.targets, facts.model, params.top_blocks))

    @classmethod
    def num_trainable(cls, params: Any, facts: Facts) -> int:
        shapes = targets(params.targets, facts.model, params.top_blocks).values()
        return sum(params.r * (out + into) + (out if params.use_dora else 0) for out, into in shapes)

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        size = facts.model.num_parameters
        rate = 5e-3 if size < 2_000_000 else 2e-3 if size < 200_000_000 else 2e-4
        return [
            Suggestion(
                where="settings.learning_rate",
                value=rate,
                reason=f"The added matrices start from nothing and take about ten times the step of full fine-tuning: {rate:g} "
                f"suits a model of {size:,} parameters.",
            )
        ]

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        p = self.params
        return [
            LowRank(
                ctx,
                list(targets(p.targets, ctx.facts.model, p.top_blocks)),
                r=p.r,
                alpha=p.alpha,
                dropout=p.dropout,
                init=p.init,
                use_dora=p.use_dora,
                use_rslora=p.use_rslora,
            )
        ]
