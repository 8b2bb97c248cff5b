"""A run with more steps than a chart can hold, in a real browser: no spike is lost, and who zooms in sees every step."""

from __future__ import annotations

import time
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from jobs.bench.apart import answer, apart

pytestmark = [pytest.mark.e2e]
STEPS, SPIKE = 30_000, 50.0
DRAWN = "() => document.querySelector('#plot .scatterlayer .trace path.js-line') !== null"
LOOK = """([start, end]) => Plotly.relayout(document.getElementById('plot'), { 'xaxis.range': [8 * start, 8 * end] })"""
LINE = "() => { const [line] = document.getElementById('plot').data; return { x: line.x, y: line.y }; }"
DETAIL = "() => document.getElementById('run').chart.detail !== null"


def until(page: Page, question: str, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not page.evaluate(question):
        assert time.monotonic() < end, question
        page.wait_for_timeout(20)


def line(page: Page) -> dict[int, float]:
    drawn = page.evaluate(LINE)
    return dict(zip((round(x / 8) for x in drawn["x"]), drawn["y"], strict=True))


def test_a_long_run_is_drawn_whole_and_in_detail(browser: Browser) -> None:
    with apart("jobs.bench.chart_side", str(STEPS), "0", "0") as process:
        place: dict[str, Any] = answer(process)
        context = browser.new_context(base_url=place["address"], viewport={"width": 1280, "height": 900})
        name, value = place["cookie"]
        context.add_cookies([{"name": name, "value": value, "url": place["address"]}])
        page = context.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"/runs/{place['job']}/")
        until(page, DRAWN)
        whole = line(page)
        assert len(whole) <= 2400 and [step for step, loss in whole.items() if loss == SPIKE] == place["spikes"]
        for spike in place["spikes"]:
            page.evaluate(LOOK, [spike - 300, spike + 300])
            until(page, DETAIL)
            near = line(page)
            assert set(range(spike - 300, spike + 301)) <= set(near) and near[spike] == SPIKE
            page.locator("[data-whole]").click()
            until(page, f"() => !({DETAIL})()")
        assert line(page) == whole
        page.evaluate(LOOK, [10, STEPS - 10])  # a long stretch is thinned out too, and keeps what stands out
        until(page, DETAIL)
        assert (
            len(line(page)) <= 1200 and [step for step, loss in line(page).items() if loss == SPIKE] == place["spikes"]
        )
        assert not complaints, complaints
        context.close()
