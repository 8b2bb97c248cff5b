"""GRPO against trl's own loss, dense computations of a few lines, and counted rollouts."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.core.errors import RecipeError
from engine.core.recipe import parse_recipe
from engine.methods.grpo import GRPO
from engine.ops.check import check
from engine.ops.folder import run_folder
from engine.parts.policy_gradient import PolicyGradient, group_advantages
from engine.parts.rollouts import Answer, Group, rows_as_batch, rows_of
from engine.tasks.batching import IGNORED
from engine.train.parts import seeded
from tests.engine.rolling import dense_logprobs, gathered, gradients, rolling, some_right
from tests.engine.tiny import Tiny, events, lay, metric_rows


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.folder / "decoder", dtype=torch.float32).eval()


def random_rows(model: Any, generator: torch.Generator, drift: float, count: int = 6) -> list[Answer]:
    """Answers of several lengths to prompts of one length; old log-probabilities differ from the model's by up to `drift`."""
    rows = []
    for number in range(count):
        prompt = torch.randint(5, 300, (5,), generator=generator).tolist()
        tokens = torch.randint(5, 300, (2 + number % 4,), generator=generator).tolist()
        noise = drift * torch.randn(len(tokens), generator=generator, dtype=torch.float64)
        old = (dense_logprobs(model, prompt, tokens) + noise).tolist()
        rows.append(Answer(prompt, tokens, old, float(torch.randn(1, generator=generator))))
    return rows


# ── the loss ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_advantages_are_those_of_the_group_alone() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    found = group_advantages(rewards).numpy()
    for mine, row in zip(found, rewards.numpy(), strict=True):
        np.testing.assert_allclose(mine, (row - row.mean()) / (row.std(ddof=1) + 1e-6), atol=1e-6)
    assert not found[2:].any()


def test_loss_gradient_and_clip_share_are_those_of_trl(model: Any) -> None:
    from trl import GRPOTrainer

    rows = random_rows(model, seeded(1, "rows"), drift=0.4)
    batch = rows_as_batch(rows, 0)
    reference = torch.randn(batch["input_ids"].shape, generator=seeded(2, "ref")) * 0.2 + batch["old_logprobs"]
    batch["ref_logprobs"] = reference
    ours = PolicyGradient(clip_low=0.2, clip_high=0.28, kl=0.04)
    loss = ours.loss(model, batch, torch.Generator())
    model.zero_grad()
    (loss.total / loss.weight).backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    numbers = ours.numbers()
    assert ours.weight(batch) == loss.weight == sum(len(row.tokens) for row in rows)

    longest = max(len(row.tokens) for row in rows)
    answer_mask = torch.tensor([[1] * len(r.tokens) + [0] * (longest - len(r.tokens)) for r in rows])

    def logps(model: Any, ids: Tensor, mask: Tensor, keep: int, **_: Any) -> tuple[Tensor, Tensor, None]:
        every = model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1].log_softmax(-1)
        return every.gather(-1, ids[:, -keep:, None])[..., 0], -(every.exp() * every).sum(-1).detach(), None

    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=logps, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=0.04, loss_type="bnpo", epsilon_low=0.2, epsilon_high=0.28, use_vllm=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None), model=SimpleNamespace(training=False),
        _entropy_bonus_enabled=False, _metrics={"eval": defaultdict(list)}, current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
    )  # fmt: skip
    inputs = {
        "prompt_ids": batch["input_ids"][:, :5], "prompt_mask": torch.ones(len(rows), 5, dtype=torch.long),
        "completion_ids": batch["input_ids"][:, 5:], "completion_mask": answer_mask, "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logprobs"][:, 5:], "ref_per_token_logps": reference[:, 5:],
    }  # fmt: skip
    theirs = inspect.unwrap(GRPOTrainer._compute_loss)(stub, model, inputs)
    torch.testing.assert_close(loss.total / loss.weight, theirs, rtol=1e-5, atol=1e-6)
    model.zero_grad()
    theirs.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, rtol=1e-4, atol=1e-6)
    metrics = stub._metrics["eval"]
    assert (
        numbers["clip_fraction"] == pytest.approx(metrics["clip_ratio/region_mean"][0]) and numbers["clip_fraction"] > 0
    )
    assert numbers["kl"] == pytest.approx(metrics["kl"][0], rel=1e-4)


def test_loss_is_that_of_a_loop_over_tokens(model: Any) -> None:
    rows = random_rows(model, seeded(3, "rows"), drift=0.5)
    batch = rows_as_batch(rows, 0)
    expected, count = 0.0, 0
    for row in rows:
        for new, old in zip(dense_logprobs(model, row.prompt, row.tokens).tolist(), row.logprobs, strict=True):
            r = np.exp(new - old)
            expected += max(-row.advantage * r, -row.advantage * min(max(r, 0.8), 1.2))
            count += 1
    loss = PolicyGradient(clip_low=0.2, clip_high=0.2).loss(model, batch, torch.Generator())
    assert loss.weight == count and float(loss.total.detach()) == pytest.approx(expected, abs=1e-4)


def test_without_difference_in_a_group_the_gradient_is_exactly_zero(tiny: Tiny, tmp_path: Path) -> None:
    open_wide = {"lowest_accuracy": 0.0, "highest_accuracy": 1.0}
    for mark in (0.0, 1.0):
        run = rolling(tiny, tmp_path / str(mark), "grpo", open_wide, lambda *_, mark=mark: mark)
        micro = gathered(run)
        assert sum(run.objective.weight(batch) for batch in micro) > 0
        assert not any(gradient.any() for gradient in gradients(run, micro).values())


def test_a_step_in_which_nothing_teaches_is_well_defined(tiny: Tiny, tmp_path: Path) -> None:
    run = rolling(tiny, tmp_path, "grpo", {"extra_batches": 2}, lambda *_: 0.0)
    micro = gathered(run)
    assert len(micro) == 1 and run.objective.weight(micro[0]) == 0.0 and int(micro[0]["num_samples"]) == 4
    report = run.update_rule.update(run, micro)
    assert float(report.loss) == 0.0 and float(report.grad_norm) == 0.0
    numbers = run.slots.policies[0].numbers()
    assert numbers["kept"] == 0.0 and numbers["answers"] == 3 * 4 * 4 and numbers["empty_rounds"] == 1
    assert "No problem taught anything" in str([event["message"] for event in events(tmp_path, "log")])


# ── rollouts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_recorded_log_probabilities_are_teacher_forced_ones(tiny: Tiny, tmp_path: Path) -> None:
    run = rolling(tiny, tmp_path, "grpo", {"lowest_accuracy": 0.0, "highest_accuracy": 1.0}, some_right)
    micro = gathered(run)
    checked = 0
    for batch in micro:
        for ids, mask, labels, old in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], batch["old_logprobs"], strict=True
        ):
            length, start = int(mask.sum()), int((labels != IGNORED).int().argmax())
            prompt, answer = ids[:start].tolist(), ids[start:length].tolist()
            expected = dense_logprobs(run.model, prompt, answer)
            torch.testing.assert_close(old[start:length].double(), expected, rtol=0, atol=1e-5)
            assert not old[:start].any() and not old[length:].any()
            checked += 1
    assert checked == 16


def test_groups_outside_of_the_range_are_left_out_and_the_rest_waits(tiny: Tiny, tmp_path: Path) -> None:
    plan = {"mini_batches": 2, "passes": 2, "extra_batches": 3}
    run = rolling(tiny, tmp_path, "grpo", plan, some_right, batch_size=3)
    policy: Any = run.slots.policies[0]
    seen = []
    for _ in range(4):  # 2 mini-batches, twice
        micro = gathered(run, 3)
        seen.append(sorted(tuple(ids) for batch in micro for ids in batch["input_ids"].tolist()))
        rewarded = torch.cat([batch["advantages"] for batch in micro]).view(-1, 4)
        assert len(rewarded) == 3 and (rewarded.std(1) > 0).all() and rewarded.mean(1).abs().max() < 1e-6
        assert sum(int(batch["num_samples"]) for batch in micro) == 3
    asked = policy.numbers()["answers"]
    pad = run.tokenizer.pad_token_id

    def answers(steps: list[list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
        return sorted(tuple(token for token in row if token != pad) for step in steps for row in step)

    assert answers(seen[:2]) == answers(seen[2:]), "both uses of a round hold the same answers"
    gathered(run, 3)
    assert policy.numbers()["answers"] > asked, "a new round begins when the stock is used up"


def test_state_goes_on_in_the_middle_of_a_round(tiny: Tiny, tmp_path: Path) -> None:
    plan = {"mini_batches": 2, "extra_batches": 3}
    run = rolling(tiny, tmp_path, "grpo", plan, some_right, batch_size=3)
    policy: Any = run.slots.policies[0]
    gathered(run, 3)
    state = copy.deepcopy(policy.state_dict())
    expected = [gathered(run, 3) for _ in range(3)]
    numbers = dict(policy.numbers())
    other: Any = GRPO(GRPO.Params(k=4, max_new_tokens=6, **plan)).parts(
        SimpleNamespace(recipe=run.recipe, slug="grpo")  # type: ignore[arg-type]
    )[0]
    other.load_state_dict(state)
    run.slots.policies[0] = other
    for step in expected:
        again = gathered(run, 3)
        assert len(step) == len(again)
        for one, two in zip(step, again, strict=True):
            assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert other.numbers() == numbers


def test_further_problems_come_once_in_each_pass(tiny: Tiny, tmp_path: Path) -> None:
    run = rolling(tiny, tmp_path, "grpo", {}, some_right)
    policy: Any = run.slots.policies[0]
    number = len(run.encoded.train)
    sources = [example.source for _ in range(2) for example in policy._more(run, number)]
    assert sorted(sources[:number]) == sorted(sources[number:]) == sorted(e.source for e in run.encoded.train)
    assert sources[:number] != sources[number:]


def test_the_cut_into_micro_batches_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    found = []
    for rows in (1, 3, 64):
        run = rolling(tiny, tmp_path / str(rows), "grpo", {"rows_at_a_time": rows, "extra_batches": 2}, some_right)
        micro = gathered(run)
        assert len(micro) == -(-16 // rows)
        found.append(gradients(run, micro))
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_reference_is_the_untouched_model_also_after_a_resume(tiny: Tiny, tmp_path: Path) -> None:
    run = rolling(tiny, tmp_path, "grpo", {"kl": 0.1}, some_right)
    base = copy.deepcopy(run.model).eval()
    with torch.no_grad():
        for parameter in run.trainables:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded(1, "drift")))
    batch = gathered(run)[0]
    place = int((batch["labels"][0] != IGNORED).int().argmax())
    length = int(batch["attention_mask"][0].sum())
    ids = batch["input_ids"][0].tolist()
    expected = dense_logprobs(base, ids[:place], ids[place:length])
    torch.testing.assert_close(batch["ref_logprobs"][0, place:length].double(), expected, rtol=0, atol=1e-5)
    run.objective.loss(run.model, batch, run.rng)
    assert run.objective.numbers()["kl"] > 0


def test_groups_survive_packing() -> None:
    group = Group(source=3, prompt=[1, 2], answers=[[5], [6, 7]], logprobs=[[-0.1], [-0.2, -0.3]], rewards=[1.0, 0.0])
    rows = rows_of(group)
    assert [row.tokens for row in rows] == [[5], [6, 7]] and rows[0].advantage == -rows[1].advantage > 0


# ── within the engine ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_stands_beside_other_slots(tiny: Tiny, tmp_path: Path) -> None:
    others: list[tuple[str, Mapping[str, Any]]] = [
        ("lora", {"r": 2}), ("clip", {}), ("cosine", {}), ("patience", {}), ("grpo", {"k": 4, "max_new_tokens": 8, "kl": 0.02})]  # fmt: skip
    recipe = tiny.recipe(others, task="verifiable", accumulate=2, max_steps=3)
    assert run_folder(lay(tmp_path, recipe))["outcome"] == "succeeded"
    rows = metric_rows(tmp_path)
    assert {"reward", "solved", "kept", "answer_tokens", "answers", "clip_fraction"} <= rows[0].keys()
    scores = events(tmp_path, "evaluation")[-1]
    assert {"eval_accuracy", "eval_accuracy_se", "eval_loss", "eval_loss_se", "general_loss"} <= scores.keys()


def test_it_is_refused_where_nothing_can_be_checked(tiny: Tiny) -> None:
    def faults(task: str, *methods: tuple[str, dict[str, Any]]) -> list[Any]:
        refs = [{"slug": "full-finetuning"}, *({"slug": slug, "params": params} for slug, params in methods)]
        return check(parse_recipe({**tiny.inputs(task), "methods": refs})).faults

    (fault,) = faults("causal_lm", ("grpo", {}))
    assert "verifiable" in fault.why and fault.way_out
    (fault,) = faults("verifiable", ("grpo", {}), ("guide-grpo", {}))
    assert fault.code == "slot_taken" and "GRPO" in fault.what and fault.way_out
    (fault,) = faults("verifiable", ("grpo", {"max_new_tokens": 128}))
    assert fault.code == "too_large" and "64" in fault.way_out
    codes = {
        f.code
        for f in faults("verifiable", ("grpo", {"max_new_tokens": 8, "lowest_accuracy": 0.9, "highest_accuracy": 0.2}))
    }
    assert codes == {"empty_range"}
    codes = {f.code for f in faults("verifiable", ("grpo", {"max_new_tokens": 8, "k": 2, "lowest_accuracy": 0.6}))}
    assert codes == {"empty_range"}
    with pytest.raises(RecipeError):
        tiny.recipe([("full-finetuning", {}), ("grpo", {"k": 1})], task="verifiable")
