"""Jobs over REST: check, create, follow, steer."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

from django.http import HttpRequest, HttpResponse
from ninja import Body, Header, Path, Query, Router, Status

from engine.core.errors import Fault
from engine.core.overrides import KeepOrStop
from engine.core.recipe import Recipe
from jobs import access, actions, comparing, downloads, forks, overrides
from jobs.api.auth import who
from jobs.api.paging import Limit, Order, Page, ordered, paged
from jobs.api.problems import NOT_FOUND, Problem, refuse
from jobs.api.schemas import (
    CheckOut,
    ComparisonOut,
    EventsOut,
    ForkIn,
    JobDetail,
    JobList,
    SavedStates,
    TreeOut,
    TrialsOut,
    job_detail,
    job_out,
)
from jobs.models import Event, Job
from jobs.series import Axis, Window, series

router = Router(tags=["jobs"])
ORDERS = {"created": "created", "name": "name", "status": "status", "ended_at": "ended_at"}
StatusFilter = Literal[
    "queued", "starting", "running", "stopping", "paused", "lost", "succeeded", "failed", "cancelled"
]
REFUSALS = {"not_possible": 409, "key_reused": 409, "busy": 409, "forbidden": 403, "gone": 404, "unknown_trial": 404}
WAYS_OUT = {
    "key_reused": "Choose a new key for a new job.",
    "busy": "Ask again in a moment.",
    "unknown_trial": "Read the list of its trials, which says what is possible for each.",
}
MAX_SEQ = 2**63 - 1
TOO_FEW = Fault(
    where="jobs",
    what="There are not enough runs to compare.",
    why=f"{comparing.FEWEST} or more are needed, and ids that you cannot see do not count.",
    way_out="Write the ids of your runs with commas between.",
    code="too_few",
)
ANSWER_ROWS = 20_000  # metric rows in one answer
Payload = Annotated[dict[str, Any], Body()]
Key = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{0,100}$",
        description="Any text of your own. A second request with the same key gives the same job.",
    ),
]
After = Annotated[int, Query(ge=0, le=MAX_SEQ, description="The last number you have seen; 0 for all.")]


def _file(content_type: str) -> dict[str, Any]:
    return {"responses": {200: {"description": "The file.", "content": {content_type: {"schema": {"type": "string"}}}}}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
        return {key: _inlined(item, definitions) for key, item in schema.items() if key != "$defs"}
    return [_inlined(item, definitions) for item in schema] if isinstance(schema, list) else schema


_RECIPE_SCHEMA = Recipe.model_json_schema()
# The body is read by the engine's own parser, so that a recipe gets the same sentences here as on the command line;
# this is for the documentation.
RECIPE = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _inlined(_RECIPE_SCHEMA, _RECIPE_SCHEMA["$defs"])}},
    }
}


@router.post("/check", response=CheckOut, summary="What a recipe would do", openapi_extra=RECIPE)
def check_recipe(request: HttpRequest, payload: Payload) -> Any:
    """Queues nothing. Answers with every open setting filled in and the reason, or 422 with everything that is wrong.
    `data.source` is dataset:<id> or starter:NAME; `model.source` is model:<id>, artifact:<id> or starter:NAME."""
    answer = actions.Create(owner=who(request), recipe=payload).inspect()
    if answer.get("faults"):
        raise Problem(422, [Fault(**fault) for fault in answer["faults"]])
    return answer


@router.post("", response={202: JobDetail}, summary="Start a run", openapi_extra=RECIPE)
def create_job(request: HttpRequest, response: HttpResponse, payload: Payload, key: Key = "") -> Any:
    """The same recipe as for /jobs/check. Answers at once; follow the job at the address in Location, or by its websocket."""
    return _accepted(request, response, actions.Create(owner=who(request), recipe=payload, idempotency_key=key))


@router.get("", response=JobList, summary="List jobs")
def list_jobs(
    request: HttpRequest,
    status: StatusFilter | None = None,
    page: Page = 1,
    limit: Limit = 50,
    order: Order = "-created",
) -> Any:
    """Your jobs, newest first; staff sees everyone's."""
    rows = access.jobs_for(who(request)).select_related("artifact")
    if status:
        rows = rows.filter(status=status)
    found, info = paged(ordered(rows, order, ORDERS), page, limit)
    return {**info, "items": [job_out(row, who(request).pk) for row in found]}


@router.get("/compare", response=ComparisonOut, summary="Several runs side by side")
def compare_jobs(
    request: HttpRequest,
    jobs: Annotated[str, Query(max_length=400, description="Two to eight ids, with commas between.")],
) -> Any:
    """What differs in their recipes; the scores of their held-out examples with 95 % bootstrap intervals; where all were measured on the same
    examples also paired differences from the first, and their answers."""
    asked = [pk for text in jobs.split(",") if (pk := access.parse_id(text.strip()))]
    found = comparing.chosen(who(request), asked)
    if len(found) < comparing.FEWEST:
        raise Problem(422, [TOO_FEW])
    told = comparing.compare(found)
    return {
        "jobs": [job.pk for job in found],
        "settings": [{"name": name, "values": values} for name, values in told.settings],
        "scores": told.scores,
        "paired": told.paired,
        "differences": told.differences,
        "rows": told.rows,
    }


@router.get("/{uuid:job_id}", response=JobDetail, summary="One job")
def get_job(request: HttpRequest, job_id: uuid.UUID) -> Any:
    return job_detail(_visible(request, job_id), who(request).pk)


@router.delete("/{uuid:job_id}", response={204: None}, summary="Delete a job that has ended")
def delete_job(request: HttpRequest, job_id: uuid.UUID) -> Any:
    """With its events, checkpoints and result."""
    _execute(request, actions.Purge(_visible(request, job_id)))
    return Status(204, None)


@router.post("/{uuid:job_id}/cancel", response={202: JobDetail}, summary="End without a result")
def cancel_job(request: HttpRequest, response: HttpResponse, job_id: uuid.UUID) -> Any:
    """At the next step border. The checkpoints stay until the job is deleted."""
    return _accepted(request, response, actions.Cancel(_visible(request, job_id)))


@router.post("/{uuid:job_id}/pause", response={202: JobDetail}, summary="Save everything and free the device")
def pause_job(request: HttpRequest, response: HttpResponse, job_id: uuid.UUID) -> Any:
    """Resume goes on as if nothing had happened."""
    return _accepted(request, response, actions.Pause(_visible(request, job_id)))


@router.post("/{uuid:job_id}/resume", response={202: JobDetail}, summary="Go on after a pause")
def resume_job(request: HttpRequest, response: HttpResponse, job_id: uuid.UUID) -> Any:
    """From the last checkpoint, number for number."""
    return _accepted(request, response, actions.Resume(_visible(request, job_id)))


@router.post("/{uuid:job_id}/stop", response={202: JobDetail}, summary="End now and keep what was learned")
def stop_job(request: HttpRequest, response: HttpResponse, job_id: uuid.UUID) -> Any:
    """The result is exported and certified like that of a completed run."""
    return _accepted(request, response, actions.StopAndKeep(_visible(request, job_id)))


@router.post("/{uuid:job_id}/again", response={202: JobDetail}, summary="The same once more")
def repeat_job(request: HttpRequest, response: HttpResponse, job_id: uuid.UUID, key: Key = "") -> Any:
    """A new job with the same recipe, which points back to this one."""
    return _accepted(request, response, actions.Again(_visible(request, job_id), idempotency_key=key))


@router.get("/{uuid:job_id}/checkpoints", response=SavedStates, summary="Saved states of a run")
def list_checkpoints(request: HttpRequest, job_id: uuid.UUID) -> Any:
    """From each of them a fork can go on. A run keeps its newest states and its best one (settings.keep_checkpoints)."""
    job = _visible(request, job_id)
    states = [{"step": s.step, "best": s.best, "metrics": s.metrics} for s in forks.saved_states(job)]
    return {
        "checkpoints": states,
        "knobs": {name: forks.value_of(job.recipe, name) for name in forks.knobs(job.recipe)},
    }


@router.post("/{uuid:job_id}/fork", response={202: JobDetail}, summary="Go on from a saved state, with changes")
def fork_job(request: HttpRequest, response: HttpResponse, job_id: uuid.UUID, payload: ForkIn, key: Key = "") -> Any:
    """A new job that goes on where this one stood at that step: weights, optimizer, data order and counters. What may change is how far
    to go and what a run survives between two steps; anything else is refused. A larger settings.epochs goes on with a finished run."""
    fork = forks.Fork(
        job=_visible(request, job_id),
        step=payload.step,
        changes=payload.changes,
        name=payload.name,
        idempotency_key=key,
    )
    return _accepted(request, response, fork)


@router.get("/{uuid:job_id}/tree", response=TreeOut, summary="The family of a run")
def get_tree(request: HttpRequest, job_id: uuid.UUID) -> Any:
    """Every run that came from the same first run, by repeating or forking, as far as you may see it."""
    job = _visible(request, job_id)
    return {"tree": _branch(forks.family(job, who(request)) or forks.Branch(job=job))}


def _branch(branch: forks.Branch) -> dict[str, Any]:
    job = branch.job
    return {
        "id": job.pk, "name": job.name, "status": job.status, "fork_step": job.fork_step, "done_steps": job.done_steps,
        "total_steps": job.total_steps, "metrics": job.metrics,
        "changes": [{"name": name, "before": before, "after": after} for name, before, after in branch.changes],
        "children": [_branch(child) for child in branch.children],
    }  # fmt: skip


@router.get("/{uuid:job_id}/trials", response=TrialsOut, summary="The trials of a search")
def list_trials(request: HttpRequest, job_id: uuid.UUID) -> Any:
    """Each trial that has begun, as it stands now, and what you may decide about it. Empty for a run that is no search."""
    return {"trials": overrides.trials_of(_visible(request, job_id), who(request))}


@router.post("/{uuid:job_id}/trials/{trial}/{verdict}", response={202: TrialsOut}, summary="Keep or stop one trial")
def overrule_trial(
    request: HttpRequest,
    response: HttpResponse,
    job_id: uuid.UUID,
    trial: Annotated[int, Path(ge=0, le=1_000_000, description="Its number.")],
    verdict: KeepOrStop,
) -> Any:
    """While a search runs, whatever its own rule says. keep: it goes on with the next slice, also when it was stopped. stop: it ends at its next step.
    The last word counts. The search writes down what it took up as an event "override", and an interrupted search takes up the same at the same place."""
    job = _execute(request, overrides.Overrule(job=_visible(request, job_id), trial=trial, verdict=verdict))
    response["Location"] = f"/api/v1/jobs/{job.pk}/trials"
    return Status(202, {"trials": overrides.trials_of(job, who(request))})


@router.get("/{uuid:job_id}/events", response=EventsOut, summary="Events after a number")
def list_events(
    request: HttpRequest,
    job_id: uuid.UUID,
    after: After = 0,
    limit: Annotated[int, Query(ge=1, le=5000, description="How many at most.")] = 500,
) -> Any:
    """Numbers grow by one without a hole: ask again with the last number you got, until nothing new comes; long events come fewer at a
    time. When events after your number were pruned, the answer is resync: read the series, then go on from its last_seq."""
    job = _visible(request, job_id)
    if after + 1 < job.first_seq:
        return {"events": [], "last_seq": job.last_seq, "resync": True, "first": job.first_seq}
    rows = Event.objects.filter(job=job, seq__gt=after, seq__lte=job.last_seq).order_by("seq")[:limit]
    events: list[dict[str, Any]] = []
    num_rows = 0
    for row in rows.iterator(chunk_size=100):
        num_rows += len(row.data.get("rows", ()))
        if events and num_rows > ANSWER_ROWS:
            break
        events.append({"seq": row.seq, "time": row.time, "kind": row.kind, "step": row.step, "data": row.data})
    return {"events": events, "last_seq": job.last_seq}


@router.get("/{uuid:job_id}/series", response=dict[str, Any], summary="The curves, thinned out")
def get_series(
    request: HttpRequest,
    job_id: uuid.UUID,
    points: Annotated[int, Query(ge=10, le=20_000, description="How many points a curve may have.")] = 2000,
    curves: Annotated[
        str,
        Query(max_length=1000, description="Names of curves, with commas between; without them everything is sent."),
    ] = "",
    axis: Annotated[Axis, Query(description="What start and end count.")] = "step",
    start: Annotated[float | None, Query(allow_inf_nan=False, description="Where the stretch begins.")] = None,
    end: Annotated[float | None, Query(allow_inf_nan=False, description="Where it ends.")] = None,
) -> Any:
    """Every bucket keeps its least, its greatest and its last value, so no spike is lost. `last_seq` says where to go on with events.
    With `start` and `end` only that stretch is shown, with as many points: whoever zooms in sees every step."""
    names = [name for name in curves.split(",") if name]
    return series(_visible(request, job_id), points, window=Window(axis, start, end), names=names)


@router.get("/{uuid:job_id}/events.csv", summary="All events as a table", openapi_extra=_file("text/csv"))
def download_events(request: HttpRequest, job_id: uuid.UUID) -> Any:
    """One line for each optimizer step and each other event; no cell can run as a formula."""
    return downloads.events_response(request, _visible(request, job_id))


@router.get(
    "/{uuid:job_id}/events.tfevents",
    summary="The curves for TensorBoard",
    openapi_extra=_file("application/octet-stream"),
)
def download_tensorboard(request: HttpRequest, job_id: uuid.UUID) -> Any:
    """An event file with the names that transformers' Trainer uses: train/loss, train/grad_norm, eval/loss and so on. Keep "tfevents" in its name."""
    return downloads.tensorboard_response(request, _visible(request, job_id))


@router.get("/{uuid:job_id}/recipe.yaml", summary="The recipe as a file", openapi_extra=_file("application/yaml"))
def download_recipe(request: HttpRequest, job_id: uuid.UUID) -> Any:
    """Complete, every open setting filled: the same recipe gives the same run."""
    return downloads.recipe_response(request, _visible(request, job_id))


def _visible(request: HttpRequest, job_id: uuid.UUID) -> Job:
    row = access.jobs_for(who(request)).select_related("artifact").filter(pk=job_id).first()
    if row is None:
        raise Problem(404, NOT_FOUND)
    return row


def _execute(request: HttpRequest, action: actions.JobAction | actions.Create | forks.Fork | overrides.Overrule) -> Job:
    try:
        return action.execute(who(request))
    except actions.ActionRefused as error:
        raise refuse(
            REFUSALS.get(error.code, 409),
            error.code,
            "This is not possible now.",
            str(error),
            WAYS_OUT.get(error.code, "Look at the job's state and choose what fits it."),
            where="job",
        ) from None


def _accepted(
    request: HttpRequest, response: HttpResponse, action: actions.JobAction | actions.Create | forks.Fork
) -> Any:
    job = _execute(request, action)
    response["Location"] = f"/api/v1/jobs/{job.pk}"
    return Status(202, job_detail(job, who(request).pk))
