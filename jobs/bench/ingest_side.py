"""One process that takes logs into a database, beside SummaryWriter; started by the study `ingest` with a data folder of its own.

Arguments: events a round, rounds. Writes one JSON line.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from jobs.bench.apart import metric_row, new_job, seconds_of

BATCHES, EVENTS_A_BATCH = 4, 10_000  # one after the other, before the rest is a backlog
SCALARS = 20_000  # of SummaryWriter, a round


def main(num_events: int, rounds: int) -> None:
    """Alternate: write a log, take it in, write scalars with SummaryWriter."""
    rows = [metric_row(step, 2.0 + math.sin(step / 900) / (1 + step * 1e-5)) for step in range(1, num_events + 1)]
    turns = [{**_ours(rows), "summary_writer": _summary_writer()} for _ in range(rounds)]
    print(json.dumps(turns), flush=True)


def _ours(rows: list[dict[str, float]]) -> dict[str, Any]:
    job = new_job("ingest")
    from engine.core.events import LOG_NAME, EventLog
    from jobs.ingest import Ingester
    from jobs.models import Event
    from jobs.places import job_folder

    folder = job_folder(job.pk)
    folder.mkdir(parents=True)
    log = EventLog(folder, interval=0.0)  # one line for each step

    def write() -> None:
        for row in rows:
            log.metric(row)
        log.close()

    written = seconds_of(write)
    lines = (folder / LOG_NAME).read_bytes().splitlines(keepends=True)
    (folder / LOG_NAME).unlink()
    ingester = Ingester(job, folder, job.lease_epoch)

    def append(start: int, end: int) -> None:
        with (folder / LOG_NAME).open("ab") as file:  # as the child does: written, and nobody has waited for the disk
            file.write(b"".join(lines[start:end]))

    batches = []
    for start in range(0, BATCHES * EVENTS_A_BATCH, EVENTS_A_BATCH):
        append(start, start + EVENTS_A_BATCH)
        batches.append(seconds_of(ingester.drain)[0])
    append(BATCHES * EVENTS_A_BATCH, len(lines))
    taken = seconds_of(ingester.drain)
    events = Event.objects.filter(job=job, kind="metric").order_by("seq").values_list("data", flat=True)
    steps = [row["step"] for data in events.iterator(chunk_size=50) for row in data["rows"]]
    lost = len(rows) - sum(step == place for place, step in enumerate(steps, 1))
    job.delete()
    return {
        "num": len(rows),
        "lost": lost,
        "write": written,
        "num_backlog": len(rows) - BATCHES * EVENTS_A_BATCH,
        "ingest": taken,
        "batches": batches,
        "bytes_a_line": sum(map(len, lines)) / len(lines),
    }


def _summary_writer() -> float | None:
    """Seconds a scalar, to the end of the file; None where no SummaryWriter is installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        return None
    library = importlib.import_module("tensorboardX")
    with tempfile.TemporaryDirectory() as folder:
        writer = library.SummaryWriter(str(Path(folder)))

        def write() -> None:
            for step in range(SCALARS):
                writer.add_scalar("loss", 1.0 / (step + 1), step)
            writer.close()

        return seconds_of(write)[0] / SCALARS


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
