"""What runs can be made of: models, methods, tasks and settings."""

from __future__ import annotations

import uuid
from typing import Any

from django.http import HttpRequest, HttpResponse
from ninja import Router, Status

from jobs import access
from jobs.api.auth import require_staff, who
from jobs.api.paging import Limit, Order, Page, ordered, paged
from jobs.api.problems import NOT_FOUND, Problem, refuse
from jobs.api.schemas import ModelIn, ModelList, ModelOut, model_out
from jobs.catalogue import catalogue, engine
from jobs.models import ModelEntry

models_router = Router(tags=["models"])
methods_router = Router(tags=["methods"])
tasks_router = Router(tags=["methods"])
ORDERS = {"name": "name", "created": "created", "num_parameters": "num_parameters"}


@models_router.get("", response=ModelList, summary="List models")
def list_models(request: HttpRequest, page: Page = 1, limit: Limit = 50, order: Order = "name") -> Any:
    """The models that your runs may start from."""
    rows, info = paged(ordered(access.models_for(who(request)), order, ORDERS), page, limit)
    return {**info, "items": [model_out(row, who(request).pk) for row in rows]}


@models_router.post("", response={201: ModelOut}, summary="Offer a model to everyone (staff)")
def add_model(request: HttpRequest, response: HttpResponse, payload: ModelIn) -> Any:
    """The model's configuration and tensor headers are read first; no code that comes with a model is ever run."""
    require_staff(request)
    if ModelEntry.objects.filter(source=payload.source, owner=None).exists():
        raise refuse(
            409,
            "model_exists",
            "This model is offered already.",
            "Another entry has the same source.",
            "Use that entry.",
            where="body.source",
        )
    facts = engine().call("model_facts", source=payload.source)["facts"]
    row = ModelEntry.objects.create(
        name=payload.name,
        source=payload.source,
        sentence=payload.sentence,
        kind=facts["kind"],
        family=facts["family"],
        num_parameters=facts["num_parameters"],
        facts=facts,
    )
    response["Location"] = f"/api/v1/models/{row.id}"
    return Status(201, model_out(row, who(request).pk))


@models_router.get("/{uuid:model_id}", response=ModelOut, summary="One model")
def get_model(request: HttpRequest, model_id: uuid.UUID) -> Any:
    row = access.models_for(who(request)).filter(pk=model_id).first()
    if row is None:
        raise Problem(404, NOT_FOUND)
    return model_out(row, who(request).pk)


@methods_router.get("", response=list[dict[str, Any]], summary="List methods")
def list_methods(request: HttpRequest) -> Any:
    """Every method with its card, its needs, and the JSON Schema of its hyperparameters."""
    return catalogue()["methods"]


@methods_router.get("/{str:slug}", response=dict[str, Any], summary="One method")
def get_method(request: HttpRequest, slug: str) -> Any:
    for method in catalogue()["methods"]:
        if method["slug"] == slug:
            return method
    raise Problem(404, NOT_FOUND)


@tasks_router.get("", response=dict[str, Any], summary="Tasks, slots and settings")
def list_tasks(request: HttpRequest) -> Any:
    """What a model can be asked to do, the slots that methods stand in, and the JSON Schema of the settings that every run shares."""
    known = catalogue()
    return {
        "tasks": known["tasks"],
        "slots": known["slots"],
        "settings": known["settings"],
        "version": known["version"],
    }
