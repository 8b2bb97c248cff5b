"""What the API sends and takes, as schemas; the first line of each is what the documentation shows."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, Literal

from ninja import Schema
from pydantic import ConfigDict, Field

from engine.core.overrides import KeepOrStop
from jobs.api.paging import PageInfo
from jobs.models import ApiToken, Artifact, Dataset, Job, ModelEntry


class FaultOut(Schema):
    """One thing that is wrong: where, what, why, and the way out."""

    where: str = Field(description="Dotted path into the request, the recipe or the file.")
    what: str
    why: str
    way_out: str
    code: str = Field(description="Stable, for machines.")


class ProblemOut(Schema):
    """A refusal (RFC 9457), with everything that is wrong at once."""

    type: str
    title: str
    status: int
    detail: str
    faults: list[FaultOut]


class Strict(Schema):
    """A body without unknown fields: a misspelled field is refused instead of ignored."""

    model_config = ConfigDict(extra="forbid")


# -- data sets ---------------------------------------------------------------------------------------------------------------------


class DatasetOut(Schema):
    """A table of examples, and what a look at it told."""

    id: uuid.UUID
    name: str
    starter: str = Field(description="Not empty for the data sets that come with the studio.")
    mine: bool
    format: str
    bytes: int
    sha256: str
    num_rows: int
    shape: str
    columns: list[str]
    mapping: dict[str, str] = Field(description="Role to column, as guessed or as chosen.")
    labels: list[str]
    findings: list[Any] = Field(description="What was noticed in the file.")
    created: datetime
    source: str = Field(description="How a recipe names it, as data.source.")


class DatasetDetail(DatasetOut):
    """A data set with its first rows and its measures."""

    preview: list[Any]
    facts: dict[str, Any]


class DatasetList(PageInfo):
    """A page of data sets."""

    items: list[DatasetOut]


class DatasetPatch(Strict):
    """What may be changed about a data set."""

    name: str | None = Field(default=None, min_length=1, max_length=120)
    mapping: dict[str, str] | None = Field(default=None, description="Role to column, for every role.")


class UsageOut(Schema):
    """How much of your quota you use."""

    bytes: int
    datasets: int
    quota_bytes: int
    max_datasets: int
    max_upload_bytes: int


# -- models and methods ------------------------------------------------------------------------------------------------------------


class ModelOut(Schema):
    """A model that runs may start from."""

    id: uuid.UUID
    name: str
    source: str = Field(description="How a recipe names it, as model.source.")
    sentence: str
    kind: str
    family: str
    num_parameters: int
    mine: bool
    created: datetime
    facts: dict[str, Any]


class ModelList(PageInfo):
    """A page of models."""

    items: list[ModelOut]


class ModelIn(Strict):
    """A model to offer to everyone; its files are looked at, never run."""

    name: str = Field(min_length=1, max_length=200)
    source: str = Field(min_length=1, max_length=1000, description="starter:NAME, folder:/path or hub:owner/name")
    sentence: str = Field(default="", max_length=400)


# -- jobs --------------------------------------------------------------------------------------------------------------------------


class CheckOut(Schema):
    """A recipe that can run: every open setting filled, with the reasons."""

    recipe: dict[str, Any] = Field(description="The recipe as it would run.")
    fingerprint: str
    suggestions: list[dict[str, Any]] = Field(description="Which settings were filled in, and why.")
    composition: list[dict[str, Any]] = Field(description="Which method stands in which slot.")
    estimate: dict[str, Any] = Field(description="Memory, time and size to expect.")
    verdicts: dict[str, Any] = Field(description="For every method, whether it fits this model and this data.")


class JobOut(Schema):
    """One run and where it stands."""

    id: uuid.UUID
    name: str
    status: str
    reason: str
    message: str = Field(description="Why the job is in this state, in a sentence.")
    faults: list[FaultOut]
    dataset: uuid.UUID | None
    model: uuid.UUID | None
    again_of: uuid.UUID | None
    fork_step: int | None = Field(
        description="The step of again_of at which this run goes on; null from the beginning."
    )
    artifact: uuid.UUID | None
    stop_request: str
    attempt: int
    device: str
    done_steps: int
    total_steps: int
    eta_seconds: float | None
    loss: float | None
    metrics: dict[str, Any]
    last_signal: dict[str, Any]
    last_seq: int
    created: datetime
    started_at: datetime | None
    ended_at: datetime | None
    mine: bool


class JobDetail(JobOut):
    """A job with its recipe."""

    recipe: dict[str, Any]
    request: dict[str, Any] = Field(description="The recipe as it was asked for.")
    suggestions: list[dict[str, Any]]
    estimate: dict[str, Any]
    fingerprint: str


class JobList(PageInfo):
    """A page of jobs."""

    items: list[JobOut]


class SavedStateOut(Schema):
    """A checkpoint from which another run can go on."""

    step: int
    best: bool
    metrics: dict[str, Any] = Field(description="The newest evaluation up to there.")


class SavedStates(Schema):
    """The saved states of a run, newest first, and what a fork may change."""

    checkpoints: list[SavedStateOut]
    knobs: dict[str, Any] = Field(description="Dotted name to present value of everything that may change in a fork.")


class ForkIn(Strict):
    """A run that goes on from a saved state of another one."""

    step: int | None = Field(default=None, ge=0, le=2**53, description="Of the saved state; without it, the newest.")
    changes: dict[str, Any] = Field(default={}, description="Dotted name to new value, such as settings.learning_rate.")
    name: str = Field(default="", max_length=200)


class BranchOut(Schema):
    """A run in its family."""

    id: uuid.UUID
    name: str
    status: str
    fork_step: int | None
    done_steps: int
    total_steps: int
    metrics: dict[str, Any]
    changes: list[dict[str, Any]] = Field(description="What differs from the run it came from: name, before, after.")
    children: list[BranchOut]


class TreeOut(Schema):
    """The runs that came from one run, by repeating or forking."""

    tree: BranchOut


class AskedOut(Schema):
    """What a person has decided about a trial and the search has not yet taken up."""

    verdict: KeepOrStop
    by: str


class TrialOut(Schema):
    """One trial of a search."""

    trial: int = Field(description="Its number, from 0.")
    state: str = Field(description="waiting, running, stopped, finished or failed.")
    done: int = Field(description="Its step.")
    total: int = Field(description="Its last step.")
    score: float | None = Field(description="Larger is better; compare only trials that have come equally far.")
    values: dict[str, Any] = Field(description="Dotted name to value of everything that differs between trials.")
    message: str = Field(description="Why it stands so, in a sentence that says whether the rule decided or you.")
    possible: list[KeepOrStop] = Field(description="What you may decide about it now.")
    asked: AskedOut | None = None


class TrialsOut(Schema):
    """The trials of a search that have begun."""

    trials: list[TrialOut]


class ComparisonOut(Schema):
    """Several runs side by side, in the order in which they were asked for."""

    jobs: list[uuid.UUID]
    settings: list[dict[str, Any]] = Field(
        description="Every difference between the recipes: name, and the value in each run."
    )
    scores: list[dict[str, dict[str, float | None]]] = Field(description="For each run: score to value, low and high.")
    paired: bool = Field(description="Whether all were measured on the same examples.")
    differences: list[dict[str, dict[str, float | None]]] = Field(
        description="The same for each score minus that of the first run."
    )
    rows: list[dict[str, Any]] = Field(
        description="Held-out examples with the answer of each run, those that differ first."
    )


class EventOut(Schema):
    """One numbered thing that happened; kinds and fields are those of the engine's log, plus "status"."""

    seq: int
    time: float
    kind: str
    step: int
    data: dict[str, Any]


class EventsOut(Schema):
    """Events after a number, without a hole; or resync, when some of them were pruned."""

    events: list[EventOut]
    last_seq: int
    resync: bool = False
    first: int | None = Field(default=None, description="With resync: the oldest event that is left.")


# -- results -----------------------------------------------------------------------------------------------------------------------


class ArtifactOut(Schema):
    """What a job made."""

    id: uuid.UUID
    job: uuid.UUID
    name: str
    content_id: str = Field(description="SHA-256 over the hashes of all its files.")
    bytes: int
    forms: list[str] = Field(description="The forms it can be downloaded in.")
    certified: bool = Field(description="Whether a clean process got the trained model's answers from every form.")
    certificate_sentence: str
    mine: bool
    created: datetime


class ArtifactDetail(ArtifactOut):
    """A result with its description and its files."""

    description: dict[str, Any]
    files: dict[str, Any]


class ArtifactList(PageInfo):
    """A page of results."""

    items: list[ArtifactOut]


class Turn(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class PredictOptions(Strict):
    """How to answer; what does not concern the model's task is left aside."""

    top: int | None = Field(default=None, ge=1, le=1000, description="Sorting: how many labels to list.")
    max_new_tokens: int | None = Field(
        default=None, ge=1, le=4096, description="Language models: how long the answer may be."
    )
    temperature: float | None = Field(
        default=None, ge=0, le=10, description="Language models: 0 always gives the likeliest answer."
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**31, description="Language models: the same seed gives the same answer."
    )


class ServingMethod(Strict):
    """A method that stands between a result and those who ask it."""

    slug: str = Field(min_length=1, max_length=80)
    params: dict[str, Any] = Field(default_factory=dict)


class PredictIn(Strict):
    """What to ask a trained model."""

    inputs: list[str | list[Turn]] = Field(min_length=1, max_length=64, description="Texts, or conversations.")
    options: PredictOptions = PredictOptions()
    method: ServingMethod | None = Field(
        default=None,
        description="A way of answering from the list of methods (role predict); its memory goes on from request to request.",
    )
    undo: Literal["last", "all"] | None = Field(
        default=None,
        description="With a method: first forget what the last request taught, or everything that was learned while serving.",
    )


class PredictOut(Schema):
    """The answers, in the order of the inputs."""

    answers: list[dict[str, Any]]
    serving: dict[str, Any] | None = Field(
        default=None, description="With a method: what it has learned while serving."
    )


# -- tokens and health -------------------------------------------------------------------------------------------------------------


class TokenIn(Strict):
    """A name that reminds you where the token is used."""

    name: str = Field(min_length=1, max_length=100)


class TokenOut(Schema):
    """A personal token; the secret itself is not kept."""

    id: int
    name: str
    prefix: str
    created: datetime
    last_used: datetime | None
    revoked: bool


class TokenCreated(TokenOut):
    """A new token with its secret, shown this once."""

    token: str


class TokenList(PageInfo):
    """A page of tokens."""

    items: list[TokenOut]


class HealthOut(Schema):
    """Whether the studio can work."""

    status: str = Field(description="ok, or degraded with the sentence that says why.")
    message: str
    database: bool
    engine: bool
    version: str


def dataset_out(row: Dataset, user_id: int | None) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "starter": row.starter,
        "mine": row.owner_id == user_id,
        "format": row.format,
        "bytes": row.bytes,
        "sha256": row.sha256,
        "num_rows": row.num_rows,
        "shape": row.shape,
        "columns": row.columns,
        "mapping": row.mapping,
        "labels": row.labels,
        "findings": row.findings,
        "created": row.created,
        "source": f"dataset:{row.id}",
    }


def dataset_detail(row: Dataset, user_id: int | None) -> dict[str, Any]:
    return {**dataset_out(row, user_id), "preview": row.preview, "facts": row.facts}


def model_out(row: ModelEntry, user_id: int | None) -> dict[str, Any]:
    # Where the files of a model lie is nobody's business but the server's; a recipe names the entry.
    return {
        "id": row.id,
        "name": row.name,
        "source": f"model:{row.id}",
        "sentence": row.sentence,
        "kind": row.kind,
        "family": row.family,
        "num_parameters": row.num_parameters,
        "mine": row.owner_id == user_id,
        "created": row.created,
        "facts": {
            key: value for key, value in row.facts.items() if key not in {"path", "source", "tensors", "linears"}
        },
    }


def job_out(row: Job, user_id: int | None) -> dict[str, Any]:
    artifact = getattr(row, "artifact", None)
    return {
        "id": row.id,
        "name": row.name,
        "status": row.status,
        "reason": row.reason,
        "message": row.message,
        "faults": row.faults,
        "dataset": row.dataset_id,
        "model": row.model_id,
        "again_of": row.again_of_id,
        "fork_step": row.fork_step,
        "artifact": artifact.id if artifact else None,
        "stop_request": row.stop_request,
        "attempt": row.attempt,
        "device": row.device,
        "done_steps": row.done_steps,
        "total_steps": row.total_steps,
        "eta_seconds": row.eta_seconds,
        "loss": row.loss,
        "metrics": row.metrics,
        "last_signal": row.last_signal,
        "last_seq": row.last_seq,
        "created": row.created,
        "started_at": row.started_at,
        "ended_at": row.ended_at,
        "mine": row.owner_id == user_id,
    }


def job_detail(row: Job, user_id: int | None) -> dict[str, Any]:
    return {
        **job_out(row, user_id),
        "recipe": row.recipe,
        "request": row.request,
        "suggestions": row.suggestions,
        "estimate": row.estimate,
        "fingerprint": row.fingerprint,
    }


def artifact_out(row: Artifact, user_id: int | None, forms: list[str]) -> dict[str, Any]:
    return {
        "id": row.id,
        "job": row.job_id,
        "name": row.job.name,
        "content_id": row.content_id,
        "bytes": row.bytes,
        "forms": forms,
        "certified": row.certificate.get("ok") is True,
        "certificate_sentence": str(row.certificate.get("sentence", "")),
        "mine": row.job.owner_id == user_id,
        "created": row.created,
    }


def artifact_detail(row: Artifact, user_id: int | None, forms: list[str]) -> dict[str, Any]:
    return {**artifact_out(row, user_id, forms), "description": row.description, "files": row.files}


def token_out(row: ApiToken) -> dict[str, Any]:
    return {
        "id": row.pk,
        "name": row.name,
        "prefix": row.prefix,
        "created": row.created,
        "last_used": row.last_used,
        "revoked": row.revoked,
    }
