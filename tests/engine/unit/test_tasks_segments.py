"""Packed rows and headless passes, over the families that transformers knows: equal to one example at a time, or refused by the check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from engine.tasks import task
from engine.tasks.base import Example
from engine.tasks.batching import IGNORED, packed_batch, plain_batch
from engine.tasks.language import direct_head
from engine.tasks.segments import attends_within

LM = task("instruct")
LENGTHS = [9, 3, 7, 12]
COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
          "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
# family -> (its own settings, whether it keeps packed rows apart, whether its head's answer is its logits)
FAMILIES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "llama": ({}, True, True),
    "qwen2": ({}, True, True),
    "qwen3": ({}, True, True),
    "mistral": ({"sliding_window": 5}, True, True),
    "gemma": ({"head_dim": 16}, True, True),
    "gemma2": ({"head_dim": 16}, False, False),  # caps its scores, which needs its own attention, and its logits
    "gemma3_text": ({"head_dim": 16, "sliding_window": 5}, True, False),
    "gpt2": ({}, True, True),
    "gpt_neox": ({}, True, True),
    "phi3": ({}, True, True),
    "olmo2": ({}, True, True),
    "granite": ({}, True, False),  # scales its logits
    "cohere": ({}, True, False),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 64}, True, False),
    "gptj": ({"rotary_dim": 8}, False, True),
    "mamba": ({}, False, False),  # a state runs through the row
}


def build(family: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family][0], **more})
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.eval()


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(4)
    found = []
    for source, length in enumerate(LENGTHS):
        ids = torch.randint(5, 99, (length,), generator=generator).tolist()
        found.append(Example(ids, [IGNORED] * 2 + ids[2:], source))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_is_one_example_at_a_time(family: str) -> None:
    model = build(family)
    _, within, direct = FAMILIES[family]
    assert attends_within(model) is within and (direct_head(model) is not None) is direct
    with torch.no_grad():
        logits, labels = LM.forward_logits(model, packed_batch(examples(), 0))
        for number, example in enumerate(examples()):
            alone = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0, 1:-1]
            begin = sum(length - 2 for length in LENGTHS[:number])
            torch.testing.assert_close(logits[begin : begin + len(alone)], alone, atol=2e-5, rtol=1e-4)
            assert labels[begin : begin + len(alone)].tolist() == example.input_ids[2:]


def test_grouped_heads_and_a_window_shorter_than_an_example_give_the_right_gradient() -> None:
    model = build("mistral")
    gradients = []
    for make in (packed_batch, plain_batch):
        model.zero_grad()
        logits, labels = LM.forward_logits(model, make(examples(), 0))
        functional.cross_entropy(logits, labels, reduction="sum").backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_head_that_somebody_watches_or_replaces_is_left_alone() -> None:
    model: Any = build("llama")
    handle = model.lm_head.register_forward_hook(lambda *given: None)
    assert direct_head(model) is None
    handle.remove()
    assert direct_head(model) is model.lm_head
    model.lm_head = nn.Sequential(model.lm_head)
    assert direct_head(model) is None


def test_no_padding_is_computed() -> None:
    model: Any = build("llama")
    seen: list[int] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[:2].numel())
    )
    LM.forward_logits(model, packed_batch(examples(), 0))
    handle.remove()
    assert seen == [sum(LENGTHS)]
