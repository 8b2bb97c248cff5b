"""Compare: the curves of several runs over one another, what differs between them, and which one is really better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import reverse
from django.views.decorators.http import require_GET

from jobs import comparing
from jobs.access import jobs_for, parse_id
from jobs.models import Job
from studio.pages import telling, words
from studio.pages.dials import setting_words

OFFERED = 30  # of one's newest runs
SHOWN_ROWS = 40
SCORES = {
    "eval_accuracy": ("Right on new examples", True),
    "eval_loss": ("Held-out loss", False),
}


@login_required
@require_GET
def compare(request: HttpRequest) -> HttpResponse:
    """The runs that the address names, or a list to choose from."""
    asked = [pk for text in request.GET.getlist("run")[:50] if (pk := parse_id(text))]
    jobs = comparing.chosen(request.user, asked)
    offered = jobs_for(request.user).exclude(last_seq__lte=1).order_by("-created")[:OFFERED]
    context: dict[str, Any] = {
        "jobs": jobs,
        "chosen": {job.pk for job in jobs},
        "offered": [*jobs, *(job for job in offered if job not in jobs)],
        "too_many": len(asked) > comparing.MOST,
        "most": comparing.MOST,
    }
    if len(jobs) >= comparing.FEWEST:
        context |= _side_by_side(comparing.compare(jobs))
    return render(request, "runs/compare.html", context)


def _side_by_side(found: comparing.Comparison) -> dict[str, Any]:
    names = _names(found.jobs)
    return {
        "columns": [{"job": job, "name": name, "number": place + 1} for place, (job, name) in enumerate(zip(found.jobs, names, strict=True))],
        "settings": [
            (telling.setting_title(name), [_value(name, value, job) for value, job in zip(values, found.jobs, strict=True)])
            for name, values in found.settings
        ],
        "scores": _scores(found),
        "facts": _facts(found.jobs),
        "paired": found.paired,
        "answers": [{**row, "cells": list(zip(row["outputs"], row["right"], strict=True))} for row in found.rows[:SHOWN_ROWS]],
        "agree": sum(len(set(row["outputs"])) == 1 for row in found.rows),
        "num_rows": len(found.rows),
        "series": [{"name": name, "series": series_of(job), "run": reverse("run", args=[job.pk])}
                   for job, name in zip(found.jobs, names, strict=True)],
    }  # fmt: skip


def series_of(job: Job) -> str:
    """Where the curves of a run are."""
    return f"/api/v1/jobs/{job.pk}/series"


def _names(jobs: list[Job]) -> list[str]:
    """The names of the runs; those that share one are told apart by a number."""
    taken: dict[str, int] = {}
    found = []
    for job in jobs:
        taken[job.name] = taken.get(job.name, 0) + 1
        found.append(job.name if taken[job.name] == 1 else f"{job.name} ({taken[job.name]})")
    return found


def _value(name: str, value: Any, job: Job) -> str:
    """A setting in words; data and models by the names that people gave them, never as places of the server."""
    if name == "data":
        return job.dataset.name if job.dataset else "–"
    if name == "model":
        return telling.model_name(job)
    return telling.method_title(value) if name.startswith("methods[") else setting_words(value)


def _scores(found: comparing.Comparison) -> list[dict[str, Any]]:
    """A line for each score, with a cell for each run: value, interval, and how surely it differs from the first."""
    lines = []
    for name, (title, higher) in SCORES.items():
        present = [(scores.get(name) if found.scores else None) for scores in found.scores or [{}] * len(found.jobs)]
        plain = [_plain(job, name) for job in found.jobs]
        if not any(present) and all(value is None for value in plain):
            continue
        known = [score["value"] if score else value for score, value in zip(present, plain, strict=True)]
        ranked = [value for value in known if value is not None]
        best = (max if higher else min)(ranked) if ranked else None
        cells = []
        for place, (score, value) in enumerate(zip(present, known, strict=True)):
            gap = found.differences[place].get(name) if found.paired and place else None
            cells.append({
                "value": _spoken(value, higher), "span": f"{_spoken(score['low'], higher)} to {_spoken(score['high'], higher)}" if score else "",
                "best": value is not None and value == best and len(set(ranked)) > 1, "verdict": _verdict(gap, higher) if gap else None,
            })  # fmt: skip
        lines.append({"title": title, "better": "Higher is better." if higher else "Lower is better.", "cells": cells})
    return lines


def _plain(job: Job, name: str) -> float | None:
    value = job.metrics.get(name)
    return float(value) if isinstance(value, int | float) else None


def _spoken(value: float | None, share: bool) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if share else words.number(value)


def _verdict(gap: Mapping[str, float], higher: bool) -> dict[str, str]:
    """Whether the difference from the first run is more than chance, in words."""
    low, high = (gap["low"], gap["high"]) if higher else (-gap["high"], -gap["low"])
    amount = _spoken(abs(gap["value"]), higher)
    if low > 0:
        return {"tone": "better", "says": f"better than the first by {amount}"}
    if high < 0:
        return {"tone": "worse", "says": f"worse than the first by {amount}"}
    return {"tone": "even", "says": "no clear difference from the first"}


def _facts(jobs: list[Job]) -> list[tuple[str, list[str]]]:
    """What else there is to weigh: how long, how large, how far."""
    described = [getattr(getattr(job, "artifact", None), "description", None) or {} for job in jobs]
    lines: list[tuple[str, list[str]]] = [
        ("Steps", [f"{job.done_steps:,}" for job in jobs]),
        ("Training time", [words.duration(about["seconds"]) if about.get("seconds") is not None else "–" for about in described]),
        ("Numbers that learned", [words.short(about.get("num_trainable")) for about in described]),
        ("State", [words.STATUS_WORDS[job.status] for job in jobs]),  # type: ignore[index]
    ]  # fmt: skip
    return [(title, values) for title, values in lines if any(value != "–" for value in values)]
