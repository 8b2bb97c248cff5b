"""New run: four steps on one page. Works as plain forms; a script only spares the reloads."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.decorators import login_required
from django.http import HttpResponse, HttpResponseRedirect
from django.shortcuts import get_object_or_404, render
from django.urls import reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods

from jobs import plain
from jobs.access import jobs_for, parse_id
from jobs.actions import ActionRefused, Create
from jobs.models import Job
from studio.pages import words
from studio.pages.asking import PageRequest
from studio.pages.draft import SESSION_KEY, Draft
from studio.pages.plan import STEPS, Plan

FILLED = ("goal", "dataset", "model", "method")


@never_cache
@login_required
@require_http_methods(["GET", "POST"])
def new(request: PageRequest) -> HttpResponse:
    """The page with the four steps."""
    draft = Draft.of(request.session)
    if request.method == "POST":
        return _post(request, draft)
    if "from" in request.GET:
        return _from_run(request, request.GET["from"])
    if any(name in request.GET for name in FILLED):
        fresh = Draft() if "fresh" in request.GET else draft
        fresh.choose(request.GET)
        Plan(request.user, fresh).forget_what_no_longer_fits()
        fresh.keep(request.session)
        return HttpResponseRedirect(reverse("new"))
    return _show(request, draft, request.GET.get("at", ""))


def _from_run(request: PageRequest, job_id: str) -> HttpResponse:
    """Again with changes: the draft of an earlier run."""
    job = get_object_or_404(jobs_for(request.user), pk=parse_id(job_id))
    draft = Draft()
    draft.read(job.request)
    draft.again_of = str(job.pk)
    draft.dataset = str(job.dataset_id or "")
    draft.model = str(job.model_id or "") or draft.model
    draft.keep(request.session)
    return HttpResponseRedirect(reverse("new"))


def _post(request: PageRequest, draft: Draft) -> HttpResponse:
    go = request.POST.get("go", "next")
    if go == "reset":
        request.session.pop(SESSION_KEY, None)
        return _move(request, Draft(), "goal")
    if go == "paste":
        return _paste(request, draft)
    step = request.POST.get("step", "goal")
    before = draft.goal
    draft.choose(request.POST)
    if draft.goal != before:
        Plan(request.user, draft).forget_what_no_longer_fits()
    composed = request.POST.getlist("composed")[:20]
    unread = draft.turn(request.POST, composed)
    if go.startswith("put-back:"):
        draft.put_back(go.removeprefix("put-back:"))
        unread = [fault for fault in unread if fault["where"] in draft.typed]
        go = "stay"
    draft.keep(request.session)
    if go == "start":
        return _start(request, draft, unread)
    if go == "stay":
        return _show(request, draft, step, unread)
    if go.startswith("edit:"):
        return _move(request, draft, go.removeprefix("edit:"))
    following = STEPS[min(STEPS.index(step) + 1, len(STEPS) - 1)] if step in STEPS else ""
    return _move(request, draft, following)


def _move(request: PageRequest, draft: Draft, step: str) -> HttpResponse:
    draft.keep(request.session)
    address = f"{reverse('new')}?at={step}" if step in STEPS else reverse("new")
    if not request.htmx:
        return HttpResponseRedirect(address)
    response = _show(request, draft, step)
    response["HX-Push-Url"] = address
    return response


def _paste(request: PageRequest, draft: Draft) -> HttpResponse:
    text = request.POST.get("recipe", "")
    try:
        recipe = plain.recipe_from_text(text)
    except plain.Refused as error:
        return _show(
            request, draft, request.POST.get("step", ""), pasted=text, pasted_faults=plain.faults_of(error), status=422
        )
    fresh = Draft()
    fresh.read(recipe)
    _look_up(request, fresh, recipe)
    return _move(request, fresh, "check")


def _look_up(request: PageRequest, draft: Draft, recipe: dict[str, Any]) -> None:
    """A recipe may name the starters by name; what this person cannot see is left open."""
    plan = Plan(request.user, draft)
    data, model = (recipe.get("data") or {}).get("source", ""), recipe["model"]["source"]
    row = plan.dataset or next((row for row in plan.datasets if row.starter and f"starter:{row.starter}" == data), None)
    start = plan.model or next((start for start in plan.starts if start.source and start.source == model), None)
    draft.dataset, draft.model = str(row.pk) if row else "", start.value if start else ""


def _start(request: PageRequest, draft: Draft, unread: list[dict[str, str]]) -> HttpResponse:
    plan = Plan(request.user, draft, unread)
    if unread or not draft.complete:
        return _show(request, draft, "check", unread, status=422)
    earlier = parse_id(draft.again_of)
    again_of = Job.objects.filter(pk=earlier, owner=request.user).first() if earlier else None
    create = Create(
        owner=request.user,
        recipe=draft.recipe(),
        name=draft.name,
        dataset=plan.dataset,
        model=plan.model.entry if plan.model else None,
        again_of=again_of,
        idempotency_key=draft.key,
    )
    try:
        job = create.execute(request.user)
    except ActionRefused as error:
        return _show(request, draft, "check", refused=str(error), status=409)
    except plain.Refused:
        return _show(
            request, draft, "check", status=422
        )  # the page asks the engine again and shows every fault at its place
    request.session.pop(SESSION_KEY, None)
    address = reverse("run", args=[job.pk])
    if request.htmx:
        return HttpResponse(status=204, headers={"HX-Redirect": address})
    return HttpResponseRedirect(address)


def _show(
    request: PageRequest,
    draft: Draft,
    asked: str = "",
    unread: list[dict[str, str]] | None = None,
    *,
    refused: str = "",
    pasted: str = "",
    pasted_faults: list[dict[str, str]] | None = None,
    status: int = 200,
) -> HttpResponse:
    plan = Plan(request.user, draft, draft.unread() if unread is None else list(unread))
    plan.forget_what_vanished()
    open_step = plan.step(asked)
    context: dict[str, Any] = {
        "plan": plan, "draft": draft, "open": open_step, "refused": refused, "pasted": pasted, "pasted_faults": pasted_faults or [],
        "steps": _steps(plan, open_step), "focus": request.method == "POST",
    }  # fmt: skip
    partial = bool(request.htmx) and not request.htmx.history_restore_request
    # A refusal is drawn like any answer: htmx swaps only what arrives as a success.
    return render(
        request, "pages/wizard.html" if partial else "pages/new.html", context, status=200 if partial else status
    )


def _steps(plan: Plan, open_step: str) -> list[dict[str, Any]]:
    """Each step with its state and, when done, its sentence."""
    draft = plan.draft
    method = plan.method.title if plan.method else ""
    extras = f", with {words.spoken(plan.extra_titles)}" if plan.extra_titles else ""
    sentences = {
        "goal": plan.goal["title"] if plan.goal else "",
        "data": f"{plan.dataset.name}, {words.count(plan.dataset.num_rows, 'row')}" if plan.dataset else "",
        "how": f"{method} on {plan.model.name}{extras}" if plan.model and method else "",
        "check": "",
    }
    titles = {"goal": "What do you want?", "data": "Which data?", "how": "How?", "check": "Check and start"}
    done = {
        "goal": bool(draft.goal),
        "data": bool(draft.dataset),
        "how": bool(draft.model and draft.method),
        "check": False,
    }
    states = {name: "open" if name == open_step else "done" if done[name] else "later" for name in STEPS}
    return [{"name": name, "title": titles[name], "state": states[name], "sentence": sentences[name], "template": f"pages/wizard_{name}.html"}
            for name in STEPS]  # fmt: skip
