"""A frozen linear layer with a low-rank addition as one product, forward and backward: y = x W^T + b + s (x A^T) B^T.

Kept for backward: x, which A needs anyway, and the thin h = x A^T [n, r]. No wide product is made only to be added to another, and the thin ones are
multiplied in the order in which BLAS is quick; with dY [n, out]:
    dH = s dY B [n, r],  dX = dY W + dH A,  dA = dH^T X,  dB = s (H^T dY)^T
Whoever listens gets the dense G = dY^T X [out, in] of a backward pass. Then dA = s B^T G and dB = s G A^T follow from it, and h is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Listener = Callable[[Tensor], None]


class LowRankProduct(torch.autograd.Function):
    """The product above, with gradients for x, A and B, and for W and b where they learn."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, hear: Listener | None
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])  # [n, in]
        with torch.autocast(x.device.type, enabled=False):  # the caller has chosen the number format
            inner = F.linear(flat, a.to(flat.dtype))  # [n, r]
            out = F.linear(flat, weight.to(flat.dtype), None if bias is None else bias.to(flat.dtype))
            out.addmm_(inner, b.to(flat.dtype).t(), alpha=scale)
        ctx.scale, ctx.shape, ctx.hear = scale, x.shape, hear
        thin, whole = any(ctx.needs_input_grad[3:5]), ctx.needs_input_grad[1]
        ctx.save_for_backward(
            flat if thin or whole else None, inner if thin and hear is None else None, weight, a, b
        )  # fmt: skip
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, inner, weight, a, b = ctx.saved_tensors
        to_x, to_w, to_bias, to_a, to_b = ctx.needs_input_grad[:5]
        grad = grad.reshape(-1, grad.shape[-1])  # [n, out]
        dx = dw = da = db = None
        pulled = F.linear(
            grad, b.to(grad.dtype).t().contiguous()
        )  # [n, r]; the plain order dY B is up to five times slower
        if to_x:
            dx = grad @ weight.to(grad.dtype)
            dx = dx.addmm_(pulled, a.to(grad.dtype), alpha=ctx.scale).view(ctx.shape)
        if ctx.hear is not None and (to_a or to_b):
            dense = (
                grad.float().t() @ flat.float()
            )  # [out, in], alive for these lines and as long as the listener wants
            ctx.hear(dense)
            da, db = (b.float().t() @ dense).mul_(ctx.scale), (dense @ a.float().t()).mul_(ctx.scale)
        elif to_a or to_b:
            da = (pulled.t() @ flat).to(a.dtype).mul_(ctx.scale)
            db = (
                (inner.t() @ grad).to(b.dtype).mul_(ctx.scale).t()
            )  # a transposed view: this order is up to ten times quicker
        if to_w:
            dw = (grad.t() @ flat).to(weight.dtype)
        return dx, dw, grad.sum(0) if to_bias else None, da, db, None, None


def low_rank_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, hear: Listener | None = None
) -> Tensor:
    """x W^T + bias + scale (x A^T) B^T for x [..., in], W [out, in], A [r, in], B [out, r]; under autocast in its number format.

    `hear` is called in every backward pass with dL/dW [out, in], fp32.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    out: Tensor = LowRankProduct.apply(x, weight, bias, a, b, scale, hear)
    return out
