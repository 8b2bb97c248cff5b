"""The conformance list of the design over every registered training method, with no skip list.

Only what a method declares in `cannot`, with its reason, is left out, and then the reason is shown.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.compose import compose
from engine.core.control import write_request
from engine.core.method import TrainMethod
from engine.core.recipe import MethodRef, Recipe
from engine.core.registry import catalogue
from engine.core.slots import Slot
from engine.io.tensors import load_tensors
from engine.ops.check import check, require
from engine.ops.folder import run_folder
from engine.train import checkpoint
from tests.engine.tiny import Tiny, events, lay, metric_rows

METHODS = [method for method in catalogue().values() if issubclass(method, TrainMethod)]
pytestmark = pytest.mark.parametrize("method", METHODS, ids=[method.card.slug for method in METHODS])


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One uninterrupted run of each method's tiny preset, made once."""
    runs: dict[str, tuple[Path, dict[str, Any]]] = {}

    def of(method: type[TrainMethod]) -> tuple[Path, dict[str, Any]]:
        slug = method.card.slug
        if slug not in runs:
            folder = lay(tmp_path_factory.mktemp(slug), tiny.recipe_for(method))
            runs[slug] = (folder, run_folder(folder))
        return runs[slug]

    return of


def final_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Trainables and optimizer state of the last checkpoint."""
    snapshot = checkpoint.load(checkpoint.listed(folder)[-1])
    return snapshot.trainables, snapshot.optimizer


def assert_same_bits(one: Path, other: Path) -> None:
    for mine, theirs in zip(final_state(one), final_state(other), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert metric_rows(one) == metric_rows(other)


def test_tiny_runs_and_its_export_answers_the_same_in_a_clean_process(method: type[TrainMethod], finished: Any) -> None:
    folder, result = finished(method)
    assert result["outcome"] == "succeeded", result["message"]
    certificate = json.loads((folder / "artifact" / "certificate.json").read_text())
    assert certificate["ok"], certificate["sentence"]
    assert certificate["num_prompts"] > 0 and certificate["forms"]


def test_merged_equals_unmerged(method: type[TrainMethod], finished: Any) -> None:
    if "merge" in method.cannot:
        assert method.cannot["merge"].endswith(".")
        return
    folder, _ = finished(method)
    certificate = json.loads((folder / "artifact" / "certificate.json").read_text())
    merged = next(form for form in certificate["forms"] if form["form"] == "merged")
    assert merged["ok"] and merged["max_error"] <= 1e-4 * max(1.0, merged["scale"]), merged


def test_unclaimed_weights_are_bit_identical(method: type[TrainMethod], tiny: Tiny, finished: Any) -> None:
    if "merge" in method.cannot:
        return
    folder, _ = finished(method)
    recipe = tiny.recipe_for(method)
    checked = require(recipe)
    assert checked.facts is not None
    claimed: set[str] = set()
    for chosen in checked.composition.in_slot(Slot.PARAMETRIZATION):
        claimed |= chosen.method.claims(chosen.params, checked.facts)
    after = load_tensors(folder / "artifact" / "merged" / "model.safetensors")
    before = load_tensors(Path(checked.facts.model.path) / "model.safetensors")
    # A head puts a prefix before every name of the body; which one, the names say that end alike.
    longer = (name for name in sorted(after) for old in before if name.endswith(f".{old}"))
    prefix = next(longer, "").split(".")[0] + "."
    compared = 0
    for name, tensor in before.items():
        full = name if name in checked.facts.model.tensors else prefix + name
        if full not in claimed and full in after:
            assert torch.equal(after[full], tensor), name
            compared += 1
    assert compared + len(claimed) >= len(before)


def test_stop_and_resume_equals_uninterrupted_bit_for_bit(
    method: type[TrainMethod], tiny: Tiny, finished: Any, tmp_path: Path
) -> None:
    whole, _ = finished(method)
    folder = lay(tmp_path / "paused", tiny.recipe_for(method))
    write_request(folder, "pause")  # obeyed after the first step
    assert run_folder(folder)["outcome"] == "paused"
    assert metric_rows(folder)[-1]["step"] == 1
    (folder / "control.json").unlink()
    assert run_folder(folder)["outcome"] == "succeeded"
    assert_same_bits(whole, folder)


def test_a_killed_run_replays_from_its_checkpoint_to_the_same_bits(
    method: type[TrainMethod], tiny: Tiny, finished: Any, tmp_path: Path
) -> None:
    whole, _ = finished(method)
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "artifact")
    *earlier, last = checkpoint.listed(killed)
    shutil.rmtree(last)  # as if the process had died before it was written
    assert earlier
    assert run_folder(killed)["outcome"] == "succeeded"
    assert_same_bits(whole, killed)


def test_same_seed_same_bits_and_a_watcher_changes_none(
    method: type[TrainMethod], tiny: Tiny, finished: Any, tmp_path: Path
) -> None:
    whole, _ = finished(method)
    recipe = tiny.recipe_for(method)
    known = {ref.slug for ref in recipe.methods}
    watchers = [m.card.slug for m in METHODS if Slot.WATCHER in m.slots and m.card.slug not in known]
    more = (*recipe.methods, *(MethodRef(slug=slug) for slug in watchers))
    watched = recipe.model_copy(update={"methods": more})
    folder = lay(tmp_path / "watched", watched)
    run_folder(folder)
    rows, same = metric_rows(folder), metric_rows(whole)[: len(metric_rows(folder))]
    assert rows == same and rows


def test_cancel_leaves_a_loadable_checkpoint(method: type[TrainMethod], tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path / "cancelled", tiny.recipe_for(method))
    write_request(folder, "cancel")
    result = run_folder(folder)
    assert result["outcome"] == "cancelled" and not (folder / "artifact").exists()
    snapshot, complaints = checkpoint.newest(folder)
    assert snapshot is not None and snapshot.step == 1 and not complaints


def test_events_are_numbered_and_complete(method: type[TrainMethod], finished: Any) -> None:
    folder, _ = finished(method)
    rows = metric_rows(folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert {"loss", "grad_norm", "learning_rate", "samples", "tokens", "epoch"} <= rows[0].keys()
    assert events(folder, "evaluation")[0]["step"] == 0
    assert events(folder, "state")[-1]["state"] == "done"


def test_every_number_out_of_range_is_refused_with_reason_and_way_out(method: type[TrainMethod], tiny: Tiny) -> None:
    recipe = tiny.recipe_for(method)
    place = next(i for i, ref in enumerate(recipe.methods) if ref.slug == method.card.slug)
    for name, field in method.Params.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        if "high" not in extra:
            continue
        bad = MethodRef(
            slug=method.card.slug, params={**recipe.methods[place].params, name: float(extra["high"]) * 2 + 1}
        )  # type: ignore[arg-type]
        _, faults = compose(_with(recipe, place, bad))
        assert any(f.where == f"methods[{place}].params.{name}" and f.why and f.way_out for f in faults), name
    _, faults = compose(_with(recipe, place, MethodRef(slug=method.card.slug, params={"no_such_dial": 1})))
    assert faults[0].code == "unknown_setting"


def test_two_holders_of_a_single_slot_are_refused_by_its_rule(method: type[TrainMethod], tiny: Tiny) -> None:
    recipe = tiny.recipe_for(method)
    twice = recipe.model_copy(
        update={"methods": (*recipe.methods, MethodRef(slug=method.card.slug, params=method.presets["tiny"]))}
    )
    faults = check(twice).faults
    if Slot.PARAMETRIZATION in method.slots or any(slot.arity == "one" for slot in method.slots):
        assert faults and all(fault.why and fault.way_out for fault in faults)
    else:
        assert not faults


def test_card_speaks_to_a_lay_person(method: type[TrainMethod]) -> None:
    card = method.card
    assert card.pick_when.lower().startswith("pick this when") and card.pick_when.endswith(".")
    assert card.summary.endswith(".") and {"tiny", "paper"} <= method.presets.keys()
    described = method.describe()
    json.dumps(described, allow_nan=False)
    method.Params.model_validate(method.presets["paper"])


def _with(recipe: Recipe, place: int, ref: MethodRef) -> Recipe:
    methods = list(recipe.methods)
    methods[place] = ref
    return recipe.model_copy(update={"methods": tuple(methods)})
