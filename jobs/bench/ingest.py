"""From a run's log into the database: events a second, durable, with nothing lost; beside SummaryWriter, and with PostgreSQL where one answers."""

from __future__ import annotations

import statistics
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

from engine.bench.measure import ratio_interval
from engine.bench.pages import Goal, Section, Study
from jobs.bench.apart import answer, apart

NUM_EVENTS, ROUNDS, SERVER_ROUNDS = 160_000, 6, 3
SERVER = "postgresql://postgres@127.0.0.1:5432"


def measure() -> list[Section]:
    """The embedded database, then the server."""
    sections = [_section("SQLite", _turns("", ROUNDS), goals=True)]
    with _database() as address:
        if address:
            sections.append(_section("PostgreSQL", _turns(address, SERVER_ROUNDS), goals=False))
        else:
            sections[0].remarks.append("No PostgreSQL server answered on this machine, so it was not measured.")
    return sections


def _turns(database: str, rounds: int) -> list[dict[str, Any]]:
    with apart("jobs.bench.ingest_side", str(NUM_EVENTS), str(rounds), database=database) as process:
        turns: list[dict[str, Any]] = answer(process)
    return turns


@contextmanager
def _database() -> Iterator[str]:
    """A new database on the local server, deleted afterwards; empty where no server answers."""
    name = f"bonsai_bench_{uuid.uuid4().hex[:12]}"
    try:
        server = psycopg.connect(f"{SERVER}/postgres", autocommit=True, connect_timeout=3)
    except psycopg.OperationalError:
        yield ""
        return
    with server:
        server.execute(f'CREATE DATABASE "{name}"')  # a name of our own making
        try:
            yield f"{SERVER}/{name}"
        finally:
            server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def _section(title: str, turns: Sequence[dict[str, Any]], *, goals: bool) -> Section:
    lost = sum(turn["lost"] for turn in turns)
    if lost:
        raise RuntimeError(f"{lost} events of {title} were lost or came in a wrong order.")
    rate = [turn["num_backlog"] / turn["ingest"][0] for turn in turns]
    slowest = [max(turn["batches"]) for turn in turns]
    value, low, high = _median(rate)
    processor = [turn["num_backlog"] / turn["ingest"][1] for turn in turns]
    writing = [turn["num"] / turn["write"][0] for turn in turns]
    whole = [1 / (1 / one + 1 / other) for one, other in zip(writing, rate, strict=True)]
    rows: list[tuple[str, ...]] = [
        ("taken in and durable", _spoken(rate)),
        ("the same, a second of processor time", _spoken(processor)),
        ("written by the run, one line each", _spoken(writing)),
        ("written and taken in, one after the other in one process", _spoken(whole)),
    ]
    found = []
    usual = 1e3 * statistics.median(one for turn in turns for one in turn["batches"])
    if goals:
        wait, early, late = _median(slowest)
        found += [
            Goal(number="P5", goal="metric events taken from the log into the database, durable", value=value, interval=(low, high), target=200_000, better="more",
                 unit="events/s", baseline=f"events of 12 numbers, {turns[0]['bytes_a_line']:.0f} bytes each; none of {sum(turn['num'] for turn in turns):,} lost"),
            Goal(number="P5", goal="the slowest batch is on the disk after", value=1e3 * wait, interval=(1e3 * early, 1e3 * late), target=200, unit="ms",
                 baseline=f"batches of 10,000 events, each appended and taken in; the median of all takes {usual:.0f} ms"),
        ]  # fmt: skip
    beside = [turn["summary_writer"] for turn in turns if turn["summary_writer"]]
    if goals and beside:
        scalars = [1 / seconds for seconds in beside]
        rows.append(("scalars written by SummaryWriter, one number each", _spoken(scalars)))
        times, least, most = ratio_interval(rate, scalars)
        found.append(
            Goal(number="P5", goal="events taken in, as a multiple of the scalars that SummaryWriter writes", value=times, interval=(least, most), target=10.0,
                 better="more", baseline=f"tensorboardX, same process, turn by turn: {statistics.median(scalars):,.0f} scalars a second, not durable")
        )  # fmt: skip
    remarks = (
        []
        if beside or not goals
        else ["tensorboardX is not installed, so the comparison with SummaryWriter was left out."]
    )
    return Section(
        title=title,
        intro=f"{len(turns)} rounds of {turns[0]['num']:,} events, of which the last {turns[0]['num_backlog']:,} are a backlog, appended as a run does it. "
        "The reader syncs the log before it commits. Afterwards every step is read back from the database and counted.",
        columns=("what", "events a second: median, least – most"),
        rows=rows,
        remarks=remarks,
        goals=found,
    )


def _median(values: Sequence[float]) -> tuple[float, float, float]:
    return ratio_interval(values, [1.0] * len(values))


def _spoken(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f}, {min(values):,.0f} – {max(values):,.0f}"


STUDY = Study(name="ingest", page="ingest.md", minutes=1, quick=True, seed=0, run=measure)
