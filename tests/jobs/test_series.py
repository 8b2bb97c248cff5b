"""Curves: thinned out, and every spike still there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from engine.core.events import EventLog
from jobs.ingest import Ingester
from jobs.models import Event, Job
from jobs.places import job_folder
from jobs.series import decimate, series
from tests.jobs.conftest import MakeJob
from tests.jobs.logs import metric_row

VALUES = st_numpy.arrays(
    np.float64, st.integers(1, 3000), elements=st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf)
)


@settings(max_examples=200, deadline=None)
@given(values=VALUES, points=st.integers(10, 800))
def test_no_spike_vanishes(values: np.ndarray, points: int) -> None:
    kept = np.array(decimate(values, points))
    assert len(kept) <= max(points, 4)
    assert (np.diff(kept) > 0).all(), "in order, each once"
    assert kept[-1] == len(values) - 1, "the newest value is shown"
    finite = values[np.isfinite(values)]
    shown = values[kept][np.isfinite(values[kept])]
    if len(finite):
        assert shown.min() == finite.min() and shown.max() == finite.max()
    assert np.isfinite(values).all() == np.isfinite(values[kept]).all(), "what is not finite is seen to be"
    if len(values) > points:
        buckets = max(1, points // 4)
        edges = np.linspace(0, len(values), buckets + 1).astype(int)
        for low, high in itertools.pairwise(edges):
            inside = values[low:high][np.isfinite(values[low:high])]
            here = values[kept[(kept >= low) & (kept < high)]]
            if len(inside):
                assert inside.min() in here and inside.max() in here


@settings(max_examples=50, deadline=None)
@given(place=st.integers(0, 99_999), points=st.integers(40, 3000))
def test_one_spike_in_a_hundred_thousand_is_there(place: int, points: int) -> None:
    values = np.sin(np.arange(100_000) / 900)
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
    with django_assert_num_queries(2):
        loss = series(job)["curves"]["loss"]
    assert loss["step"][-1] == 11 and loss["value"][-1] is None


def test_what_was_pruned_is_read_from_the_log(make_job: MakeJob, write_log: Callable[..., EventLog]) -> None:
    job = make_job()
    write_log(job, 30).close()
    take(job)
    whole = series(job)
    Event.objects.filter(job=job, seq__lte=20).delete()
    Job.objects.filter(pk=job.pk).update(first_seq=21)
    from jobs import series as module

    module._kept.clear()
    assert series(job) == whole


def test_an_empty_job_has_no_curves(make_job: MakeJob) -> None:
    body = series(make_job())
    assert body["curves"] == {} and body["evaluations"] == [] and body["last_seq"] == 1
