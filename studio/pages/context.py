"""What the frame of every page shows: where one can go, and how busy the studio is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.models import Count
from django.http import HttpRequest
from django.utils.functional import SimpleLazyObject

from jobs.models import ACTIVE, Job, Status
from studio.pages import words


@dataclass(frozen=True)
class Place:
    """One entry of the rail."""

    name: str  # of its address
    title: str
    icon: str
    pages: frozenset[str]  # addresses that count as being there
    key: str = ""  # typed after g
    phone: bool = True  # stands on the bar of a phone; the others are under "More"


PLACES = (
    Place("home", "Home", "home", frozenset({"home"}), "h"),
    Place("new", "New run", "new", frozenset({"new"})),
    Place("runs", "Runs", "runs", frozenset({"runs", "run"}), "r"),
    Place("data", "Data", "data", frozenset({"data", "dataset"}), "d"),
    Place("models", "Models", "models", frozenset({"models", "model"}), "o", phone=False),
    Place("methods", "Methods", "methods", frozenset({"methods", "method"}), "m", phone=False),
    Place("results", "Results", "results", frozenset({"results", "result"}), "e", phone=False),
)


def queue_state() -> dict[str, Any]:
    """How busy the studio is: numbers only, because whose runs they are is nobody else's business."""
    rows = (
        Job.objects.filter(status__in=[Status.QUEUED, *ACTIVE])
        .values_list("status")
        .annotate(num=Count("id"))
        .order_by()
    )
    by_status: dict[str, int] = dict(rows)
    waiting = by_status.get(Status.QUEUED, 0)
    running = sum(by_status.values()) - waiting
    if running and waiting:
        text = f"{words.count(running, 'run')} at work, {waiting} waiting"
    elif running:
        text = f"{words.count(running, 'run')} at work"
    elif waiting:
        text = f"{words.count(waiting, 'run')} waiting to start"
    else:
        text = "Nothing is running"
    return {
        "text": text,
        "running": running,
        "waiting": waiting,
        "icon": "running" if running else "queued" if waiting else "idle",
    }


def frame(request: HttpRequest) -> dict[str, Any]:
    """Context processor of the pages."""
    match = request.resolver_match
    here = (match.url_name or "").partition("-")[0] if match else ""
    return {
        "places": PLACES,
        "here": next((place.name for place in PLACES if here in place.pages), here),
        "queue": SimpleLazyObject(queue_state),
    }
