"""The consumer: huey's thread workers, woken by a bell. They only supervise; trainings are processes of their own."""

from __future__ import annotations

import logging
import threading
from typing import Any

from huey.consumer import Consumer, Worker
from huey.contrib.djhuey import HUEY

from jobs import devices, supervisor, tasks, wake
from jobs.reconcile import reconcile

logger = logging.getLogger(__name__)


class WakingWorker(Worker):
    """Looks into the queue as soon as somebody rings, and now and then without that."""

    delay: float

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rung = supervisor.ears.listen(wake.QUEUE) if supervisor.ears else threading.Event()

    def sleep(self) -> None:
        self.rung.wait(min(self.delay, self.max_delay))
        self.rung.clear()
        self.delay = min(self.delay * self.backoff, self.max_delay)


class BonsaiConsumer(Consumer):
    """On TERM every running job is asked to pause; it goes on when the studio starts again."""

    worker_class = WakingWorker

    def stop(self, graceful: bool = False) -> None:
        supervisor.shutting_down.set()
        if supervisor.ears:
            supervisor.ears.tell({wake.QUEUE, *map(str, supervisor.supervised_here())})
        super().stop(graceful=graceful)


def consume() -> None:
    """Work until told to stop. One worker for each device, and one that is always free for the reconciler."""
    devices.register()
    supervisor.ears = wake.Ears()
    supervisor.ears.start()
    consumer = BonsaiConsumer(
        HUEY,
        workers=len(devices.places()) + 1,
        worker_type="thread",
        initial_delay=0.5,
        backoff=1.15,
        max_delay=2.0,
        graceful_signal="TERM",
        check_worker_health=True,
        health_check_interval=10,
    )
    for job_id in reconcile():
        tasks.send(job_id)
    try:
        consumer.run()
    finally:
        supervisor.ears.close()
