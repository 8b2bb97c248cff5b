"""Home, search, help, and how busy the studio is."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.decorators import login_required
from django.contrib.auth.models import User
from django.db.models import Q
from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET

from jobs.access import datasets_for, jobs_for, models_for
from jobs.models import ACTIVE, TERMINAL, Dataset, Job, Status
from jobs.series import series
from studio.pages import garden
from studio.pages.asking import PageRequest
from studio.pages.context import queue_state
from studio.pages.glossary import GLOSSARY

MAX_FOUND = 5
SPARK_POINTS = 160


@login_required
@require_GET
def home(request: PageRequest) -> HttpResponse:
    """What runs now, what finished lately, and three next steps."""
    live = _live(request.user)
    mine = jobs_for(request.user).filter(owner=request.user)
    ended = list(mine.filter(status__in=TERMINAL).select_related("artifact").order_by("-ended_at")[:5])
    waiting = list(mine.filter(status__in=[Status.QUEUED, Status.PAUSED, Status.LOST]).order_by("queued_at")[:4])
    starters = _starters(request.user) if not ended and not live else []
    uploaded = bool(ended) or Dataset.objects.filter(owner=request.user).exists()
    return render(request, "pages/home.html", {
        **_live_context(live), "ended": ended, "waiting": waiting, "starters": starters, "uploaded": uploaded,
        "newcomer": not (ended or waiting or live),
    })  # fmt: skip


def _starters(user: User) -> list[Dataset]:
    """Data sets that come along and that some model here can learn from."""
    kinds = set(models_for(user).values_list("kind", flat=True))
    shapes = {shape for goal in garden.goals() if kinds & set(goal["model_kinds"]) for shape in goal["data_shapes"]}
    return list(datasets_for(user).filter(owner=None, shape__in=shapes).only("name", "shape", "num_rows")[:3])


@login_required
@require_GET
def home_live(request: PageRequest) -> HttpResponse:
    """The panel of the live run, asked for again every few seconds."""
    response = render(request, "pages/home_live.html", _live_context(live := _live(request.user)))
    if live is None:
        response["HX-Refresh"] = "true"  # it has ended, so the rest of the page is no longer true either
    return response


def _live(user: Any) -> Job | None:
    return (
        Job.objects.filter(owner=user, status__in=ACTIVE)
        .select_related("model", "dataset")
        .order_by("started_at")
        .first()
    )


def _live_context(live: Job | None) -> dict[str, Any]:
    if live is None:
        return {"live": None}
    loss = series(live, SPARK_POINTS)["curves"].get("loss", {}).get("value", [])
    return {"live": live, "losses": loss, "first_loss": next((value for value in loss if value is not None), None)}


@login_required
@require_GET
def queue(request: PageRequest) -> HttpResponse:
    """The line in the rail that says how busy the studio is."""
    return render(request, "components/queue.html", {"queue": queue_state()})


@login_required
@require_GET
def search(request: PageRequest) -> HttpResponse:
    """Runs, data, models and methods that contain the words."""
    asked = " ".join(request.GET.get("q", "").split())[:100]
    context = {"search_words": asked, "groups": found(request.user, asked) if asked else []}
    return render(request, "pages/found.html" if request.htmx else "pages/search.html", context)


def found(user: User, asked: str) -> list[dict[str, Any]]:
    """What a person may see and searches for, by kind."""
    words = asked.split()
    named, described = Q(), Q()
    for word in words:
        named &= Q(name__icontains=word)
        described &= Q(name__icontains=word) | Q(sentence__icontains=word)
    low = [word.lower() for word in words]
    methods = [
        plant
        for plant in garden.plants()
        if all(word in f"{plant.title} {plant.slug} {plant.pick_when} {plant.paper}".lower() for word in low)
    ]
    # The one that is called exactly so comes first, then those whose title begins with it.
    methods.sort(
        key=lambda plant: (plant.title.lower() != asked.lower(), not plant.title.lower().startswith(asked.lower()))
    )
    terms = [
        {"title": term[:1].upper() + term[1:], "sentence": sentence}
        for term, sentence in GLOSSARY.items()
        if asked.lower() in term
    ]
    groups: list[dict[str, Any]] = [
        {
            "title": "Runs",
            "kind": "run",
            "items": list(jobs_for(user).filter(named).only("name", "status")[:MAX_FOUND]),
        },
        {
            "title": "Data",
            "kind": "dataset",
            "items": list(datasets_for(user).filter(named).only("name", "num_rows", "shape")[:MAX_FOUND]),
        },
        {
            "title": "Models",
            "kind": "model",
            "items": list(models_for(user).filter(described).only("name", "sentence")[:MAX_FOUND]),
        },
        {"title": "Methods", "kind": "method", "items": methods[:MAX_FOUND]},
        {"title": "Words", "kind": "term", "items": terms[:MAX_FOUND]},
    ]
    return [group for group in groups if group["items"]]


@login_required
@require_GET
def help_page(request: PageRequest) -> HttpResponse:
    """How the studio works, in plain words, and the terms of the field."""
    return render(request, "pages/help.html", {"glossary": sorted(GLOSSARY.items())})
