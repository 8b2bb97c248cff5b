"""What a watcher proposes inside of a trial, as a change of the whole search: its range, or what all trials share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.core.method import Chosen
from engine.core.recipe import changed, parse_recipe
from engine.core.registry import catalogue
from engine.core.space import with_values
from engine.ops.check import check, require
from engine.ops.folder import run_folder
from engine.ops.remedies import for_search
from tests.engine.tiny import Tiny, events, lay

RATE = "settings.learning_rate"
RATES = {"title": "Restart from the last good checkpoint with a learning rate of 0.01", "start": "last_good"}


def meant(space: str, trial: dict[str, Any], changes: dict[str, Any], title: str = "", *, place: int = 0) -> Any:
    """What a remedy means for a search that stands at a place among the methods."""
    inside = [{"slug": "lora", "params": {"r": 8, "dropout": 0.1}}, {"slug": "clip", "params": {}}]
    body = {
        "task": "causal_lm",
        "model": {"source": "starter:x"},
        "data": {"source": "starter:y"},
        "methods": inside,
        "settings": {"learning_rate": 0.1},
    }
    base = parse_recipe(body)
    found = catalogue()["random-search"]
    lead = Chosen(method=found, params=found.Params(space=space), index=place)
    return for_search(
        {**RATES, **({"title": title} if title else {}), "changes": changes}, with_values(base, trial), base, lead
    )


@pytest.mark.parametrize(
    ("space", "tried", "proposed", "then"),
    [
        ("learning_rate=1e-4..1e0", 0.1, 0.01, "learning_rate=0.0001..0.01"),
        ("lora.r=4|8, learning_rate=1e-4..1e0", 0.1, 0.01, "lora.r=4|8, learning_rate=0.0001..0.01"),
        ("learning_rate", 0.5, 0.05, "learning_rate=0.01..0.05"),
        ("learning_rate=1e-4..1e-2", 1e-4, 1e-5, "learning_rate=1e-07..1e-05"),
        ("learning_rate=1e-6..1e-4", 1e-5, 5e-5, "learning_rate=5e-05..0.0001"),
        ("learning_rate=1e-3|1e-2|1e-1|1", 1.0, 0.1, "learning_rate=0.001|0.01|0.1"),
    ],
)
def test_a_setting_that_is_searched_gets_another_range(space: str, tried: float, proposed: float, then: str) -> None:
    found = meant(space, {RATE: tried}, {RATE: proposed})
    assert found["changes"] == {"methods.0.params.space": then} and found["start"] == "beginning"
    assert found["title"].startswith("Start the search again with learning rate ")


def test_a_setting_that_all_trials_share_is_changed_for_all() -> None:
    found = meant("lora.r=4|8", {"lora.r": 4}, {RATE: 0.01})
    assert found == {
        "title": "Start the search again with a learning rate of 0.01",
        "start": "beginning",
        "changes": {RATE: 0.01},
    }
    found = meant(
        "learning_rate", {RATE: 0.1}, {"methods.1.params.max_norm": 1.0}, "Restart from the beginning with a limit of 1"
    )
    assert found["changes"] == {"methods.2.params.max_norm": 1.0}, "the search itself stands in front of it"
    assert meant("learning_rate", {RATE: 0.1}, {"methods.1.params.max_norm": 1.0}, place=2)["changes"] == {
        "methods.1.params.max_norm": 1.0
    }
    found = meant("lora.dropout=0..0.5", {"lora.dropout": 0.4}, {"methods.0.params.dropout": 0.05})
    assert found["changes"] == {"methods.0.params.space": "lora.dropout=0..0.05"}


def test_where_nothing_would_be_left_to_try_nothing_is_proposed() -> None:
    assert meant("learning_rate=0.1|1", {RATE: 1.0}, {RATE: 0.1}) is None
    assert meant("batch_size=4|8", {"settings.batch_size": 4}, {"settings.batch_size": 1}) is None


def test_a_trial_that_breaks_down_says_with_which_range_to_search_again(tiny: Tiny, tmp_path: Path) -> None:
    body = {
        **tiny.inputs("classify"),
        "operation": "search",
        "methods": [{"slug": "grid-search", "params": {"space": "learning_rate=1e-3|1e-2|10", "points": 3}}, {"slug": "full-finetuning"}],
        "settings": {"max_steps": 24, "epochs": 9, "batch_size": 4, "max_length": 24, "evaluations": 2, "precision": "fp32"},
    }  # fmt: skip
    recipe = require(parse_recipe(body)).recipe
    folder = lay(tmp_path, recipe)
    assert run_folder(folder)["outcome"] == "succeeded"
    proposed = [event["remedy"] for event in events(folder, "signal") if event.get("remedy")]
    assert proposed, "a rate of 10 is far too high"
    for remedy in proposed:
        assert remedy["start"] == "beginning" and remedy["title"].startswith("Start the search again with ")
        assert not check(changed(recipe, remedy["changes"])).faults
