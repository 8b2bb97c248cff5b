"""How long events stay in the database. The log in the job's folder keeps all of them; a client that is too far back is told to resync."""

from __future__ import annotations

from django.conf import settings
from django.db import transaction
from django.db.models import F

from jobs.models import TERMINAL, Event, Job

PIECE = 20_000


def prune(job: Job, keep: int) -> int:
    """Delete all but the newest `keep` events of a job, in pieces that block nobody; returns how many went."""
    num = 0
    while True:
        with transaction.atomic():
            now = Job.objects.select_for_update().filter(pk=job.pk).values_list("first_seq", "last_seq").first()
            if now is None or now[1] - now[0] + 1 <= keep:
                return num
            first, last = now
            upto = min(last - keep, first + PIECE - 1)
            Job.objects.filter(pk=job.pk).update(first_seq=upto + 1)
            num += Event.objects.filter(job_id=job.pk, seq__lte=upto).delete()[0]


def prune_ended() -> int:
    """Prune every ended job that has more events than BONSAI_KEEP_EVENTS; returns how many events went."""
    keep = settings.BONSAI_KEEP_EVENTS
    rows = Job.objects.filter(status__in=TERMINAL, last_seq__gte=F("first_seq") + keep)
    return sum(prune(job, keep) for job in rows.only("pk"))
