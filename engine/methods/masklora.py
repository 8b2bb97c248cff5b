"""MaskLoRA: LoRA that never touches the zeros of a pruned model, so that it folds in without a trace (arXiv 2312.15230)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, Needs, Suggestion, TrainMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.masked import MaskedTuning, When, head_faults, num_masked, output_layer
from engine.parts.targets import ALL, TARGETS_HELP, linear_verdict, rank_faults, target_faults, targets
from engine.train.parts import PartContext

NONE = "none"


class MaskLoRA(TrainMethod):
    """Low-rank adaptation under a mask."""

    card = Card(
        slug="masklora",
        title="MaskLoRA",
        pick_when="Pick this when many of the model's numbers were deleted (pruned) before and it should learn, or get its quality back, "
        "without a single deleted number coming back.",
        summary="Works like LoRA: the weights stand still and two thin matrices beside each layer learn what to add. But the addition is cut "
        "out wherever the pruned model has a zero, so that it can be folded into the weights and the model stays exactly as sparse as it was.",
        paper="PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
        year=2023,
        arxiv="2312.15230",
        algorithm=(
            "Note the mask M of every target layer: from the file beside a model that was pruned here, or else the places where W is not zero, looked at once.",
            "Freeze W; add A [r, in], random, and B [out, r], zero.",
            "Forward: y = x (W + c * M * (B A))^T with c = alpha / r. At the start B A is zero, so the model answers as before.",
            "Backward: make M * (B A) again instead of remembering it; G = c * M * (dY^T X), dB = G A^T, dA = B^T G.",
            "Merge: W + c * M * (B A), exactly what ran in training; the zeros stay zero.",
            "With 'merge' (LoRA-Prune) the mask is left out while training and applied when measuring and merging: reports are about the sparse model.",
            "Export: A, B and the mask in bits for each layer, and the merged sparse model.",
        ),
        avoid_when="The model is not pruned: then the mask holds nothing back, and LoRA does the same with a file that other tools load.",
        traps=(
            "Plain LoRA on a pruned model makes a dense model when it is merged; the zeros are gone, or the learning is.",
            "With the mask applied only at the end, training improves a model that will never exist: part of what was learned is cut off.",
            "A mask that is read off the zeros in every step changes when a kept weight happens to be zero; here it is stored.",
            "Remembering M * (B A) for the backward pass costs a whole weight matrix per layer; here it is made again, for a little time.",
            "There is no dropout: the masked product has no thin input that could be dropped.",
            "Training on a dense model is allowed; the mask is then full.",
        ),
        figures=(
            Figure(
                claim="Share of the loss jump of pruning that comes back", paper="close to full retraining (abstract)",
                ours="87 %; LoRA-Prune 48 %, retraining every kept weight 91 % (stories260k, 60 % deleted by magnitude, 200 steps, 2 seeds)",
            ),
            Figure(claim="Parameters retrained on OPT 2.7B to 30B that match full retraining", paper="0.27 to 0.35 % (abstract of the first version)"),
            Figure(claim="Repair of a 30B model on one A100", paper="within minutes (abstract)"),
            Figure(claim="Perplexity tables for each variant", paper="unconfirmed"),
        ),
        cost=Cost(time=3, memory=2, size=1),
        family="Sparsity",
    )  # fmt: skip
    needs = Needs(linear_layers=True)
    slots = (Slot.PARAMETRIZATION,)
    presets = {"tiny": {"r": 4, "alpha": 8}, "paper": {"r": 16, "alpha": 32}}

    class Params(HyperParams):
        """Hyperparameters of MaskLoRA."""

        r: int = dial(
            16,
            label="Rank",
            unit="1",
            low=1,
            high=4096,
            tier="basic",
            paper=16,
            help="How much room the addition has: more can learn more and makes a larger file.",
        )
        alpha: float = dial(
            32.0,
            label="Strength",
            unit="1",
            low=0.01,
            high=65536,
            paper=32,
            help="How strongly the addition counts; it is divided by the rank. Twice the rank is usual.",
        )
        when: When = dial(
            "always",
            label="When zeros are kept",
            paper="always",
            help="'always' keeps the deleted places out of every step (MaskLoRA); 'merge' trains as if they were free and cuts them off "
            "when measuring and at the end (LoRA-Prune), which is usually worse.",
        )
        targets: str = dial(
            ALL,
            label="Layers",
            help=f"{TARGETS_HELP} With the output layer switched on, none is possible too.",
            paper=ALL,
        )
        head: bool = dial(
            False,
            label="Output layer too",
            help="Lets the output layer, which is never pruned, learn through an ordinary LoRA; only where it has weights of its own.",
        )

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        verdict = linear_verdict(cls.card.title, facts)
        return super().supports(facts) if verdict.ok else verdict

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        faults: list[Fault] = []
        if params.targets.strip() != NONE:
            faults += target_faults(params.targets, facts.model)
        elif not params.head:
            faults.append(
                Fault(
                    where="targets", what="Nothing would learn.", why="No layer is chosen, and the output layer is off.",
                    way_out=f"Write {ALL}, or switch the output layer on.", code="nothing_learns",
                )
            )  # fmt: skip
        limits = [(name, min(shape)) for name, shape in _layers(params, facts).items()]
        faults += rank_faults(params.r, limits, noun="independent directions")
        return faults + (head_faults(facts.model) if params.head else [])

    @classmethod
    def claims(cls, params: Any, facts: Facts) -> frozenset[str]:
        return frozenset(f"{name}.weight" for name in (*_layers(params, facts), *_head(params, facts)))

    @classmethod
    def num_trainable(cls, params: Any, facts: Facts) -> int:
        heads = {name: facts.model.tensors[f"{name}.weight"] for name in _head(params, facts)}
        return num_masked(_layers(params, facts), params.r) + sum(params.r * sum(s) for s in heads.values())

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        size = facts.model.num_parameters
        rate = 5e-3 if size < 2_000_000 else 2e-3 if size < 200_000_000 else 5e-4
        return [
            Suggestion(
                where="settings.learning_rate",
                value=rate,
                reason=f"Thin matrices that start from nothing take large steps: {rate:g} suits a model of {size:,} parameters.",
            )
        ]

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        p = self.params
        return [
            MaskedTuning(
                ctx, list(_layers(p, ctx.facts)), r=p.r, kind="add", scale=p.alpha / p.r, when=p.when,
                dense=_head(p, ctx.facts),
            )
        ]  # fmt: skip


def _head(params: Any, facts: Facts) -> tuple[str, ...]:
    name = output_layer(facts.model) if params.head else None
    return (name,) if name else ()


def _layers(params: Any, facts: Facts) -> dict[str, tuple[int, int]]:
    return {} if params.targets.strip() == NONE else targets(params.targets, facts.model)
