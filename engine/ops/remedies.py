"""Ways out that a watcher proposes inside of a trial, as changes of the whole search: another range where the search turns that setting, and otherwise
another value for all trials. The recipe of a search is that of its trials with the lead among the methods, so names are the same but for its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.core.method import Chosen
from engine.core.recipe import Recipe
from engine.core.space import Knob, parse_space, present_value
from engine.parts.trials import number, short

_RESTART = re.compile(r"^Restart from the (?:last good checkpoint|beginning)")


def for_search(remedy: Mapping[str, Any], trial: Recipe, base: Recipe, lead: Chosen) -> dict[str, Any] | None:
    """The remedy of a signal in a trial, for the search; None where it means nothing for it.

    trial: the recipe of the trial in which it was found; base: that of all trials without their own values; lead: the search, with its place in the recipe.
    """
    space = str(getattr(lead.params, "space", ""))
    knobs = {knob.name: knob for knob in (parse_space(space, base)[0] if space else ())}
    changes: dict[str, Any] = {}
    said = _RESTART.sub("Start the search again", str(remedy["title"]))
    said = said if said.startswith("Start the search") else f"Start the search again: {said}"
    for name, value in dict(remedy["changes"]).items():
        knob = knobs.get(_knob_name(name, base))
        if knob is None:
            changes[_outer(name, lead)] = value
            continue
        narrowed = _narrowed(knob, present_value(knob, trial), value)
        if narrowed is None or lead.index is None:
            return None
        text, words = narrowed
        dial = f"methods.{lead.index}.params.space"
        changes[dial] = _with_span(changes.get(dial, space), knob.name, text)
        said = f"Start the search again with {short(knob.name)} {words}"
    return {"title": said, "start": "beginning", "changes": changes}


def _knob_name(name: str, base: Recipe) -> str:
    """What the space calls a dotted name of a recipe: "methods.0.params.r" is "lora.r" there."""
    found = re.fullmatch(r"methods\.(\d+)\.params\.(\w+)", name)
    if found is None or int(found[1]) >= len(base.methods):
        return name
    return f"{base.methods[int(found[1])].slug}.{found[2]}"


def _outer(name: str, lead: Chosen) -> str:
    """The same place in the recipe of the search, where the lead stands among the methods."""
    found = re.fullmatch(r"methods\.(\d+)(\..*)?", name)
    if found is None or lead.index is None:
        return name
    return f"methods.{int(found[1]) + (int(found[1]) >= lead.index)}{found[2] or ''}"


def _narrowed(knob: Knob, before: Any, after: Any) -> tuple[str, str] | None:
    """(span of the knob, in words) so that it begins or ends at the value that was proposed; None where nothing would be left to try."""
    if (
        isinstance(after, bool)
        or not isinstance(after, int | float)
        or not isinstance(before, int | float)
        or before == after
    ):
        return None
    lower = after < before
    if knob.choices:
        left = [choice for choice in knob.choices if (choice <= after if lower else choice >= after)]
        return ("|".join(number(choice) for choice in left), _or(left)) if len(left) > 1 else None
    low, high = (knob.low, min(knob.high, after)) if lower else (max(knob.low, after), knob.high)
    if low >= high:  # the whole range is too high, or too low: it moves, as wide in factors as it was
        if knob.low <= 0:
            return None
        width = knob.high / knob.low
        low, high = (after / width, after) if lower else (after, after * width)
    ends = [format(end, ".0f" if knob.whole else ".3g") for end in (low, high)]
    return (f"{ends[0]}..{ends[1]}", f"from {ends[0]} to {ends[1]}") if ends[0] != ends[1] else None


def _or(values: list[Any]) -> str:
    said = [number(value) for value in values]
    return f"{', '.join(said[:-1])} or {said[-1]}"


def _with_span(space: str, name: str, span: str) -> str:
    """The text of a space with another span behind one of its names."""
    pieces = []
    for piece in filter(None, (piece.strip() for piece in space.split(","))):
        own = piece.partition("=")[0].strip()
        full = own if "." in own else f"settings.{own}"
        pieces.append(f"{own}={span}" if full == name else piece)
    return ", ".join(pieces)
