"""How soon a consumer begins with what was put into the queue after an idle time: the studio's consumer, and stock huey on the same SQLite.

Several pairs of consumers idle through the same gaps; then each pair gets a task, stock first and ours right behind it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from engine.bench.pages import Goal, Section, Study
from jobs.bench.quantiles import interval, quantile, ratio_of_medians
from jobs.parts import ROOT

PAIRS = 5
GAPS = {0.05: 8, 3.0: 4, 30.0: 2}  # seconds of idleness: rounds
KINDS = ("ours", "stock")


class _Side:
    """A consumer and a sender on one folder."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.consumer, self.sender = (self._start(f"{role}-{kind}", folder) for role in ("consume", "send"))
        self.ready()

    def _start(self, role: str, folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs.bench.queue_side", role, str(folder)]
        environment = {**os.environ, "BONSAI_HOME": str(folder), "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ready(self) -> None:
        """Wait until the sender can send, and until the consumer has begun with a first task."""
        _line(self.sender.stdout)
        self.finish(self.send())

    def send(self) -> tuple[str, float]:
        """Put a task into the queue; returns its mark and the moment before."""
        mark = str(uuid.uuid4())
        assert self.sender.stdin is not None
        self.sender.stdin.write(mark + "\n")
        self.sender.stdin.flush()
        return mark, float(_line(self.sender.stdout))

    def finish(self, sent: tuple[str, float]) -> float:
        """Seconds until the consumer began with a task."""
        mark, begun = sent
        while True:
            found, moment = _line(self.consumer.stdout).split()
            if found == mark:
                return float(moment) - begun

    def stop(self) -> None:
        for process in (self.consumer, self.sender):
            process.terminate()
        for process in (self.consumer, self.sender):
            process.wait(30)


def _line(stream: IO[str] | None) -> str:
    assert stream is not None
    line = stream.readline()
    if not line:
        raise RuntimeError("A process of the queue study has ended.")
    return line


def measure() -> list[Section]:
    """All gaps in all pairs."""
    return [_section(wake_ups(PAIRS, GAPS))]


def wake_ups(num_pairs: int, gaps: Mapping[float, int]) -> dict[float, dict[str, list[float]]]:
    """Seconds until the start by idle time and by kind of queue; `gaps` maps an idle time to its number of rounds."""
    with tempfile.TemporaryDirectory(prefix="bonsai-queue-") as name:
        folders = [Path(name) / str(place) for place in range(num_pairs)]
        folders[0].mkdir()
        environment = {**os.environ, "BONSAI_HOME": str(folders[0])}
        migrate = [sys.executable, "manage.py", "migrate", "--verbosity", "0"]
        subprocess.run(migrate, cwd=ROOT, check=True, env=environment)
        for folder in folders[1:]:
            shutil.copytree(folders[0], folder)
        sides: list[dict[str, _Side]] = []
        try:
            sides += [{kind: _Side(kind, folder) for kind in KINDS} for folder in folders]
            return {gap: _rounds(sides, gap, rounds) for gap, rounds in gaps.items()}
        finally:
            for pair in sides:
                for side in pair.values():
                    side.stop()


def _rounds(sides: list[dict[str, _Side]], gap: float, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        time.sleep(gap)
        stock = [pair["stock"].send() for pair in sides]
        for pair in sides:
            seconds["ours"].append(pair["ours"].finish(pair["ours"].send()))
        seconds["stock"] += [pair["stock"].finish(sent) for pair, sent in zip(sides, stock, strict=True)]
    return seconds


def _section(found: dict[float, dict[str, list[float]]]) -> Section:
    rows = [
        (
            f"{gap:g} s",
            kind,
            str(len(values)),
            *(f"{number * 1e3:,.1f}" for number in (statistics.median(values), quantile(values, 0.95), max(values))),
        )
        for gap, kinds in found.items()
        for kind, values in kinds.items()
    ]
    ours = [value for kinds in found.values() for value in kinds["ours"]]
    longest = found[max(found)]
    wait = [value * 1e3 for value in ours]
    goals = [
        Goal(
            number="P4",
            goal="queue to the start in the consumer after any idle time, without Redis, p95",
            value=quantile(wait, 0.95),
            interval=interval(lambda values: quantile(values, 0.95), wait),
            target=50.0,
            unit="ms",
            baseline=f"stock huey on SQLite after {max(found):g} s: {statistics.median(longest['stock']) * 1e3:,.0f} ms (median)",
        ),
        Goal(
            number="P4",
            goal=f"queue wake-up after {max(found):g} s of idleness: stock huey on SQLite takes this many times as long",
            value=ratio_of_medians(longest["stock"], longest["ours"]),
            interval=interval(ratio_of_medians, longest["stock"], longest["ours"]),
            target=50.0,
            better="more",
            baseline="huey.SqliteHuey and huey's consumer with default settings",
        ),
    ]
    return Section(
        title="Wake-up",
        intro=f"{PAIRS} pairs of consumers on SQLite files of their own. From the moment before a task is put into the queue to huey's signal that it begins; "
        "ours carries a job's id as the studio sends it.",
        columns=("idle before", "queue", "tasks", "median, ms", "p95, ms", "worst, ms"),
        rows=rows,
        goals=goals,
    )


STUDY = Study(name="queue", page="queue.md", minutes=2, quick=True, seed=0, run=measure)
