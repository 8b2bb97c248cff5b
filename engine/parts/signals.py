"""What the first part of a run tells: windows, gradient norms freed of batch noise, and the rules that read them. Pure functions, no state.

Measured on full fine-tuning of decoders; definitions B and C and rules D of the card of early-dynamics-stopping. The horizontal axis is samples seen,
never steps, so that runs with different batch sizes compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

NAN = float("nan")
LEAST_STEPS = 3  # a median, a spread and a slope of fewer steps say nothing


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step showed. NaN marks what was not measured."""

    step: int
    samples: int  # seen up to and with this step
    loss: float  # token-weighted mean over the whole optimizer batch
    norm: float  # L2 over all trainables, before clipping
    weight: float = 1.0  # supervised items behind the loss
    clipped: float = NAN  # 1.0 when clipping changed the gradient, 0.0 when not
    micro_norm: float = NAN  # norm of the mean gradient of one micro-batch
    micro_size: float = NAN  # samples in that micro-batch
    batch_size: float = NAN  # samples in the optimizer batch


@dataclass(frozen=True, kw_only=True)
class Window:
    """Summary of the steps up to a share of the planned samples."""

    share: float
    steps: int
    norm: float  # g: median of the norm before clipping
    norm_cv: float  # interquartile range / median
    loss: float  # L: token-weighted mean
    slope: float  # s: of the loss against log(samples)
    clipped: float  # c: share of steps clipped, NaN when clipping is not reported
    norm_rise: float  # median norm of the last third / of the first third
    true_norm_squared: float  # G2: squared norm of the noise-free gradient, NaN without micro-batch norms
    noise: float  # S: trace of the gradient covariance of one sample
    noise_batch: float  # B_noise = S / G2: batch size at which noise and signal are equal

    def numbers(self) -> dict[str, Any]:
        """For a signal: everything that was measured, None where it was not."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def read_step(row: Mapping[str, Any], step: int, samples: int, before: tuple[int, int]) -> Step:
    """A Step from a row of the log; `before` is (samples, tokens) at the row before.

    Needs loss and grad_norm. Uses when present: weight (else the real tokens of the step), clipped, micro_norm, micro_size, batch_size.
    """
    tokens = _number(row, "tokens") - before[1]
    weight = _number(row, "weight")
    if not weight > 0:
        weight = tokens if tokens > 0 else 1.0
    batch = _number(row, "batch_size")
    return Step(
        step=step,
        samples=samples,
        loss=_number(row, "loss"),
        norm=_number(row, "grad_norm"),
        weight=weight,
        clipped=_number(row, "clipped"),
        micro_norm=_number(row, "micro_norm"),
        micro_size=_number(row, "micro_size"),
        batch_size=batch if batch > 0 else float(samples - before[0]),
    )


def window(steps: Sequence[Step], share: float, planned_samples: int, drop: int) -> Window | None:
    """Summarise the steps with samples up to `share` of the plan, the first `drop` steps left out; None when too few remain."""
    inside = [step for step in steps if step.step > drop and step.samples <= share * planned_samples]
    if len(inside) < LEAST_STEPS:
        return None
    norms = np.array([step.norm for step in inside])
    losses = np.array([step.loss for step in inside])
    weights = np.array([step.weight for step in inside])
    low, middle, high = np.percentile(norms, [25, 50, 75])
    third = max(1, len(inside) // 3)
    clipped = np.array([step.clipped for step in inside])
    true_squared, noise = mean_noise_corrected(inside)
    return Window(
        share=share,
        steps=len(inside),
        norm=float(middle),
        norm_cv=_ratio(float(high - low), float(middle)),
        loss=float(np.average(losses, weights=weights)),
        slope=slope([step.samples for step in inside], losses.tolist()),
        clipped=float(np.nanmean(clipped)) if np.isfinite(clipped).any() else NAN,
        norm_rise=_ratio(float(np.median(norms[-third:])), float(np.median(norms[:third]))),
        true_norm_squared=true_squared,
        noise=noise,
        noise_batch=_ratio(noise, true_squared) if true_squared > 0 else NAN,
    )


def noise_corrected(big_norm: float, small_norm: float, big: float, small: float) -> tuple[float, float]:
    """(G2, S) from the gradient norms of `big` and of `small` samples; both are unbiased, and may come out negative in one step.

    E|g_B|^2 = |G|^2 + tr(cov)/B: a raw norm falls with the batch size by arithmetic alone, G2 does not.
    """
    if not big > small > 0:
        return NAN, NAN
    g2 = (big * big_norm**2 - small * small_norm**2) / (big - small)
    s = (small_norm**2 - big_norm**2) / (1 / small - 1 / big)
    return g2, s


def mean_noise_corrected(steps: Sequence[Step]) -> tuple[float, float]:
    """Means of G2 and S over the steps that report a micro-batch; NaN when none does."""
    pairs = np.array([noise_corrected(step.norm, step.micro_norm, step.batch_size, step.micro_size) for step in steps])
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    return (float(pairs[:, 0].mean()), float(pairs[:, 1].mean())) if len(pairs) else (NAN, NAN)


class NoiseMeter:
    """The gradient norm freed of chance and the noise scale, as a run goes on.

    G2 and S of single steps scatter widely, so both are averaged on their own (exponentially, over about twenty measurements) before anything is
    made of them (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).
    """

    KEEP = 0.95

    def __init__(self) -> None:
        self.sums = [0.0, 0.0, 0.0]  # of G2, of S, of the weights
        self._taken: tuple[Any, Any, float, float] | None = None

    def take(self, norm: Any, micro_norm: Any, micro_size: float, batch_size: float) -> None:
        """Norms may be tensors on a device; they are read when somebody asks for numbers."""
        self._taken = (norm, micro_norm, batch_size, micro_size)

    def numbers(self) -> dict[str, float]:
        """{"grad_norm_corrected": sqrt(G2), "noise_scale": S / G2 in samples} as far as it is known; {} before, and where chance hides the signal."""
        if self._taken is not None:
            big_norm, small_norm, big, small = self._taken
            self._taken = None
            pair = noise_corrected(float(big_norm), float(small_norm), big, small)
            if all(map(math.isfinite, pair)):
                self.sums = [self.KEEP * old + new for old, new in zip(self.sums, (*pair, 1.0), strict=True)]
        squared, noise, weight = self.sums
        if not squared > 0:
            return {}
        return {"grad_norm_corrected": math.sqrt(squared / weight), "noise_scale": max(0.0, noise / squared)}

    def state_dict(self) -> dict[str, Any]:
        return {"noise_sums": list(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = [float(value) for value in state.get("noise_sums", self.sums)]


def slope(samples: Sequence[float], losses: Sequence[float]) -> float:
    """Least-squares slope of the loss against log(samples): below zero, the loss falls."""
    x = np.log(np.maximum(np.asarray(samples, dtype=float), 1.0))
    x = x - x.mean()
    spread = float((x**2).sum())
    return float((x * np.asarray(losses, dtype=float)).sum()) / spread if spread > 0 else 0.0


def ema(before: float | None, value: float, span: int) -> float:
    """The next exponential moving average with the given span; starts at the first value."""
    return value if before is None else before + 2 / (span + 1) * (value - before)


# ── rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that fired, in a sentence for anybody, with the numbers behind it."""

    rule: str
    grave: bool  # the run is not worth going on
    message: str
    numbers: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Heldout:
    """Losses on held-out examples at one moment: the person's own (target) and a fixed general set; NaN when not measured."""

    samples: int
    target: float
    target_se: float = NAN
    general: float = NAN
    general_se: float = NAN


def read_heldout(evaluation: Mapping[str, Any], samples: int) -> Heldout:
    """Held-out losses from the scores of an evaluation."""
    return Heldout(
        samples, *(_number(evaluation, key) for key in ("eval_loss", "eval_loss_se", "general_loss", "general_loss_se"))
    )


def rises(now: float, now_se: float, start: float, start_se: float, num_se: float) -> bool:
    """Whether a held-out loss lies above its start by more than `num_se` standard errors of the difference; False when not measured."""
    return now - start > num_se * math.hypot(now_se, start_se)


def not_finite(step: Step) -> Finding | None:
    """Loss or norm is infinite or not a number."""
    bad = [
        name for name, value in (("loss", step.loss), ("size of the correction", step.norm)) if not math.isfinite(value)
    ]
    if not bad:
        return None
    return Finding(
        "not-finite",
        True,
        f"The {' and the '.join(bad)} stopped being a number at step {step.step:,}. Nothing sensible can be learned "
        "from here on; start again with a smaller learning rate.",
        {"step": step.step, "bad": bad},
    )


def runaway(smooth: float, reference: float, num_steps: int, *, factor: float, patience: int) -> Finding | None:
    """The smoothed loss has stayed above `factor` times its early value for `patience` steps."""
    if num_steps < patience:
        return None
    return Finding(
        "runaway",
        True,
        f"The training error has stayed above {factor:g} times its early value for {num_steps} steps "
        f"({smooth:.3g} against {reference:.3g}). The model is getting worse, not better; the learning rate is probably too high.",
        {"smooth_loss": smooth, "early_loss": reference, "steps": num_steps},
    )


def nothing_gained(start: Heldout, recent: Sequence[Heldout], *, num_se: float, times: int) -> Finding | None:
    """On the last `times` measurements the target loss was above its start by more than `num_se` standard errors, and the general loss above its start.

    Without a general loss this cannot tell "nothing gained" from "traded one for the other", so the finding is then not grave.
    """
    if len(recent) < times:
        return None
    last = recent[-times:]
    if not all(rises(now.target, now.target_se, start.target, start.target_se, num_se) for now in last):
        return None
    numbers = {
        "start": start.target,
        "now": last[-1].target,
        "standard_error": math.hypot(last[-1].target_se, start.target_se),
        "measurements": times,
        "general_start": _or_none(start.general),
        "general_now": _or_none(last[-1].general),
    }
    said = (
        f"On kept-back examples the model is worse than before training, {times} measurements in a row "
        f"({start.target:.3g} at the start, {last[-1].target:.3g} now)"
    )
    if not (math.isfinite(start.general) and all(math.isfinite(now.general) for now in last)):
        return Finding(
            "nothing-gained",
            False,
            f"{said}. General ability was not measured, so this is a warning and no stop.",
            numbers,
        )
    if not all(now.general > start.general for now in last):
        return None
    return Finding(
        "nothing-gained",
        True,
        f"{said}, and so is its general ability ({start.general:.3g}, now {last[-1].general:.3g}). "
        "Nothing is being gained.",
        numbers,
    )


def always_clipped(seen: Window, limit: float) -> Finding | None:
    """Nearly every step was clipped."""
    if not seen.clipped > limit:
        return None
    return Finding(
        "always-clipped",
        False,
        f"{seen.clipped:.0%} of the corrections were cut down to the allowed size, so the learning rate no longer "
        "means what was typed. A lower learning rate, or a higher limit for clipping, makes the two agree.",
        seen.numbers(),
    )


def unsteady(seen: Window, limit: float) -> Finding | None:
    """The norm jumps from step to step."""
    if not seen.norm_cv > limit:
        return None
    return Finding(
        "unsteady",
        False,
        f"The size of the corrections jumps a lot from step to step (spread {seen.norm_cv:.2g} times the middle value). "
        "More examples at a time would make the run steadier.",
        seen.numbers(),
    )


def norm_climbs(seen: Window, limit: float) -> Finding | None:
    """The norm grows over the first window while the loss falls."""
    if not (seen.norm_rise > limit and seen.slope < 0):
        return None
    return Finding(
        "norm-climbs",
        False,
        f"The error falls, but the corrections grow ({seen.norm_rise:.2g} times larger than at the beginning). "
        "That often comes before a run tips over; watch it, or use a lower learning rate.",
        seen.numbers(),
    )


def memorising(fell: tuple[float, float] | None, start: Heldout, now: Heldout, *, num_se: float) -> Finding | None:
    """The training loss collapsed in the first window (`fell`: loss at the start, and then) while the target loss has not improved."""
    margin = num_se * math.hypot(now.target_se, start.target_se)
    if fell is None or not now.target >= start.target - margin:  # also when one of them was not measured
        return None
    return Finding(
        "memorising",
        False,
        f"The training error fell from {fell[0]:.3g} to {fell[1]:.3g} almost at once, but kept-back examples have not become "
        f"easier ({start.target:.3g}, now {now.target:.3g}). The model is learning the examples by heart; use fewer passes, more data or a "
        "lower learning rate.",
        {"loss_start": fell[0], "loss_then": fell[1], "target_start": start.target, "target_now": now.target},
    )


def forgetting(start: Heldout, now: Heldout, limit: float) -> Finding | None:
    """The general loss rose by more than a share of its start."""
    if not now.general > start.general * (1 + limit):
        return None
    return Finding(
        "forgetting",
        False,
        f"General ability is fading: its error rose by {now.general / start.general - 1:.0%} since the start. A lower "
        "learning rate, fewer passes, or training fewer weights keeps more of it.",
        {"general_start": start.general, "general_now": now.general},
    )


def _number(source: Mapping[str, Any], key: str) -> float:
    value = source.get(key)
    return float(value) if isinstance(value, int | float) else NAN


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else NAN


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
