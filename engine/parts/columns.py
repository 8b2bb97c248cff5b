"""Linear layers of which only some columns learn: one matrix product forward, and only the inputs of those columns remembered.

The weight always holds the effective columns s * P, so the forward pass is that of the plain layer. Backward:
    dX = dY W            as for a frozen layer
    dP = s * dY^T x_I    [out, r], with x_I = x[..., I]; the dense [out, in] gradient is never formed
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ColumnProduct(torch.autograd.Function):
    """y = x W^T + b with a gradient for x and for the columns P alone. W is checked: writing it before backward raises."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, index: Tensor, scale: float
    ) -> Tensor:
        ctx.scale, ctx.shape = scale, x.shape
        # Two dimensions are three times quicker to index than the same memory seen with three.
        picked = x.reshape(-1, x.shape[-1]).index_select(1, index) if ctx.needs_input_grad[3] else None  # [n, r]
        ctx.save_for_backward(picked, weight if ctx.needs_input_grad[0] else None)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        picked, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])  # [n, out]
        dx = None if weight is None else (flat @ weight.to(flat.dtype)).view(ctx.shape)
        # x_I^T dY and then a transposed view: the thin matrix on the left is the faster order.
        dp = None if picked is None else (picked.t() @ flat).to(torch.float32).mul_(ctx.scale).t()  # [out, r]
        return dx, None, None, dp, None, None


class ColumnLinear(nn.Linear):
    """A linear layer whose columns `index` learn: `columns` [out, r] is the fp32 master, `weight` holds scale * columns at those places."""

    index: Tensor
    original: Tensor

    def __init__(self, plain: nn.Linear, index: Tensor, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = plain.in_features, plain.out_features, scale
        self.weight, self.bias = plain.weight, plain.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.train(plain.training)
        self._take(index)

    def _take(self, index: Tensor) -> None:
        index = index.to(self.weight.device)
        original = self.weight.detach().index_select(1, index)  # [out, r]
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("original", original, persistent=False)
        self.columns = nn.Parameter(original.float() / self.scale)

    @property
    def r(self) -> int:
        return self.index.numel()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        out: Tensor = ColumnProduct.apply(x, self.weight, self.bias, self.columns, self.index, self.scale)
        return out

    def effective(self) -> Tensor:
        """The columns as they act: scale * P, fp32 [out, r]."""
        return self.columns.detach() * self.scale

    @torch.no_grad()
    def sync(self) -> None:
        """Write the learned columns into the weight; in place, so that a pending backward notices."""
        self.weight.index_copy_(1, self.index, self.effective().to(self.weight.dtype))

    @torch.no_grad()
    def reset(self) -> None:
        """Write the original columns back."""
        self.weight.index_copy_(1, self.index, self.original.to(self.weight.dtype))

    def load(self, index: Tensor, effective: Tensor) -> None:
        """Take over saved columns, at the places where they were learned."""
        self.reset()
        if not torch.equal(index.to(self.index), self.index):
            self._take(index.to(self.index))
        with torch.no_grad():
            self.columns.copy_(effective.to(self.columns) / self.scale)
        self.sync()

    def plain(self) -> nn.Linear:
        """The same layer as an nn.Linear, sharing the weight that holds the learned columns."""
        self.sync()
        out = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        out.weight, out.bias = self.weight, self.bias
        return out.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scale={self.scale:g}"


def draw_columns(in_features: int, r: int, generator: torch.Generator) -> Tensor:
    """`r` distinct columns, each equally likely, in ascending order."""
    return torch.randperm(in_features, generator=generator)[:r].sort().values


def columns_by_norm(weight: Tensor, r: int, *, largest: bool) -> Tensor:
    """The `r` columns with the largest or the smallest Euclidean norm, in ascending order."""
    return weight.detach().float().norm(dim=0).topk(r, largest=largest).indices.sort().values
