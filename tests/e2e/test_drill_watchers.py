"""Short runs, each watched in a tab, while sockets, tabs, the network, the web process and the consumer fall at random moments.

The page is the real one in a real browser; between the two stands a line that can be cut (`tests.e2e.lines`). When a page says that its run
is over, its curves are compared with the stored events, number by number, and from then on it says nothing else.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from playwright.sync_api import BrowserContext, Error, Page

from tests.drills import Told, drill, often
from tests.e2e.conftest import NewVisitor
from tests.e2e.installation import Installation
from tests.e2e.lines import Lines
from tests.e2e.watching import SERIES, SHORT, all_events, expected

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
NUM_RUNS = often("BONSAI_DRILL_WATCHERS", 3)
MOST_SECONDS = float(
    os.environ.get("BONSAI_DRILL_SECONDS", "150")
)  # after them no run begins; what was reached is what is told
SEED = int(os.environ.get("BONSAI_DRILL_SEED", "20265"))
TABS = 3
WORDS = {"succeeded": "Finished", "failed": "Failed", "cancelled": "Cancelled"}  # what the page says of an end
STRIKES = {"socket cut": 8, "socket silent": 1, "tab closed": 5, "network gone": 4}  # how often each, beside the others
KILLS = {"web": 3, "consumer": 2}
STRIKE_SECONDS, KILL_SECONDS = (0.0, 1.5), (6.0, 24.0)  # from one to the next
PATIENCE = 90.0  # seconds from the end of a run until its page has to say so; the studio may be starting meanwhile
PAGE_MS = 15_000
# Everything that the line beside the curve has said since the page was opened.
LISTEN = """addEventListener('DOMContentLoaded', () => {
  const line = document.getElementById('connection');
  window.said = [];
  if (line) new MutationObserver(() => window.said.push(line.dataset.kind)).observe(line, { attributeFilter: ['data-kind'] });
});"""
READY = "() => Boolean(document.getElementById('run')?.feed && window.Plotly)"
STATE = """() => {
  const root = document.getElementById('run');
  const shown = root.querySelector('.run-status .status').textContent.trim();
  return { said: window.said, points: root.curves.length, status: root.dataset.status, shown, title: document.title };
}"""
Answer = TypeVar("Answer")


def patiently(question: Callable[[], Answer], seconds: float = 60.0) -> Answer:
    """Ask a studio whose web process may be starting."""
    end = time.monotonic() + seconds
    while True:
        try:
            return question()
        except (Error, AssertionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@dataclass(eq=False)
class Seat:
    """One person: a browser of their own and, most of the time, a tab with their run."""

    visitor: BrowserContext
    job: str = ""
    page: Page | None = None
    errors: list[str] = field(default_factory=list)  # of that page
    enough: float = 0.0  # after so many steps the person cancels the run; infinity: never
    back: float = 0.0  # when to open the tab again
    online: float = 0.0  # when the network comes back; 0: it is there
    ended: float = 0.0  # when the run was first known to be over
    compared: bool = False


class Drill:
    """Seats, and what strikes them."""

    def __init__(self, studio: Installation, seats: list[Seat], lines: Lines, told: Told) -> None:
        self.studio, self.seats, self.lines, self.told = studio, seats, lines, told
        self.dice = random.Random(SEED)
        self.struck: Counter[str] = Counter()
        self.begun = 0
        self.began = time.monotonic()
        self.next_strike, self.next_kill = 0.0, time.monotonic() + KILL_SECONDS[0]

    def run(self) -> None:
        """Until every run is over and was seen to its end."""
        while self._goes_on() or any(seat.job for seat in self.seats):
            for seat in self.seats:
                self._sit(seat)
                self._open(seat)
                self._watch(seat)
            self._strike()
            time.sleep(0.05)

    def _goes_on(self) -> bool:
        return self.begun < NUM_RUNS and time.monotonic() - self.began < MOST_SECONDS

    def _sit(self, seat: Seat) -> None:
        if seat.job or not self._goes_on():
            return
        steps = self.dice.randint(2, 12)
        plan = {**SHORT["settings"], "max_steps": steps, "evaluations": self.dice.randint(1, 3), "seed": self.begun}
        body = {**SHORT, "name": f"Run {self.begun + 1}", "settings": plan}
        seat.enough = self.dice.choice([self.dice.randint(0, steps), self.dice.randint(0, steps), math.inf])
        patiently(lambda: self.studio.get(seat.visitor, "/api/v1/health"))
        seat.job = patiently(lambda: self.studio.post(seat.visitor, "/api/v1/jobs", body))["id"]
        seat.back, seat.ended, seat.compared = 0.0, 0.0, False
        self.begun += 1

    def _open(self, seat: Seat) -> None:
        """The network comes back, and the tab. A page that did not come, or not whole, is loaded again, as people do."""
        if seat.online and time.monotonic() > seat.online:
            seat.online = 0.0
            seat.visitor.set_offline(False)
        if seat.page is not None or not seat.job or seat.online or time.monotonic() < seat.back:
            return
        page = seat.visitor.new_page()
        seat.errors = errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        try:
            page.goto(f"{self.lines.address}/runs/{seat.job}/", timeout=PAGE_MS, wait_until="domcontentloaded")
            ready = page.evaluate(READY)
        except Error:
            ready = False
        if ready:
            seat.page = page
        else:
            self.struck["page loaded again"] += 1
            page.close()
            seat.back = time.monotonic() + 0.5

    def _watch(self, seat: Seat) -> None:
        """Compare what the page holds when it says that the run is over; ask for that when it is."""
        if not seat.job:
            return
        if seat.page is not None:
            assert not seat.errors, seat.errors
            state = seat.page.evaluate(STATE)
            if "over" in state["said"]:
                self._compare(seat, state)
                return
            if state["points"] >= seat.enough and not seat.ended:
                with contextlib.suppress(Error, AssertionError):  # else in the next round
                    self.studio.post(seat.visitor, f"/api/v1/jobs/{seat.job}/cancel", {})
                    seat.enough = math.inf
        if not seat.ended and self._status(seat) in WORDS:
            seat.ended = time.monotonic()
        assert not seat.ended or time.monotonic() < seat.ended + PATIENCE, (
            seat.job,
            seat.page and seat.page.evaluate(STATE),
        )

    def _compare(self, seat: Seat, state: dict[str, Any]) -> None:
        assert seat.page is not None
        if not seat.compared:
            events = patiently(lambda: all_events(self.studio, seat.visitor, seat.job))
            ends = [
                event["data"]["to"] for event in events if event["kind"] == "status" and event["data"]["to"] in WORDS
            ]
            assert len(ends) == 1 and events[-1]["data"].get("to") == ends[0] != "failed", (seat.job, ends, events[-1])
            assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
            wanted = expected(events)
            assert wanted["step"] == list(range(1, len(wanted["step"]) + 1))
            assert seat.page.evaluate(SERIES) == wanted, (seat.job, state)
            seat.compared, seat.ended = True, time.monotonic()
        assert set(state["said"][state["said"].index("over") :]) == {"over"}, (seat.job, state)
        if WORDS.get(state["status"]) == state["shown"]:
            self.told.times += 1
            seat.page.close()
            seat.page, seat.job = None, ""
        else:
            assert time.monotonic() < seat.ended + PATIENCE, (seat.job, state)

    def _status(self, seat: Seat) -> str:
        try:
            return str(self.studio.get(seat.visitor, f"/api/v1/jobs/{seat.job}")["status"])
        except (Error, AssertionError):
            return ""

    def _strike(self) -> None:
        """A fault, when it is time. A page whose run has been over for a while is left in peace, so that it can say so."""
        now = time.monotonic()
        if now > self.next_kill:
            name = self.dice.choices(list(KILLS), list(KILLS.values()))[0]
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.studio.processes()[name], signal.SIGKILL)
                self.struck[f"{name} killed"] += 1
            self.next_kill = now + self.dice.uniform(*KILL_SECONDS)
        watched = [seat for seat in self.seats if seat.page and now < (seat.ended or math.inf) + 5]
        if now > self.next_strike and watched:
            kind = self.dice.choices(list(STRIKES), list(STRIKES.values()))[0]
            self.struck[kind] += self._strike_at(self.dice.choice(watched), kind)
            self.next_strike = now + self.dice.uniform(*STRIKE_SECONDS)
        self.told.note = ", ".join(f"{number} × {name}" for name, number in sorted(self.struck.items()))

    def _strike_at(self, seat: Seat, kind: str) -> int:
        assert seat.page is not None
        if kind == "socket cut":
            return self.lines.cut(seat.job)
        if kind == "socket silent":
            return self.lines.silence(seat.job)
        if kind == "tab closed":
            seat.page.close()
            seat.page, seat.back = None, time.monotonic() + self.dice.uniform(0.0, 3.0)
        elif not seat.online:
            seat.visitor.set_offline(True)
            seat.online = time.monotonic() + self.dice.uniform(0.2, 4.0)
        return 1


@pytest.fixture
def lines(place: Installation) -> Iterator[Lines]:
    with Lines(place.port) as made:
        yield made


def test_whatever_falls_a_page_ends_with_the_series_that_is_stored(
    place: Installation, lines: Lines, new_visitor: NewVisitor, capsys: pytest.CaptureFixture[str]
) -> None:
    seats = [Seat(new_visitor()) for _ in range(min(TABS, NUM_RUNS))]
    for seat in seats:
        seat.visitor.add_init_script(LISTEN)
    with drill(
        "watchers",
        "a run is watched in a tab, several at once; sockets are cut or fall silent, tabs are closed and opened again, the network "
        "goes and comes, web process and consumer are killed, all at random moments",
        unit="runs",
        place="tests/e2e/test_drill_watchers.py",
        setting="BONSAI_DRILL_WATCHERS",
    ) as told:
        began = time.monotonic()
        Drill(place, seats, lines, told).run()
    assert told.times >= min(NUM_RUNS, len(seats))
    with capsys.disabled():
        print(f"\n{told.times} runs in {time.monotonic() - began:.0f} s: {told.note}")
    patiently(lambda: place.get(seats[0].visitor, "/api/v1/health"))
