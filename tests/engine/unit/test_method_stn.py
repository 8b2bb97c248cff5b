"""Self-tuning network against independent computations: dense weights, finite differences, the closed form of ridge regression, counted passes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.core.control import Control
from engine.core.events import EventLog
from engine.core.facts import Facts
from engine.core.recipe import parse_recipe
from engine.core.slots import Slot
from engine.io.tensors import load_tensors
from engine.methods.stn import SelfTuningNetwork
from engine.ops.check import check, require
from engine.ops.folder import run_folder
from engine.ops.train import prepare
from engine.parts.best_response import HyperLinear, Knob, Knobs
from engine.parts.ranges import Range
from engine.parts.self_tuning import SelfTuning, SetAside, Trajectory
from engine.tasks.base import Encoded, Example
from engine.train import checkpoint
from engine.train.run import Run
from tests.engine.tiny import Tiny, lay, metric_rows
from tests.engine.tuned_digits import Bench

STN: dict[str, Any] = {"warmup": 0.0, "train_steps": 2}


def started(
    tiny: Tiny,
    folder: Path,
    *others: tuple[str, dict[str, Any]],
    task: str = "classify",
    params: dict[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """A prepared run of the real engine, before its first step."""
    recipe = tiny.recipe([("stn", {**STN, **(params or {})}), *others], task=task, **settings)
    lay(folder, recipe)
    run = prepare(require(recipe), folder, EventLog(folder), Control(folder))
    run.model.train()
    return run


def rule_of(run: Run) -> SelfTuning:
    assert isinstance(run.update_rule, SelfTuning)
    return run.update_rule


def step(run: Run) -> Any:
    report = run.update_rule.update(run, run.next_batches())
    run.clock.step, run.clock.samples, run.clock.tokens = report.step, report.samples, report.tokens
    return report


# ── the gradient of the numbers ───────────────────────────────────────────────────────────────────────────────────────


def test_the_gradient_of_raw_numbers_and_spreads_matches_finite_differences() -> None:
    bench = Bench(3, start=0.3, double=True)
    rule, dial = bench.step, bench.knobs
    for made in bench.layers.wrapped.values():
        nn.init.normal_(made.response, std=0.1)
    batch = {**rule._next_aside(bench.run)}
    batch["pixels"] = batch["pixels"].double()
    state = rule.noise.get_state()

    def objective() -> float:
        """Written down again from its definition: mean loss of per-example dense networks, minus tau times the entropy."""
        rule.noise.set_state(state)
        noise = torch.randn(len(batch["labels"]), 1, generator=rule.noise).double()
        rows = dial.raw.detach() + torch.log1p(torch.exp(dial.scale.detach())) * noise
        total = 0.0
        for example in range(len(rows)):
            x = batch["pixels"][example]
            for place, name in enumerate(("0", "2", "4")):
                made = bench.layers.wrapped[name]
                weight, bias = made.effective(rows[example])
                x = weight @ x + bias
                x = x.relu() if place < 2 else x
            total += float(functional.cross_entropy(x[None], batch["labels"][example : example + 1]).detach())
        width = float(torch.log1p(torch.exp(dial.scale.detach())))
        return total / len(rows) - rule.entropy * math.log(width * math.sqrt(2 * math.pi * math.e))

    rule.noise.set_state(state)
    _, (raw, scale) = rule.hyper_gradients(bench.run, batch)
    assert scale is not None
    for number, gradient in ((dial.raw, raw), (dial.scale, scale)):
        ends = []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                number += shift
            ends.append(objective())
            with torch.no_grad():
                number -= shift
        assert float(gradient) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)
    assert abs(float(raw)) > 1e-4


# ── the two kinds of steps, in the real engine ────────────────────────────────────────────────────────────────────────


def test_a_training_step_leaves_the_numbers_and_a_tuning_step_leaves_the_network_bit_for_bit(
    tiny: Tiny, tmp_path: Path
) -> None:
    run = started(tiny, tmp_path)
    rule = rule_of(run)
    raw, scale = rule.knobs.raw.detach().clone(), rule.knobs.scale.detach().clone()
    before = {name: tensor.clone() for name, tensor in run.trainables.tensors().items()}
    step(run)  # the first of two training steps
    assert torch.equal(rule.knobs.raw, raw) and torch.equal(rule.knobs.scale, scale) and rule.passes == 1
    assert any(not torch.equal(tensor, before[name]) for name, tensor in run.trainables.tensors().items())

    step(run)  # a second one with its tuning step: now there is a response
    state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    moments = {id(p): {k: torch.as_tensor(v).clone() for k, v in s.items()} for p, s in run.optimizer.state.items()}
    modes = [module.training for module in run.model.modules()]
    raw, scale = rule.knobs.raw.detach().clone(), rule.knobs.scale.detach().clone()
    rule.tune_once(run)
    assert all(torch.equal(tensor, state[name]) for name, tensor in run.model.state_dict().items())
    assert all(
        torch.equal(torch.as_tensor(v), moments[id(p)][k]) for p, s in run.optimizer.state.items() for k, v in s.items()
    )
    assert all(parameter.grad is None and parameter.requires_grad for parameter in run.trainables)
    assert modes == [module.training for module in run.model.modules()] and rule.knobs.play is None
    assert (rule.knobs.raw != raw).all() and not torch.equal(rule.knobs.scale, scale)


def test_no_regulariser_acts_in_a_tuning_step(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(tiny, tmp_path, params={"stretch": True})
    seen: list[tuple[bool, bool]] = []
    original = run.objective.loss

    def spy(model: nn.Module, batch: Any, rng: Any) -> Any:
        play = rule_of(run).knobs.play
        assert (
            play is not None
            and len(play.rows) == len(batch["labels"])
            and len(play.rows.unique(dim=0)) == len(play.rows)
        )
        seen.append((play.values is None, model.training))
        return original(model, batch, rng)

    monkeypatch.setattr(run.objective, "loss", spy)
    for _ in range(4):
        step(run)
    assert seen == [(False, True), (False, True), (True, False)] * 2


def test_alternation_warm_up_and_the_count_of_passes(tiny: Tiny, tmp_path: Path) -> None:
    run = started(tiny, tmp_path, params={"train_steps": 2, "val_steps": 3, "warmup": 0.5})
    per_epoch, reports = run.clock.steps_per_epoch, [step(run) for _ in range(8)]
    tuned = [report.step for report in reports if "validation_loss" in report.extra]
    assert (
        tuned == [number for number in range(1, 9) if number % 2 == 0 and number > 0.5 * per_epoch] and len(tuned) < 4
    )
    assert reports[-1].extra["passes"] == 8 + 3 * len(tuned)
    still = [float(report.extra["dropout"]) for report in reports[: tuned[0] - 1]]
    assert len(set(still)) == 1 and float(reports[-1].extra["dropout"]) != still[0]


def test_the_start_is_the_base_model_and_only_named_layers_and_the_head_learn(tiny: Tiny, tmp_path: Path) -> None:
    run = started(tiny, tmp_path)
    facts, rule = run.facts, rule_of(run)
    base = run.task.load_model(facts.model, facts.data, dtype=torch.float32, seed=run.settings.seed).eval()
    batch = run.task.collate(run.encoded.holdout[:4], run.tokenizer, run.recipe)
    run.model.eval()
    assert torch.equal(run.task.forward_logits(run.model, batch)[0], run.task.forward_logits(base, batch)[0])
    wrapped = rule.layers.wrapped
    assert (
        "classifier" in wrapped
        and any(".1." in name for name in wrapped)
        and not any(".0." in name for name in wrapped)
    )
    chosen = SelfTuningNetwork.Params(**STN)
    head = wrapped["classifier"]
    number = len(rule.knobs)
    extra = 2 * head.out_features * (head.in_features + 1 + number)
    assert run.trainables.num_elements() == SelfTuningNetwork.num_trainable(chosen, facts) + extra
    assert {name for name, p in run.model.named_parameters() if p.requires_grad} == {
        f"{name}.{short}" for name, made in wrapped.items() for short in made.own()
    }


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_examples_fall_into_three_parts_and_the_plan_counts_what_is_read(tiny: Tiny, tmp_path: Path) -> None:
    run = started(tiny, tmp_path, max_steps=None, epochs=2)
    aside = set(rule_of(run).aside.aside)
    every = set(range(len(run.encoded.train)))
    assert len(aside) == round(0.2 * len(every))
    read: list[int] = []
    original = run._collate
    run._collate = lambda indices: (read.extend(indices), original(indices))[1]  # type: ignore[method-assign]
    while run.clock.step < run.clock.total_steps:
        step(run)
    assert sorted(read) == sorted(2 * list(every - aside))  # two whole passes, nobody of those set aside
    assert run.clock.num_samples == len(every - aside) and run.clock.steps_per_epoch == math.ceil(
        len(every - aside) / 4
    )
    held_out = {example.source for example in run.encoded.holdout}
    assert held_out and not held_out & {run.encoded.train[index].source for index in aside}


def test_the_same_seed_sets_the_same_examples_aside_and_repeated_texts_stay_together() -> None:
    examples = [Example([place // 2, 7], [place // 2 % 2], place) for place in range(60)]  # every text twice
    split = []
    for seed in (1, 1, 2):
        policy = SetAside(0.2, seed)
        policy.survey(Encoded(train=examples, holdout=[], holdout_rows=[]))
        split.append(policy.aside)
        assert all((index ^ 1) in policy.aside for index in policy.aside)
        labels = [examples[index].labels[0] for index in policy.aside]
        assert len(labels) == 12 and labels.count(0) == 6
        assert sorted([*policy.rows(range(60), 0), *policy.aside]) == list(range(60))
    assert split[0] == split[1] != split[2]


def test_one_text_cannot_be_split() -> None:
    policy = SetAside(0.2, 1)
    with pytest.raises(Exception, match="cannot be split"):
        policy.survey(Encoded(train=[Example([5], [0], 0)] * 10, holdout=[], holdout_rows=[]))


def test_hidden_words_are_real_words_and_as_many_as_asked(tiny: Tiny, tmp_path: Path) -> None:
    run = started(tiny, tmp_path, params={"stretch": True})
    rule = rule_of(run)
    batch = run.task.collate(run.encoded.train[:48], run.tokenizer, run.recipe)
    words, stretch = rule.knobs.place("words_hidden"), rule.knobs.place("stretch_hidden")
    assert words is not None and stretch is not None
    special = torch.tensor(run.tokenizer.all_special_ids)
    free = batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], special)
    values = torch.zeros(48, len(rule.knobs))
    assert torch.equal(rule.hidden(run, batch, values)["input_ids"], batch["input_ids"])
    values[:24, words], values[24:, words] = 0.1, 0.5
    changed = torch.stack([_differs(rule.hidden(run, batch, values), batch) for _ in range(60)]).float().mean(0)
    assert not changed[~free].any()
    mark = run.tokenizer.mask_token_id or run.tokenizer.unk_token_id
    tolerance = 0.03 if mark is not None else 0.06  # another word may be the same word
    assert float(changed[:24][free[:24]].mean()) == pytest.approx(0.1, abs=tolerance)
    assert float(changed[24:][free[24:]].mean()) == pytest.approx(0.5, abs=tolerance)
    values.zero_()
    values[:, stretch] = 3
    for row in _differs(rule.hidden(run, batch, values), batch):
        places = row.nonzero().squeeze(1)
        assert len(places) <= 3 and (len(places) < 2 or int(places[-1] - places[0]) < 3)


def _differs(one: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    return one["input_ids"] != other["input_ids"]


# ── pieces, packing, company ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_cut_into_pieces_makes_the_same_step(tiny: Tiny, tmp_path: Path) -> None:
    """With strengths that stand still (no noise, no dropout) a step is a sum over examples, however it is cut."""
    quiet = {"tune": False, "dropout": False, "words": False, "decay_start": 0.5, "pull": "zero"}
    whole = started(tiny, tmp_path / "whole", params=quiet, batch_size=8)
    cut = started(tiny, tmp_path / "cut", params=quiet, batch_size=2, accumulate=4)
    for run in (whole, cut):
        run.model.eval()  # the model's own dropout would draw differently
    rows = [[0, 1], [2, 3], [4, 5], [6, 7]]
    one = whole.update_rule.update(whole, [whole._collate([index for row in rows for index in row])])
    many = cut.update_rule.update(cut, [cut._collate(indices) for indices in rows])
    assert float(one.loss) == pytest.approx(float(many.loss), rel=1e-5)
    assert float(one.grad_norm) == pytest.approx(float(many.grad_norm), rel=1e-4)
    assert "micro_norm" in many.extra and many.extra["passes"] == 4


def test_weight_decay_is_part_of_the_loss_of_every_example(tiny: Tiny, tmp_path: Path) -> None:
    only = {"tune": False, "dropout": False, "words": False, "decay_start": 0.5, "pull": "zero", "targets": "head"}
    run = started(tiny, tmp_path, params=only)
    rule = rule_of(run)
    run.model.eval()
    batch = run._collate([0, 1, 2, 3])
    loss, total = rule.piece(run, batch, whole=4.0, share=1.0, part=1.0)
    head = rule.layers.wrapped["classifier"]
    assert float(total - loss.total / 4) == pytest.approx(0.5 * 0.5 * float(head.weight.square().sum()), rel=1e-4)


def test_packed_rows_are_unpacked_so_that_every_example_has_its_own_draw(tiny: Tiny, tmp_path: Path) -> None:
    run = started(tiny, tmp_path, task="instruct", packing=True, batch_size=6, max_length=128)
    rule = rule_of(run)
    short = [
        Example(e.input_ids[:n], e.input_ids[:n], e.source)
        for e, n in zip(run.encoded.train, (30, 12, 9, 20, 7, 5), strict=False)
    ]
    micro = [run.task.collate(short, run.tokenizer, run.recipe)]
    assert len(micro[0]["input_ids"]) < 6 and micro[0]["attention_mask"].dim() == 4  # really packed
    rows: list[int] = []
    original = rule.knobs.draw
    rule.knobs.draw = lambda examples, generator: (rows.append(examples), original(examples, generator))[1]  # type: ignore[method-assign]
    report = run.update_rule.update(run, micro)
    assert rows == [6] and report.samples == 6


@pytest.mark.parametrize("task", ["classify", "causal_lm", "instruct"])
def test_it_stands_beside_clip_cosine_patience_and_lora_on_other_layers(tiny: Tiny, tmp_path: Path, task: str) -> None:
    company = [
        ("clip", {"max_norm": 0.5}),
        ("cosine", {}),
        ("patience", {}),
        ("lora", {"r": 2, "targets": "attention"}),
        ("adamw", {}),
    ]
    layers = "feed-forward" if task != "classify" else "head"
    recipe = tiny.recipe([("stn", {**STN, "targets": layers}), *company], task=task, accumulate=2)
    folder = lay(tmp_path, recipe)
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result["message"]
    certificate = json.loads((folder / "artifact" / "certificate.json").read_text())
    assert certificate["ok"], certificate
    rows = metric_rows(folder)
    assert {"clipped", "dropout", "weight_decay", "words_hidden", "dropout_spread", "passes"} <= rows[-1].keys()
    assert rows[-1]["dropout"] != rows[0]["dropout"]


def test_recomputing_activations_changes_no_number(tiny: Tiny, tmp_path: Path) -> None:
    losses = []
    for again in (False, True):
        run = started(
            tiny,
            tmp_path / str(again),
            task="causal_lm",
            gradient_checkpointing=again,
            params={"targets": "all-linear"},
        )
        torch.manual_seed(0)
        losses.append([float(step(run).loss) for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ── what is taken home ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_schedule_and_the_numbers_of_the_best_checkpoint_are_taken_home(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(
        [("stn", {**STN, "hyper_rate": 0.3})],
        task="classify",
        max_steps=12,
        epochs=4,
        evaluations=6,
        learning_rate=3e-2,
    )
    folder = lay(tmp_path, recipe)
    assert run_folder(folder)["outcome"] == "succeeded"
    description = json.loads((folder / "artifact" / "artifact.json").read_text())
    payload = load_tensors(folder / "artifact" / "adapter" / "adapter.safetensors")
    config = json.loads((folder / "artifact" / "adapter" / "adapter.json").read_text())
    best = checkpoint.load(folder / "checkpoints" / f"step-{description['best_step']:08d}")
    assert description["best_step"] < 12  # the numbers have moved on since
    assert torch.equal(payload["knobs.raw"], best.tensors["part/stn.0/parametrization/raw"])
    steps, values = payload["schedule.steps"].tolist(), payload["schedule.values"]
    assert steps == [0, 2, 4, 6, 8, 10, 12] and values.shape == (7, 3)
    rows = metric_rows(folder)
    for place, (number, hyper) in enumerate(
        (number, hyper) for number in (2, 6, 12) for hyper in config["hyperparameters"]
    ):
        at = steps.index(number)
        assert float(values[at, place % 3]) == pytest.approx(rows[number - 1][hyper["name"]], rel=1e-6)
    replay = Trajectory(Knobs([Knob("k", Range(0.0, 0.9), 0.1)], 0.5))
    replay.load(payload)
    assert (
        replay.at(5) == values[2].tolist()
        and replay.at(0) == values[0].tolist()
        and replay.at(99) == values[-1].tolist()
    )


def test_the_merged_model_is_plain_and_twice_as_small(tiny: Tiny, tmp_path: Path) -> None:
    run = started(tiny, tmp_path)
    for _ in range(4):
        step(run)
    part, batch = rule_of(run).layers, run.task.collate(run.encoded.holdout[:4], run.tokenizer, run.recipe)
    run.model.eval()
    before = run.task.forward_logits(run.model, batch)[0]
    learned = run.trainables.num_elements()
    assert part.merge(run.model) and not any(isinstance(module, HyperLinear) for module in run.model.modules())
    after = run.task.forward_logits(run.model, batch)[0]
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    plain = sum(p.numel() for name in part.wrapped for p in run.model.get_submodule(name).parameters())
    number = len(rule_of(run).knobs)
    outs = sum(made.out_features * (2 if made.bias is not None else 1) for made in part.wrapped.values())
    assert learned == 2 * plain + outs * number  # 2x weights, and 2 out n numbers a layer


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def faults_of(
    tiny: Tiny, params: dict[str, Any], *others: str, task: str = "classify", rows: int | None = None
) -> Iterator[tuple[str, str, str]]:
    inputs = tiny.inputs(task)
    if rows is not None:
        path = tiny.folder / f"few{rows}.csv"
        lines = (tiny.folder / "messages.csv").read_text().splitlines()
        path.write_text("\n".join(lines[: rows + 1]) + "\n")
        inputs["data"] = {"source": f"file:{path}"}
    methods = [{"slug": "stn", "params": params}, *({"slug": slug, "params": {}} for slug in others)]
    for fault in check(parse_recipe({**inputs, "methods": methods})).faults:
        assert fault.what and fault.why and fault.way_out
        yield fault.where, fault.code, str(fault)


@pytest.mark.parametrize(
    ("params", "task", "where", "code"),
    [
        (
            {"dropout": False, "decay": False, "words": False},
            "classify",
            "methods[0].params.dropout",
            "nothing_to_tune",
        ),
        ({"dropout_start": 0.8, "dropout_high": 0.5}, "classify", "methods[0].params.dropout_start", "out_of_range"),
        ({"stretch": True, "stretch_start": 9}, "classify", "methods[0].params.stretch_start", "out_of_range"),
        ({"targets": "no_such"}, "classify", "methods[0].params.targets", "no_such_layer"),
        ({"targets": "head"}, "causal_lm", "methods[0].params.targets", "no_such_layer"),
        ({"targets": "head", "head": False}, "classify", "methods[0].params.targets", "no_such_layer"),
        ({"entropy": 0.5}, "classify", "methods[0].params.entropy", "out_of_range"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tiny: Tiny, params: dict[str, Any], task: str, where: str, code: str
) -> None:
    assert (where, code) in [(at, kind) for at, kind, _ in faults_of(tiny, params, task=task)]


def test_company_that_claims_the_same_weights_is_refused_with_the_rule(tiny: Tiny) -> None:
    for other in ("full-finetuning", "lora"):
        where, _, text = next(item for item in faults_of(tiny, {}, other) if item[1] == "claimed_twice")
        assert where == "methods[1].slug" and Slot.PARAMETRIZATION.law in text and "other target layers" in text


def test_another_update_rule_is_refused_with_the_rule(tiny: Tiny) -> None:
    where, _, text = next(item for item in faults_of(tiny, {}, "backpropagation") if item[1] == "slot_taken")
    assert where == "methods[1]" and Slot.UPDATE_RULE.law in text and "Keep Self-tuning network" in text


def test_a_handful_of_rows_is_refused(tiny: Tiny) -> None:
    assert ("methods[0].params.validation_share", "too_few_rows") in [
        (at, kind) for at, kind, _ in faults_of(tiny, {}, rows=8)
    ]


def test_a_model_without_linear_layers_can_have_its_head_tuned_but_is_no_language_model_here() -> None:
    from dataclasses import replace

    from tests.engine.attached import facts_for

    model = _no_linears()
    assert not SelfTuningNetwork.supports(facts_for(model, "causal_lm")).ok
    assert SelfTuningNetwork.supports(facts_for(model, "classify")).ok
    few: Facts = replace(facts_for(model, "classify"), task="preference")
    assert not SelfTuningNetwork.supports(few).ok


def _no_linears() -> Any:
    from engine.core.facts import ModelFacts

    return ModelFacts(source="", path="", family="gpt2", kind="decoder", architecture="", num_parameters=1, num_layers=1, hidden_size=1, vocab_size=1,
                      max_positions=64, dtype="float32", tied_embeddings=True, has_chat_template=False, tensors={}, linears={})  # fmt: skip


def test_numbers_that_explode_end_the_run_with_a_way_out(tiny: Tiny, tmp_path: Path) -> None:
    run = started(tiny, tmp_path)
    step(run)
    with torch.no_grad():
        rule_of(run).layers.wrapped["classifier"].response.fill_(math.inf)
    with pytest.raises(Exception, match="infinite or not a number"):
        rule_of(run).tune_once(run)


def test_a_play_is_over_after_an_error(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(tiny, tmp_path)
    monkeypatch.setattr(run.objective, "loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(run)
    assert rule_of(run).knobs.play is None
