"""The ladder against independent computations: plain transformers, a side network written out by hand, brute-force pruning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from engine.io.facts import model_facts
from engine.io.models import base_of
from engine.parts.ladder_start import fisher_scores
from engine.tasks.base import Example
from engine.tasks.batching import packed_batch, plain_batch
from engine.tasks.causal_lm import TASK as CAUSAL
from engine.train.trainables import halve_frozen
from tests.engine.attached import Attached, facts_for, logits_of, parameter_copy, random_batches
from tests.engine.unit.ladders import (
    DECODERS,
    ENCODERS,
    attached,
    batches_for,
    heard_states,
    ladder,
    load,
    lst,
    wake,
    zoo,
)

# ── the start ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_the_start_is_the_base_model_bit_for_bit(family: str) -> None:
    one = attached(zoo(family))
    batch = next(batches_for(one))
    assert torch.equal(one.logits(batch), logits_of(load(zoo(family)), batch))
    assert torch.equal(ladder(one).mu(), torch.full((4,), 0.5))


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("init", ["weight", "random"])
def test_with_k_1_the_copy_is_the_base_block(family: str, init: str) -> None:
    one = attached(zoo(family), k=1, init=init)
    body = base_of(one.model)
    layers = body.layers if hasattr(body, "layers") else body.encoder.layer
    seen: list[bool] = []

    def compare(place: int) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            copied = ladder(one).blocks[place].eval()(*args, **kwargs)
            seen.append(torch.equal(copied, output))

        return hook

    for place, layer in enumerate(layers):
        layer.register_forward_hook(compare(place), with_kwargs=True)
    with torch.no_grad():
        one.model(input_ids=next(batches_for(one))["input_ids"], **({"use_cache": False} if family in DECODERS else {}))
    assert seen == [init == "weight"] * 4  # a random start is no copy: the comparison can fail


@pytest.mark.parametrize("family", [*DECODERS, "Bert"])
def test_with_k_1_and_open_gates_the_side_network_is_the_base_model(family: str) -> None:
    one = attached(zoo(family), k=1, init="weight", output="side")
    with torch.no_grad():
        parameter = ladder(one).alpha
        assert parameter is not None
        parameter.fill_(100.0)  # mu = 1: the rungs bring nothing
    if family == "Bert":
        ladder(one).norm = nn.Identity()  # a BERT has no last norm
    batch = next(batches_for(one))
    torch.testing.assert_close(one.logits(batch), logits_of(load(zoo(family)), batch), rtol=0, atol=1e-5)


def test_the_kept_dimensions_by_brute_force() -> None:
    folder, k = zoo("Llama"), 4
    plain, one = load(folder), attached(zoo("Llama"), init="weight")
    w = {name: p.detach().abs().double() for name, p in plain.model.named_parameters()}
    residual = sorted(sorted(range(64), key=lambda c: -w["embed_tokens.weight"][:, c].sum().item())[:16])
    for layer in range(4):
        prefix, mine = f"layers.{layer}.", dict(ladder(one).blocks[layer].named_parameters())
        theirs = {name.removeprefix(prefix): p for name, p in plain.model.named_parameters() if name.startswith(prefix)}
        q, key, v, o = (w[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkvo")  # 4 heads of 16, 2 key heads

        def vote(j: int, q: Tensor = q, key: Tensor = key) -> float:
            rows = sum(q[h * 16 + j].sum() for h in range(4)), sum(key[g * 16 + j].sum() for g in range(2))
            return float(rows[0].log() + rows[1].log())  # type: ignore[union-attr]

        pairs = sorted(sorted(range(8), key=lambda j: -(vote(j) + vote(j + 8)))[:2])
        places = [*pairs, *(j + 8 for j in pairs)]
        carried = []
        for g in range(2):
            score = [
                v[g * 16 + j].sum().log() + sum(o[:, h * 16 + j].sum() for h in (2 * g, 2 * g + 1)).log()  # type: ignore[union-attr]
                for j in range(16)
            ]
            carried.append(sorted(sorted(range(16), key=lambda j: -score[j])[:4]))
        gate, up, down = (w[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        inner_score = [gate[j].sum().log() + up[j].sum().log() + down[:, j].sum().log() for j in range(100)]
        inner = sorted(sorted(range(100), key=lambda j: -inner_score[j])[: 100 // k])

        def cut(name: str, rows: list[int], columns: list[int], theirs: Any = theirs) -> Tensor:
            return torch.stack([theirs[name][r][columns] for r in rows])

        expected = {
            "self_attn.q_proj.weight": (
                "self_attn.q_proj.weight", [h * 16 + j for h in range(4) for j in places], residual),
            "self_attn.k_proj.weight": (
                "self_attn.k_proj.weight", [g * 16 + j for g in range(2) for j in places], residual),
            "self_attn.v_proj.weight": (
                "self_attn.v_proj.weight", [g * 16 + j for g in range(2) for j in carried[g]], residual),
            "self_attn.o_proj.weight": (
                "self_attn.o_proj.weight", residual, [h * 16 + j for h in range(4) for j in carried[h // 2]]),
            "mlp.gate_proj.weight": ("mlp.gate_proj.weight", inner, residual),
            "mlp.up_proj.weight": ("mlp.up_proj.weight", inner, residual),
            "mlp.down_proj.weight": ("mlp.down_proj.weight", residual, inner),
        }  # fmt: skip
        for name, place in expected.items():
            assert torch.equal(mine[name], cut(*place)), name
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            assert torch.equal(mine[name], theirs[name][residual]), name
        assert ladder(one).rotary[layer].tolist() == places
    assert torch.equal(ladder(one).norm.weight, plain.model.norm.weight[residual])
    state = torch.randn(3, 64)
    for rung in (ladder(one).first, *ladder(one).rungs):
        assert torch.equal(rung(state), state[:, residual])


def test_encoder_heads_keep_their_own_dimensions() -> None:
    plain, one = load(zoo("Bert")), attached(zoo("Bert"), init="weight")
    theirs = plain.bert.encoder.layer[1].attention
    mine = ladder(one).blocks[1].attention  # type: ignore[union-attr]
    residual = ladder(one).first.weight.argmax(1)
    q, key = theirs.self.query.weight.abs().sum(1), theirs.self.key.weight.abs().sum(1)
    for head in range(4):
        rows = range(head * 16, head * 16 + 16)
        best = sorted(sorted(rows, key=lambda r: -(q[r] * key[r]).item())[:4])
        place = slice(head * 4, head * 4 + 4)
        assert torch.equal(mine.self.query.weight[place], theirs.self.query.weight[best][:, residual])
        assert torch.equal(mine.self.key.bias[place], theirs.self.key.bias[best])
    assert torch.equal(mine.output.LayerNorm.bias, theirs.output.LayerNorm.bias[residual])


@pytest.mark.parametrize("family", DECODERS)
def test_heads_and_their_grouping_stay_and_sizes_shrink(family: str) -> None:
    wide = load(zoo(family)).model.layers[0].self_attn
    narrow: Any = ladder(attached(zoo(family))).blocks[0].self_attn
    assert narrow.num_key_value_groups == wide.num_key_value_groups and 4 * narrow.head_dim == wide.head_dim
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert [4 * size for size in getattr(narrow, name).weight.shape] == list(getattr(wide, name).weight.shape)


def test_a_random_start_turns_by_the_frequencies_of_a_narrow_model() -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    one = attached(zoo("Llama"), init="random")
    wide = copy.deepcopy(one.model.config)
    narrow = copy.deepcopy(wide)
    narrow.hidden_size, narrow.head_dim = 16, 4
    positions, x = torch.arange(90)[None], torch.zeros(1, 90, 4)
    for mine, theirs in zip(
        LlamaRotaryEmbedding(wide)(x, positions), LlamaRotaryEmbedding(narrow)(x, positions), strict=True
    ):
        torch.testing.assert_close(mine[..., ladder(one).rotary[0]], theirs, rtol=0, atol=1e-6)


def test_fisher_scores_are_summed_squared_gradients_of_single_examples() -> None:
    model = load(zoo("Llama")).train()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    names = [
        "model.embed_tokens.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ]
    matrices = {name: model.get_parameter(name) for name in names}
    ids = next(random_batches(320))["input_ids"]

    def loss(row: int) -> Tensor:
        logits = model(input_ids=ids[row : row + 1]).logits
        return nn.functional.cross_entropy(logits[0, :-1], ids[row, 1:], reduction="sum")

    scores = fisher_scores(model, matrices, [lambda row=row: loss(row) for row in range(4)])
    assert model.training and all(p.grad is None and p.requires_grad == (p.dim() == 2) for p in model.parameters())
    model.eval()
    for name, matrix in matrices.items():
        squared = sum(torch.autograd.grad(loss(row), matrix)[0].double().square() for row in range(4))
        assert isinstance(squared, Tensor)
        torch.testing.assert_close(scores.rows[name], squared.sum(1), rtol=1e-4, atol=0)
        torch.testing.assert_close(scores.columns[name], squared.sum(0), rtol=1e-4, atol=1e-12)


def test_the_fisher_start_follows_the_task() -> None:
    model = load(zoo("Bert"))
    facts = facts_for(model_facts(f"folder:{zoo('Bert')}", task="classify"), "classify")
    plain = Attached(load(zoo("Bert")), lst(), facts)
    part = lst(samples=6).parts(plain.ctx)[0]
    before = parameter_copy(model)
    few = [next(random_batches(320, classes=3, seed=seed)) for seed in range(3)]
    counted = []
    model.register_forward_hook(lambda *_: counted.append(1))
    part.calibrate(model, few)
    assert len(counted) == 6  # single examples, and no more than asked for
    after = parameter_copy(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    part.attach(model)
    mine, theirs = ladder(model).first.weight.argmax(1), ladder(plain).first.weight.argmax(1)
    assert not torch.equal(mine, theirs)  # other dimensions than by the size of the weights


# ── what the side network computes ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Bert"])
@pytest.mark.parametrize(
    "params",
    [
        {}, {"layers": "every-2nd"}, {"gate": "none"}, {"output": "gate"}, {"output": "side", "samplers": "random"},
        {"ladders": "last"}, {"init": "random", "layers": "0, 3"},
    ],
    ids=str,
)  # fmt: skip
def test_the_last_state_written_out_by_hand(family: str, params: dict[str, Any]) -> None:
    one = attached(zoo(family), **params)
    wake(one)
    ids = next(batches_for(one))["input_ids"][:, :10]
    h = heard_states(zoo(family), ids)
    net, body = ladder(one).eval(), base_of(one.model)
    kept = {"every-2nd": [1, 3], "0, 3": [0, 3]}.get(params.get("layers", ""), [0, 1, 2, 3])
    causal = torch.full((10, 10), -torch.inf).triu(1)[None, None] if family != "Bert" else None
    with torch.no_grad():
        s = net.first(h[0] if params.get("ladders") != "last" else h[4])
        for place, layer in enumerate(kept):
            if params.get("ladders") != "last":
                rung = net.rungs[place](h[layer + 1])
                if params.get("gate") == "none":
                    s = s + rung
                else:
                    assert net.alpha is not None
                    mu = 1 / (1 + torch.exp(-net.alpha[place] / 0.1))
                    s = mu * s + (1 - mu) * rung
            if family == "Bert":
                s = net.blocks[place](s, None)
            else:
                cos, sin = body.rotary_emb(h[0], torch.arange(10)[None])  # type: ignore[operator]
                keep = net.rotary[place]
                s = net.blocks[place](s, attention_mask=causal, position_embeddings=(cos[..., keep], sin[..., keep]))
        out = net.up(net.norm(s))
        last = load(zoo(family)).model.norm(h[4]) if family != "Bert" else h[4]
        if params.get("output", "add") == "add":
            out = out + last
        elif params["output"] == "gate":
            assert net.last is not None
            mix = torch.sigmoid(10 * net.last)
            out = mix * out + (1 - mix) * last
        expected = one.model.lm_head(out) if family != "Bert" else one.model.classifier(body.pooler(out))  # type: ignore[operator, union-attr]
    torch.testing.assert_close(logits_of(one.model, {"input_ids": ids}), expected, rtol=0, atol=2e-5)


def test_padding_changes_no_answer_of_an_encoder() -> None:
    one = attached(zoo("Bert"))
    wake(one)
    examples = [Example(list(range(5, 5 + n)), [0], 0) for n in (4, 9)]
    with torch.no_grad():
        together = one.model(**{k: plain_batch(examples, 0)[k] for k in ("input_ids", "attention_mask")}).logits
        alone = [one.model(input_ids=torch.tensor([e.input_ids])).logits for e in examples]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_packed_rows_answer_like_single_ones() -> None:
    one = attached(zoo("Llama"))
    wake(one)
    tokens = (
        torch.randperm(300, generator=torch.Generator().manual_seed(4))[:21] + 5
    )  # all different: a token names its place
    examples = [Example(row.tolist(), row.tolist(), 0) for row in tokens.split([9, 4, 5, 3])]
    packed = packed_batch(examples, 0)
    assert packed["attention_mask"].dim() == 4
    with torch.no_grad():
        mine, labels = CAUSAL.forward_logits(one.model.eval(), packed)
        apart = [CAUSAL.forward_logits(one.model, plain_batch([e], 0)) for e in sorted(examples, key=len, reverse=True)]
    assert torch.equal(labels.sort().values, torch.cat([label for _, label in apart]).sort().values)
    theirs = {int(label): row for logits, found in apart for row, label in zip(logits, found, strict=True)}
    for row, label in zip(mine, labels, strict=True):
        torch.testing.assert_close(row, theirs[int(label)], rtol=0, atol=1e-5)


# ── answering ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def greedy(model: Any, ids: Tensor, steps: int) -> Tensor:
    """The likeliest continuation, every token from a full pass without any cache."""
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("layers", ["all", "1, 2"])
def test_generation_with_both_caches_equals_full_passes(family: str, layers: str) -> None:
    one = attached(zoo(family), layers=layers)
    wake(one)
    one.model.eval()
    ids = next(random_batches(320, seed=3))["input_ids"][:2, :7]
    made = one.model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(made, greedy(one.model, ids, 16))  # 23 tokens: Mistral's window of 12 is left behind
    assert not torch.equal(made, greedy(load(zoo(family)), ids, 16))


def test_beams_and_padding_on_the_left_keep_both_caches_in_step() -> None:
    one = attached(zoo("Llama"))
    wake(one)
    model = one.model.eval()
    ids = next(random_batches(320, seed=6))["input_ids"][:2, :6]
    settings: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 3):
        cached, plain = (model.generate(ids, num_beams=beams, use_cache=cache, **settings) for cache in (True, False))
        assert torch.equal(cached, plain)
    short = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[1:, :3]], dim=1)
    both, mask = torch.cat([ids[:1], short]), torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    made = model.generate(both, attention_mask=mask, **settings)
    assert torch.equal(made[1, 6:], model.generate(ids[1:, :3], **settings)[0, 3:])


def test_a_cache_in_one_go_and_token_by_token() -> None:
    one = attached(zoo("Llama"))
    wake(one)
    model, ids = one.model.eval(), next(random_batches(320, seed=2))["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        for cache in (transformers.DynamicCache(), transformers.StaticCache(config=model.config, max_cache_len=32)):
            pieces = [
                model(input_ids=part, past_key_values=cache, use_cache=True).logits
                for part in ids.split([9, 1, 1, 13], dim=1)
            ]
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=2e-5)
        assert len(cache.layers) == 8 and cache.layers[4].keys.shape[-1] == 4  # narrow keys behind the wide ones


def test_a_cache_of_the_plain_model_is_refused() -> None:
    ids = next(random_batches(320))["input_ids"]
    with torch.no_grad():
        cache = load(zoo("Llama"))(input_ids=ids[:, :5], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="5 places of the model and 0 of its side network"):
            attached(zoo("Llama")).model.eval()(input_ids=ids[:, 5:6], past_key_values=cache, use_cache=True)


def test_states_can_still_be_asked_for_and_copies_are_independent() -> None:
    one = attached(zoo("Llama"))
    wake(one)
    batch = next(batches_for(one))
    states = one.model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
    assert len(states) == 5 and torch.equal(states[2], heard_states(zoo("Llama"), batch["input_ids"])[2])
    twin, before = copy.deepcopy(one.model), one.logits(batch)
    with torch.no_grad():
        ladder(twin).up.weight.add_(1.0)
    assert torch.equal(one.logits(batch), before) and not torch.equal(logits_of(twin, batch), before)


def test_frozen_bf16_weights_train_under_autocast_and_answer_without() -> None:
    one = attached(zoo("Llama"))
    halve_frozen(one.model)
    one.model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = one.train(batches_for(one), 4, learning_rate=1e-3)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(p.dtype == torch.float32 for p in one.trainables) and one.model.lm_head.weight.dtype == torch.bfloat16
    made = one.model.eval().generate(next(batches_for(one))["input_ids"][:1, :5], max_new_tokens=4, do_sample=False)
    assert made.shape[1] > 5
