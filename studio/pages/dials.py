"""From a JSON schema to form fields and back to recipe JSON. Nothing here knows any method.

The schema is what pydantic makes of a bag of dials: title is the label, description the help, and the extra keys tier, unit, low, high,
paper and suggested say the rest. `parse(render(values)) == values` holds for every schema that a method declares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from django.http import QueryDict

from studio.pages import words

EMPTY: Any = object()  # a schema without a default


@dataclass(frozen=True, kw_only=True)
class Dial:
    """One setting as a form shows it."""

    name: str
    where: str  # name in the form
    label: str
    help: str = ""
    default: Any = EMPTY
    tier: str = "expert"
    unit: str = ""
    low: float | None = None
    high: float | None = None
    paper: Any = None
    suggested: str = ""
    branches: tuple[Mapping[str, Any], ...] = ()

    @property
    def nullable(self) -> bool:
        return any(branch.get("type") == "null" for branch in self.branches)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values to choose from, for a field that offers nothing else."""
        found = [_choices(branch) for branch in self.branches if branch.get("type") != "null"]
        return tuple(choice for choices in found for choice in choices) if found and all(found) else ()

    @property
    def hints(self) -> tuple[Any, ...]:
        """Words that a free field understands besides numbers and texts."""
        return () if self.choices else tuple(choice for branch in self.branches for choice in _choices(branch))

    @property
    def widget(self) -> str:
        """check, choice, several, number, lines or text."""
        kinds = {branch.get("type") for branch in self.branches} - {"null"}
        if kinds == {"boolean"}:
            return "choice" if self.nullable else "check"
        if self.choices:
            return "choice"
        if kinds == {"array"} and _choices(self._items()):
            return "several"
        if kinds <= {"integer", "number"}:
            return "number"
        return (
            "lines"
            if kinds & {"object"} or (kinds == {"array"} and self._items().get("type") in {"object", "array"})
            else "text"
        )

    @property
    def span(self) -> str:
        """The range in words."""
        if self.low is None or self.high is None:
            return ""
        return f"From {words.number(self.low)} to {words.number(self.high)}."

    def _items(self) -> Mapping[str, Any]:
        return next((branch.get("items", {}) for branch in self.branches if branch.get("type") == "array"), {})


@dataclass(kw_only=True)
class Field:
    """A dial with what stands in it now."""

    dial: Dial
    text: str = ""  # what the input holds
    values: tuple[str, ...] = ()  # what is ticked, for a field of several
    was: str = ""  # what the studio itself wrote there; the same text back means "left open"
    reason: str = ""  # of the suggestion
    mine: bool = False  # a person chose this value
    faults: list[Mapping[str, str]] = field(default_factory=list)

    @property
    def options(self) -> list[tuple[str, str, bool]]:
        """(value, words, chosen) of each choice."""
        dial = self.dial
        words = {"true": "Yes", "false": "No"} if dial.choices in ((True, False), (False, True)) else {}
        offered = [text_of(choice) for choice in (dial.choices or _choices(dial._items()))]
        chosen = self.values if dial.widget == "several" else (self.text,)
        options = [(text, words.get(text, text), text in chosen) for text in offered]
        return (
            [("", "Let the studio decide", self.text == ""), *options]
            if dial.nullable and dial.widget == "choice"
            else options
        )

    @property
    def identifier(self) -> str:
        return f"f-{re.sub(r'[^a-z0-9]+', '-', self.dial.where.lower())}"


def dials(schema: Mapping[str, Any], prefix: str) -> list[Dial]:
    """The dials of an object schema, in the order in which they were declared; `prefix` begins their names in the form."""
    definitions = schema.get("$defs", {})
    return [_dial(name, spec, f"{prefix}.{name}", definitions) for name, spec in schema.get("properties", {}).items()]


def _dial(name: str, spec: Mapping[str, Any], where: str, definitions: Mapping[str, Any]) -> Dial:
    branches = tuple(_flat(spec, definitions))
    return Dial(
        name=name, where=where, label=spec.get("title") or name.replace("_", " ").capitalize(), help=spec.get("description", ""),
        default=spec.get("default", EMPTY), tier=spec.get("tier", "expert"), unit="" if spec.get("unit") in (None, "1") else spec["unit"],
        low=spec.get("low"), high=spec.get("high"), paper=spec.get("paper"), suggested=spec.get("suggested", ""), branches=branches,
    )  # fmt: skip


def _flat(spec: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """The alternatives of a schema, references followed."""
    if "$ref" in spec:
        yield from _flat(definitions.get(spec["$ref"].rpartition("/")[2], {}), definitions)
    elif "anyOf" in spec or "oneOf" in spec:
        for branch in spec.get("anyOf", spec.get("oneOf", ())):
            yield from _flat(branch, definitions)
    elif "allOf" in spec and len(spec["allOf"]) == 1:
        yield from _flat(spec["allOf"][0], definitions)
    elif "items" in spec:
        yield {**spec, "items": next(iter(_flat(spec["items"], definitions)), {})}
    else:
        yield spec


def _choices(branch: Mapping[str, Any]) -> tuple[Any, ...]:
    if "const" in branch:
        return (branch["const"],)
    return tuple(branch.get("enum", ())) or ((True, False) if branch.get("type") == "boolean" else ())


def defaults(found: Iterable[Dial]) -> dict[str, Any]:
    """What the dials hold when nobody touches them."""
    return {dial.name: dial.default for dial in found if dial.default is not EMPTY}


def text_of(value: Any) -> str:
    """A value as it stands in an input; `parse` reads it back exactly."""
    if value is None or value is EMPTY:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, list | tuple):
        plain = all(_is_bare(item) for item in value) and not (value and str(value[0]).startswith("["))
        return ", ".join(text_of(item) for item in value) if plain else json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False, indent=1) if isinstance(value, dict) else str(value)


def setting_words(value: Any) -> str:
    """The value of a dial for a reader: yes, no, a number, a dash for none."""
    return {"true": "yes", "false": "no", "": "–"}.get(text_of(value), text_of(value))


def _is_bare(item: Any) -> bool:
    """Whether an item of a list needs no quotes."""
    text = str(item)
    return (
        isinstance(item, str | int | float) and text == text.strip() != "" and not any(mark in text for mark in ",\n")
    )


def render(
    found: Iterable[Dial],
    values: Mapping[str, Any],
    suggestions: Mapping[str, tuple[Any, str]] | None = None,
    faults: Mapping[str, list[Mapping[str, str]]] | None = None,
    typed: Mapping[str, str] | None = None,
) -> list[Field]:
    """Fields that hold `values`. Where a value is open, the suggestion stands there with its reason; `typed` is text that could not be read."""
    fields = []
    for dial in found:
        value = values.get(dial.name, dial.default)
        advised, reason = (suggestions or {}).get(dial.where, (None, ""))
        open_value = dial.default if advised is None else advised
        mine = dial.name in values and value != dial.default
        shown = value if mine or advised is None else advised
        text = (typed or {}).get(dial.where, text_of(shown))
        ticked = (
            tuple(text_of(item) for item in shown) if dial.widget == "several" and shown not in (None, EMPTY) else ()
        )
        fields.append(Field(dial=dial, text=text, values=ticked, was=text_of(open_value), reason=reason,
                            mine=mine or dial.where in (typed or {}), faults=list((faults or {}).get(dial.where, ()))))  # fmt: skip
    return fields


def parse(found: Iterable[Dial], data: QueryDict) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Values of the dials that the form holds, and a fault for each text that is no value of its dial."""
    values: dict[str, Any] = {}
    faults: list[dict[str, str]] = []
    for dial in found:
        if dial.where not in data:
            continue
        given = list(data.getlist(dial.where))
        if dial.widget == "several":
            values[dial.name] = [_scalar(dial._items(), item) for item in given if item]
            continue
        text = given[-1].strip()
        was = data.get(f"was.{dial.where}")
        if was is not None and text == was.strip():
            values[dial.name] = dial.default
            continue
        try:
            values[dial.name] = _value(dial, text)
        except ValueError as error:
            faults.append({"where": dial.where, "what": f"“{dial.label}” cannot be read: {text[:60] or 'it is empty'}.", "why": str(error),
                           "way_out": dial.span or "Correct it, or put the suggested value back.", "code": "unreadable_value"})  # fmt: skip
    return values, faults


def changed(found: Iterable[Dial], values: Mapping[str, Any]) -> dict[str, Any]:
    """Only what differs from the defaults: that is what a recipe states."""
    return {
        dial.name: values[dial.name]
        for dial in found
        if dial.name in values and values[dial.name] != _plain(dial.default)
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def to_form(fields: Iterable[Field]) -> QueryDict:
    """What a browser would send for these fields."""
    data = QueryDict(mutable=True)
    for shown in fields:
        data[f"was.{shown.dial.where}"] = shown.was
        if shown.dial.widget == "several":
            data.setlist(shown.dial.where, ["", *shown.values])
        else:
            data[shown.dial.where] = shown.text
    return data


def _value(dial: Dial, text: str) -> Any:
    if not text:
        if dial.nullable:
            return None
        if not any(branch.get("type") in {"string", "array"} for branch in dial.branches):
            raise ValueError("A value is needed here.")
    reasons = []
    for branch in dial.branches:
        try:
            return _scalar(branch, text, dial.unit)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0] if reasons else "It does not fit.")


def _scalar(branch: Mapping[str, Any], text: str, unit: str = "") -> Any:
    """`text` as a value of one schema branch."""
    for choice in _choices(branch):
        if text_of(choice) == text:
            return choice
    kind = branch.get("type")
    if _choices(branch):
        raise ValueError(f"Choose one of: {', '.join(text_of(choice) for choice in _choices(branch))}.")
    if kind in {"integer", "number"}:
        return _number(text, whole=kind == "integer", share=unit == "share")
    if kind == "array":
        return _list(branch, text)
    if kind == "object":
        return _json(text, dict, 'It has to be a JSON object, such as {"name": 1}.')
    if kind == "null":
        raise ValueError("It does not fit.")
    return text


def _number(text: str, *, whole: bool, share: bool) -> float | int:
    plain = text.replace("\u202f", "").replace("\u00a0", "").replace(" ", "")
    percent = share and plain.endswith("%")
    plain = plain.rstrip("%") if percent else plain
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", plain):
        plain = plain.replace(",", "")
    elif re.fullmatch(r"[+-]?\d*,\d+", plain):
        plain = plain.replace(",", ".")
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", plain, re.IGNORECASE):
        raise ValueError("That is not a whole number." if whole else "That is not a number, such as 0.0002 or 2e-4.")
    value = float(plain) / (100 if percent else 1)
    if value in (float("inf"), float("-inf")):
        raise ValueError("That number is too large.")
    if not whole:
        return value
    if not value.is_integer():
        raise ValueError("That is not a whole number.")
    return int(plain) if re.fullmatch(r"[+-]?\d+", plain) else int(value)


def _list(branch: Mapping[str, Any], text: str) -> list[Any]:
    if text.startswith("["):
        return _json(text, list, "It has to be a list, such as [1, 2].")
    pieces = [piece.strip() for piece in re.split(r"[,\n]", text) if piece.strip()]
    if "prefixItems" in branch:
        if len(pieces) != len(branch["prefixItems"]):
            raise ValueError(f"It has to be {len(branch['prefixItems'])} values with commas between.")
        return [_scalar(item, piece) for item, piece in zip(branch["prefixItems"], pieces, strict=True)]
    return [_scalar(branch.get("items", {}), piece) for piece in pieces]


def _json(text: str, kind: type, hint: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError(hint) from None
    if not isinstance(value, kind):
        raise ValueError(hint)
    return value
