"""Several runs side by side: what differs in their recipes, and what their held-out examples say. The engine counts; here is what is asked."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.core.errors import EngineError
from jobs import forks
from jobs.access import Person, jobs_for
from jobs.catalogue import engine
from jobs.models import Job

FEWEST, MOST = 2, 8


@dataclass(kw_only=True)
class Comparison:
    """Runs in the order in which they were asked for.

    settings: (dotted name, value in each run) for everything in which they differ.
    scores: for each run {score: {"value", "low", "high"}}; differences: the same for its score minus that of the first run, empty unless all were
    measured on the same examples.  rows: held-out examples with the answer of each.
    """

    jobs: list[Job]
    settings: list[tuple[str, list[Any]]] = field(default_factory=list)
    scores: list[dict[str, dict[str, float]]] = field(default_factory=list)
    differences: list[dict[str, dict[str, float]]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def paired(self) -> bool:
        """Whether all were measured on the same examples."""
        return bool(self.differences)


def chosen(user: Person, asked: Sequence[uuid.UUID]) -> list[Job]:
    """The runs among `asked` that `user` may see, in that order, each once, at most MOST."""
    found = {job.pk: job for job in jobs_for(user).select_related("artifact", "dataset", "model").filter(pk__in=asked)}
    return [found[pk] for pk in dict.fromkeys(asked) if pk in found][:MOST]


def compare(jobs: Sequence[Job]) -> Comparison:
    """Put runs side by side; scores are those of the results that are there, and empty where the engine cannot be asked."""
    found = Comparison(jobs=list(jobs), settings=_settings(jobs))
    folders = [artifact.folder if (artifact := getattr(job, "artifact", None)) else None for job in jobs]
    try:
        answer = engine(timeout=30.0).call("compare", artifacts=folders)
    except (EngineError, OSError, ValueError):
        return found
    found.scores = [{name: score for name, score in run.items() if isinstance(score, dict)} for run in answer["runs"]]
    found.differences, found.rows = answer["differences"], answer["rows"]
    return found


def _settings(jobs: Sequence[Job]) -> list[tuple[str, list[Any]]]:
    first = jobs[0]
    values: dict[str, list[Any]] = {}
    for place, job in enumerate(jobs[1:], 1):
        for name, before, after in forks.differences(first, job):
            values.setdefault(name, [before] * len(jobs))[place] = after
    return sorted(
        values.items(), key=lambda item: (not item[0].startswith(("data", "model", "methods", "task")), item[0])
    )
