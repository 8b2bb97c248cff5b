"""The look keeps its promises: contrast in both themes, one list of tokens, icons that exist, no style that moves against the wish."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOKENS = (ROOT / "static/css/tokens.css").read_text(encoding="utf-8")
STYLES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "static/css").glob("*.css"))}
MARKUP = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted((ROOT / "templates").rglob("*.html"))}  # fmt: skip
SURFACES = ("paper", "surface", "raised", "sunk")
SOFT = ("green-soft", "amber-soft", "red-soft", "blue-soft")
Oklch = tuple[float, float, float]


def colours() -> dict[str, tuple[Oklch, Oklch]]:
    """Every opaque colour token: (light, dark)."""
    found = re.findall(r"--([\w-]+): light-dark\(oklch\(([\d. ]+)\), oklch\(([\d. ]+)\)\)", TOKENS)
    return {name: (_numbers(light), _numbers(dark)) for name, light, dark in found}


def _numbers(text: str) -> Oklch:
    lightness, chroma, hue = (float(part) for part in text.split())
    return lightness, chroma, hue


def linear(colour: Oklch) -> tuple[float, float, float]:
    """Linear sRGB of an OKLCH colour (the matrices of its author)."""
    lightness, chroma, hue = colour
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    small = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * small,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * small,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * small,
    )


def contrast(one: Oklch, other: Oklch) -> float:
    """The contrast ratio of WCAG."""
    shades = []
    for colour in (one, other):
        red, green, blue = (min(1.0, max(0.0, part)) for part in linear(colour))
        shades.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    dark, light = sorted(shades)
    return (light + 0.05) / (dark + 0.05)


def test_the_formula_is_right() -> None:
    black, white = (0.0, 0.0, 0.0), (1.0, 0.0, 0.0)
    assert contrast(black, white) == pytest.approx(21, abs=0.05)
    assert contrast((0.5999, 0.0, 0.0), white) == pytest.approx(3.95, abs=0.05)  # #808080


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read(theme: int) -> None:
    known = colours()
    pairs = [(ink, ground) for ink in ("ink", "ink-2", "ink-3", "green-ink", "amber-ink", "red-ink", "blue-ink") for ground in (*SURFACES, *SOFT)]  # fmt: skip
    pairs += [("on-green", "green"), ("on-green", "green-strong")]
    weak = {pair: round(contrast(known[pair[0]][theme], known[pair[1]][theme]), 2) for pair in pairs}
    assert not {pair: ratio for pair, ratio in weak.items() if ratio < 4.5}


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_shapes_can_be_seen(theme: int) -> None:
    known = colours()
    shapes = ["edge", "focus", "green", *(f"chart-{number}" for number in range(1, 9))]
    pairs = [(shape, ground) for shape in shapes for ground in SURFACES]
    weak = {pair: round(contrast(known[pair[0]][theme], known[pair[1]][theme]), 2) for pair in pairs}
    assert not {pair: ratio for pair, ratio in weak.items() if ratio < 3}


def test_every_colour_can_be_shown() -> None:
    outside = [
        name
        for name, both in colours().items()
        for colour in both
        if not all(-0.004 < part < 1.004 for part in linear(colour))
    ]
    assert not outside, "outside of sRGB a browser would change it"


def test_chart_hues_have_one_lightness() -> None:
    known = colours()
    for theme in (0, 1):
        assert len({known[f"chart-{number}"][theme][0] for number in range(1, 9)}) == 1


def test_colours_are_named_in_one_file() -> None:
    for name, text in STYLES.items():
        if name != "tokens.css":
            assert not re.search(r"oklch\(|rgba?\(|hsla?\(|:\s*#[0-9a-fA-F]{3,8}\b", text), (
                f"{name} names a colour of its own"
            )


def test_every_token_that_is_used_exists() -> None:
    declared = set(re.findall(r"(--[\w-]+)\s*:", "\n".join(STYLES.values())))
    for name, text in {**STYLES, **MARKUP}.items():
        missing = set(re.findall(r"var\((--[\w-]+)", text)) - declared
        assert not missing, f"{name}: {missing}"


def test_every_icon_that_is_used_exists() -> None:
    drawn = set(re.findall(r'<symbol id="([\w-]+)"', (ROOT / "static/img/icons.svg").read_text(encoding="utf-8")))
    from studio.pages import context, words

    used = {name for text in MARKUP.values() for name in re.findall(r'{% icon "([\w-]+)"', text)}
    used |= set(words.STATUS_ICONS.values()) | {place.icon for place in context.PLACES} | {"idle", "queued", "running"}
    assert used <= drawn, used - drawn


def test_motion_can_be_switched_off() -> None:
    for name, text in STYLES.items():
        for line in re.findall(r"(?:transition|animation)\s*:[^;]*;", text):
            assert "var(--quick)" in line or "var(--slow)" in line or "none" in line, f"{name}: {line}"
    assert "prefers-reduced-motion: reduce" in TOKENS


def test_nothing_removes_the_focus_ring_without_another() -> None:
    for name, text in STYLES.items():
        for rule in re.findall(r"([^{}]+)\{([^{}]*outline:\s*none[^{}]*)\}", text):
            selector = rule[0].strip()
            assert ":focus" in selector, f"{name}: {selector}"


def test_templates_hold_no_code_and_no_style_of_their_own() -> None:
    for name, text in MARKUP.items():
        assert not re.search(r"<script(?![^>]*\bsrc=)[^>]*>|<style|\sstyle=|\son\w+=", text), name


def test_pages_need_nothing_from_elsewhere() -> None:
    for name, text in {**STYLES, **MARKUP}.items():
        for address in re.findall(r"https?://[^\s\"')]+", text):
            assert address.startswith(("https://arxiv.org/", "http://www.w3.org/")), f"{name}: {address}"
