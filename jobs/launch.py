"""Starting a child, and finding one that is running already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.control import clear_requests, write_json
from engine.core.errors import EngineError
from jobs.catalogue import engine
from jobs.devices import gpu_index
from jobs.models import Job
from jobs.places import home
from jobs.processes import TRAINING, is_alive, lock_holder, process_start

ROOT = Path(__file__).resolve().parent.parent
RESULT, EXIT, LOCK = "result.json", "exit.json", "lock"


@dataclass(frozen=True)
class Child:
    """A running child. `process` is set when this very process started it, and then tells its exit status."""

    pid: int
    started: int
    process: subprocess.Popen[bytes] | None = None

    def is_alive(self) -> bool:
        if self.process is not None:
            return self.process.poll() is None
        return is_alive(self.pid, self.started)

    def exit_status(self, folder: Path, wait: float = 1.0) -> tuple[int, int] | None:
        """(code, signal) of a child that has ended, or None when nobody saw its end."""
        if self.process is not None and self.process.returncode is not None:
            code = self.process.returncode
            return max(code, 0), max(-code, 0)
        until = time.monotonic() + wait
        while True:  # the service reaps its children a moment after they end
            body = read_json(folder / EXIT)
            if body.get("pid") == self.pid:
                return int(body.get("code", 0)), int(body.get("signal", 0))
            if time.monotonic() >= until:
                return None
            time.sleep(0.05)


def find(job: Job, folder: Path, beside: int | None = None) -> Child | None:
    """The child that works in this folder: the one that was recorded, or the one that holds the folder's lock."""
    if beside is None and job.child_pid is not None and is_alive(job.child_pid, job.child_started):
        return Child(job.child_pid, int(job.child_started or 0))
    holder = lock_holder(folder / LOCK)
    started = process_start(holder) if holder is not None and holder != beside else None
    return Child(holder, started) if holder is not None and started is not None else None


def start(job: Job, folder: Path) -> Child:
    """Write what the child reads, and have the service start it: a fork on a processor, a process that has imported everything on a GPU.

    Where no service listens, the child is a fresh process of this one.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in (RESULT, EXIT):
        (folder / name).unlink(missing_ok=True)
    clear_requests(folder)
    write_json(folder / "recipe.json", job.recipe)
    write_json(folder / "attempt.json", {"attempt": job.attempt})
    gpu = gpu_index(job.device)
    service = engine(timeout=20.0)
    if service.alive():
        # It may die in this very moment, or answer too late and have launched after all. Then a process of our own is started
        # as well, and the folder's lock lets one of the two work; what is wrong with the folder, that one says.
        with suppress(EngineError, OSError, ValueError, subprocess.SubprocessError):
            answer = service.call("launch", folder=str(folder), gpu=gpu)
            return Child(int(answer["pid"]), int(answer["started"]))
    return _spawn(folder, gpu)


def has_begun(job: Job, folder: Path) -> bool:
    """Whether the child of this very attempt was started earlier, whatever became of it."""
    return job.child_pid is not None or (
        (folder / RESULT).exists() and read_json(folder / "attempt.json").get("attempt") == job.attempt
    )


def _spawn(folder: Path, gpu: str | None) -> Child:
    threads = os.environ.get("BONSAI_THREADS") or str(os.cpu_count() or 1)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        **TRAINING,
        "TOKENIZERS_PARALLELISM": "false",
        "BONSAI_HOME": str(home()),
        "CUDA_VISIBLE_DEVICES": gpu or "",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    environment.pop("BONSAI_SECRET_KEY", None)
    with (folder / "child.log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine", "run", str(folder)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return Child(process.pid, process_start(process.pid) or 0, process)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that a child left, or nothing."""
    with suppress(OSError, ValueError):
        body = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(body, dict):
            return body
    return {}
