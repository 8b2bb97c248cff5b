"""What holds on every page: nobody is shut out, nothing jumps, nothing is heavy, the theme stays."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import NewVisitor

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
PAGES = (
    "/",
    "/new/",
    "/data/",
    "/models/",
    "/methods/",
    "/methods/lora/",
    "/account/",
    "/help/",
    "/search/?q=lo",
    "/runs/",
    "/results/",
)
NOT_OURS = ("plotly", "/fonts/", "htmx-2")
SHIFT = """() => new Promise((done) => { let sum = 0;
  new PerformanceObserver((list) => { for (const entry of list.getEntries()) if (!entry.hadRecentInput) sum += entry.value; })
    .observe({ type: 'layout-shift', buffered: true });
  setTimeout(() => done(sum), 400); })"""


def addresses(page: Page) -> list[str]:
    """Every page, with one of each thing that there is."""
    found = list(PAGES)
    for start, prefix in (("/data/", "/data/"), ("/models/", "/models/"), ("/runs/", "/runs/")):
        page.goto(start)
        links = page.locator(f"main a[href^='{prefix}']").evaluate_all(
            "links => links.map(link => link.getAttribute('href'))"
        )
        found += [link for link in links if link.count("/") == 3 and len(link) > 40][:1]
    return found


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core as its Python package brings it; skips where the package is not installed."""
    spec = importlib.util.find_spec("axe_playwright_python")
    path = Path(spec.origin).parent / "axe.min.js" if spec and spec.origin else None
    if path is None or not path.is_file():
        pytest.skip("axe-core is not installed: `make env-dev` brings it with axe-playwright-python.")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(new_visitor: NewVisitor, axe: str, theme: str, width: int) -> None:
    context = new_visitor(
        color_scheme=theme, viewport={"width": width, "height": 850}, bypass_csp=True, reduced_motion="reduce"
    )
    page = context.new_page()
    found = []
    for address in addresses(page):
        page.goto(address)
        page.evaluate(axe)
        for fold in page.locator("main details").all():
            fold.evaluate("fold => { fold.open = true }")
        answer = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
        found += [
            f"{address}: {item['id']}: {item['help']}: {item['nodes'][0]['html'][:200]}"
            for item in answer["violations"]
        ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("step", ["goal", "data", "how", "check"])
def test_axe_finds_nothing_in_the_steps(new_visitor: NewVisitor, axe: str, step: str) -> None:
    page = new_visitor(bypass_csp=True).new_page()
    page.goto("/new/?goal=classify&fresh=1")
    while page.get_by_role("button", name="Continue").count():
        if page.locator("input[name=step]").input_value() == step:
            break
        before = page.locator("input[name=step]").input_value()
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("input[name=step]")).not_to_have_value(before)
    if step == "goal":
        page.goto("/new/?at=goal")
    assert page.locator("input[name=step]").input_value() == step
    for fold in page.locator("main details").all():
        fold.evaluate("fold => { fold.open = true }")
    page.evaluate(axe)
    answer = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    found = [f"{item['id']}: {item['nodes'][0]['html'][:300]}" for item in answer["violations"]]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("width", [1440, 768, 390, 640])
def test_nothing_sticks_out(new_visitor: NewVisitor, width: int) -> None:
    """640 wide is also what remains of 1280 at a zoom of 200 %."""
    page = new_visitor(viewport={"width": width, "height": 800}).new_page()
    for address in addresses(page):
        page.goto(address)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{address} is {wide} px wide at {width}"


def test_pages_are_light_and_still(new_visitor: NewVisitor) -> None:
    """The first visit, nothing in the cache: bytes and requests of markup, styles and scripts, without charts, letters and htmx; pages travel compressed."""
    for address in PAGES:
        context = new_visitor()
        page = context.new_page()
        sizes: dict[str, int] = {}
        page.on("requestfinished", lambda done, sizes=sizes: sizes.update({done.url: done.sizes()["responseBodySize"]}))
        began = time.monotonic()
        page.goto(address, wait_until="load")
        took = time.monotonic() - began
        shift = page.evaluate(SHIFT)
        counted = {url: size for url, size in sizes.items() if not any(mark in url for mark in NOT_OURS)}
        assert sum(counted.values()) < 120_000, (address, counted)
        assert len(counted) <= 20, (address, counted)
        assert shift < 0.02, (address, shift)
        assert took < 5, (address, took)
        page.close()


def test_the_theme_follows_is_chosen_and_is_remembered(page: Page) -> None:
    ground = "() => getComputedStyle(document.documentElement).backgroundColor"
    page.emulate_media(color_scheme="dark")
    page.goto("/account/")
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert dark != light
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate(ground) == dark
    expect(page.get_by_role("button", name="Dark")).to_have_attribute("aria-pressed", "true")
    page.goto("/data/")
    assert page.evaluate(ground) == dark, "on every page"
    page.goto("/account/")
    page.get_by_role("button", name="System").click()
    assert page.evaluate(ground) == light


def test_a_chosen_theme_never_flashes(new_visitor: NewVisitor) -> None:
    context = new_visitor(color_scheme="light")
    page = context.new_page()
    page.goto("/account/")
    page.get_by_role("button", name="Dark").click()
    dark = page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor")
    page.add_init_script(
        """const seen = window.seen = []; new MutationObserver(() => { if (document.body) seen.push(document.documentElement.dataset.theme); })
        .observe(document, {childList: true, subtree: true});"""
    )
    page.goto("/data/")
    seen = page.evaluate("() => [...new Set(window.seen)]")
    assert seen == ["dark"], "the theme is set before there is a body to paint"
    assert page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor") == dark


def test_shortcuts_rest_while_typing_and_can_be_switched_off(page: Page) -> None:
    page.goto("/")
    page.keyboard.press("?")
    expect(page.locator("#shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#shortcuts")).to_be_hidden()
    page.keyboard.press("/")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("n?g")
    expect(page.locator("#search")).to_have_value("n?g")
    page.goto("/account/")
    page.get_by_role("button", name="Off").click()
    page.goto("/")
    page.keyboard.press("n")
    page.wait_for_timeout(300)
    assert page.url.endswith("/")


def test_a_key_pressed_before_a_closed_dialog_has_given_the_focus_back_still_counts(page: Page) -> None:
    page.goto("/")
    page.keyboard.press("?")
    expect(page.locator("#shortcuts")).to_be_visible()
    inside = page.evaluate(
        """() => {
          const dialog = document.getElementById("shortcuts");
          const focused = document.activeElement;
          dialog.close();
          focused.dispatchEvent(new KeyboardEvent("keydown", {key: "/", bubbles: true, cancelable: true}));
          return dialog.contains(focused);
        }"""
    )
    assert inside, "the dialog had the focus"
    expect(page.locator("#search")).to_be_focused()


def test_search_by_keyboard(page: Page) -> None:
    page.goto("/")
    page.keyboard.press("/")
    page.keyboard.type("lora")
    expect(page.locator(".found a").first).to_be_visible()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".found a").first).to_be_focused()
    page.keyboard.press("Enter")
    page.wait_for_url("**/methods/lora/")


def test_filters_work_in_place_and_have_an_address(page: Page) -> None:
    page.goto("/methods/")
    page.get_by_label("What it decides").select_option("optimizer")
    expect(page.locator("#garden")).to_contain_text("AdamW")
    expect(page.locator("#garden")).not_to_contain_text("LoRA")
    page.wait_for_url("**slot=optimizer**")
    page.reload()
    expect(page.get_by_label("What it decides")).to_have_value("optimizer")


def test_words_explain_themselves(page: Page) -> None:
    page.goto("/models/")
    page.get_by_role("button", name="model", exact=True).click()
    said = page.locator(".popup:popover-open")
    expect(said).to_contain_text("A large table of numbers")
    box = said.bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= 1280
    page.keyboard.press("Escape")
    expect(said).to_have_count(0)


def test_the_phone_has_everything_within_reach(new_visitor: NewVisitor) -> None:
    page = new_visitor(viewport={"width": 390, "height": 844}, has_touch=True).new_page()
    page.goto("/")
    for name in ("Home", "New run", "Runs", "Data"):
        box = page.locator(".rail .places").get_by_role("link", name=name).bounding_box()
        assert box and box["height"] >= 44 and box["width"] >= 44
    page.get_by_role("button", name="More").click()
    page.locator("#more").get_by_role("link", name="Methods").click()
    page.wait_for_url("**/methods/")
