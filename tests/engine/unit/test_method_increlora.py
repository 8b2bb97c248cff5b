"""IncreLoRA against independent computations: dense autograd, numpy, peft's loader, and whole runs of the engine."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.core.errors import EngineError
from engine.core.slots import Slot
from engine.io.facts import model_facts
from engine.methods.adamw import AdamWFactory
from engine.methods.increlora import IncreLoRA, Orthogonality, plan_rounds
from engine.ops.check import check
from engine.ops.folder import run_folder
from engine.parts.growing import RESERVE, GrowingLinear
from engine.train.parts import Loss, Remap, StepReport
from engine.train.trainables import births
from tests.engine.attached import Attached, facts_for, logits_of, random_batches, write_peft
from tests.engine.interrupted import assert_same_run, best_comes_at, run_and_pause_behind
from tests.engine.tiny import Tiny, events, lay, metric_rows


def decoder(tiny: Tiny) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.folder / "decoder", dtype=torch.float32)


def encoder(tiny: Tiny) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    return AutoModelForSequenceClassification.from_pretrained(
        tiny.folder / "encoder", num_labels=3, dtype=torch.float32
    ).eval()


class Grown(Attached):
    """An attached model with an optimizer, the regulariser and a run of known length around it: the loop in a few lines."""

    def __init__(
        self, tiny: Tiny, *, steps: int, task: str = "causal_lm", seed: int = 3, decay: float = 0.0, **params: Any
    ):
        model = encoder(tiny) if task == "classify" else decoder(tiny)
        facts = model_facts(f"folder:{tiny.folder / ('encoder' if task == 'classify' else 'decoder')}", task=task)
        method = IncreLoRA(IncreLoRA.Params(**params))
        super().__init__(model, method, facts_for(facts, task), seed=seed)
        self.part: Any = self.part
        self.term = Orthogonality(self.part, method.params.orth_weight)
        self.said: list[str] = []
        log = SimpleNamespace(emit=lambda kind, data: self.said.append(data["message"]))
        self.part.begin(SimpleNamespace(clock=SimpleNamespace(total_steps=steps), log=log))
        self.factory = AdamWFactory(betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
        self.optimizer = self.factory.build(self.trainables, 1e-2)
        self.batches = random_batches(400, classes=3 if task == "classify" else 0)
        self.model.train()
        self.done = 0

    def backward(self, *micro: dict[str, Tensor]) -> None:
        for batch in micro:
            loss = self.loss(batch) / len(micro)
            (loss + self.term.term(self.model, batch, Loss(loss.detach(), 1.0), 1 / len(micro))).backward()

    def step(self, *micro: dict[str, Tensor]) -> Remap | None:
        self.backward(*(micro or (next(self.batches),)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        zero = torch.zeros(())
        self.report = StepReport(self.done, zero, zero, 0.0, 0, 0, 0.0, 1.0)
        remap: Remap | None = self.part.adapt(self.report)
        if remap is not None:
            self.factory.remap(self.optimizer, remap, self.trainables)
            self.trainables.apply(remap)
        return remap

    @property
    def layers(self) -> list[GrowingLinear]:
        layers: list[GrowingLinear] = self.part.layers
        return layers


def deltas(grown: Grown, *, reserve: bool = False) -> list[Tensor]:
    return [layer.delta(reserve=reserve).detach().clone() for layer in grown.layers]


# ── the start ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_start_is_the_base_and_reserves_are_hardly_heard(tiny: Tiny) -> None:
    grown = Grown(tiny, steps=50, target_rank=4, alpha=16)
    batch = next(grown.batches)
    assert torch.equal(grown.logits(batch), logits_of(decoder(tiny), batch))  # in eval mode to the last bit
    for layer in grown.layers:
        assert layer.rank == 1 and layer.reserve is not None and len(layer.reserve) == 2
        a, b = layer.reserve.a.detach(), layer.reserve.b.detach()
        bound = RESERVE * 16 * sum(b[:, j].norm() * a[j].norm() for j in range(2))
        assert 0 < layer.delta(reserve=True).norm() <= bound
        assert torch.equal(layer.delta(reserve=False), torch.zeros_like(layer.weight))
        assert 0.015 < a.std() < 0.025 and 0.015 < b.std() < 0.025


def test_another_seed_draws_other_pieces_and_the_same_seed_the_same(tiny: Tiny) -> None:
    one, same, other = (Grown(tiny, steps=50, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.layers[0].bundles[0].a, same.layers[0].bundles[0].a)
    assert not torch.equal(one.layers[0].bundles[0].a, other.layers[0].bundles[0].a)


# ── the score ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_score_is_that_of_dense_autograd_over_the_whole_batch(tiny: Tiny, pieces: int, checkpointing: bool) -> None:
    grown = Grown(tiny, steps=200, target_rank=2, beta1=0.0, beta2=0.0)
    for _ in range(3):
        grown.step()
    if checkpointing:
        grown.model.gradient_checkpointing_enable({"use_reentrant": False})
    micro = [next(grown.batches) for _ in range(pieces)]
    for layer in grown.layers:  # the gradient of the frozen weight is dL/dDelta
        layer.weight.requires_grad_(True)
    grown.backward(*micro)
    for layer in grown.layers:
        assert layer.score is not None and layer.weight.grad is not None
        dense = (layer.delta(reserve=True) * layer.weight.grad).abs().sum() / math.sqrt(layer.weight.numel())
        torch.testing.assert_close(layer.score, dense.detach(), rtol=2e-4, atol=1e-12)


def test_scores_are_smoothed_as_written_down(tiny: Tiny) -> None:
    grown = Grown(tiny, steps=400, beta1=0.7, beta2=0.9)
    smooth, unrest = np.zeros(len(grown.layers)), np.zeros(len(grown.layers))
    for _ in range(6):
        batch = next(grown.batches)
        heard: list[float] = []
        adapt = grown.part.adapt

        def listen(report: StepReport, adapt: Any = adapt, heard: list[float] = heard) -> Any:
            heard += [float(layer.score) for layer in grown.layers if layer.score is not None]
            return adapt(report)

        grown.part.adapt = listen
        grown.step(batch)
        grown.part.adapt = adapt
        score = np.array(heard)
        smooth = 0.7 * smooth + 0.3 * score
        unrest = 0.9 * unrest + 0.1 * np.abs(score - smooth)
    np.testing.assert_allclose(grown.part.importance.numpy(), smooth, rtol=1e-5)
    np.testing.assert_allclose(grown.part.uncertainty.numpy(), unrest, rtol=1e-5)
    order = sorted(range(len(smooth)), key=lambda i: -smooth[i] * unrest[i])
    assert grown.part._ranking() == order


def test_scoring_every_few_steps_always_scores_where_a_round_follows_and_ends_with_the_last(tiny: Tiny) -> None:
    grown = Grown(tiny, steps=40, target_rank=2, init_warmup=4, interval=5, top_h=7, score_every=4)
    scored = []
    for step in range(1, 21):
        if grown.layers[0].listening:
            scored.append(step)
        grown.step()
        assert all(layer.score is None and layer._heard is None for layer in grown.layers)  # dense memory is given back
    assert scored == [4, 5, 8, 10]  # rounds at 5 and 10 hand out all 14 pieces


# ── allocation ────────────────────────────────────────────────────────────────────────────────────────────────────────

PLANS: list[dict[str, Any]] = [
    {"target_rank": 2, "top_h": 5},
    {"target_rank": 4, "top_h": 4},
    {"target_rank": 4, "top_h": 5, "incre_rank": 4},  # 42 = 10 * 4 + 2: the last winner gets two of four
    {"target_rank": 3, "lora_r": 2, "top_h": 3, "incre_rank": 4},
    {"target_rank": 4, "top_h": 6, "advance": False},
    {"target_rank": 4, "top_h": 6, "winners": "random"},
    {"target_rank": 3, "top_h": 2, "incre_rank": 24},  # layers of 32 run full
]


@pytest.mark.parametrize("plan", PLANS, ids=[" ".join(f"{k}={v}" for k, v in plan.items()) for plan in PLANS])
def test_pieces_are_handed_out_exactly(tiny: Tiny, plan: dict[str, Any]) -> None:
    grown = Grown(tiny, steps=60, init_warmup=1, interval=2, **plan)
    rounds, layers = grown.part.rounds, grown.layers
    total, target = len(layers) * plan.get("lora_r", 1), len(layers) * plan["target_rank"]
    given = 0
    for step in range(1, 41):
        before = {layer: layer.rank for layer in layers}
        reserved = [layer.reserve for layer in layers]
        remap = grown.step()
        gains = [layer.rank - rank for layer, rank in before.items()]
        due = step > 1 and step % 2 == 0 and total < target
        assert (remap is not None) is due
        if due:
            given += 1
            room = sorted((min(rounds.incre_rank, 32 - rank) for rank in before.values()), reverse=True)
            if rounds.incre_rank < 24:
                assert sum(gains) == min(sum(room[: rounds.top_h]), target - total)
            assert 0 < sum(gain > 0 for gain in gains) <= rounds.top_h and max(gains) <= rounds.incre_rank
        else:
            assert gains == [0] * len(layers)
        total += sum(gains)
        assert total == sum(layer.rank for layer in layers) <= target
        for layer, bundle in zip(layers, reserved, strict=True):
            if bundle is not None and layer.reserve is bundle:  # still waiting: nothing moved its e
                assert bundle.e is None and torch.equal(bundle.weights(), torch.full((len(bundle),), RESERVE))
            if not plan.get("advance", True):
                assert layer.reserve is None
        held = [id(p) for group in grown.optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held)) and set(held) == {id(p) for p in grown.trainables}
        assert grown.part.trainables(grown.model).keys() == dict(grown.trainables.items()).keys()
        assert grown.report.extra == {"total_rank": total, "num_trainable": grown.trainables.num_elements()}
    assert total == target and all(layer.reserve is None for layer in layers)
    assert all(layer.rank <= 32 for layer in layers)
    assert given == len(grown.part.history)
    if rounds.incre_rank < 24:
        assert (
            given
            == rounds.number
            == math.ceil((target - len(layers) * rounds.start_total / len(layers)) / (rounds.top_h * rounds.incre_rank))
        )
    assert sum(sum(entry["gains"].values()) for entry in grown.part.history) == target - rounds.start_total
    expected = sum(layer.rank * (layer.in_features + layer.out_features + 1) for layer in layers)
    assert grown.trainables.num_elements() == expected


def test_the_layers_of_highest_priority_win_and_ties_never_add_a_winner(tiny: Tiny) -> None:
    grown = Grown(tiny, steps=60, target_rank=2, init_warmup=1, interval=2, top_h=3)
    grown.step()
    grown.part._smooth = lambda: None
    grown.part.importance = torch.ones(len(grown.layers))
    grown.part.uncertainty = torch.ones(len(grown.layers))
    grown.part.uncertainty[9] = 2.0
    grown.step()
    assert [i for i, layer in enumerate(grown.layers) if layer.rank == 2] == [0, 1, 9]


def test_what_is_activated_keeps_its_state_and_what_is_new_starts_its_own_schedule(tiny: Tiny) -> None:
    grown = Grown(tiny, steps=60, target_rank=4, init_warmup=1, interval=2, top_h=2, decay=0.1)
    grown.step()
    waiting = {name: (p, grown.optimizer.state[p]["exp_avg"]) for name, p in grown.trainables.items()}
    remap = grown.step()
    assert remap is not None and remap.born == 2
    for name, (p, moment) in waiting.items():
        assert grown.trainables[name] is p and grown.optimizer.state[p]["exp_avg"] is moment
    fresh = set(dict(grown.trainables.items())) - set(waiting)
    assert {name.rpartition(".")[2] for name in fresh} == {"a", "b", "e"} and len(fresh) == 6
    assert births(grown.optimizer, grown.trainables) == dict.fromkeys(fresh, 2)
    for group in grown.optimizer.param_groups:
        assert {p.dim() for p in group["params"]} == ({2} if group["weight_decay"] else {1})
    activated = [p for name, p in grown.trainables.items() if name in fresh and name.endswith(".e")]
    assert all(torch.equal(e, torch.full((2,), RESERVE)) for e in activated)


def test_a_cut_reserve_keeps_the_state_of_the_pieces_that_stay(tiny: Tiny) -> None:
    grown = Grown(tiny, steps=60, target_rank=2, lora_r=1, incre_rank=4, init_warmup=1, interval=2, top_h=4)
    grown.step()
    before = {name: (p.detach().clone(), dict(grown.optimizer.state[p])) for name, p in grown.trainables.items()}
    waits: dict[str, Tensor] = {}
    remap = grown.step()
    assert remap is not None and len(remap.tensors) == 2  # 14 = 3 * 4 + 2
    for name in remap.tensors:
        new, side = grown.trainables[name], slice(0, 2)
        state = grown.optimizer.state[new]
        assert state["step"] == 2 and "born" not in next(
            g for g in grown.optimizer.param_groups if any(p is new for p in g["params"])
        )
        assert new.shape[0 if name.endswith("a") else 1] == 2 and state["exp_avg"].shape == new.shape
        old, _ = before[name]
        assert (old[side] if name.endswith("a") else old[:, side]).shape == new.shape
        waits[name] = new
    grown.step()
    assert all(torch.isfinite(p).all() and grown.optimizer.state[p]["step"] == 3 for p in waits.values())


@pytest.mark.parametrize("scale", ["rank", "fixed"])
def test_dividing_by_the_rank_shrinks_what_is_there_and_a_fixed_strength_does_not(tiny: Tiny, scale: str) -> None:
    grown = Grown(tiny, steps=60, target_rank=2, init_warmup=1, interval=4, top_h=14, scale=scale, advance=False)
    for _ in range(3):
        grown.step()
    grown.backward(next(grown.batches))
    grown.optimizer.step()
    grown.optimizer.zero_grad()
    before = deltas(grown)
    grown.part._allocate(4)
    for old, new in zip(before, deltas(grown), strict=True):
        torch.testing.assert_close(new, old * (0.5 if scale == "rank" else 1.0))
        assert old.abs().max() > 0


# ── the regulariser ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_regulariser_stacks_all_pieces_of_a_layer(tiny: Tiny) -> None:
    grown = Grown(tiny, steps=60, target_rank=4, init_warmup=1, interval=2, top_h=3, orth_weight=0.3)
    for _ in range(5):
        grown.step()
    loss = Loss(torch.zeros(()), 1.0)
    got = float(grown.term.term(grown.model, {}, loss, 1.0).detach())
    norms = []
    for layer in grown.layers:
        a = np.concatenate([bundle.a.detach().double().numpy() for bundle in layer.bundles])
        b = np.concatenate([bundle.b.detach().double().numpy() for bundle in layer.bundles], axis=1)
        norms += [np.linalg.norm(m - np.eye(len(m))) for m in (a @ a.T, b.T @ b)]
    assert got == pytest.approx(0.3 * np.mean(norms), rel=1e-5)
    shares = [float(grown.term.term(grown.model, {}, loss, share).detach()) for share in (0.25, 0.75)]
    assert sum(shares) == pytest.approx(got, rel=1e-6)  # cutting the batch changes nothing
    assert float(Orthogonality(grown.part, 0.0).term(grown.model, {}, loss, 1.0)) == 0.0


def test_two_pieces_that_say_the_same_are_noticed(tiny: Tiny) -> None:
    layer = GrowingLinear(nn.Linear(6, 5), alpha=1.0, divisor=None)
    a, b = torch.eye(6)[:1], torch.eye(5)[:, :1]
    layer.append(a.clone(), b.clone(), True)
    assert float(layer.disorder().detach()) == 0.0
    layer.append(a.clone(), b.clone(), True)  # each piece by itself is perfect
    assert float(layer.disorder().detach()) == pytest.approx(2 * math.sqrt(2))
    layer.disorder().backward()
    assert torch.isfinite(layer.bundles[0].a.grad).all()  # type: ignore[arg-type]


# ── taking it home ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["causal_lm", "classify"])
@pytest.mark.parametrize("scale", ["rank", "fixed"])
@pytest.mark.parametrize("steps", [7, 16], ids=["while growing", "after growing"])
def test_export_merge_and_restore_answer_the_same(
    tiny: Tiny, tmp_path: Path, task: str, scale: str, steps: int
) -> None:
    from peft import PeftModel

    grown = Grown(tiny, steps=60, task=task, target_rank=4, init_warmup=1, interval=2, top_h=4, scale=scale)
    for _ in range(steps):
        grown.step()
    ranks = {layer.rank for layer in grown.layers}
    assert len(ranks) > 1 and (grown.part.total == grown.part.rounds.target_total) is (steps == 16)
    batch = next(grown.batches)
    learned = grown.logits(batch)
    with torch.no_grad():  # a piece that learned nothing is left out of the file, without changing the strength
        grown.layers[0].bundles[0].e.zero_()  # type: ignore[union-attr]
        learned = grown.logits(batch)
    payload = grown.part.export(grown.model)
    folder = write_peft(payload, tmp_path / "adapter")
    base = encoder(tiny) if task == "classify" else decoder(tiny)
    if task == "classify":
        nn.init.normal_(base.classifier.weight)  # the loader must not be lucky
    loaded = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(logits_of(loaded, batch), learned, rtol=0, atol=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    names = list(grown.facts.model.linears)
    assert config["rank_pattern"] == {
        n: max(1, x.rank - (i == 0)) for i, (n, x) in enumerate(zip(names, grown.layers, strict=True))
    }
    assert payload.files["allocation.json"]["total_rank"] == grown.part.total
    json.dumps(payload.files, allow_nan=False)

    other = Grown(tiny, steps=60, task=task, seed=9, target_rank=4, scale=scale)
    other.part.restore(other.model, payload)
    torch.testing.assert_close(other.logits(batch), learned, rtol=0, atol=1e-5)

    assert grown.part.merge(grown.model)
    assert {type(grown.model.get_submodule(name)) for name in names} == {nn.Linear}
    torch.testing.assert_close(grown.logits(batch), learned, rtol=0, atol=1e-5)


# ── the plan ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layers", [14, 36, 72])
@pytest.mark.parametrize("target", [2, 4, 8])
@pytest.mark.parametrize("steps", [4, 8, 25, 100, 1000, 30000])
def test_a_derived_plan_hands_out_everything_in_the_first_half(layers: int, target: int, steps: int) -> None:
    rounds = plan_rounds(IncreLoRA.Params(target_rank=target), layers, steps)
    assert rounds.incre_rank == {2: 1, 4: 2, 8: 4}[target] and rounds.top_h <= layers
    at = [step for step in range(1, steps + 1) if rounds.at(step)][: rounds.number]
    assert (at[0], at[-1], len(at)) == (rounds.first, rounds.last, rounds.number)
    if steps >= 25:
        assert rounds.last <= steps / 2
    assert rounds.last < steps
    if steps >= 1000 and layers * (target - 1) >= 11 * rounds.incre_rank:
        assert 7 <= rounds.number <= 12
    assert f"{rounds.number:,} round" in rounds.sentence()


def test_the_paper_plan_is_the_rounds_formula_of_the_paper() -> None:
    params = IncreLoRA.Params(target_rank=8, init_warmup=100, interval=100, top_h=18)
    rounds = plan_rounds(params, 72, 3900)
    assert rounds.number == math.ceil((72 * 8 - 72) / (18 * 4)) == 7 and (rounds.first, rounds.last) == (200, 800)


def test_a_run_that_ends_before_the_last_allocation_is_refused_with_numbers(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        plan_rounds(IncreLoRA.Params(interval=10, top_h=1), 14, 100)
    assert "step 140" in str(caught.value) and "100" in str(caught.value) and caught.value.fault.code == "too_few_steps"
    folder = lay(tmp_path, tiny.recipe([("increlora", {"init_warmup": 7})], max_steps=8))
    result = run_folder(folder)
    assert (result["outcome"], result["reason"]) == ("failed", "bad_input") and result["faults"][0]["way_out"]


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_impossible_settings_are_refused_with_the_way_out(tiny: Tiny) -> None:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"), "causal_lm")

    def faults(**params: Any) -> list[tuple[str, str]]:
        found = IncreLoRA.check(IncreLoRA.Params(**params), facts)
        assert all(fault.why.endswith(".") and fault.way_out.endswith((".", "?")) for fault in found)
        return [(fault.where, fault.code) for fault in found]

    assert faults() == []
    assert faults(target_rank=33) == [("target_rank", "too_large")]
    assert faults(target_rank=4, lora_r=4) == [("target_rank", "nothing_to_grow")]
    assert faults(target_rank=1) == [("target_rank", "nothing_to_grow")]
    assert faults(targets="q_porj") == [("targets", "no_such_layer")]
    assert faults(targets="model.layers.0.mlp.up_proj") == [("targets", "one_layer")]
    bare = facts_for(replace(facts.model, linears={}, family="gpt2"), "causal_lm")
    assert not IncreLoRA.supports(bare).ok


def test_two_methods_on_one_layer_are_refused_and_two_on_different_layers_are_not(tiny: Tiny) -> None:
    def recipe(mine: str, other: str) -> Any:
        from engine.core.recipe import parse_recipe

        methods = [
            {"slug": "increlora", "params": {"targets": mine}},
            {"slug": "paca", "params": {"r": 4, "targets": other}},
        ]
        return parse_recipe({**tiny.inputs("causal_lm"), "methods": methods, "settings": {"max_steps": 8}})

    faults = check(recipe("attention", "q_proj")).faults
    assert faults and all(fault.why and fault.way_out for fault in faults)
    assert not check(recipe("attention", "feed-forward")).faults


# ── whole runs ────────────────────────────────────────────────────────────────────────────────────────────────────────

GROW: dict[str, Any] = {
    "target_rank": 4,
    "init_warmup": 1,
    "interval": 2,
    "top_h": 9,
    "alpha": 8,
}  # 42 = 18 + 18 + 6, or 39 = 18 + 18 + 3


@pytest.mark.parametrize("task", ["causal_lm", "classify"])
def test_it_runs_with_clipping_a_schedule_and_a_watcher_and_tells_what_it_did(
    tiny: Tiny, tmp_path: Path, task: str
) -> None:
    methods: list[tuple[str, dict[str, Any]]] = [
        ("increlora", GROW),
        ("clip", {}),
        ("cosine", {"warmup": 0.25}),
        ("patience", {}),
    ]
    folder = lay(tmp_path, tiny.recipe(methods, task=task, max_steps=10, epochs=4, accumulate=2, evaluations=1))
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result["message"]
    certificate = json.loads((folder / "artifact" / "certificate.json").read_text())
    assert certificate["ok"], certificate["sentence"]
    rows, layers = metric_rows(folder), 13 if task == "classify" else 14
    totals, numbers = [row["total_rank"] for row in rows], [row["num_trainable"] for row in rows]
    assert totals[0] == layers and totals[-1] == 4 * layers and totals == sorted(totals)
    assert all((a != b) is (step in {2, 4, 6}) for step, (a, b) in enumerate(pairwise(totals), start=2))
    assert numbers[0] < numbers[1] == numbers[2] < numbers[3] and numbers[5] == numbers[-1]  # it grows in steps
    told = json.loads((folder / "artifact" / "adapter" / "allocation.json").read_text())
    assert [entry["step"] for entry in told["history"]] == [2, 4, 6] and told["total_rank"] == 4 * layers
    assert any("pieces" in event["message"] for event in events(folder, "log"))


@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_stopped_between_rounds_goes_on_to_the_same_bits(tiny: Tiny, tmp_path: Path, stop: int) -> None:
    methods: list[tuple[str, dict[str, Any]]] = [
        ("increlora", GROW),
        ("clip", {"max_norm": 0.1}),
        ("cosine", {"warmup": 0.3}),
    ]
    recipe = tiny.recipe(methods, max_steps=8, checkpoint_every=stop, evaluations=1)
    whole, folder = lay(tmp_path / "whole", recipe), tmp_path / "stopped"
    assert run_folder(whole)["outcome"] == "succeeded"
    run_and_pause_behind(stop, folder, recipe)
    assert run_folder(folder)["outcome"] == "succeeded"
    assert_same_run(folder, whole)


@pytest.mark.parametrize("best", [0, 3])
def test_a_best_checkpoint_from_before_a_growth_is_what_is_exported(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    best_comes_at(best, monkeypatch)
    folder = lay(tmp_path, tiny.recipe([("increlora", GROW)], max_steps=8, checkpoint_every=1, evaluations=8))
    assert run_folder(folder)["outcome"] == "succeeded"
    certificate = json.loads((folder / "artifact" / "certificate.json").read_text())
    assert certificate["ok"] and json.loads((folder / "artifact" / "artifact.json").read_text())["used_best"]
    told = json.loads((folder / "artifact" / "adapter" / "allocation.json").read_text())
    assert told["total_rank"] == {0: 14, 3: 14 + 18}[best] and len(told["history"]) == {0: 0, 3: 1}[best]


def test_bf16_follows_the_same_curve(tiny: Tiny, tmp_path: Path) -> None:
    exact, rounded = (
        lay(tmp_path / precision, tiny.recipe([("increlora", GROW)], precision=precision, evaluations=1))
        for precision in ("fp32", "bf16")
    )
    assert run_folder(exact)["outcome"] == "succeeded" and run_folder(rounded)["outcome"] == "succeeded"
    for one, other in zip(metric_rows(exact), metric_rows(rounded), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02) and other["total_rank"] == one["total_rank"]


# ── what it costs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_claims_and_the_number_at_the_end(tiny: Tiny) -> None:
    grown = Grown(tiny, steps=60, target_rank=3)
    params = IncreLoRA.Params(target_rank=3)
    shapes = grown.facts.model.linears.values()
    assert IncreLoRA.num_trainable(params, grown.facts) == sum(3 * (out + into + 1) for out, into in shapes)
    assert IncreLoRA.claims(params, grown.facts) == {f"{name}.weight" for name in grown.facts.model.linears}
    assert IncreLoRA.slots == (Slot.PARAMETRIZATION, Slot.LOSS_TERM)
