"""Cross-entropy in chunks of rows: the loss and every gradient of the plain way, and never all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.parts import losses
from engine.parts.losses import cross_entropy_sum, head_cross_entropy_sum
from engine.tasks.base import States


def made(bias: bool, kind: torch.dtype = torch.float32) -> States:
    generator = torch.Generator().manual_seed(2)
    head = nn.Linear(24, 301, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    hidden = torch.randn(57, 24, generator=generator).to(kind).requires_grad_()
    return States(hidden, torch.randint(0, 301, (57,), generator=generator), head.to(kind))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 56])
def test_chunks_give_the_loss_and_gradients_of_the_plain_way(
    rows: int, bias: bool, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for chunk in (rows * 301 * 4, 1 << 30):
        monkeypatch.setattr(losses, "CHUNK_BYTES", chunk)
        states = made(bias)
        loss = head_cross_entropy_sum(states, smoothing)
        assert ("HeadCrossEntropy" in type(loss.grad_fn).__name__) is (chunk < 1 << 30)
        (loss / 7).backward()
        found.append([loss.detach(), states.hidden.grad, *(p.grad for p in states.head.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-5)
    expected = cross_entropy_sum(made(bias).head(made(bias).hidden), made(bias).labels, smoothing)
    torch.testing.assert_close(found[0][0], expected.detach(), atol=1e-4, rtol=1e-5)


def test_a_frozen_head_and_a_pass_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 8 * 301 * 4)
    states = made(True)
    states.head.requires_grad_(False)
    head_cross_entropy_sum(states).backward()
    assert states.hidden.grad is not None and states.head.weight.grad is None
    with torch.no_grad():
        assert not head_cross_entropy_sum(states).requires_grad


def test_half_precision_stays_within_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 8 * 301 * 4)
    exact, half = made(False), made(False)
    plain = cross_entropy_sum(exact.head(exact.hidden), exact.labels)
    plain.backward()
    half.head.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head_cross_entropy_sum(half)
    loss.backward()
    assert float((loss - plain).detach().abs() / plain.detach()) < 5e-3
    assert float((half.hidden.grad - exact.hidden.grad).norm() / exact.hidden.grad.norm()) < 2e-2  # type: ignore[operator]


def test_no_more_than_a_chunk_of_logits_is_kept_or_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 8 * 301 * 4)
    sizes: list[int] = []

    class Widest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    states = made(False)
    with Widest():
        head_cross_entropy_sum(states).backward()
    assert max(sizes) <= max(8 * 301, 301 * 24)
