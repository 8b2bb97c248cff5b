"""Data sets over REST: upload, look, choose the columns, delete."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from django.http import HttpRequest, HttpResponse
from ninja import File, Form, Router, Status, UploadedFile

from engine.core.errors import EngineError
from jobs import access, datasets
from jobs.api.auth import who
from jobs.api.paging import Limit, Order, Page, ordered, paged
from jobs.api.problems import NOT_FOUND, Problem, refuse
from jobs.api.reading import REQUESTS, UPLOADS, WRITES
from jobs.api.schemas import DatasetDetail, DatasetList, DatasetPatch, UsageOut, dataset_detail, dataset_out
from jobs.models import Dataset

router = Router(tags=["data"])
ORDERS = {"created": "created", "name": "name", "bytes": "bytes", "num_rows": "num_rows"}
Upload = Annotated[UploadedFile, File()]
ShownName = Annotated[str, Form(max_length=200, description="What to call it; the file's name otherwise.")]
STATUS_OF_CODE = {"too_large": 413, "quota": 409, "in_use": 409}


@router.post("", response={201: DatasetDetail}, summary="Upload a table", throttle=[REQUESTS, WRITES, UPLOADS])
def upload_dataset(request: HttpRequest, response: HttpResponse, file: Upload, name: ShownName = "") -> Any:
    """Send a file as multipart/form-data in the field `file`: CSV, TSV, JSON, JSON lines or Parquet. What it is, is read from its content.
    The answer says what was found; `mapping` says which column plays which role."""
    try:
        row = datasets.store(who(request), file.name or "", file.chunks(), name=name)
    except EngineError as error:
        raise _with_status(error) from None
    response["Location"] = f"/api/v1/datasets/{row.id}"
    return Status(201, dataset_detail(row, who(request).pk))


@router.get("", response=DatasetList, summary="List data sets")
def list_datasets(request: HttpRequest, page: Page = 1, limit: Limit = 50, order: Order = "-created") -> Any:
    """Your data sets and the starters that come with the studio."""
    rows, info = paged(ordered(access.datasets_for(who(request)), order, ORDERS), page, limit)
    return {**info, "items": [dataset_out(row, who(request).pk) for row in rows]}


@router.get("/usage", response=UsageOut, summary="How much of your quota you use")
def dataset_usage(request: HttpRequest) -> Any:
    return datasets.usage(who(request))


@router.get("/{uuid:dataset_id}", response=DatasetDetail, summary="One data set with its first rows")
def get_dataset(request: HttpRequest, dataset_id: uuid.UUID) -> Any:
    return dataset_detail(_visible(request, dataset_id), who(request).pk)


@router.patch(
    "/{uuid:dataset_id}", response=DatasetDetail, summary="Rename it, or choose which column plays which role"
)
def change_dataset(request: HttpRequest, dataset_id: uuid.UUID, payload: DatasetPatch) -> Any:
    row = _changeable(request, dataset_id)
    if payload.mapping is not None:
        row = datasets.change_mapping(row, payload.mapping)
    if payload.name is not None:
        row.name = datasets.shown_name(payload.name)
        row.save(update_fields=["name"])
    return dataset_detail(row, who(request).pk)


@router.delete("/{uuid:dataset_id}", response={204: None}, summary="Delete it, and its file")
def delete_dataset(request: HttpRequest, dataset_id: uuid.UUID) -> Any:
    """Refused while a job that has not ended reads it. Results that were made from it stay."""
    row = _changeable(request, dataset_id)
    try:
        datasets.delete(row)
    except EngineError as error:
        raise _with_status(error) from None
    return Status(204, None)


def _visible(request: HttpRequest, dataset_id: uuid.UUID) -> Dataset:
    row = access.datasets_for(who(request)).filter(pk=dataset_id).first()
    if row is None:
        raise Problem(404, NOT_FOUND)
    return row


def _changeable(request: HttpRequest, dataset_id: uuid.UUID) -> Dataset:
    row = _visible(request, dataset_id)
    if not access.may_change(who(request), row.owner_id):
        raise refuse(
            403,
            "shared",
            "This data set cannot be changed.",
            "It comes with the studio and everyone uses it.",
            "Upload your own copy and change that.",
        )
    return row


def _with_status(error: EngineError) -> Exception:
    status = STATUS_OF_CODE.get(error.fault.code)
    return Problem(status, error.fault) if status else error
