"""Ten thousand metric events a second from several runs at once, for half a minute: how far what takes them in lags behind, and whether it grows."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bench.pages import Goal, Section, Study
from jobs.bench.apart import answer, apart
from jobs.bench.events_side import MOMENTS
from jobs.bench.postgres import private_server, version
from jobs.bench.quantiles import quantile
from jobs.parts import ROOT

RATE, SECONDS, JOBS = 10_000, 30.0, 4
WINDOW = 5.0  # seconds; lag is told for each of these
BUSY = "one Python process reads the lines of all runs, and of two cores the writer takes nearly half of one (the load average stands in the page)."
SIDE = "jobs.bench.events_side"


@dataclass(frozen=True, kw_only=True)
class Lags:
    """When each event was written, and how long after that a reader had it."""

    name: str
    written: list[float]
    lags: list[float]
    made: int  # in the time
    processor: str
    last: float  # seconds from the last event written to all of them taken in

    def window(self, number: int) -> list[float]:
        """The lags of the events of one window."""
        start = self.written[0] + number * WINDOW
        return [lag for moment, lag in zip(self.written, self.lags, strict=True) if start <= moment < start + WINDOW]

    @property
    def windows(self) -> list[list[float]]:
        return [found for number in range(int(SECONDS / WINDOW)) if (found := self.window(number))]


def measure() -> list[Section]:
    """SQLite, PostgreSQL and SummaryWriter, one after the other at the same pace."""
    found = [_ours("SQLite", "")]
    with private_server() as address:
        if address:
            found.append(_ours(version(), address))
    remarks = [] if len(found) > 1 else ["PostgreSQL: not measured, its programs are not installed on this machine."]
    if importlib.util.find_spec("tensorboardX") is None:
        remarks.append("SummaryWriter: not measured, tensorboardX is not installed.")
    else:
        found.append(_summary_writer())
    rows, more = _mlflow()
    return [_table(found, [*remarks, *more]), _over_time(found), *rows]


def _ours(name: str, database: str) -> Lags:
    with apart(SIDE, "read", str(JOBS), database=database) as reader:
        folders = [Path(folder) for folder in answer(reader)]
        writer = _written("write", folders)
        over = time.time()
        assert reader.stdin is not None
        reader.stdin.write("over\n")
        reader.stdin.flush()
        told = answer(reader)
        moments = [array("d", (folder / MOMENTS).read_bytes()) for folder in folders]
    if told["jobs_that_differ"] or told["num"] != writer["num"]:
        raise RuntimeError(f"{name}: {writer['num'] - told['num']} events were lost or came in a wrong order.")
    pairs = []
    for job, looks in zip(moments, told["looks"], strict=True):
        reached = [log_seq for _, log_seq in looks]
        pairs += [(moment, looks[bisect_left(reached, seq)][0] - moment) for seq, moment in enumerate(job, 1)]
    pairs.sort()
    end = max(
        looks[bisect_left([seq for _, seq in looks], len(job))][0]
        for job, looks in zip(moments, told["looks"], strict=True)
    )
    return Lags(
        name=name, written=[one for one, _ in pairs], lags=[lag for _, lag in pairs], made=writer["num"],
        processor=f"{writer['processor'] / writer['seconds']:.2f} + {told['processor'] / writer['seconds']:.2f}",
        last=max(0.0, end - min(over, pairs[-1][0])),
    )  # fmt: skip


def _summary_writer() -> Lags:
    """What a reader of the files sees, which looks a hundred times a second."""
    with tempfile.TemporaryDirectory(prefix="bonsai-bench-") as name:
        folders = [Path(name) / str(number) for number in range(JOBS)]
        process = _start("scalars", folders)
        written: list[float] = []
        lags: list[float] = []
        seen: dict[Path, int] = {}
        while True:
            ended = process.poll() is not None
            for path in Path(name).glob("*/*tfevents*"):
                moments, seen[path] = _new_records(path, seen.get(path, 0))
                now = time.time()
                written += moments
                lags += [now - moment for moment in moments]
            if ended:
                break
            time.sleep(0.01)
        told = json.loads(process.communicate()[0])
    pairs = sorted(zip(written, lags, strict=True))
    return Lags(
        name="tensorboardX's SummaryWriter, not durable",
        written=[one for one, _ in pairs],
        lags=[lag for _, lag in pairs],
        made=told["num"],
        processor=f"{told['processor'] / told['seconds']:.2f}",
        last=pairs[-1][1],
    )


def _new_records(path: Path, start: int) -> tuple[list[float], int]:
    """The moments of the scalars behind byte `start`, and where the next record begins."""
    with path.open("rb") as file:
        file.seek(start)
        raw = file.read()
    moments, place = [], 0
    while place + 12 <= len(raw):
        (length,) = struct.unpack_from("<Q", raw, place)
        if place + 16 + length > len(raw):
            break
        if start + place:  # the first record names the version
            moments.append(struct.unpack_from("<d", raw, place + 13)[0])
        place += 16 + length
    return moments, start + place


def _mlflow() -> tuple[list[Section], list[str]]:
    """How many numbers a second MLflow's stores take, one call each; nothing where it is not installed."""
    if importlib.util.find_spec("mlflow") is None:
        return [], ["MLflow's file store and SQLite store: not measured, MLflow is not installed on this machine."]
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions refuse it otherwise
    client_of = importlib.import_module("mlflow.tracking").MlflowClient
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory(prefix="bonsai-bench-") as name:
        for title, place in (("file store", f"file://{name}/files"), ("SQLite store", f"sqlite:///{name}/store.db")):
            client: Any = client_of(tracking_uri=place)
            run = client.create_run(client.create_experiment("events")).info.run_id
            start, step = time.perf_counter(), 0
            while time.perf_counter() - start < WINDOW:
                step += 1
                client.log_metric(run, "loss", 1.0 / step, step=step)
            rows.append((title, f"{step / (time.perf_counter() - start):,.0f}"))
    release = importlib.import_module("mlflow").__version__
    intro = (
        f"MLflow {release}: `MlflowClient.log_metric` of one number, as fast as it goes for {WINDOW:g} s, one caller."
    )
    return [Section(title="MLflow", intro=intro, columns=("store", "numbers a second"), rows=rows)], []


def _start(role: str, folders: Sequence[Path]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", SIDE, role, str(RATE), str(SECONDS), *map(str, folders)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _written(role: str, folders: Sequence[Path]) -> dict[str, Any]:
    output, _ = _start(role, folders).communicate()
    told: dict[str, Any] = json.loads(output)
    return told


def _table(found: Sequence[Lags], remarks: list[str]) -> Section:
    sqlite = found[0]
    tails = [quantile(window, 0.99) for window in sqlite.windows]
    middles = [statistics.median(window) for window in sqlite.windows]
    third = max(1, len(middles) // 3)
    growth = statistics.median(middles[-third:]) / statistics.median(middles[:third])
    wanted = int(RATE * SECONDS)
    lag = 1e3 * quantile(sqlite.lags, 0.99)
    what = f"{RATE:,} metric events a second over {JOBS} runs for {SECONDS:g} s, SQLite"
    return Section(
        title="Lag",
        intro=f"{JOBS} runs in one process write {RATE:,} events a second together for {SECONDS:g} s, {wanted:,} in all, one line of twelve numbers for each step. "
        "A second process takes them in as the supervisor does: one thread a run, its pauses, its chart columns, its leases; a batch counts when it is durable. "
        "Lag is the time from the writing of an event to the commit that holds it, for every single event. SummaryWriter writes one number an event at the same "
        "pace; its lag ends when a reader of the file sees the record. Afterwards every step is read back and counted.",
        columns=("what", "written in the time", "lag p50, ms", "p99, ms", "worst, ms", "all taken in after the last, ms", "processors: writer + reader"),
        rows=[
            (
                one.name,
                f"{one.made:,} of {wanted:,}",
                f"{1e3 * statistics.median(one.lags):.0f}",
                f"{1e3 * quantile(one.lags, 0.99):.0f}",
                f"{1e3 * max(one.lags):.0f}",
                f"{1e3 * one.last:.0f}",
                one.processor,
            )
            for one in found
        ],
        remarks=["None of our events was lost or came twice.", *remarks],
        goals=[
            Goal(number="P5", goal=f"{what}: lag of 99 of 100", value=lag, interval=(1e3 * min(tails), 1e3 * max(tails)), target=500, unit="ms", reason=BUSY,
                 baseline=f"interval: least and greatest of {len(tails)} windows of {WINDOW:g} s; {sqlite.made:,} of {wanted:,} events were written in the time"),
            Goal(number="P5", goal=f"{what}: lag in the last third, as a multiple of that in the first", value=growth, target=1.5, reason=BUSY,
                 baseline="medians of the windows' medians"),
        ],
    )  # fmt: skip


def _over_time(found: Sequence[Lags]) -> Section:
    ends = [f"{number * WINDOW:g}–{(number + 1) * WINDOW:g} s" for number in range(int(SECONDS / WINDOW))]
    rows: list[tuple[str, ...]] = []
    for one in found:
        told = [one.window(number) for number in range(len(ends))]
        cells = [
            f"{1e3 * statistics.median(lags):.0f} / {1e3 * quantile(lags, 0.99):.0f}" if lags else "none"
            for lags in told
        ]
        rows.append((one.name, *cells))
    return Section(
        title="Over time",
        intro=f"Lag p50 / p99 in ms, by the moment of writing, in windows of {WINDOW:g} s.",
        columns=("what", *ends),
        rows=rows,
    )


STUDY = Study(name="events", page="events.md", minutes=2.5, quick=False, seed=0, run=measure)
