"""A search space as a person writes it: names, ranges and choices, one line of text. No torch."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.core.errors import Fault
from engine.core.recipe import MethodRef, Recipe, TrainSettings
from engine.core.registry import catalogue

SPACE_HELP = (
    "Which settings may change, with commas between them: a name alone, or a name with its range, such as "
    "learning_rate=1e-5..1e-1, adamw.weight_decay=0..0.3, lora.dropout=0|0.05|0.1."
)
_LOG_FROM = 30.0  # a range whose ends differ by more than this factor is walked in factors, not in differences


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One setting of the space: a range [low, high], or choices in their order."""

    name: str  # "settings.learning_rate" or "<slug>.<hyperparameter>"
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def is_log(self) -> bool:
        """Whether the range is walked in factors."""
        return self.low > 0 and self.high / self.low >= _LOG_FROM

    def draw(self, rng: random.Random) -> Any:
        """A value from the prior: uniform, log-uniform for wide ranges, or one of the choices."""
        if self.choices:
            return rng.choice(self.choices)
        if self.is_log:
            return self.clip(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self.clip(rng.uniform(self.low, self.high))

    def move(self, value: Any, factor: float) -> Any:
        """A value times `factor`, clipped to the range; for choices the neighbour, up where the factor is above 1."""
        if self.choices:
            place = self.choices.index(value) if value in self.choices else 0
            return self.choices[min(max(place + (1 if factor > 1 else -1), 0), len(self.choices) - 1)]
        return self.clip(float(value) * factor)

    def clip(self, value: float) -> float | int:
        """A number inside of the range, whole where the setting is."""
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.whole else inside


def parse_space(text: str, recipe: Recipe) -> tuple[tuple[Knob, ...], list[Fault]]:
    """The knobs that `text` names in a training recipe, and every fault in it; `where` of the faults is "space"."""
    knobs: list[Knob] = []
    faults: list[Fault] = []
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, span = (part.strip() for part in item.partition("="))
        full = name if "." in name else f"settings.{name}"
        extra, value = _dial(full, recipe)
        if extra is None:
            faults.append(
                _fault(
                    f"There is no number called '{name}' in this recipe.",
                    "A setting is named alone (learning_rate), a hyperparameter behind its method (adamw.weight_decay).",
                    "Write the name of a setting, or add the method.",
                )
            )
            continue
        knob = _knob(full, span, extra, value)
        if isinstance(knob, Fault):
            faults.append(knob)
        else:
            knobs.append(knob)
    if not knobs and not faults:
        faults.append(
            _fault("No setting is named.", "Then there is nothing to search.", "Write learning_rate, for example.")
        )
    return tuple(knobs), faults


def is_live(knob: Knob, recipe: Recipe) -> bool:
    """Whether the setting may change while a run goes on, between two steps."""
    return is_live_name(knob.name, recipe)


def is_live_name(name: str, recipe: Recipe) -> bool:
    """Whether the number behind a dotted name may change while a run goes on."""
    return bool((_dial(name, recipe)[0] or {}).get("live"))


def present_value(knob: Knob, recipe: Recipe) -> Any:
    """What the setting stands at in the recipe, or None."""
    return _dial(knob.name, recipe)[1]


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values at some dotted names."""
    settings = recipe.settings.model_dump()
    methods = list(recipe.methods)
    for name, value in values.items():
        head, _, leaf = name.partition(".")
        if head == "settings":
            settings[leaf] = value
            continue
        for place, ref in enumerate(methods):
            if ref.slug == head:
                methods[place] = MethodRef(slug=head, params={**ref.params, leaf: value})
    return recipe.model_copy(update={"settings": TrainSettings.model_validate(settings), "methods": tuple(methods)})


def _dial(name: str, recipe: Recipe) -> tuple[dict[str, Any] | None, Any]:
    """(extra of the dial, present value) behind a dotted name; (None, None) when there is no such number."""
    head, _, leaf = name.partition(".")
    model: Any = TrainSettings
    value = None
    if head == "settings":
        value = getattr(recipe.settings, leaf, None)
    else:
        ref = next((ref for ref in recipe.methods if ref.slug == head), None)
        if ref is None or head not in catalogue():
            return None, None
        model = catalogue()[head].Params
        field = model.model_fields.get(leaf)
        value = ref.params.get(leaf, field.default if field is not None else None)
    field = model.model_fields.get(leaf)
    extra = field.json_schema_extra if field is not None else None
    if field is None or not isinstance(extra, dict) or "low" not in extra:
        return None, None
    return {**extra, "whole": "int" in str(field.annotation)}, value


def _knob(name: str, span: str, extra: Mapping[str, Any], value: Any) -> Knob | Fault:
    floor, ceiling, whole = float(extra["low"]), float(extra["high"]), bool(extra["whole"])
    try:
        if "|" in span:
            choices = tuple(int(item) if whole else float(item) for item in span.split("|"))
            low, high = min(choices), max(choices)
        elif span:
            choices = ()
            low, high = (float(item) for item in span.split(".."))
        else:
            choices = ()
            low, high = _around(value, floor, ceiling)
    except ValueError:
        return _fault(
            f"'{span}' is not a range.",
            "A range has two ends, such as 1e-5..1e-1.",
            "Write low..high, or values with | between them.",
        )
    if not (floor <= low <= high <= ceiling) or (low == high and not choices):
        return _fault(
            f"The range {low:g}..{high:g} of '{name}' cannot be searched.",
            f"This setting goes from {floor:g} to {ceiling:g}, and a range needs two different ends, the smaller one first.",
            "Choose another range.",
        )
    return Knob(name=name, low=low, high=high, whole=whole, choices=choices)


def _around(value: Any, floor: float, ceiling: float) -> tuple[float, float]:
    """A range around the present value: a factor of ten to each side, or the whole dial where there is no value to start from."""
    if isinstance(value, int | float) and value > 0:
        return max(floor, value / 10), min(ceiling, value * 10)
    return floor, ceiling


def _fault(what: str, why: str, way_out: str) -> Fault:
    return Fault(where="space", what=what, why=why, way_out=way_out, code="bad_space")
