"""manage.py bench: run the benchmarks and rewrite docs/benchmarks, with one JSON line a goal and the table of all goals."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

import jobs.bench
from engine.bench.pages import run_studies, studies_in
from jobs.parts import ROOT

ENGINE = (sys.executable, "-m", "engine", "bench")


class Command(BaseCommand):
    """Studies of the engine run in processes of their own; those of the studio run here."""

    help = "Run the benchmarks (default: the quick ones) and rewrite docs/benchmarks."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("names", nargs="*", help="which benchmarks")

    def handle(self, *args: Any, **options: Any) -> None:
        listed = subprocess.run([*ENGINE, "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
        of_engine: dict[str, bool] = json.loads(listed.stdout)
        of_studio = studies_in(jobs.bench)
        known = {**of_engine, **{study.name: study.quick for study in of_studio.values()}}
        names = options["names"] or [name for name, quick in known.items() if quick]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise CommandError(f"There is no benchmark called {unknown[0]}. Choose from: {', '.join(known)}.")
        failed = []
        for name in names:  # each in a process of its own, so that none inherits another's memory and threads
            if name in of_studio:
                run_studies(of_studio, [name])
            elif subprocess.run([*ENGINE, name], cwd=ROOT, check=False).returncode:
                failed.append(name)
        if failed:
            raise CommandError(f"These benchmarks did not finish: {', '.join(failed)}.")
