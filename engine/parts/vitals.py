"""The vital signs of a run, kept online: levels, noise, sudden rises and the place in the data, in constant memory and time a step. No rules here.

Every sign is a small dataclass of plain numbers, so that the whole is saved as JSON and goes on after a resume to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

FAST, SLOW, NOISE = 8, 40, 30  # spans of the averages, in steps
GAUSS = 1.128379  # E|a - b| of two draws of a unit normal is 2/sqrt(pi)
BINS = 8  # parts of an epoch
START_STEPS = 3  # the loss of the start is the mean of so many steps


@dataclass(slots=True)
class Level:
    """Where a series stands: a quick and a slow average, and the standard deviation of one step around them, from neighbouring steps.

    Both averages are plain means until their span is reached. Differences of neighbours hardly see a trend, so a series that falls is not called noisy.
    """

    count: int = 0
    last: float = 0.0
    fast: float = 0.0
    slow: float = 0.0
    jump: float = 0.0

    def add(self, value: float) -> None:
        """The next value."""
        self.count += 1
        self.fast += (value - self.fast) * max(2 / (FAST + 1), 1 / self.count)
        self.slow += (value - self.slow) * max(2 / (SLOW + 1), 1 / self.count)
        if self.count > 1:
            self.jump += (abs(value - self.last) - self.jump) * max(2 / (NOISE + 1), 1 / (self.count - 1))
        self.last = value

    @property
    def noise(self) -> float:
        """Standard deviation of a single step."""
        return self.jump / GAUSS

    @property
    def fast_error(self) -> float:
        """Standard error of the quick average."""
        return self.noise / math.sqrt(min(self.count, FAST) or 1)


@dataclass(slots=True)
class Rise:
    """One-sided CUSUM: how far a series has been above where it was, in standard deviations (Page 1954; scale from neighbouring steps).

    Each step counts at most CAP, so that no single outlier is a rise; DRIFT is forgiven each step. The reference moves with the slow average while
    nothing rises and stands still while something does.
    """

    total: float = 0.0
    since: int = 0  # the step at which the present rise began
    level: float = 0.0  # the reference
    noise: float = 0.0
    teeth: int = 0  # how often it rose clearly, after it had come down again
    high: bool = False  # in such a rise

    def add(self, value: float, step: int, series: Level) -> None:
        """The next value of `series`, before it is added there."""
        if self.total == 0.0:
            self.level, self.noise, self.since = series.slow, series.noise, step
        score = min(CAP, (value - self.level) / self.noise) if self.noise > 0 else 0.0
        self.total = max(0.0, self.total + score - DRIFT)
        tooth = self.total > TOOTH or (self.high and self.total > 0)
        self.teeth += tooth and not self.high
        self.high = tooth


CAP, DRIFT, TOOTH = 4.0, 1.2, 9.0


@dataclass(slots=True)
class Epoch:
    """The loss by its place in the epoch: BINS means of the present epoch, and the shape and the end of the one before."""

    sums: list[float] = field(default_factory=lambda: [0.0] * BINS)
    squares: list[float] = field(default_factory=lambda: [0.0] * BINS)
    counts: list[int] = field(default_factory=lambda: [0] * BINS)
    number: int = 0
    shape: list[float] = field(
        default_factory=list
    )  # of the last epoch, in standard errors, its smooth course taken off
    tail: float | None = None  # mean of the last quarter of the last epoch
    alike: int = 0  # epochs in a row with one shape
    strength: float = 0.0  # of that shape: largest distance in units of the loss
    drops: int = 0  # borders at which the loss fell at once
    drop: float = 0.0  # share of the loss by which it fell at the last of them

    def add(self, loss: float, step: int, per_epoch: int) -> bool:
        """The loss of a step; True when it was the last of an epoch, which is judged then."""
        place = (step - 1) % per_epoch
        bin_ = place * BINS // per_epoch
        self.sums[bin_] += loss
        self.squares[bin_] += loss * loss
        self.counts[bin_] += 1
        if place + 1 < per_epoch:
            return False
        self._close()
        return True

    def _close(self) -> None:
        whole = min(self.counts) >= 2
        if whole:
            means = [total / count for total, count in zip(self.sums, self.counts, strict=True)]
            within = sum(
                max(0.0, square - count * mean * mean)
                for square, count, mean in zip(self.squares, self.counts, means, strict=True)
            ) / max(1, sum(self.counts) - BINS)
            errors = [math.sqrt(max(within, 1e-12) / count) for count in self.counts]
            rest = without_curve(means)
            shape = [value / error for value, error in zip(rest, errors, strict=True)]
            strong = sum(value * value for value in shape) > STRONG and max(rest) - min(rest) > 0.08 * abs(
                sum(means) / BINS
            )
            same = bool(self.shape) and alignment(self.shape, shape) > 0.6
            self.alike = self.alike + 1 if strong and same else 0
            self.strength = max(rest) - min(rest)
            self.shape = shape if strong else []
            head, tail = (means[0] + means[1]) / 2, (means[-2] + means[-1]) / 2
            if self.tail is not None:
                fell, inside = self.tail - head, head - tail
                error = 2 * math.sqrt(within / max(1, self.counts[0] + self.counts[1]))
                self.drop = fell / abs(self.tail) if self.tail else 0.0
                self.drops += fell > max(3 * error, 2 * abs(inside), 0.1 * abs(self.tail))
            self.tail = tail
        self.number += 1
        self.sums, self.squares, self.counts = [0.0] * BINS, [0.0] * BINS, [0] * BINS


STRONG = 30.0  # chi-squared of five degrees of freedom: one chance in a hundred thousand


@dataclass(slots=True)
class Sameness:
    """Whether every step reads the same batch: equal counts, and a loss that falls without noise."""

    tokens: int = -1
    weight: float = -1.0
    run: int = 0  # steps in a row with equal counts
    down: int = 0  # of them, with a loss below the one before
    first: float = 0.0  # sum of the sizes of the differences
    second: float = 0.0  # and of the differences of those
    before: float = 0.0  # the last difference

    def add(self, tokens: int, weight: float, difference: float) -> None:
        """Counts of a step, and how much its loss differs from the one before."""
        if tokens != self.tokens or weight != self.weight or self.run >= SAME_STEPS:
            self.tokens, self.weight = tokens, weight
            self.run = self.down = 0
            self.first = self.second = 0.0
        else:
            self.run += 1
            self.down += difference < 0
            self.first += abs(difference)
            self.second += abs(difference - self.before) if self.run > 1 else 0.0
        self.before = difference

    @property
    def told(self) -> bool:
        """Enough steps to judge, and they look like one batch."""
        return self.run == SAME_STEPS and self.down >= SAME_STEPS - 1 and self.second < 0.35 * self.first


SAME_STEPS = 30


@dataclass(slots=True)
class Measured:
    """What the measurements on kept-back examples showed so far."""

    count: int = 0
    start: float | None = None
    start_error: float = 0.0
    best: float = 0.0
    best_error: float = 0.0
    best_step: int = 0
    best_epoch: float = 0.0
    best_fast: float | None = None  # quick average of the training loss at the best measurement
    last: float = 0.0
    last_error: float = 0.0
    gain: float = 0.0  # what the last measurement was better by than the one before
    rises: int = 0  # measurements in a row, each worse than the one before
    above: int = 0  # measurements in a row at which the training loss lay clearly above
    farthest: float = 0.0  # largest distance from the start
    learners: float = 0.0  # how many parameters learn
    size: float | None = None  # their length at the first measurement since they are those
    size_before: float = 0.0  # their length at the last measurement
    moved: float = 0.0  # share by which their length has changed since the first
    fades: int = 0  # measurements in a row at which they were short, and shorter than at the one before
    idle: int = 0  # measurements in a row at which most of them had never been corrected
    same_label: int = 0  # measurements in a row with one and the same answer

    def add(self, target: float, error: float, step: int, epoch: float, fast: float | None) -> None:
        """The next measurement."""
        self.count += 1
        error = error if math.isfinite(error) else 0.0
        if self.start is None:
            self.start, self.start_error, self.last = target, error, target
        self.farthest = max(self.farthest, abs(target - self.start))
        self.rises = self.rises + 1 if target > self.last else 0
        self.gain = self.last - target
        self.last, self.last_error = target, error
        if self.count == 1 or target < self.best:
            self.best, self.best_error, self.best_step, self.best_epoch, self.best_fast = (
                target,
                error,
                step,
                epoch,
                fast,
            )

    @property
    def speeding(self) -> bool:
        """Whether progress has only begun: the last measurement gained clearly more than those before."""
        if self.start is None or self.count < 2:
            return False
        usual = (self.start - self.last) / (self.count - 1)
        return self.gain > 1.3 * usual and self.gain > 0.002 * self.start


@dataclass(slots=True)
class Vitals:
    """All signs of a run."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    per_epoch: int = 1
    start: float = 0.0  # mean loss of the first steps
    loss: Level = field(default_factory=Level)
    norm: Level = field(default_factory=Level)  # of the logarithm of the gradient norm
    loss_rise: Rise = field(default_factory=Rise)
    norm_rise: Rise = field(default_factory=Rise)
    epoch: Epoch = field(default_factory=Epoch)
    sameness: Sameness = field(default_factory=Sameness)
    held: Measured = field(default_factory=Measured)
    least: float = 0.0  # least loss of a step, or zero
    best: float = 0.0  # least quick average of the loss
    best_step: int = 0
    best_error: float = 0.0
    above_start: int = 0  # steps in a row with a loss above the start
    above_best: int = 0  # steps in a row with most of the gain lost
    empty: int = 0  # steps without a supervised item, or with nothing at all to learn from
    still: int = 0  # steps in a row with a gradient of exactly zero
    clipped: int = 0  # steps that were clipped
    kept: float = 1.0  # average share of a gradient that clipping left

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Vitals:
        """Back from `state`."""
        made = cls()
        for item in fields(cls):
            now = getattr(made, item.name)
            value = state[item.name]
            setattr(made, item.name, type(now)(**value) if isinstance(value, Mapping) else value)
        return made


def without_curve(means: list[float]) -> list[float]:
    """Values at equal distances less their least-squares parabola: a loss that merely falls, ever more slowly, leaves almost nothing."""
    n = len(means)
    x = [2 * place / (n - 1) - 1 for place in range(n)]
    flat = sum(v * v for v in x) / n
    curve = [v * v - flat for v in x]  # orthogonal to 1 and, on equal distances, to x
    mean = sum(means) / n
    rise = sum(a * b for a, b in zip(x, means, strict=True)) / sum(v * v for v in x)
    bend = sum(a * b for a, b in zip(curve, means, strict=True)) / sum(v * v for v in curve)
    return [value - mean - rise * a - bend * b for value, a, b in zip(means, x, curve, strict=True)]


def alignment(one: list[float], other: list[float]) -> float:
    """Cosine of the angle between two shapes."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    lengths = math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))
    return product / lengths if lengths > 0 else 0.0
