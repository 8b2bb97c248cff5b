"""What SaRA takes home, what it costs, what it refuses and whom it stands beside."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.bench.backward import saved_bytes
from engine.core.errors import EngineError
from engine.io.tensors import load_tensors
from engine.methods.sara import SaRA
from engine.ops.check import check
from engine.ops.folder import run_folder
from engine.parts.sparse import pack_places, unpack_places
from engine.train import checkpoint
from engine.train.export import load_adapted, read_payload
from engine.train.parts import Loss, Payload
from engine.train.trainables import halve_frozen
from tests.engine.attached import Attached, facts_for, random_batches
from tests.engine.tiny import Tiny, lay, metric_rows
from tests.engine.unit.sara_models import (
    advance,
    attached,
    decoder,
    described,
    layer_weights,
    masks,
    part_of,
    ready,
    sara,
    tuning,
)


@pytest.fixture
def story(tiny: Tiny) -> Attached:
    return attached(tiny)


# ── bf16 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bf16_weights_keep_the_fp32_mask_and_fp32_values_behind_them(story: Attached) -> None:
    chosen = masks(story)
    halve_frozen(story.model)
    story.part.sync(story.model)
    start = {name: entries.values.detach().clone() for name, entries in tuning(story).entries.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = story.train(random_batches(400), 4, learning_rate=1e-7)  # far below what bf16 resolves
    assert all(map(math.isfinite, losses))
    for name, entries in tuning(story).entries.items():
        weight = story.model.get_submodule(name[:-7]).weight
        moved = (entries.values.detach() - start[name]).abs()
        assert weight.dtype == torch.bfloat16 and entries.values.dtype == torch.float32
        assert 0 < moved.max() < 1e-6
        assert torch.equal(weight[chosen[name]], entries.values.detach().to(torch.bfloat16))
    remap = tuning(story).choose_again()
    resting = {name: entries.resting for name, entries in tuning(story).entries.items()}
    assert remap is None or all(part is None or part.dtype == torch.float32 for part in resting.values())
    assert story.part.merge(story.model)
    for name, entries in tuning(story).entries.items():
        weight = story.model.get_parameter(name)
        assert weight.dtype == torch.float32 and torch.equal(weight[chosen[name]], entries.whole())


def test_a_bf16_run_ends_with_a_certificate(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path / "half", tiny.recipe([("sara", {"rank_side": 8})], precision="bf16", max_steps=4))
    assert run_folder(folder)["outcome"] == "succeeded"
    assert json.loads((folder / "artifact" / "certificate.json").read_text())["ok"]


# ── taking it home ────────────────────────────────────────────────────────────────────────────────────────────────────


def learned_twice(of: Attached) -> Attached:
    """Trained, chosen again, trained on: some entries learn, some rest."""
    batches = random_batches(400)
    of.train(batches, 4)
    remap = tuning(of).choose_again()
    assert remap is not None
    of.trainables.apply(remap)
    of.train(batches, 2)
    return of


def test_merged_equals_unmerged_and_has_its_old_types(tiny: Tiny) -> None:
    one = learned_twice(attached(tiny, beyond="all"))
    batch = next(random_batches(400))
    before = one.logits(batch)
    assert one.part.merge(one.model)
    plain = decoder(tiny.folder / "decoder")
    assert [type(m) for m in one.model.modules()] == [type(m) for m in plain.modules()]
    assert one.model.state_dict().keys() == plain.state_dict().keys()
    assert one.model.lm_head.weight is one.model.model.embed_tokens.weight
    assert torch.equal(one.logits(batch), before)


def test_what_was_exported_comes_back_exactly(tiny: Tiny) -> None:
    one = learned_twice(attached(tiny))
    payload = one.part.export(one.model)
    assert isinstance(payload, Payload) and payload.layout == "bonsai"
    batch = next(random_batches(400))
    other = attached(tiny, seed=77)
    assert not torch.equal(other.logits(batch), one.logits(batch))
    other.part.restore(other.model, payload)
    other.part.sync(other.model)
    assert torch.equal(other.logits(batch), one.logits(batch))
    base = decoder(tiny.folder / "decoder").state_dict()
    for name, said in payload.config["tensors"].items():  # by hand, from the file alone
        index = unpack_places(payload.tensors[f"{name}.places"], base[name].numel()).long()
        weight = base[name].flatten()
        weight[index] = payload.tensors[f"{name}.values"]
        assert torch.equal(weight.view(said["shape"]), one.model.get_submodule(name[:-7]).weight)
        assert said["count"] == len(index) and said["density"] == len(index) / weight.numel() and said["threshold"] > 0


def test_places_take_the_smaller_form() -> None:
    few, many = torch.tensor([3, 500], dtype=torch.int32), torch.arange(0, 1000, 3, dtype=torch.int32)
    assert pack_places(few, 1000) is few
    assert pack_places(many, 1000).dtype == torch.uint8 and pack_places(many, 1000).numel() == 125
    assert torch.equal(unpack_places(pack_places(many, 1000), 1000), many.long())
    assert torch.equal(unpack_places(few, 1000), few)


def test_another_base_a_damaged_file_and_another_choice_are_refused(tiny: Tiny, story: Attached) -> None:
    payload = story.part.export(story.model)
    assert isinstance(payload, Payload)
    model = decoder(tiny.folder / "decoder")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3  # an entry that does not learn
    other = Attached(model, sara(), story.facts)
    with pytest.raises(EngineError) as refusal:
        other.part.restore(other.model, payload)
    assert refusal.value.fault.code == "other_base" and "model.layers.1.mlp.up_proj.weight" in refusal.value.fault.what
    assert all(text.endswith(".") for text in (refusal.value.fault.what, refusal.value.fault.why))
    with pytest.raises(EngineError) as refusal:
        few = attached(tiny, targets="attention")
        few.part.restore(few.model, payload)
    assert refusal.value.fault.code == "other_mask"
    name = next(iter(payload.config["tensors"]))
    short = {**payload.tensors, f"{name}.values": payload.tensors[f"{name}.values"][:-1]}
    with pytest.raises(EngineError) as refusal:
        fresh = attached(tiny)
        fresh.part.restore(fresh.model, replace(payload, tensors=short))
    assert refusal.value.fault.code == "damaged_mask"


# ── efficiency ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_gradient_and_optimizer_take_twelve_bytes_for_what_learns_and_none_for_the_rest(
    tiny: Tiny, tmp_path: Path
) -> None:
    run = ready(tiny, tmp_path, [("sara", {"rank_side": 8, "reselect": 0})], max_steps=2)
    part = part_of(run)
    dense = sum(part.sizes.values())
    nnz = part.num_learning()
    assert nnz == round(0.1 * dense)
    advance(run, run.next_batches())
    micro = run.next_batches()[0]
    (
        run.objective.loss(run.model, micro, run.rng).total
        + run.terms[0].term(run.model, micro, Loss(torch.zeros(()), 1), 1)
    ).backward()
    gradients = sum(p.grad.nbytes for p in {*run.model.parameters(), *run.trainables} if p.grad is not None)
    moments = sum(v.nbytes for state in run.optimizer.state.values() for v in state.values() if v.dim() > 0)
    assert gradients == 4 * nnz and moments == 8 * nnz  # dense gradients that are masked need 12 * dense
    assert (gradients + moments) / (12 * dense) == pytest.approx(0.1, abs=1e-3)


def test_nothing_more_is_remembered_for_backward_than_in_full_finetuning(tiny: Tiny, story: Attached) -> None:
    batch = next(random_batches(400))
    full = decoder(tiny.folder / "decoder")
    for name, parameter in full.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight") in story.facts.model.linears)
    ours = saved_bytes(lambda: story.loss(batch), story.model)
    theirs = saved_bytes(lambda: nn.functional.cross_entropy(*story.task.forward_logits(full, batch)), full)
    assert ours == theirs


# ── refusals and advice ───────────────────────────────────────────────────────────────────────────────────────────────


def test_bad_settings_are_refused_early(tiny: Tiny) -> None:
    facts = facts_for(described(tiny), "causal_lm")
    total = sum(out * into for out, into in facts.model.linears.values())

    def only(**params: Any) -> Any:
        (fault,) = SaRA.check(SaRA.Params(**params), facts)
        assert fault.why.endswith(".") and fault.way_out.endswith((".", "?"))
        return fault

    assert only(budget=10, threshold=0.1).code == "excludes"
    assert only(select="random", threshold=0.1).where == "select"
    assert f"{total:,}" in only(budget=total + 1).way_out
    assert only(share=1e-5).where == "share"
    assert only(rank_side=64).where == "rank_side" and "31" in only(rank_side=64).way_out
    assert only(targets="q_porj").way_out == "Did you mean 'q_proj'?"
    assert SaRA.check(SaRA.Params(rank_side=64, rank_loss=0), facts) == []
    bare = replace(facts.model, linears={}, tensors={"embed.weight": (4, 4)}, family="odd")
    verdict = SaRA.supports(facts_for(bare, "causal_lm"))
    assert not verdict.ok and "odd" in verdict.why and verdict.way_out


def test_a_border_below_every_weight_says_what_would_do(tiny: Tiny) -> None:
    with pytest.raises(EngineError) as refusal:
        attached(tiny, threshold=1e-12)
    fault = refusal.value.fault
    assert refusal.value.reason == "bad_input" and fault.code == "nothing_chosen"
    advised = float(fault.way_out.split("about ")[1].split(",")[0])
    everything = torch.cat([weight.flatten().abs() for weight in layer_weights(tiny).values()])
    assert 0.05 < float((everything < advised).float().mean()) < 0.2


def test_advice_follows_the_paper_where_it_can(tiny: Tiny) -> None:
    facts = facts_for(described(tiny), "causal_lm")
    recipe = tiny.recipe([("sara", {})])
    given = {item.where: item for item in SaRA.suggest(recipe, SaRA.Params(threshold=2e-3), facts)}
    assert given["settings.learning_rate"].value == pytest.approx(5e-4, rel=0.01)  # 1e-3 * exp(-350 * 2e-3)
    assert given["methods[0].params.rank_side"].value == 16  # half of the largest matrix here
    assert recipe.methods[0].params["rank_side"] == 16


# ── together with others ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["causal_lm", "classify"])
def test_with_lora_elsewhere_and_helpers_in_other_slots(tiny: Tiny, tmp_path: Path, task: str) -> None:
    methods: list[tuple[str, dict[str, Any]]] = [
        ("sara", {"targets": "feed-forward", "rank_side": 8}),
        ("lora", {"targets": "attention", "r": 4}),
        ("clip", {"max_norm": 0.5}),
        ("cosine", {}),
        ("patience", {}),
        ("adamw", {"weight_decay": 0.01}),
    ]
    folder = lay(tmp_path / task, tiny.recipe(methods, task=task, accumulate=2, max_steps=6))
    assert run_folder(folder)["outcome"] == "succeeded"
    certificate = json.loads((folder / "artifact" / "certificate.json").read_text())
    assert certificate["ok"] and {form["form"] for form in certificate["forms"]} == {
        "adapter-sara",
        "adapter-lora",
        "merged",
    }
    names = checkpoint.load(checkpoint.listed(folder)[-1]).trainables
    assert any(".entries" in name for name in names) and any("lora_A" in name for name in names)


def test_with_preferences_the_reference_is_the_untouched_model(tiny: Tiny, tmp_path: Path) -> None:
    methods: list[tuple[str, dict[str, Any]]] = [("sara", {"rank_side": 8}), ("dpo", {}), ("clip", {})]
    folder = lay(tmp_path / "pairs", tiny.recipe(methods, task="preference", max_steps=6))
    assert run_folder(folder)["outcome"] == "succeeded"
    assert json.loads((folder / "artifact" / "certificate.json").read_text())["ok"]
    assert metric_rows(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference still agree


def test_with_another_optimizer(tiny: Tiny, tmp_path: Path) -> None:
    from engine.core.registry import catalogue

    others = [
        slug for slug, method in catalogue().items() if "optimizer" in [s.value for s in getattr(method, "slots", ())]
    ]
    for slug in others[:3]:
        run = ready(tiny, tmp_path / slug, [("sara", {"rank_side": 8}), (slug, {})], max_steps=4)
        run.begin()
        for _ in range(4):
            advance(run, run.next_batches())
        assert part_of(run).num_learning() > 0


def test_weights_are_not_claimed_twice(tiny: Tiny) -> None:
    recipe = tiny.recipe([("sara", {"targets": "feed-forward"}), ("lora", {"targets": "attention"})])
    clash = recipe.model_copy(
        update={
            "methods": (recipe.methods[0], recipe.methods[1].model_copy(update={"params": {"targets": "all-linear"}}))
        }
    )
    (fault,) = check(clash).faults
    assert fault.code == "claimed_twice" and "SaRA and LoRA" in fault.what and fault.why and "layers" in fault.way_out


def test_the_file_on_disk_is_small_and_loads_without_the_run(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path / "run", tiny.recipe([("sara", {"rank_side": 8})]))
    assert run_folder(folder)["outcome"] == "succeeded"
    artifact = folder / "artifact"
    payload = read_payload(artifact / "adapter")
    nnz = sum(said["count"] for said in payload.config["tensors"].values())
    numel = sum(math.prod(said["shape"]) for said in payload.config["tensors"].values())
    stored = sum(tensor.nbytes for tensor in payload.tensors.values())
    assert stored <= 4 * nnz + numel / 8 + 16 * len(payload.config["tensors"])
    model, _ = load_adapted(artifact, json.loads((artifact / "artifact.json").read_text()))
    merged = load_tensors(artifact / "merged" / "model.safetensors")
    for name in payload.config["tensors"]:
        assert torch.equal(model.get_submodule(name[:-7]).weight, merged[name])
