"""manage.py consume: runs queued jobs, one on each device."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from jobs.worker import consume


class Command(BaseCommand):
    """Supervise queued jobs until stopped. `manage.py up` starts this; on further machines start it by hand."""

    help = "Supervise queued jobs until stopped; TERM asks running jobs to pause."

    def handle(self, *args: Any, **options: Any) -> None:
        consume()
