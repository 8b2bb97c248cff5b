"""A thousand forks of the resident service: none may hang, get lost or stay behind as a zombie.

The children do what children do: they read Parquet with arrow, tokenise, run a tiny model, train it for a step, export it and have it certified.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.bench.measure import ROOT
from engine.bench.pages import Goal, Section, Study
from engine.client import Engine
from engine.starters.corpus import stories

FORKS = 1000
CALL_SECONDS, JOB_SECONDS = 60.0, 120.0
EVERY_JOB = 10  # one fork of so many is a whole job


@dataclass
class Soak:
    """What became of the forks."""

    num_calls: int = 0
    num_jobs: int = 0
    faults: list[str] = field(default_factory=list)
    zombies: int = 0
    open_files: tuple[int, int] = (0, 0)  # of the service, before and after
    seconds: float = 0.0


class Yard:
    """A folder with a tiny model, Parquet data, a finished result and a running service."""

    def __init__(self, folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        from engine.bench.workbench import random_llama

        self.folder = folder
        model = random_llama(folder, hidden=32, layers=2, ffn=64, heads=4, vocab=400, positions=128)
        texts = [text[:160] for text in stories(5, 40)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "stories.parquet")
        self.recipe: dict[str, Any] = {
            "task": "causal_lm",
            "model": {"source": f"folder:{model}"},
            "data": {"source": f"file:{folder / 'stories.parquet'}"},
            "methods": [{"slug": "lora", "params": {}}],
            "settings": {"max_steps": 1, "batch_size": 4, "max_length": 32, "evaluations": 1},
        }
        self.socket = folder / "engine.sock"
        command = [sys.executable, "-m", "engine", "serve", "--socket", str(self.socket)]
        self.service = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "BONSAI_THREADS": "1"})
        self.client = Engine(self.socket, timeout=CALL_SECONDS)
        until = time.monotonic() + 120
        while not self.client.alive():
            if self.service.poll() is not None or time.monotonic() > until:
                raise RuntimeError("The engine service did not start.")
            time.sleep(0.1)

    def job(self, name: str, **request: Any) -> dict[str, Any]:
        """Run a job in a child of the service; returns what it left in result.json and exit.json, and its pid."""
        folder = self.folder / name
        folder.mkdir()
        checked = self.client.call("check", recipe=self.recipe)
        (folder / "recipe.json").write_text(json.dumps(checked["recipe"]), encoding="utf-8")
        answer = self.client.call("launch", folder=str(folder), **request)
        until = time.monotonic() + JOB_SECONDS
        while not (folder / "exit.json").exists():
            if time.monotonic() > until:
                raise TimeoutError(f"The job {name} did not end.")
            time.sleep(0.02)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return {**result, "exit": json.loads((folder / "exit.json").read_text(encoding="utf-8")), "pid": answer["pid"]}

    def soak(self, count: int) -> Soak:
        """Fork so many children, one after the other but for the jobs' own certificates."""
        found, begun = Soak(), time.perf_counter()
        artifact = self.folder / "first" / "artifact"
        if not artifact.exists():
            self.job("first")
        before = self._open_files()
        for number in range(count):
            try:
                if number % EVERY_JOB == 0:
                    found.num_jobs += 1
                    ended = self.job(f"job-{number}")
                    if ended["outcome"] != "succeeded" or ended["exit"] != {
                        "pid": ended["pid"],
                        "code": 0,
                        "signal": 0,
                    }:
                        found.faults.append(f"Job {number} ended with {ended}.")
                elif number % 2:
                    found.num_calls += 1
                    if self.client.call("check", recipe=self.recipe)["faults"]:
                        found.faults.append(f"Check {number} found faults.")
                else:
                    found.num_calls += 1
                    said = self.client.call(
                        "predict", artifact=str(artifact), inputs=["Once"], options={"max_tokens": 2}
                    )
                    if len(said["answers"]) != 1:
                        found.faults.append(f"Prediction {number} answered {said}.")
            except (TimeoutError, OSError, ValueError, RuntimeError) as error:
                found.faults.append(f"Fork {number}: {error!r}")
        time.sleep(0.5)  # the service looks for ended children five times a second
        found.zombies = len(self.zombies())
        found.open_files = (before, self._open_files())
        found.seconds = time.perf_counter() - begun
        return found

    def zombies(self) -> list[int]:
        """Children of the service that have ended and were not reaped."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if int(parent) == self.service.pid and state == "Z":
                found.append(int(path.parent.name))
        return found

    def _open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.service.pid}/fd"))

    def close(self) -> None:
        """End the service."""
        self.service.terminate()
        self.service.wait(30)


def measure() -> list[Section]:
    """The soak, in a folder that is deleted behind it."""
    with tempfile.TemporaryDirectory(prefix="bonsai-forks-") as name:
        yard = Yard(Path(name))
        try:
            found = yard.soak(FORKS)
        finally:
            yard.close()
    goal = Goal(
        number="P3",
        goal=f"{FORKS:,} forks of the engine service: hung, failed or left behind",
        value=float(len(found.faults) + found.zombies),
        target=0.0,
        unit="forks",
        baseline=f"{found.num_jobs} whole jobs, {found.num_calls:,} checks and predictions",
    )
    rows: list[tuple[str, ...]] = [
        ("checks and predictions", f"{found.num_calls:,}"),
        ("jobs: train, export, certify", f"{found.num_jobs:,}"),
        ("hung or failed", f"{len(found.faults)}"),
        ("zombies at the end", f"{found.zombies}"),
        ("open files of the service, before and after", f"{found.open_files[0]} and {found.open_files[1]}"),
        ("seconds", f"{found.seconds:,.0f}"),
    ]
    intro = "A service forks children one after the other. Every tenth trains a tiny model for a step; the others check a recipe over Parquet data or ask a result."
    return [
        Section(
            title="Forks", intro=intro, columns=("what", "value"), rows=rows, remarks=found.faults[:20], goals=[goal]
        )
    ]


STUDY = Study(name="forks", page="forks.md", minutes=8, quick=False, seed=0, run=measure)
