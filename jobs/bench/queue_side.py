"""The processes of the queue study, each with a data folder of its own: `python -m jobs.bench.queue_side consume-ours|consume-stock|send-ours|send-stock FOLDER`.

A consumer prints a number and the moment whenever a task begins; a sender puts a task into the queue for each line that it reads, and prints the moment before.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huey import SqliteHuey
from huey.consumer import Consumer
from huey.signals import SIGNAL_EXECUTING


def stock_queue(folder: Path) -> tuple[Any, Callable[[str], Any]]:
    """huey with its SQLite storage as it comes, and a task that does nothing."""
    queue = SqliteHuey("stock", filename=str(folder / "stock.sqlite3"), results=False)

    @queue.task()
    def nothing(mark: str) -> None:
        """Nothing."""

    return queue, nothing


def our_queue(folder: Path) -> tuple[Any, Callable[[str], Any]]:
    """The studio's queue, and the way in which the studio puts a job's id into it."""
    os.environ |= {"BONSAI_HOME": str(folder), "DJANGO_SETTINGS_MODULE": "studio.settings"}
    import django

    django.setup()
    from huey.contrib.djhuey import HUEY

    from jobs.tasks import send

    return HUEY, lambda mark: send(uuid.UUID(mark))


def consume(queue: Any, work: Callable[[], None]) -> None:
    """Run a consumer and tell when each task begins."""

    def begins(signal: str, task: Any, *rest: Any) -> None:
        if task.args:  # not one of the studio's own periodic tasks
            print(task.args[0], time.monotonic(), flush=True)

    queue.signal(SIGNAL_EXECUTING)(begins)
    work()


def main(role: str, folder: Path) -> None:
    """Play one of the four roles until the input or the process ends."""
    ours = role.endswith("ours")
    queue, send = our_queue(folder) if ours else stock_queue(folder)
    if role.startswith("send"):
        print("ready", flush=True)
        for line in sys.stdin:
            begun = time.monotonic()
            send(line.strip())
            print(begun, flush=True)
    elif ours:
        from jobs.worker import consume as consume_ours

        consume(queue, consume_ours)
    else:
        consume(queue, Consumer(queue).run)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
