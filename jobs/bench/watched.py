"""What a training notices of those who watch it: steps of one running job with nobody and with ten viewers, in turns."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from engine.bench.measure import ratio_interval
from engine.bench.pages import Goal, Section, Study
from jobs.bench.apart import Helper
from jobs.bench.installation import STARTER_JOB, Installation

NUM_VIEWERS, NUM_TURNS, TURN_SECONDS = 10, 30, 3.0
SETTLE_SECONDS = 0.3  # from coming in or leaving until a turn begins
TRAINING = {
    "name": "watched",
    **STARTER_JOB,
    "settings": {**STARTER_JOB["settings"], "epochs": 1000, "max_steps": 20000, "seed": 0},
}


@dataclass(frozen=True)
class Turn:
    """Seconds of a step, by the clock (the median) and on the processor (the mean), while so many watched."""

    wall: float
    processor: float


class WatchedRun:
    """A run in a studio of its own, on a core of its own where there are several, and a crowd that comes and goes. A context manager."""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.studio = stack.enter_context(Installation(OMP_NUM_THREADS="1"))
            self.crowd = Helper("jobs.bench.crowd", environment=dict(os.environ))
            stack.callback(self.crowd.stop)
            self.job = self.studio.start_job(TRAINING)
            self.child = _trainer(self.studio, self.job)
            _keep_apart(self.child, [self.studio.process.pid, self.crowd.process.pid])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def turn(self, num: int, seconds: float) -> Turn:
        """Let `num` viewers come, look at the steps for so long, and let them go."""
        if num:
            cookie = "; ".join(f"{item.name}={item.value}" for item in self.studio.session.cookies)
            url = f"ws://{self.studio.address[7:]}/ws/jobs/{self.job}/?after={_last(self.studio, self.job)}"
            self.crowd.ask(do="open", group="viewers", url=url, cookies=[cookie], num=num)
            self.crowd.ask(do="take")
        time.sleep(SETTLE_SECONDS)
        began, spent = time.time(), _on_processor(self.child)
        time.sleep(seconds)
        ended, spent = time.time(), _on_processor(self.child) - spent
        if num:
            heard = self.crowd.ask(do="take")
            if heard["num_frames"] < num or heard["gaps"] or heard["closed"]:
                raise RuntimeError(f"{num} viewers watched a run for {seconds} seconds and heard {heard}.")
            self.crowd.ask(do="close", group="viewers")
        steps = [at for at in self._told_until(ended) if began <= at <= ended]
        if len(steps) < 2:
            raise RuntimeError(
                f"The run took {len(steps)} steps in {seconds} seconds: too busy a machine to measure on."
            )
        return Turn(statistics.median(b - a for a, b in itertools.pairwise(steps)), spent / len(steps))

    def _told_until(self, moment: float) -> list[float]:
        """When steps ended, as soon as one is told of that came after `moment`."""
        for _ in range(300):
            steps = _step_times(self.studio, self.job)
            if steps[-1] > moment:
                return steps
            time.sleep(0.1)
        raise RuntimeError("The run takes no steps any more.")


def row(num: int, turns: Sequence[Turn]) -> tuple[str, ...]:
    """A line of a table: viewers, a step, its processor time."""
    middle = (statistics.median(values) * 1e3 for values in ([t.wall for t in turns], [t.processor for t in turns]))
    return (f"{num:,}", *(f"{value:.2f} ms" for value in middle))


def _trainer(studio: Installation, job: str) -> psutil.Process:
    """The process that writes the log of the job, once it has taken some steps."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if len(_step_times(studio, job)) >= 20:
            for process in psutil.Process(studio.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any(
                        file.path.endswith("events.jsonl") and file.mode.startswith("a")
                        for file in process.open_files()
                    ):
                        return process
        time.sleep(0.2)
    raise RuntimeError(f"The run took no steps: {studio.get(f'jobs/{job}')}")


def _keep_apart(trainer: psutil.Process, others: Sequence[int]) -> None:
    """Give the training one core and all others the rest, where there are several."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return
    for pid in others:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cores[1:])
    for thread in trainer.threads():
        os.sched_setaffinity(thread.id, cores[:1])


def _on_processor(process: psutil.Process) -> float:
    """Seconds that all threads of a process have run, to the nanosecond (Documentation/scheduler/sched-stats)."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _step_times(studio: Installation, job: str) -> list[float]:
    """When each of the last steps ended: an event is written with its last row, and rows carry their seconds."""
    return list(_ends(studio.get(f"jobs/{job}/events?after={max(0, _last(studio, job) - 200)}&limit=1000")["events"]))


def _last(studio: Installation, job: str) -> int:
    return int(studio.get(f"jobs/{job}/events?after=0&limit=1")["last_seq"])


def _ends(events: Sequence[dict[str, Any]]) -> Iterator[float]:
    for event in events:
        if event["kind"] == "metric":
            rows = event["data"]["rows"]
            yield from (event["time"] - rows[-1]["seconds"] + row["seconds"] for row in rows)


def ten() -> Section:
    """Each turn with viewers beside the mean of the turns before and after it, which nobody watched; and those two beside each other."""
    alone: list[Turn] = []
    watched: list[Turn] = []
    with WatchedRun() as run:
        alone.append(run.turn(0, TURN_SECONDS))
        for _ in range(NUM_TURNS):
            watched.append(run.turn(NUM_VIEWERS, TURN_SECONDS))
            alone.append(run.turn(0, TURN_SECONDS))
    goals, remarks = [], []
    for name, what in (("wall", "wall time"), ("processor", "processor time")):
        none, some = ([getattr(turn, name) for turn in turns] for turns in (alone, watched))
        around = [statistics.mean(pair) for pair in itertools.pairwise(none)]
        value, *interval = ratio_interval(some, around)
        same, *noise = ratio_interval(none[1:], none[:-1])
        inside = "holds" if interval[0] <= 1 <= interval[1] else "does not hold"
        remarks.append(
            f"{what.capitalize()}: {value:.3f} times that of the turns around it, 95 % interval {interval[0]:.3f} – {interval[1]:.3f}, which "
            f"{inside} 1. Two turns that nobody watched, one after the other: {same:.3f}, {noise[0]:.3f} – {noise[1]:.3f}."
        )
        goals.append(
            Goal(goal=f"Training step with {NUM_VIEWERS} viewers, {what}", value=value, interval=(interval[0], interval[1]),
                 baseline="the same run without viewers, in the turns before and after")
        )  # fmt: skip
    return Section(
        title="Ten viewers",
        intro=f"One run (MiniLM-L6, PaCA, one thread) in a studio started by `manage.py up`; nobody and {NUM_VIEWERS} viewers, each with a socket, watch it "
        f"in turns of {TURN_SECONDS:g} seconds, {NUM_TURNS} with viewers. The training has a core of its own; web process and viewers have the others.",
        columns=("viewers", "a step", "processor time of a step"),
        rows=[row(0, alone), row(NUM_VIEWERS, watched)],
        remarks=remarks,
        goals=goals,
    )


STUDY = Study(name="watched", page="watched.md", minutes=4, quick=False, seed=0, run=lambda: [ten()])
