"""The page of a run of a million steps: when its curve is there, how much travels, how long zooming takes; and a hundred runs at once."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import requests

from engine.bench.measure import ratio_interval
from engine.bench.pages import Goal, Section, Study
from jobs.bench.apart import answer, apart
from jobs.bench.browser import Browser, chromium

STEPS, RUNS, STEPS_A_RUN, ROUNDS = 1_000_000, 100, 10_000, 7
SPIKE_SEEN = 49.0
# Looks at every frame whether the script's curve is drawn, and notes when.
WATCH = """(() => { const look = () => { if (document.querySelector('#plot .scatterlayer .trace path.js-line')?.getAttribute('d'))
  requestAnimationFrame(() => { window.drawnAt = performance.now(); }); else requestAnimationFrame(look); }; requestAnimationFrame(look); })()"""
# Looks at a stretch, as dragging over the chart does, and waits for the frame that shows all of it.
ZOOM = """(async (start, end) => {
  const { chart } = document.getElementById('run');
  const began = performance.now();
  const show = chart.showDetail.bind(chart);
  const drawn = new Promise((done) => { chart.showDetail = (...what) => { show(...what); chart.showDetail = show; done(); }; });
  Plotly.relayout(chart.place, { 'xaxis.range': [start * 8, end * 8] });
  await drawn;
  await new Promise((frame) => requestAnimationFrame(() => requestAnimationFrame(frame)));
  const took = performance.now() - began;
  const [line] = chart.place.data;
  const inside = line.y.filter((_, place) => line.x[place] >= start * 8 && line.x[place] <= end * 8);
  return { took, greatest: Math.max(...inside), points: inside.length };
})"""
HIGHEST = "Math.max(...document.getElementById('plot').data[0].y)"


def measure() -> list[Section]:
    """The server alone, then the page in Chromium."""
    with apart("jobs.bench.chart_side", str(STEPS), str(RUNS), str(STEPS_A_RUN)) as process:
        place = answer(process)
        sections = [_server(place)]
        program = chromium()
        if program is None:
            sections[0].remarks.append("Chromium is not installed, so the page itself was not measured.")
        else:
            with Browser(program) as browser:
                sections.append(_page(place, browser))
    return sections


def _server(place: dict[str, Any]) -> Section:
    session = requests.Session()
    session.trust_env = False
    session.cookies.set(*place["cookie"])

    def ask(job: str, wanted: str = "curves=loss,grad_norm,eval_loss") -> tuple[float, bytes]:
        begun = time.perf_counter()
        found = session.get(f"{place['address']}/api/v1/jobs/{job}/series?{wanted}", timeout=60)
        found.raise_for_status()
        return time.perf_counter() - begun, found.content

    ask(place["job"])
    alone, overlay = [], []
    for _ in range(ROUNDS):
        seconds, body = ask(place["job"])
        alone.append(seconds)
        overlay.append(sum(ask(job, "curves=loss&points=1000")[0] for job in place["others"]))
    loss = json.loads(body)["curves"]["loss"]
    shown = [step for step, value in zip(loss["step"], loss["value"], strict=True) if value and value > SPIKE_SEEN]
    if shown != place["spikes"]:
        raise RuntimeError(f"Spikes at {place['spikes']} were planted, and {shown} were sent.")
    value, low, high = _median(overlay)
    return Section(
        title="The server",
        intro=f"A finished run of {STEPS:,} steps and {RUNS} of {STEPS_A_RUN:,}, in a web process of their own, asked over HTTP: the long one for loss, gradient "
        f"norm and held-out loss with 2,000 points each, the others for a loss of 1,000 points each; {ROUNDS} rounds. Its three spikes must all be there.",
        columns=("what", "median, least – most"),
        rows=[
            ("series of the long run", _spoken(alone, 1e3, "ms")),
            (f"loss of {RUNS} shorter runs, one after the other", _spoken(overlay, 1, "s")),
            ("its size", f"{len(body) / 1000:.0f} kB"),
            ("making the columns of the long run anew from its log", f"{place['columns_seconds']:.1f} s"),
        ],
        goals=[
            Goal(number="P5", goal=f"curves of {RUNS} runs of {STEPS_A_RUN:,} steps from the server", value=value, interval=(low, high), target=2.0, unit="s",
                 baseline=f"one run of {STEPS:,} steps takes {1e3 * statistics.median(alone):.0f} ms")
        ],
    )  # fmt: skip


def _page(place: dict[str, Any], browser: Browser) -> Section:
    name, value = place["cookie"]
    browser.call("Network.setCookie", name=name, value=value, url=place["address"])
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
    address = f"{place['address']}/runs/{place['job']}/"
    first, again, paints, sizes, zooms = [], [], [], [], []
    for turn in range(ROUNDS):
        browser.call("Network.clearBrowserCache")
        first.append(browser.visit(address, lambda: browser.evaluate("window.drawnAt")) / 1e3)
        again.append(browser.visit(address, lambda: browser.evaluate("window.drawnAt")) / 1e3)
        paints.append(browser.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1e3)
        sizes.append(browser.transferred(but="/static/") / 1e3)
        if browser.evaluate(HIGHEST) < SPIKE_SEEN:
            raise RuntimeError("The spikes are not in the picture.")
        spike = place["spikes"][turn % len(place["spikes"])]
        for share in (0.3, 0.03, 0.003):
            start = spike - share * STEPS / 3
            looked = browser.evaluate(f"{ZOOM}({start}, {start + share * STEPS})")
            if looked["greatest"] < SPIKE_SEEN:
                raise RuntimeError("A spike vanished when somebody zoomed in.")
            zooms.append(looked["took"])
    goals = [
        _goal("a million steps: the page's first paint, with a picture of the curve", paints, 1.0, "s", "the picture that the server draws"),
        _goal("a million steps: the script's curve is drawn", again, 1.0, "s", f"on a first visit, with Plotly to load: {statistics.median(first):.2f} s"),
        _goal("a million steps: what travels for page and curve", sizes, 200.0, "kB", "scripts and styles apart, which the browser keeps"),
        _goal("a million steps: a stretch is drawn in full after", zooms, 100.0, "ms", "stretches of 30, 3 and 0.3 % of the run; in each its spike"),
    ]  # fmt: skip
    return Section(
        title="The page",
        intro=f"The page of the long run in Chromium without a window, 1280 × 900; {ROUNDS} rounds: with an empty cache, once more, and three looks at a spike.",
        columns=("what", "median, least – most"),
        rows=[
            ("first paint", _spoken(paints, 1, "s")),
            ("curve drawn, scripts in the cache", _spoken(again, 1, "s")),
            ("curve drawn, empty cache", _spoken(first, 1, "s")),
            ("what travels, without scripts and styles", _spoken(sizes, 1, "kB")),
            ("zoomed in and drawn anew", _spoken(zooms, 1, "ms")),
        ],
        goals=goals,
    )


def _goal(goal: str, values: Sequence[float], target: float, unit: str, baseline: str) -> Goal:
    value, low, high = _median(values)
    return Goal(number="P5", goal=goal, value=value, interval=(low, high), target=target, unit=unit, baseline=baseline)


def _median(values: Sequence[float]) -> tuple[float, float, float]:
    return ratio_interval(values, [1.0] * len(values))


def _spoken(values: Sequence[float], scale: float, unit: str) -> str:
    least, middle, most = (scale * value for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.3g} {unit}, {least:.3g} – {most:.3g}"


STUDY = Study(name="chart", page="chart.md", minutes=1.5, quick=True, seed=0, run=measure)
