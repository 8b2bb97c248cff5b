"""The log is numbered without a hole, survives torn lines, and replays nothing; requests are obeyed once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.artifact import damaged_files, seal
from engine.core.control import Control, write_request
from engine.core.events import LOG_NAME, Event, EventLog, finite, read_events


def row(step: int, loss: float = 1.0) -> dict[str, float]:
    return {"step": step, "loss": loss}


def all_rows(folder: Path) -> list[dict[str, float]]:
    return [r for event, _ in read_events(folder / LOG_NAME) if event.kind == "metric" for r in event.data["rows"]]


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 400), resume_at=st.integers(0, 30), interval=st.sampled_from([0.0, 60.0]))
def test_a_torn_log_continues_without_hole_or_repeat(
    tmp_path_factory, cut: int, resume_at: int, interval: float
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = EventLog(folder, interval=interval)
    for step in range(1, 31):
        log.metric(row(step, 1.0 / step))
        if step % 10 == 0:
            log.emit("signal", {"action": "note", "rule": "r", "message": "m"}, step=step, key="r")
    log.sync()
    raw = (folder / LOG_NAME).read_bytes()
    (folder / LOG_NAME).write_bytes(raw[: max(0, len(raw) - cut)])

    again = EventLog(folder, interval=interval)
    known = [r["step"] for r in all_rows(folder)]
    start = min(resume_at, max(known, default=0))  # a checkpoint is never ahead of the log
    for step in range(start + 1, 31):
        again.metric(row(step, 1.0 / step))
        if step % 10 == 0:
            again.emit("signal", {"action": "note", "rule": "r", "message": "m"}, step=step, key="r")
    again.close()

    events = [event for event, _ in read_events(folder / LOG_NAME)]
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [r["step"] for r in all_rows(folder)] == list(range(1, 31))
    assert [r["loss"] for r in all_rows(folder)] == [1.0 / step for step in range(1, 31)]
    signals = [event.step for event in events if event.kind == "signal"]
    assert len(signals) == len(set(signals))


def test_not_a_number_is_written_as_null_and_named(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.metric({"step": 1, "loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.1})
    log.close()
    (line,) = (tmp_path / LOG_NAME).read_text().splitlines()
    written = json.loads(line)["data"]["rows"][0]
    assert written["loss"] is None and written["grad_norm"] is None and written["nonfinite"] == ["loss", "grad_norm"]


VALUES = st.recursive(
    st.floats() | st.integers() | st.text(max_size=5) | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(data=st.dictionaries(st.text(max_size=4), VALUES, max_size=4))
def test_a_line_is_what_json_says_of_the_finite_form(data: dict[str, Any]) -> None:
    """Numbers are looked through only when one of them is not finite; the bytes do not depend on it."""
    body = {"seq": 3, "time": 1.25, "kind": "log", "step": 7, "data": finite(data)}
    plain = json.dumps(body, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    assert Event(3, 1.25, "log", 7, data).line() == plain


def test_reading_from_an_offset_continues_exactly(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for number in range(5):
        log.emit("log", {"level": "info", "message": str(number)})
    first = list(read_events(log.path))
    middle = first[1][1]
    assert [event.seq for event, _ in read_events(log.path, middle)] == [3, 4, 5]


def test_a_request_is_obeyed_once_and_the_next_one_again(tmp_path: Path) -> None:
    control = Control(tmp_path)
    assert control.poll() is None
    write_request(tmp_path, "save")
    assert control.poll() == "save" and control.poll() is None
    write_request(tmp_path, "stop")
    assert control.poll() == "stop" and control.poll() is None


def test_half_a_request_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "control.json").write_text('{"request": "st')
    assert Control(tmp_path).poll() is None


def test_a_sealed_folder_notices_every_change(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_bytes(b"two")
    identity = seal(tmp_path)
    assert damaged_files(tmp_path) == [] and len(identity) == 64
    (tmp_path / "deep" / "b").write_bytes(b"twO")
    (tmp_path / "c").write_bytes(b"new")
    (tmp_path / "a").unlink()
    assert damaged_files(tmp_path) == ["a", "c", "deep/b"]
