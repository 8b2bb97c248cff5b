"""Pictures of every page for people to look at: `make shots` writes them to var/shots. Light and dark, wide, medium and phone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from tests.e2e.conftest import TABLE
from tests.e2e.installation import ROOT, Installation

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
FOLDER = ROOT / "var" / "shots"
STEPS = ("goal", "data", "how", "check")
EMPTY = {"home": "/", "data": "/data/", "runs": "/runs/", "results": "/results/"}
FULL = {
    "home": "/", "data": "/data/", "models": "/models/", "methods": "/methods/", "method": "/methods/lora/", "runs": "/runs/",
    "results": "/results/", "account": "/account/", "help": "/help/", "search": "/search/?q=lo",
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "operation": "train",
    "task": "classify",
    "data": {"source": "starter:customer-messages"},
    "model": {"source": "starter:minilm-l6"},
    "methods": [{"slug": "paca"}, {"slug": "early-dynamics-stopping"}],
    "settings": {"max_steps": 40, "evaluations": 4, "max_length": 24, "batch_size": 8},
}


@pytest.fixture(scope="module")
def studio(
    tmp_path_factory: pytest.TempPathFactory, browser_type_launch_args: dict[str, Any]
) -> Iterator[Installation]:
    """An installation of its own, so that the empty states are empty."""
    installation = Installation(tmp_path_factory.mktemp("shots"))
    installation.start()
    yield installation
    installation.stop()


def enter(studio: Installation, browser: Browser, **options: Any) -> BrowserContext:
    context = browser.new_context(base_url=studio.address, reduced_motion="reduce", **options)
    studio.log_in(context)
    return context


def looks(browser: Browser, studio: Installation) -> Iterator[tuple[str, BrowserContext]]:
    """Every theme at every width."""
    for theme in ("light", "dark"):
        for width, height in ((1440, 900), (768, 1024), (390, 844)):
            context = enter(studio, browser, color_scheme=theme, viewport={"width": width, "height": height})
            yield f"{theme}-{width}", context
            context.close()


def shoot(page: Page, look: str, name: str) -> Path:
    """One picture of the whole page, from its top."""
    path = FOLDER / look / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(250)
    page.screenshot(path=path, full_page=True, animations="disabled")
    return path


def wait_for_starters(studio: Installation, context: BrowserContext) -> None:
    until = time.monotonic() + 120
    while not studio.get(context, "/api/v1/models")["count"]:
        assert time.monotonic() < until, "The starter models did not come."
        time.sleep(0.5)


def finished_run(studio: Installation, context: BrowserContext, name: str) -> str:
    job = studio.post(context, "/api/v1/jobs", {**RECIPE, "name": name})["id"]
    until = time.monotonic() + 300
    while (state := studio.get(context, f"/api/v1/jobs/{job}"))["status"] != "succeeded":
        assert state["status"] not in ("failed", "cancelled") and time.monotonic() < until, state
        time.sleep(1)
    return str(job)


def test_shots_of_the_beginning(studio: Installation, browser: Browser) -> None:
    for look, context in looks(browser, studio):
        page = context.new_page()
        wait_for_starters(studio, context)
        for name, address in EMPTY.items():
            page.goto(address)
            shoot(page, look, f"empty-{name}")
        context.clear_cookies()
        for name, address in (("login", "/"), ("missing", "/nowhere/")):
            page.goto(address)
            shoot(page, look, name)
    assert len(list(FOLDER.rglob("empty-*.png"))) >= 6 * len(EMPTY)


def test_shots_of_everything(studio: Installation, browser: Browser, tmp_path: Path) -> None:
    context = enter(studio, browser)
    wait_for_starters(studio, context)
    page = context.new_page()
    table = tmp_path / "garden.csv"
    table.write_text(TABLE + ",praise\nI like it,Praise\n", encoding="utf-8")
    page.goto("/data/")
    page.set_input_files("#file", table)
    page.wait_for_url("**/data/*-*/")
    dataset = page.url.removeprefix(studio.address)
    job = finished_run(studio, context, "Sort customer messages")
    result = studio.get(context, "/api/v1/artifacts")["items"][0]["id"]
    model = studio.get(context, "/api/v1/models")["items"][0]["id"]
    live = studio.post(
        context, "/api/v1/jobs", {**RECIPE, "name": "A longer look", "settings": {"epochs": 30, "max_length": 32}}
    )
    studio.post(context, "/api/v1/jobs", {**RECIPE, "name": "Waits for its turn"})
    while studio.get(context, f"/api/v1/jobs/{live['id']}")["done_steps"] < 12:
        time.sleep(1)
    own = {
        "dataset": dataset,
        "model": f"/models/{model}/",
        "run": f"/runs/{job}/",
        "live": f"/runs/{live['id']}/",
        "result": f"/results/{result}/",
    }
    context.close()
    for look, visitor in looks(browser, studio):
        page = visitor.new_page()
        for name, address in {**FULL, **own}.items():
            page.goto(address)
            page.wait_for_timeout(800 if name in ("run", "live", "result") else 0)
            shoot(page, look, name)
        page.goto("/new/?fresh=1&goal=classify")
        for step in STEPS:
            page.goto(f"/new/?at={step}")
            shoot(page, look, f"new-{step}")
            if step != "check":
                page.get_by_role("button", name="Continue").click()
                page.wait_for_timeout(600)
    pictures = list(FOLDER.rglob("*.png"))
    assert all(picture.stat().st_size > 5_000 for picture in pictures) and len(pictures) >= 6 * (len(FULL) + len(own))
