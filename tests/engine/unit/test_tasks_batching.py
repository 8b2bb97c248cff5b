"""Holding out, bucketing and packing: nothing is lost, nothing leaks, and packed rows compute what plain rows compute."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from engine.io.facts import model_facts
from engine.tasks import task
from engine.tasks.base import Example
from engine.tasks.batching import (
    IGNORED,
    bucketed,
    is_packed,
    measuring,
    owners,
    packed_batch,
    plain_batch,
    sliced,
    split_rows,
    unpacked,
)
from tests.engine.unit.tiny_models import tiny_llama

LM = task("instruct")


def example(length: int, source: int, *, answer: int = 3) -> Example:
    ids = [1, *(5 + (7 * source + 3 * place) % 300 for place in range(length - 1))]
    return Example(ids, [IGNORED] * (length - answer) + ids[length - answer :], source)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = f"folder:{tiny_llama(tmp_path_factory.mktemp('llama'))}"
    return LM.load_model(model_facts(source, task="instruct"), None, dtype=torch.float32, seed=1)  # type: ignore[arg-type]


def by_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Losses in an order that does not depend on the rows."""
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return losses[torch.argsort(losses)]


LENGTHS = [17, 4, 9, 30, 5, 5, 12, 11, 6]


def test_a_packed_row_has_no_padding_and_gives_the_logits_of_plain_rows(llama: Any) -> None:
    examples = [example(length, place) for place, length in enumerate(LENGTHS)]
    packed, plain = packed_batch(examples, 0), plain_batch(examples, 0)
    assert packed["input_ids"].shape == (1, sum(LENGTHS)) and is_packed(packed) and not is_packed(plain)
    assert packed["num_tokens"] == plain["num_tokens"] == sum(LENGTHS) and packed["num_samples"] == len(LENGTHS)
    with torch.no_grad():
        whole = llama(input_ids=plain["input_ids"], attention_mask=plain["attention_mask"]).logits
        together = llama(**{name: packed[name] for name in ("input_ids", "attention_mask", "position_ids")}).logits
    for number, piece in enumerate(together[0].split(LENGTHS)):
        torch.testing.assert_close(piece, whole[number, : LENGTHS[number]], atol=1e-5, rtol=1e-5)


def test_packed_rows_give_the_gradient_of_plain_rows(llama: Any) -> None:
    examples = [example(length, place) for place, length in enumerate(LENGTHS)]
    gradients, losses = [], []
    for batch in (packed_batch(examples, 0), plain_batch(examples, 0)):
        logits, labels = LM.forward_logits(llama, batch)
        losses.append(by_token(logits, labels).detach())
        llama.zero_grad()
        functional.cross_entropy(logits, labels, reduction="sum").backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in llama.named_parameters()})
    assert len(losses[0]) == 3 * len(LENGTHS)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_keeps_packed_examples_apart(llama: Any, attention: str) -> None:
    examples = [example(length, place) for place, length in enumerate(LENGTHS)]
    before = llama.config._attn_implementation
    llama.set_attn_implementation(attention)
    try:
        with torch.no_grad():
            one, other = (
                by_token(*LM.forward_logits(llama, make(examples, 0))) for make in (packed_batch, plain_batch)
            )
    finally:
        llama.set_attn_implementation(before)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_model_with_memory_between_places_gets_plain_rows(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [example(length, place) for place, length in enumerate(LENGTHS)]
    packed = packed_batch(examples, 0)
    seen: list[torch.Size] = []
    hook = llama.model.register_forward_pre_hook(
        lambda *args: seen.append(args[2]["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(type(llama), "_is_stateful", True, raising=False)
    with torch.no_grad():
        found = by_token(*LM.forward_logits(llama, packed))
        expected = by_token(*LM.forward_logits(llama, plain_batch(examples, 0)))
    hook.remove()
    assert seen[0] == (len(LENGTHS), max(LENGTHS))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_first_token_of_a_packed_example_is_never_predicted() -> None:
    examples = [
        Example([1, 7, 8], [1, 7, 8], 0),
        Example([1, 9], [1, 9], 1),
        Example([1, 6, 6, 6, 6], [1, 6, 6, 6, 6], 2),
    ]
    packed = packed_batch(examples, 0)
    starts = packed["position_ids"] == 0
    assert int(starts.sum()) == 3 and bool((packed["labels"][starts] == IGNORED).all())
    assert int((packed["labels"] != IGNORED).sum()) == 2 + 1 + 4


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=12))
def test_packing_loses_and_doubles_nothing(lengths: list[int]) -> None:
    examples = [example(length, place, answer=1) for place, length in enumerate(lengths)]
    packed = packed_batch(examples, 0)
    assert int(packed["num_tokens"]) == sum(lengths)
    if not is_packed(packed):
        assert len(set(lengths)) == 1
        return
    assert packed["attention_mask"].flatten().tolist() == lengths and packed["input_ids"].numel() == sum(lengths)
    plain = unpacked(packed, 0)
    found = sorted(row[mask.bool()].tolist() for row, mask in zip(plain["input_ids"], plain["attention_mask"]))
    assert found == sorted(item.input_ids for item in examples)


def test_documents_inside_of_an_example_do_not_see_each_other(llama: Any) -> None:
    end = 2
    ids = [[5, 6, 7, end, 8, 9], [10, end, 11, 12, 13, end]]
    batch = packed_batch([Example(row, list(row), n) for n, row in enumerate(ids)], 0, end)
    assert batch["attention_mask"].flatten().tolist() == [4, 2, 2, 4]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 0, 1, 2, 3]
    assert owners(batch, [6, 6]).tolist() == [0] * 4 + [1] * 4
    with torch.no_grad():
        logits, labels = LM.forward_logits(llama, batch)
        alone = [
            llama(input_ids=torch.tensor([piece])).logits[0, :-1]
            for piece in ([5, 6, 7, end], [8, 9], [10, end], [11, 12, 13, end])
        ]
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert labels.tolist() == [6, 7, end, 9, end, 12, 13, end]


def test_texts_without_an_end_inside_stay_in_rows_of_their_own() -> None:
    batch = packed_batch([Example([5, 6, 2], [5, 6, 2], 0), Example([7, 8, 9], [7, 8, 9], 1)], 0, 2)
    assert not is_packed(batch) and batch["input_ids"].shape == (2, 3)
    assert owners(batch, [3, 3]).tolist() == [0, 0, 1, 1]


def test_equal_lengths_are_laid_in_rows_of_their_own() -> None:
    batch = packed_batch([example(9, 0), example(9, 1)], 0)
    assert not is_packed(batch) and batch["input_ids"].shape == (2, 9) and "position_ids" not in batch


# ── order and buckets ─────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=300), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_buckets_hold_every_index_once(lengths: list[int], size: int, seed: int) -> None:
    examples = [Example([0] * length, [0] * length, place) for place, length in enumerate(lengths)]
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    batches = bucketed(examples, order, size)
    assert sorted(index for batch in batches for index in batch) == sorted(order)
    assert len(batches) == len(sliced(order, size)) and all(len(batch) <= size for batch in batches)
    assert batches == bucketed(examples, order, size)


def test_an_order_may_hold_an_index_twice() -> None:
    examples = [example(length, place) for place, length in enumerate([5, 9, 4])]
    assert sorted(index for batch in bucketed(examples, [0, 2, 2, 1, 0], 2) for index in batch) == [0, 0, 1, 2, 2]


def test_buckets_save_padding_and_stay_mixed() -> None:
    generator = random.Random(3)
    examples = [Example([0] * generator.randint(3, 60), [], place) for place in range(640)]
    order = list(range(640))

    def area(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(len(examples[index]) for index in batch) for batch in batches)

    batches = bucketed(examples, order, 8)
    assert area(batches) < 0.65 * area(sliced(order, 8))
    firsts = [len(examples[batch[0]]) for batch in batches]
    assert firsts != sorted(firsts) and max(firsts[:8]) > 1.5 * min(firsts[:8]), "short and long batches alternate"


def test_the_held_out_rows_are_stratified_and_share_no_text_with_training() -> None:
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 9 + ["d"]
    keys = [f"text {number % 90}" for number in range(100)]  # the last ten repeat the first ten
    train, held = split_rows(keys, labels, 0.2, 5)
    assert sorted(train + held) == list(range(100)) and (train, held) == split_rows(keys, labels, 0.2, 5)
    assert not {keys[n] for n in train} & {keys[n] for n in held}
    counts = {label: sum(labels[n] == label for n in held) for label in "abcd"}
    assert 11 <= counts["a"] <= 13 and 5 <= counts["b"] <= 6 and counts["d"] == 0
    assert held != split_rows(keys, labels, 0.2, 6)[1]


@settings(max_examples=40, deadline=None)
@given(number=st.integers(2, 80), share=st.floats(0.01, 0.5), seed=st.integers(0, 5))
def test_both_sides_get_rows(number: int, share: float, seed: int) -> None:
    train, held = split_rows(list(range(number)), [0] * number, share, seed)
    assert len(held) == max(1, min(number - 1, round(share * number))) and len(train) + len(held) == number


def test_measuring_gives_every_module_its_mode_back_and_draws_nothing() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with measuring(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        model(torch.ones(1, 2))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
