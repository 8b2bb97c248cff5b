"""The API as a whole: refusals, reading, paging, events, rates, documentation."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from django.core.cache import cache
from django.test import Client
from pytest_django import Settings

from engine.core.errors import Fault, bad_input
from engine.core.recipe import parse_recipe
from jobs import access
from jobs.api import api
from jobs.limits import BodyLimit, in_words
from jobs.models import Event, Job, Status
from tests.jobs import api_kit as kit
from tests.jobs.api_kit import Caller

pytestmark = pytest.mark.django_db


@pytest.fixture
def owner() -> Caller:
    return kit.caller("owner")


@pytest.fixture(autouse=True)
def fresh_counters() -> None:
    cache.clear()


# -- refusals ------------------------------------------------------------------------------------------------------------------------


def test_every_fault_of_a_recipe_comes_at_once_in_the_words_of_the_command_line(owner: Caller) -> None:
    recipe = {"version": 2, "task": "classify", "model": {"sauce": "x"}, "data": {"source": ""}, "methods": [{"slug": "Not A Slug"}, {}],
              "settings": {"epochs": -1, "epoch": 3, "seed": "seven"}, "colour": "red"}  # fmt: skip
    body = kit.problem(owner.post("jobs/check", recipe), 422)
    with pytest.raises(Exception) as caught:
        parse_recipe(recipe)
    assert body["faults"] == [fault.to_dict() for fault in caught.value.faults]  # type: ignore[attr-defined]
    assert len(body["faults"]) >= 9
    assert kit.problem(owner.post("jobs", recipe), 422)["faults"] == body["faults"]
    assert not Job.objects.exists()


@pytest.mark.parametrize("body", [[], "recipe", 3, None, True, {}])
def test_what_is_no_recipe_is_refused(owner: Caller, body: Any) -> None:
    kit.problem(owner.ask("POST", "jobs", json.dumps(body).encode()), 422)


@pytest.mark.parametrize("body", [
    b"{", b"\xff\xfe", b"NaN", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b'{"a": "\\ud800"}', b'{"a": "\\u0000"}', b'{"a": 1, "a": 2}',
    b"[" * 100_000, b'{"a":' * 3000 + b"1" + b"}" * 3000, b"9" * 5000, b'{"a": 99999999999999999999999}', b"{'a': 1}", b"\x00",
])  # fmt: skip
def test_what_is_no_json_is_refused(owner: Caller, body: bytes) -> None:
    for path in ("jobs", "jobs/check", "tokens"):
        assert kit.problem(owner.ask("POST", path, body), 400)["faults"][0]["code"] == "unreadable_json"


def test_a_large_body_is_refused(owner: Caller) -> None:
    kit.problem(owner.ask("POST", "jobs", b'{"name": "' + b"x" * 3_000_000 + b'"}'), 413)


def test_a_misspelled_field_is_named(owner: Caller) -> None:
    body = kit.problem(owner.post("tokens", {"nmae": "x"}), 422)
    assert {fault["where"].rsplit(".", 1)[-1] for fault in body["faults"]} == {"name", "nmae"}


@pytest.mark.parametrize(
    "path",
    [
        "nothing",
        "jobs/",
        "jobs/1",
        "jobs/../../admin",
        "datasets/x'--",
        "methods/a/b",
        "artifacts/%00/download/x",
        "",
        "jobs/%0A",
        "%0D%0A/x",
    ],
)
def test_an_unknown_address_is_a_problem_too(owner: Caller, path: str) -> None:
    response = owner.get(f"/api/v1/{path}")
    assert kit.problem(response, 404)["faults"][0]["code"] == "not_found"


def test_a_wrong_method_is_a_problem_too(owner: Caller) -> None:
    response = owner.ask("PUT", "jobs", {})
    assert kit.problem(response, 405)["faults"][0]["where"] == "method"
    assert set(response["Allow"].replace(" ", "").split(",")) >= {"GET", "POST"}


def test_an_unforeseen_error_shows_a_number_and_no_inside(
    owner: Caller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(user: Any) -> Any:
        raise RuntimeError("secret detail of the inside")

    monkeypatch.setattr(access, "jobs_for", explode)
    with caplog.at_level(logging.ERROR, logger="jobs.api.problems"):
        body = kit.problem(owner.get("jobs"), 500)
    assert "secret detail" not in json.dumps(body)
    number = caplog.records[0].getMessage().split()[-1]
    assert number in body["detail"]
    assert caplog.records[0].exc_info is not None


def test_a_refusal_of_the_engine_keeps_its_sentence(owner: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = bad_input("x", "What.", "Why.", "Way.", "some_code")
    monkeypatch.setattr(access, "jobs_for", lambda user: (_ for _ in ()).throw(fault))
    assert kit.problem(owner.get("jobs"), 422)["faults"] == [
        Fault(where="x", what="What.", why="Why.", way_out="Way.", code="some_code").to_dict()
    ]


# -- lists and events ----------------------------------------------------------------------------------------------------------------


def test_pages_never_overlap_and_miss_nothing(owner: Caller) -> None:
    for n in range(7):
        kit.job(owner.user, name="same" if n % 2 else "other", num_events=0)
    seen = []
    for page in (1, 2, 3, 4):
        body = owner.get(f"jobs?order=name&limit=2&page={page}").json()
        assert (body["count"], body["num_pages"], body["page"], body["limit"]) == (7, 4, page, 2)
        seen += [item["id"] for item in body["items"]]
    assert len(set(seen)) == 7
    assert owner.get("jobs?page=5&limit=2").json()["items"] == []


def test_jobs_can_be_filtered_by_status(owner: Caller) -> None:
    kit.job(owner.user, Status.RUNNING)
    kit.job(owner.user, Status.FAILED)
    assert [item["status"] for item in owner.get("jobs?status=failed").json()["items"]] == ["failed"]


def test_a_list_costs_the_same_for_many_rows(owner: Caller, django_assert_max_num_queries: Any) -> None:
    for _ in range(8):
        kit.artifact(owner.user)
    owner.get("jobs")
    for path in ("jobs", "artifacts", "datasets", "models"):
        with django_assert_max_num_queries(4):
            owner.get(path)


def test_events_are_dense_from_any_number(owner: Caller) -> None:
    row = kit.job(owner.user, num_events=12)
    seen: list[int] = []
    while True:
        body = owner.get(f"jobs/{row.pk}/events?after={seen[-1] if seen else 0}&limit=5").json()
        assert body["last_seq"] == 12
        assert not body["resync"]
        if not body["events"]:
            break
        seen += [event["seq"] for event in body["events"]]
    assert seen == list(range(1, 13))


def test_long_events_come_fewer_at_a_time(owner: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.api.jobs.ANSWER_ROWS", 500)
    job = kit.job(owner.user, num_events=0)
    Event.objects.bulk_create(
        Event(job=job, seq=seq, kind="metric", step=seq, time=1.0, data={"rows": [{"step": seq}] * 200})
        for seq in range(1, 8)
    )
    Job.objects.filter(pk=job.pk).update(last_seq=7)
    numbers: list[int] = []
    while not numbers or numbers[-1] < 7:
        events = owner.get(f"jobs/{job.pk}/events?after={numbers[-1] if numbers else 0}").json()["events"]
        assert 0 < sum(len(event["data"]["rows"]) for event in events) <= 500
        numbers += [event["seq"] for event in events]
    assert numbers == list(range(1, 8))


def test_pruned_events_are_never_a_silent_hole(owner: Caller) -> None:
    row = kit.job(owner.user, num_events=12)
    Event.objects.filter(job=row, seq__lt=6).delete()
    Job.objects.filter(pk=row.pk).update(first_seq=6)
    for after in (0, 4):
        body = owner.get(f"jobs/{row.pk}/events?after={after}").json()
        assert (body["resync"], body["first"], body["events"]) == (True, 6, [])
    assert [event["seq"] for event in owner.get(f"jobs/{row.pk}/events?after=5").json()["events"]] == list(range(6, 13))


@pytest.mark.parametrize("query", ["after=-1", "after=x", "limit=0", "limit=100000", "after=9223372036854775808"])
def test_odd_numbers_are_refused(owner: Caller, query: str) -> None:
    kit.problem(owner.get(f"jobs/{kit.job(owner.user).pk}/events?{query}"), 422)


def test_an_action_that_does_not_fit_the_state_says_so(owner: Caller) -> None:
    row = kit.job(owner.user, Status.SUCCEEDED)
    for action in ("cancel", "pause", "resume", "stop"):
        kit.problem(owner.post(f"jobs/{row.pk}/{action}"), 409)
    running = kit.job(owner.user, Status.RUNNING)
    kit.problem(owner.ask("DELETE", f"jobs/{running.pk}"), 409)
    response = owner.post(f"jobs/{running.pk}/pause")
    assert (response.status_code, response.json()["status"], response.json()["stop_request"]) == (
        202,
        "stopping",
        "pause",
    )
    assert response["Location"] == f"/api/v1/jobs/{running.pk}"
    assert owner.get(f"jobs/{running.pk}/events?after=5").json()["events"][0]["kind"] == "status"


@pytest.mark.parametrize("key", ["x" * 101, "with space", "ümlaut", "tab\t"])
def test_an_odd_idempotency_key_is_refused(owner: Caller, key: str) -> None:
    body = kit.problem(owner.post("jobs", kit.RECIPE, Idempotency_Key=key), 422)
    assert "Idempotency-Key" in body["faults"][0]["where"] or "key" in body["faults"][0]["where"].lower()


def test_what_a_model_entry_says_about_the_server_stays_there(owner: Caller) -> None:
    row = kit.model()
    row.facts = {"path": "/srv/secret", "source": "folder:/srv/secret", "num_layers": 2, "tensors": {}, "linears": {}}
    row.save()
    body = owner.get(f"models/{row.pk}")
    assert "/srv" not in body.content.decode()
    assert body.json()["facts"] == {"num_layers": 2}


# -- limits --------------------------------------------------------------------------------------------------------------------------


def test_who_asks_too_often_waits_and_others_do_not(owner: Caller, settings: Settings) -> None:
    settings.BONSAI_REQUESTS_PER_MINUTE = 3
    answers = [owner.get("tokens").status_code for _ in range(3)]
    assert answers == [200] * 3
    response = owner.get("tokens")
    assert kit.problem(response, 429)["faults"][0]["code"] == "too_often"
    assert 0 < int(response["Retry-After"]) <= 60
    assert kit.caller("other").get("tokens").status_code == 200


def test_writing_has_its_own_rate(owner: Caller, settings: Settings) -> None:
    settings.BONSAI_WRITES_PER_MINUTE = 1
    assert owner.post("tokens", {"name": "a"}).status_code == 201
    kit.problem(owner.post("tokens", {"name": "b"}), 429)
    assert owner.get("tokens").status_code == 200


async def _through_limit(
    chunks: list[bytes], length: int | None, path: str = "/api/v1/datasets"
) -> tuple[list[Any], int]:
    sent: list[Any] = []
    messages = [
        {"type": "http.request", "body": chunk, "more_body": n < len(chunks) - 1} for n, chunk in enumerate(chunks)
    ]
    reached = 0

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal reached
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            reached += len(message["body"])
            if not message["more_body"]:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                return

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    await BodyLimit(app)({"type": "http", "path": path, "headers": headers}, receive, send)
    return sent, reached


@pytest.mark.parametrize("length", [None, 10, 5_000_000])
async def test_a_body_without_end_is_stopped_before_it_fills_the_disk(settings: Settings, length: int | None) -> None:
    settings.BONSAI_MAX_UPLOAD_BYTES = 1_000_000
    sent, reached = await _through_limit([b"x" * 500_000] * 10, length)
    assert sent[0]["status"] == 413
    assert reached <= 1_000_000 + (1 << 20)
    assert json.loads(sent[1]["body"])["faults"][0]["code"] == "too_large"
    sent, _ = await _through_limit([b"x" * 500_000] * 10, length, "/data/upload/")
    assert sent[1]["body"].startswith(b"This upload is too large.")
    sent, reached = await _through_limit([b"x" * 500_000] * 2, 1_000_000)
    assert (sent[0]["status"], reached) == (200, 1_000_000)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 KB"),
        (2_000_000, "2 MB"),
        (536_870_912, "537 MB"),
        (5 * 10**12, "5000 GB"),
    ],
)
def test_sizes_in_words(size: int, words: str) -> None:
    assert in_words(size) == words


# -- documentation -------------------------------------------------------------------------------------------------------------------


def test_the_documentation_needs_no_other_host() -> None:
    page = Client().get("/api/v1/docs").content.decode()
    assert "swagger" in page
    assert "http://" not in page
    assert "https://" not in page
    from django.contrib.staticfiles import finders

    for name in ("swagger-ui.css", "swagger-ui-bundle.js", "swagger-ui-init.js"):
        assert f"/static/ninja/{name}" in page
        assert finders.find(f"ninja/{name}")
    assert '"validatorUrl": null' in page  # its default would ask another host about our schema


def test_the_schema_describes_every_route() -> None:
    schema = json.loads(Client().get("/api/v1/openapi.json").content)
    assert schema["openapi"].startswith("3.1")
    identifiers = set()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            where = f"{method} {path}"
            assert operation["summary"], where
            assert operation["tags"], where
            assert operation["operationId"] not in identifiers, where
            identifiers.add(operation["operationId"])
            assert "422" in operation["responses"], where
            assert operation.get("security") or path.endswith("/health"), where
    assert api.version == schema["info"]["version"]
    text = json.dumps(schema)
    for name in schema["components"]["schemas"]:
        assert text.count(f'"#/components/schemas/{name}"'), f"{name} is described and used nowhere."
