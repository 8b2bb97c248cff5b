"""The whole way of a person: bring data, answer four questions, start, watch. With the mouse, with the keyboard alone, without scripts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import FileChooser, Page, TimeoutError, expect

from tests.e2e.conftest import TABLE, NewVisitor

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
RUN_MS = 240_000


def tab_to(page: Page, wanted: str, *, back: bool = False) -> None:
    """Press Tab until the focus stands on something whose name or text matches."""
    pattern = re.compile(wanted)
    seen = []
    for _ in range(120):
        page.keyboard.press("Shift+Tab" if back else "Tab")
        name = page.evaluate(
            """() => { const at = document.activeElement;
            return (at.labels && at.labels[0] ? at.labels[0].innerText : '') + ' ' + (at.getAttribute('aria-label') || '') + ' '
              + (at.innerText || '') + ' ' + (at.name || ''); }"""
        )
        seen.append(" ".join(name.split())[:50])
        if pattern.search(name):
            return
    pytest.fail(f"Tab never reached {wanted!r}; it went over {seen}")


def focus_is_visible(page: Page) -> bool:
    """Whether the element with the focus, or the card around it, has a ring."""
    return bool(
        page.evaluate(
            """() => { let at = document.activeElement;
            for (let step = 0; at && step < 3; step += 1, at = at.parentElement) {
              const style = getComputedStyle(at);
              if (style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2) return true;
            } return false; }"""
        )
    )


def ends_well(page: Page) -> None:
    """The run goes through and its page says so."""
    expect(page.locator("h1")).to_be_visible()
    expect(page.locator("main .status.succeeded").first).to_be_visible(timeout=RUN_MS)


def test_from_a_table_to_a_trained_model(page: Page, table: Path) -> None:
    page.goto("/data/")
    page.set_input_files("#file", table)
    page.wait_for_url(re.compile(r"/data/[0-9a-f-]{36}/"))
    expect(page.locator("h1")).to_have_text("garden.csv")
    expect(page.locator(".lede")).to_have_text("24 rows, each a text with one of 2 labels.")
    page.get_by_role("link", name="Train on this").click()
    expect(page.locator(".step.open h2")).to_have_text("How?")
    page.locator("label.choice", has_text="LoRA").first.click()
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".step.open h2")).to_have_text("Check and start")
    expect(page.locator(".summary")).to_contain_text("Ready to start")
    page.get_by_role("button", name="Start the run").click()
    page.wait_for_url(re.compile(r"/runs/[0-9a-f-]{36}/"))
    ends_well(page)


def test_a_file_can_be_dropped(page: Page) -> None:
    page.goto("/data/")
    page.evaluate(
        """(text) => { const things = new DataTransfer(); things.items.add(new File([text], 'dropped.csv', {type: 'text/csv'}));
        document.querySelector('[data-drop]').dispatchEvent(new DragEvent('drop', {dataTransfer: things, bubbles: true, cancelable: true})); }""",
        TABLE,
    )
    page.wait_for_url(re.compile(r"/data/[0-9a-f-]{36}/"))
    expect(page.locator("h1")).to_have_text("dropped.csv")


def test_a_file_that_cannot_be_used_is_refused_where_it_was_dropped(new_visitor: NewVisitor, tmp_path: Path) -> None:
    page = new_visitor().new_page()  # the refused request is a complaint of the console, and wanted here
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": 1', encoding="utf-8")
    page.goto("/data/")
    page.set_input_files("#file", broken)
    expect(page.locator("[data-faults] .note.error")).to_be_visible()
    expect(page.locator("[data-drop] .busy")).to_be_hidden()
    expect(page.locator("[data-faults]")).to_be_focused()
    assert page.url.endswith("/data/")


def chosen_by_key(page: Page, key: str) -> FileChooser:
    """The file dialog that a key opens. A busy machine now and then swallows the first key press; a person presses again."""
    for _ in range(3):
        try:
            with page.expect_file_chooser(timeout=8_000) as chooser:
                page.keyboard.press(key)
            return chooser.value
        except TimeoutError:
            tab_to(page, "File to upload")
    raise AssertionError(f"{key} opens no file dialog.")


def test_with_the_keyboard_alone(page: Page, table: Path) -> None:
    page.goto("/")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#content")).to_be_focused()
    page.keyboard.press("g")
    page.keyboard.press("d")
    page.wait_for_url("**/data/")
    tab_to(page, "File to upload")
    assert focus_is_visible(page)
    chosen_by_key(page, "Space").set_files(table)
    page.wait_for_url(re.compile(r"/data/[0-9a-f-]{36}/"))
    page.keyboard.press("n")
    page.wait_for_url("**/new/")
    if page.get_by_role("button", name="Begin anew").count():
        tab_to(page, "Begin anew")
        page.keyboard.press("Enter")
        expect(page.locator(".step.open h2")).to_have_text("What do you want?")
    tab_to(page, "Sort texts")
    assert focus_is_visible(page)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    expect(page.locator(".step.open h2")).to_have_text("What do you want?")  # arrows choose, they do not go on
    page.keyboard.press("Enter")
    expect(page.locator("#step-data")).to_be_focused()
    tab_to(page, "garden.csv")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    expect(page.locator("#step-how")).to_be_focused()
    tab_to(page, "Continue")
    assert focus_is_visible(page)
    page.keyboard.press("Enter")
    expect(page.locator("#step-check")).to_be_focused()
    tab_to(page, "Passes over the data")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("2")
    tab_to(page, "Put back|Examples at a time")
    expect(page.locator(".summary")).to_contain_text("Ready to start")
    tab_to(page, "Start the run")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/runs/[0-9a-f-]{36}/"))
    ends_well(page)


def test_without_any_script(new_visitor: NewVisitor, table: Path) -> None:
    page = new_visitor(java_script_enabled=False).new_page()
    page.goto("/data/")
    page.set_input_files("#file", table)
    page.get_by_role("button", name="Upload", exact=True).click()
    page.wait_for_url(re.compile(r"/data/[0-9a-f-]{36}/"))
    page.get_by_role("link", name="Train on this").click()
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".step.open h2")).to_have_text("Check and start")
    page.get_by_label("Passes over the data").fill("many")
    page.get_by_role("button", name="Start the run").click()
    expect(page.locator(".fault-list")).to_contain_text("That is not a number")
    page.get_by_label("Passes over the data").fill("1")
    page.get_by_role("button", name="Start the run").click()
    page.wait_for_url(re.compile(r"/runs/[0-9a-f-]{36}/"))


def _check_step(page: Page) -> None:
    page.goto("/new/?goal=classify&fresh=1")
    while page.locator(".step.open h2").inner_text() != "Check and start":
        title = page.locator(".step.open h2").inner_text()
        page.get_by_role("button", name="Continue").click()
        expect(page.locator(".step.open h2")).not_to_have_text(title)


def test_the_summary_is_always_true(page: Page) -> None:
    _check_step(page)
    steps: Callable[[], str] = lambda: page.locator(".estimate").inner_text()  # noqa: E731
    before = steps()
    rate = page.get_by_label("Learning rate")
    advised = rate.input_value()
    page.get_by_label("Passes over the data").fill("90")
    rate.focus()
    rate.fill("0.5")
    expect(page.locator(".estimate")).not_to_have_text(before)
    assert rate.input_value() == "0.5", "an answer never overwrites what is being typed"
    expect(rate).to_be_focused()
    page.get_by_label("Examples at a time").fill("lots")
    page.get_by_label("Longest text").focus()
    expect(page.locator(".summary")).to_contain_text("1 thing to mend")
    expect(page.locator(".dial.wrong")).to_have_count(1)
    page.locator(".dial", has=page.get_by_label("Learning rate")).get_by_role("button", name="Put back").click()
    expect(page.get_by_label("Learning rate")).to_have_value(advised)
    page.get_by_label("Examples at a time").fill("4")
    page.get_by_label("Longest text").focus()
    expect(page.locator(".summary")).to_contain_text("Ready to start")
    page.reload()
    expect(page.get_by_label("Examples at a time")).to_have_value("4")
    expect(page.get_by_label("Passes over the data")).to_have_value("90")


def test_going_back_goes_back_one_question(page: Page) -> None:
    _check_step(page)
    page.go_back()
    expect(page.locator(".step.open h2")).to_have_text("How?")
    page.go_forward()
    expect(page.locator(".step.open h2")).to_have_text("Check and start")
