"""Guide-GRPO: what is asked, what is learned, and with which ratios, against dense passes and counted answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.core.errors import EngineError
from engine.core.recipe import parse_recipe
from engine.methods.guide_grpo import GuideGRPO
from engine.ops.check import check, require
from engine.parts.policy_gradient import PolicyGradient, Squash
from engine.parts.rollouts import Answer, rows_as_batch
from engine.tasks.batching import IGNORED
from engine.tasks.verifiable import TASK
from engine.train.parts import seeded
from engine.train.run import Run
from tests.engine.rolling import Marked, dense_logprobs, gathered, gradients, rolling, some_right
from tests.engine.tiny import Tiny

OFF = {"squash": "off"}


def only_with_hint(row: Any, text: str, hinted: bool) -> float:
    return some_right(row, text, hinted) if hinted else 0.0


def rows_in(micro: list[dict[str, Tensor]]) -> list[tuple[list[int], list[int], Tensor, bool]]:
    """(prompt, answer, old log-probabilities of the answer, on_policy) of every row."""
    found = []
    for batch in micro:
        for ids, mask, labels, old, own in zip(
            *(batch[name] for name in ("input_ids", "attention_mask", "labels", "old_logprobs", "on_policy")),
            strict=True,
        ):
            length, start = int(mask.sum()), int((labels != IGNORED).int().argmax())
            assert labels[start:length].tolist() == ids[start:length].tolist()
            found.append((ids[:start].tolist(), ids[start:length].tolist(), old[start:length], bool(own)))
    return found


def prompts_of(run: Run, hinted: bool) -> dict[tuple[int, ...], dict[str, Any]]:
    rows = [run.encoded.rows[example.source] for example in run.encoded.train]
    return {tuple(TASK.prompt_ids(row, run.tokenizer, row["hint"] if hinted else "")): dict(row) for row in rows}


# ── what is learned ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_hinted_rows_are_the_plain_prompt_and_the_answer_with_ratios_of_the_hinted_prompt(
    tiny: Tiny, tmp_path: Path
) -> None:
    run = rolling(tiny, tmp_path, "guide-grpo", {"extra_batches": 3}, only_with_hint)
    rows = rows_in(gathered(run))
    plain = prompts_of(run, hinted=False)
    assert len(rows) == 16 and not any(own for *_, own in rows)
    apart = 0.0
    for prompt, answer, old, _ in rows:
        row = plain[tuple(prompt)]  # token for token the prompt without hint
        asked = TASK.prompt_ids(row, run.tokenizer, row["hint"])
        assert len(asked) > len(prompt) and run.tokenizer.decode(asked).count("Hint: begin with") == 1
        torch.testing.assert_close(old.double(), dense_logprobs(run.model, asked, answer), rtol=0, atol=1e-5)
        apart = max(apart, float((old.double() - dense_logprobs(run.model, prompt, answer)).abs().max()))
    assert apart > 1e-3, "the log-probabilities are those of the hinted prompt, not of the plain one"


def test_plain_groups_stay_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    run = rolling(
        tiny,
        tmp_path,
        "guide-grpo",
        {"extra_batches": 2},
        lambda row, text, hinted: some_right(row, text, hinted) * (not hinted),
    )
    rows = rows_in(gathered(run))
    assert rows and all(own for *_, own in rows)
    for prompt, answer, old, _ in rows:
        torch.testing.assert_close(old.double(), dense_logprobs(run.model, prompt, answer), rtol=0, atol=1e-5)


def test_an_empty_hint_gives_ratio_one_and_the_gradient_of_grpo(tiny: Tiny, tmp_path: Path) -> None:
    """Plain attempts are marked 0, so the same draws for the hinted ones need a second generator state: plain GRPO on those very rows."""
    run = rolling(tiny, tmp_path, "guide-grpo", {**OFF, "extra_batches": 2}, only_with_hint, silent_hints=True)
    micro = gathered(run)
    for prompt, answer, old, own in rows_in(micro):
        ratio = torch.exp(dense_logprobs(run.model, prompt, answer) - old.double())
        assert not own and (ratio - 1).abs().max() < 1e-5
    guided = gradients(run, micro)
    for batch in micro:
        batch["on_policy"] = torch.ones_like(batch["on_policy"])
    plain = gradients(run, micro)
    assert any(gradient.abs().max() > 1e-3 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(guided[name], gradient, rtol=0, atol=1e-6)


def test_all_failed_groups_without_hints_contribute_exactly_nothing(tiny: Tiny, tmp_path: Path) -> None:
    run = rolling(tiny, tmp_path, "guide-grpo", {}, lambda *_: 0.0)
    micro = gathered(run)
    assert [run.objective.weight(batch) for batch in micro] == [0.0]
    assert not any(gradient.any() for gradient in gradients(run, micro).values())
    mixed = rolling(tiny, tmp_path / "mixed", "guide-grpo", {"extra_batches": 0}, only_with_hint)
    without = {example.source for example in mixed.encoded.train[:2]}
    rows = list(mixed.encoded.rows)
    for source in without:
        rows[source] = {**rows[source], "hint": ""}
    mixed.encoded.rows = rows
    lost = {tuple(TASK.prompt_ids(rows[source], mixed.tokenizer)) for source in without}
    assert not lost & {tuple(prompt) for prompt, *_ in rows_in(gathered(mixed))}


# ── which groups are tried again ──────────────────────────────────────────────────────────────────────────────────────


def test_only_failed_groups_are_tried_again_and_counted(tiny: Tiny, tmp_path: Path) -> None:
    def half(row: Any, text: str, hinted: bool) -> float:
        hard = int(row["answer"]) % 2
        return some_right(row, text, hinted) if hinted or not hard else 0.0

    found = {}
    for threshold in (0.001, 1.0):
        run = rolling(
            tiny,
            tmp_path / str(threshold),
            "guide-grpo",
            {"retry_threshold": threshold, "extra_batches": 0, "k": 8},
            half,
            batch_size=12,
        )
        gathered(run, 12)
        policy: Any = run.slots.policies[0]
        found[threshold] = policy.numbers()
        task: Any = run.task
        assert isinstance(task, Marked)
        failed = {question for question, hinted in task.asked if hinted}
        hard = {
            row["question"]
            for row in (run.encoded.rows[e.source] for e in run.encoded.train[:12])
            if int(row["answer"]) % 2
        }
        usable = {q for q, _ in task.asked if not TASK.leaks(next(r for r in run.encoded.rows if r["question"] == q))}
        assert failed >= hard & usable and (threshold == 1.0 or len(failed) < 12)
        assert found[threshold]["hinted_answers"] == 8 * len(failed)
        assert found[threshold]["answers"] == 8 * 12 + 8 * len(failed)
    assert found[0.001]["hinted_answers"] < found[1.0]["hinted_answers"], (
        "hints for failed problems only cost fewer answers"
    )


def test_solved_problems_are_never_tried_again_even_when_nothing_passes(tiny: Tiny, tmp_path: Path) -> None:
    run = rolling(tiny, tmp_path, "guide-grpo", {}, lambda *_: 1.0)
    assert run.objective.weight(gathered(run)[0]) == 0.0
    numbers = run.slots.policies[0].numbers()
    assert numbers["hinted_answers"] == 0 and numbers["retried"] == 0 and numbers["empty_rounds"] == 1


def test_a_single_failed_problem_is_tried_again(tiny: Tiny, tmp_path: Path) -> None:
    run = rolling(tiny, tmp_path, "guide-grpo", {"k": 16, "extra_batches": 0}, only_with_hint)
    assert len(rows_in(gathered(run, 1))) == 16


def test_hinted_groups_without_difference_drop_the_problem(tiny: Tiny, tmp_path: Path) -> None:
    run = rolling(tiny, tmp_path, "guide-grpo", {}, lambda row, text, hinted: float(hinted))
    assert run.objective.weight(gathered(run)[0]) == 0.0
    numbers = run.slots.policies[0].numbers()
    assert numbers["hinted_answers"] > 0 and numbers["hinted_kept"] == 0 and numbers["hinted_reward"] == 1.0


# ── squashing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows_with(model: Any, drift: float) -> list[Answer]:
    generator, rows = seeded(4, "rows"), []
    for number in range(8):
        prompt = torch.randint(5, 300, (4,), generator=generator).tolist()
        tokens = torch.randint(5, 300, (3,), generator=generator).tolist()
        noise = drift * torch.randn(3, generator=generator, dtype=torch.float64)
        rows.append(
            Answer(
                prompt,
                tokens,
                (dense_logprobs(model, prompt, tokens) + noise).tolist(),
                (-1.0) ** number,
                number % 2 == 0,
            )
        )
    return rows


@pytest.mark.parametrize("kind", ["percentile", "constant", "power", "off"])
def test_hinted_tokens_are_squashed_and_plain_ones_clipped(tiny: Tiny, tmp_path: Path, kind: Any) -> None:
    run = rolling(tiny, tmp_path, "grpo", {})
    rows = rows_with(run.model.eval(), 1.5)
    squash = Squash(kind=kind, quantile=0.9, constant=0.3, exponent=0.5)
    loss = PolicyGradient(clip_low=0.2, clip_high=0.2, squash=squash).loss(run.model, rows_as_batch(rows, 0), run.rng)
    ratios = [
        torch.exp(dense_logprobs(run.model, r.prompt, r.tokens) - torch.tensor(r.logprobs).double()) for r in rows
    ]
    hinted = sorted(float(r) for row, each in zip(rows, ratios, strict=True) if not row.on_policy for r in each)
    place = 0.9 * (len(hinted) - 1)
    low = int(place)
    g = max(1e-4, hinted[low] + (place - low) * (hinted[low + 1] - hinted[low]))
    expected = 0.0
    for row, each in zip(rows, ratios, strict=True):
        for r in each.tolist():
            if row.on_policy:
                expected += max(-row.advantage * r, -row.advantage * min(max(r, 0.8), 1.2))
            else:
                tamed = {"percentile": r / (r + g), "constant": r / (r + 0.3), "power": r**0.5, "off": r}[kind]
                expected += -row.advantage * tamed
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_no_gradient_flows_through_the_scale(tiny: Tiny) -> None:
    ratio = torch.tensor([0.01, 0.2, 1.0, 3.0], requires_grad=True)
    squash = Squash()
    scale = squash.scale(ratio)
    (slope,) = torch.autograd.grad(squash.apply(ratio, scale).sum(), ratio)
    g = float(scale)
    torch.testing.assert_close(slope, g / (ratio.detach() + g) ** 2)
    assert float(squash.scale(torch.full((4,), 1e-9))) == pytest.approx(1e-4), (
        "tiny ratios are not blown up without bound"
    )


def test_hinted_rows_have_no_clip_share(tiny: Tiny, tmp_path: Path) -> None:
    run = rolling(tiny, tmp_path, "grpo", {})
    rows = rows_with(run.model.eval(), 1.5)
    objective = PolicyGradient(clip_low=0.2, clip_high=0.2)
    shares = {}
    for own in (True, False):
        objective.loss(run.model, rows_as_batch([replace(row, on_policy=own) for row in rows], 0), run.rng)
        shares[own] = objective.numbers()["clip_fraction"]
    assert shares[True] > 0.3 and shares[False] == 0.0


def test_the_scale_of_a_step_does_not_depend_on_its_cut(tiny: Tiny, tmp_path: Path) -> None:
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for scope in ("step", "micro-batch"):
        for rows in (2, 64):
            params = {"scope": scope, "rows_at_a_time": rows, "extra_batches": 2}
            run = rolling(tiny, tmp_path / f"{scope}{rows}", "guide-grpo", params, only_with_hint)
            found[scope, rows] = gradients(run, gathered(run))
    for name, gradient in found["step", 64].items():
        torch.testing.assert_close(found["step", 2][name], gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["micro-batch", 64][name], gradient, rtol=1e-3, atol=1e-6)
    assert any(
        not torch.allclose(found["micro-batch", 2][name], g, rtol=1e-3, atol=1e-6)
        for name, g in found["step", 64].items()
    )


# ── hints ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_hints_that_hold_the_answer_are_dropped_refused_or_allowed(tiny: Tiny, tmp_path: Path, capsys: Any) -> None:
    def with_hints(folder: Path, leak: str, hint: Any) -> Run:
        run = rolling(tiny, folder, "guide-grpo", {"leak": leak}, only_with_hint)
        run.encoded.rows = [{**row, "hint": hint(row)} for row in run.encoded.rows]
        return run

    def telling(row: Any) -> str:
        return f"it is {row['answer']}"

    for leak in ("drop", "refuse"):
        with pytest.raises(EngineError) as caught:
            with_hints(tmp_path / leak, leak, telling).begin()
        assert (
            caught.value.fault.code == ("no_hints" if leak == "drop" else "hint_leaks")
            and caught.value.reason == "bad_input"
        )
    run = with_hints(tmp_path / "allow", "allow", telling)
    run.begin()
    assert len(rows_in(gathered(run))) > 0
    half = with_hints(tmp_path / "half", "drop", lambda row: telling(row) if int(row["answer"]) % 2 else "add them up")
    half.begin()
    shown = {prompt: row for prompt, row in prompts_of(half, hinted=False).items() if int(row["answer"]) % 2}
    assert not {tuple(prompt) for prompt, *_ in rows_in(gathered(half, 12))} & set(shown)
    log = (tmp_path / "half" / "events.jsonl").read_text()
    assert "hold the answer and are never shown" in log


def test_it_is_refused_without_a_column_of_hints(tiny: Tiny) -> None:
    inputs = tiny.inputs("verifiable")
    inputs["data"] = {**inputs["data"], "columns": {"question": "question", "answer": "answer"}}
    (fault,) = check(parse_recipe({**inputs, "methods": [{"slug": "full-finetuning"}, {"slug": "guide-grpo"}]})).faults
    assert "hint" in fault.why and "GRPO" in fault.way_out


def test_the_length_of_answers_follows_the_model(tiny: Tiny) -> None:
    recipe = require(
        parse_recipe({**tiny.inputs("verifiable"), "methods": [{"slug": "lora"}, {"slug": "guide-grpo"}]})
    ).recipe
    assert recipe.methods[1].params["max_new_tokens"] == 64  # half of 128 positions
    assert GuideGRPO.Params.model_validate(GuideGRPO.presets["paper"]).scope == "micro-batch"
