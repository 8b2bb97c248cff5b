"""Best-response layers and range maps against dense weights, the closed form of ridge regression, and torch's own distributions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from engine.parts.best_response import HyperLinear, Knob, Knobs, dropped
from engine.parts.ranges import Range, inverse_softplus


def knobs(*starts: float, spread: float = 0.5) -> Knobs:
    return Knobs([Knob(f"k{at}", Range(0.0, 0.9), start) for at, start in enumerate(starts)], spread)


def layer(
    out: int = 5, into: int = 7, *, bias: bool = True, number: int = 3, dtype: torch.dtype = torch.float64
) -> HyperLinear:
    """A layer with a response that is not zero."""
    torch.manual_seed(1)
    made = HyperLinear(nn.Linear(into, out, bias=bias), knobs(*[0.1, 0.3, 0.5][:number]), copy="random")
    nn.init.normal_(made.response)
    made = made.to(dtype)
    made.knobs.raw = made.knobs.raw.detach().to(dtype).requires_grad_()
    return made


# ── ranges ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "span", [Range(0.0, 0.9), Range(-2.0, 3.0), Range(0.0, None), Range(1.5, None), Range(0.0, 8.0, whole=True)]
)
def test_values_stay_inside_their_range_and_the_start_is_kept(span: Range) -> None:
    raw = torch.cat([torch.tensor([-1e30]), torch.linspace(-200, 200, 4001), torch.tensor([1e30])])
    value = span.value(raw)
    assert value.isfinite().all() and (value >= span.low).all() and (value[1:-1].diff() >= -1e-6).all()
    assert span.high is None or bool((value <= span.high).all())
    start = span.low + 0.75
    if span.whole:
        assert torch.equal(value, value.round()) and set(value[:-1].tolist()) == set(map(float, range(9)))
        assert float(span.value(torch.tensor(span.raw(3.0) + 1e-3))) == 3.0
    else:
        assert float(span.value(torch.tensor(span.raw(start), dtype=torch.float64))) == pytest.approx(start, abs=1e-9)
    assert math.isfinite(span.raw(span.low)) and (span.high is None or math.isfinite(span.raw(span.high)))


def test_inverse_softplus_is_exact_for_small_and_large() -> None:
    for value in (1e-7, 1e-3, 0.5, 1.0, 50.0):
        assert float(functional.softplus(torch.tensor(inverse_softplus(value), dtype=torch.float64))) == pytest.approx(
            value, rel=1e-9
        )


# ── the layer ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("copy", ["copy", "random"])
def test_without_a_response_the_layer_is_the_plain_one_bit_for_bit(copy: Any) -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(7, 5), torch.randn(4, 3, 7)
    made = HyperLinear(plain, knobs(0.1, 0.4), copy=copy)
    assert torch.equal(made(x), functional.linear(x, plain.weight, plain.bias))
    with made.knobs.playing(torch.randn(4, 2)):
        assert torch.equal(made(x), functional.linear(x, plain.weight, plain.bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 7), (6, 4, 7)])
def test_the_folded_layer_gives_the_output_of_the_layer_at_fixed_numbers(bias: bool, shape: tuple[int, ...]) -> None:
    made, x = layer(bias=bias), torch.randn(*shape, dtype=torch.float64)
    with made.knobs.playing(made.knobs.raw.detach().expand(6, -1)):
        two_branches = made(x)
    folded = made.plain()
    assert type(folded) is nn.Linear
    torch.testing.assert_close(folded(x), two_branches, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(made(x), two_branches, rtol=1e-6, atol=1e-12)
    assert not torch.allclose(
        functional.linear(x, made.weight, made.bias), two_branches, rtol=1e-2
    )  # the response counts


@pytest.mark.parametrize("bias", [True, False])
def test_every_example_has_weights_of_its_own(bias: bool) -> None:
    made, x = layer(bias=bias), torch.randn(4, 3, 7, dtype=torch.float64)
    rows = torch.randn(4, 3, dtype=torch.float64)
    with made.knobs.playing(rows):
        out = made(x)
    for example in range(4):
        c = made.response @ rows[example]
        weight = made.weight + torch.diag(c[:5]) @ made.hyper_weight
        offset = made.bias + c[5:] * made.hyper_bias if bias else torch.zeros(5)
        torch.testing.assert_close(out[example], x[example] @ weight.T + offset, rtol=1e-9, atol=1e-12)


def test_the_penalty_is_that_of_the_dense_weights() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(7, 5)
    start = plain.weight.detach().clone()
    for pull in (True, False):
        made = HyperLinear(nn.Linear(7, 5), knobs(0.1, 0.4), pull=pull, copy="random")
        if pull:
            made.pull = start
        nn.init.normal_(made.response)
        rows = torch.randn(3, 2)
        for example, value in enumerate(made.half_square(rows)):
            weight = (
                made.weight
                + torch.diag((made.response @ rows[example])[:5]) @ made.hyper_weight
                - (start if pull else 0)
            )
            assert float(value) == pytest.approx(0.5 * float(weight.square().sum()), rel=1e-5)


def test_dropout_leaves_out_each_examples_own_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    rate = torch.tensor([0.0, 0.25, 0.8])
    out = dropped(torch.ones(3, 200, 100), rate.view(3, 1, 1))
    torch.testing.assert_close((out == 0).float().mean((1, 2)), rate, atol=0.01, rtol=0)
    torch.testing.assert_close(out.mean((1, 2)), torch.ones(3), atol=0.03, rtol=0)
    assert torch.equal(out[0], torch.ones(200, 100))


def test_a_layer_that_sees_mixed_examples_says_so() -> None:
    made = layer()
    with made.knobs.playing(torch.zeros(4, 3)), pytest.raises(Exception, match="12 rows for 4 examples"):
        made(torch.zeros(12, 7, dtype=torch.float64))


def test_noise_is_drawn_for_every_example_and_its_width_follows_the_spread() -> None:
    made = knobs(0.1, 0.4, spread=0.5)
    rows = made.draw(20000, torch.Generator().manual_seed(0))
    assert rows.shape == (20000, 2) and len(rows.unique(dim=0)) == 20000
    torch.testing.assert_close(rows.std(0), torch.full((2,), 0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(rows.mean(0), made.raw.detach(), atol=0.02, rtol=0)
    assert float(made.entropy().detach()) == pytest.approx(
        2 * torch.distributions.Normal(0.0, 0.5).entropy().item(), rel=1e-6
    )


# ── the learned response ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_response_matches_ridge_regression_at_the_number_and_one_spread_beside_it() -> None:
    """Linear regression with an L2 penalty of every example's own strength: W(h) against (X'X/N + r I)^-1 X'y/N."""
    generator = torch.Generator().manual_seed(0)
    count, width, spread = 400, 4, 0.4
    x = torch.randn(count, width, generator=generator)
    y = x @ torch.tensor([1.5, -2.0, 0.5, 1.0]) + 0.3 * torch.randn(count, generator=generator)
    strength = Range(0.0, None)
    dial = Knobs([Knob("weight_decay", strength, 0.5)], spread)
    torch.manual_seed(0)
    made = HyperLinear(nn.Linear(width, 1, bias=False), dial, copy="random")
    optimizer = torch.optim.Adam(made.own().values(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        rows = dial.draw(count, generator).detach()
        with dial.playing(rows):
            loss = 0.5 * (made(x).squeeze(1) - y).square() + dial.values(rows)[:, 0] * made.half_square(rows)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        scheduler.step()
    for shift in (-spread, 0.0, spread):
        raw = dial.raw.detach() + shift
        r = float(strength.value(raw)[0])
        exact = torch.linalg.solve(x.T @ x / count + r * torch.eye(width), x.T @ y / count)
        learned = made.effective(raw)[0].detach()[0]
        assert float((learned - exact).norm() / exact.norm()) < 0.05, (shift, learned, exact)
