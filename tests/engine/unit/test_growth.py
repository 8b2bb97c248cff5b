"""Trainables that are born, cut or gone in the course of a run: their optimizer state, their schedule, their checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import engine.ops.train as driver
from engine.io.tensors import load_tensors
from engine.methods.adamw import AdamWFactory
from engine.ops.folder import run_folder
from engine.parts.schedules import Shaped, falling_line
from engine.train import checkpoint
from engine.train.clock import Clock
from engine.train.export import build_slots
from engine.train.parts import Parametrization, Remap, StepReport
from engine.train.trainables import Trainables, births, load_optimizer_state, optimizer_state, restore_births, set_rates
from tests.engine.interrupted import assert_same_run, best_comes_at, run_and_pause_behind
from tests.engine.tiny import Tiny, lay, metric_rows

PLACE = "model.layers.0.mlp.up_proj"


# ── groups and state ──────────────────────────────────────────────────────────────────────────────────────────────────


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def stepped() -> tuple[AdamWFactory, torch.optim.Optimizer, Trainables]:
    """An optimizer over a matrix and a vector that has made three steps."""
    trainables = Trainables({"matrix": parameter(2, 3), "vector": parameter(4, seed=1)})
    factory = AdamWFactory(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.3)
    optimizer = factory.build(trainables, 0.1)
    for seed in range(3):
        for p in trainables:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    return factory, optimizer, trainables


def owners(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The group of every parameter; a parameter in two groups fails."""
    found: dict[int, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert id(p) not in found
            found[id(p)] = group
    return found


def test_what_is_born_gets_its_own_group_with_the_right_weight_decay_and_leaves_old_state_alone() -> None:
    factory, optimizer, trainables = stepped()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    thick, thin = parameter(2, 5), parameter(3)
    remap = Remap(replaced={"thick": thick, "thin": thin}, born=3)
    factory.remap(optimizer, remap, trainables)
    trainables.apply(remap)
    group = owners(optimizer)
    assert group[id(thick)]["born"] == group[id(thin)]["born"] == 3
    assert (group[id(thick)]["weight_decay"], group[id(thin)]["weight_decay"]) == (0.3, 0.0)
    assert group[id(thick)]["betas"] == (0.9, 0.99)
    assert births(optimizer, trainables) == {"thick": 3, "thin": 3}
    after = optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])


def test_a_matrix_born_among_vectors_decays() -> None:
    trainables = Trainables({"vector": parameter(4)})
    factory = AdamWFactory(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.3)
    optimizer = factory.build(trainables, 0.1)
    fresh = parameter(2, 2)
    factory.remap(optimizer, Remap(replaced={"matrix": fresh}, born=5), trainables)
    assert owners(optimizer)[id(fresh)]["weight_decay"] == 0.3


def test_without_a_birth_the_newcomer_joins_the_groups_that_exist() -> None:
    factory, optimizer, trainables = stepped()
    number = len(optimizer.param_groups)
    factory.remap(optimizer, Remap(replaced={"more": parameter(2, 2)}), trainables)
    assert len(optimizer.param_groups) == number and births(optimizer, trainables) == {}


def test_a_cut_parameter_keeps_its_rows_its_counter_and_its_group() -> None:
    factory, optimizer, trainables = stepped()
    old = trainables["matrix"]
    moments = {key: value.clone() for key, value in optimizer.state[old].items()}
    kept = nn.Parameter(old.detach()[:, :2].clone())
    index = torch.tensor([[0, 1], [3, 4]])
    remap = Remap(replaced={"matrix": kept}, tensors={"matrix": ("matrix", index)}, removed=("vector",), born=3)
    factory.remap(optimizer, remap, trainables)
    trainables.apply(remap)
    state = optimizer.state[kept]
    assert torch.equal(state["exp_avg"], moments["exp_avg"][:, :2]) and state["step"] == moments["step"] == 3
    assert "born" not in owners(optimizer)[id(kept)] and list(owners(optimizer)) == [id(kept)]
    assert len(optimizer.state) == 1 and len(trainables) == 1


def test_two_heirs_of_one_parameter_count_their_own_steps() -> None:
    factory, optimizer, trainables = stepped()
    heirs = {name: parameter(2, 3) for name in ("left", "right")}
    remap = Remap(
        replaced=dict(heirs), tensors={name: ("matrix", torch.arange(6)) for name in heirs}, removed=("matrix",)
    )
    factory.remap(optimizer, remap, trainables)
    trainables.apply(remap)
    for p in trainables:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert {float(optimizer.state[p]["step"]) for p in heirs.values()} == {4.0}


def test_each_group_rises_and_falls_on_its_own_clock() -> None:
    factory, optimizer, trainables = stepped()
    total, warmup = 40, 0.25
    late = {8: parameter(2, 2), 24: parameter(3)}
    for born, fresh in late.items():
        factory.remap(optimizer, Remap(replaced={f"p{born}": fresh}, born=born), trainables)
    schedule = Shaped(warmup, falling_line(0.0))
    rates: dict[int, list[float]] = {0: [], 8: [], 24: []}
    for step in range(total):
        clock = Clock(total_steps=total, steps_per_epoch=10, num_samples=40, step=step)
        returned = set_rates(optimizer, schedule, clock, 2.0)
        group = owners(optimizer)
        assert returned == group[id(trainables["matrix"])]["lr"]
        for born in rates:
            if step >= born:
                rates[born].append(group[id(late[born] if born else trainables["matrix"])]["lr"])
    for born, seen in rates.items():  # the whole shape again, squeezed into the steps that are left
        length = total - born
        rise = round(warmup * length)
        expected = [
            2.0 * ((t + 1) / (rise + 1) if t < rise else 1 - (t - rise) / (length - rise)) for t in range(length)
        ]
        assert seen == pytest.approx(expected)


def test_groups_come_back_from_a_freshly_built_optimizer() -> None:
    factory, optimizer, trainables = stepped()
    for born, shapes in ((3, [(2, 2), (3,)]), (5, [(4,)])):
        remap = Remap(replaced={f"p{born}{shape}": parameter(*shape) for shape in shapes}, born=born)
        factory.remap(optimizer, remap, trainables)
        trainables.apply(remap)
    tensors, values = optimizer_state(optimizer, trainables)
    again = factory.build(trainables, 0.1)
    restore_births(again, trainables, births(optimizer, trainables))
    load_optimizer_state(again, trainables, tensors, values)
    mine, theirs = owners(optimizer), owners(again)
    assert mine.keys() == theirs.keys()
    for key, group in mine.items():
        assert {k: v for k, v in group.items() if k not in {"params", "lr"}} == {
            k: v for k, v in theirs[key].items() if k not in {"params", "lr"}
        }
    assert births(again, trainables) == births(optimizer, trainables)


def test_an_order_of_other_names_is_refused() -> None:
    trainables = Trainables({"a": parameter(1), "b": parameter(1)})
    trainables.arrange(["b", "a"])
    assert [name for name, _ in trainables.items()] == ["b", "a"]
    with pytest.raises(ValueError, match="'c'"):
        trainables.arrange(["a", "b", "c"])


# ── whole runs ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Sum(nn.Module):
    """A frozen layer and the sum of some matrices beside it."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.plain, self.pieces = plain, nn.ParameterDict()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.plain(x)
        for piece in self.pieces.values():
            out = out + x @ piece.t()
        return out


class Growing(Parametrization):
    """Starts with one matrix; another is born at step 3 and at step 5, under names that sort before the first."""

    def __init__(self) -> None:
        self.made = 1

    def attach(self, model: nn.Module) -> None:
        self.layer = Sum(model.get_submodule(PLACE))
        model.get_submodule(PLACE.rpartition(".")[0]).up_proj = self.layer
        self._shape(self.made)

    def _shape(self, number: int) -> None:
        shape = self.layer.plain.weight.shape
        self.made, self.layer.pieces = number, nn.ParameterDict()
        for i in range(number):  # one by one, as they were born: a ParameterDict sorts what it is given at once
            self.layer.pieces[f"p{9 - i}"] = torch.zeros(shape)

    def trainables(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: self.layer.pieces[name] for name in sorted(self.layer.pieces)}

    def adapt(self, report: StepReport) -> Remap | None:
        if report.step not in {3, 5}:
            return None
        name, self.made = f"p{9 - self.made}", self.made + 1
        self.layer.pieces[name] = torch.zeros(self.layer.plain.weight.shape)
        return Remap(replaced={name: self.layer.pieces[name]}, born=report.step)

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._shape(state["made"])

    @torch.no_grad()
    def merge(self, model: nn.Module) -> bool:
        self.layer.plain.weight += sum(p.detach() for p in self.layer.pieces.values())
        model.get_submodule(PLACE.rpartition(".")[0]).up_proj = self.layer.plain
        return True


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run that is made grows, whatever its recipe says."""

    def swapped(*arguments: Any) -> Any:
        composition, slots = build_slots(*arguments)
        (name,) = (name for name, part in slots.names.items() if part is slots.parametrizations[0])
        slots.parametrizations[0] = slots.names[name] = Growing()
        return composition, slots

    monkeypatch.setattr(driver, "build_slots", swapped)


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 2}),
    ("clip", {"max_norm": 0.05}),
    ("cosine", {"warmup": 0.4}),
]


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6])
def test_a_grown_run_resumes_to_the_same_bits(tiny: Tiny, tmp_path: Path, growing: None, stop: int) -> None:
    recipe = tiny.recipe(METHODS, max_steps=8, checkpoint_every=1, evaluations=1)
    whole, folder = lay(tmp_path / "whole", recipe), tmp_path / "stopped"
    assert run_folder(whole)["outcome"] == "succeeded"
    run_and_pause_behind(stop, folder, recipe)
    assert metric_rows(folder)[-1]["step"] == stop + 1
    assert run_folder(folder)["outcome"] == "succeeded"
    assert_same_run(folder, whole)
    last = checkpoint.load(checkpoint.listed(folder)[-1])
    assert last.values["born"] == {"p8": 3, "p7": 5} and len(last.trainables) == 3


@pytest.mark.parametrize("best", [0, 2, 4, 8])
def test_the_best_checkpoint_is_put_back_whatever_has_grown_since(
    tiny: Tiny, tmp_path: Path, growing: None, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    best_comes_at(best, monkeypatch)
    folder = lay(tmp_path, tiny.recipe(METHODS, max_steps=8, checkpoint_every=1, evaluations=8))
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result["message"]
    kept = checkpoint.load(folder / checkpoint.FOLDER / f"step-{best:08d}").trainables
    assert len(kept) == 1 + (best >= 3) + (best >= 5)
    merged = load_tensors(folder / "artifact" / "merged" / "model.safetensors")
    base = load_tensors(tiny.folder / "decoder" / "model.safetensors")
    name = f"{PLACE}.weight"
    torch.testing.assert_close(merged[name], base[name] + sum(kept.values()), rtol=0, atol=1e-7)
