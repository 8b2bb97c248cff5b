"""Runs: the list, one run while it learns and afterwards, and what a person may do with it."""

from __future__ import annotations

import re
import uuid
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.paginator import Paginator
from django.db.models import Case, Q, QuerySet, When
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import get_object_or_404, render
from django.template.loader import render_to_string
from django.urls import URLPattern, path, reverse
from django.views.decorators.http import require_GET, require_http_methods

from jobs import actions, forks, overrides
from jobs.access import Person, jobs_for
from jobs.downloads import METRICS
from jobs.models import ACTIVE, TERMINAL, Event, Job, Status
from jobs.plain import Refused
from jobs.series import series
from studio.pages import comparing, forking, results, telling, words
from studio.pages.asking import tell_refusal
from studio.pages.trials import live_trials
from studio.pages.verdict import verdict

RUNS_A_PAGE = 20
SPARK_POINTS = 80
FIRST_LOOK = 0.1  # of the planned examples, unless a method of the run looks earlier or later
PARTS = ("head", "strip", "notice", "trials", "signals", "numbers", "samples", "table", "states", "log", "machine")
NOT_MEASURED = {"eval_loss": None, "eval_accuracy": None, "samples": None}
STORY = ("log", "state", "status", "checkpoint", "child", "trial", "override")
TABS = {
    "": ("All", ()),
    "active": ("At work", (*ACTIVE, Status.LOST)),
    "waiting": ("Waiting", (Status.QUEUED, Status.PAUSED)),
    "finished": ("Finished", (Status.SUCCEEDED,)),
    "ended": ("Failed or cancelled", (Status.FAILED, Status.CANCELLED)),
}
_MOVING_FIRST = Case(When(status__in=(*ACTIVE, Status.LOST), then=0), When(status=Status.QUEUED, then=1), default=2)
_TOKEN = re.compile(r'name="csrfmiddlewaretoken" value="[^"]*"')


# -- the list ----------------------------------------------------------------------------------------------------------------------


@login_required
@require_GET
def runs(request: HttpRequest) -> HttpResponse:
    """Every run that a person may see, filtered as they type."""
    asked = " ".join(request.GET.get("q", "").split())[:100]
    tab = request.GET.get("show", "")
    tab = tab if tab in TABS else ""
    everything = jobs_for(request.user)
    rows = _containing(everything, asked).filter(**({"status__in": TABS[tab][1]} if tab else {}))
    rows = rows.select_related("dataset", "model", "artifact", "owner").defer(
        "artifact__files", "artifact__certificate"
    )
    page = Paginator(rows.order_by(_MOVING_FIRST, "-created"), RUNS_A_PAGE).get_page(request.GET.get("page"))
    shown = list(page.object_list)
    curves = sparks(shown)
    context = {
        "page": page, "rows": [{"job": job, "spark": curves[job.pk], "methods": telling.leading(job), "doing": doing(job)} for job in shown],
        "asked": asked, "tab": tab, "tabs": {key: title for key, (title, _) in TABS.items()},
        "moving": any(job.status in ACTIVE or job.status == Status.QUEUED for job in shown),
        "address": _address(asked, tab, page.number), "kept": _address(asked, tab, 1).replace("?", "&", 1).removesuffix("&"),
        "none_at_all": not shown and not asked and not tab,
    }  # fmt: skip
    return render(request, "runs/rows.html" if request.headers.get("HX-Request") else "runs/list.html", context)


def _containing(rows: QuerySet[Job], asked: str) -> QuerySet[Job]:
    for word in asked.split():
        rows = rows.filter(
            Q(name__icontains=word)
            | Q(dataset__name__icontains=word)
            | Q(model__name__icontains=word)
            | Q(recipe__methods__icontains=word)
        )
    return rows


def _address(asked: str, tab: str, number: int) -> str:
    asked_for = {"q": asked, "show": tab, "page": number if number > 1 else ""}
    return "?" + urlencode({key: value for key, value in asked_for.items() if value})


def doing(job: Job) -> str:
    """How a run is doing, short enough for a list."""
    artifact = getattr(job, "artifact", None)
    if artifact is not None:
        return verdict(artifact.description).sentence
    if job.status == Status.FAILED and job.faults:
        return str(job.faults[0].get("what") or job.message)
    if job.status in ACTIVE:
        return telling.sentence(words.progress(job))
    return telling.sentence(job.message or words.progress(job))


def sparks(jobs: Sequence[Job]) -> dict[uuid.UUID, list[float]]:
    """A small curve for each run: the loss of those that learn now, and the held-out loss of the others, read at once."""
    curves: dict[uuid.UUID, list[float]] = {job.pk: [] for job in jobs}
    rest = [job.pk for job in jobs if job.status not in ACTIVE]
    found = (
        Event.objects.filter(job_id__in=rest, kind="evaluation")
        .order_by("job_id", "seq")
        .values_list("job_id", "data__eval_loss")
    )
    for job_id, loss in found:
        if isinstance(loss, int | float):
            curves[job_id].append(float(loss))
    for job in jobs:
        if job.status in ACTIVE:
            curves[job.pk] = loss_curve(job)
    return curves


def loss_curve(job: Job) -> list[float]:
    """The loss of a run, thinned out for a small picture."""
    values = series(job, SPARK_POINTS)["curves"].get("loss", {}).get("value", [])
    return [value for value in values if value is not None]


# -- one run -----------------------------------------------------------------------------------------------------------------------


@login_required
@require_GET
def run(request: HttpRequest, pk: uuid.UUID) -> HttpResponse:
    """One run: what it is, how it is doing, its curve, and what can be done."""
    job = _visible(request, pk)
    context = _context(request, job)
    parts = _parts(request, context)
    return render(request, "runs/run.html", {**context, "parts": parts, "still": _still(job)})


@login_required
@require_GET
def run_parts(request: HttpRequest, pk: uuid.UUID) -> HttpResponse:
    """The sentences of the page anew; the script replaces those that have changed."""
    context = _context(request, _visible(request, pk))
    return render(request, "runs/parts.html", {**context, "parts": _parts(request, context)})


def _visible(request: HttpRequest, pk: uuid.UUID) -> Job:
    rows = jobs_for(request.user).select_related("dataset", "model", "artifact", "again_of")
    return get_object_or_404(rows, pk=pk)


def _parts(request: HttpRequest, context: dict[str, Any]) -> dict[str, dict[str, str]]:
    parts = {}
    for name in PARTS:
        html = render_to_string(f"runs/parts/{name}.html", context, request)
        content = _TOKEN.sub("", html)  # it is masked anew for each answer
        parts[name] = {"html": html, "key": f"{zlib.crc32(content.encode()):08x}"}
    return parts


def _context(request: HttpRequest, job: Job) -> dict[str, Any]:
    events = list(Event.objects.filter(job=job, kind__in=("signal", "evaluation", "sample")).order_by("-seq")[:600])[
        ::-1
    ]
    story = list(Event.objects.filter(job=job, kind__in=STORY).order_by("-seq")[:200])
    newest = Event.objects.filter(job=job, kind="metric").order_by("-seq").first()
    signals = [{**event.data, "step": event.step, "seq": event.seq} for event in events if event.kind == "signal"]
    evaluations = [{**NOT_MEASURED, **event.data, "step": event.step} for event in events if event.kind == "evaluation"]
    row = {**dict.fromkeys(METRICS), **(newest.data["rows"][-1] if newest else {})}  # templates see None, never a hole
    last: dict[str, Any] = next((event.data for event in story if event.kind == "state"), {})
    doing = (
        str(last.get("message", "")) if last.get("state") != "running" else ""
    )  # that one is about what comes, not what is
    milestone, says = telling.milestone(job)
    artifact = getattr(job, "artifact", None)
    return {
        "job": job, "artifact": artifact, "verdict": verdict(artifact.description) if artifact else None,
        "ended": job.status in TERMINAL, "active": job.status in ACTIVE,
        "lead": telling.lead(job), "state": telling.state(job, signals, doing), "share": telling.share(job),
        "title": telling.browser_title(job), "milestone": milestone, "says": says,
        "signals": signals[::-1], "evaluations": evaluations, "measured": {**NOT_MEASURED, **job.metrics}, "samples": _samples(events), "row": row,
        "summary": summary(job, evaluations), "log": [line for line in map(_line, story) if line], "child": _child(story),
        "possible": [slug for slug, obstacle in actions.available(job, request.user).items() if obstacle is None],
        "queue_place": telling.in_front(job, request.user) if job.status == Status.QUEUED else None,
        "remedy": telling.remedy(job), "methods": telling.methods(job), "first_look": first_look(job),
        "states": forking.shown_states(job), "family": forks.family(job, request.user),
        "trials": live_trials(_trials(job, request.user)),
    }  # fmt: skip


def first_look(job: Job) -> float:
    """Which share of the run counts as its early phase: the window that a watcher of this run reads, or a tenth."""
    cards = {card["slug"]: card for card in telling.known().get("methods", [])}
    for ref in job.recipe.get("methods", []):
        dials = cards.get(ref["slug"], {}).get("schema", {}).get("properties", {})
        value = ref.get("params", {}).get("first_window", dials.get("first_window", {}).get("default"))
        if isinstance(value, int | float):
            return float(value)
    return FIRST_LOOK


def summary(job: Job, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The curve in words, for everyone who does not see it."""
    known = [
        (row["step"], float(row["eval_loss"])) for row in evaluations if isinstance(row.get("eval_loss"), int | float)
    ]
    parts = []
    if job.loss is not None:
        parts.append(f"After {words.count(job.done_steps, 'step')} the loss is {words.number(job.loss)}.")
    if len(known) > 1:
        (_, first), (_, last), best = known[0], known[-1], min(known, key=lambda pair: pair[1])
        way = "fell" if last < first else "rose" if last > first else "stayed"
        parts.append(f"On examples that were kept back it {way} from {words.number(first)} to {words.number(last)}.")
        if best[1] < last:
            parts.append(f"Its lowest point so far was {words.number(best[1])} at step {best[0]:,}.")
    elif known:
        parts.append(
            f"On examples that were kept back the loss was {words.number(known[0][1])} at step {known[0][0]:,}."
        )
    return " ".join(parts) or "There is nothing to draw yet: the curve begins with the first step."


def _trials(job: Job, user: Person) -> list[dict[str, Any]]:
    """The trials of a search; without choices while the engine cannot be asked what its method offers."""
    try:
        return overrides.trials_of(job, user)
    except (Refused, OSError, ValueError):
        return [dict(row) for row in overrides.newest(overrides.trial_events(job)).values()]


def _samples(events: Sequence[Event]) -> list[dict[str, Any]]:
    """The newest answers, each with those that the model gave to the same example before, as far as they were others."""
    found = [event for event in events if event.kind == "sample"]
    newest = found[-1].step if found else 0
    last = {
        event.data.get("prompt", ""): event for event in found if event.step == newest
    }  # those of the end come last
    shown = []
    for prompt, event in list(last.items())[:6]:
        before: list[dict[str, Any]] = []
        for earlier in found:
            if earlier.step < newest and earlier.data.get("prompt") == prompt:
                output = earlier.data.get("output")
                if not before or before[-1]["output"] != output:
                    before.append({"step": earlier.step, "output": output})
        changed = len(before) > 1 or (before and before[0]["output"] != event.data.get("output"))
        shown.append({**event.data, "step": event.step, "before": before[-5:] if changed else []})
    return shown


def _line(event: Event) -> dict[str, Any] | None:
    """One line of the log, as a sentence."""
    data, text, level = event.data, "", "info"
    if event.kind in ("log", "state", "trial", "override"):
        text, level = str(data.get("message", "")), str(data.get("level", "info"))
    elif event.kind == "status":
        word = (
            words.STATUS_WORDS.get(Status(data["to"]), data["to"])
            if data.get("to") in Status.values
            else str(data.get("to", ""))
        )
        text = str(data.get("message") or f"{word}.")
    elif event.kind == "checkpoint":
        text = "Saved a checkpoint; it is the best one so far." if data.get("best") else "Saved a checkpoint."
    elif event.kind == "child" and (data.get("attempt") or 1) > 1:
        text = f"Attempt {data['attempt']} begins."
    moment = datetime.fromtimestamp(event.time, UTC)
    return {"seq": event.seq, "time": moment, "step": event.step, "text": text, "level": level} if text else None


def _child(story: Sequence[Event]) -> dict[str, Any]:
    return next((event.data for event in story if event.kind == "child"), {})


def _still(job: Job) -> dict[str, Any] | None:
    """A picture of the curve for the first moment, and for browsers without scripts."""
    curves = series(job, 240)["curves"] if job.last_seq > 1 else {}
    loss, held = curves.get("loss"), curves.get("eval_loss")
    if not loss:
        return None
    values = [value for curve in (loss, held) if curve for value in curve["value"] if value is not None]
    high, last = 1.05 * (max(values, default=1.0) or 1.0), max(1, loss["step"][-1])
    if (
        job.status not in TERMINAL and last < job.total_steps
    ):  # the plan opens in the same stages as in the script's chart
        last = next(
            (share * job.total_steps for share in (0.2, 0.4, 0.6, 0.8) if last <= 0.85 * share * job.total_steps),
            job.total_steps,
        )
    return {"loss": _points(loss, last, high), "held": _points(held, last, high) if held else ""}


def _points(curve: Mapping[str, Sequence[Any]], last: float, high: float) -> str:
    pairs = zip(curve["step"], curve["value"], strict=True)
    return " ".join(
        f"{1000 * step / last:.1f},{300 - 296 * value / high:.1f}" for step, value in pairs if value is not None
    )


# -- what a person may do ------------------------------------------------------------------------------------------------------------

DONE = {
    "pause": "It pauses at the next step; everything is saved.",
    "resume": "It is back in the queue and goes on from exactly where it was.",
    "stop": "It stops at the next step and keeps what it has learned.",
    "cancel": "It is being cancelled.",
    "delete": "The run and everything it made is deleted.",
    "again": "The same run once more, from the beginning.",
}
ASK_FIRST = ("cancel", "delete")
TOLD = {
    "keep": "Trial {trial} is kept: it goes on after the slice that is under way.",
    "stop": "Trial {trial} is stopped at its next step.",
}
ACTIONS = {action.slug: action for action in actions.ACTIONS}


@login_required
@require_http_methods(["GET", "POST"])
def run_action(request: HttpRequest, pk: uuid.UUID, action: str) -> HttpResponse:
    """Do something with a run. What cannot be undone is asked once more, also where scripts are off."""
    job = _visible(request, pk)
    if action not in ACTIONS:
        raise Http404
    back = HttpResponseRedirect(reverse("run", args=[job.pk]))
    if request.method == "GET":
        return back
    if action in ASK_FIRST and request.POST.get("sure") != "yes":
        return render(
            request,
            "runs/confirm.html",
            {"job": job, "action": action, "obstacle": ACTIONS[action](job).check(request.user)},
        )
    try:
        changed = (
            _again(request.user, job, request.POST.get("with", ""))
            if action == "again"
            else ACTIONS[action](job).execute(request.user)
        )
    except (actions.ActionRefused, Refused) as error:
        tell_refusal(request, error)
        return back
    messages.success(request, DONE[action])
    return HttpResponseRedirect(reverse("runs") if action == "delete" else reverse("run", args=[changed.pk]))


@login_required
@require_http_methods(["GET", "POST"])
def run_overrule(request: HttpRequest, pk: uuid.UUID, trial: int, verdict: str) -> HttpResponse:
    """Keep or stop one trial of a search while it runs."""
    job = _visible(request, pk)
    if verdict not in TOLD:
        raise Http404
    back = HttpResponseRedirect(f"{reverse('run', args=[job.pk])}#trials-title")
    if request.method == "POST":
        try:
            overrides.Overrule(job=job, trial=trial, verdict=verdict).execute(request.user)  # type: ignore[arg-type]
        except (actions.ActionRefused, Refused) as error:
            tell_refusal(request, error)
        else:
            messages.success(request, TOLD[verdict].format(trial=trial))
    return back


def _again(user: Person, job: Job, change: str) -> Job:
    """The same run once more; with the change that mends its failure when that was the button."""
    found = telling.remedy(job) if change == "remedy" else None
    if found is None:
        return actions.Again(job).execute(user)
    sentence = actions.Again(job).check(user)
    if sentence:
        raise actions.ActionRefused(sentence)
    recipe = {**job.request, "settings": {**job.request.get("settings", {}), **found.settings}}
    return actions.Create(owner=user, name=job.name, recipe=recipe, again_of=job).execute(user)


urlpatterns: list[URLPattern] = [
    path("runs/", runs, name="runs"),
    path("runs/compare/", comparing.compare, name="run-compare"),
    path("runs/<uuid:pk>/", run, name="run"),
    path("runs/<uuid:pk>/parts/", run_parts, name="run-parts"),
    path("runs/<uuid:pk>/fork/", forking.run_fork, name="run-fork"),
    path("runs/<uuid:pk>/trials/<int:trial>/<slug:verdict>/", run_overrule, name="run-overrule"),
    path("runs/<uuid:pk>/<slug:action>/", run_action, name="run-action"),
    path("results/", results.results, name="results"),
    path("results/<uuid:pk>/", results.result, name="result"),
    path("results/<uuid:pk>/try/", results.result_predict, name="result-predict"),
    path("results/<uuid:pk>/serve/", results.result_serve, name="result-serve"),
    path("results/<uuid:pk>/check/", results.result_check, name="result-check"),
]
