"""Forms from schemas: what is shown can be read back exactly, for every method that is installed."""

from __future__ import annotations

from typing import Any

import pytest
from django.http import QueryDict
from hypothesis import given
from hypothesis import strategies as st

from engine.core.recipe import TrainSettings
from engine.core.registry import catalogue
from studio.pages.dials import Dial, changed, defaults, dials, parse, render, text_of, to_form

SCHEMAS = {
    "settings": TrainSettings.model_json_schema(),
    **{slug: method.describe()["schema"] for slug, method in catalogue().items()},
}


def read(schema: dict[str, Any], **texts: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """What the form says when somebody typed `texts`."""
    data = QueryDict(mutable=True)
    data.update({f"p.{name}": text for name, text in texts.items()})
    return parse(dials({"properties": schema}, "p"), data)


def one(**spec: Any) -> Dial:
    return dials({"properties": {"x": spec}}, "p")[0]


@pytest.mark.parametrize("slug", SCHEMAS)
def test_defaults_survive_the_form(slug: str) -> None:
    found = dials(SCHEMAS[slug], "p")
    kept = defaults(found)
    form = to_form(render(found, kept))
    assert parse(found, form) == (kept, [])
    for name in [name for name in form if name.startswith("was.")]:
        del form[name]  # a browser that sends only what it shows
    assert parse(found, form) == (kept, [])
    assert changed(found, kept) == {}


@pytest.mark.parametrize("slug", catalogue())
def test_presets_survive_the_form(slug: str) -> None:
    found = dials(SCHEMAS[slug], "p")
    for preset in catalogue()[slug].presets.values():
        values, faults = parse(found, to_form(render(found, preset)))
        assert not faults
        assert {name: values[name] for name in preset} == preset
        bag = catalogue()[slug].Params
        assert bag.model_validate(changed(found, values)) == bag.model_validate(preset)


@pytest.mark.parametrize("slug", SCHEMAS)
def test_every_dial_explains_itself(slug: str) -> None:
    for dial in dials(SCHEMAS[slug], "p"):
        assert dial.label and dial.help.endswith((".", "?")), dial.name
        assert dial.widget in {"check", "choice", "several", "number", "lines", "text"}
        if dial.widget == "number":
            assert dial.span


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_survives_the_form(value: float) -> None:
    dial = one(type="number")
    values, faults = parse([dial], to_form(render([dial], {"x": value})))
    assert not faults and values["x"] == value


@given(st.integers(min_value=-(2**63), max_value=2**63))
def test_every_whole_number_survives_the_form(value: int) -> None:
    dial = one(type="integer")
    assert parse([dial], to_form(render([dial], {"x": value}))) == ({"x": value}, [])


@given(st.lists(st.text(min_size=1, alphabet=st.characters(exclude_categories=("Cs",))), max_size=4))
def test_every_list_survives_the_form(value: list[str]) -> None:
    dial = one(type="array", items={"type": "string"}, default=[])
    assert parse([dial], to_form(render([dial], {"x": value})))[0]["x"] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("0,0002", 0.0002), ("1,000", 1000.0), ("1 000", 1000.0), (" .5 ", 0.5), ("-3", -3.0), ("15 %", 0.15)],
)  # fmt: skip
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    values, faults = read({"x": {"type": "number", "unit": "share"}}, x=text)
    assert not faults and values["x"] == pytest.approx(value)


@pytest.mark.parametrize(
    ("spec", "text", "sentence"),
    [
        ({"type": "number"}, "much", "That is not a number"),
        ({"type": "number"}, "0x10", "That is not a number"),
        ({"type": "number"}, "nan", "That is not a number"),
        ({"type": "number"}, "1e999", "too large"),
        ({"type": "number"}, "", "A value is needed"),
        ({"type": "integer"}, "1.5", "whole number"),
        ({"type": "string", "enum": ["a", "b"]}, "c", "Choose one of: a, b."),
        ({"type": "object"}, "[1]", "JSON object"),
        ({"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}]}, "1", "2 values"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(spec: dict[str, Any], text: str, sentence: str) -> None:
    values, faults = read({"x": {**spec, "title": "Strength"}}, x=text)
    assert "x" not in values
    assert sentence in faults[0]["why"] and faults[0]["where"] == "p.x" and "“Strength”" in faults[0]["what"]


def test_an_open_setting_shows_the_suggestion_and_stays_open() -> None:
    dial = one(anyOf=[{"type": "number"}, {"type": "null"}], default=None)
    shown = render([dial], {}, {"p.x": (0.001, "It suits this model.")})[0]
    assert (shown.text, shown.reason, shown.mine) == ("0.001", "It suits this model.", False)
    assert parse([dial], to_form([shown])) == ({"x": None}, [])
    form = to_form([shown])
    form["p.x"] = "0.002"
    assert parse([dial], form)[0] == {"x": 0.002}


def test_a_choice_of_the_person_wins_over_the_suggestion() -> None:
    dial = one(type="integer", default=8)
    shown = render([dial], {"x": 4}, {"p.x": (16, "Because.")})[0]
    assert (shown.text, shown.was, shown.mine) == ("4", "16", True)


def test_what_could_not_be_read_stands_there_as_it_was_typed() -> None:
    dial = one(type="integer", default=8)
    shown = render([dial], {}, typed={"p.x": "<many>"}, faults={"p.x": [{"what": "No."}]})[0]
    assert shown.text == "<many>" and shown.faults


def test_unions_offer_words_beside_numbers() -> None:
    dial = one(anyOf=[{"type": "integer"}, {"const": "auto", "type": "string"}], default="auto")
    assert dial.widget == "text" and dial.hints == ("auto",)
    assert parse([dial], QueryDict("p.x=auto"))[0] == {"x": "auto"}
    assert parse([dial], QueryDict("p.x=12"))[0] == {"x": 12}


def test_several_of_a_list_can_be_ticked() -> None:
    dial = one(type="array", items={"enum": ["q", "k", "v"], "type": "string"}, default=["q"])
    assert dial.widget == "several"
    shown = render([dial], {"x": ["q", "v"]})[0]
    assert [(value, chosen) for value, _, chosen in shown.options] == [("q", True), ("k", False), ("v", True)]
    assert parse([dial], to_form([shown]))[0] == {"x": ["q", "v"]}
    assert parse([dial], QueryDict("p.x="))[0] == {"x": []}, "nothing ticked is an answer too"


def test_references_and_nested_values_are_followed() -> None:
    schema = {
        "$defs": {"Init": {"enum": ["a", "b"], "type": "string"}},
        "properties": {"init": {"$ref": "#/$defs/Init", "default": "a"}, "inner": {"type": "object", "default": {"r": 1}}},
    }  # fmt: skip
    init, inner = dials(schema, "p")
    assert init.choices == ("a", "b") and inner.widget == "lines"
    assert parse([inner], to_form(render([inner], {"inner": {"r": [1, 2]}})))[0] == {"inner": {"r": [1, 2]}}


def test_values_read_like_a_person_writes_them() -> None:
    assert [text_of(value) for value in (8.0, 0.0002, 1e-8, True, None, ("a", "b"), 12)] == [
        "8", "0.0002", "1e-08", "true", "", "a, b", "12",
    ]  # fmt: skip
