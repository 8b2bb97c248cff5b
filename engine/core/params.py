"""Hyperparameters as frozen values that explain themselves: help, unit, range, tier, and the paper's default."""

from __future__ import annotations

import typing
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.core.errors import Fault

Tier = Literal["basic", "expert"]


class HyperParams(BaseModel):
    """A frozen bag of hyperparameters. Extra fields are refused; a number without help, unit and range is refused at import."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            extra = field.json_schema_extra
            if not isinstance(extra, dict) or "tier" not in extra:
                raise TypeError(
                    f"{cls.__qualname__}.{name} must be declared with dial(...), which asks for its help and tier."
                )
            if _is_number(field.annotation) and not {"unit", "low", "high"} <= extra.keys():
                raise TypeError(f"{cls.__qualname__}.{name} is a number: dial(...) needs unit=, low= and high=.")


def dial(
    default: Any,
    *,
    help: str,
    label: str | None = None,
    unit: str | None = None,
    low: float | None = None,
    high: float | None = None,
    tier: Tier = "expert",
    paper: Any = None,
    suggested: str | None = None,
    live: bool = False,
) -> Any:
    """Declare one hyperparameter.

    help: a sentence for a person who knows no machine learning.  label: the words on the form (default: the name).
    unit: "steps", "columns", "share", "1" for a pure number.  low, high: inclusive range that is accepted.
    tier: "basic" dials stand on the form at once, "expert" ones behind a fold.
    paper: the paper's default when it differs from ours.  suggested: why a default of None will be filled in, in a sentence.
    live: whether the value may change between two steps of a run without building anything anew (a search may then turn it).
    """
    if not help.strip().endswith((".", "?")):
        raise TypeError(f"The help of a dial is a whole sentence: {help!r}")
    extra: dict[str, Any] = {"tier": tier}
    for key, value in (("unit", unit), ("low", low), ("high", high), ("paper", paper), ("suggested", suggested)):
        if value is not None:
            extra[key] = value
    if live:
        extra["live"] = True
    return Field(default=default, description=help, title=label, ge=low, le=high, json_schema_extra=extra)


def faults_of(error: ValidationError, prefix: str, model: type[BaseModel]) -> list[Fault]:
    """Turn pydantic's complaints about `model` into sentences, one Fault per field, `where` prefixed with `prefix`."""
    return [_fault(item, prefix, model) for item in error.errors(include_url=False)]


def _fault(item: Any, prefix: str, model: type[BaseModel]) -> Fault:
    path = _dotted(item["loc"])
    name = path or "value"
    where = f"{prefix}.{path}".strip(".") if path else prefix or "recipe"
    given, kind, ctx = item.get("input"), item["type"], item.get("ctx", {})
    field = model.model_fields.get(str(item["loc"][0])) if item["loc"] else None
    extra = field.json_schema_extra if field is not None and isinstance(field.json_schema_extra, dict) else {}
    span = f"Choose a value from {extra['low']:g} to {extra['high']:g}." if {"low", "high"} <= extra.keys() else ""
    shown = _shown(given)
    if kind == "extra_forbidden":
        known = ", ".join(model.model_fields)
        return Fault(
            where=where,
            what=f"There is no setting called '{path}'.",
            why="It would have been ignored silently.",
            way_out=f"Remove it or use one of: {known}." if len(item["loc"]) == 1 and known else "Remove it.",
            code="unknown_setting",
        )
    if kind == "missing":
        return Fault(
            where=where,
            what=f"'{name}' is missing.",
            why="The run cannot be described without it.",
            way_out=f"Add '{name}'.",
            code="missing",
        )
    if kind in {"greater_than_equal", "less_than_equal", "greater_than", "less_than"}:
        limit = next(iter(ctx.values()), None)
        side = "smaller than the least" if kind.startswith("greater") else "larger than the largest"
        return Fault(
            where=where,
            what=f"'{name}' is {shown}.",
            why=f"That is {side} value that makes sense, {limit}.",
            way_out=span or f"Choose a value within the limit {limit}.",
            code="out_of_range",
        )
    if kind in {"literal_error", "enum"}:
        return Fault(
            where=where,
            what=f"'{name}' is {shown}.",
            why="That is not one of the choices.",
            way_out=f"Choose one of {ctx.get('expected')}.",
            code="not_a_choice",
        )
    if kind in {"float_parsing", "float_type", "int_parsing", "int_type", "int_from_float"}:
        needed = "A whole number is needed here." if kind.startswith("int") else "A number is needed here."
        return Fault(
            where=where,
            what=f"'{name}' is {shown}.",
            why=needed,
            way_out=span or "Write a number.",
            code="not_a_number",
        )
    message = str(item["msg"]).removeprefix("Value error, ")
    return Fault(
        where=where,
        what=f"'{name}' is {shown}.",
        why=message[:1].upper() + message[1:].rstrip(".") + ".",
        way_out=span or "Correct the value.",
        code="invalid_value",
    )


def _dotted(loc: tuple[Any, ...]) -> str:
    path = ""
    for key in loc:
        path += f"[{key}]" if isinstance(key, int) else f".{key}" if path else str(key)
    return path


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(annotation: Any) -> bool:
    kinds = typing.get_args(annotation) or (annotation,)
    return any(kind in (int, float) for kind in kinds)
