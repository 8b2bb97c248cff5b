"""Fixed random linear maps from a few numbers to many: the fast Walsh-Hadamard transform, Fastfood, and a dense matrix to compare with.

A map P [n, d] is drawn on the CPU from a generator and never learns. Fastfood keeps about 3 L numbers of it (L = next power of two, at least n and d)
and applies it in L log L steps, where a dense P would need n * d of both. Every map knows its true adjoint P^T, so that gradients are exact:
the unnormalised transform H is symmetric, hence its adjoint is H itself, without any factor.
"""

from __future__ import annotations

import functools
import hashlib
from math import sqrt
from typing import Any, Protocol

import torch
from torch import Tensor

# How the vectors are drawn. Raise it whenever the order or the kind of a draw changes: files made with another version are refused.
GENERATOR = "fastfood/1"
_FACTOR = 5  # transforms are cut into products with Hadamard matrices of at most 2^5: few passes over memory, still cheap to multiply


def power_above(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


# ── the transform ─────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=64)
def hadamard_matrix(exponent: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Hadamard matrix of size 2^exponent in natural (Sylvester) order; treat it as read-only."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=dtype)
        for _ in range(exponent):
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return matrix.to(device)


def _transform(x: Tensor) -> Tensor:
    """H x along a vector of length 2^k, without autograd. Autocast is off: half precision would overflow or round here."""
    exponent = x.numel().bit_length() - 1
    if x.numel() != 1 << exponent:
        raise ValueError(f"The Walsh-Hadamard transform needs a power of two numbers, not {x.numel():,}.")
    passes = max(1, -(-exponent // _FACTOR))
    inner = 1
    with torch.autocast(x.device.type, enabled=False):
        for turn in range(passes):
            step = exponent // passes + (turn < exponent % passes)
            matrix = hadamard_matrix(step, x.dtype, x.device)  # [f, f]
            # Kronecker: H_L = H_f' x … x H_f; each factor mixes one digit of the index and leaves the others alone.
            x = x.view(-1, 1 << step) @ matrix if inner == 1 else matrix @ x.view(-1, 1 << step, inner)
            inner <<= step
    return x.reshape(-1)


class _WalshHadamard(torch.autograd.Function):
    """y = H x; dx = H dy, because H is symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _transform(x.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return walsh_hadamard(grads[0])


def walsh_hadamard(x: Tensor) -> Tensor:
    """The unnormalised Walsh-Hadamard transform of a vector [L], L a power of two: H(H(x)) = L x."""
    result: Tensor = _WalshHadamard.apply(x)
    return result


# ── maps ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Projection(Protocol):
    """A fixed linear map P [n, d] with its adjoint."""

    n: int
    d: int

    def forward(self, z: Tensor) -> Tensor:
        """P z: [d] → [n], without autograd."""

    def adjoint(self, g: Tensor) -> Tensor:
        """P^T g: [n] → [d], without autograd."""

    def num_numbers(self) -> int:
        """How many numbers are kept for this map."""

    def to(self, device: torch.device) -> Projection:
        """The same map on another device."""

    def mark(self) -> str:
        """A few of the drawn numbers as a hash: equal marks mean the same draw."""


class Fastfood:
    """P z = (H (G * (H (B * z))[Pi]))[:n] / sqrt(n * sum G^2), which keeps lengths: |P z| is about |z|.

    B are random signs, Pi a random order, G normal numbers. z is followed by zeros up to L = 2^ceil(log2 max(n, d)): a tensor that is
    smaller than d sees all of z too. Behind z there are only zeros, so the first transform of length L repeats one of length
    K = 2^ceil(log2 d): it is computed once at length K, and the random order reads it modulo K.
    """

    def __init__(self, n: int, d: int, generator: torch.Generator) -> None:
        self.n, self.d = n, d
        self.length = length = power_above(max(n, d))
        self.short = power_above(d)
        signs = torch.randint(0, 2, (length,), generator=generator, dtype=torch.int8)
        order = torch.randperm(length, generator=generator)
        self.gauss = torch.randn(length, generator=generator)  # [L]
        self.signs = signs[:d].float() * 2 - 1  # [d]
        self.place = (order % self.short).to(torch.int32)  # [L]
        self.back = torch.empty(length, dtype=torch.int32)  # [L], the inverse of the order
        self.back[order] = torch.arange(length, dtype=torch.int32)
        self.scale = 1.0 / sqrt(n * float(self.gauss.double().square().sum()))

    def forward(self, z: Tensor) -> Tensor:
        w = z.new_zeros(self.short)
        w[: self.d] = z * self.signs.to(z.dtype)
        w = _transform(w) * self.scale  # [K]
        u = w.index_select(0, self.place) * self.gauss.to(z.dtype)  # [L]
        return _transform(u)[: self.n]

    def adjoint(self, g: Tensor) -> Tensor:
        padded = g.new_zeros(self.length)
        padded[: self.n] = g
        v = _transform(padded) * self.gauss.to(g.dtype)  # [L]
        w = v.index_select(0, self.back).view(-1, self.short).sum(0)  # [K]
        return _transform(w * self.scale)[: self.d] * self.signs.to(g.dtype)

    def num_numbers(self) -> int:
        return self.signs.numel() + self.place.numel() + self.back.numel() + self.gauss.numel()

    def to(self, device: torch.device) -> Fastfood:
        for name in ("signs", "place", "back", "gauss"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def mark(self) -> str:
        few = (self.signs[:64], self.place[:64], self.back[:64], self.gauss[:64])
        return _hash(*few)


class Dense:
    """P with independent normal entries of a given spread: exact and plain, and affordable for small n * d alone."""

    def __init__(self, n: int, d: int, generator: torch.Generator, *, spread: float) -> None:
        self.n, self.d = n, d
        self.matrix = torch.randn(n, d, generator=generator) * spread  # [n, d]

    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return self.matrix.to(z.dtype) @ z

    def adjoint(self, g: Tensor) -> Tensor:
        with torch.autocast(g.device.type, enabled=False):
            return g @ self.matrix.to(g.dtype)

    def num_numbers(self) -> int:
        return self.matrix.numel()

    def to(self, device: torch.device) -> Dense:
        self.matrix = self.matrix.to(device)
        return self

    def mark(self) -> str:
        return _hash(self.matrix[:8, :8])


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ── with gradients ────────────────────────────────────────────────────────────────────────────────────────────────────


class _Project(torch.autograd.Function):
    """y = P z; dz = P^T dy. Nothing is remembered for backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, projection: Projection) -> Tensor:
        ctx.projection = projection
        return projection.forward(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return project_back(grads[0], ctx.projection), None


class _ProjectBack(torch.autograd.Function):
    """z = P^T y; dy = P dz."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, projection: Projection) -> Tensor:
        ctx.projection = projection
        return projection.adjoint(g)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return project(grads[0], ctx.projection), None


class _Scaled(torch.autograd.Function):
    """y = s P z for a learned number s; remembers z and s, never the long P z, because <dy, P z> = <P^T dy, z>."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor, projection: Projection) -> Tensor:
        ctx.projection = projection
        ctx.save_for_backward(z, scale)
        return projection.forward(z) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        z, scale = ctx.saved_tensors
        pulled = project_back(grads[0], ctx.projection)  # [d]
        return pulled * scale, torch.dot(pulled, z), None


def project(z: Tensor, projection: Projection, scale: Tensor | None = None) -> Tensor:
    """P z, or s P z with a learned 0-d scale; differentiable as often as needed."""
    result: Tensor = _Project.apply(z, projection) if scale is None else _Scaled.apply(z, scale, projection)
    return result


def project_back(g: Tensor, projection: Projection) -> Tensor:
    """P^T g, differentiable."""
    result: Tensor = _ProjectBack.apply(g, projection)
    return result
