"""The writing side of a study: a run whose log grows when asked to, in a studio of its own. Run as `python -m jobs.bench.writer`.

What it writes goes the way of every event: the engine's log, the supervisor's ingest, one transaction, a bell.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from typing import Any

import django


def prepare(num_sessions: int) -> dict[str, Any]:
    """Make the database, a person with many open browsers, and two runs; returns the ids of the runs and the cookies."""
    from django.conf import settings
    from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY, get_user_model
    from django.contrib.sessions.backends.db import SessionStore
    from django.core.management import call_command

    from jobs.lifecycle import begin
    from jobs.models import Job
    from jobs.places import job_folder

    call_command("migrate", verbosity=0, interactive=False)
    person = get_user_model().objects.create_user("viewer")
    cookies = []
    for _ in range(num_sessions):
        session = SessionStore()
        session[SESSION_KEY] = str(person.pk)
        session[BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
        session[HASH_SESSION_KEY] = person.get_session_auth_hash()
        session.create()
        cookies.append(f"{settings.SESSION_COOKIE_NAME}={session.session_key}")
    ids = []
    for name in ("Watched", "Silent"):
        job = Job(id=uuid.uuid4(), owner=person, name=name, request={}, recipe={"version": 1}, fingerprint="f" * 64)
        begin(job, "viewer")
        job_folder(job.pk).mkdir(parents=True, exist_ok=True)
        ids.append(str(job.pk))
    return {"job": ids[0], "silent": ids[1], "cookies": cookies}


def row(step: int) -> dict[str, Any]:
    """A row as the training loop writes it, with the moment of writing beside it."""
    return {
        "step": step,
        "samples": 8 * step,
        "tokens": 100 * step,
        "epoch": round(step / 50, 4),
        "loss": 2.0 / step,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "seconds": step / 10,
        "tokens_per_second": 1000.0,
        "memory": 1 << 20,
        "written": time.time(),
    }


def main() -> None:
    """Obey commands until stdin ends: {"rate": events per second, "num": events, "num_rows": steps that share an event}."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")
    django.setup()
    from engine.core.events import EventLog
    from jobs.ingest import Ingester
    from jobs.models import Job
    from jobs.places import job_folder

    made = prepare(int(sys.argv[1]))
    print(json.dumps(made), flush=True)
    job = Job.objects.get(pk=made["job"])
    log = EventLog(job_folder(job.pk), interval=1e9)
    ingester = Ingester(job, job_folder(job.pk), job.lease_epoch)
    step = 0
    for line in sys.stdin:
        command = json.loads(line)
        due = time.monotonic()
        for _ in range(command["num"]):
            for _ in range(command["num_rows"]):
                step += 1
                log.metric(row(step))
            log.flush()
            ingester.drain()
            due += 1 / command["rate"]
            time.sleep(max(0.0, due - time.monotonic()))
        print(json.dumps({"last": step}), flush=True)


if __name__ == "__main__":
    main()
