"""Jobs, logs and a person, made quickly and really."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User

from engine.core.events import EventLog
from jobs import devices, supervisor
from jobs.lifecycle import begin
from jobs.models import Device, Job
from jobs.places import home, job_folder
from tests.jobs.logs import metric_row

MakeJob = Callable[..., Job]


@pytest.fixture
def person(db: None) -> User:
    return User.objects.create_user("ada", password="a long password")


@pytest.fixture
def make_job(person: User) -> MakeJob:
    """Make a queued job; keywords override fields."""

    def make(**fields: Any) -> Job:
        values = {
            "owner": person,
            "name": "A run",
            "request": {},
            "recipe": {"version": 1},
            "fingerprint": "f" * 64,
            **fields,
        }
        job = Job(id=uuid.uuid4(), **values)
        begin(job, "ada")
        return job

    return make


@pytest.fixture
def one_device(db: None, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A machine with a processor and nothing else."""
    place = devices.Place("cpu", "A processor", 1 << 30)
    monkeypatch.setattr(devices, "places", lambda: (place,))
    monkeypatch.setattr("jobs.schedule.places", lambda: (place,))
    return Device.objects.create(name="cpu", title="A processor", memory_bytes=1 << 30)


@pytest.fixture(autouse=True)
def nothing_left(bonsai_home: Path) -> Iterator[None]:
    """No state of one test reaches the next."""
    yield
    supervisor.shutting_down.clear()
    for name in ("jobs", "wake"):
        shutil.rmtree(home() / name, ignore_errors=True)


@pytest.fixture
def write_log() -> Callable[..., EventLog]:
    """A real event log in a job's folder."""

    def write(job: Job, num_steps: int = 0, per_event: int = 1) -> EventLog:
        folder = job_folder(job.pk)
        folder.mkdir(parents=True, exist_ok=True)
        log = EventLog(folder, interval=1e9)
        for step in range(1, num_steps + 1):
            log.metric(metric_row(step))
            if step % per_event == 0:
                log.flush()
        log.flush()
        return log

    return write
