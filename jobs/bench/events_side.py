"""The two sides of the study `events`: what runs write at a steady pace, and what takes it in. Run as `python -m jobs.bench.events_side ROLE …`.

read FOLDER JOBS           jobs of an installation of its own, taken in as the supervisor does; says the folders, then for each job (moment, last line)
write RATE SECONDS FOLDER… engine logs, in turn, RATE lines a second together; leaves the moment of every line beside each log
scalars RATE SECONDS FOLDER…  tensorboardX's SummaryWriter in place of the engine's log, one number at a time
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench.apart import metric_row, new_job

MOMENTS = "moments.f64"  # when each line was written, as doubles


def read(num_jobs: int) -> None:
    """Take in what grows in the folders of new jobs, one thread a job with the pauses of the supervisor, until the input ends."""
    rows = [new_job(f"events {number}") for number in range(num_jobs)]
    from django.db import connection

    from jobs import supervisor
    from jobs.curves import Curves
    from jobs.ingest import Ingester
    from jobs.models import Event, Job
    from jobs.places import job_folder
    from jobs.schedule import lease_end

    folders = [job_folder(row.pk) for row in rows]
    for folder in folders:
        folder.mkdir(parents=True)
    print(json.dumps([str(folder) for folder in folders]), flush=True)
    over = threading.Event()
    looks: list[list[tuple[float, int]]] = [[] for _ in rows]
    busy = time.process_time()

    def follow(place: int) -> None:
        job, folder = rows[place], folders[place]
        ingester, curves = Ingester(job, folder, job.lease_epoch), Curves(folder)
        pause, asked, renewed = supervisor.FIRST_LOOK_SECONDS, time.monotonic(), time.monotonic()
        while True:
            last = over.is_set()  # what was written before this is taken in below
            taken = ingester.drain()
            looks[place].append((time.time(), ingester.log_seq))
            pause = (
                supervisor.FIRST_LOOK_SECONDS
                if taken.num_events
                else min(pause * supervisor.SLOWER, supervisor.LOOK_SECONDS)
            )
            now = time.monotonic()
            if now - asked >= supervisor.ASK_SECONDS:
                asked = now
                curves.read_on(ingester.offset, seconds=supervisor.COLUMN_SECONDS)
                job.refresh_from_db()
            if now - renewed >= 5.0:
                renewed = now
                Job.objects.filter(pk=job.pk).update(lease_until=lease_end())
            if last:
                break
            over.wait(pause)
        connection.close()

    threads = [threading.Thread(target=follow, args=(place,)) for place in range(num_jobs)]
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    over.set()
    for thread in threads:
        thread.join()
    busy = time.process_time() - busy
    steps = []
    for job in rows:
        found = Event.objects.filter(job=job, kind="metric").order_by("seq").values_list("data", flat=True)
        steps.append([row["step"] for data in found.iterator(chunk_size=2000) for row in data["rows"]])
    lost = sum(
        len(told) != looks[place][-1][1] or told != list(range(1, len(told) + 1)) for place, told in enumerate(steps)
    )
    num = sum(map(len, steps))
    print(json.dumps({"looks": looks, "num": num, "jobs_that_differ": lost, "processor": busy}), flush=True)


def write(rate: float, seconds: float, folders: list[Path]) -> None:
    """Engine logs that grow evenly; one line for each step."""
    from engine.core.events import EventLog

    logs = [EventLog(folder, interval=0.0) for folder in folders]
    busy = time.process_time()
    moments = [array("d") for _ in logs]

    def line(place: int, step: int) -> None:
        logs[place].metric(metric_row(step, 2.0 + math.sin(step / 900)))
        moments[place].append(time.time())

    took = _paced(rate, seconds, len(logs), line)
    for log, folder, told in zip(logs, folders, moments, strict=True):
        log.close()
        (folder / MOMENTS).write_bytes(told.tobytes())
    print(json.dumps({**took, "processor": time.process_time() - busy}), flush=True)


def scalars(rate: float, seconds: float, folders: list[Path]) -> None:
    """SummaryWriters with their default settings; each scalar is one event."""
    library: Any = importlib.import_module("tensorboardX")
    writers = [library.SummaryWriter(str(folder)) for folder in folders]
    busy = time.process_time()
    took = _paced(rate, seconds, len(writers), lambda place, step: writers[place].add_scalar("loss", 1.0 / step, step))
    for writer in writers:
        writer.close()
    print(json.dumps({**took, "processor": time.process_time() - busy}), flush=True)


def _paced(rate: float, seconds: float, num: int, line: Callable[[int, int], object]) -> dict[str, float]:
    """Call `line(place, step)` evenly for so long; who cannot keep up is late, and says how many were made in the time."""
    start = time.monotonic()
    made, wanted = 0, int(rate * seconds)
    while made < wanted and time.monotonic() < start + seconds:
        due = min(wanted, int((time.monotonic() - start) * rate) + 1)
        while made < due:
            line(made % num, made // num + 1)
            made += 1
            if not made % 64 and time.monotonic() > start + seconds:
                break
        time.sleep(0.002)
    return {"num": made, "wanted": wanted, "seconds": time.monotonic() - start}


def main() -> None:
    """Play the named role."""
    role, *rest = sys.argv[1:]
    if role == "read":
        read(int(rest[0]))
    else:
        {"write": write, "scalars": scalars}[role](float(rest[0]), float(rest[1]), [Path(name) for name in rest[2:]])


if __name__ == "__main__":
    main()
