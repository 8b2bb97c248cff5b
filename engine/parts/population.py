"""Selection and mutation over a population of trials, and the ancestry of its winner. No torch."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.core.errors import Fault
from engine.core.space import Knob
from engine.core.work import Trial


@dataclass(frozen=True, kw_only=True)
class Move:
    """One member is overwritten with another."""

    donor: int
    values: dict[str, Any]
    sentence: str


@dataclass(kw_only=True)
class Population:
    """Truncation selection (the lowest quantile copies from the highest) and perturbation by factors, neighbours and fresh draws."""

    knobs: Sequence[Knob]
    size: int
    quantile: float
    resample: float
    factor: float
    copy_values: bool
    rng: random.Random

    def start(self) -> dict[str, Any]:
        """Start values, strictly inside of every range, since a factor never leaves zero."""
        return {knob.name: self._inside(knob) for knob in self.knobs}

    def moves(self, trials: Sequence[Trial]) -> dict[int, Move]:
        """Who is overwritten with whom, by the last scores; ties are broken at random. Failed members always copy."""
        scored = [trial for trial in trials if not trial.failed and math.isfinite(trial.score)]
        lost = [trial for trial in trials if trial not in scored]
        ties = {trial.number: self.rng.random() for trial in trials}
        ranked = sorted(scored, key=lambda trial: (trial.score, ties[trial.number]))
        count = min(math.ceil(len(trials) * self.quantile), len(trials) // 2)
        if not ranked or (len(ranked) < 2 and not lost) or count == 0:
            return {}
        top = ranked[-min(count, len(ranked)) :]
        bottom = [trial for trial in ranked[: max(0, count - len(lost))] if trial not in top]
        found: dict[int, Move] = {}
        for trial in sorted([*lost, *bottom], key=lambda trial: trial.number):
            donor = self.rng.choice(top)
            base = donor.values if self.copy_values else trial.values
            values = self.explore(base)
            changes = ", ".join(
                f"{_short(knob.name)} {_number(base[knob.name])} → {_number(values[knob.name])}" for knob in self.knobs
            )
            found[trial.number] = Move(
                donor=donor.number,
                values=values,
                sentence=f"Member {trial.number} ({'failed' if trial in lost else f'score {trial.score:.4g}'}) takes over member "
                f"{donor.number} (score {donor.score:.4g}) and goes on with {changes}.",
            )
        return found

    def explore(self, values: dict[str, Any]) -> dict[str, Any]:
        """Each setting drawn afresh with probability `resample`, otherwise moved up or down."""
        down = 2.0 - self.factor if self.factor < 1.9 else 1.0 / self.factor
        changed = dict(values)
        for knob in self.knobs:
            if self.rng.random() < self.resample:
                changed[knob.name] = self._inside(knob)
            else:
                changed[knob.name] = knob.move(values[knob.name], self.factor if self.rng.random() < 0.5 else down)
        return changed

    def best(self, trials: Sequence[Trial]) -> int:
        """The member with the best last score."""
        alive = [trial for trial in trials if trial.marks and not trial.failed]
        if not alive:
            from engine.core.errors import EngineError

            raise EngineError(
                Fault(
                    where="space",
                    what="Every member of the population broke down.",
                    why="The settings that were drawn make the training diverge.",
                    way_out="Choose a lower range for the learning rate.",
                    code="all_failed",
                ),
                "diverged",
            )
        return max(alive, key=lambda trial: (trial.step, trial.score, -trial.number)).number

    def _inside(self, knob: Knob) -> Any:
        for _ in range(100):
            value = knob.draw(self.rng)
            if knob.choices or knob.low < value < knob.high:
                return value
        return knob.draw(self.rng)


def history_of(trials: Sequence[Trial], knobs: Sequence[Knob]) -> tuple[dict[str, Any], ...]:
    """One row for each slice of each member, in order of steps: its settings, its score, whom it was copied from before, and its gain.

    gain: by how much the score rose in the slice, minus the mean rise of all members in the same interval; None where either end was not measured. The rise of
    a first slice is its score, since all begin at the same point.
    """
    by_number = {trial.number: trial for trial in trials}
    rows: list[dict[str, Any]] = []
    rises: dict[int, list[float]] = {}
    for trial in trials:
        for place, mark in enumerate(trial.marks):
            began = trial.marks[place - 1].step if place else 0
            donor = next((number for at, number in trial.donors if place and at == began), None)
            source = trial if donor is None else by_number[donor]
            before = next((m.score for m in source.marks if m.step == began), 0.0) if began else 0.0
            rise = mark.score - before
            if math.isfinite(rise):
                rises.setdefault(mark.step, []).append(rise)
            known = mark.score if math.isfinite(mark.score) else None
            row: dict[str, Any] = {"step": mark.step, "trial": trial.number, "score": known}
            row |= {knob.name: mark.values.get(knob.name) for knob in knobs}
            rows.append({**row, "copied from": donor, "gain": rise if math.isfinite(rise) else None})
    for row in rows:
        if row["gain"] is not None:
            row["gain"] -= sum(rises[row["step"]]) / len(rises[row["step"]])
    return tuple(sorted(rows, key=lambda row: (row["step"], row["trial"])))


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The chain of (until step, values) that made a member what it is, over all takeovers: a schedule one run can follow."""

    slices: tuple[tuple[int, dict[str, Any]], ...]

    @classmethod
    def of(cls, trials: Sequence[Trial], number: int) -> Lineage:
        """The chain of a member: its own slices back to a takeover, then those of the donor before that step."""
        by_number = {trial.number: trial for trial in trials}
        return cls(slices=tuple(cls._chain(by_number, number, None)))

    @classmethod
    def _chain(cls, trials: dict[int, Trial], number: int, before: int | None) -> list[tuple[int, dict[str, Any]]]:
        """Slices of `number` that end at or before a step."""
        trial = trials[number]
        taken = [(at, donor) for at, donor in trial.donors if before is None or at < before]
        at, donor = taken[-1] if taken else (-1, -1)
        own = [
            (mark.step, dict(mark.values))
            for mark in trial.marks
            if mark.step > at and (before is None or mark.step <= before)
        ]
        return own if donor < 0 else [*cls._chain(trials, donor, at), *own]

    def first_values(self, knobs: Sequence[Knob]) -> list[Any]:
        """The values that the oldest ancestor began with."""
        return [self.slices[0][1].get(knob.name) for knob in knobs]

    def text(self) -> str:
        """The schedule as text: JSON, one {"until", "values"} a slice."""
        return json.dumps([{"until": until, "values": values} for until, values in self.slices])

    @classmethod
    def parse(cls, text: str) -> Lineage:
        """The inverse of `text`."""
        return cls(slices=tuple((int(item["until"]), dict(item["values"])) for item in json.loads(text)))

    @classmethod
    def faults(cls, text: str) -> list[Fault]:
        """What is wrong with a schedule that a person gave."""
        try:
            steps = [until for until, _ in cls.parse(text).slices]
            if steps and steps == sorted(set(steps)):
                return []
            why = "Its steps do not grow."
        except (ValueError, KeyError, TypeError):
            why = 'It is a JSON list of {"until": step, "values": {name: value}}.'
        return [
            Fault(
                where="schedule",
                what="This schedule could not be read.",
                why=why,
                way_out="Copy the schedule from the report of a population, whole.",
                code="bad_schedule",
            )
        ]


def _short(name: str) -> str:
    return name.removeprefix("settings.").replace("_", " ")


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
