"""Other work than training on the pages: flows, searches, transforms, reports, earlier results as a start, answering with a memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from engine.ops.folder import run_folder
from jobs.models import Artifact, Dataset, Job, ModelEntry, Status
from studio.pages import garden
from studio.pages.report import report_of
from tests.engine.tiny import Tiny, lay
from tests.studio.conftest import Visitor
from tests.studio.making import make_data, make_model, make_result, make_run


def a_result(ada: Visitor, description: dict[str, Any], folder: str = "") -> Artifact:
    """A result of Ada's that is described like this."""
    result = make_result(make_run(ada.user, status=Status.SUCCEEDED, done=1.0, dataset=make_data(), model=make_model()))
    result.description = description
    result.folder = folder or result.folder
    result.save()
    return result


def at_how(ada: Visitor, table: Dataset) -> str:
    ada.post("/new/", {"step": "goal", "goal": "classify", "go": "next"})
    ada.post("/new/", {"step": "data", "dataset": str(table.pk), "go": "next"})
    return ada.read("/new/?at=how")


def of_role(role: str) -> list[garden.Plant]:
    return [plant for plant in garden.plants() if plant.role == role]


def test_every_method_can_be_reached_from_the_wizard_or_from_a_result(ada: Visitor, starters: ModelEntry) -> None:
    """Each main method stands in the wizard of some goal, each other training method and search among its additions, each way of answering at a result."""
    reached: set[str] = set()
    for goal in garden.goals():
        ada.post("/new/", {"step": "goal", "goal": goal["name"], "go": "next"})
        data = make_data(ada.user)
        Dataset.objects.filter(pk=data.pk).update(shape=goal["data_shapes"][0])
        ModelEntry.objects.update_or_create(
            source=f"starter:{goal['model_kinds'][0]}",
            defaults={"name": "A model", "kind": goal["model_kinds"][0], "num_parameters": 1000},
        )
        ada.post("/new/", {"step": "data", "dataset": str(data.pk), "go": "next"})
        page = ada.read("/new/?at=how")
        names = {plant.title: plant.slug for plant in garden.plants()}
        reached |= {slug for title, slug in names.items() if f">{title}" in page or f'value="{slug}"' in page}
    missing = {plant.slug for plant in garden.plants() if plant.role != "predict" and not plant.default} - reached
    assert not missing


def test_methods_stand_under_the_kind_of_work_they_do(ada: Visitor, starters: ModelEntry, table: Dataset) -> None:
    page = at_how(ada, table)
    headings = re.findall(r'<h3 class="h4" id="kind-(\w+)">', page)
    assert headings == [role for role in garden.KINDS if of_role(role)]
    assert 'name="one.search" value="pbt"' in page


def test_a_search_around_a_training_becomes_a_search_recipe(ada: Visitor, starters: ModelEntry, table: Dataset) -> None:
    at_how(ada, table)
    ada.post(
        "/new/",
        {
            "step": "how",
            "model": str(starters.pk),
            "method": "lora",
            "extras.shown": "1",
            "one.search": "pbt",
            "go": "next",
        },
    )
    page = ada.read("/new/?at=check")
    assert "operation: search" in page
    assert re.search(r"slug: lora", page) and re.search(r"slug: pbt", page)
    assert "Members" in page.split('id="expert"')[0], "the search's own dials stand on the form at once"


def test_a_transform_of_several_models_asks_for_them(ada: Visitor, starters: ModelEntry, table: Dataset) -> None:
    at_how(ada, table)
    several = next(plant for plant in of_role("transform") if plant.more_models != (0, 0))
    answer = ada.post(
        "/new/", {"step": "how", "model": str(starters.pk), "method": several.slug, "extras.shown": "1", "go": "stay"}
    )
    page = answer.content.decode() if answer.status_code == 200 else ada.read("/new/?at=how")
    assert "Which models besides?" in page and several.title in page
    ada.post(
        "/new/",
        {
            "step": "how",
            "model": str(starters.pk),
            "method": several.slug,
            "models.shown": "1",
            "extras.shown": "1",
            "go": "next",
        },
    )
    page = ada.read("/new/?at=check")
    assert "to mend" in page and "was given 1" in page


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("small"))


@pytest.fixture
def finished(ada: Visitor, small: Tiny, tmp_path: Path) -> Artifact:
    """A real classifier of Ada's, trained for three steps."""
    folder = lay(tmp_path / "job", small.recipe([("full-finetuning", {})], task="classify", max_steps=3))
    assert run_folder(folder)["outcome"] == "succeeded"
    about = json.loads((folder / "artifact" / "artifact.json").read_text())
    return a_result(ada, about, str(folder / "artifact"))


def test_a_result_can_be_the_start_of_another_run(
    ada: Visitor, starters: ModelEntry, table: Dataset, finished: Artifact
) -> None:
    page = ada.read(f"/results/{finished.pk}/")
    link = re.search(r'href="(/new/\?fresh=1[^"]+)"', page)
    assert link and "Go on from it" in page
    ada.get(link[1].replace("&amp;", "&"))
    ada.post("/new/", {"step": "data", "dataset": str(table.pk), "go": "next"})
    page = ada.read("/new/?at=how")
    assert re.search(rf'name="model" value="artifact:{finished.pk}"[^>]* checked', page)
    recipe = {
        "task": "classify",
        "model": {"source": f"artifact:{finished.pk}"},
        "data": {"source": f"dataset:{table.pk}"},
        "methods": [{"slug": "full-finetuning"}],
    }
    assert ada.client.post("/api/v1/jobs/check", recipe, content_type="application/json").status_code == 200


def test_answering_with_a_memory_and_undoing_it(ada: Visitor, bob: Visitor, finished: Artifact) -> None:
    assert "Let it go on learning while it answers" in ada.read(f"/results/{finished.pk}/")
    address = f"/results/{finished.pk}/serve/"
    asked = {"way": "psmt", "texts": "Where is my bread?\nThe lamp is broken.", "go": "ask"}
    page = ada.post(address, asked, headers={"HX-Request": "true"}).content.decode()
    assert "Where is my bread?" in page and "2 texts wait" in page
    page = ada.post(address, {**asked, "go": "forget"}, headers={"HX-Request": "true"}).content.decode()
    assert "It is as it was trained again." in page
    empty = ada.post(address, {**asked, "texts": " \n "}, headers={"HX-Request": "true"}).content.decode()
    assert "There are 0 texts." in empty
    unknown = ada.post(address, {**asked, "way": "../../etc"}, headers={"HX-Request": "true"}).content.decode()
    assert "not to be had" in unknown
    assert bob.post(address, asked).status_code == 404
    rest = f"/api/v1/artifacts/{finished.pk}/predict"
    body = {"inputs": ["Thank you!"], "method": {"slug": "psmt"}}
    answer = ada.client.post(rest, body, content_type="application/json")
    assert answer.status_code == 200 and answer.json()["serving"]["waiting"] == 1
    wrong = ada.client.post(rest, {**body, "method": {"slug": "nobody"}}, content_type="application/json")
    assert wrong.status_code == 422 and "way of answering" in wrong.content.decode()


# -- reports -----------------------------------------------------------------------------------------------------------------


def about(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "report", "operation": "flow", "task": "classify", "metrics": {}, "before": {}, "baseline": {}, "forms": {}, "samples": [], "notes": [],
        "data": {"labels": [], "num_train": 0, "num_holdout": 0}, "ending": {"message": "A sentence."}, "base": {"num_parameters": 5, "source": "x"},
        "num_trainable": 0, "steps": 0, "seconds": 1.5, "seed": 17, "precision": "fp32",
        "report": {"title": "Curve", "sentence": "300 numbers are enough.", "numbers": {"d90": 300, "nested": {"a": 1}},
                   "table": [{"d": 10, "score": 0.5}, {"d": 1000, "score": 0.75}, {"d": 3000, "score": None}], "curve": ["d", "score"]},
        **changes,
    }  # fmt: skip


def test_a_report_shows_its_sentence_numbers_table_and_curve(ada: Visitor) -> None:
    result = a_result(ada, about())
    page = ada.read(f"/results/{result.pk}/")
    assert "<h1>300 numbers are enough.</h1>" in page
    assert (
        "D90" in page
        and "in factors of ten" in page
        and page.split("report-curve")[1].split("</svg>")[0].count("<circle") == 2
    )
    assert "Try it" not in page and "Go on from it" not in page
    assert "–" in page, "a score that is missing is shown as missing"
    shown = report_of(about())
    assert shown is not None and [name for name, _ in shown["numbers"]] == ["D90"]


def test_a_strange_report_breaks_nothing(ada: Visitor) -> None:
    for strange in (
        {},
        {"table": "no"},
        {"table": [], "numbers": {}},
        {"table": [{"x": "<script>"}], "curve": ["x", "y"]},
        {"curve": 3, "numbers": {"a": 1}},
    ):
        report_of(about(report=strange))
    result = a_result(ada, about(report={"table": [{"x": "<script>alert(1)</script>"}]}))
    page = ada.read(f"/results/{result.pk}/")
    assert "<script>alert(1)" not in page


def test_a_run_without_training_is_named_by_its_method(ada: Visitor, starters: ModelEntry) -> None:
    plant = of_role("transform")[0]
    recipe = {
        "operation": "transform",
        "task": "causal_lm",
        "methods": [{"slug": plant.slug}],
        "model": {"source": "starter:x"},
        "settings": {},
    }
    job = make_run(ada.user, status=Status.RUNNING, done=0.5, dataset=make_data(), model=make_model())
    Job.objects.filter(pk=job.pk).update(recipe=recipe)
    page = ada.read(f"/runs/{job.pk}/")
    assert f"{plant.title} on" in page and "Learning to" not in page
