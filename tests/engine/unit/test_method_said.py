"""SAID against independent computations: dense Hadamard matrices, dense back-propagation, finite differences, and counted numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import hadamard
from torch import Tensor, nn

from engine.core.errors import EngineError
from engine.io.facts import model_facts
from engine.methods.said import Said
from engine.ops.check import check
from engine.ops.folder import run_folder
from engine.parts.fastfood import GENERATOR, Dense, Fastfood, project, walsh_hadamard
from engine.parts.subspace import Shape, Subspace, held_bytes
from tests.engine.attached import Attached, facts_for, logits_of, parameter_copy, random_batches
from tests.engine.tiny import Tiny, events, lay

SHAPES = [(100, 10), (37, 50), (1, 3), (64, 64), (1500, 300)]  # n, d: larger, smaller and equal


def said(**params: Any) -> Said:
    return Said(Said.Params(**{"d": 60, **params}))


def decoder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def encoder(folder: Path, seed: int = 5) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=3)


def story(tiny: Tiny, *, seed: int = 3, **params: Any) -> Attached:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"), "causal_lm")
    return Attached(decoder(tiny.folder / "decoder"), said(**params), facts, seed=seed)


def topics(tiny: Tiny, *, seed: int = 3, **params: Any) -> Attached:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'encoder'}", task="classify"), "classify")
    return Attached(encoder(tiny.folder / "encoder"), said(**params), facts, seed=seed)


def part_of(attached: Attached) -> Subspace:
    assert isinstance(attached.part, Subspace)
    return attached.part


def drawn(n: int, d: int, seed: int = 0) -> Fastfood:
    return Fastfood(n, d, torch.Generator().manual_seed(seed))


def dense_of(item: Any) -> Tensor:
    """The map as a plain matrix [n, d], built from the definition and scipy's Hadamard matrix."""
    length = item.length
    transform = torch.from_numpy(hadamard(length)).double()
    order = torch.empty(length, dtype=torch.long)
    order[item.back.long()] = torch.arange(length)  # the order from its inverse
    # The kept order is modulo the short length; the whole one is its only lift that agrees with the inverse.
    assert torch.equal(order % item.short, item.place.long())
    signs = torch.ones(length, dtype=torch.float64)
    signs[: item.d] = item.signs.double()
    gauss = item.gauss.double()
    whole = transform @ torch.diag(gauss) @ transform[order] @ torch.diag(signs)  # [L, L]
    divisor = (length * gauss.square().sum()).sqrt() * (item.n / length) ** 0.5
    return whole[: item.n, : item.d] / divisor


# ── the transform and the maps ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [1, 2, 4, 32, 64, 512, 2048])
def test_the_transform_is_that_of_scipy_and_its_own_inverse(length: int) -> None:
    x = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    expected = torch.from_numpy(hadamard(length)).double() @ x if length > 1 else x
    torch.testing.assert_close(walsh_hadamard(x), expected, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), length * x, rtol=1e-12, atol=1e-9)
    single = x.float()
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(single)), length * single, rtol=1e-4, atol=1e-4 * length)


def test_the_transform_refuses_other_lengths_and_stays_fp32_under_autocast() -> None:
    with pytest.raises(ValueError, match="power of two"):
        walsh_hadamard(torch.zeros(48))
    x = torch.randn(1024)
    plain = walsh_hadamard(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(walsh_hadamard(x), plain)
        item = drawn(700, 20)
        z = torch.randn(20, requires_grad=True)
        y = project(z, item)
        assert y.dtype == torch.float32 and torch.equal(y, item.forward(z.detach()))


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_fastfood_is_the_matrix_of_its_definition(n: int, d: int) -> None:
    item = drawn(n, d)
    matrix = dense_of(item)
    z, g = torch.randn(d, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    torch.testing.assert_close(item.forward(z), matrix @ z, rtol=0, atol=1e-8)
    torch.testing.assert_close(item.adjoint(g), matrix.T @ g, rtol=0, atol=1e-8)  # the true adjoint: no factor 1 / L


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_match_finite_differences_and_the_dense_matrix(n: int, d: int, scaled: bool) -> None:
    item = drawn(n, d, seed=4)
    z = torch.randn(d, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True) if scaled else None
    g = torch.randn(n, dtype=torch.float64)
    torch.dot(project(z, item, scale), g).backward()
    pulled = dense_of(item).T @ g
    factor = 1.7 if scaled else 1.0
    assert z.grad is not None
    torch.testing.assert_close(z.grad, factor * pulled, rtol=0, atol=1e-8)
    if scale is not None:
        assert scale.grad is not None
        torch.testing.assert_close(scale.grad, torch.dot(g, dense_of(item) @ z.detach()), rtol=0, atol=1e-8)
    if n < 200:
        inputs = (z,) if scale is None else (z, scale)
        assert torch.autograd.gradcheck(lambda *x: project(x[0], item, *x[1:]), inputs)
        assert torch.autograd.gradgradcheck(lambda *x: project(x[0], item, *x[1:]), inputs)


@pytest.mark.parametrize(
    ("n", "d"), [(1, 1), (3, 2), (33, 20), (384, 1000), (9 * 2**10, 700), (10_001, 300), (2**12, 5)]
)
def test_passes_over_what_is_asked_for_are_those_of_the_whole_transform(n: int, d: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        item = drawn(n, d)
        z, base = torch.randn(d, dtype=dtype), torch.randn(n, dtype=dtype)
        w = walsh_hadamard(F.pad(z * item.signs.to(dtype), (0, item.short - d))) * item.scale
        whole = walsh_hadamard(w[item.place.long()] * item.gauss.to(dtype))[:n]
        torch.testing.assert_close(item.forward(z), whole, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(item.forward(z, base), base + whole, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            project(z, item, torch.tensor(1.7, dtype=dtype), base), base + 1.7 * whole, rtol=tolerance, atol=tolerance
        )
        v = walsh_hadamard(F.pad(base, (0, item.length - n))) * item.gauss.to(dtype)
        pulled = v[item.back.long()].view(-1, item.short).sum(0) * item.scale
        expected = walsh_hadamard(pulled)[:d] * item.signs.to(dtype)
        torch.testing.assert_close(item.adjoint(base), expected, rtol=10 * tolerance, atol=10 * tolerance)


def test_fastfood_is_linear() -> None:
    item = drawn(5000, 300)
    a, b = torch.randn(300), torch.randn(300)
    torch.testing.assert_close(item.forward(a + b), item.forward(a) + item.forward(b), rtol=0, atol=1e-5)
    assert not item.forward(torch.zeros(300)).any()


@pytest.mark.parametrize(("n", "d"), [(1000, 100), (32, 100), (5000, 3), (1025, 700)])
def test_lengths_are_kept_on_average(n: int, d: int) -> None:
    z = torch.randn(d, generator=torch.Generator().manual_seed(9))
    ratios = torch.stack([drawn(n, d, seed).forward(z).norm() / z.norm() for seed in range(100)])
    assert abs(ratios.mean().item() - 1.0) < 0.05
    assert (ratios.square().mean().item() - 1.0) ** 2 < 0.05**2


def test_a_tensor_smaller_than_d_sees_all_of_z() -> None:
    columns = torch.stack([drawn(8, 50).forward(unit) for unit in torch.eye(50)], 1)  # [8, 50]
    assert (columns.norm(dim=0) > 0).all()


def test_the_map_keeps_three_numbers_an_entry_and_not_d() -> None:
    item = drawn(3000, 500)
    assert item.length == 4096
    assert item.num_numbers() == 3 * 4096 + 500 < 3000 * 500 / 100
    assert Dense(30, 20, torch.Generator().manual_seed(0), spread=0.01).num_numbers() == 600


def test_the_draw_depends_on_the_seed_alone_and_carries_a_mark() -> None:
    one, same, other = drawn(100, 10, 1), drawn(100, 10, 1), drawn(100, 10, 2)
    for name in ("signs", "place", "back", "gauss"):
        assert torch.equal(getattr(one, name), getattr(same, name))
    assert one.mark() == same.mark() != other.mark()
    assert set(one.signs.tolist()) == {-1.0, 1.0} and sorted(one.back.tolist()) == list(range(128))


def test_the_dense_map_has_the_spread_it_was_given() -> None:
    item = Dense(400, 50, torch.Generator().manual_seed(0), spread=0.01)
    assert item.matrix.std().item() == pytest.approx(0.01, rel=0.02)
    z, g = torch.randn(50, requires_grad=True), torch.randn(400)
    torch.dot(project(z, item), g).backward()
    torch.testing.assert_close(z.grad, item.matrix.T @ g)


# ── in a model ────────────────────────────────────────────────────────────────────────────────────────────────────────

KINDS: list[dict[str, Any]] = [
    {"mode": "did"},
    {"mode": "said"},
    {"mode": "said", "scales": "tensor"},
    {"mode": "did", "spread": "whole"},
    {"mode": "said", "spread": "whole"},
    {"mode": "said", "projection": "dense"},
    {"mode": "said", "targets": "attention"},
]


@pytest.mark.parametrize("params", KINDS)
def test_the_start_is_the_base_model_exactly(tiny: Tiny, params: dict[str, Any]) -> None:
    attached, batch = story(tiny, **params), next(random_batches(400))
    base = logits_of(decoder(tiny.folder / "decoder"), batch)
    assert torch.equal(attached.logits(batch), base)
    assert torch.equal(attached.model(input_ids=batch["input_ids"]).logits, base)  # with a graph too


@pytest.mark.parametrize("params", KINDS)
def test_the_gradient_is_that_of_ordinary_training_pulled_back(tiny: Tiny, params: dict[str, Any]) -> None:
    """dz = sum of lambda_i P_i^T g_i and dlambda_b = sum over its tensors of <g_i, P_i z>, with g of plain back-propagation at the same weights."""
    attached, batch = story(tiny, **params), next(random_batches(400))
    part = part_of(attached)
    with torch.no_grad():
        part.z.copy_(0.05 * torch.randn(part.z.shape, generator=torch.Generator().manual_seed(1)))
        if part.scales is not None:
            part.scales.copy_(1.0 + 0.3 * torch.randn(part.scales.shape, generator=torch.Generator().manual_seed(2)))
    attached.loss(batch).backward()
    assert part.z.grad is not None

    plain = decoder(tiny.folder / "decoder")
    own = dict(plain.named_parameters())
    offsets: dict[str, Tensor] = {}
    if params.get("spread") == "whole":
        pieces = part.maps[0].forward(part.z.detach()).split([weight.base.numel() for weight in part.weights])
        offsets = {weight.name: piece for weight, piece in zip(part.weights, pieces, strict=True)}
    else:
        offsets = {w.name: w.projection.forward(part.z.detach()) for w in part.weights if w.projection is not None}
    scales = torch.ones(1) if part.scales is None else part.scales.detach()
    with torch.no_grad():
        for weight in part.weights:
            own[weight.name].add_(scales[weight.scale] * offsets[weight.name].view_as(own[weight.name]))
    Attached.loss(type("Plain", (), {"model": plain, "task": attached.task})(), batch).backward()  # type: ignore[arg-type]
    grads = {name: parameter.grad for name, parameter in own.items() if parameter.grad is not None}
    if params.get("spread") == "whole":
        expected = part.maps[0].adjoint(torch.cat([scales[w.scale] * grads[w.name].flatten() for w in part.weights]))
    else:
        expected = sum(  # type: ignore[assignment]
            scales[w.scale] * w.projection.adjoint(grads[w.name].flatten())
            for w in part.weights
            if w.projection is not None
        )
    torch.testing.assert_close(part.z.grad, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item() + 1e-6)
    if part.scales is not None:
        wanted = torch.zeros_like(scales)
        for weight in part.weights:
            wanted[weight.scale] += torch.dot(grads[weight.name].flatten(), offsets[weight.name])
        torch.testing.assert_close(part.scales.grad, wanted, rtol=1e-3, atol=1e-5)


def test_said_with_scales_held_at_one_is_did(tiny: Tiny) -> None:
    did = story(tiny, mode="did", d=57)
    held = story(tiny, mode="said", d=60, train_scales=False)  # 2 layers and the rest: three scales
    assert part_of(held).z.shape == part_of(did).z.shape
    assert held.trainables.num_elements() == did.trainables.num_elements() == 57
    one, other = did.train(random_batches(400), 6), held.train(random_batches(400), 6)
    assert one == pytest.approx(other, rel=1e-6)
    torch.testing.assert_close(part_of(held).z, part_of(did).z, rtol=1e-5, atol=1e-7)
    batch = next(random_batches(400))
    torch.testing.assert_close(held.logits(batch), did.logits(batch), rtol=0, atol=1e-5)


def test_the_count_is_true(tiny: Tiny) -> None:
    for params in ({"mode": "did"}, {"mode": "said"}, {"mode": "said", "scales": "tensor"}):
        attached = story(tiny, **params)
        assert (
            attached.trainables.num_elements() == 60 == Said.num_trainable(Said.Params(d=60, **params), attached.facts)
        )
    inside, free = topics(tiny), topics(tiny, head="free")
    assert inside.trainables.num_elements() == 60
    assert free.trainables.num_elements() == 60 + 3 * 32 + 3
    assert part_of(inside).scales is not None and part_of(inside).scales.numel() == 3  # type: ignore[union-attr]


def test_a_new_classifier_inside_the_subspace_learns_and_a_free_one_too(tiny: Tiny) -> None:
    for head in ("inside", "free"):
        attached = topics(tiny, head=head)
        before = attached.model.classifier.weight.detach().clone()
        batch = next(random_batches(400, classes=3))
        losses = attached.train(iter([batch] * 25), 25, 2e-2)
        assert losses[-1] < 0.9 * losses[0]
        assert not torch.equal(attached.model.classifier.weight, before)
        assert ("classifier.weight" in dict(attached.model.named_parameters())) is (head == "free")


def test_every_tensor_moves_by_about_the_length_of_z_or_by_its_size(tiny: Tiny) -> None:
    for spread in ("tensor", "whole"):
        attached = story(tiny, mode="did", spread=spread)
        part = part_of(attached)
        with torch.no_grad():
            part.z.copy_(torch.randn(60))
        part.sync(attached.model)
        moved = {w.name: (getattr(*w.owners[0]) - w.base).norm().item() / part.z.norm().item() for w in part.weights}
        big, small = moved["model.embed_tokens.weight"], moved["model.layers.0.input_layernorm.weight"]
        if spread == "tensor":
            assert 0.7 < big < 1.3 and 0.6 < small < 1.5
        else:
            share = (32 / sum(w.base.numel() for w in part.weights)) ** 0.5
            assert 0.5 * share < small < 2 * share and big > 10 * small
            assert sum(value**2 for value in moved.values()) == pytest.approx(1.0, abs=0.3)


def test_tied_embeddings_move_once(tiny: Tiny) -> None:
    attached = story(tiny)
    part = part_of(attached)
    assert [w.name for w in part.weights].count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in [w.name for w in part.weights]
    attached.train(random_batches(400), 2)
    model = attached.model
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)  # type: ignore[union-attr, arg-type]
    assert part.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]


def test_only_chosen_weights_move(tiny: Tiny) -> None:
    attached = story(tiny, targets="q_proj, v_proj")
    before = parameter_copy(decoder(tiny.folder / "decoder"))
    attached.train(random_batches(400), 3)
    part_of(attached).merge(attached.model)
    after = attached.model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) is not name.endswith(("q_proj.weight", "v_proj.weight")), name


# ── one computation for many passes ───────────────────────────────────────────────────────────────────────────────────


def test_weights_are_computed_once_a_backward_pass(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    attached, batches = story(tiny), random_batches(400)
    part = part_of(attached)
    count = 0
    original = part._compute

    def counted() -> None:
        nonlocal count
        count += 1
        original()

    monkeypatch.setattr(part, "_compute", counted)
    (attached.loss(next(batches)) + attached.loss(next(batches))).backward()  # two passes, one graph
    assert count == 0  # that of the last sync
    attached.loss(next(batches)).backward()  # its graph is gone: accumulated batches need a new one
    assert count == 1
    with torch.no_grad():
        attached.loss(next(batches))
        assert count == 1
        part.z.add_(0.01)
        attached.loss(next(batches))
    assert count == 2


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny: Tiny) -> None:
    whole, pieces = story(tiny), story(tiny)
    batches = random_batches(400)
    first, second = next(batches), next(batches)
    (whole.loss(first) + whole.loss(second)).backward()
    pieces.loss(first).backward()
    pieces.loss(second).backward()
    for one, other in zip(whole.trainables, pieces.trainables, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_gradient_checkpointing_gives_the_same_gradients(tiny: Tiny) -> None:
    attached, batch = story(tiny), next(random_batches(400))
    attached.model.train()
    attached.loss(batch).backward()
    expected = [parameter.grad.clone() for parameter in attached.trainables if parameter.grad is not None]
    for parameter in attached.trainables:
        parameter.grad = None
    attached.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    attached.loss(batch).backward()
    for parameter, grad in zip(attached.trainables, expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-8)


def test_the_subspace_remembers_no_long_vector_for_backward(tiny: Tiny) -> None:
    part = part_of(story(tiny))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        thetas = part._moved()
    assert sum(theta.numel() for theta in thetas) > 10_000
    assert sum(kept.values()) <= 60  # z and the scales


def test_the_body_alone_sees_the_weights_and_their_gradient(tiny: Tiny) -> None:
    attached, batch = story(tiny), next(random_batches(400))
    attached.train(random_batches(400), 2)
    attached.model.model(input_ids=batch["input_ids"]).last_hidden_state.square().sum().backward()  # type: ignore[operator]
    assert part_of(attached).z.grad is not None and part_of(attached).z.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_a_copy_of_the_model_stands_on_its_own(tiny: Tiny) -> None:
    attached, batch = story(tiny), next(random_batches(400))
    attached.train(random_batches(400), 2)
    twin = copy.deepcopy(attached.model)
    before = logits_of(twin, batch)
    assert torch.equal(before, attached.logits(batch))
    attached.train(random_batches(400), 2)
    assert torch.equal(logits_of(twin, batch), before) and not torch.equal(attached.logits(batch), before)


def test_text_can_be_written_while_attached(tiny: Tiny) -> None:
    attached, ids = story(tiny), next(random_batches(400))["input_ids"][:1, :5]
    plain = decoder(tiny.folder / "decoder")
    made = [m.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (attached.model, plain)]
    assert torch.equal(*made)


# ── taking it home ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("params", KINDS)
def test_merge_is_exact(tiny: Tiny, params: dict[str, Any]) -> None:
    attached, batch = story(tiny, **params), next(random_batches(400))
    attached.train(random_batches(400), 3)
    learned = attached.logits(batch)
    plain = decoder(tiny.folder / "decoder")
    assert not torch.equal(learned, logits_of(plain, batch))
    assert attached.part.merge(attached.model)
    assert torch.equal(attached.logits(batch), learned)
    assert attached.model.state_dict().keys() == plain.state_dict().keys()
    assert {n for n, _ in attached.model.named_parameters()} == {n for n, _ in plain.named_parameters()}
    assert not attached.model._forward_pre_hooks


@pytest.mark.parametrize("params", [*KINDS[:5], {"head": "free"}])
def test_seed_and_numbers_give_the_weights_back_bit_for_bit(tiny: Tiny, params: dict[str, Any]) -> None:
    first = topics(tiny, seed=3, **params)
    first.train(random_batches(400, classes=3), 3)
    payload = first.part.export(first.model)
    other = topics(tiny, seed=77, **params)  # drawn otherwise at first: the seed of the file counts
    batch = next(random_batches(400, classes=3))
    assert not torch.equal(other.logits(batch), first.logits(batch))
    other.part.restore(other.model, payload)
    assert torch.equal(other.logits(batch), first.logits(batch))
    first.part.merge(first.model)
    other.part.merge(other.model)
    mine, theirs = first.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_compact_form_holds_d_numbers(tiny: Tiny) -> None:
    attached = topics(tiny)
    payload = attached.part.export(attached.model)
    assert sum(tensor.numel() for tensor in payload.tensors.values()) == 60
    assert (
        payload.config["seed"] == 3 and payload.config["generator"] == GENERATOR and len(payload.config["base"]) == 64
    )
    assert len(str(payload.config)) < 1500


def test_files_of_another_kind_are_refused_in_sentences(tiny: Tiny) -> None:
    attached = topics(tiny)
    payload = attached.part.export(attached.model)
    for change, code in (({"generator": "fastfood/0"}, "other_generator"), ({"d": 61}, "other_subspace"),
                         ({"base": "0" * 64}, "other_base"), ({"draw": "no"}, "other_draw")):  # fmt: skip
        stranger = type(payload)(layout="bonsai", config={**payload.config, **change}, tensors=payload.tensors)
        with pytest.raises(EngineError) as refused:
            attached.part.restore(attached.model, stranger)
        assert refused.value.fault.code == code and refused.value.fault.way_out.endswith(".")
    moved = encoder(tiny.folder / "encoder")
    with torch.no_grad():
        moved.bert.embeddings.word_embeddings.weight[0, 0] += 1e-6
    facts = attached.facts
    with pytest.raises(EngineError, match="other weights"):
        (changed := Attached(moved, said(), facts)).part.restore(changed.model, payload)


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bad_numbers_are_refused_early(tiny: Tiny) -> None:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"), "causal_lm")

    def codes(**params: Any) -> list[tuple[str, str]]:
        return [(fault.where, fault.code) for fault in Said.check(Said.Params(**params), facts)]

    assert codes(d=100) == [] and codes(d=5) == []
    assert codes(d=4) == [("d", "too_small")]  # two layers and the rest have a scale each
    assert codes(d=4, mode="did") == []
    assert codes(d=20, scales="tensor") == [("d", "too_small")]
    assert codes(d=900_000, mode="did") == [("d", "too_large")]
    assert codes(d=20_000, projection="dense") == [("projection", "too_large")]
    assert codes(d=100, targets="q_porj") == [("targets", "no_such_layer")]
    small = facts_for(facts.model, "causal_lm")
    object.__setattr__(small.machine, "memory_bytes", 100_000)
    assert Said.check(Said.Params(d=100), small)[0].code == "out_of_memory"
    assert held_bytes(Shape(d=100), "all", facts) > 12 * facts.model.num_parameters


def test_pairs_that_move_the_same_weights_are_refused(tiny: Tiny) -> None:
    recipe = tiny.recipe([("said", {"d": 50, "targets": "attention"})])
    both = recipe.model_copy(update={"methods": (*recipe.methods, *tiny.recipe([("lora", {"r": 2})]).methods)})
    (fault,) = check(both).faults
    assert fault.code == "claimed_twice" and "target layers" in fault.way_out


# ── with other methods, in whole runs ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["classify", "causal_lm"])
def test_it_runs_with_other_slots(tiny: Tiny, tmp_path: Path, task: str) -> None:
    methods: list[tuple[str, dict[str, Any]]] = [
        ("said", {"d": 80, "targets": "attention"}),
        ("lora", {"r": 2, "targets": "feed-forward"}),
        ("clip", {}),
        ("cosine", {}),
        ("patience", {}),
    ]
    recipe = tiny.recipe(methods, task=task, accumulate=2, max_steps=4)
    folder = lay(tmp_path / task, recipe)
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result["message"]
    forms = json.loads((folder / "artifact" / "certificate.json").read_text())["forms"]
    assert {form["form"] for form in forms if form["ok"]} >= {"adapter-said", "merged"}, forms
    assert (folder / "artifact" / "adapter-said" / "adapter.safetensors").stat().st_size < 2000


def test_bf16_keeps_what_moves_in_fp32(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(
        tmp_path / "half", tiny.recipe([("said", {"d": 80, "targets": "attention"})], precision="bf16", max_steps=3)
    )
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result["message"]
    assert events(folder, "artifact")[0]["certificate"] == "pass"


def test_the_suggested_rate_falls_with_d(tiny: Tiny) -> None:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'decoder'}", task="causal_lm"), "causal_lm")
    recipe = tiny.recipe([("said", {"d": 50})])
    few, many = (Said.suggest(recipe, Said.Params(d=d), facts)[0] for d in (100, 10_000))
    assert few.where == many.where == "settings.learning_rate" and few.value > many.value
    assert few.reason.endswith(".")


def test_modules_keep_ordinary_types(tiny: Tiny) -> None:
    attached = story(tiny)
    assert type(attached.model.model.layers[0].mlp.up_proj) is nn.Linear  # type: ignore[union-attr, index]
