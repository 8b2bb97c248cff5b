"""Work in a process of its own, with a data folder of its own, so that a study never touches the installation it is started from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.parts import ROOT


@contextmanager
def apart(module: str, *arguments: str, database: str = "") -> Iterator[subprocess.Popen[str]]:
    """`python -m MODULE ARGUMENTS` with an empty data folder; it is told to end by the end of its input."""
    with tempfile.TemporaryDirectory(prefix="bonsai-bench-") as folder:
        environment = {
            **os.environ,
            "BONSAI_HOME": folder,
            "DJANGO_SETTINGS_MODULE": "studio.settings",
            "DATABASE_URL": database,
        }
        environment.pop("BONSAI_ENGINE_SOCKET", None)
        command = [sys.executable, "-m", module, *arguments]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                assert process.stdin is not None
                process.stdin.close()
                process.wait(60)


class Helper:
    """A process that answers each JSON line with one."""

    def __init__(self, module: str, *words: str, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", module, *words]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args[2:]))} has ended; its error stands above.")  # type: ignore[index]
        return json.loads(line)

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def answer(process: subprocess.Popen[str]) -> Any:
    """The next line that the process writes, as JSON."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("The process that was to be measured ended without an answer; what it said stands above.")
    return json.loads(line)


def new_job(title: str) -> Any:
    """A job of the process's own installation, whose tables are made first."""
    import django

    django.setup()
    from django.contrib.auth import get_user_model
    from django.core.management import call_command

    from jobs.lifecycle import begin
    from jobs.models import Job

    call_command("migrate", verbosity=0, interactive=False)
    owner, _ = get_user_model().objects.get_or_create(username="bench", is_staff=True)
    recipe = {"version": 1, "name": title, "operation": "train", "task": "classify", "methods": [], "settings": {}}
    job = Job(id=uuid.uuid4(), owner=owner, name=title, request=recipe, recipe=recipe, fingerprint="f" * 64)
    begin(job, "bench")
    return job


def metric_row(step: int, loss: float) -> dict[str, float]:
    """A row as the loop writes it: twelve numbers with as many digits as real ones have."""
    return {
        "step": step,
        "samples": 8 * step,
        "tokens": 1024 * step,
        "epoch": round(step / 1500, 6),
        "loss": loss,
        "grad_norm": 1.0 + loss / 3,
        "weight": 8.0,
        "learning_rate": 2e-4 / (1 + step * 1e-6),
        "grad_clipped": loss / 7,
        "seconds": round(step * 0.0213, 4),
        "tokens_per_second": 48123.4,
        "memory": 612_345_678,
    }


def bytes_of(folder: Path) -> int:
    """What a folder holds."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def seconds_of(action: Any) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - processor
