"""What a page of a run holds, and what the studio has stored of that run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from playwright.sync_api import BrowserContext, Page

from tests.e2e.installation import Installation

RECIPE: dict[str, Any] = {
    "name": "Watched run",
    "operation": "train",
    "task": "classify",
    "data": {"source": "starter:customer-messages"},
    "model": {"source": "starter:minilm-l6"},
    "methods": [{"slug": "paca"}, {"slug": "clip"}, {"slug": "early-dynamics-stopping"}],
    "settings": {"max_steps": 60, "evaluations": 4, "max_length": 24, "batch_size": 8},
}
# As cheap as a real run can be, where what it learns does not matter.
SHORT: dict[str, Any] = {
    **RECIPE,
    "name": "Short run",
    "model": {"source": "starter:bonsai-stories"},
    "methods": [{"slug": "full-finetuning"}, {"slug": "clip"}],
    "settings": {"max_steps": 3, "evaluations": 1, "max_length": 16, "batch_size": 4},
}
POINTS = "() => document.getElementById('run').curves.length"
SERIES = """() => {
  const { loss, norm, held } = document.getElementById('run').curves;
  return { step: loss.step, loss: loss.value, norm: norm.value, samples: loss.samples, held: held.value, held_step: held.step };
}"""


@dataclass(frozen=True, eq=False)
class Stored:
    """A number of the log. Equal to itself, and to the seven digits in which curves travel; to nothing beside them."""

    value: float

    def __eq__(self, other: object) -> bool:
        return other in (self.value, float(f"{self.value:.7g}"))

    __hash__ = None  # type: ignore[assignment]


def until(page: Page, points: int, seconds: float = 90.0) -> None:
    """Wait until the page holds so many points. (Playwright's own waiting evaluates a text, which the page forbids.)"""
    end = time.monotonic() + seconds
    while page.evaluate(POINTS) < points:
        assert time.monotonic() < end, f"{page.evaluate(POINTS)} points after {seconds:g} seconds, not {points}."
        page.wait_for_timeout(200)


def all_events(studio: Installation, context: BrowserContext, job: str) -> list[dict[str, Any]]:
    """Every event of a run, as REST tells them."""
    events: list[dict[str, Any]] = []
    while True:
        after = events[-1]["seq"] if events else 0
        answer = studio.get(context, f"/api/v1/jobs/{job}/events?after={after}&limit=5000")
        if not answer["events"]:
            return events
        events += answer["events"]


def expected(events: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What a page should hold that has seen all these events."""
    rows = [row for event in events if event["kind"] == "metric" for row in event["data"]["rows"]]
    measured = [event for event in events if event["kind"] == "evaluation"]
    return {
        "step": [row["step"] for row in rows],
        "samples": [row["samples"] for row in rows],
        "loss": [Stored(row["loss"]) for row in rows],
        "norm": [Stored(row["grad_norm"]) for row in rows],
        "held": [Stored(event["data"]["eval_loss"]) for event in measured],
        "held_step": [event["step"] for event in measured],
    }
