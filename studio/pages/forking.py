"""Going on from a saved state: which one, what changes, and the buttons that watchers propose."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import get_object_or_404, render
from django.urls import reverse
from django.views.decorators.http import require_http_methods

from jobs import actions, forks
from jobs.access import Person, jobs_for
from jobs.models import Event, Job
from jobs.plain import Refused, faults_of
from studio.pages import dials, telling
from studio.pages.asking import tell_refusal


@login_required
@require_http_methods(["GET", "POST"])
def run_fork(request: HttpRequest, pk: uuid.UUID) -> HttpResponse:
    """Choose a saved state and what shall be different from there on; or do what a watcher proposed."""
    job = get_object_or_404(jobs_for(request.user).select_related("dataset", "model"), pk=pk)
    if request.method == "POST" and request.POST.get("remedy"):
        return _remedy(request, job, request.POST["remedy"])
    try:
        found = _dials(job)
    except Refused as error:
        messages.warning(request, str(error))
        return HttpResponseRedirect(reverse("run", args=[job.pk]))
    if request.method == "POST":
        return _start(request, job, found)
    return _form(request, job, found, step=request.GET.get("step", ""))


def shown_states(job: Job) -> list[forks.SavedState]:
    """The saved states of a run, with an empty place for each score that was not measured: templates see None, never a hole."""
    return [
        replace(state, metrics={"eval_loss": None, "eval_accuracy": None, **state.metrics})
        for state in forks.saved_states(job)
    ]


def _dials(job: Job) -> list[dials.Dial]:
    """The dials of everything that a fork may change, named as the recipe names them."""
    found = []
    for name, spec in forks.knobs(job.recipe).items():
        head, _, leaf = name.partition(".")
        found += dials.dials({"properties": {leaf: spec}}, head)
    return found


def _form(
    request: HttpRequest,
    job: Job,
    found: Sequence[dials.Dial],
    *,
    step: str = "",
    typed: Mapping[str, str] | None = None,
    faults: Sequence[Mapping[str, str]] = (),
    status: int = 200,
) -> HttpResponse:
    present = {dial.where: (forks.value_of(job.recipe, dial.where), "") for dial in found}
    by_place: dict[str, list[Mapping[str, str]]] = {}
    for fault in faults:
        by_place.setdefault(fault["where"].removeprefix("changes."), []).append(fault)
    fields = dials.render(found, {}, present, by_place, dict(typed or {}))
    for shown in fields:  # what stands there is the run's own value, also where that is "left open"
        shown.was = dials.text_of(present[shown.dial.where][0])
        shown.text = (typed or {}).get(shown.dial.where, shown.was)
    states = shown_states(job)
    front = {"settings.learning_rate", "settings.epochs", "settings.max_steps"}
    placed = {dial.where for dial in found}
    context = {
        "job": job, "states": states, "step": step if step.isdigit() else str(states[0].step) if states else "",
        "front": [shown for shown in fields if shown.dial.where in front],
        "plan": [shown for shown in fields if shown.dial.where not in front and forks.is_plan(shown.dial.where)],
        "live": [shown for shown in fields if shown.dial.where not in front and not forks.is_plan(shown.dial.where)],
        "faults": [fault for place, rest in by_place.items() if place not in placed for fault in rest],
        "obstacle": forks.Fork(job=job).check(request.user),
    }  # fmt: skip
    return render(request, "runs/fork.html", context, status=status)


def _start(request: HttpRequest, job: Job, found: Sequence[dials.Dial]) -> HttpResponse:
    data = request.POST
    typed = {
        dial.where: data[dial.where]
        for dial in found
        if dial.where in data and data[dial.where].strip() != data.get(f"was.{dial.where}", "").strip()
    }
    step, go = data.get("step", ""), data.get("go", "")
    if go.startswith("put-back:"):
        typed.pop(go.removeprefix("put-back:"), None)
        return _form(request, job, found, step=step, typed=typed)
    touched = [dial for dial in found if dial.where in typed]
    values, faults = dials.parse(touched, data)
    if not step.isdigit():
        faults.append(_no_step())
    if faults:
        return _form(request, job, found, step=step, typed=typed, faults=faults, status=422)
    fork = forks.Fork(
        job=job,
        step=int(step),
        changes={dial.where: values[dial.name] for dial in touched},
        name=data.get("name", "").strip()[:200],
    )
    try:
        made = fork.execute(request.user)
    except actions.ActionRefused as error:
        messages.warning(request, str(error))
        return HttpResponseRedirect(reverse("run", args=[job.pk]))
    except Refused as error:
        return _form(request, job, found, step=step, typed=typed, faults=faults_of(error), status=422)
    messages.success(request, f"It goes on from step {int(step):,}.")
    return HttpResponseRedirect(reverse("run", args=[made.pk]))


def _no_step() -> dict[str, str]:
    return {
        "where": "step",
        "what": "No saved state is chosen.",
        "why": "The new run has to begin somewhere.",
        "way_out": "Choose one of the list.",
        "code": "no_step",
    }


def _remedy(request: HttpRequest, job: Job, number: str) -> HttpResponse:
    """Do what a signal of this run proposed."""
    event = Event.objects.filter(job=job, kind="signal", seq=int(number)).first() if number.isdigit() else None
    proposed = (event.data.get("remedy") if event else None) or None
    if event is None or not isinstance(proposed, dict):
        raise Http404
    back = HttpResponseRedirect(reverse("run", args=[job.pk]))
    try:
        made = _follow(request.user, job, event.step, proposed)
    except (actions.ActionRefused, Refused) as error:
        tell_refusal(request, error)
        return back
    messages.success(request, telling.sentence(f"{proposed['title']}: it is in the queue"))
    return HttpResponseRedirect(reverse("run", args=[made.pk]))


def _follow(user: Person, job: Job, step: int, proposed: Mapping[str, Any]) -> Job:
    """A fork from the last good state where that was proposed and a run survives the change, or else the run anew with the change."""
    anew, differs = forks.remedied(job, proposed.get("changes", {}))
    start = last_good(job, step) if proposed.get("start") == "last_good" else None
    if start is not None and differs.keys() <= forks.knobs(job.recipe).keys():
        return forks.Fork(job=job, step=start, changes=differs).execute(user)
    sentence = actions.Again(job).check(user)
    if sentence:
        raise actions.ActionRefused(sentence)
    return actions.Create(owner=user, name=job.name, recipe=anew, again_of=job).execute(user)


def last_good(job: Job, step: int) -> int | None:
    """The saved state to go back to after something was noticed at `step`: the best one up to there, or else the newest."""
    before = [state for state in forks.saved_states(job) if 0 < state.step <= step]
    return next((state.step for state in before if state.best), before[0].step if before else None)
