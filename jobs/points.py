"""What of a run's log can be a curve: the one place that knows how transformers' Trainer calls the same things."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# What Trainer calls otherwise than the engine.
_TRAINER = {"tokens": "num_input_tokens_seen"}
# Of an evaluation: they stand in the rows, or are no curve.
_NOT_MEASURED = frozenset({"samples", "epoch", "best", "key", "nonfinite"})
_NOT_OF_A_STEP = frozenset({"step", "nonfinite"})


@dataclass(frozen=True, slots=True)
class Told:
    """One line of the log, or one event of the database."""

    moment: float
    kind: str
    step: int
    data: dict[str, Any]
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """The numbers of one optimizer step, or of one evaluation."""

    moment: float
    step: int
    part: Literal["train", "eval"]
    values: dict[str, float]

    def in_folders(self) -> dict[str, float]:
        """As Trainer tells them TensorBoard, Weights & Biases and Trackio: train/loss, eval/loss."""
        return {f"{self.part}/{name}": value for name, value in self.values.items()}

    def flat(self) -> dict[str, float]:
        """As Trainer logs them and tells them MLflow: loss, eval_loss."""
        prefix = "eval_" if self.part == "eval" else ""
        return {f"{prefix}{name}": value for name, value in self.values.items()}


def parsed(line: bytes) -> Told | None:
    """A line of the log; None when it is damaged, for then the database has left it out too."""
    try:
        body = json.loads(line)
        return Told(
            float(body["time"]), str(body["kind"]), int(body["step"]), dict(body["data"]), int(body.get("seq", 0))
        )
    except (ValueError, KeyError, TypeError):
        return None


def points(told: Iterable[Told], last: int = -1) -> Iterator[Point]:
    """Every optimizer step behind step `last` and every evaluation; after a lost end of the log the first row of a step counts."""
    for event in told:
        if event.kind == "evaluation":
            values = _numbers(event.data, without=_NOT_MEASURED)
            if values:
                yield Point(event.moment, event.step, "eval", values)
        elif event.kind == "metric":
            rows = [row for row in event.data.get("rows", []) if row.get("step", event.step) > last]
            for row in rows:
                last = row.get("step", event.step)
                values = _numbers(row, without=_NOT_OF_A_STEP)
                yield Point(_moment(event.moment, row, rows[-1]), last, "train", values)


def _moment(written: float, row: Mapping[str, Any], last: Mapping[str, Any]) -> float:
    """When a step was made: rows that share an event were written together, and each knows the training's own seconds."""
    mine, newest = row.get("seconds"), last.get("seconds")
    if isinstance(mine, int | float) and isinstance(newest, int | float):
        return written - max(0.0, newest - mine)
    return written


def _numbers(data: Mapping[str, Any], *, without: frozenset[str]) -> dict[str, float]:
    """What can be a curve, under Trainer's names. A number that was not finite is NaN: the log holds null and its name."""
    lost = data.get("nonfinite") or ()
    found: dict[str, float] = {}
    for name, value in data.items():
        if name in without or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            found[_TRAINER.get(name, name).removeprefix("eval_")] = float(value)
        elif value is None and name in lost:
            found[_TRAINER.get(name, name).removeprefix("eval_")] = math.nan
    return found
