"""One web process with a very long finished run and a hundred shorter ones; started by the study `chart` with a data folder of its own.

Arguments: steps of the long run, number of shorter runs, their steps. Writes one JSON line when pages are served, and ends with its input.
"""

from __future__ import annotations

import json
import math
import socket
import sys
import time
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from jobs.bench.apart import metric_row, new_job, seconds_of

SPIKE = 50.0


def main(num_steps: int, num_runs: int, steps_a_run: int) -> None:
    """Plant the runs, serve them, and wait."""
    spikes = [num_steps // 7, num_steps // 2 + 13, num_steps - num_steps // 11]
    job = new_job("A very long run")
    columns = _learn(job, num_steps, spikes)
    others = [new_job(f"Run {number}") for number in range(num_runs)]
    for other in others:
        _learn(other, steps_a_run, [])
    from django.conf import settings

    from jobs.parts import parts

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    web = next(part for part in parts("127.0.0.1", port) if part.name == "web")
    web.start()
    try:
        _wait_for(f"http://127.0.0.1:{port}/login/")
        assert web.process is not None
        place = {
            "address": f"http://127.0.0.1:{port}", "cookie": [settings.SESSION_COOKIE_NAME, _session()], "job": str(job.pk), "spikes": spikes,
            "others": [str(other.pk) for other in others], "web": web.process.pid, "columns_seconds": columns,
        }  # fmt: skip
        print(json.dumps(place), flush=True)
        sys.stdin.read()
    finally:
        web.stop(10)


def _learn(job: Any, num_steps: int, spikes: list[int]) -> float:
    """A log with eight steps a line, taken in, and its columns; returns the seconds that the columns took."""
    from engine.core.events import EventLog
    from jobs.curves import Curves
    from jobs.ingest import Ingester
    from jobs.models import Job, Status
    from jobs.places import job_folder

    folder = job_folder(job.pk)
    folder.mkdir(parents=True)
    log = EventLog(folder, interval=1e9)
    for step in range(1, num_steps + 1):
        loss = SPIKE if step in spikes else 0.3 + 2.0 * math.exp(-5 * step / num_steps) + 0.2 * math.sin(step * 12.9898)
        log.metric(metric_row(step, loss))
        if step % 8 == 0:
            log.flush()
    log.emit("evaluation", {"eval_loss": 0.4, "samples": 8 * num_steps, "best": True}, step=num_steps)
    log.close()
    ingester = Ingester(job, folder, job.lease_epoch)
    ingester.drain()
    Job.objects.filter(pk=job.pk).update(
        status=Status.SUCCEEDED, reason="completed", total_steps=num_steps, done_steps=num_steps
    )
    return seconds_of(lambda: Curves(folder).read_on(ingester.offset))[0]


def _session() -> str:
    from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY, get_user_model
    from django.contrib.sessions.backends.db import SessionStore

    person = get_user_model().objects.get(username="bench")
    session = SessionStore()
    session[SESSION_KEY] = str(person.pk)
    session[BACKEND_SESSION_KEY] = "django.contrib.auth.backends.ModelBackend"
    session[HASH_SESSION_KEY] = person.get_session_auth_hash()
    session.create()
    return str(session.session_key)


def _wait_for(address: str) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            with urlopen(address, timeout=5):
                return
        except (URLError, OSError):
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]))
