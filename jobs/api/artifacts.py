"""Results over REST: look, check the certificate, take home, try."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from django.http import HttpRequest
from ninja import Router

from jobs import access, downloads
from jobs.api.auth import who
from jobs.api.paging import Limit, Order, Page, ordered, paged
from jobs.api.problems import NOT_FOUND, Problem, refuse
from jobs.api.reading import PREDICTIONS, REQUESTS, WRITES
from jobs.api.schemas import ArtifactDetail, ArtifactList, PredictIn, PredictOut, artifact_detail, artifact_out
from jobs.catalogue import engine
from jobs.models import Artifact

router = Router(tags=["results"])
ORDERS = {"created": "created", "bytes": "bytes", "name": "job__name"}
MAX_INPUT_CHARS = 200_000  # of all inputs of one question
PREDICT_SECONDS = 120.0
FILE = {
    "responses": {
        200: {
            "description": "The file.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
        206: {"description": "The part that the Range header asked for."},
        304: {"description": "Unchanged since If-None-Match."},
        416: {"description": "The file is shorter than that."},
    }
}


@router.get("", response=ArtifactList, summary="List results")
def list_artifacts(request: HttpRequest, page: Page = 1, limit: Limit = 50, order: Order = "-created") -> Any:
    rows, info = paged(ordered(access.artifacts_for(who(request)), order, ORDERS), page, limit)
    return {
        **info,
        "items": [artifact_out(row, who(request).pk, downloads.forms_of(row)) for row in rows],
    }


@router.get("/{uuid:artifact_id}", response=ArtifactDetail, summary="One result with its files")
def get_artifact(request: HttpRequest, artifact_id: uuid.UUID) -> Any:
    row = _visible(request, artifact_id)
    return artifact_detail(row, who(request).pk, downloads.forms_of(row))


@router.get("/{uuid:artifact_id}/certificate", response=dict[str, Any], summary="What a clean process found")
def get_certificate(request: HttpRequest, artifact_id: uuid.UUID) -> Any:
    """A process that never saw the training loaded every form with the official loaders and compared its answers with the trained model's."""
    certificate = _visible(request, artifact_id).certificate
    if not certificate:
        raise refuse(
            404,
            "no_certificate",
            "This result has no certificate.",
            "Its run ended before the export was checked.",
            "Run the job again.",
        )
    return certificate


@router.api_operation(["HEAD"], "/{uuid:artifact_id}/download/{str:form}", include_in_schema=False)
@router.get("/{uuid:artifact_id}/download/{str:form}", summary="Take it home as a zip archive", openapi_extra=FILE)
def download_artifact(request: HttpRequest, artifact_id: uuid.UUID, form: str) -> Any:
    """`adapter`, `lora` (the peft layout) or `merged` (a model directory for transformers); a result lists the forms it has.
    Supports Range, If-Range and If-None-Match, so a large download can be continued."""
    return downloads.artifact_response(request, _visible(request, artifact_id), form)


@router.post(
    "/{uuid:artifact_id}/predict",
    response=PredictOut,
    summary="Ask the trained model",
    throttle=[REQUESTS, WRITES, PREDICTIONS],
)
def predict(request: HttpRequest, artifact_id: uuid.UUID, payload: PredictIn) -> Any:
    """Texts, or conversations as lists of {role, content}; the answers come in the same order. With `method` the result answers through a
    method that may learn while it serves; the result itself never changes."""
    row = _visible(request, artifact_id)
    asked = payload.model_dump(exclude_none=True)
    size = sum(
        len(item) if isinstance(item, str) else sum(len(turn["content"]) for turn in item) for item in asked["inputs"]
    )
    if size > MAX_INPUT_CHARS:
        raise refuse(
            413,
            "too_large",
            "That is too much text at once.",
            f"All inputs together have {size:,} characters; {MAX_INPUT_CHARS:,} are allowed.",
            "Ask in several requests.",
            where="body.inputs",
        )
    if not Path(row.folder).is_dir():
        raise refuse(
            410,
            "files_gone",
            "The files of this result are gone.",
            "They were deleted from the server's disk.",
            "Run the job again; the recipe is kept.",
        )
    if "method" in asked:
        if not access.may_change(who(request), row.job.owner_id):
            raise refuse(
                403,
                "forbidden",
                "This result belongs to somebody else.",
                "Asking it this way would change what it answers to its owner.",
                "Ask it without a method.",
                where="body.method",
            )
        asked["session"] = str(downloads.serving_folder(row, asked["method"]["slug"]))
    return engine(timeout=PREDICT_SECONDS).call("predict", artifact=row.folder, **asked)


def _visible(request: HttpRequest, artifact_id: uuid.UUID) -> Artifact:
    row = access.artifacts_for(who(request)).filter(pk=artifact_id).first()
    if row is None:
        raise Problem(404, NOT_FOUND)
    return row
