"""How long a person waits, and what the web process weighs: guards with wide limits, for machines that are busy with other things."""

from __future__ import annotations

import statistics

import pytest

from jobs.bench.click import click, cold_script
from jobs.bench.installation import Installation, maps_library, resident_megabytes
from jobs.bench.queue import wake_ups


@pytest.mark.slow
def test_a_click_is_soon_a_step_and_the_web_process_stays_free_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BONSAI_THREADS", "1")  # on a busy machine two threads wait for each other
    with Installation() as studio:
        pids = studio.processes()
        found = [click(studio, number) for number in range(3)]
        cold = cold_script()
        assert len(studio.visit_every_page(limit=60)) > 45
        assert maps_library(pids["engine"], "libtorch"), "the engine service does hold it"
        assert not maps_library(pids["web"], "libtorch")
        assert resident_megabytes(pids["web"]) < 95
        assert studio.processes() == pids, "nothing was restarted meanwhile"
    assert sum(one.num_lost for one in found) == 0
    waits = [one.first for one in found[1:]]
    assert cold / statistics.median(waits) > 2, (cold, waits)


@pytest.mark.slow
def test_an_idle_consumer_wakes_at_once() -> None:
    seconds = wake_ups(1, {0.05: 3, 3.0: 3})
    assert statistics.median(seconds[3.0]["ours"]) < 0.15, seconds
    assert statistics.median(seconds[3.0]["stock"]) > 3 * statistics.median(seconds[3.0]["ours"]), seconds
