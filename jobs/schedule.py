"""Whose turn it is: who waits, which device is free, and the claim that makes one worker the owner of one job."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import Count, F, Max, Q
from django.utils import timezone

from jobs.devices import places
from jobs.lifecycle import Overtaken, transition
from jobs.models import ACTIVE, Device, Job, Status
from jobs.processes import this_process


def lease_end() -> datetime:
    """Until when a lease that is renewed now holds."""
    return timezone.now() + timedelta(seconds=settings.BONSAI_LEASE_SECONDS)


def waiting(limit: int) -> list[uuid.UUID]:
    """Waiting jobs in the order in which they should start: priority, then people in turn, then who came first."""
    queued = list(
        Job.objects.filter(status=Status.QUEUED)
        .order_by("-priority", "queued_at")
        .values_list("pk", "owner_id", "priority")
    )
    people = {owner for _, owner, _ in queued}
    served = {
        row["owner_id"]: (row["running"], row["latest"].timestamp() if row["latest"] else 0.0)
        for row in Job.objects.filter(owner_id__in=people)
        .order_by()
        .values("owner_id")
        .annotate(running=Count("pk", filter=Q(status__in=ACTIVE)), latest=Max("started_at"))
    }
    ordered: list[uuid.UUID] = []
    given: dict[int, int] = {}
    while queued and len(ordered) < limit:
        top = queued[0][2]
        # Of the highest priority, the person with the fewest running jobs, then the one who was served longest ago.
        chosen = min(
            (row for row in queued if row[2] == top),
            key=lambda row: (served[row[1]][0] + given.get(row[1], 0), served[row[1]][1]),
        )
        given[chosen[1]] = given.get(chosen[1], 0) + 1
        ordered.append(chosen[0])
        queued.remove(chosen)
    return ordered


def free_devices() -> list[Device]:
    """Enabled devices of this machine that no job holds."""
    busy = set(Job.objects.filter(status__in=ACTIVE).values_list("device", flat=True))
    mine = (
        Device.objects.select_for_update()
        .filter(enabled=True, name__in=[place.name for place in places()])
        .order_by("name")
    )
    return [device for device in mine if device.name not in busy]


def num_free_devices() -> int:
    """How many jobs could start on this machine now."""
    with transaction.atomic():
        return len(free_devices())


def claim() -> Job | None:
    """Take the job whose turn it is, with a device and a lease; None when nothing waits or nothing is free."""
    with transaction.atomic():
        devices = free_devices()
        if not devices:
            return None
        for job_id in waiting(limit=5):
            job = Job.objects.filter(pk=job_id, status=Status.QUEUED).first()
            if job is None:
                continue
            try:
                return transition(
                    job,
                    Status.STARTING,
                    "supervisor",
                    message="Loads the model and the data.",
                    attempt=F("attempt") + 1,
                    lease_owner=this_process(),
                    lease_epoch=F("lease_epoch") + 1,
                    lease_until=lease_end(),
                    device=devices[0].name,
                )
            except Overtaken:
                continue
    return None


def adopt(job: Job) -> bool:
    """Take over a job whose worker is gone. Its status stays; the raised epoch shuts the former worker out."""
    won = Job.objects.filter(pk=job.pk, lease_epoch=job.lease_epoch, status__in=ACTIVE).update(
        lease_owner=this_process(), lease_epoch=F("lease_epoch") + 1, lease_until=lease_end()
    )
    return bool(won)
