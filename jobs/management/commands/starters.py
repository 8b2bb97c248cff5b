"""manage.py starters: puts the starter data, the starter models and the first run in place."""

from __future__ import annotations

import time
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from engine.core.errors import EngineError
from jobs import starters
from jobs.actions import ActionRefused
from jobs.catalogue import engine


class Command(BaseCommand):
    """Add what a newcomer finds. Safe to run at every start: what is there already stays."""

    help = "Add the starter data, the starter models and, on a fresh installation, the first run."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--wait",
            type=float,
            default=0.0,
            metavar="SECONDS",
            help="wait this long for the engine service to come up",
        )
        parser.add_argument("--no-run", action="store_true", help="queue no first run")

    def handle(self, *args: Any, **options: Any) -> None:
        until = time.monotonic() + options["wait"]
        owner, password = starters.ensure_administrator()
        if password:
            self.stdout.write(f"Made the administrator {owner.username} with the password {password} (shown only now).")
        try:
            num_data = starters.ensure_data()
            while not engine().alive() and time.monotonic() < until:
                time.sleep(0.2)
            num_models = starters.ensure_models()
            job = None if options["no_run"] else starters.ensure_first_run(owner)
        except (EngineError, ActionRefused) as error:
            raise CommandError(str(error)) from None
        self.stdout.write(
            f"Added or renewed {num_data} data sets and {num_models} models."
            + (f" Queued “{job.name}”." if job else "")
        )
