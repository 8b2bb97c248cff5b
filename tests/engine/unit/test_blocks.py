"""Layers read from names, and the random half drawn from them, on the real classes of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch
import transformers

from engine.parts.blocks import Block, Layout, blocks_of, draw_half, find_blocks

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 96,
}


def skeleton(config: str, model: str, **arguments: Any) -> torch.nn.Module:
    """A model of transformers without memory for its weights."""
    arguments = {"pad_token_id": 0, **arguments}
    with torch.device("meta"):
        built: torch.nn.Module = getattr(transformers, model)(getattr(transformers, config)(**arguments))
        return built


def llama(**changes: Any) -> torch.nn.Module:
    return skeleton("LlamaConfig", "LlamaForCausalLM", **{**SMALL, **changes})


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL, "qkvo", ["down", "gate", "up"], 2),
    "mistral": ("MistralConfig", "MistralForCausalLM", SMALL, "qkvo", ["down", "gate", "up"], 2),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SMALL, "qkvo", ["down", "gate", "up"], 2),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SMALL, "qkvo", ["down", "gate", "up"], 4),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", SMALL, "qkvo", ["down", "gate", "up"], 4),
    "phi": ("PhiConfig", "PhiForCausalLM", SMALL, "qkvo", ["down", "up"], 1),
    "bert": ("BertConfig", "BertForSequenceClassification", SMALL, "qkvo", ["down", "up"], 2),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", SMALL, "qkvo", ["down", "up"], 2),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": 64, "hidden_dim": 160, "n_layers": 4, "n_heads": 4, "vocab_size": 96},
        "qkvo",
        ["down", "up"],
        2,
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {key: value for key, value in SMALL.items() if key != "vocab_size"},
        "qkvo",
        ["down", "up"],
        2,
    ),
}
FUSED = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 96}, {"qkv"}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SMALL, {"qkv", "gate_up"}),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL, {"qkv"}),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification", SMALL, {"qkv", "gate_up"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_family_finds_its_role(family: str) -> None:
    config, model, arguments, attention, feed_forward, num_norms = FAMILIES[family]
    layout = blocks_of(skeleton(config, model, **arguments))
    assert [block.index for block in layout.blocks] == [0, 1, 2, 3] and layout.fused == ()
    for block in layout.blocks:
        assert sorted(block.attention) == sorted(attention)
        assert sorted(module.role for module in block.feed_forward) == feed_forward
        assert len(block.norms) == num_norms and block.other == () and block.cross_attention == {}


@pytest.mark.parametrize("family", FUSED)
def test_fused_matrices_are_reported(family: str) -> None:
    config, model, arguments, roles = FUSED[family]
    layout = blocks_of(skeleton(config, model, **arguments))
    assert len(layout.blocks) == 4 and {module.role for module in layout.fused} == roles
    assert len(layout.fused) == 4 * len(roles)


@pytest.mark.parametrize(
    ("config", "model", "arguments"),
    [
        *[(config, model, arguments) for config, model, arguments, *_ in (*FAMILIES.values(), *FUSED.values())],
        ("MixtralConfig", "MixtralForCausalLM", {**SMALL, "num_local_experts": 2}),
        ("T5Config", "T5ForConditionalGeneration", {"d_model": 64, "d_ff": 160, "num_layers": 4, "num_heads": 4}),
        (
            "BartConfig",
            "BartForConditionalGeneration",
            {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 96, "pad_token_id": 1},
        ),
    ],
)
def test_no_tensor_is_lost_or_counted_twice(config: str, model: str, arguments: dict[str, Any]) -> None:
    built = skeleton(config, model, **arguments)
    layout = blocks_of(built)
    placed = [name for block in layout.blocks for module in block.modules() for name in module.tensors]
    assert sorted([*placed, *layout.outside]) == sorted(name for name, _ in built.named_parameters())
    assert all(name.startswith(module.name) for b in layout.blocks for module in b.modules() for name in module.tensors)


def test_encoder_and_decoder_are_two_stacks_and_cross_attention_is_its_own_category() -> None:
    arguments = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "vocab_size": 96, "pad_token_id": 1}
    layout = blocks_of(skeleton("BartConfig", "BartForConditionalGeneration", **arguments))
    assert [(block.stack, block.index) for block in layout.blocks] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert [len(block.cross_attention) for block in layout.blocks] == [0, 0, 4, 4, 4]


def test_a_bias_stays_with_its_matrix() -> None:
    layout = blocks_of(skeleton("BertConfig", "BertModel", **SMALL))
    query = layout.blocks[0].attention["q"]
    assert query.tensors == (
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.0.attention.self.query.bias",
    )
    half = draw(layout)
    for block in layout.blocks:
        for module in block.modules():
            assert len({name in half.chosen for name in module.tensors}) == 1


def test_a_model_without_layers_has_none() -> None:
    shapes = {"classifier.0.weight": (8, 4), "classifier.0.bias": (8,), "classifier.2.weight": (2, 8)}
    layout = find_blocks(shapes)
    assert layout.blocks == () and set(layout.outside) == set(shapes)


def draw(layout: Layout, **changes: Any) -> Any:
    return draw_half(layout, **{"seed": 3, "round_number": 1, "ratio": 0.5, "granularity": "category", **changes})


def taken(block: Block, half: Any) -> Iterator[tuple[str, int, int]]:
    """(category, chosen modules, all modules) of a layer."""
    for category, modules in block.categories().items():
        yield category, sum(module.tensors[0] in half.chosen for module in modules), len(modules)


@pytest.mark.parametrize("seed", range(5))
def test_the_half_of_a_llama_is_the_papers(seed: int) -> None:
    model = llama(num_hidden_layers=6)
    layout = blocks_of(model)
    half = draw(layout, seed=seed)
    by_category: dict[str, list[int]] = {}
    for block in layout.blocks:
        for category, chosen, _ in taken(block, half):
            by_category.setdefault(category, []).append(chosen)
    assert by_category["attention"] == [2] * 6
    assert by_category["norms"] == [1] * 6
    assert sorted(by_category["feed_forward"]) == [1, 1, 1, 2, 2, 2]
    assert half.chosen.isdisjoint(half.left) and not half.chosen & set(layout.outside)
    # counted again, straight from the model: without grouped-query attention the half is one by parameters too
    sizes = {name: prod(shape) for name, shape in shapes_of(model).items() if ".layers." in name}
    share = sum(size for name, size in sizes.items() if name in half.chosen) / sum(sizes.values())
    assert abs(share - 0.5) < 0.01
    assert half.ratios(layout, shapes_of(model))["all"]["parameters"] == pytest.approx(share)


def test_the_true_ratio_is_reported_where_it_is_not_a_half() -> None:
    model = llama(num_hidden_layers=5, num_key_value_heads=1)
    layout, shapes = blocks_of(model), shapes_of(model)
    half = draw(layout)
    ratios = half.ratios(layout, shapes)
    assert ratios["attention"]["count"] == 0.5 and ratios["feed_forward"]["count"] == pytest.approx(8 / 15)
    attention = [name for name in shapes if "self_attn" in name]
    size = sum(prod(shapes[name]) for name in attention if name in half.chosen)
    assert ratios["attention"]["parameters"] == pytest.approx(size / sum(prod(shapes[name]) for name in attention))
    assert ratios["attention"]["parameters"] != 0.5


def test_two_feed_forward_matrices_give_one_per_layer() -> None:
    layout = blocks_of(skeleton("BertConfig", "BertModel", **SMALL))
    for block in layout.blocks:
        assert {category: chosen for category, chosen, _ in taken(block, draw(layout))}["feed_forward"] == 1


def test_draws_depend_on_seed_and_round_alone() -> None:
    layout = blocks_of(llama(num_hidden_layers=8))
    shuffled = find_blocks(dict(reversed(list(shapes_of(llama(num_hidden_layers=8)).items()))))
    assert draw(layout) == draw(layout) == draw(shuffled)
    draws = {draw(layout, seed=seed, round_number=number).chosen for seed in range(4) for number in range(1, 5)}
    assert len(draws) == 16


def test_a_prefix_before_every_name_changes_nothing() -> None:
    shapes = shapes_of(skeleton("BertConfig", "BertModel", **SMALL))
    bare = draw(find_blocks(shapes))
    prefixed = draw(find_blocks({f"bert.{name}": shape for name, shape in shapes.items()}))
    assert prefixed.chosen == {f"bert.{name}" for name in bare.chosen}


def test_every_matrix_has_its_turn_over_the_rounds() -> None:
    layout = blocks_of(llama(num_hidden_layers=2))
    counts: dict[str, int] = {}
    for number in range(200):
        for name in draw(layout, round_number=number).chosen:
            counts[name] = counts.get(name, 0) + 1
    everywhere = {name for block in layout.blocks for module in block.modules() for name in module.tensors}
    assert counts.keys() == everywhere and all(60 < count < 140 for count in counts.values())


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.4, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("granularity", ["category", "layer", "model"])
def test_other_shares_and_granularities_are_kept(ratio: float, granularity: str) -> None:
    layout = blocks_of(llama(num_hidden_layers=10))
    half = draw(layout, ratio=ratio, granularity=granularity)
    assert half.ratios(layout, shapes_of(llama(num_hidden_layers=10)))["all"]["count"] == pytest.approx(ratio, abs=0.05)
    whole = [{module.tensors[0] in half.chosen for module in block.modules()} for block in layout.blocks]
    assert all(len(kinds) == 1 for kinds in whole) == (granularity == "layer")
