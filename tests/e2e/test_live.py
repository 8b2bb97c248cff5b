"""A real run, watched while it learns: points arrive, connections break, and not one point is lost."""

from __future__ import annotations

import time
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Route, WebSocketRoute, expect

from tests.e2e.conftest import NewVisitor
from tests.e2e.installation import Installation
from tests.e2e.watching import POINTS, RECIPE, SERIES, SHORT, all_events, expected, until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
COLOUR = "() => document.querySelector('#plot').data[0].line.color"
NO_SOCKETS = (
    "window.WebSocket = class { constructor() { setTimeout(() => this.onclose({ code: 1006 }), 20); } close() {} };"
)
LIVE_MS, LONG_MS = 60_000, 240_000


@pytest.fixture
def studio(place: Installation) -> Installation:
    return place


@pytest.fixture
def visitor(new_visitor: NewVisitor) -> BrowserContext:
    return new_visitor()


class Sockets:
    """Stands between the page and the socket, so that a test can cut the line and keep it cut."""

    def __init__(self, page: Page) -> None:
        self.open: list[WebSocketRoute] = []
        self.refuse = False
        self.num = 0
        page.route_web_socket("**/ws/jobs/**", self._take)

    def _take(self, socket: WebSocketRoute) -> None:
        self.num += 1
        if self.refuse:
            socket.close(code=1012)
            return
        socket.connect_to_server()
        self.open.append(socket)

    def cut(self) -> None:
        while self.open:
            self.open.pop().close(code=1012)


def recoloured(page: Page, colour: str) -> bool:
    for _ in range(20):
        if page.evaluate(COLOUR) != colour:
            return True
        page.wait_for_timeout(200)
    return False


def test_a_run_is_watched_through_broken_lines(studio: Installation, visitor: BrowserContext) -> None:
    complaints: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and "WebSocket" not in message.text:
            complaints.append(message.text)

    page = visitor.new_page()
    page.on("console", listen)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    sockets = Sockets(page)
    job = studio.post(visitor, "/api/v1/jobs", RECIPE)["id"]
    page.goto(f"{studio.address}/runs/{job}/")
    expect(page.locator("h1")).to_contain_text("sort texts into topics with PaCA on MiniLM")
    state = page.locator("#connection span")
    expect(state).to_have_text("Live", timeout=LIVE_MS)

    # Points arrive by the socket, and are drawn.
    until(page, 4)
    expect(page.locator("#plot .scatterlayer .trace").first).to_be_attached()
    expect(page.locator(".lede")).to_contain_text("% done")
    assert page.title()[: page.title().index(" %")].isdigit()

    # The line is cut and stays cut: asking brings the points.
    sockets.refuse = True
    sockets.cut()
    expect(state).to_have_text("Looking every two seconds", timeout=LIVE_MS)
    before = page.evaluate(POINTS)
    until(page, before + 4)

    # The line is back: the socket goes on from the last number.
    sockets.refuse = False
    num = sockets.num
    expect(state).to_have_text("Live", timeout=LIVE_MS)
    assert sockets.num > num

    # A reload in the middle shows the same curve, complete.
    now = page.evaluate(SERIES)
    page.reload()
    until(page, len(now["step"]))
    again = page.evaluate(SERIES)
    assert again["step"][: len(now["step"])] == now["step"] == list(range(1, len(now["step"]) + 1))

    # One more cut, short this time; then the end.
    sockets.cut()
    expect(page.locator(".run-status .status")).to_contain_text("Finished", timeout=LONG_MS)
    expect(page.get_by_role("link", name="See the result")).to_be_visible()
    until(page, 60)
    events = all_events(studio, visitor, job)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    wanted = expected(events)
    assert wanted["step"] == list(range(1, 61))
    watched = page.evaluate(SERIES)
    assert watched == wanted
    page.reload()
    until(page, 60)
    assert page.evaluate(SERIES) == wanted

    # The curve follows its controls and the theme.
    page.click("[data-axis=step]")
    expect(page.locator("#plot .xtitle")).to_have_text("steps")
    colour = page.evaluate(COLOUR)
    page.emulate_media(color_scheme="dark")
    assert recoloured(page, colour)

    # The result answers.
    page.get_by_role("link", name="See the result").click()
    expect(page.locator("h1")).to_contain_text("on new examples")
    page.fill("#try-text", "Where is my parcel? It should have come on Monday.")
    page.get_by_role("button", name="Let it decide").click()
    expect(page.locator("#answer .answer-label")).not_to_be_empty(timeout=LIVE_MS)
    expect(page.locator("#answer .bars rect").first).to_be_attached()
    assert not complaints, complaints


def test_a_run_is_steered_by_keyboard_and_without_scripts(
    studio: Installation, visitor: BrowserContext, new_visitor: NewVisitor
) -> None:
    quiet = {**RECIPE, "name": "Stopped run", "settings": {**RECIPE["settings"], "max_steps": 2000, "epochs": 500}}
    job = studio.post(visitor, "/api/v1/jobs", quiet)["id"]
    page = visitor.new_page()
    page.goto(f"{studio.address}/runs/{job}/")
    until(page, 3)

    # Cancel asks in a dialog, and letting it go on changes nothing.
    page.locator("#do-cancel").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("thrown away")
    page.keyboard.press("Enter")  # the focus is on "Let it go on"
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert studio.get(visitor, f"/api/v1/jobs/{job}")["status"] == "running"

    # Without scripts the same buttons are plain forms.
    bare = new_visitor(java_script_enabled=False).new_page()
    bare.goto(f"{studio.address}/runs/{job}/")
    expect(bare.locator("h1")).to_contain_text("Learning to sort texts")
    expect(bare.locator(".still polyline").first).to_be_attached()
    bare.get_by_role("button", name="Pause").click()
    expect(bare.locator(".messages")).to_contain_text("everything is saved")
    expect(page.locator(".run-status .status")).to_contain_text("Paused", timeout=LONG_MS)

    # Resumed by keyboard, it goes on from where it was; cancelled without scripts, it asks on a page of its own.
    steps = page.evaluate(POINTS)
    page.locator("#do-resume").focus()
    with page.expect_navigation():
        page.keyboard.press("Enter")
    until(page, steps + 2)
    series = page.evaluate(SERIES)
    assert series["step"] == list(range(1, len(series["step"]) + 1))
    bare.goto(f"{studio.address}/runs/{job}/")
    bare.get_by_role("button", name="Cancel").click()
    bare.get_by_role("button", name="Cancel the run").click()
    expect(page.locator(".run-status .status")).to_contain_text("Cancelled", timeout=LONG_MS)


def test_long_curves_are_thinned_without_losing_a_spike(studio: Installation, visitor: BrowserContext) -> None:
    page = visitor.new_page()
    page.goto(f"{studio.address}/runs/")
    found = page.evaluate(
        """async () => {
          const { thinned, smoothed, Curves } = await import('/static/js/charts.js');
          const values = Array.from({ length: 100000 }, (_, place) => Math.sin(place / 900));
          values[54321] = 40;
          values[77777] = -40;
          const places = thinned(values, 0, values.length, 2400);
          const curves = new Curves();
          const row = (step) => ({ step, samples: 4 * step, seconds: step / 2, loss: 1 / step, grad_norm: 1 });
          curves.addRows([row(1), row(2), row(3)]);
          curves.addRows([row(2), row(3), row(4)]);
          curves.addMeasurement(3, { samples: 12, eval_loss: 0.5 });
          return {
            num: places.length, kept: [54321, 77777, 99999].every((place) => places.includes(place)),
            ordered: places.every((place, index) => index === 0 || place > places[index - 1]),
            constant: smoothed([3, 3, null, 3], 0.9), anew: smoothed([1, 1, 5, 5], 0.9, [4, 8, 4, 8]), steps: curves.loss.step, seconds: curves.held.seconds,
          };
        }"""
    )
    assert found["num"] <= 2400 and found["kept"] and found["ordered"]
    assert [value and round(value, 9) for value in found["constant"]] == [3, 3, None, 3]
    assert [round(value, 9) for value in found["anew"]] == [1, 1, 5, 5], "another trial of a search"
    assert found["steps"] == [1, 2, 3, 4] and found["seconds"] == [1.5]


def test_a_run_that_ends_before_its_curves_have_come_is_shown_as_ended(
    studio: Installation, visitor: BrowserContext
) -> None:
    """Then everything that happened is in the curves, and no event is left that could tell the page."""
    page = visitor.new_page()
    page.add_init_script(
        """const asked = window.fetch;
        window.fetch = async (...what) => {
          if (String(what[0]).includes('/series')) await new Promise((go) => setTimeout(go, 9000));
          return asked(...what);
        };"""
    )
    short = {**RECIPE, "name": "Over at once", "settings": {**RECIPE["settings"], "max_steps": 2, "evaluations": 1}}
    job = studio.post(visitor, "/api/v1/jobs", short)["id"]
    page.goto(f"/runs/{job}/")
    expect(page.locator("main .status.succeeded").first).to_be_visible(timeout=LIVE_MS)
    expect(page.locator("#connection")).to_have_attribute("data-kind", "over", timeout=LIVE_MS)


def test_a_run_that_is_followed_by_asking_alone_is_shown_as_ended(
    studio: Installation, visitor: BrowserContext
) -> None:
    """Where a proxy lets no socket through, the last event comes with an answer, and nothing that is said later may hide the end."""
    page = visitor.new_page()
    page.add_init_script(NO_SOCKETS)
    short = {**RECIPE, "name": "Only asked", "settings": {**RECIPE["settings"], "max_steps": 2, "evaluations": 1}}
    job = studio.post(visitor, "/api/v1/jobs", short)["id"]
    page.goto(f"/runs/{job}/")
    state = page.locator("#connection")
    expect(state).to_have_attribute("data-kind", "slow")
    expect(state).to_have_attribute("data-kind", "over", timeout=LIVE_MS)
    expect(page.locator("main .status.succeeded").first).to_be_visible(timeout=LIVE_MS)
    page.wait_for_timeout(2500)
    expect(state).to_have_attribute("data-kind", "over")


def ended(studio: Installation, visitor: BrowserContext, job: str) -> dict[str, list[Any]]:
    """Wait until a run is over; what a page of it should hold."""
    end = time.monotonic() + LONG_MS / 1000
    while studio.get(visitor, f"/api/v1/jobs/{job}")["status"] != "succeeded":
        assert time.monotonic() < end
        time.sleep(0.2)
    return expected(all_events(studio, visitor, job))


def test_a_run_is_not_over_for_the_page_before_its_last_events_have_come(
    studio: Installation, visitor: BrowserContext
) -> None:
    """A sentence tells of the end while the studio cannot be asked for the points that came before it."""
    page = visitor.new_page()
    page.add_init_script(NO_SOCKETS)
    waiting: list[Route] = []
    job = studio.post(visitor, "/api/v1/jobs", SHORT)["id"]
    page.goto(f"/runs/{job}/")
    page.route("**/parts/", lambda route: waiting.append(route))
    until(page, 1)
    page.route("**/events?*", lambda route: route.abort())
    wanted = ended(studio, visitor, job)
    page.unroute("**/parts/")
    for route in waiting:
        route.continue_()
    expect(page.locator(".run-status .status")).to_contain_text("Finished", timeout=LIVE_MS)
    expect(page.locator("#connection")).to_have_attribute("data-kind", "off")
    page.unroute("**/events?*")
    expect(page.locator("#connection")).to_have_attribute("data-kind", "over", timeout=LIVE_MS)
    assert page.evaluate(SERIES) == wanted

    # The page is loaded again, and the studio goes away before it has asked for the curves.
    page.route("**/series?*", lambda route: route.abort())
    page.reload()
    expect(page.locator("#connection")).to_have_attribute("data-kind", "off")
    page.unroute("**/series?*")
    expect(page.locator("#connection")).to_have_attribute("data-kind", "over", timeout=LIVE_MS)
    assert page.evaluate(SERIES) == wanted


def test_the_last_sentence_is_asked_for_until_it_comes(studio: Installation, visitor: BrowserContext) -> None:
    page = visitor.new_page()
    job = studio.post(visitor, "/api/v1/jobs", SHORT)["id"]
    page.goto(f"/runs/{job}/")
    page.route("**/parts/", lambda route: route.abort())
    expect(page.locator("#connection")).to_have_attribute("data-kind", "over", timeout=LIVE_MS)
    page.wait_for_timeout(2500)
    assert page.locator(".run-status .status").text_content() != "Finished"
    page.unroute("**/parts/")
    expect(page.locator(".run-status .status")).to_contain_text("Finished", timeout=LIVE_MS)
    assert page.evaluate(SERIES) == ended(studio, visitor, job)


def test_an_answer_that_never_comes_is_not_waited_for(studio: Installation, visitor: BrowserContext) -> None:
    """A network may swallow a question. Here the page's patience is a tenth of what it is."""
    page = visitor.new_page()
    page.add_init_script(
        "const long = AbortSignal.timeout; AbortSignal.timeout = (ms) => long.call(AbortSignal, ms / 10);"
    )
    swallowed: list[Route] = []
    page.route("**/series?*", lambda route: swallowed.append(route), times=1)
    page.route("**/parts/", lambda route: swallowed.append(route), times=1)
    job = studio.post(visitor, "/api/v1/jobs", SHORT)["id"]
    page.goto(f"/runs/{job}/")
    expect(page.locator("#connection")).to_have_attribute("data-kind", "over", timeout=LIVE_MS)
    expect(page.locator(".run-status .status")).to_contain_text("Finished", timeout=LIVE_MS)
    assert len(swallowed) == 2 and page.evaluate(SERIES) == ended(studio, visitor, job)
