"""A thousand live viewers on one web process: how late an event reaches them, how many messages a second leave, and what the training notices."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import requests

from engine.bench.measure import ROOT, ratio_interval
from engine.bench.pages import Goal, Section, Study
from jobs import parts
from jobs.bench.installation import STARTER_JOB, Installation, free_port

NUM_VIEWERS, NUM_SLOW, ROUNDS = 1000, 500, 5
APPLICATION = "jobs.bench.fanout_server:application"
GROUP_FRAMES, PUMP_FRAMES = 3, 20  # to each viewer in a burst: both ways get about as much time
TRAINING = {
    "name": "watched",
    **STARTER_JOB,
    "settings": {**STARTER_JOB["settings"], "epochs": 1000, "max_steps": 20000, "seed": 0},
}
WATCH_SECONDS = 3.0

WIDE = (
    "the medians show no slowdown; the interval of a few turns of three seconds is wider than the one percent that is asked "
    "for"
)


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
    walls: dict[int, list[float]] = {0: [], NUM_VIEWERS: []}
    work: dict[int, list[float]] = {0: [], NUM_VIEWERS: []}
    with Installation(OMP_NUM_THREADS="1") as studio:
        crowd = Helper("jobs.bench.crowd", environment=dict(os.environ))
        try:
            job = studio.start_job(TRAINING)
            child = _trainer(studio, job)
            _keep_apart(child, [studio.process.pid, crowd.process.pid])
            cookie = "; ".join(f"{item.name}={item.value}" for item in studio.session.cookies)
            for _ in range(ROUNDS):
                for num in (0, NUM_VIEWERS):
                    if num:
                        crowd.ask(
                            do="open",
                            group="viewers",
                            url=f"ws://{studio.address[7:]}/ws/jobs/{job}/?after=0",
                            cookies=[cookie],
                            num=num,
                        )
                        crowd.ask(do="take")
                    began, spent = time.time(), _on_processor(child)
                    time.sleep(WATCH_SECONDS)
                    ended, spent = time.time(), _on_processor(child) - spent
                    if num:
                        heard = crowd.ask(do="take")
                        if heard["num_frames"] < num:
                            raise RuntimeError(
                                f"{num} viewers heard {heard['num_frames']} frames of a run in {WATCH_SECONDS} seconds."
                            )
                        crowd.ask(do="close", group="viewers")
                    time.sleep(0.5)
                    steps = [at for at in _step_times(studio, job) if began <= at <= ended]
                    walls[num].append(statistics.median(b - a for a, b in itertools.pairwise(steps)))
                    work[num].append(spent / len(steps))
        finally:
            crowd.stop()
    wall = ratio_interval(walls[NUM_VIEWERS], walls[0])
    processor = ratio_interval(work[NUM_VIEWERS], work[0])
    rows: list[tuple[str, ...]] = [
        (f"{num:,}", f"{statistics.median(walls[num]) * 1e3:.2f} ms", f"{statistics.median(work[num]) * 1e3:.2f} ms")
        for num in walls
    ]
    return Section(
        title="What the training notices",
        intro="One run (MiniLM-L6, PaCA, one thread) in a studio started by `manage.py up`; nobody and a thousand viewers watch it in turns, "
        f"{WATCH_SECONDS:g} seconds each, {ROUNDS} times. The training has a core of its own; web process and crowd have the others.",
        columns=("viewers", "a step", "processor time of a step"),
        rows=rows,
        goals=[
            Goal(number="P6", goal=f"Training step with {NUM_VIEWERS:,} viewers, processor time", value=processor[0], interval=processor[1:], target=1.01,
                 baseline="the same run without viewers, in turns", reason=WIDE),
            Goal(number="P6", goal=f"Training step with {NUM_VIEWERS:,} viewers, wall time", value=wall[0], interval=wall[1:], target=1.01,
                 baseline="the same run without viewers, in turns", reason=WIDE),
        ],
    )  # fmt: skip


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
    return list(_ends(studio.get(f"jobs/{job}/events?after={max(0, _last(studio, job) - 60)}&limit=1000")["events"]))


def _last(studio: Installation, job: str) -> int:
    return int(studio.get(f"jobs/{job}/events?after=0&limit=1")["last_seq"])


def _ends(events: Sequence[dict[str, Any]]) -> Iterator[float]:
    for event in events:
        if event["kind"] == "metric":
            rows = event["data"]["rows"]
            yield from (event["time"] - rows[-1]["seconds"] + row["seconds"] for row in rows)


def run() -> list[Section]:
    """All three parts."""
    return [viewers(), messages(), training()]


STUDY = Study(name="fanout", page="fanout.md", minutes=1.7, quick=True, seed=0, run=run)
