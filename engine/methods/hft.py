"""Half fine-tuning: train a random half of the matrices of every layer, lock the other half, and draw anew each round (arXiv 2404.18466)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from engine.core.errors import EngineError, Fault
from engine.core.facts import Facts, ModelFacts
from engine.core.method import Card, Cost, Figure, Suggestion, TrainMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.blocks import Granularity, Half, Layout, draw_half, find_blocks
from engine.parts.optimizers import full_rate
from engine.train.parts import Parametrization, PartContext, Payload


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which tensors learn in this round and which are locked, drawn from names alone."""

    layout: Layout
    half: Half
    granularity: Granularity
    round_number: int
    trained: frozenset[str]
    frozen: frozenset[str]


class HalfTuning(Parametrization):
    """Whole tensors learn or stand still; nothing is added to the model, so the result is an ordinary model of the same kind."""

    def __init__(self, plan: Plan, ctx: PartContext, params: HalfFineTuning.Params) -> None:
        self.plan, self.ctx, self.params = plan, ctx, params
        self._trained: dict[str, nn.Parameter] = {}
        self._fresh: dict[str, nn.Parameter] = {}

    def attach(self, model: nn.Module) -> None:
        """Lock what was not drawn. Tied tensors (embedding and head in one) learn once, under the name that comes first."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        lost = sorted(name for name in self.plan.half.chosen | self.plan.half.left if name not in parameters)
        if lost:
            raise EngineError(
                Fault(
                    where="model.source",
                    what=f"The loaded model has no weight called {lost[0]}, although its files do.",
                    why="Half fine-tuning draws its half from the names in the model's files.",
                    way_out="Use full fine-tuning for this model.",
                    code="names_differ",
                ),
                "environment",
            )
        fresh = self.ctx.task.fresh(model)
        held: set[int] = set()
        for name, parameter in parameters.items():
            new = any(name == module or name.startswith(f"{module}.") for module in fresh)
            if id(parameter) in held or not (new or name in self.plan.trained):
                continue
            held.add(id(parameter))
            (self._fresh if new else self._trained)[name] = parameter
        for name, parameter in parameters.items():
            if name in self.plan.frozen and id(parameter) not in held:
                parameter.requires_grad_(False)

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return dict(self._trained)

    def merge(self, model: nn.Module) -> bool:
        return True  # the weights were changed in place: there is nothing to fold in

    def export(self, model: nn.Module) -> Payload:
        """The difference from the base for every tensor that learned; new layers, which have no base, whole."""
        ctx = self.ctx
        base = ctx.task.load_model(ctx.facts.model, ctx.facts.data, dtype=torch.float32, seed=ctx.recipe.settings.seed)
        before = dict(base.named_parameters(remove_duplicate=False))
        tensors: dict[str, Tensor] = {
            name: parameter.detach().float().cpu() - before[name].detach() for name, parameter in self._trained.items()
        }
        tensors.update({name: parameter.detach().float().cpu() for name, parameter in self._fresh.items()})
        shapes = ctx.facts.model.tensors
        return Payload(
            layout="bonsai",
            tensors=tensors,
            config={
                "form": "delta",
                "round": self.plan.round_number,
                "mask_seed": self.params.mask_seed,
                "granularity": self.plan.granularity,
                "ratio": self.params.ratio,
                "ratios": self.plan.half.ratios(self.plan.layout, shapes),
                "trained": sorted(self._trained),
                "frozen": sorted(self.plan.frozen),
                "whole": sorted(self._fresh),
            },
        )

    @torch.no_grad()
    def restore(self, model: nn.Module, payload: Payload) -> None:
        expected = {**self._trained, **self._fresh}
        if payload.tensors.keys() != expected.keys():
            other = sorted(payload.tensors.keys() ^ expected.keys())
            raise EngineError(
                Fault(
                    where="adapter",
                    what=f"This file belongs to another half of the model: {other[0]} is in one and not in the other.",
                    why="Round, seed, share or model differ from those it was made with.",
                    way_out="Use the recipe that lies beside the file.",
                    code="other_mask",
                )
            )
        for name, parameter in expected.items():
            tensor = payload.tensors[name].to(parameter)
            if name in self._fresh:
                parameter.copy_(tensor)
            else:
                parameter.add_(tensor)


class HalfFineTuning(TrainMethod):
    """Trains a random half of every layer and locks the rest."""

    slots = (Slot.PARAMETRIZATION,)
    presets = {"tiny": {}, "paper": {"granularity": "category", "ratio": 0.5, "outside": "trained"}}
    card = Card(
        slug="hft",
        title="Half fine-tuning",
        pick_when="Pick this when ordinary full fine-tuning teaches the new skill but makes the model forget what it knew, and you want the "
        "same training with only a random half of the weights unlocked.",
        summary="Every layer of the model has a handful of large tables of numbers. This method draws half of them in each layer, lets those learn and "
        "locks the others, so half of what the model knew cannot be overwritten. The result is an ordinary model of the same kind. Train "
        "again on something else and a new half is drawn.",
        paper="HFT: Half Fine-Tuning for Large Language Models",
        year=2024,
        arxiv="2404.18466",
        family="Selection",
        algorithm=(
            "A round is one training stage. Draw a mask at its start; it stays for the whole round.",
            "In every layer choose 2 of the 4 attention matrices {q, k, v, o} to train and lock the other 2.",
            "Feed-forward with three matrices: in half of the layers train 1 of 3, in the other half 2 of 3, which is half in sum. With two matrices: 1 of 2.",
            "Norms: 1 of 2. Biases go with their matrix. Embeddings and the output layer are always trained, unless you lock them.",
            "Lock whole tensors (no gradient) and give only the others to the optimizer; everything else is full fine-tuning.",
            "Next round: start from the resulting weights and draw anew; a matrix locked now may learn then.",
        ),
        avoid_when="The new task is far from anything the model knows and forgetting does not matter: full fine-tuning learns it a little better. "
        "Where memory is short, LoRA or PaCA need much less.",
        traps=(
            "With grouped-query attention k and v are smaller than q and o, so half by number is not half by size; the result states both.",
            "An odd number of layers cannot be halved exactly; the result states the true share.",
            "Masking gradients element by element saves nothing, and weight decay still moves what should be locked. Here whole tensors leave the optimizer.",
            "Reusing one mask for all rounds loses the benefit in a sequence of tasks: the round is counted on when you start from a result of this method.",
            "Models with fused matrices (GPT-2, Phi-3, ModernBERT) cannot be drawn matrix by matrix; whole layers are drawn there instead.",
            "The time saved is the weight gradients and the optimizer step; the backward pass still goes through every layer.",
        ),
        figures=(
            Figure(
                claim="Llama-2-7B on Tulu V2, mean of six benchmarks: base, full, half",
                paper="34.4, 41.0, 42.9 (unconfirmed, secondary note)",
            ),
            Figure(
                claim="Llama-2-7B, knowledge kept (three question sets): base, full, half",
                paper="22.9, 14.7, 18.1 (unconfirmed, secondary note)",
            ),
            Figure(
                claim="TRACE, eight tasks in sequence, 7B: full against half",
                paper="45.7 → 51.3 (unconfirmed, secondary note)",
            ),
            Figure(
                claim="TRACE 7B, drawn by model, layer, category",
                paper="46.9, 47.9, 51.3 (unconfirmed, secondary note)",
            ),
            Figure(
                claim="Training time against full fine-tuning",
                paper="about 30 % less (abstract)",
                ours="28 % less with the word table and the output layer locked, 10 % less with them (Llama, 52 M, 32,000 words, one CPU core)",
            ),
            Figure(
                claim="A 260,000-parameter story model trained 200 steps on another domain, 3 seeds: rise of the loss on stories, loss on the "
                "new domain; full, then half",
                paper="not measured",
                ours="+1.06 and 2.24, then +0.87 and 2.33; drawn by layer +0.95 and 2.31",
            ),
        ),
        cost=Cost(time=3, memory=4, size=5),
    )

    class Params(HyperParams):
        """How the half is drawn."""

        ratio: float = dial(
            0.5,
            label="Share that learns",
            unit="share",
            low=0.1,
            high=0.9,
            tier="basic",
            help="The share of each layer's matrices that may change. Less keeps more of what the model knew.",
        )
        outside: Literal["trained", "frozen"] = dial(
            "trained",
            label="Word table and output layer",
            tier="basic",
            help="The word table and the output layer lie outside the layers; they learn too, unless you lock them.",
        )
        granularity: Literal["auto", "category", "layer", "model"] = dial(
            "auto",
            label="How the half is drawn",
            paper="category",
            suggested="Matrix by matrix, or whole layers where matrices are fused.",
            help="'category' draws in every layer and every kind of matrix, 'layer' draws whole layers, 'model' draws from all matrices at once.",
        )
        mask_seed: int = dial(
            17,
            label="Seed of the draw",
            unit="1",
            low=0,
            high=2**31 - 1,
            help="The same seed and round draw the same half.",
        )
        round: int | None = dial(
            None,
            label="Round",
            unit="rounds",
            low=1,
            high=100_000,
            suggested="One more than that of the model it starts from.",
            help="Counts the training stages of one model; each round draws a new half.",
        )

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        if not find_blocks(facts.model.tensors).blocks:
            return Verdict(
                False,
                "Half fine-tuning draws from the layers of a transformer, and the names in this model show no layers with attention.",
                "Choose a transformer model, or full fine-tuning.",
            )
        return super().supports(facts)

    @classmethod
    def check(cls, params: Params, facts: Facts) -> list[Fault]:
        layout = find_blocks(facts.model.tensors)
        faults = []
        if params.granularity == "category" and layout.fused:
            names = ", ".join(sorted({module.place for module in layout.fused}))
            faults.append(
                Fault(
                    where="granularity",
                    code="fused_matrices",
                    what=f"This model keeps several matrices in one: {names}.",
                    why="A half of every kind cannot be drawn when one tensor holds several kinds: a tensor learns as a whole or not at all.",
                    way_out="Choose 'layer', which draws whole layers, or leave it on 'auto'.",
                )
            )
        if _granularity(params, layout) == "layer" and len(layout.blocks) < 2:
            faults.append(
                Fault(
                    where="granularity",
                    what="This model has one layer.",
                    why="Half of one layer cannot be drawn by whole layers.",
                    way_out="Choose 'model'.",
                    code="one_layer",
                )
            )
        return faults

    @classmethod
    def suggest(cls, recipe: Recipe, params: Params, facts: Facts) -> list[Suggestion]:
        index = next((place for place, ref in enumerate(recipe.methods) if ref.slug == cls.card.slug), 0)
        number, parent = _next_round(facts.model), _previous_round(facts.model)
        rate = full_rate(facts.model)
        return [
            Suggestion(
                where=f"methods[{index}].params.round",
                value=number,
                reason=f"The model came out of round {parent}." if parent else "The model comes fresh from its maker.",
            ),
            Suggestion(
                where="settings.learning_rate",
                value=rate,
                reason=f"Half fine-tuning uses the rate of full fine-tuning, {rate:g} for a model of {facts.model.num_parameters:,} parameters.",
            ),
        ]

    @classmethod
    def claims(cls, params: Params, facts: Facts) -> frozenset[str]:
        return make_plan(params, facts.model).trained

    def parts(self, ctx: PartContext) -> Sequence[Parametrization]:
        return [HalfTuning(make_plan(self.params, ctx.facts.model), ctx, self.params)]


def make_plan(params: HalfFineTuning.Params, model: ModelFacts) -> Plan:
    """Draw this round's half from the names and shapes of the model's tensors."""
    layout = find_blocks(model.tensors)
    granularity = _granularity(params, layout)
    number = params.round or _next_round(model)
    half = draw_half(layout, seed=params.mask_seed, round_number=number, ratio=params.ratio, granularity=granularity)
    outside = frozenset(layout.outside)
    learns = params.outside == "trained"
    return Plan(
        layout=layout,
        half=half,
        granularity=granularity,
        round_number=number,
        trained=half.chosen | outside if learns else half.chosen,
        frozen=half.left if learns else half.left | outside,
    )


def _granularity(params: HalfFineTuning.Params, layout: Layout) -> Granularity:
    if params.granularity != "auto":
        return params.granularity
    return "layer" if layout.fused and len(layout.blocks) > 1 else "model" if layout.fused else "category"


def _next_round(model: ModelFacts) -> int:
    return _previous_round(model) + 1


def _previous_round(model: ModelFacts) -> int:
    """The round that the model came out of, when it is a result of this method; 0 when it is not."""
    try:
        description = json.loads((Path(model.path).parent / "artifact.json").read_text(encoding="utf-8"))
        rounds = [
            item["params"]["round"] for item in description["methods"] if item["slug"] == HalfFineTuning.card.slug
        ]
        return max((int(number) for number in rounds), default=0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0
