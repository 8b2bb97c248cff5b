"""Linear layers beside which rank-one pieces grow: W + s * sum_j b_j e_j a_j, and a score that says how much more a layer would gain.

Pieces come in bundles: an active one has learnable a, b and e; one in reserve has learnable a and b and a fixed, tiny e, and acts in training only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine.parts.lowrank_product import low_rank_product

RESERVE = 1e-5  # e of a piece in reserve: enough for gradients, too little to be heard
SPREAD = 0.02  # standard deviation of new a and b


class Pieces(nn.Module):
    """A bundle of m rank-one pieces: a [m, in], b [out, m], e [m]; without an own e it is in reserve."""

    def __init__(self, a: Tensor, b: Tensor, e: Tensor | None) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.e = None if e is None else nn.Parameter(e)

    @property
    def active(self) -> bool:
        return self.e is not None

    def __len__(self) -> int:
        return self.a.shape[0]

    def weights(self) -> Tensor:
        """e of every piece: learned, or the constant of the reserve."""
        return self.e if self.e is not None else self.a.new_full((len(self),), RESERVE)


class Disorder(torch.autograd.Function):
    """||A A^T - I||_F + ||B^T B - I||_F for A [k, in] and B [out, k]; d/dA = 2 (A A^T - I) A / ||A A^T - I||_F, and 0 where the norm is 0."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _off_identity(a)[1] + _off_identity(b.t())[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        (off_a, norm_a), (off_b, norm_b) = _off_identity(a), _off_identity(b.t())
        tiny = torch.finfo(norm_a.dtype).tiny
        return (off_a * (2 * grad / norm_a.clamp(min=tiny))) @ a, b @ (off_b * (2 * grad / norm_b.clamp(min=tiny)))


def _off_identity(rows: Tensor) -> tuple[Tensor, Tensor]:
    """R R^T - I [k, k] and its Frobenius norm, for R [k, n]."""
    gram = rows @ rows.t()
    gram.diagonal().sub_(1.0)
    return gram, torch.linalg.vector_norm(gram)


class GrowingLinear(nn.Linear):
    """A frozen linear layer with growing pieces beside it. `divisor` None divides the strength by the number of active pieces at the moment."""

    def __init__(self, plain: nn.Linear, *, alpha: float, divisor: int | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.alpha, self.divisor = alpha, divisor
        self.bundles: list[Pieces] = []
        self.listening = False
        self.score: Tensor | None = None  # of the step in progress, over all micro-batches heard so far
        self._heard: Tensor | None = None
        self.train(plain.training)

    # ── structure ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def shape(self) -> list[list[int]]:
        """Size and activity of every bundle, as JSON."""
        return [[len(bundle), int(bundle.active)] for bundle in self.bundles]

    def rebuild(self, shape: Sequence[Sequence[int]]) -> None:
        """Make empty bundles of a saved shape; the values come afterwards."""
        self._put([])
        for size, active in shape:
            self.append(self._zeros(size, self.in_features), self._zeros(self.out_features, size), bool(active))
        self.forget()

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """New a [size, in] and b [out, size], normal with a small spread, drawn on the CPU."""
        a = torch.randn(size, self.in_features, generator=generator) * SPREAD
        b = torch.randn(self.out_features, size, generator=generator) * SPREAD
        return a.to(self.weight.device), b.to(self.weight.device)

    def append(self, a: Tensor, b: Tensor, active: bool, e: float = 0.0) -> Pieces:
        """Add a bundle at the end."""
        bundle = Pieces(a, b, self._zeros(a.shape[0]) + e if active else None)
        self._put([*self.bundles, bundle])
        return bundle

    def pop(self) -> Pieces:
        """Take the last bundle away."""
        *rest, last = self.bundles
        self._put(rest)
        return last

    def _put(self, bundles: list[Pieces]) -> None:
        self.bundles = bundles
        for name in [name for name, _ in self.named_children()]:
            delattr(self, name)
        for number, bundle in enumerate(bundles):
            self.add_module(f"pieces{number}", bundle)

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(*size, device=self.weight.device)

    @property
    def rank(self) -> int:
        return sum(len(bundle) for bundle in self.bundles if bundle.active)

    @property
    def reserve(self) -> Pieces | None:
        """The bundle that waits for its activation; always the last one."""
        return self.bundles[-1] if self.bundles and not self.bundles[-1].active else None

    @property
    def scale(self) -> float:
        return self.alpha / max(1, self.rank if self.divisor is None else self.divisor)

    # ── what it computes ──────────────────────────────────────────────────────────────────────────────────────────────

    def stacked(self, *, reserve: bool) -> tuple[Tensor, Tensor, Tensor]:
        """A [k, in], e [k], B [out, k] of all bundles, or of the active ones."""
        chosen = [bundle for bundle in self.bundles if reserve or bundle.active]
        if len(chosen) == 1:
            return chosen[0].a, chosen[0].weights(), chosen[0].b
        return (
            torch.cat([bundle.a for bundle in chosen]),
            torch.cat([bundle.weights() for bundle in chosen]),
            torch.cat([bundle.b for bundle in chosen], dim=1),
        )

    def delta(self, *, reserve: bool) -> Tensor:
        """What the pieces add to the weight: [out, in], fp32."""
        a, e, b = self.stacked(reserve=reserve)
        return (b * (self.scale * e)) @ a

    def forward(self, x: Tensor) -> Tensor:
        a, e, b = self.stacked(reserve=self.training)
        return low_rank_product(x, self.weight, self.bias, a, b * e, self.scale, self._hear if self.listening else None)

    # ── the score ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def _hear(self, dense: Tensor) -> None:
        """From the dL/dDelta [out, in] of one backward pass, added up over the micro-batches of a step: sum |Delta * dL/dDelta| / sqrt(out * in).

        The absolute value stands inside the sum, so the dense product cannot be avoided; it lives for the scored step only.
        """
        self._heard = dense if self._heard is None else self._heard.add_(dense)
        total = torch.linalg.vector_norm(self.delta(reserve=True).mul_(self._heard), ord=1)
        self.score = total / math.sqrt(self.out_features * self.in_features)

    def forget(self) -> None:
        """Drop what was heard in a step."""
        self.score = self._heard = None

    def disorder(self) -> Tensor:
        """||A A^T - I||_F + ||B^T B - I||_F over all pieces of the layer together, those in reserve too."""
        a, _, b = self.stacked(reserve=True)
        found: Tensor = Disorder.apply(a, b)
        return found

    # ── taking it home ────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """The active pieces as A = e * a [r, in] and B [out, r]; pieces with e = 0 are dropped, but one stays."""
        a, e, b = self.stacked(reserve=False)
        keep = e.nonzero().flatten() if bool(e.any()) else torch.zeros(1, dtype=torch.long, device=e.device)
        return (e[:, None] * a)[keep], b[:, keep].contiguous()

    def load(self, a: Tensor, b: Tensor, scale: float) -> None:
        """Take over a saved pair: scale * b a is what the layer adds from now on."""
        self._put([])
        bundle = self.append(a.to(self.weight.device).float(), b.to(self.weight.device).float(), True)
        with torch.no_grad():
            bundle.weights().fill_(scale / self.scale)

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """The same layer as an nn.Linear with the active pieces folded into its weight, in fp32."""
        out = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        self.weight.data = self.weight.data.float() + self.delta(reserve=False)
        out.weight, out.bias = self.weight, self.bias
        return out.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"
