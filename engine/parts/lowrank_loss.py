"""The nuclear norm of a sparse matrix, with a gradient for its entries alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class NuclearNorm(torch.autograd.Function):
    """The sum of the singular values of a matrix that holds `values` at the flat places `index` and zeros elsewhere.

    The gradient is U V^T at these places, from the exact SVD, and only these numbers are kept for backward. Directions with a singular
    value of zero (relative to the largest, at fp32 precision) have no gradient: of all subgradients it is the smallest.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            dense = values.new_zeros(shape[0] * shape[1])
            dense = dense.index_copy_(0, index.long(), values.detach()).view(shape)  # [out, in]
            u, s, vh = torch.linalg.svd(dense, full_matrices=False)
            used = s > s.max() * max(shape) * torch.finfo(s.dtype).eps
            gradient = (u[:, used] @ vh[used]).reshape(-1).index_select(0, index)  # [entries]
        ctx.save_for_backward(gradient)
        return s.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None


def nuclear_norm(values: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Nuclear norm of the matrix with `values` at `index`; values that are no longer numbers give a loss that is none either."""
    if not bool(torch.isfinite(values.detach()).all()):
        return values.sum()
    out: Tensor = NuclearNorm.apply(values, index, shape)
    return out
