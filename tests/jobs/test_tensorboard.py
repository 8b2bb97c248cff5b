"""A run in TensorBoard: read back with tensorboardX's own classes and checksums, number for number."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from hypothesis import given
from hypothesis import strategies as st

from engine.core.events import EventLog
from jobs import tensorboard
from jobs.ingest import Ingester
from jobs.models import Event, Job
from jobs.places import job_folder
from tests.jobs import api_kit as kit
from tests.jobs.conftest import MakeJob
from tests.jobs.logs import metric_row


def read_back(body: bytes) -> list[Any]:
    """The events of a file, by the library that writes such files; a wrong checksum fails here."""
    pytest.importorskip("tensorboardX", reason="tensorboardX reads the event file back; it is a development package")
    from tensorboardX.proto.event_pb2 import Event as Proto
    from tensorboardX.record_writer import masked_crc32c

    found, place = [], 0
    while place < len(body):
        head = body[place : place + 8]
        (length,), (check,) = struct.unpack("<Q", head), struct.unpack("<I", body[place + 8 : place + 12])
        assert check == masked_crc32c(head)
        data = body[place + 12 : place + 12 + length]
        assert body[place + 12 + length : place + 16 + length] == struct.pack("<I", masked_crc32c(data))
        found.append(Proto.FromString(data))
        place += 16 + length
    return found


def values(event: Any) -> dict[str, float]:
    return {value.tag: value.simple_value for value in event.summary.value}


def single(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def told(job: Job) -> list[Any]:
    return read_back(b"".join(tensorboard.event_file(job)))


def test_a_run_is_there_under_trainers_names(make_job: MakeJob, write_log: Callable[..., EventLog]) -> None:
    job = make_job()
    log = write_log(job, 4, per_event=4)
    log.emit(
        "evaluation", {"eval_loss": 0.5, "eval_accuracy": 0.75, "samples": 32, "epoch": 0.08, "best": True}, step=4
    )
    log.metric(metric_row(5, loss=float("nan"), grad_norm=float("inf")))
    log.flush()
    Ingester(job, job_folder(job.pk), job.lease_epoch).drain()
    job.refresh_from_db()
    log.metric(metric_row(6))
    log.close()  # not taken in yet, so not shown yet

    head, *events = told(job)
    assert head.file_version == "brain.Event:2" and head.wall_time == job.created.timestamp()
    assert [event.step for event in events] == [1, 2, 3, 4, 4, 5]
    assert values(events[1]) == {
        "train/samples": 16, "train/num_input_tokens_seen": 200, "train/epoch": single(0.04), "train/loss": 1.0, "train/grad_norm": 1.0,
        "train/learning_rate": single(1e-3), "train/seconds": single(0.2), "train/tokens_per_second": 1000, "train/memory": 1 << 20,
    }  # fmt: skip
    assert values(events[4]) == {"eval/loss": 0.5, "eval/accuracy": 0.75}
    lost = values(events[5])
    assert math.isnan(lost["train/loss"]) and math.isnan(lost["train/grad_norm"])
    gaps = [later.wall_time - one.wall_time for one, later in itertools.pairwise(events[:4])]
    assert gaps == pytest.approx([0.1] * 3, abs=1e-5), "steps that share an event keep their own moments"
    assert events[3].wall_time == Event.objects.filter(job=job, kind="metric").earliest("seq").time

    (job_folder(job.pk) / "events.jsonl").unlink()
    assert [(event.step, str(values(event))) for event in told(job)[1:]] == [
        (event.step, str(values(event))) for event in events
    ], "without the log the database tells the same"


def test_a_damaged_line_and_a_step_told_twice(make_job: MakeJob, write_log: Callable[..., EventLog]) -> None:
    job = make_job()
    write_log(job, 3).close()
    path = job_folder(job.pk) / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{\xff\n" + b"".join(lines[:2]) + lines[2])
    job.log_offset = path.stat().st_size
    assert [event.step for event in told(job)[1:]] == [1, 2, 3]


@pytest.mark.django_db
def test_it_comes_in_pieces_under_a_name_that_tensorboard_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "PIECE_BYTES", 300)
    owner = kit.caller("owner")
    row = kit.job(owner.user, num_events=0)
    rows = [metric_row(step) for step in range(1, 21)]
    Event.objects.create(job=row, seq=1, kind="metric", step=20, time=1790000001.0, data={"rows": rows})
    row.last_seq = 1
    row.save()
    response = owner.get(f"jobs/{row.pk}/events.tfevents")
    assert response["Content-Type"] == "application/octet-stream" and ".tfevents." in response["Content-Disposition"]
    pieces = list(response.streaming_content)
    assert len(pieces) > 5 and [event.step for event in read_back(b"".join(pieces))] == [0, *range(1, 21)]


def test_a_run_without_a_step_is_an_empty_file_of_the_right_kind(make_job: MakeJob, person: User) -> None:
    assert [event.file_version for event in told(make_job())] == ["brain.Event:2"]


def test_the_checksum_is_that_of_the_standard() -> None:
    """RFC 3720, appendix B.4."""
    known = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E, b"123456789": 0xE3069283}
    assert {data: tensorboard.crc32c(data) for data in known} == known


@given(
    step=st.integers(0, 2**62),
    moment=st.floats(0, 1e10),
    numbers=st.dictionaries(st.text(min_size=1, max_size=150), st.floats(), max_size=6),
)
def test_whatever_stands_in_an_event_is_read_back(step: int, moment: float, numbers: dict[str, float]) -> None:
    (event,) = read_back(tensorboard.record(tensorboard.scalars(moment, step, numbers)))
    assert (event.step, event.wall_time) == (step, moment)
    assert values(event).keys() == numbers.keys()
    for tag, found in values(event).items():
        given_ = numbers[tag]
        assert math.isnan(found) if not math.isfinite(given_) or abs(given_) > 3.4028235e38 else found == single(given_)
