"""SLERP: two models are blended along an arc instead of a straight line (Shoemake 1985; used for merging by mergekit)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from engine.core.method import Card, Cost, Figure
from engine.core.params import HyperParams, dial
from engine.parts.merging import PIECE, MergeMethod, heads_dial, siblings

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder, TransformContext

_PARALLEL = 0.9995  # above this cosine an arc is a straight line, and sin(angle) in the divisor is nearly zero


class Slerp(MergeMethod):
    """theta = sin((1-t) a)/sin(a) theta_0 + sin(t a)/sin(a) theta_1, a the angle between the two."""

    order = "the model is share 0, the further model share 1"

    num_models = (2, 2)
    presets = {"tiny": {}, "paper": {"t": 0.5}}
    card = Card(
        slug="slerp",
        title="SLERP",
        pick_when="Pick this when you want to blend exactly two models of one family and choose freely how much of each is in the mixture.",
        summary="A straight average of two directions is shorter than both, so an average of two quite different models loses strength. This blend goes "
        "along the arc between them and keeps the length. For models that hardly differ it is the same as an average.",
        paper="Animating Rotation with Quaternion Curves (SIGGRAPH)",
        year=1985,
        family="Merging",
        algorithm=(
            "Inputs: the model (share 0) and one further model (share 1), as equals; the base is not needed.",
            "For every tensor: flatten both, and take the angle a between them.",
            "If they are nearly parallel (cosine above 0.9995) or one is zero: blend straight, (1-t) theta_0 + t theta_1.",
            "Otherwise theta = sin((1-t) a)/sin(a) theta_0 + sin(t a)/sin(a) theta_1. Write tensor by tensor.",
        ),
        avoid_when="There are more than two models, or the two do very different jobs: then use TIES or parameter competition with the base.",
        traps=(
            "Fine-tuned copies of one base are nearly parallel, so the arc hardly differs from the average: do not expect wonders.",
            "The angle of a tensor is meaningless for tiny tensors such as norms; mixed straight or along the arc, they come out about the same.",
        ),
        figures=(
            Figure(
                claim="Llama of 260 thousand numbers, a novel and a science book, mean held-out loss of the middle of the arc",
                paper="not given",
                ours="2.898, the same as the average (2 seeds)",
            ),
        ),
        cost=Cost(time=1, memory=1, size=5),
    )

    class Params(HyperParams):
        """How far along the arc."""

        t: float = dial(
            0.5,
            label="Share of the second model",
            unit="share",
            low=0.0,
            high=1.0,
            tier="basic",
            help="0 gives the first model, 1 the second, 0.5 the middle of the arc.",
        )
        angle: Literal["tensor", "model"] = dial(
            "tensor",
            label="Angle taken over",
            help="'tensor' uses the angle of each table of numbers by itself, 'model' one angle over all of them.",
        )
        heads: Literal["refuse", "first"] = heads_dial("refuse", "first")

    def apply(self, inputs: Sequence[ModelFolder], out: OutFolder, ctx: TransformContext) -> None:
        """Write the blend of two models."""
        self.require_models(inputs)
        family = siblings(inputs, ctx, heads=self.params.heads)
        t = self.params.t
        straight: set[str] = set()

        def pair(name: str) -> tuple[Tensor, Tensor]:
            return family.read(inputs[0], name).reshape(-1), family.read(inputs[1], name).reshape(-1)

        whole = torch.zeros(3, dtype=torch.float64)
        if self.params.angle == "model":
            for name in family.names:
                whole += _products(*pair(name))

        def blend(name: str) -> Tensor:
            first, second = pair(name)
            shares, along_arc = arc_shares(whole if self.params.angle == "model" else _products(first, second), t)
            if not along_arc:
                straight.add(name)
            return first * shares[0] + second * shares[1]

        family.write(out, ctx, blend)
        ctx.report.update(blended_straight=len(straight), blended_along_the_arc=len(family.names) - len(straight))


def arc_shares(products: Tensor, t: float) -> tuple[tuple[float, float], bool]:
    """The factors of the two vectors from (v0.v1, v0.v0, v1.v1), and whether they lie on an arc: not if parallel, or one is zero."""
    dot, first, second = products.tolist()
    cosine = dot / math.sqrt(first * second) if first and second else 1.0
    if abs(cosine) > _PARALLEL:
        return (1 - t, t), False
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)), True


def _products(first: Tensor, second: Tensor) -> Tensor:
    """(v0.v1, v0.v0, v1.v1) in fp64, in pieces."""
    total = torch.zeros(3, dtype=torch.float64)
    for one, other in zip(first.split(PIECE), second.split(PIECE), strict=True):
        a, b = one.double(), other.double()
        total += torch.stack([a @ b, a @ a, b @ b])
    return total
