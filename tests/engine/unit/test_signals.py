"""The signals of the first part of a run, against brute force and against gradients with known noise."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from engine.parts.signals import (
    Heldout,
    NoiseMeter,
    Step,
    ema,
    forgetting,
    mean_noise_corrected,
    memorising,
    noise_corrected,
    nothing_gained,
    read_step,
    rises,
    slope,
    window,
)


def steps(count: int, batch: int = 8, seed: int = 0, **fixed: float) -> list[Step]:
    """A made-up stream: a falling loss with noise, norms around one."""
    rng = np.random.default_rng(seed)
    return [
        Step(
            step=k,
            samples=k * batch,
            loss=4 / math.sqrt(k) + 0.1 * rng.standard_normal(),
            norm=float(rng.lognormal(0, 0.4)),
            weight=float(rng.integers(50, 200)),
            clipped=float(rng.random() < 0.3),
            **fixed,
        )
        for k in range(1, count + 1)
    ]


def draw_norms(size: int, batch: int, micro: int, draws: int, noise: float) -> tuple[list[Step], np.ndarray]:
    """Gradients G + noise / sqrt(B), where the micro-batch is part of the batch, and the norms a loop would log."""
    rng = np.random.default_rng(7)
    true = rng.standard_normal(size)
    found = []
    for _ in range(draws):
        first = true + noise * rng.standard_normal(size) / math.sqrt(micro)
        rest = true + noise * rng.standard_normal(size) / math.sqrt(batch - micro)
        whole = (micro * first + (batch - micro) * rest) / batch
        found.append(
            Step(1, 1, 0.0, float(np.linalg.norm(whole)), 1.0, math.nan, float(np.linalg.norm(first)), micro, batch)
        )
    return found, true


@pytest.mark.parametrize("batch", [16, 64, 256])
def test_the_corrected_norm_recovers_the_true_gradient(batch: int) -> None:
    found, true = draw_norms(size=200, batch=batch, micro=8, draws=2000, noise=2.0)
    g2, noise = mean_noise_corrected(found)
    assert g2 == pytest.approx(float(true @ true), rel=0.05)
    assert noise == pytest.approx(200 * 2.0**2, rel=0.05)  # trace of the covariance of one sample


def test_the_corrected_norm_is_flat_in_the_batch_size_and_the_raw_norm_is_not() -> None:
    raw, corrected = [], []
    for batch in (16, 64, 256):
        found, _ = draw_norms(size=200, batch=batch, micro=8, draws=2000, noise=4.0)
        raw.append(float(np.mean([step.norm**2 for step in found])))
        corrected.append(mean_noise_corrected(found)[0])
    assert max(corrected) / min(corrected) < 1.1
    assert raw[0] > raw[1] > raw[2] and raw[0] / raw[2] > 1.5


def test_the_correction_holds_for_real_gradients() -> None:
    """Per-sample gradients of a real linear model: G2 averaged over random batches is the squared norm of the full gradient."""
    torch.manual_seed(0)
    x, y = torch.randn(512, 20), torch.randn(512, 1)
    per_sample = 2 * (x @ torch.zeros(20, 1) - y) * x  # gradient of the squared error at zero weights
    full = float(per_sample.mean(0).norm() ** 2)
    found = []
    for _ in range(4000):
        batch = per_sample[torch.randint(0, 512, (64,))]
        norms = float(batch.mean(0).norm()), float(batch[:4].mean(0).norm())
        found.append(noise_corrected(*norms, 64, 4))
    assert np.mean([pair[0] for pair in found]) == pytest.approx(full, rel=0.2)
    variance = float(per_sample.var(0, correction=0).sum())
    assert np.mean([pair[1] for pair in found]) == pytest.approx(variance, rel=0.05)


def test_the_meter_follows_the_true_gradient_and_goes_on_where_it_stood() -> None:
    found, true = draw_norms(size=200, batch=64, micro=32, draws=200, noise=2.0)
    meter, half = NoiseMeter(), NoiseMeter()
    for place, step in enumerate(found):
        for one in (meter, half):
            one.take(step.norm, step.micro_norm, step.micro_size, step.batch_size)
            one.numbers()
        if place == 99:
            stood = json.loads(json.dumps(half.state_dict()))
            half = NoiseMeter()
            half.load_state_dict(stood)
    told = meter.numbers()
    assert told == half.numbers() == meter.numbers(), "asking changes nothing"
    assert told["grad_norm_corrected"] == pytest.approx(float(np.linalg.norm(true)), rel=0.1)
    assert told["noise_scale"] == pytest.approx(200 * 2.0**2 / float(true @ true), rel=0.5)
    assert NoiseMeter().numbers() == {}


def test_a_window_is_what_numpy_says() -> None:
    stream = steps(200)
    seen = window(stream, 0.3, 1600, drop=7)
    inside = [step for step in stream if 7 < step.step <= 60]
    norms = np.array([step.norm for step in inside])
    losses, weights = np.array([step.loss for step in inside]), np.array([step.weight for step in inside])
    assert seen is not None and seen.steps == 53
    assert seen.norm == pytest.approx(np.median(norms))
    assert seen.norm_cv == pytest.approx((np.quantile(norms, 0.75) - np.quantile(norms, 0.25)) / np.median(norms))
    assert seen.loss == pytest.approx((losses * weights).sum() / weights.sum())
    assert seen.slope == pytest.approx(np.polyfit(np.log([step.samples for step in inside]), losses, 1)[0])
    assert seen.clipped == pytest.approx(np.mean([step.clipped for step in inside]))
    assert seen.norm_rise == pytest.approx(np.median(norms[-17:]) / np.median(norms[:17]))
    assert math.isnan(seen.true_norm_squared) and math.isnan(seen.noise_batch)
    assert seen.numbers()["noise"] is None


def test_windows_are_cut_by_samples_not_by_steps() -> None:
    small, large = window(steps(1000, batch=4), 0.1, 4000, 5), window(steps(100, batch=40), 0.1, 4000, 5)
    assert small is not None and small.steps == 95
    assert large is not None and large.steps == 5


def test_a_window_with_too_few_steps_says_nothing() -> None:
    assert window(steps(60), 0.1, 480, drop=5) is None
    assert window(steps(60), 0.1, 480, drop=3) is not None


def test_without_micro_batches_the_correction_is_silent() -> None:
    assert all(math.isnan(value) for value in mean_noise_corrected(steps(10)))
    assert all(math.isnan(value) for value in noise_corrected(1.0, 1.0, 8, 8))


def test_a_row_of_the_log_is_read_with_what_it_has() -> None:
    row: dict[str, Any] = {"loss": 2.0, "grad_norm": 0.5, "tokens": 900, "samples": 24}
    step = read_step(row, 3, 24, (16, 600))
    assert (step.loss, step.norm, step.weight, step.batch_size) == (2.0, 0.5, 300.0, 8.0)
    assert math.isnan(step.clipped) and math.isnan(step.micro_norm)
    full = read_step(
        {**row, "weight": 250.0, "clipped": 1.0, "micro_norm": 0.9, "micro_size": 2, "batch_size": 7}, 3, 24, (16, 600)
    )
    assert (full.weight, full.clipped, full.micro_norm, full.micro_size, full.batch_size) == (250.0, 1.0, 0.9, 2.0, 7.0)


def test_the_slope_and_the_moving_average() -> None:
    x = np.array([10.0, 20.0, 40.0, 80.0])
    assert slope(x.tolist(), (5 - 2 * np.log(x)).tolist()) == pytest.approx(-2.0)
    assert slope([5, 5], [1, 2]) == 0.0
    smooth: float | None = None
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    for value in values:
        smooth = ema(smooth, value, 4)
    weights = [0.6**4] + [0.4 * 0.6 ** (4 - k) for k in range(1, 5)]
    assert smooth == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)))


def test_a_rise_needs_its_standard_error() -> None:
    assert rises(1.3, 0.1, 1.0, 0.1, 2.0) and not rises(1.28, 0.1, 1.0, 0.1, 2.0)
    assert not rises(9.0, math.nan, 1.0, 0.1, 2.0) and not rises(math.nan, 0.1, 1.0, 0.1, 2.0)


def test_worse_on_both_held_out_sets_is_grave_and_on_one_it_is_not() -> None:
    start = Heldout(0, 2.0, 0.01, 3.0, 0.01)
    both = [Heldout(10, 2.2, 0.01, 3.1, 0.01), Heldout(20, 2.3, 0.01, 3.2, 0.01)]
    kept = [Heldout(10, 2.2, 0.01, 2.9, 0.01), Heldout(20, 2.3, 0.01, 2.9, 0.01)]
    unknown = [Heldout(10, 2.2, 0.01), Heldout(20, 2.3, 0.01)]
    found = nothing_gained(start, both, num_se=2, times=2)
    assert found is not None and found.grave
    assert nothing_gained(start, kept, num_se=2, times=2) is None
    aside = nothing_gained(Heldout(0, 2.0, 0.01), unknown, num_se=2, times=2)
    assert aside is not None and not aside.grave and "warning" in aside.message
    assert nothing_gained(start, both[:1], num_se=2, times=2) is None
    assert nothing_gained(start, [both[0], Heldout(20, 2.02, 0.01, 3.2)], num_se=2, times=2) is None


def test_memorising_and_forgetting_look_at_the_right_side() -> None:
    start = Heldout(0, 2.0, 0.1, 3.0)
    assert memorising((4.0, 0.5), start, Heldout(9, 1.95, 0.1), num_se=2) is not None
    assert memorising((4.0, 0.5), start, Heldout(9, 1.0, 0.1), num_se=2) is None
    assert memorising(None, start, Heldout(9, 1.95, 0.1), num_se=2) is None
    assert memorising((4.0, 0.5), start, Heldout(9, 1.95), num_se=2) is None, (
        "without a standard error flat means nothing"
    )
    assert forgetting(start, Heldout(9, 1.0, general=3.16), 0.05) is not None
    assert forgetting(start, Heldout(9, 1.0, general=3.14), 0.05) is None
    assert forgetting(start, Heldout(9, 1.0), 0.05) is None
