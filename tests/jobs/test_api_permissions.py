"""Every route for four people: its owner, a stranger, staff, and nobody. The routes come from the schema: one without a row here fails."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client

from jobs.api import api
from jobs.models import Status
from tests.jobs import api_kit as kit
from tests.jobs.api_kit import Caller

pytestmark = pytest.mark.django_db

Kind = Literal["object", "personal", "list", "anyone", "staff", "public"]


@dataclass
class Route:
    """How one route treats people.

    object: a stranger gets 404, staff and the owner do not.   personal: also staff gets 404.
    list: the owner's thing is in it for the owner (and staff, unless personal), never for a stranger.
    anyone: whoever is signed in.   staff: 403 for others.   public: nobody too.
    """

    kind: Kind
    make: Callable[[Any], Any] = lambda owner: None  # makes the owner's thing; its pk fills the id in the address
    body: Any = None
    slow: bool = False  # reaches the engine when it is allowed: only the refusals are asked for here
    more: dict[str, str] = field(default_factory=dict)  # other parameters of the address


def _job(status: Status) -> Callable[[Any], Any]:
    return lambda owner: kit.job(owner, status)


ROUTES: dict[str, Route] = {
    "POST /datasets": Route("anyone", body=lambda: {"file": SimpleUploadedFile("rows.csv", kit.TABLE.encode())}),
    "GET /datasets": Route("list", kit.table),
    "GET /datasets/usage": Route("anyone"),
    "GET /datasets/{dataset_id}": Route("object", kit.table),
    "PATCH /datasets/{dataset_id}": Route("object", kit.table, {"name": "Other name"}),
    "DELETE /datasets/{dataset_id}": Route("object", kit.table),
    "GET /models": Route("list", kit.model),
    "POST /models": Route("staff", body={"name": "x", "source": "folder:/nowhere"}, slow=True),
    "GET /models/{model_id}": Route("object", kit.model),
    "GET /methods": Route("anyone", slow=True),
    "GET /methods/{slug}": Route("anyone", more={"slug": "lora"}, slow=True),
    "GET /tasks": Route("anyone", slow=True),
    "POST /jobs/check": Route("anyone", body={"task": "classify"}),
    "POST /jobs": Route("anyone", body={"task": "classify"}),
    "GET /jobs": Route("list", kit.job),
    "GET /jobs/compare": Route("anyone"),
    "GET /jobs/{job_id}": Route("object", kit.job),
    "DELETE /jobs/{job_id}": Route("object", kit.job),
    "POST /jobs/{job_id}/cancel": Route("object", _job(Status.QUEUED)),
    "POST /jobs/{job_id}/pause": Route("object", _job(Status.RUNNING)),
    "POST /jobs/{job_id}/resume": Route("object", _job(Status.PAUSED)),
    "POST /jobs/{job_id}/stop": Route("object", _job(Status.RUNNING)),
    "POST /jobs/{job_id}/again": Route("object", kit.job, slow=True),
    "GET /jobs/{job_id}/checkpoints": Route("object", kit.job, slow=True),
    "POST /jobs/{job_id}/fork": Route("object", kit.job, {"changes": {}}, slow=True),
    "GET /jobs/{job_id}/tree": Route("object", kit.job),
    "GET /jobs/{job_id}/trials": Route("object", kit.job),
    "POST /jobs/{job_id}/trials/{trial}/{verdict}": Route(
        "object", kit.job, more={"trial": "0", "verdict": "keep"}, slow=True
    ),
    "GET /jobs/{job_id}/events": Route("object", kit.job),
    "GET /jobs/{job_id}/series": Route("object", kit.job),
    "GET /jobs/{job_id}/events.csv": Route("object", kit.job),
    "GET /jobs/{job_id}/events.tfevents": Route("object", kit.job),
    "GET /jobs/{job_id}/recipe.yaml": Route("object", kit.job),
    "GET /artifacts": Route("list", kit.artifact),
    "GET /artifacts/{artifact_id}": Route("object", kit.artifact),
    "GET /artifacts/{artifact_id}/certificate": Route("object", kit.artifact),
    "GET /artifacts/{artifact_id}/download/{form}": Route("object", kit.artifact, more={"form": "adapter"}),
    "POST /artifacts/{artifact_id}/predict": Route("object", kit.artifact, {"inputs": ["hello"]}, slow=True),
    "GET /tokens": Route("list", kit.token),
    "POST /tokens": Route("anyone", body={"name": "laptop"}),
    "DELETE /tokens/{token_id}": Route("personal", kit.token),
    "GET /health": Route("public"),
}


def found() -> set[str]:
    """Every route that the schema tells of."""
    schema = api.get_openapi_schema()
    return {
        f"{method.upper()} {path.removeprefix('/api/v1')}"
        for path, methods in schema["paths"].items()
        for method in methods
    }


def test_every_route_has_its_row() -> None:
    assert found() == ROUTES.keys()


def _ask(who: Caller, name: str, route: Route, identifier: Any) -> Any:
    method, path = name.split()
    path = re.sub(r"{(\w+)}", lambda match: route.more.get(match[1], str(identifier)), path)
    body = route.body() if callable(route.body) else route.body
    return who.ask(method, path.lstrip("/"), body)


@pytest.mark.parametrize("name", ROUTES)
def test_who_may_do_what(name: str) -> None:
    route = ROUTES[name]
    people = {
        "owner": kit.caller("owner"),
        "stranger": kit.caller("stranger"),
        "staff": kit.caller("chief", staff=True),
    }
    nobody = Caller(None)

    def answer(who: str) -> Any:
        thing = route.make(people["owner"].user)  # a fresh one for each, because some routes change it
        return _ask(people.get(who, nobody), name, route, thing.pk if thing else "")

    if route.kind == "public":
        assert answer("nobody").status_code in (200, 503)
        return
    assert kit.problem(answer("nobody"), 401)["faults"][0]["code"] == "signed_out"
    match route.kind:
        case "object" | "personal":
            assert kit.problem(answer("stranger"), 404)["faults"][0]["code"] == "not_found"
            if route.kind == "personal":
                kit.problem(answer("staff"), 404)
            for who in ("owner", *(() if route.kind == "personal" else ("staff",))):
                if not route.slow:
                    assert answer(who).status_code in range(200, 300), who
        case "list":
            thing = route.make(people["owner"].user)
            seen = {
                who: {str(item["id"]) for item in _ask(person, name, route, "").json()["items"]}
                for who, person in people.items()
            }
            assert str(thing.pk) in seen["owner"]
            assert str(thing.pk) not in seen["stranger"]
            assert (str(thing.pk) in seen["staff"]) == (name != "GET /tokens")
        case "staff":
            assert kit.problem(answer("owner"), 403)["faults"][0]["code"] == "staff_only"
        case "anyone":
            if not route.slow:
                assert answer("stranger").status_code in {200, 201, 422}


def test_a_session_needs_the_csrf_token_and_a_foreign_object_stays_hidden() -> None:
    owner, stranger = kit.caller("owner"), kit.caller("stranger")
    row = kit.job(owner.user, Status.QUEUED)
    client = Client(enforce_csrf_checks=True)
    client.force_login(owner.user)
    assert client.get(f"/api/v1/jobs/{row.pk}").status_code == 200
    assert kit.problem(client.post(f"/api/v1/jobs/{row.pk}/cancel"), 403)["faults"][0]["code"] == "csrf"
    row.refresh_from_db()
    assert row.status == Status.QUEUED
    client.cookies["csrftoken"] = "x" * 32
    assert client.post(f"/api/v1/jobs/{row.pk}/cancel", headers={"X-CSRFToken": "x" * 32}).status_code == 202
    client.force_login(stranger.user)
    assert client.get(f"/api/v1/jobs/{row.pk}").status_code == 404


def test_a_wrong_token_never_falls_back_to_the_session() -> None:
    owner = kit.caller("owner")
    client = Client()
    client.force_login(owner.user)
    for value in ("Bearer bonsai_wrong", "Bearer ", "Basic b3duZXI6eA==", "bonsai", "Bearer " + "x" * 5000):
        assert (
            kit.problem(client.get("/api/v1/jobs", headers={"Authorization": value}), 401)["faults"][0]["code"]
            == "bad_token"
        )


def test_what_belongs_to_others_reads_like_what_does_not_exist() -> None:
    owner, stranger = kit.caller("owner"), kit.caller("stranger")
    row = kit.job(owner.user)
    missing = stranger.get("jobs/00000000-0000-4000-8000-000000000000")
    assert stranger.get(f"jobs/{row.pk}").content == missing.content


def test_a_recipe_cannot_name_what_belongs_to_others_or_to_the_server() -> None:
    owner, stranger = kit.caller("owner"), kit.caller("stranger")
    rows, entry, result = kit.table(owner.user), kit.model(owner.user), kit.artifact(owner.user)
    for data, model in (
        (f"dataset:{rows.pk}", f"model:{entry.pk}"),
        (f"file:{rows.path}", f"folder:{result.folder}/merged"),
        ("file:/etc/passwd", "folder:/"),
        ("dataset:../../x", f"artifact:{result.pk}"),
        ("https://example.org/rows.csv", "hub:owner/name"),
    ):
        body = kit.problem(
            stranger.post("jobs/check", {"task": "classify", "data": {"source": data}, "model": {"source": model}}), 422
        )
        assert [fault["where"] for fault in body["faults"]] == ["data.source", "model.source"]


@pytest.mark.parametrize(
    "query",
    [
        "owner__password__startswith=p",
        "order=owner__password",
        "order=-recipe",
        "order=pk;drop",
        "order=%00",
        "limit=0",
        "limit=100000",
        "page=0",
        "page=99999999999999999999",
        "status=nonsense",
        "status=owner",
    ],
)
def test_no_filter_reaches_the_database_that_is_not_offered(query: str) -> None:
    owner = kit.caller("owner")
    kit.job(owner.user)
    response = owner.get(f"jobs?{query}")
    if "__" in query and query.startswith("owner"):
        assert json.loads(response.content)["count"] == 1  # not a parameter, so without effect
    else:
        kit.problem(response, 422)
