"""The conformance list over every method that leads another operation than training: transform, generate, probe, search, flow. No skip list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.core.artifact import damaged_files
from engine.core.control import write_request
from engine.core.method import WorkMethod
from engine.core.recipe import MethodRef, ModelRef, Recipe, parse_recipe
from engine.core.registry import catalogue
from engine.ops.check import check
from engine.ops.folder import run_folder
from tests.engine.tiny import Tiny, events, lay

METHODS = [method for method in catalogue().values() if issubclass(method, WorkMethod)]
pytestmark = pytest.mark.parametrize("method", METHODS, ids=[method.card.slug for method in METHODS])


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One uninterrupted job of each method's tiny preset, made once."""
    jobs: dict[str, tuple[Path, dict[str, Any]]] = {}

    def of(method: type[WorkMethod]) -> tuple[Path, dict[str, Any]]:
        slug = method.card.slug
        if slug not in jobs:
            folder = lay(tmp_path_factory.mktemp(slug), tiny.recipe_for_work(method))
            jobs[slug] = (folder, run_folder(folder))
        return jobs[slug]

    return of


def content(folder: Path) -> dict[str, str]:
    """Hashes of everything in an artifact that does not tell of time or place."""
    files = json.loads((folder / "artifact" / "manifest.json").read_text())["files"]
    told = {"artifact.json", "README.md", "transform.json"}
    return {
        name: entry["sha256"]
        for name, entry in files.items()
        if name.rpartition("/")[2] not in told and not name.endswith(".yaml")
    }


def numbers(folder: Path) -> Any:
    """What the result says about itself, without seconds and places."""
    about = json.loads((folder / "artifact" / "artifact.json").read_text())
    report = about.get("report") or {}
    return {"metrics": about["metrics"], "numbers": report.get("numbers"), "sentence": report.get("sentence")}


def test_tiny_succeeds_with_a_sealed_and_certified_result(method: type[WorkMethod], finished: Any) -> None:
    folder, result = finished(method)
    assert result["outcome"] == "succeeded", result["message"]
    artifact = folder / "artifact"
    certificate = json.loads((artifact / "certificate.json").read_text())
    assert certificate["ok"], certificate["sentence"]
    assert not damaged_files(artifact)
    about = json.loads((artifact / "artifact.json").read_text())
    assert about["operation"] == method.role and about["methods"][0]["slug"] == method.card.slug
    assert about["kind"] in {"model", "adapter", "report", "dataset"} and about["ending"]["message"].endswith(".")
    weights = [layout for layout in about["forms"].values() if layout in {"transformers", "peft", "bonsai"}]
    assert bool(weights) == (about["kind"] in {"model", "adapter"})
    assert weights == [] or certificate["num_prompts"] > 0
    assert events(folder, "state")[-1]["state"] == "done" and events(folder, "artifact")


def test_an_interrupted_job_goes_on_to_the_same_result(
    method: type[WorkMethod], tiny: Tiny, finished: Any, tmp_path: Path
) -> None:
    whole, _ = finished(method)
    folder = lay(tmp_path / "paused", tiny.recipe_for_work(method))
    for _ in range(60):
        write_request(folder, "pause")  # obeyed at the next border, then again and again
        result = run_folder(folder)
        (folder / "control.json").unlink(missing_ok=True)
        if result["outcome"] != "paused":
            break
        assert not (folder / "artifact").exists()
        result = _go_on(folder, method)
        if result is not None:
            break
    assert run_folder(folder)["outcome"] == "succeeded"
    assert content(folder) == content(whole)
    assert numbers(folder) == numbers(whole)


def _go_on(folder: Path, method: type[WorkMethod]) -> dict[str, Any] | None:
    """A transform starts anew after a pause, so it is paused once; everything else keeps finished pieces and is paused again."""
    return {} if method.role in {"transform", "probe"} else None


def test_cancel_leaves_no_result(method: type[WorkMethod], tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path / "cancelled", tiny.recipe_for_work(method))
    write_request(folder, "cancel")
    result = run_folder(folder)
    # A job without a border before its end is over before it can be left.
    assert (result["outcome"] == "cancelled" and not (folder / "artifact").exists()) or result["outcome"] == "succeeded"


def test_every_number_out_of_range_is_refused_with_reason_and_way_out(method: type[WorkMethod], tiny: Tiny) -> None:
    recipe = tiny.recipe_for_work(method)
    place = next(i for i, ref in enumerate(recipe.methods) if ref.slug == method.card.slug)
    for name, field in method.Params.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        if "high" not in extra:
            continue
        wrong = {**recipe.methods[place].params, name: float(extra["high"]) * 2 + 1}  # type: ignore[arg-type]
        faults = check(_with(recipe, place, wrong)).faults
        assert any(f.where == f"methods[{place}].params.{name}" and f.why and f.way_out for f in faults), name
    faults = check(_with(recipe, place, {"no_such_dial": 1})).faults
    assert faults[0].code == "unknown_setting"


def test_wrong_numbers_of_models_and_missing_data_are_refused(method: type[WorkMethod], tiny: Tiny) -> None:
    recipe = tiny.recipe_for_work(method)
    low, high = method.num_models
    wrong = (*recipe.models, recipe.model) if high is not None else ()
    if high is not None or low > 1:
        faults = check(recipe.model_copy(update={"models": wrong})).faults
        assert any(fault.code == "wrong_number" and fault.why and fault.way_out for fault in faults)
    if method.needs_data:
        faults = check(recipe.model_copy(update={"data": None})).faults
        assert any(fault.where == "data" and fault.way_out for fault in faults)


def test_a_model_that_is_not_there_is_refused(method: type[WorkMethod], tiny: Tiny) -> None:
    recipe = tiny.recipe_for_work(method)
    faults = check(recipe.model_copy(update={"model": ModelRef(source="folder:/nowhere/at/all")})).faults
    assert faults and all(fault.what and fault.way_out for fault in faults)


def test_card_speaks_to_a_lay_person(method: type[WorkMethod]) -> None:
    card = method.card
    assert card.pick_when.lower().startswith("pick this when") and card.pick_when.endswith(".")
    assert card.summary.endswith(".") and {"tiny", "paper"} <= method.presets.keys()
    json.dumps(method.describe(), allow_nan=False)
    method.Params.model_validate(method.presets["paper"])


def _with(recipe: Recipe, place: int, params: dict[str, Any]) -> Recipe:
    methods = list(recipe.methods)
    methods[place] = MethodRef(slug=methods[place].slug, params=params)
    return parse_recipe({**recipe.model_dump(mode="json"), "methods": [ref.model_dump() for ref in methods]})
