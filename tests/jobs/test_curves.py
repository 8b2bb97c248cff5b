"""The columns beside a log: what they hold is what the log says, however they came about."""

from __future__ import annotations

import json
import math
import threading
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.events import EventLog, read_events
from jobs import curves
from jobs.curves import FIELDS, Curves
from tests.jobs.logs import metric_row


def write(folder: Path, first: int, last: int, *, per_event: int = 3) -> None:
    """Steps first … last, an evaluation every five and a signal at ten."""
    folder.mkdir(parents=True, exist_ok=True)
    log = EventLog(folder, interval=1e9)
    for step in range(first, last + 1):
        log.metric(metric_row(step, loss=math.nan if step % 7 == 0 else 1 / step))
        if step % per_event == 0:
            log.flush()
        if step % 5 == 0:
            log.emit("evaluation", {"eval_loss": 1 / step, "samples": 8 * step}, step=step)
        if step == 10:
            log.emit("signal", {"action": "note", "rule": "r", "message": "m", "numbers": {}}, step=step, key="r")
    log.close()


def size(folder: Path) -> int:
    return (folder / "events.jsonl").stat().st_size


def said(folder: Path) -> tuple[list[list[float | None]], list[dict[str, Any]]]:
    """Rows and evaluations, read from the log in the plainest way."""
    events = [event for event, _ in read_events(folder / "events.jsonl")]
    rows = [row for event in events if event.kind == "metric" for row in event.data["rows"]]
    return [[row.get(name) for name in FIELDS] for row in rows], [
        {"step": event.step, **event.data} for event in events if event.kind == "evaluation"
    ]


def held(columns: Curves) -> tuple[list[list[float | None]], list[dict[str, Any]]]:
    rows = zip(*columns.read(0, columns.head.rows).values(), strict=True)
    return [[None if math.isnan(value) else value for value in row] for row in rows], columns.marks("evaluation")


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 25), min_size=1, max_size=5),
    per_event=st.integers(1, 4),
    piece_bytes=st.integers(200, 5000),
)
def test_the_columns_are_those_of_the_log(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[int], per_event: int, piece_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "PIECE_BYTES", piece_bytes)
        step = 0
        for num in pieces:
            write(folder, step + 1, step + num, per_event=per_event)
            step += num
            assert held(Curves(folder).read_on(size(folder))) == said(folder)
    again = Curves(folder)
    assert again.head.rows == 0 and held(again.read_on(size(folder))) == said(folder), "kept on the disk"


def test_only_what_ingest_has_taken_is_shown(tmp_path: Path) -> None:
    write(tmp_path, 1, 20)
    half = (tmp_path / "events.jsonl").read_bytes()[:2000].rfind(b"\n") + 1
    columns = Curves(tmp_path).read_on(half)
    assert columns.head.offset == half and 0 < columns.head.rows < 20


def broken(folder: Path) -> Iterator[tuple[str, Any]]:
    place = folder / "curves"
    yield "no head", lambda: (place / "head.json").unlink()
    yield "torn head", lambda: (place / "head.json").write_text('{"rows": 1')
    yield (
        "other fields",
        lambda: (place / "head.json").write_text((place / "head.json").read_text().replace("loss", "lost")),
    )
    yield "short numbers", lambda: (place / "0.f64").write_bytes((place / "0.f64").read_bytes()[:-50])
    yield "no marks", lambda: (place / "0.jsonl").unlink()
    yield "too much", lambda: (place / "0.f64").write_bytes((place / "0.f64").read_bytes() + bytes(31))
    yield "nothing", lambda: [path.unlink() for path in place.iterdir()]


@pytest.mark.parametrize("case", [name for name, _ in broken(Path())])
def test_what_is_damaged_is_made_anew(tmp_path: Path, case: str) -> None:
    write(tmp_path, 1, 20)
    Curves(tmp_path).read_on(size(tmp_path))
    dict(broken(tmp_path))[case]()
    write(tmp_path, 21, 30)
    assert held(Curves(tmp_path).read_on(size(tmp_path))) == said(tmp_path)


def test_a_log_that_lost_its_end_and_went_on_is_followed(tmp_path: Path) -> None:
    write(tmp_path, 1, 20)
    Curves(tmp_path).read_on(size(tmp_path))
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:9]))
    write(tmp_path, 1, 40, per_event=4)  # the engine leaves out what the log holds
    columns = Curves(tmp_path).read_on(size(tmp_path))
    assert held(columns) == said(tmp_path)
    assert columns.read(0, 40)["step"].tolist() == list(range(1, 41))


def test_steps_and_marks_that_the_log_says_twice_are_there_once(tmp_path: Path) -> None:
    write(tmp_path, 1, 12)
    whole = (tmp_path / "events.jsonl").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    again = [{**line, "seq": line["seq"] + len(lines)} for line in lines]
    (tmp_path / "events.jsonl").write_bytes(whole + b"".join(json.dumps(line).encode() + b"\n" for line in again))
    columns = Curves(tmp_path).read_on(len(whole))
    once = held(columns)
    assert held(columns.read_on(size(tmp_path))) == once and len(once[0]) == 12
    assert len(columns.marks("signal")) == 1


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1, 9, per_event=1)
    path = tmp_path / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2:2] = [b"{\xff\n", b"[]\n", b'{"seq":1,"kind":"metric","step":1,"data":{"rows":["a"]}}\n']
    path.write_bytes(b"".join(lines))
    assert Curves(tmp_path).read_on(size(tmp_path)).read(0, 9)["step"].tolist() == list(range(1, 10))


def test_many_who_look_at_once_see_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 400)
    monkeypatch.setattr(curves, "PIECE_BYTES", 2000)
    wanted, seen = said(tmp_path), []
    threads = [
        threading.Thread(target=lambda: seen.append(held(Curves(tmp_path).read_on(size(tmp_path))))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(seen) == 6 and all(found == wanted for found in seen)


def test_little_time_means_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 100)
    monkeypatch.setattr(curves, "PIECE_BYTES", 3000)
    columns, looks = Curves(tmp_path), 0
    while columns.head.offset < size(tmp_path):
        before = columns.head.offset
        columns.read_on(size(tmp_path), seconds=0)
        looks += 1
        assert 0 < columns.head.offset - before <= 3000
    assert looks > 3 and held(columns) == said(tmp_path)


def test_no_log_means_no_columns(tmp_path: Path) -> None:
    columns = Curves(tmp_path / "nothing").read_on(0)
    assert columns.head.rows == 0 and columns.marks("signal") == [] and not (tmp_path / "nothing").exists()
    assert Curves(tmp_path / "gone").read_on(100).head.rows == 0


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.integers(1, 60), min_size=1, max_size=40, unique=True), value=st.floats(-5, 70))
def test_places_on_an_axis(tmp_path_factory: pytest.TempPathFactory, steps: list[int], value: float) -> None:
    folder = tmp_path_factory.mktemp("job")
    log = EventLog(folder, interval=1e9)
    steps = sorted(steps)
    for step in steps:
        log.metric(metric_row(step))
    log.close()
    columns = Curves(folder).read_on(size(folder))
    for axis, scale in (("step", 1.0), ("samples", 8.0), ("seconds", 0.1)):
        wanted = bisect_left(columns.read(0, len(steps))[axis], value * scale)
        assert columns.first_at(axis, value * scale) == wanted
    before = [step for step in steps if step <= value]
    (row,) = columns.at_steps([math.floor(value)])
    assert row is None if not before else row is not None and row["step"] == before[-1]
