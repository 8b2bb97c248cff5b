"""Hyperparameters explain themselves, recipes round-trip, and every fault comes at once as a sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.errors import RecipeError
from engine.core.params import HyperParams, dial, faults_of
from engine.core.recipe import Recipe, TrainSettings, parse_recipe, parse_recipe_text

GOOD = {
    "task": "classify",
    "model": {"source": "starter:minilm-l6"},
    "data": {"source": "starter:customer-messages"},
    "methods": [{"slug": "paca", "params": {"r": 8}}],
}


def test_a_number_without_unit_and_range_is_refused_at_import() -> None:
    with pytest.raises(TypeError, match="unit="):

        class Silent(HyperParams):
            rank: int = dial(4, help="How many.")


def test_a_plain_field_is_refused_at_import() -> None:
    with pytest.raises(TypeError, match="dial"):

        class Plain(HyperParams):
            rank: int = 4


def test_help_must_be_a_sentence() -> None:
    with pytest.raises(TypeError, match="whole sentence"):
        dial(4, help="rank", unit="1", low=1, high=2)


def test_all_faults_at_once_each_with_place_and_way_out() -> None:
    bad = {
        **GOOD,
        "settings": {"learning_rate": -1, "epochs": "many", "batchsize": 3},
        "methods": [{"slug": "PaCA!"}],
        "surprise": 1,
    }
    with pytest.raises(RecipeError) as caught:
        parse_recipe(bad)
    where = {fault.where for fault in caught.value.faults}
    expected = {"settings.learning_rate", "settings.epochs", "settings.batchsize", "methods[0].slug", "surprise"}
    assert where == expected
    for fault in caught.value.faults:
        assert fault.what.endswith(".") and fault.why.endswith(".") and fault.way_out.endswith(".")


def test_range_fault_names_the_range() -> None:
    class Ranked(HyperParams):
        rank: int = dial(4, help="How many.", unit="columns", low=1, high=64)

    try:
        Ranked(rank=100)
    except ValueError as error:
        (fault,) = faults_of(error, "methods[0].params", Ranked)  # type: ignore[arg-type]
    assert fault.where == "methods[0].params.rank" and "1 to 64" in fault.way_out and fault.code == "out_of_range"


@given(
    rate=st.floats(1e-7, 1.0),
    epochs=st.floats(0.1, 50),
    batch=st.integers(1, 512),
    seed=st.integers(0, 2**31 - 1),
    name=st.text(max_size=40),
)
def test_yaml_round_trip_keeps_the_fingerprint(rate: float, epochs: float, batch: int, seed: int, name: str) -> None:
    settings = {"learning_rate": rate, "epochs": epochs, "batch_size": batch, "seed": seed}
    recipe = parse_recipe({**GOOD, "name": "".join(c for c in name if c.isprintable()), "settings": settings})
    again = parse_recipe_text(recipe.to_yaml())
    assert again == recipe and again.fingerprint() == recipe.fingerprint()


def test_the_name_is_not_part_of_the_fingerprint_but_the_seed_is() -> None:
    base = Recipe.model_validate(GOOD)
    assert base.model_copy(update={"name": "other"}).fingerprint() == base.fingerprint()
    assert base.model_copy(update={"settings": TrainSettings(seed=18)}).fingerprint() != base.fingerprint()


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x\n",
        "!!python/object/apply:os.system ['true']",
        "[1, 2",
        "just words",
        "{" * 5000,
        "x: " + "a" * 300_000,
    ],
)
def test_hostile_yaml_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe_text(text)
    assert caught.value.faults[0].way_out
