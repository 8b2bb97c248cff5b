"""SparseGPT: remove weights one column after the other, and let the columns behind make up for each (arXiv 2301.00774).

For one row w of a layer with inputs X and H = X X^T, removing w_j changes the output least when the remaining weights move by
- w_j / [H_F^-1]_jj * [H_F^-1]_:j, where F are the columns not yet passed. The rows of the upper Cholesky factor U of H^-1 hold these inverses
for all F at once: [H_F^-1]_jj = U_jj^2 and [H_F^-1]_j: = U_jj U_j:.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.parts.pruning import Pattern, keep_n_of_m, keep_per_tensor, num_pruned


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of (H + damping * mean(diag H) * I)^-1, in fp64. Inputs that never fire count as one."""
    h = hessian.double().clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True)


@torch.no_grad()
def sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: Pattern, *, damping: float = 0.01, block: int = 128
) -> tuple[Tensor, Tensor]:
    """New weights [out, in], exact zeros where pruned, and the mask. `hessian` is X X^T [in, in].

    Unstructured: in every run of `block` columns the smallest w^2 / U_jj^2 go, as many as the share asks for, so that the total is exact.
    n:m: the group is chosen when its first column is reached, with all earlier corrections in it.
    """
    out, into = weight.shape
    dead = hessian.diagonal() == 0
    factor = inverse_factor(hessian, damping)  # U [in, in]
    w = weight.double().clone()
    w[:, dead] = 0.0  # nothing ever reads them
    mask = torch.ones_like(w, dtype=torch.bool)
    if pattern.structured:
        block = max(1, block // pattern.m) * pattern.m
    gone = 0
    for start in range(0, into, block):
        stop = min(start + block, into)
        u = factor[start:stop, start:stop]
        part = w[:, start:stop].clone()  # [out, b]
        errors = torch.zeros_like(part)
        if not pattern.structured:
            goal = num_pruned(out * stop, pattern.sparsity)
            kept = keep_per_tensor((part / u.diagonal()).square(), (goal - gone) / part.numel())
            mask[:, start:stop], gone = kept, goal
        for j in range(stop - start):
            if pattern.structured and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                score = (part[:, group] / u.diagonal()[group]).square()
                mask[:, start + j : start + j + pattern.m] = keep_n_of_m(score, pattern.n, pattern.m)
            column = part[:, j]
            wanted = torch.where(mask[:, start + j], column, 0.0)
            error = (column - wanted) / u[j, j]  # [out]
            part[:, j:] -= error[:, None] * u[j, j:]
            part[:, j] = wanted
            errors[:, j] = error
        w[:, start:stop] = part
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return torch.where(mask, w, 0.0).to(weight.dtype), mask


def output_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """||(W - W') X||^2 for the inputs behind H = X X^T: what pruning changed in the output of the layer."""
    change = weight.double() - pruned.double()
    return float(((change @ hessian.double()) * change).sum())
