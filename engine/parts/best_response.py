"""Linear layers that know how their weights would answer to other hyperparameters (arXiv 1903.03088), and those hyperparameters themselves.

With raw hyperparameters h [n] a layer holds two copies of its weight and a thin map M:
    c = M h, split into cw and cb [out]
    y = W x + b + cw * (Wh x) + cb * bh
which is the plain layer with W + diag(cw) Wh and b + cb * bh. While it learns, every example has an h of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.core.errors import bad_input
from engine.parts.ranges import Range, inverse_softplus

Copy = Literal["copy", "random"]


@dataclass(frozen=True)
class Knob:
    """One hyperparameter that is learned: its name, its range, and the value it starts from."""

    name: str
    range: Range
    start: float


@dataclass(frozen=True)
class Play:
    """What is in force during one forward pass: raw rows [B, n], one per example, and the values [B, n] of the regularisers or None for none."""

    rows: Tensor
    values: Tensor | None


class Knobs:
    """The learned hyperparameters of a run: raw numbers [n] and the scales [n] with which they are perturbed. No part of the model."""

    def __init__(self, knobs: Sequence[Knob], spread: float) -> None:
        self.knobs = tuple(knobs)
        self.raw = torch.tensor([knob.range.raw(knob.start) for knob in knobs]).requires_grad_()  # [n]
        self.scale = torch.full((len(knobs),), inverse_softplus(spread)).requires_grad_()  # [n], before softplus
        self.play: Play | None = None  # None: the noise-free raw numbers, no regulariser

    def __len__(self) -> int:
        return len(self.knobs)

    @property
    def names(self) -> list[str]:
        return [knob.name for knob in self.knobs]

    def place(self, name: str) -> int | None:
        """The column of a hyperparameter, or None when it is not learned here."""
        return self.names.index(name) if name in self.names else None

    def spread(self) -> Tensor:
        """The standard deviation of every raw number, [n], always above zero."""
        return F.softplus(self.scale)

    def values(self, raw: Tensor) -> Tensor:
        """Raw numbers [..., n] as values inside their ranges."""
        return torch.stack([knob.range.value(raw[..., at]) for at, knob in enumerate(self.knobs)], dim=-1)

    def current(self) -> Tensor:
        """The values without noise, [n]."""
        return self.values(self.raw.detach())

    def draw(self, examples: int, generator: torch.Generator) -> Tensor:
        """One perturbed row of raw numbers per example, [B, n]; differentiable in the raw numbers and the scales."""
        noise = torch.randn(examples, len(self), generator=generator).to(self.raw)  # [B, n]
        return self.raw + self.spread() * noise

    def entropy(self) -> Tensor:
        """The entropy of the perturbation: the sum of log(scale sqrt(2 pi e))."""
        return (self.spread().log() + 0.5 * math.log(2 * math.pi * math.e)).sum()

    @contextlib.contextmanager
    def playing(self, rows: Tensor, values: Tensor | None = None) -> Iterator[None]:
        """Let every layer see these rows, and the regularisers these values, until the end of the block."""
        before, self.play = self.play, Play(rows, values)
        try:
            yield
        finally:
            self.play = before

    def to(self, device: torch.device) -> None:
        """Move the numbers, keeping the tensors that an optimizer knows."""
        self.raw.data, self.scale.data = self.raw.data.to(device), self.scale.data.to(device)

    def state(self) -> dict[str, Tensor]:
        return {"raw": self.raw.detach().clone(), "scale": self.scale.detach().clone()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        self.raw.copy_(state["raw"])
        self.scale.copy_(state["scale"])


class HyperLinear(nn.Linear):
    """A linear layer with a best response: `weight`, `bias` as usual, their copies `hyper_weight`, `hyper_bias`, and `response` [out or 2 out, n].

    `response` starts at zero, so that the layer starts as the plain one, bit for bit. `pull` is the weight that weight decay pulls towards
    (None: zero). `dropout` is the column of the dropout rate of this layer's input.
    """

    pull: Tensor | None

    def __init__(
        self,
        plain: nn.Linear,
        knobs: Knobs,
        *,
        dropout: int | None = None,
        pull: bool = False,
        copy: Copy = "copy",
        generator: torch.Generator | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.knobs, self.dropout = knobs, dropout
        weight, bias = plain.weight.detach().float(), None if plain.bias is None else plain.bias.detach().float()
        if copy == "random":
            bound = 1.0 / math.sqrt(plain.in_features)
            weight = _uniform(weight, bound, generator)
            bias = None if bias is None else _uniform(bias, bound, generator)
        self.hyper_weight = nn.Parameter(weight.clone())
        self.hyper_bias = None if bias is None else nn.Parameter(bias.clone())
        rows = plain.out_features * (1 if bias is None else 2)
        self.response = nn.Parameter(torch.zeros(rows, len(knobs), device=weight.device))
        self.register_buffer("pull", plain.weight.detach().float().clone() if pull else None, persistent=False)
        self.train(plain.training)

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by their short names."""
        return dict(self.named_parameters(recurse=False))

    def forward(self, x: Tensor) -> Tensor:
        play = self.knobs.play
        if play is None:  # without noise the two copies are one plain layer
            return F.linear(x, *self.effective())
        examples = play.rows.shape[0]
        if x.shape[0] != examples:
            raise bad_input("methods", f"A layer was given {x.shape[0]:,} rows for {examples:,} examples.",
                            "Every example has hyperparameters of its own, so each row that a layer sees must belong to one example.",
                            "Choose other layers, or another model: this one mixes its examples inside.", "rows_are_mixed")  # fmt: skip
        around = (examples, *[1] * (x.dim() - 2))
        if self.training and play.values is not None and self.dropout is not None:
            x = dropped(x, play.values[:, self.dropout].view(*around, 1))
        cw, cb = self.modulation(play.rows)  # [B, out] each
        y = F.linear(x, self.weight, self.bias)  # [B, ..., out]
        y = y + (cw.view(*around, -1) * F.linear(x, self.hyper_weight)).to(y.dtype)
        if cb is not None and self.hyper_bias is not None:
            y = y + (cb * self.hyper_bias).view(*around, -1).to(y.dtype)
        return y

    def modulation(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """cw and cb for rows of raw numbers [..., n]: [..., out] each, in full precision."""
        with torch.autocast(rows.device.type, enabled=False):
            c = F.linear(rows.to(self.response.dtype), self.response)  # [..., out or 2 out]
        return c[..., : self.out_features], None if self.hyper_bias is None else c[..., self.out_features :]

    def effective(self, raw: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and bias [out] of the plain layer at raw numbers [n]; by default the current ones."""
        cw, cb = self.modulation(self.knobs.raw.detach() if raw is None else raw)  # [out]
        weight = self.weight + cw[:, None] * self.hyper_weight
        if cb is None or self.hyper_bias is None:
            return weight, self.bias
        return weight, self.bias + cb * self.hyper_bias

    def half_square(self, rows: Tensor) -> Tensor:
        """Half the squared distance of every example's weight from `pull`, [B]; no [B, out, in] is formed."""
        cw, _ = self.modulation(rows)  # [B, out]
        weight = self.weight if self.pull is None else self.weight - self.pull
        fixed, cross, own = (
            weight.square().sum(1),
            (weight * self.hyper_weight).sum(1),
            self.hyper_weight.square().sum(1),
        )  # [out]
        return 0.5 * (fixed + 2 * cw * cross + cw.square() * own).sum(-1)

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """The same function as an nn.Linear, at the current numbers without noise."""
        weight, bias = self.effective()
        out = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        out.weight = nn.Parameter(weight.clone())
        if bias is not None:
            out.bias = nn.Parameter(bias.clone())
        return out.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hyperparameters={len(self.knobs)}"


def dropped(x: Tensor, rate: Tensor) -> Tensor:
    """Inverted dropout with a rate for every example, `rate` broadcast over x; drawn from the global generator, as torch's own dropout."""
    keep = torch.rand_like(x, dtype=torch.float32) >= rate
    return x * (keep / (1.0 - rate)).to(x.dtype)


def _uniform(like: Tensor, bound: float, generator: torch.Generator | None) -> Tensor:
    drawn = torch.rand(like.shape, generator=generator) * 2 - 1
    return (drawn * bound).to(like)
