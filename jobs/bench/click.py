"""From the accepted request to the first metric in the client, beside a script that starts cold; and what the web process weighs.

A real installation, one client over HTTP and a websocket. Rounds alternate between a few jobs of the studio and one cold script on the same model and
data, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from engine.bench.pages import Goal, Section, Study
from engine.io.facts import locate_model
from engine.starters import starter_data
from jobs.bench.installation import STARTER_JOB, Installation, maps_library, resident_megabytes
from jobs.bench.quantiles import interval, quantile, ratio_of_medians
from jobs.parts import ROOT

ROUNDS, CLICKS = 6, 4
STAGES = (
    ("the consumer has claimed the job", "status", "to", "starting"),
    ("the child runs", "state", "state", "starting"),
    ("the model and the data are ready", "state", "state", "running"),
    ("the start is evaluated", "evaluation", "", ""),
    ("the first step is done", "metric", "", ""),
)


@dataclass(frozen=True)
class Click:
    """One job. Seconds count from the answer 202, but for `accepted`, which counts from the request."""

    accepted: float
    seen: float  # the first number in the client: the held-out loss of the start, which opens the chart
    first: float  # the first training step in the client
    stages: tuple[float, ...]  # when each of STAGES was written
    delays: tuple[float, ...]  # from the writing of an event to its arrival
    num_events: int
    num_lost: int


# Why an aim may be missed, as the parts of a click below and a look at the loaded modules tell.
WHERE_IT_GOES = (
    "loading model and data takes a fifth of a second, measuring the start before the first step another (kept there, so that a resumed run is "
    "the same run), the step and its way to the client an eighth; the wake-up and the fork are over after 25 ms"
)
COLD_FROM_MEMORY = (
    "the files of a cold script come from memory on this machine, so it needs 4 s and not the 7 to 10 s of a first start; what is left of ours "
    "is the run itself"
)
WEB_MEMORY = (
    "code of Django, django-ninja, pydantic and the admin; what no page needs is kept out already, and numpy comes in with the first long "
    "curve"
)


def click(studio: Installation, number: int) -> Click:
    """Start the starter job, watch it to its end, and compare what arrived with what is stored."""
    recipe = {**STARTER_JOB, "name": f"click {number}", "settings": {**STARTER_JOB["settings"], "seed": number}}
    begun = time.time()
    job = studio.start_job(recipe)
    accepted = time.time()
    arrivals = studio.follow(job)
    stored = {event["seq"] for event in studio.get(f"jobs/{job}/events?after=0&limit=1000")["events"]}
    return Click(
        accepted=accepted - begun,
        seen=next(at for at, event in arrivals if event["kind"] in ("evaluation", "metric")) - accepted,
        first=next(at for at, event in arrivals if event["kind"] == "metric") - accepted,
        stages=tuple(_written(arrivals, *stage[1:]) - accepted for stage in STAGES),
        delays=tuple(at - event["time"] for at, event in arrivals if event["kind"] != "status"),
        num_events=len(stored),
        num_lost=len(stored - {event["seq"] for _, event in arrivals}),
    )


def _written(arrivals: list[tuple[float, dict[str, Any]]], kind: str, key: str, value: str) -> float:
    found = (event for _, event in arrivals if event["kind"] == kind and (not key or event["data"][key] == value))
    return float(next(found)["time"])


def cold_script() -> float:
    """Seconds from the start of a plain script to its first finished step."""
    command = [sys.executable, "-m", "engine.bench.cold_script", str(locate_model("starter:minilm-l6")), str(starter_data("customer-messages").path)]  # fmt: skip
    begun = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        seconds = time.perf_counter() - begun
        process.communicate()
    if not said.startswith("step 1"):
        raise RuntimeError("The cold script did not finish its step.")
    return seconds


def measure() -> list[Section]:
    """Alternate jobs and cold scripts; then visit every page and weigh the web process."""
    clicks: list[list[Click]] = []
    cold: list[float] = []
    with Installation() as studio:
        click(studio, 999)
        cold_script()
        for turn in range(ROUNDS):
            clicks.append([click(studio, turn * CLICKS + place) for place in range(CLICKS)])
            cold.append(cold_script())
        pages = studio.visit_every_page()
        web = studio.processes()["web"]
        weight, has_torch = resident_megabytes(web), maps_library(web, "libtorch")
        with_torch = resident_megabytes(studio.processes()["engine"])
    return [
        _waiting([one for turn in clicks for one in turn], clicks, cold),
        _web_process(weight, has_torch, with_torch, len(pages)),
    ]


def _waiting(all_clicks: list[Click], clicks: list[list[Click]], cold: list[float]) -> Section:
    first, seen = [one.first for one in all_clicks], [one.seen for one in all_clicks]
    by_round = [statistics.median(one.first for one in turn) for turn in clicks]
    delays = [delay for one in all_clicks for delay in one.delays]
    rows: list[tuple[str, ...]] = [
        ("request accepted (all checks done, job in the queue), median", f"{statistics.median(one.accepted for one in all_clicks):.2f} s"),
        ("accepted to the first point of the chart (held-out loss of the start) in the client, median", f"{statistics.median(seen):.2f} s"),
        ("accepted to the first point of the chart in the client, p95", f"{quantile(seen, 0.95):.2f} s"),
        ("accepted to the first training step in the client, median", f"{statistics.median(first):.2f} s"),
        ("accepted to the first training step in the client, p95", f"{quantile(first, 0.95):.2f} s"),
        ("accepted to the first training step in the client, worst", f"{max(first):.2f} s"),
        *((f"accepted until {name[0]}, median", f"{statistics.median(one.stages[place] for one in all_clicks):.3f} s") for place, name in enumerate(STAGES)),
        ("event written to event in the client, p50", f"{quantile(delays, 0.5) * 1e3:.0f} ms"),
        ("event written to event in the client, p99", f"{quantile(delays, 0.99) * 1e3:.0f} ms"),
        ("cold script to its first step, median", f"{statistics.median(cold):.1f} s"),
        ("events in the database", f"{sum(one.num_events for one in all_clicks):,}"),
        ("events lost between database and client", f"{sum(one.num_lost for one in all_clicks)}"),
    ]  # fmt: skip
    p95 = interval(lambda values: quantile(values, 0.95), first)
    p95_seen = interval(lambda values: quantile(values, 0.95), seen)
    times = interval(ratio_of_medians, cold, by_round)
    goals = [
        Goal(number="P3", goal="accepted request to the first point of the chart in the client, p95", value=quantile(seen, 0.95), interval=p95_seen,
             target=0.7, unit="s", baseline=f"a cold script needs {statistics.median(cold):.1f} s", reason=WHERE_IT_GOES),
        Goal(number="P3", goal="accepted request to the first training step in the client, p95", value=quantile(first, 0.95), interval=p95, target=0.7,
             unit="s", baseline=f"a cold script needs {statistics.median(cold):.1f} s", reason=WHERE_IT_GOES),
        Goal(number="P3", goal="first step: a cold script takes this many times as long", value=ratio_of_medians(cold, by_round), interval=times,
             target=15.0, better="more", baseline="python script: import torch, transformers, peft; LoRA; one step", reason=COLD_FROM_MEMORY),
    ]  # fmt: skip
    return Section(
        title="Waiting",
        intro=f"A real installation started by `manage.py up` in an empty folder; one client over HTTP and a websocket; each of {len(all_clicks)} jobs "
        "trains MiniLM-L6 with PaCA on the starter messages for 20 steps. The first step includes loading the model, reading the data and the first "
        f"evaluation. After every {CLICKS} jobs a cold script trains a LoRA of the same model for one step.",
        columns=("what", "value"),
        rows=rows,
        goals=goals,
    )


def _web_process(weight: float, has_torch: bool, with_torch: float, num_pages: int) -> Section:
    goal = Goal(
        number="P3",
        goal="resident memory of the web process after every page was served",
        value=weight,
        target=80.0,
        unit="MB",
        baseline=f"the engine service, which holds torch, has {with_torch:.0f} MB",
        reason=WEB_MEMORY,
    )
    return Section(
        title="The web process",
        intro=f"The same installation after {num_pages} pages: every link from the front page, the admin and the API's page, each kind at most three times.",
        columns=("what", "value"),
        rows=[("resident memory", f"{weight:.0f} MB"), ("has torch in its memory", "yes" if has_torch else "no")],
        goals=[goal],
    )


STUDY = Study(name="click", page="whole-path.md", minutes=2.5, quick=True, seed=0, run=measure)
