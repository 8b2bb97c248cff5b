"""Curves: thinned out, and every spike still there."""

from __future__ import annotations

import itertools
import math
import time
from array import array
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from engine.core.events import EventLog
from jobs import series as module
from jobs.ingest import Ingester
from jobs.models import Event, Job
from jobs.places import job_folder
from jobs.series import Window, bucket_edges, decimate, kept_of_few, kept_of_many, series
from tests.jobs.conftest import MakeJob
from tests.jobs.logs import metric_row

VALUES = st_numpy.arrays(
    np.float64, st.integers(1, 3000), elements=st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf)
)


@settings(max_examples=200, deadline=None)
@given(values=VALUES, points=st.integers(10, 800))
def test_no_spike_vanishes(values: np.ndarray, points: int) -> None:
    kept = np.array(decimate(array("d", values), points))
    assert len(kept) <= points
    assert (np.diff(kept) > 0).all(), "in order, each once"
    assert kept[0] == 0 and kept[-1] == len(values) - 1, "the first and the newest value are shown"
    finite = values[np.isfinite(values)]
    shown = values[kept][np.isfinite(values[kept])]
    if len(finite):
        assert shown.min() == finite.min() and shown.max() == finite.max()
    assert np.isfinite(values).all() == np.isfinite(values[kept]).all(), "what is not finite is seen to be"
    if len(values) > points:
        edges = bucket_edges(len(values), points)
        assert edges[0] == 0 and edges[-1] == len(values)
        for low, high in itertools.pairwise(edges):
            inside = values[low:high][np.isfinite(values[low:high])]
            here = values[kept[(kept >= low) & (kept < high)]]
            if len(inside):
                assert inside.min() in here and inside.max() in here


@settings(max_examples=200, deadline=None)
@given(
    values=VALUES
    | st_numpy.arrays(
        np.float64, st.integers(1, 300), elements=st.sampled_from([0.0, -0.0, 1.0, math.nan, -math.inf, 1e308])
    ),
    points=st.integers(10, 800),
)
def test_many_values_are_thinned_as_few_are(values: np.ndarray, points: int) -> None:
    column, edges = array("d", values), bucket_edges(len(values), points)
    assert kept_of_many(column, edges) == kept_of_few(column, edges)


@settings(max_examples=50, deadline=None)
@given(place=st.integers(0, 99_999), points=st.integers(40, 3000))
def test_one_spike_in_a_hundred_thousand_is_there(place: int, points: int) -> None:
    values = array("d", np.sin(np.arange(100_000) / 900))
    values[place] = 50.0
    assert place in decimate(values, points)


def take(job: Job) -> None:
    job.refresh_from_db()
    Ingester(job, job_folder(job.pk), job.lease_epoch).drain()
    job.refresh_from_db()


def test_curves_evaluations_and_signals(make_job: MakeJob, write_log: Callable[..., EventLog]) -> None:
    job = make_job()
    log = write_log(job, 40, per_event=8)
    log.emit("evaluation", {"eval_loss": 0.7, "eval_accuracy": 0.5, "samples": 0, "best": True}, step=0)
    log.emit("evaluation", {"eval_loss": 0.3, "eval_accuracy": 0.8, "samples": 320, "best": True}, step=40)
    log.emit(
        "signal",
        {"action": "stop", "rule": "patience", "message": "No longer better.", "numbers": {}},
        step=40,
        key="patience",
    )
    take(job)
    body = series(job)
    assert body["curves"]["loss"]["step"] == list(range(1, 41))
    assert body["curves"]["loss"]["samples"][-1] == 320 and body["curves"]["loss"]["seconds"][-1] == 4.0
    assert body["curves"]["eval_loss"] == {
        "value": [0.7, 0.3],
        "step": [0, 40],
        "samples": [0, 320],
        "seconds": [0.0, 4.0],
    }
    assert body["curves"]["eval_accuracy"]["value"] == [0.5, 0.8] and "eval_best" not in body["curves"]
    assert body["signals"][0]["rule"] == "patience" and body["signals"][0]["samples"] == 320
    assert body["last_seq"] == job.last_seq and body["num_steps"] == 40


def test_a_running_job_costs_only_its_new_rows(
    make_job: MakeJob, write_log: Callable[..., EventLog], django_assert_num_queries: Callable
) -> None:
    job = make_job()
    log = write_log(job, 10)
    take(job)
    series(job)
    log.metric(metric_row(11, loss=None))
    log.flush()
    take(job)
    with django_assert_num_queries(1):
        loss = series(job)["curves"]["loss"]
    assert loss["step"][-1] == 11 and loss["value"][-1] is None


def test_what_was_pruned_is_read_from_the_log(make_job: MakeJob, write_log: Callable[..., EventLog]) -> None:
    job = make_job()
    write_log(job, 30).close()
    take(job)
    whole = series(job)
    Event.objects.filter(job=job, seq__lte=20).delete()
    Job.objects.filter(pk=job.pk).update(first_seq=21)
    assert series(job) == whole


def test_an_empty_job_has_no_curves(make_job: MakeJob) -> None:
    body = series(make_job())
    assert body["curves"] == {} and body["evaluations"] == [] and body["last_seq"] == 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_window_shows_its_true_extremes(
    make_job: MakeJob, write_log: Callable[..., EventLog], data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stretch is looked at, and however little is read at once: its least and greatest value are there, and one point beside it."""
    job = make_job()
    num = data.draw(st.integers(1, 300))
    log = write_log(job)
    losses = data.draw(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), min_size=num, max_size=num))
    for step, loss in enumerate(losses, 1):
        log.metric(metric_row(step, loss=loss))
    log.flush()
    take(job)
    monkeypatch.setattr(module, "PIECE_ROWS", data.draw(st.sampled_from([1, 50, 1 << 16])))
    axis, scale = data.draw(st.sampled_from([("step", 1), ("samples", 8)]))
    start, end = sorted(data.draw(st.tuples(st.integers(-5, 310), st.integers(-5, 310))))
    curve = series(
        job, data.draw(st.integers(10, 400)), window=Window(axis, scale * start, scale * end), names=["loss"]
    )["curves"]["loss"]
    shown = {step: value for step, value in zip(curve["step"], curve["value"], strict=True) if start <= step <= end}
    inside = {step: float(f"{loss:.7g}") for step, loss in enumerate(losses, 1) if start <= step <= end}
    finite = [loss for loss in inside.values() if math.isfinite(loss)]
    assert [value for value in shown.values() if value is None] or len(finite) == len(inside)
    if finite:
        values = [value for value in shown.values() if value is not None]
        assert min(values) == min(finite) and max(values) == max(finite)
        assert shown.keys() >= {min(inside), max(inside)} or len(inside) > 8, "few points are all shown"
    beside = [step for step in (min(inside, default=start) - 1, max(inside, default=end) + 1) if 1 <= step <= num]
    assert not inside or set(beside) <= set(curve["step"]), "the line goes on at both edges"


def test_only_the_curves_that_were_asked_for(make_job: MakeJob, write_log: Callable[..., EventLog]) -> None:
    job = make_job()
    log = write_log(job, 5)
    log.emit("evaluation", {"eval_loss": 0.7, "eval_accuracy": 0.5, "samples": 0}, step=0)
    take(job)
    body = series(job, names=("loss", "eval_loss"))
    assert set(body["curves"]) == {"loss", "eval_loss"} and "evaluations" not in body
    assert set(series(job)["curves"]) == {"loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy"}


def test_a_long_run_is_read_without_its_rows(make_job: MakeJob, write_log: Callable[..., EventLog]) -> None:
    """The goal is a second for a million steps; the guard: a hundred thousand take little processor time once their columns are there."""
    job = make_job()
    write_log(job, 100_000, per_event=100)
    take(job)
    first = series(job)
    began = time.process_time()
    assert series(job) == first and first["num_steps"] == 100_000
    took = time.process_time() - began
    print(f"{took:.3f} s of processor time")
    assert took < 0.2
