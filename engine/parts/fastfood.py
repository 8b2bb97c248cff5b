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


def _digits(exponent: int) -> list[int]:
    """The index of a vector of length 2^exponent cut into digits of at most _FACTOR bits each, from the highest to the lowest."""
    passes = max(1, -(-exponent // _FACTOR))
    return [exponent // passes + (turn < exponent % passes) for turn in range(passes)][::-1]


def _pass(x: Tensor, digit: int, inner: int) -> Tensor:
    """H_f on the digit of f = 2^digit values below which `inner` places lie: as a Kronecker product, H_L is one such pass for every digit."""
    matrix = hadamard_matrix(digit, x.dtype, x.device)  # [f, f]
    return (x.view(-1, 1 << digit) @ matrix if inner == 1 else matrix @ x.view(-1, 1 << digit, inner)).view(-1)


def _transform(x: Tensor) -> Tensor:
    """H x along a vector of length 2^k, without autograd. Autocast is off: half precision would overflow or round here."""
    exponent = x.numel().bit_length() - 1
    if x.numel() != 1 << exponent:
        raise ValueError(f"The Walsh-Hadamard transform needs a power of two numbers, not {x.numel():,}.")
    inner = 1
    with torch.autocast(x.device.type, enabled=False):
        for digit in reversed(_digits(exponent)):
            x = _pass(x, digit, inner)
            inner <<= digit
    return x


def _transform_to(x: Tensor, n: int, base: Tensor | None) -> Tensor:
    """base + the first n numbers of H x, x [L]: the pass over the highest digit comes first and makes only what is asked for."""
    with torch.autocast(x.device.type, enabled=False):
        top, *rest = _digits(x.numel().bit_length() - 1)
        inner = x.numel() >> top
        rows = -(-n // inner)
        x = (hadamard_matrix(top, x.dtype, x.device)[:rows] @ x.view(1 << top, inner)).view(-1)
        for digit in rest[:-1]:
            inner >>= digit
            x = _pass(x, digit, inner)
        if rest and base is not None and base.numel() == x.numel():  # the last pass adds its base on the way
            last = hadamard_matrix(rest[-1], x.dtype, x.device)
            return torch.addmm(base.reshape(-1, 1 << rest[-1]), x.view(-1, 1 << rest[-1]), last).view(-1)
        x = (_pass(x, rest[-1], 1) if rest else x)[:n]
        return x if base is None else x + base.reshape(-1)


def _transform_from(x: Tensor, length: int) -> Tensor:
    """H y for y = x [n] followed by zeros up to `length`: the pass over the highest digit comes last, so the zeros are never seen."""
    with torch.autocast(x.device.type, enabled=False):
        top, *rest = _digits(length.bit_length() - 1)
        step, inner = length >> top, 1
        rows = -(-x.numel() // step)
        if rows * step != x.numel():
            x = torch.cat([x, x.new_zeros(rows * step - x.numel())])
        for digit in reversed(rest):
            x = _pass(x, digit, inner)
            inner <<= digit
        return (hadamard_matrix(top, x.dtype, x.device)[:, :rows] @ x.view(rows, step)).view(-1)


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

    def forward(self, z: Tensor, base: Tensor | None = None) -> Tensor:
        """P z, or base + P z for a base of n numbers: [d] → [n], without autograd."""

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

    def forward(self, z: Tensor, base: Tensor | None = None) -> Tensor:
        w = z.new_zeros(self.short)
        w[: self.d] = z * self.signs.to(z.dtype)
        w = _transform(w) * self.scale  # [K]
        u = w.index_select(0, self.place).mul_(self.gauss.to(z.dtype))  # [L]
        return _transform_to(u, self.n, base)

    def adjoint(self, g: Tensor) -> Tensor:
        v = _transform_from(g, self.length).mul_(self.gauss.to(g.dtype))  # [L]
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

    def forward(self, z: Tensor, base: Tensor | None = None) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            moved = self.matrix.to(z.dtype) @ z
            return moved if base is None else moved + base.reshape(-1)

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
    """y = base + P z; dz = P^T dy. Nothing is remembered for backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, projection: Projection, base: Tensor | None) -> Tensor:
        ctx.projection = projection
        return projection.forward(z, base)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return project_back(grads[0], ctx.projection), None, None


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
    """y = base + P (s z) for a learned number s; remembers z and s, never the long P z, because <dy, P z> = <P^T dy, z>."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor, projection: Projection, base: Tensor | None) -> Tensor:
        ctx.projection = projection
        ctx.save_for_backward(z, scale)
        return projection.forward(z * scale, base)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, scale = ctx.saved_tensors
        pulled = project_back(grads[0], ctx.projection)  # [d]
        return pulled * scale, torch.dot(pulled, z), None, None


def project(z: Tensor, projection: Projection, scale: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """base + s P z [n] with a learned 0-d scale s and a fixed base of n numbers, each where given; differentiable in z and s as often as needed."""
    if scale is None:
        result: Tensor = _Project.apply(z, projection, base)
    else:
        result = _Scaled.apply(z, scale, projection, base)
    return result


def project_back(g: Tensor, projection: Projection) -> Tensor:
    """P^T g, differentiable."""
    result: Tensor = _ProjectBack.apply(g, projection)
    return result
