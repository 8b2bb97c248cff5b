"""Bias and norm tuning: only the offsets and the gains of the norms learn, a few numbers in ten thousand (arXiv 2312.15230)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.core.errors import EngineError, Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, Suggestion, TrainMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.adapters import FRESH_PREFIX, base_name, fresh_tensors, load_fresh
from engine.parts.targets import above, top_blocks_dial
from engine.parts.vectors import VectorParts, vectors
from engine.train.parts import Parametrization, PartContext, Payload


class Vectors(Parametrization):
    """Named vectors of the model learn in place; nothing is added to it."""

    spares_frozen_blocks = True

    def __init__(self, ctx: PartContext, names: list[str]) -> None:
        self.ctx, self.names = ctx, names

    def attach(self, model: nn.Module) -> None:
        known = dict(model.named_parameters(remove_duplicate=False))
        lost = [name for name in self.names if name not in known]
        if lost:
            raise EngineError(
                Fault(
                    where="model.source", what=f"The loaded model has no weight called {lost[0]}, although its files do.",
                    why="Another method may have taken it out, or this family renames its weights.",
                    way_out="Use this method alone, or full fine-tuning.", code="names_differ",
                ),
                "environment",
            )  # fmt: skip

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        known = dict(model.named_parameters(remove_duplicate=False))
        return {name: known[name] for name in self.names}

    def merge(self, model: nn.Module) -> bool:
        return True  # changed in place

    def export(self, model: nn.Module) -> Payload:
        fresh = self.ctx.task.fresh(model)
        tensors: dict[str, Tensor] = {
            name: parameter.detach().float() for name, parameter in self.trainables(model).items()
        }
        tensors |= {FRESH_PREFIX + name: tensor for name, tensor in fresh_tensors(model, fresh).items()}
        config = {
            "method": self.ctx.slug, "vectors": self.names, "base_model": base_name(self.ctx.facts.model), "fresh": list(fresh),
            "meaning": "these vectors replace those of the base model",
        }  # fmt: skip
        return Payload(layout="bonsai", config=config, tensors=tensors)

    @torch.no_grad()
    def restore(self, model: nn.Module, payload: Payload) -> None:
        for name, parameter in self.trainables(model).items():
            parameter.copy_(payload.tensors[name])
        load_fresh(model, payload.tensors, self.ctx.task.fresh(model), FRESH_PREFIX)


class BiasNormTuning(TrainMethod):
    """Biases and norms learn, every matrix stands still."""

    card = Card(
        slug="bias-norm-tuning",
        title="Bias and norm tuning",
        pick_when="Pick this when the model only needs to be set right again, for example after many of its numbers were deleted, and the result should be "
        "tiny and the training as light as it gets.",
        summary="All large tables of numbers stay exactly as they are. Only two kinds of small ones move: the offsets that are added after a layer, and "
        "the knobs that set how loud each channel is. That is a few numbers in ten thousand, and zeros of a pruned model cannot come back.",
        paper="PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
        year=2023,
        arxiv="2312.15230",
        algorithm=(
            "Freeze everything.",
            "Let the gains and offsets of all norms learn, and the offsets of all other layers; either kind can be left out.",
            "Train with the usual loss; AdamW without decay for one number in ten thousand costs next to nothing.",
            "Export: the vectors themselves; or the whole model, which has its usual form.",
        ),
        avoid_when="The model must learn a new skill, or so much was deleted that turning channels up and down is not enough: take MaskLoRA.",
        traps=(
            "Models like Llama have no offsets at all: with 'biases' alone nothing would learn there, and that is refused. Only their norms move.",
            "These vectors must not decay towards zero; AdamW here leaves vectors alone.",
            "They take much larger steps than whole matrices: a rate for full fine-tuning hardly moves them.",
        ),
        figures=(
            Figure(
                claim="Parameters that are enough at moderate sparsity",
                paper="0.01 to 0.05 % (abstract of later versions)",
                ours="0.27 % bring back 40 % of the jump; a Llama has no offsets (stories260k, 60 % deleted by magnitude, "
                "200 steps, 2 seeds)",
            ),
        ),
        cost=Cost(time=1, memory=1, size=1),
        family="Sparsity",
    )  # fmt: skip
    slots = (Slot.PARAMETRIZATION,)
    presets = {"tiny": {}, "paper": {"parts": "both"}}

    class Params(HyperParams):
        """Hyperparameters of bias and norm tuning."""

        parts: VectorParts = dial(
            "both",
            label="What moves",
            tier="basic",
            paper="both",
            help="Both kinds of small numbers, the norms (how loud each channel is), or the biases (what is added after a layer).",
        )

        top_blocks: int | None = top_blocks_dial()

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        if vectors(facts.model.tensors, "both"):
            return super().supports(facts)
        return Verdict(
            False,
            f"{cls.card.title} trains offsets and norms, and this {facts.model.family} model has none.",
            "Choose LoRA or full fine-tuning.",
        )

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        if cls.claims(params, facts):
            return []
        other = "norms" if params.parts == "biases" else "biases"
        return [
            Fault(
                where="parts",
                what=f"With '{params.parts}' nothing would learn in this model.",
                why=f"A {facts.model.family} model has no {'offsets' if params.parts == 'biases' else 'norms'}.",
                way_out=f"Choose '{other}' or 'both'.",
                code="nothing_learns",
            )
        ]

    @classmethod
    def claims(cls, params: Any, facts: Facts) -> frozenset[str]:
        return frozenset(above(vectors(facts.model.tensors, params.parts), facts.model, params.top_blocks))

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        size = facts.model.num_parameters
        rate = 5e-2 if size < 2_000_000 else 3e-3 if size < 200_000_000 else 5e-4
        return [
            Suggestion(
                where="settings.learning_rate",
                value=rate,
                reason=f"Gains and offsets take far larger steps than matrices: {rate:g} suits a model of {size:,} parameters.",
            )
        ]

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        model, p = ctx.facts.model, self.params
        return [Vectors(ctx, above(vectors(model.tensors, p.parts), model, p.top_blocks))]
