"""Parameter-selective mean teacher: both forms against updates written out by hand, and a state that serves on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.core.errors import EngineError
from engine.ops.folder import run_folder
from engine.ops.serve import serve
from engine.parts.teaching import MeanTeacher, Teaching, smallest, symmetric_cross_entropy
from tests.engine.tiny import Tiny, lay


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 5)
    )  # fmt: skip


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def teacher(model: nn.Module | None = None, fisher: bool = True, **changes: Any) -> MeanTeacher:
    values: dict[str, Any] = {"form": "code", "learning_rate": 1e-2, "momentum": 0.9, "quantile": 0.1, "anchor": 10.0, "anchor_to": "source",
                              "restore": 0.0, "seed": 1, **changes}  # fmt: skip
    made = MeanTeacher(model or net(), lambda module, batch: module(batch), Teaching(**values))
    if fisher:
        made.measure_fisher(images(16, 99).split(1))
    return made


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_batch_norm_takes_the_statistics_of_the_batch() -> None:
    model = net()
    plain = copy.deepcopy(model).train()
    batch = images(32, 1) * 3 + 1
    assert torch.allclose(teacher(model, fisher=False).answer(batch), 2 * plain(batch), atol=1e-5)


def test_symmetric_cross_entropy_against_the_formula() -> None:
    s, t = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3))
    qs, qt = s.softmax(-1), t.softmax(-1)
    expected = torch.stack([-0.5 * (qt[i] * qs[i].log()).sum() - 0.5 * (qs[i] * qt[i].log()).sum() for i in range(6)])
    assert torch.allclose(symmetric_cross_entropy(s, t), expected, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_exactly_the_share_is_masked_ties_included(share: float) -> None:
    values = {
        "a": torch.zeros(100, 7),
        "b": torch.rand(50, generator=torch.Generator().manual_seed(1)),
        "c": torch.zeros(250),
    }
    masks = smallest(values, share, torch.Generator())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(share * 1000)
    if share == 0.5:
        assert not masks["b"].any(), "the zeros come first"


def test_fisher_is_the_mean_of_squared_gradients_of_single_examples() -> None:
    made = teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    total = torch.zeros(5, 64)
    for image in images(16, 99).split(1):
        x, layer = image.reshape(64), made.student[1]
        p = (layer.weight @ x + layer.bias).softmax(-1)
        guess = functional.one_hot(p.argmax(), 5)
        total += torch.outer(p - guess, x).square()
    assert torch.allclose(made.fisher["1.weight"], total / 16, rtol=1e-4, atol=1e-9)
    assert all(bool((value >= 0).all()) for value in made.fisher.values())


def by_hand(made: MeanTeacher, batches: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The released program's step written out with its own Adam: student and teacher after the batches."""
    how = made.teaching
    student, taught = weights(made.student), weights(made.teacher)
    source = {name: value.clone() for name, value in student.items()}
    m = {name: torch.zeros_like(value) for name, value in student.items()}
    v = {name: torch.zeros_like(value) for name, value in student.items()}
    skeleton = copy.deepcopy(made.student)
    for step, batch in enumerate(batches, 1):
        leaves = {name: value.clone().requires_grad_() for name, value in student.items()}
        with torch.no_grad():
            t = torch.func.functional_call(skeleton, taught, (batch,))
        s = torch.func.functional_call(skeleton, leaves, (batch,))
        loss = symmetric_cross_entropy(s, t).mean()
        loss = loss + how.anchor * sum((made.fisher[n] * (leaves[n] - source[n]) ** 2).sum() for n in leaves)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        flat = torch.cat([g.square().reshape(-1) for g in grads.values()])
        order = flat.argsort(stable=True)[: round(how.quantile * flat.numel())]
        mask = torch.zeros(flat.numel(), dtype=torch.bool)
        mask[order] = True
        masks = dict(zip(grads, mask.split([g.numel() for g in grads.values()]), strict=True))
        for n, g in grads.items():
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.999 * v[n] + 0.001 * g * g
            moved = student[n] - how.learning_rate * (m[n] / (1 - 0.9**step)) / (
                (v[n] / (1 - 0.999**step)).sqrt() + 1e-8
            )
            first = how.momentum * taught[n] + (1 - how.momentum) * moved
            chosen = masks[n].reshape(g.shape)
            student[n] = torch.where(chosen, source[n], moved)
            second = how.momentum * first + (1 - how.momentum) * student[n]
            taught[n] = torch.where(chosen, student[n], second)
    return student, taught


def test_the_form_of_the_released_program_against_a_step_by_hand() -> None:
    made = teacher()
    batches = [images(12, seed) for seed in range(3)]
    student, taught = by_hand(made, batches)
    for batch in batches:
        made.step(batch)
    for name, value in weights(made.student).items():
        assert torch.allclose(value, student[name], atol=2e-5), name
    for name, value in weights(made.teacher).items():
        assert torch.allclose(value, taught[name], atol=2e-5), name


def test_without_quantile_and_anchor_the_form_code_is_a_mean_teacher_with_the_squared_momentum() -> None:
    made = teacher(quantile=0.0, anchor=0.0, momentum=0.9)
    start = weights(made.teacher)
    made.step(images(12, 1))
    for name, value in weights(made.teacher).items():
        expected = 0.81 * start[name] + 0.19 * weights(made.student)[name]
        assert torch.allclose(value, expected, atol=1e-6), name


def test_entries_that_are_given_back_carry_the_bits_of_the_source() -> None:
    made = teacher(quantile=0.25)
    made.step(images(12, 1))
    made.step(images(12, 2))
    equal = sum(int((value == made.source[name]).sum()) for name, value in weights(made.student).items())
    total = sum(value.numel() for value in made.source.values())
    assert equal >= round(0.25 * total) - 1


def test_paper_form_with_everything_kept_leaves_the_teacher_alone_and_with_nothing_kept_is_plain() -> None:
    kept = teacher(form="paper", quantile=1.0)
    before = weights(kept.teacher)
    kept.step(images(12, 1))
    assert same(before, weights(kept.teacher)) and not same(before, weights(kept.student))
    plain = teacher(form="paper", quantile=0.0)
    before = weights(plain.teacher)
    plain.step(images(12, 1))
    for name, value in weights(plain.teacher).items():
        assert torch.allclose(value, 0.9 * before[name] + 0.1 * weights(plain.student)[name], atol=1e-6)


def test_paper_form_keeps_the_entries_with_the_largest_fisher_weights() -> None:
    made = teacher(form="paper", quantile=0.2)
    before = weights(made.teacher)
    made.step(images(12, 1))
    flat = torch.cat([value.reshape(-1) for value in made.fisher.values()])
    limit = flat.sort(descending=True).values[round(0.2 * flat.numel()) - 1]
    for name, value in weights(made.teacher).items():
        crucial = made.fisher[name] > limit
        assert torch.equal(value[crucial], before[name][crucial])


def test_momentum_one_freezes_the_teacher_and_answers_come_from_before_the_update() -> None:
    made = teacher(form="paper", momentum=1.0, quantile=0.0)
    before = weights(made.teacher)
    batch = images(12, 1)
    expected = made.answer(batch)
    assert torch.equal(made.step(batch), expected)
    assert same(before, weights(made.teacher))
    assert not torch.equal(made.answer(batch), expected)


def test_a_pull_to_the_weights_of_the_step_before_has_no_gradient_at_first() -> None:
    free, pulled = teacher(form="paper", anchor=0.0), teacher(form="paper", anchor=1e6, anchor_to="previous")
    for made in (free, pulled):
        made.step(images(12, 1))
    assert same(weights(free.student), weights(pulled.student))
    for made in (free, pulled):
        made.step(images(12, 2))
    assert not same(weights(free.student), weights(pulled.student)), "one step later it acts"


def test_reset_is_the_source_bit_for_bit_and_a_state_goes_on() -> None:
    made, batches = teacher(restore=0.05), [images(12, seed) for seed in range(4)]
    start = weights(made.student)
    for batch in batches[:2]:
        made.step(batch)
    state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in made.state_dict().items()}
    ends = [made.step(batch) for batch in batches[2:]]
    other = teacher(restore=0.05, fisher=False)
    other.load_state_dict(state)
    assert all(torch.equal(other.step(batch), end) for batch, end in zip(batches[2:], ends, strict=True))
    made.reset()
    assert same(weights(made.student), start) and same(weights(made.teacher), start) and made.num_steps == 0


# --- in front of a real result ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = lay(tmp_path_factory.mktemp("sorter"), tiny.recipe([("full-finetuning", {})], task="classify"))
    assert run_folder(folder)["outcome"] == "succeeded"
    return folder / "artifact"


METHOD = {"slug": "psmt", "params": {"batch_size": 4, "fisher_samples": 8, "learning_rate": 1e-2}}
TEXTS = [
    "The bread was late.",
    "Where is my order?",
    "I want to pay.",
    "The lamp is broken.",
    "Thank you!",
    "It does not open.",
]


def test_it_learns_between_requests_can_go_back_and_can_forget(artifact: Path, tmp_path: Path) -> None:
    sealed = (artifact / "manifest.json").read_bytes()
    plain = serve(
        artifact,
        TEXTS,
        {},
        method={"slug": "psmt", "params": {"batch_size": 64, "fisher_samples": 4}},
        session=tmp_path / "wait",
    )
    assert plain["serving"]["batches"] == 0 and plain["serving"]["waiting"] == 6
    first = serve(artifact, TEXTS, {}, method=METHOD, session=tmp_path / "s")
    assert first["serving"]["batches"] == 1 and first["serving"]["waiting"] == 2 and first["serving"]["share_moved"] > 0
    second = serve(artifact, TEXTS, {}, method=METHOD, session=tmp_path / "s")
    assert second["serving"]["batches"] == 3
    assert second["answers"][0]["scores"] != first["answers"][0]["scores"]
    again = serve(artifact, TEXTS, {}, method=METHOD, session=tmp_path / "s", undo="last")
    assert again["answers"] == second["answers"], "the same request after one step back"
    fresh = serve(artifact, TEXTS, {}, method=METHOD, session=tmp_path / "s", undo="all")
    assert fresh["answers"] == first["answers"]
    assert (artifact / "manifest.json").read_bytes() == sealed


def test_what_cannot_be_served_is_refused(artifact: Path, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no way of answering called 'nothing'"):
        serve(artifact, TEXTS, {}, method={"slug": "nothing"}, session=tmp_path / "a")
    with pytest.raises(EngineError, match="learning_rate"):
        serve(artifact, TEXTS, {}, method={"slug": "psmt", "params": {"learning_rate": 9.0}}, session=tmp_path / "b")
    serve(artifact, TEXTS, {}, method=METHOD, session=tmp_path / "c")
    with pytest.raises(EngineError, match="belongs to other settings"):
        serve(artifact, TEXTS, {}, method={"slug": "psmt", "params": {"batch_size": 5}}, session=tmp_path / "c")
    with pytest.raises(EngineError, match="no text to sort"):
        serve(artifact, [""], {}, method=METHOD, session=tmp_path / "d")
    assert not (tmp_path / "d" / "state.json").exists(), "a request that fails teaches nothing"
    folder = lay(tmp_path / "writer", tiny.recipe([("full-finetuning", {})], max_steps=2))
    run_folder(folder)
    with pytest.raises(EngineError, match="cannot serve this result"):
        serve(folder / "artifact", ["Once"], {}, method=METHOD, session=tmp_path / "e")
    assert json.loads((tmp_path / "c" / "state.json").read_text())["values"]["waiting"]
