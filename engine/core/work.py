"""What methods of the other five operations give and receive: reports, steps of a flow, trials of a search. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.core.overrides import Override
from engine.core.recipe import DataRef, ModelRef, Recipe


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found out: one sentence, the numbers behind it, and a table with one mapping a row.

    `curve` names two columns that make a curve worth drawing, x first: of `history`, which has a row for each moment, or else of the table. When
    the rows of the table are trials of a search, `knobs` names the columns that were turned, and `score` the column that says how it came out
    (larger is better).
    """

    title: str
    sentence: str
    numbers: dict[str, Any] = field(default_factory=dict)
    table: tuple[dict[str, Any], ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    curve: tuple[str, str] | None = None
    knobs: tuple[str, ...] = ()
    score: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """One piece of a flow: a recipe with a short name (it becomes a folder) and a title for people."""

    name: str
    title: str
    recipe: Recipe
    may_fail: bool = False  # then a failure is handed to the flow instead of ending it


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What became of a step. `description` is the content of its artifact.json."""

    name: str
    folder: Path
    outcome: str  # "succeeded" | "failed"
    message: str
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.outcome == "succeeded"

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The held-out scores of the result."""
        scores: Mapping[str, Any] = self.description.get("metrics", {})
        return scores

    @property
    def model(self) -> ModelRef:
        """The plain model of this step, as an input of another."""
        return ModelRef(source=f"folder:{self.artifact / 'merged'}")

    @property
    def data(self) -> DataRef:
        """The rows that this step made, as an input of another."""
        return DataRef(source=f"file:{self.artifact / 'data' / 'rows.jsonl'}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a flow takes home: the artifact of a step, a report, or both."""

    message: str
    take: StepResult | None = None
    report: Report | None = None


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The end of a slice: the score of a trial at a step, the values it had trained with until then, and what its log showed.

    The numbers are those of the trial alone, counted from its own start; a slice that broke down has none.
    """

    step: int
    score: float  # larger is better; -inf when it is not a number
    values: dict[str, Any]
    samples: int = 0  # read so far
    planned_samples: int = 0  # that the whole trial reads
    total_steps: int = 0  # of the whole trial
    elapsed: float = 0.0  # seconds of training that the search had cost when the slice ended, interruptions left out
    heldout: Mapping[str, float] = field(default_factory=dict)  # eval_loss, general_loss … at the end of the slice
    early: Mapping[str, float] = field(
        default_factory=dict
    )  # engine.parts.signals.Window over all steps so far, NaN left out
    group: str = ""  # trials with the same key may be compared by norm and training loss


@dataclass(kw_only=True)
class Trial:
    """One member of a search. `values` are the settings it goes on with, by dotted name ("settings.learning_rate", "adamw.weight_decay")."""

    number: int
    values: dict[str, Any] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    donors: list[tuple[int, int]] = field(
        default_factory=list
    )  # (step, trial) at which it was overwritten with another
    failed: str = ""  # why it cannot go on
    override: Override | None = None  # the last word of a person about it

    @property
    def step(self) -> int:
        return self.marks[-1].step if self.marks else 0

    @property
    def score(self) -> float:
        return self.marks[-1].score if self.marks else float("-inf")

    @property
    def is_kept(self) -> bool:
        """Whether a person wants it to go on, whatever a rule says."""
        return self.override is not None and self.override.verdict == "keep"

    @property
    def is_stopped(self) -> bool:
        """Whether a person wants it to end, whatever a rule says."""
        return self.override is not None and self.override.verdict == "stop"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Train `trial` with `values` up to optimizer step `until`; before that, overwrite it with the last checkpoint of `donor`, if there is one."""

    trial: int
    until: int
    values: dict[str, Any]
    donor: int | None = None
    reason: str = ""  # a sentence for the log
