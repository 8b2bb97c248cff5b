"""One installation for the tests that only walk through pages, and a browser that complains aloud."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from tests.e2e.installation import Installation

TABLE = "text,label\n" + "".join(
    f"I {verb} the garden in week {week},{label}\n"
    for week in range(12)
    for verb, label in (("love", "praise"), ("miss", "complaint"))
)
NewVisitor = Callable[..., BrowserContext]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, browser_type_launch_args: dict[str, Any]) -> Iterator[Installation]:
    """A running studio with the starters in place; asking for the browser first means that without one nothing is started."""
    installation = Installation(tmp_path_factory.mktemp("place"))
    installation.start()
    yield installation
    installation.stop()


@pytest.fixture(scope="session")
def session_cookies(place: Installation, browser: Browser) -> list[Any]:
    """Logged in once, by the form; waits until the starters are there."""
    context = browser.new_context()
    place.log_in(context)
    until = time.monotonic() + 120
    while not place.get(context, "/api/v1/models")["count"]:
        assert time.monotonic() < until, "The starter models did not come."
        time.sleep(0.5)
    cookies = context.cookies()
    context.close()
    return cookies


@pytest.fixture
def new_visitor(place: Installation, browser: Browser, session_cookies: list[Any]) -> Iterator[NewVisitor]:
    """Contexts of a person who is logged in; keywords as for a Playwright context."""
    opened: list[BrowserContext] = []

    def make(**options: Any) -> BrowserContext:
        context = browser.new_context(base_url=place.address, **{"viewport": {"width": 1280, "height": 900}, **options})
        context.add_cookies(session_cookies)
        context.set_default_timeout(20_000)
        opened.append(context)
        return context

    yield make
    for context in opened:
        context.close()


@pytest.fixture
def page(new_visitor: NewVisitor) -> Iterator[Page]:
    """A page whose every complaint fails the test: errors, refused resources, breaches of the policy."""
    page = new_visitor().new_page()
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    assert not complaints, complaints


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A small table on the disk of the visitor."""
    path = tmp_path / "garden.csv"
    path.write_text(TABLE, encoding="utf-8")
    return path
