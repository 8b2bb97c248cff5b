"""manage.py forward: sends the curves of runs to the trackers that BONSAI_FORWARD names."""

from __future__ import annotations

import signal
import threading
import uuid
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections

from jobs import forwarding
from jobs.models import TERMINAL, Job
from jobs.trackers import Away, Refused


class Command(BaseCommand):
    """Send what the trackers have not got. What they hold already is not sent twice, or they know it again."""

    help = "Send the curves of runs that have ended to MLflow, Weights & Biases or Trackio (BONSAI_FORWARD)."

    def add_arguments(self, parser: CommandParser) -> None:
        what = parser.add_mutually_exclusive_group()
        what.add_argument(
            "--job",
            action="append",
            default=[],
            metavar="ID",
            help="send this run from its beginning, also when it was refused before or deleted there (may be repeated)",
        )
        what.add_argument("--follow", action="store_true", help="keep following all runs; `manage.py up` starts this")

    def handle(self, *args: Any, **options: Any) -> None:
        found, _ = forwarding.targets()  # what is wrong with the others, the system checks have said
        if not found:
            raise CommandError(
                "Nothing is sent anywhere: BONSAI_FORWARD names no tracker that can be used. "
                "Write for example BONSAI_FORWARD=mlflow:http://host:5000."
            )
        if options["follow"]:
            stopping = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stopping.set())
            connections.close_all()
            forwarding.follow(found, stopping)
            return
        again = bool(options["job"])
        jobs = [self._named(name) for name in options["job"]] if again else self._ended()
        open_ends = [self._send_to(target, jobs, again) for target in found]
        if any(open_ends):
            raise CommandError("Not everything was sent. What is missing is sent when you repeat this command.")

    def _send_to(self, target: forwarding.Target, jobs: list[Job], again: bool) -> int:
        """Tell one tracker about these jobs; returns how many could not be told."""
        forwarder = forwarding.Forwarder(target)
        num_runs = num_points = num_left = 0
        for place, job in enumerate(jobs):
            if not again and forwarder.knows_all(job):
                continue
            try:
                num = forwarder.tell(job, again=again)
            except Refused as error:
                self.stderr.write(f"{target} takes nothing of “{job.name}” ({job.pk}). {error}")
                num_left += 1
            except FileNotFoundError:
                self.stdout.write(f"“{job.name}” ({job.pk}) has no log, so there is nothing to send.")
            except Away as error:
                self.stderr.write(f"{target} takes nothing now. {error}")
                num_left += len(jobs) - place
                break
            else:
                if num is None:
                    self.stderr.write(f"“{job.name}” ({job.pk}) is being sent by another process.")
                    num_left += 1
                    continue
                num_runs, num_points = num_runs + 1, num_points + num
            finally:
                forwarder.close(job.pk)
        self.stdout.write(f"{target}: sent {num_points} steps and measurements of {num_runs} runs.")
        return num_left

    def _named(self, name: str) -> Job:
        try:
            job = Job.objects.filter(pk=uuid.UUID(name)).first()
        except ValueError:
            job = None
        if job is None:
            raise CommandError(f"There is no job {name}. The address of a run's page ends with its number.")
        return job

    def _ended(self) -> list[Job]:
        return list(Job.objects.filter(status__in=TERMINAL).exclude(started_at=None).order_by("started_at"))
