"""The live view: what a socket sends, to whom, and what happens when somebody is late, slow, or somebody else."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.testing import WebsocketCommunicator
from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.test import Client

from engine.core.events import EventLog
from jobs import outlet
from jobs import pump as pump_module
from jobs.ingest import Ingester
from jobs.models import Event, Job
from jobs.places import job_folder
from jobs.pump import Viewer, pump
from studio.asgi import application
from tests.jobs.conftest import MakeJob
from tests.jobs.logs import metric_row

pytestmark = pytest.mark.django_db(transaction=True)


def take(job: Job) -> None:
    fresh = Job.objects.get(pk=job.pk)
    Ingester(fresh, job_folder(job.pk), fresh.lease_epoch).drain()


class Watcher:
    """A browser tab: its cookie, its socket, and what it heard."""

    def __init__(self, job: Job, cookie: str, after: Any = 0, origin: str = "http://localhost:8000") -> None:
        headers = [(b"origin", origin.encode()), (b"host", b"localhost:8000")]
        if cookie:
            headers.append((b"cookie", f"{settings.SESSION_COOKIE_NAME}={cookie}".encode()))
        self.socket = WebsocketCommunicator(application, f"/ws/jobs/{job.pk}/?after={after}", headers=headers)

    async def enter(self) -> bool:
        connected, _ = await self.socket.connect(timeout=5)
        return bool(connected)

    async def hear(self, timeout: float = 3.0) -> dict[str, Any]:
        return dict(json.loads(await self.socket.receive_from(timeout=timeout)))

    async def hear_until(self, seq: int, timeout: float = 10.0) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        end = time.monotonic() + timeout
        while not events or events[-1]["seq"] < seq:
            frame = await self.hear(end - time.monotonic())
            assert frame["type"] == "events" and frame["last_seq"] == frame["events"][-1]["seq"]
            events += frame["events"]
        return events


@pytest.fixture
def cookie(person: User) -> str:
    client = Client()
    client.force_login(person)
    return client.cookies[settings.SESSION_COOKIE_NAME].value


async def test_a_newcomer_hears_the_past_and_then_the_present(
    make_job: MakeJob, write_log: Callable[..., EventLog], cookie: str
) -> None:
    job = await sync_to_async(make_job)()
    log = write_log(job, 30)
    await sync_to_async(take)(job)
    tab = Watcher(job, cookie)
    assert await tab.enter()
    past = await tab.hear_until(31)
    assert [event["seq"] for event in past] == list(range(1, 32))
    assert past[0]["kind"] == "status" and past[1]["data"]["rows"][0]["step"] == 1
    log.metric(metric_row(31, loss=float("nan")))
    log.flush()
    began = time.monotonic()
    await sync_to_async(take)(job)
    news = await tab.hear_until(32)
    assert news[0]["data"]["rows"][0]["loss"] is None and news[0]["data"]["rows"][0]["nonfinite"] == ["loss"]
    assert time.monotonic() - began < 0.9, "a bell brings it before the next look"
    await tab.socket.disconnect()


async def test_who_comes_back_hears_what_came_after(
    make_job: MakeJob, write_log: Callable[..., EventLog], cookie: str
) -> None:
    job = await sync_to_async(make_job)()
    write_log(job, 30)
    await sync_to_async(take)(job)
    tab = Watcher(job, cookie, after=25)
    assert await tab.enter()
    assert [event["seq"] for event in await tab.hear_until(31)] == list(range(26, 32))
    await tab.socket.disconnect()


async def test_a_backlog_comes_in_frames_of_bearable_size(
    make_job: MakeJob, write_log: Callable[..., EventLog], cookie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump_module, "FRAME_CHARS", 150_000)
    job = await sync_to_async(make_job)()
    tab = Watcher(job, cookie)
    assert await tab.enter()
    await tab.hear_until(1)
    write_log(job, 3000)
    await sync_to_async(take)(job)
    last = (await Job.objects.aget(pk=job.pk)).last_seq
    events: list[dict[str, Any]] = []
    num = 0
    while not events or events[-1]["seq"] < last:
        frame = await tab.hear()
        assert len(json.dumps(frame, separators=(",", ":"))) < 250_000
        events += frame["events"]
        num += 1
    assert num > 3 and [event["seq"] for event in events] == list(range(2, last + 1))
    assert [row["step"] for event in events for row in event["data"]["rows"]] == list(range(1, 3001))
    await tab.socket.disconnect()


@pytest.mark.parametrize("case", ["pruned", "far behind", "from the future"])
async def test_a_hole_is_never_silent(
    make_job: MakeJob, write_log: Callable[..., EventLog], cookie: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await sync_to_async(make_job)()
    log = write_log(job, 30)
    await sync_to_async(take)(job)
    if case == "pruned":
        await Event.objects.filter(job=job, seq__lte=10).adelete()
        await Job.objects.filter(pk=job.pk).aupdate(first_seq=11)
    if case == "far behind":
        monkeypatch.setattr(pump_module, "MAX_BACKLOG", 5)
    tab = Watcher(job, cookie, after=10**6 if case == "from the future" else 3)
    assert await tab.enter()
    assert (await tab.hear())["type"] == "resync"
    log.metric(metric_row(31))
    log.flush()
    await sync_to_async(take)(job)
    assert [event["seq"] for event in await tab.hear_until(32)] == [32], "and it goes on from where the series ends"
    await tab.socket.disconnect()


async def test_at_most_ten_frames_a_second_and_no_number_is_missed(
    make_job: MakeJob, write_log: Callable[..., EventLog], cookie: str
) -> None:
    job = await sync_to_async(make_job)()
    log = write_log(job)
    tabs = [Watcher(job, cookie) for _ in range(3)]
    for tab in tabs:
        assert await tab.enter()
        await tab.hear_until(1)
    began, frames, events = time.monotonic(), 0, []

    async def write() -> None:
        for step in range(1, 101):
            log.metric(metric_row(step))
            log.flush()
            await sync_to_async(take)(job)
            await asyncio.sleep(0.01)

    writer = asyncio.create_task(write())
    while not events or events[-1]["seq"] < 101:
        frame = await tabs[0].hear(5)
        frames += 1
        events += frame["events"]
    took = time.monotonic() - began
    await writer
    assert [event["seq"] for event in events] == list(range(2, 102))
    assert frames <= 10 * took + pump_module.BURST_FRAMES + 1
    for tab in tabs[1:]:
        assert [event["seq"] for event in await tab.hear_until(101)] == list(range(2, 102))
    assert len(pump().topics) == 1, "one pump for all of them"
    for tab in tabs:
        await tab.socket.disconnect()
    await asyncio.sleep(0.1)
    assert not pump().topics, "who leaves is forgotten"


@pytest.mark.parametrize(
    "case", ["nobody", "somebody else", "a wrong origin", "no origin", "no such job", "a bad number", "locked out"]
)
async def test_who_may_not_watch_is_refused(make_job: MakeJob, cookie: str, person: User, case: str) -> None:
    job = await sync_to_async(make_job)()
    after: Any = 0
    origin = "http://localhost:8000"
    if case == "nobody":
        cookie = ""
    elif case == "somebody else":
        other = await sync_to_async(get_user_model().objects.create_user)("eve")
        client = Client()
        await sync_to_async(client.force_login)(other)
        cookie = client.cookies[settings.SESSION_COOKIE_NAME].value
    elif case == "a wrong origin":
        origin = "http://evil.example"
    elif case == "no origin":
        origin = ""
    elif case == "no such job":
        await Job.objects.filter(pk=job.pk).adelete()
    elif case == "a bad number":
        after = "1%20or%201"
    elif case == "locked out":
        await User.objects.filter(pk=person.pk).aupdate(is_active=False)
    assert not await Watcher(job, cookie, after=after, origin=origin).enter()


async def test_an_unknown_address_is_refused_quietly() -> None:
    socket = WebsocketCommunicator(
        application, "/ws/elsewhere/", headers=[(b"origin", b"http://localhost"), (b"host", b"localhost")]
    )
    assert not (await socket.connect(timeout=5))[0]


async def test_rights_are_asked_again_while_one_watches(
    make_job: MakeJob, cookie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump_module, "RECHECK_SECONDS", 0.2)
    job = await sync_to_async(make_job)()
    tab = Watcher(job, cookie)
    assert await tab.enter()
    await tab.hear_until(1)
    await Session.objects.all().adelete()  # logged out elsewhere
    closing = await tab.socket.receive_output(timeout=3)
    assert closing == {"type": "websocket.close", "code": pump_module.NOT_ALLOWED}


async def test_who_does_not_read_is_dropped_and_the_others_go_on(
    make_job: MakeJob, write_log: Callable[..., EventLog], cookie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "QUEUE_FRAMES", 2)
    job = await sync_to_async(make_job)()
    said: list[dict[str, Any]] = []
    stuck = asyncio.Event()

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "websocket.send":
            await stuck.wait()  # a server waits like this while a client does not read
        said.append(message)

    slow = Viewer(job_id=job.pk, session_key=cookie, seq=1, outlet=outlet.TaskOutlet(send))
    await pump().join(slow)
    quick = Watcher(job, cookie)
    assert await quick.enter()
    log = write_log(job)
    for step in range(1, 6):
        log.metric(metric_row(step))
        log.flush()
        await sync_to_async(take)(job)
        await quick.hear_until(step + 1)
    assert said == [{"type": "websocket.close", "code": pump_module.TOO_SLOW}]
    assert slow not in pump().topics[job.pk].everyone()
    await quick.socket.disconnect()


async def test_a_deleted_job_closes_its_sockets(make_job: MakeJob, cookie: str) -> None:
    job = await sync_to_async(make_job)()
    tab = Watcher(job, cookie)
    assert await tab.enter()
    await tab.hear_until(1)
    await sync_to_async(job.delete)()
    assert await tab.socket.receive_output(timeout=5) == {"type": "websocket.close", "code": pump_module.GONE}
