"""A method that an installed package brings appears everywhere by itself: catalogue, wizard, form, REST schema, help page."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.core import registry
from jobs import catalogue
from jobs.models import Dataset, ModelEntry
from studio.pages import garden
from studio.pages.dials import parse
from tests.engine.outside import SLUG, make_package
from tests.studio.conftest import Visitor


@pytest.fixture
def installed(tmp_path: Path, engine_here: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package on the path, and a catalogue that was asked anew."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(make_package(tmp_path / "site")))
        importlib.invalidate_caches()
        registry.catalogue.cache_clear()
        catalogue.refresh()
        yield
    sys.modules.pop("gain_tuning", None)
    registry.catalogue.cache_clear()
    catalogue.refresh()


def test_it_has_a_card_a_page_and_a_schema(installed: None, ada: Visitor) -> None:
    assert "Gain tuning" in ada.read("/methods/")
    page = ada.read(f"/methods/{SLUG}/")
    assert "only the scale behind each normalisation may move" in page and "All layers" in page
    schema = ada.get(f"/api/v1/methods/{SLUG}").json()["schema"]
    assert schema["properties"]["every"]["description"].startswith("Whether the scales of all layers learn")


def test_its_form_goes_there_and_back(installed: None) -> None:
    from django.http import QueryDict

    plant = garden.plant(SLUG)
    assert plant is not None and [dial.label for dial in plant.dials] == ["All layers"]
    values, faults = parse(plant.dials, QueryDict(f"params.{SLUG}.every=false"))
    assert values == {"every": False} and not faults


def test_it_is_offered_where_it_fits_and_can_be_checked(
    installed: None, ada: Visitor, starters: ModelEntry, table: Dataset
) -> None:
    ada.post("/new/", {"step": "goal", "goal": "classify", "go": "next"})
    ada.post("/new/", {"step": "data", "dataset": str(table.pk), "go": "next"})
    page = ada.read("/new/?at=how")
    assert re.search(rf'name="method" value="{SLUG}"', page)
    recipe = {
        "task": "classify",
        "model": {"source": "starter:minilm-l6"},
        "data": {"source": f"dataset:{table.pk}"},
        "methods": [{"slug": SLUG}],
    }
    answer = ada.client.post("/api/v1/jobs/check", recipe, content_type="application/json")
    assert answer.status_code == 200, answer.content
    assert answer.json()["estimate"]["num_trainable"] > 0


def test_without_the_package_nobody_knows_it(engine_here: None, ada: Visitor) -> None:
    assert ada.get(f"/methods/{SLUG}/").status_code == 404
