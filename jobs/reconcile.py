"""The queue may forget and workers may die; the database is the truth. This finds what both have left behind."""

from __future__ import annotations

import logging
import time
import uuid
from datetime import timedelta

from django.conf import settings
from django.utils import timezone

from jobs import schedule, supervisor
from jobs.models import ACTIVE, Job
from jobs.processes import is_gone, this_process

logger = logging.getLogger(__name__)


def reconcile() -> list[uuid.UUID]:
    """Adopt jobs whose worker is gone; returns every job that somebody should be sent to."""
    adopted = [job.pk for job in _abandoned() if schedule.adopt(job)]
    for job_id in adopted:
        logger.warning("Job %s: its worker is gone; this one takes over.", job_id)
    return [*_ours_but_unattended(), *schedule.waiting(limit=schedule.num_free_devices())]


def _ours_but_unattended() -> list[uuid.UUID]:
    """Jobs of this process that no thread stays with (yet). They are sent again and not adopted again: a second new epoch would shut out
    the thread that is just taking the job up."""
    ours = Job.objects.filter(status__in=ACTIVE, lease_owner=this_process()).values_list("pk", flat=True)
    here = supervisor.supervised_here()
    return [job_id for job_id in ours if job_id not in here]


def _abandoned() -> list[Job]:
    sure: list[Job] = []
    suspects: list[Job] = []
    for job in Job.objects.filter(status__in=ACTIVE).exclude(lease_owner=this_process()):
        if is_gone(job.lease_owner):
            sure.append(job)
        elif _odd(job):
            suspects.append(job)
    return sure + _still(suspects)


def _odd(job: Job) -> bool:
    """A lease that ran out, or that ends later than any lease can: then a clock was moved."""
    now = timezone.now()
    return (
        job.lease_until is None
        or job.lease_until < now
        or job.lease_until > now + timedelta(seconds=2 * settings.BONSAI_LEASE_SECONDS)
    )


def _still(suspects: list[Job]) -> list[Job]:
    """Those whose lease nobody renews while we wait: a wall clock that jumped makes no worker lose its job."""
    if not suspects:
        return []
    time.sleep(1.5 * settings.BONSAI_LEASE_SECONDS / supervisor.RENEWALS_PER_LEASE)
    now = {row.pk: row for row in Job.objects.filter(pk__in=[job.pk for job in suspects], status__in=ACTIVE)}
    return [
        now[job.pk]
        for job in suspects
        if job.pk in now and (now[job.pk].lease_epoch, now[job.pk].lease_until) == (job.lease_epoch, job.lease_until)
    ]
