"""A thousand live viewers on one web process: how late an event reaches them, how many messages a second leave, and what the training notices."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import requests

from engine.bench.measure import ROOT, ratio_interval
from engine.bench.pages import Goal, Section, Study
from jobs import parts
from jobs.bench.apart import Helper
from jobs.bench.installation import free_port
from jobs.bench.watched import Turn, WatchedRun, row

NUM_VIEWERS, NUM_SLOW, ROUNDS = 1000, 500, 5
APPLICATION = "jobs.bench.fanout_server:application"
GROUP_FRAMES, PUMP_FRAMES = 3, 20  # to each viewer in a burst: both ways get about as much time
WATCH_SECONDS = 3.0

WIDE = (
    "the medians show no slowdown; the interval of a few turns of three seconds is wider than the one percent that is asked "
    "for"
)


class Stage:
    """A web process as `manage.py up` starts it, a run whose log grows on demand, and a crowd that watches."""

    def __init__(self, home: Path, *, num_sessions: int, application: str = "studio.asgi:application") -> None:
        environment = {
            **os.environ,
            "BONSAI_HOME": str(home),
            "DJANGO_SETTINGS_MODULE": "studio.settings",
            "PYTHONPATH": str(ROOT),
        }
        self.writer = Helper("jobs.bench.writer", str(num_sessions), environment=environment)
        made = self.writer.hear()
        self.job, self.silent, self.cookies = made["job"], made["silent"], made["cookies"]
        self.last = 1  # the number of the newest event of the run
        self.place = f"127.0.0.1:{free_port()}"
        command = parts.web_command(*self.place.split(":"))
        command[command.index("studio.asgi:application")] = application
        self.log = home / "web.log"
        with self.log.open("wb") as output:
            self.web = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        self.crowd = Helper("jobs.bench.crowd", environment=environment)
        until = time.monotonic() + 60
        while self.web.poll() is None and time.monotonic() < until:
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"http://{self.place}/api/v1/health", timeout=5)
                return
            time.sleep(0.1)
        self.stop()
        raise RuntimeError(f"The web process did not start: {self.log.read_text()[-2000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self.crowd.stop()
        self.writer.stop()
        self.web.send_signal(signal.SIGTERM)
        self.web.wait(30)

    def address(self, job: str) -> str:
        return f"ws://{self.place}/ws/jobs/{job}/?after=0"

    def open(self, group: str, url: str, num: int, *, reads: bool = True) -> float:
        """Let viewers come in; returns how many came in a second."""
        took = self.crowd.ask(do="open", group=group, url=url, cookies=self.cookies, num=num, reads=reads)
        time.sleep(0.3)
        self.crowd.ask(do="take")
        return float(num / took["seconds"])

    def events(self, *, rate: float, num: int, viewers: int, num_rows: int = 1) -> dict[str, Any]:
        """Write events at a rate; returns what the crowd heard, with the processor seconds of the web process beside it."""
        before = self.processor_seconds()
        self.writer.ask(rate=rate, num=num, num_rows=num_rows)
        self.last += num
        time.sleep(0.4)
        heard = dict(self.crowd.ask(do="take"))
        if heard["num_events"] != num * viewers:
            raise RuntimeError(
                f"{num * viewers:,} events were due and {heard['num_events']:,} came, with {heard['gaps']} gaps: {heard}"
            )
        return {**heard, "web": self.processor_seconds() - before}

    def burst(self, way: str, num: int, *, viewers: int) -> tuple[float, float]:
        """Messages a second of a burst, from its beginning to the last arrival, and the web process' processor seconds for one."""
        before = self.processor_seconds()
        answer = requests.get(
            f"http://{self.place}/burst", params={"way": way, "num": num, "job": self.silent}, timeout=120
        )
        self.crowd.ask(do="wait", num_frames=num * viewers, seconds=60)
        heard = self.crowd.ask(do="take")
        if heard["num_frames"] != num * viewers or heard["gaps"]:
            raise RuntimeError(f"{num * viewers:,} messages were due and {heard['num_frames']:,} came: {heard}")
        frames = heard["num_frames"]
        return frames / (heard["last"] - answer.json()["began"]), (self.processor_seconds() - before) / frames

    def processor_seconds(self) -> float:
        times = psutil.Process(self.web.pid).cpu_times()
        return float(times.user + times.system)

    def memory(self) -> int:
        return int(psutil.Process(self.web.pid).memory_info().rss)


def median_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median over rounds and its 95 % bootstrap interval."""
    middle, low, high = ratio_interval(values, [1.0] * len(values))
    return middle, (low, high)


def viewers() -> Section:
    """Latency at two events a second and in bursts, alone and beside clients that do not read."""
    calm, busy, crowded = [], [], []
    with tempfile.TemporaryDirectory(prefix="bonsai-fanout-") as home, Stage(Path(home), num_sessions=100) as stage:
        memory, before = stage.memory(), stage.processor_seconds()
        rate = stage.open("viewers", stage.address(stage.job), NUM_VIEWERS)
        connect = (stage.processor_seconds() - before) / NUM_VIEWERS
        memory = (stage.memory() - memory) // NUM_VIEWERS
        for _ in range(ROUNDS):
            calm.append(stage.events(rate=2, num=6, viewers=NUM_VIEWERS))
            busy.append(stage.events(rate=200, num=200, viewers=NUM_VIEWERS))
            stage.open("slow", stage.address(stage.job), NUM_SLOW, reads=False)
            crowded.append(stage.events(rate=200, num=200, viewers=NUM_VIEWERS))
            stage.crowd.ask(do="close", group="slow")
        told = calm + busy + crowded
    lost = sum(round_["gaps"] + round_["resyncs"] + sum(round_["closed"].values()) for round_ in told)
    per_second = max(one["num_frames"] / NUM_VIEWERS / (one["last"] - one["first"]) for one in busy)
    late, beside = [one["p99"] * 1e3 for one in calm], [one["p99"] * 1e3 for one in busy]
    slow_ratio = ratio_interval([one["p95"] for one in crowded], [one["p95"] for one in busy])
    rows: list[tuple[str, ...]] = [
        (name, *(f"{statistics.median(one[p] for one in rounds) * 1e3:.0f} ms" for p in ("p50", "p95", "p99")),
         f"{statistics.median(one['web'] / one['num_frames'] for one in rounds) * 1e6:.1f} µs")
        for name, rounds in (("2 events/s", calm), ("200 events/s", busy), (f"200 events/s, {NUM_SLOW} others do not read", crowded))
    ]  # fmt: skip
    middle, interval = median_interval(late)
    busy_middle, busy_interval = median_interval(beside)
    what = f"{NUM_VIEWERS:,} viewers on one web process"
    return Section(
        title="A thousand viewers",
        intro="Each event goes the whole way: the engine's log, ingest, database, bell, pump, socket. Writer, web process and crowd share the cores. "
        f"Late is the time from writing an event to reading the frame that holds it, over all viewers and events; medians of {ROUNDS} rounds.",
        columns=("events", "p50", "p95", "p99", "web process, a frame"),
        rows=rows,
        remarks=[
            f"Coming in: {rate:.0f} viewers a second, {connect * 1e3:.1f} ms of the web process and {memory / 1e3:.0f} kB of memory each.",
            f"At most {per_second:.1f} frames a second reached a viewer.",
        ],
        goals=[
            Goal(number="P6", goal=f"{what}: event written to frame read, p99 at 2 events/s", value=middle, interval=interval, target=150, unit="ms",
                 baseline="none; the bound is the goal"),
            Goal(number="P6", goal=f"{what}: event written to frame read, p99 at 200 events/s", value=busy_middle, interval=busy_interval, target=150,
                 unit="ms", baseline="none; frames are 100 ms apart, so an event waits up to that long"),
            Goal(number="P6", goal=f"{what}: gaps, resyncs and closed sockets", value=lost, target=0, unit="times", baseline="numbers without a hole"),
            Goal(number="P6", goal=f"{NUM_SLOW} clients that do not read: p95 of the {NUM_VIEWERS:,} others", value=slow_ratio[0],
                 interval=slow_ratio[1:], target=2.0, baseline="the same events without them"),
        ],
    )  # fmt: skip


def messages() -> Section:
    """Messages a second beside group_send of channels, in the same process."""
    found: dict[str, list[tuple[float, float]]] = {"pump": [], "group": []}
    with (
        tempfile.TemporaryDirectory(prefix="bonsai-fanout-") as home,
        Stage(Path(home), num_sessions=100, application=APPLICATION) as stage,
    ):
        stage.open("viewers", stage.address(stage.silent), NUM_VIEWERS)
        stage.open("group", f"ws://{stage.place}/ws/group/", NUM_VIEWERS)
        for _ in range(ROUNDS):
            found["pump"].append(stage.burst("pump", PUMP_FRAMES, viewers=NUM_VIEWERS))
            found["group"].append(stage.burst("group", GROUP_FRAMES, viewers=NUM_VIEWERS))
    rate = ratio_interval([one[0] for one in found["pump"]], [one[0] for one in found["group"]])
    work = ratio_interval([one[1] for one in found["group"]], [one[1] for one in found["pump"]])
    rows: list[tuple[str, ...]] = [
        (
            name,
            f"{statistics.median(one[0] for one in found[way]):,.0f}",
            f"{statistics.median(one[1] for one in found[way]) * 1e6:.1f} µs",
        )
        for name, way in (("the studio's pump", "pump"), ("group_send, in-memory layer of channels", "group"))
    ]
    return Section(
        title="Messages a second",
        intro=f"{NUM_VIEWERS:,} viewers of each kind are connected to one process, and the same texts are sent to one kind after the other, as fast as it "
        f"can: {PUMP_FRAMES} or {GROUP_FRAMES} to each viewer. No compression for either.",
        columns=("way", "messages a second", "web process, a message"),
        rows=rows,
        goals=[
            Goal(number="P6", goal=f"Messages a second to {NUM_VIEWERS:,} viewers", value=rate[0], interval=rate[1:], target=10, better="more",
                 baseline="group_send of channels in the same process"),
            Goal(goal="Work of the web process for a message", value=work[0], interval=work[1:], better="more",
                 baseline="pump; value: group_send takes so many times its processor time"),
        ],
    )  # fmt: skip


def training() -> Section:
    """Steps of a real run with nobody and with a thousand viewers, in turns."""
    turns: dict[int, list[Turn]] = {0: [], NUM_VIEWERS: []}
    with WatchedRun() as watched:
        for _ in range(ROUNDS):
            for num, found in turns.items():
                found.append(watched.turn(num, WATCH_SECONDS))
    wall = ratio_interval([turn.wall for turn in turns[NUM_VIEWERS]], [turn.wall for turn in turns[0]])
    processor = ratio_interval([turn.processor for turn in turns[NUM_VIEWERS]], [turn.processor for turn in turns[0]])
    return Section(
        title="What the training notices",
        intro="One run (MiniLM-L6, PaCA, one thread) in a studio started by `manage.py up`; nobody and a thousand viewers watch it in turns, "
        f"{WATCH_SECONDS:g} seconds each, {ROUNDS} times. The training has a core of its own; web process and crowd have the others. "
        "[Ten viewers](watched.md) are measured more closely.",
        columns=("viewers", "a step", "processor time of a step"),
        rows=[row(num, found) for num, found in turns.items()],
        goals=[
            Goal(number="P6", goal=f"Training step with {NUM_VIEWERS:,} viewers, processor time", value=processor[0], interval=processor[1:], target=1.01,
                 baseline="the same run without viewers, in turns", reason=WIDE),
            Goal(number="P6", goal=f"Training step with {NUM_VIEWERS:,} viewers, wall time", value=wall[0], interval=wall[1:], target=1.01,
                 baseline="the same run without viewers, in turns", reason=WIDE),
        ],
    )  # fmt: skip


def run() -> list[Section]:
    """All three parts."""
    return [viewers(), messages(), training()]


STUDY = Study(name="fanout", page="fanout.md", minutes=1.7, quick=True, seed=0, run=run)
