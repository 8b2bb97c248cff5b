"""SAID and DID: the whole model moves along a few hundred random directions, and only how far along each one is learned (arXiv 2012.13255)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, Suggestion, TrainMethod, Verdict
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.core.slots import Slot
from engine.parts.subspace import EVERYTHING, Shape, Subspace, num_scales, shape_faults, suggested_rate, tensors_of
from engine.train.parts import PartContext


class Said(TrainMethod):
    """theta_i = theta_0i + lambda_i P(z)_i; only z and lambda learn."""

    card = Card(
        slug="said",
        title="SAID subspace tuning",
        pick_when="Pick this when you want to ship what a model has learned as a few hundred numbers and a seed, or to find out how many numbers a task "
        "really needs on top of a given model.",
        summary="Every weight of the model may move, but only along a few fixed random directions that are drawn from a seed. The run learns how far "
        "to go along each of them, and how strongly each layer follows. The result is a file of a few kilobytes: whoever has the same model and the "
        "same seed can make the whole fine-tuned model from it.",
        paper="Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
        year=2020,
        arxiv="2012.13255",
        algorithm=(
            "Let theta_0 be all chosen weights; they are frozen, and d numbers learn instead of them.",
            "DID: theta = theta_0 + P z with z [d], starting at 0; P is random, fixed and never stored as a matrix.",
            "SAID: m of the d numbers become scales, one for each layer (or tensor): theta_i = theta_0i + lambda_i P(z)_i, lambda starts at 1.",
            "P of a tensor with n entries (Fastfood): L = 2^ceil(log2 max(n, d)); draw signs B, an order Pi and normal numbers G from the seed and the name "
            "of the tensor; put zeros behind z; v = H (G * (H (B * z))[Pi]) with the Walsh-Hadamard transform H; keep n entries, divide by sqrt(n * sum G^2).",
            "So every tensor moves by about as much as z is long. One map over all tensors together, which spreads by size instead, is a choice.",
            "Compute all weights anew for each batch, forward, and pull the gradient back: dz = sum of lambda_i P_i^T g_i, dlambda_i = <P_i^T g_i, z>.",
            "A new classifier lies inside the subspace too, so that d is the true count; it may be set free.",
            "Export: {seed, version of the generator, z, lambda} and a hash of the starting weights; or the merged model.",
        ),
        avoid_when="Steps must be quick (all weights are computed anew for each batch, and the gradient of every one is needed), the model has more than "
        "about 10 million numbers and there is only a CPU, or the best possible score matters more than the size of the result: LoRA learns more.",
        traps=(
            "Released code divides the backward transform by sqrt(L) although its forward one does not: the gradient of each tensor shrinks by L and "
            "biases dominate. Here the gradient is the true one, tested against a dense matrix.",
            "Released code counts the scales wrongly. Here z and lambda together are exactly d numbers; a classifier that is set free comes on top and is "
            "counted in the result.",
            "Map by tensor and one map over everything give different answers: by tensor, a small bias moves as far as a large matrix.",
            "Where a tensor has fewer entries than d, released code cuts z. Here the transform is made longer, so that every tensor sees all of z.",
            "The draw depends on the random library: the file holds a mark of it and is refused where it cannot be drawn again.",
            "The transform runs in fp32 whatever the number format of the run.",
            "The learning rate is higher than usual: a step of size r moves every tensor by about r * sqrt(d).",
            "Weights that are tied move once.",
            "Weight decay on z is not weight decay on the weights.",
        ),
        figures=(
            Figure(claim="d90 of RoBERTa-Large on MRPC, SAID and DID", paper="207, 322 (Table 1)"),
            Figure(
                claim="d90 of a base model, SAID and DID",
                paper="1608, 1861 (BERT-Base on MRPC, Table 1)",
                ours="58, 64 (a pretrained network of 8,970 numbers on digits, geometric mean of 3 seeds)",
            ),
            Figure(
                claim="Score against d, and full fine-tuning",
                paper="rises and levels off near the full score",
                ours="14 % right with 8 numbers, 67 % with 32, 95.5 % with 128, 95.9 % with 512; full 96.8 % (digits, SAID, 2 seeds)",
            ),
            Figure(
                claim="Time of a step against LoRA of rank 1",
                paper="not measured",
                ours="1.42 (Llama, 13 M, 4 x 256 tokens, one CPU core); full fine-tuning, which needs the gradient of every weight too, takes 1.23",
            ),
            Figure(claim="d90 of RoBERTa-Base on QQP, SAID and DID", paper="896, 1389 (Table 1)"),
        ),
        cost=Cost(time=4, memory=3, size=1),
        family="Subspaces",
    )
    slots = (Slot.PARAMETRIZATION,)
    presets = {"tiny": {"d": 200}, "paper": {"d": 1000, "mode": "said", "scales": "layer", "head": "inside"}}

    class Params(HyperParams):
        """Hyperparameters of SAID."""

        d: int = dial(
            1000,
            label="Numbers that learn",
            unit="numbers",
            low=2,
            high=1_000_000,
            tier="basic",
            paper="10 to 10,000",
            help="How many numbers may change in all. About a thousand is often enough for a pretrained model; more learn more.",
        )
        mode: Literal["said", "did"] = dial(
            "said",
            label="Scale the layers",
            tier="basic",
            paper="said",
            help="said gives up a few of the numbers for one scale a layer, which decides how strongly it follows; did has none.",
        )
        scales: Literal["layer", "tensor"] = dial(
            "layer",
            label="What has a scale",
            paper="layer",
            help="With said: one scale for each layer (all weights outside of the layers share one), or one for each single tensor.",
        )
        head: Literal["inside", "free"] = dial(
            "inside",
            label="A new classifier",
            paper="inside (unconfirmed)",
            help="inside: a new classifier moves along the same random directions and costs no further numbers. free: all its numbers learn, on top.",
        )
        spread: Literal["tensor", "whole"] = dial(
            "tensor",
            label="Random map",
            paper="tensor",
            help="tensor: each tensor has its own map and moves equally far. whole: one map over everything, so that large tensors move further.",
        )
        projection: Literal["fastfood", "dense"] = dial(
            "fastfood",
            label="Kind of map",
            paper="fastfood",
            help="fastfood needs hardly any memory; dense is a plain random matrix, for small models only.",
        )
        dense_spread: float = dial(
            0.01,
            label="Spread of the dense map",
            unit="1",
            low=1e-6,
            high=10.0,
            paper=0.01,
            help="How large the entries of a dense map are; it multiplies every step.",
        )
        targets: str = dial(
            EVERYTHING,
            label="Weights",
            paper=EVERYTHING,
            help="Which weights may move: all, all-linear, attention, feed-forward, or names of layers with commas between them.",
        )
        map_seed: int | None = dial(
            None,
            label="Seed of the map",
            unit="1",
            low=0,
            high=2**31 - 1,
            suggested="The seed of the run.",
            help="Another seed draws other random directions.",
        )
        train_scales: bool = dial(
            True, label="Learn the scales", help="Switched off, the scales stay at 1 and said does what did does."
        )

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        if not facts.model.tensors:
            return Verdict(
                False,
                "No weights of this model are known by name, so there is nothing to move.",
                "Choose a transformer model, or full fine-tuning.",
            )
        return super().supports(facts)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        return shape_faults(shape_of(params), params.targets, facts)

    @classmethod
    def claims(cls, params: Any, facts: Facts) -> frozenset[str]:
        return frozenset(tensors_of(params.targets, facts.model))

    @classmethod
    def num_trainable(cls, params: Any, facts: Facts) -> int:
        if params.mode == "said" and not params.train_scales:
            return int(params.d) - num_scales(tensors_of(params.targets, facts.model), params.scales, facts.model)
        return int(params.d)

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        index = next((place for place, ref in enumerate(recipe.methods) if ref.slug == cls.card.slug), 0)
        rate = suggested_rate(params.d)
        return [
            Suggestion(
                where="settings.learning_rate",
                value=rate,
                reason=f"A step of the size r moves every tensor by about r * sqrt({params.d:,}); {rate:g} makes steps of a size that pretrained models take well.",
            ),
            Suggestion(
                where=f"methods[{index}].params.map_seed",
                value=recipe.settings.seed,
                reason="The random directions follow the seed of the run.",
            ),
        ]

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        p = self.params
        seed = ctx.recipe.settings.seed if p.map_seed is None else p.map_seed
        return [Subspace(ctx, tensors_of(p.targets, ctx.facts.model), shape_of(p, seed))]


def shape_of(params: Any, seed: int = 0) -> Shape:
    """The hyperparameters as the shape of a subspace."""
    return Shape(
        d=params.d,
        scales=params.scales if params.mode == "said" else "none",
        spread=params.spread,
        projection=params.projection,
        dense_spread=params.dense_spread,
        seed=seed,
        head=params.head,
        frozen_scales=not params.train_scales,
    )
