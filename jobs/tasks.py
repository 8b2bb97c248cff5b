"""What the queue carries: a job's id, as a hint that there is work. The database says what the work is."""

from __future__ import annotations

import logging
import uuid

from django.db import transaction
from huey import crontab
from huey.contrib.djhuey import db_periodic_task, db_task

from jobs import schedule, supervisor, wake
from jobs.reconcile import reconcile
from jobs.retention import prune_ended

logger = logging.getLogger(__name__)


@db_task()
def supervise(job_id: str) -> None:
    """Take this job up again, or else the one whose turn it is, and stay with it until it rests."""
    supervisor.work(uuid.UUID(job_id))
    for waiting in schedule.waiting(limit=schedule.num_free_devices()):
        send(waiting)


@db_periodic_task(crontab(minute="*"))
def reconcile_every_minute() -> None:
    """Find what was forgotten or lost."""
    for job_id in reconcile():
        send(job_id)


@db_periodic_task(crontab(minute="17", hour="3"))
def prune_every_night() -> None:
    """Keep the database small; the logs keep everything."""
    num = prune_ended()
    if num:
        logger.info("Removed %d old events of ended jobs from the database.", num)


def enqueue(job_id: uuid.UUID) -> None:
    """Queue a job once the row that says so is committed."""
    transaction.on_commit(lambda: send(job_id))


def send(job_id: uuid.UUID) -> None:
    """Put the hint into the queue and ring. When that fails, the reconciler finds the row within a minute."""
    try:
        supervise(str(job_id))
    except Exception:
        logger.exception("The queue did not take job %s; it will be found again within a minute.", job_id)
    wake.ring(wake.QUEUE)
