"""What the pages need of the engine without importing it: refusals, recipes as text, and the shapes of data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.core.errors import EngineError, RecipeError
from engine.core.recipe import parse_recipe, parse_recipe_text
from engine.io.datasets import SHAPES, row_in_roles
from jobs.models import Dataset

Refused = EngineError


def faults_of(error: EngineError) -> list[dict[str, str]]:
    """Every fault of a refusal, ready for a page."""
    faults = error.faults if isinstance(error, RecipeError) else (error.fault,)
    return [fault.to_dict() for fault in faults]


def recipe_as_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML, which `recipe_from_text` reads back."""
    return parse_recipe(dict(recipe)).to_yaml()


def recipe_from_text(text: str) -> dict[str, Any]:
    """A recipe from YAML or JSON that a person pasted; raises EngineError with sentences."""
    recipe: dict[str, Any] = parse_recipe_text(text).model_dump(mode="json")
    return recipe


def shapes() -> list[dict[str, Any]]:
    """What rows can be, and which roles their columns play."""
    return [
        {"name": shape.name, "title": shape.title, "roles": shape.roles, "optional": shape.optional}
        for shape in SHAPES.values()
    ]


def shape_title(name: str) -> str:
    """The words for a shape."""
    return SHAPES[name].title if name in SHAPES else "Not clear yet"


def rows_as_learned(dataset: Dataset) -> list[dict[str, Any]]:
    """The first rows as a model will see them: role -> value. Rows that say too little, or cannot be read, are left out."""
    rows: list[dict[str, Any]] = []
    for number, raw in enumerate(dataset.preview, 1):
        try:
            row = row_in_roles(raw, dataset.mapping, number) if dataset.mapping else None
        except EngineError:
            continue
        if row is not None:
            rows.append(row)
    return rows
