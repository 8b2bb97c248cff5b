"""What a recipe from outside may name. People name things of the studio, never places on the server's disk.

data.source    dataset:<id> | starter:<name> | artifact:<id> (rows that a job made)
model.source, models[i].source   model:<id> | artifact:<id> | starter:<name> | a source that the list of models offers | hub:owner/name (staff)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core.errors import Fault, RecipeError
from engine.core.recipe import ModelRef, parse_recipe
from jobs import access
from jobs.models import Dataset, ModelEntry


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A recipe as it was asked for, the same as the engine understands it, and the rows it names."""

    request: dict[str, Any]
    recipe: dict[str, Any]
    name: str
    dataset: Dataset | None
    model: ModelEntry | None


def resolve(
    recipe: Mapping[str, Any],
    owner: access.Person,
    *,
    name: str = "",
    dataset: Dataset | None = None,
    model: ModelEntry | None = None,
) -> Resolved:
    """Turn identifiers into sources that the engine can open; `dataset` and `model` fill in what the recipe leaves out.

    Raises RecipeError with everything that is wrong about the references. What belongs to somebody else does not exist.
    """
    if not isinstance(recipe, Mapping):
        parse_recipe(recipe)  # says in a sentence what a recipe is
    asked = dict(recipe)
    if dataset is not None:
        asked["data"] = {**_mapping(asked.get("data")), "source": f"dataset:{dataset.pk}"}
    if model is not None:
        asked["model"] = {**_mapping(asked.get("model")), "source": f"model:{model.pk}"}
    if name:
        asked["name"] = name
    parsed = parse_recipe(asked)
    faults: list[Fault] = []
    ready: dict[str, Any] = {}
    if parsed.data is not None:
        dataset, data_source = _data(owner, parsed.data.source, faults)
        data: dict[str, Any] = {"source": data_source}
        if dataset is not None and not dataset.starter:
            data |= {"columns": parsed.data.columns or dataset.mapping, "sha256": parsed.data.sha256 or dataset.sha256}
        ready["data"] = parsed.data.model_copy(update=data)
    model, model_source = _model(owner, parsed.model.source, faults)
    ready["model"] = parsed.model.model_copy(update={"source": model_source})
    more = [_model(owner, ref.source, faults, f"models[{place}].source")[1] for place, ref in enumerate(parsed.models)]
    ready["models"] = tuple(ModelRef(source=source) for source in more)
    if faults:
        raise RecipeError(faults)
    shown = parsed.name or (f"{dataset.name} on {model.name}" if dataset and model else parsed.task)[:200]
    done = parsed.model_copy(update={**ready, "name": shown})
    return Resolved(request=asked, recipe=done.model_dump(mode="json"), name=shown, dataset=dataset, model=model)


def _data(owner: access.Person, source: str, faults: list[Fault]) -> tuple[Dataset | None, str]:
    scheme, _, name = source.partition(":")
    rows = access.datasets_for(owner)
    row: Dataset | None = None
    if scheme == "artifact":
        return None, _made_rows(owner, name, faults)
    if scheme == "dataset":
        row = access.with_id(rows, name)
    elif scheme == "starter":
        row = rows.filter(starter=name, owner=None).first() if name else None
        if row is None:
            return None, source  # the engine knows its starters best, and says which ones there are
    elif scheme == "file" and name:  # a recipe that was taken home names the file as the server does
        row = rows.filter(path=name).first()
    if row is None:
        faults.append(
            Fault(
                where="data.source",
                what="There is no such data set.",
                why=f"'{_short(source)}' names nothing that you can see here.",
                way_out="Upload the table first, then write dataset:<id> with its id from the list of data sets.",
                code="unknown_dataset",
            )
        )
        return None, source
    return row, f"starter:{row.starter}" if row.starter else f"file:{row.path}"


def _model(
    owner: access.Person, source: str, faults: list[Fault], where: str = "model.source"
) -> tuple[ModelEntry | None, str]:
    scheme, _, name = source.partition(":")
    rows = access.models_for(owner)
    if scheme == "artifact":
        return None, _merged(owner, name, faults, where)
    row = access.with_id(rows, name) if scheme == "model" else rows.filter(source=source).first()
    if row is not None:
        return row, row.source
    if scheme == "starter" or (scheme == "hub" and access.is_staff(owner)):
        return None, source
    faults.append(
        Fault(
            where=where,
            what="There is no such model.",
            why=f"'{_short(source)}' is not in the list of models.",
            way_out="Choose one from the list, or ask staff to add it.",
            code="unknown_model",
        )
    )
    return None, source


def _merged(owner: access.Person, name: str, faults: list[Fault], where: str) -> str:
    """An earlier result as a starting point: its plain model directory."""
    artifact = access.with_id(access.artifacts_for(owner), name)
    if artifact is None:
        faults.append(
            Fault(
                where=where,
                what="There is no such result.",
                why=f"'{_short(name)}' names nothing that you can see here.",
                way_out="Choose one from the list of results.",
                code="unknown_artifact",
            )
        )
        return ""
    if "merged" not in artifact.description.get("forms", {}):
        faults.append(
            Fault(
                where=where,
                what="A run cannot start from this result.",
                why="It has no merged form, only an adapter.",
                way_out="Start from the model that it was trained from, or choose another result.",
                code="not_merged",
            )
        )
    return f"folder:{Path(artifact.folder) / 'merged'}"


def _made_rows(owner: access.Person, name: str, faults: list[Fault]) -> str:
    """The rows that an earlier job made."""
    artifact = access.with_id(access.artifacts_for(owner), name)
    if artifact is None or artifact.description.get("kind") != "dataset":
        faults.append(
            Fault(
                where="data.source",
                what="There is no such data set among the results.",
                why=f"'{_short(name)}' names no result of yours that holds rows.",
                way_out="Choose a result of a job that made data.",
                code="unknown_artifact",
            )
        )
        return ""
    return f"file:{Path(artifact.folder) / 'data' / 'rows.jsonl'}"


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"
