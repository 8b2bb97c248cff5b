"""The delta codec: exact round trips of positions and values, damage and wrong bases noticed, sizes as counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.core.errors import EngineError
from engine.io.tensors import DamagedFile
from engine.ops.transform import ModelFolder, OutFolder
from engine.parts.delta_codec import (
    RECORD,
    WEIGHTS,
    Change,
    DeltaReader,
    DeltaWriter,
    Drawn,
    decode_gaps,
    encode_gaps,
    num_bytes,
    restore,
)
from tests.engine.folders import write_model


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 200_000), unique=True).map(sorted))
def test_gaps_come_back(places: list[int]) -> None:
    index = torch.tensor(places, dtype=torch.int64)
    code = encode_gaps(index)
    assert torch.equal(decode_gaps(code), index)
    assert code.nbytes <= min(
        sum((b - a - 1) // 255 + 1 for a, b in zip([-1, *places], places)),
        2 * sum((b - a - 1) // 65535 + 1 for a, b in zip([-1, *places], places)),
    )


@pytest.mark.parametrize("places", [[], [0], [254], [255], [256, 511, 512], [65534], [65535], [70000, 200000]])
def test_gaps_at_the_borders_of_a_byte(places: list[int]) -> None:
    assert decode_gaps(encode_gaps(torch.tensor(places, dtype=torch.int64))).tolist() == places


@pytest.mark.parametrize("places", [[3, 3], [4, 2]])
def test_positions_must_ascend(places: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        encode_gaps(torch.tensor(places))


@pytest.mark.parametrize(("keep", "most"), [(0.5, 1.01), (0.1, 1.01), (0.01, 1.15), (0.005, 1.5)])
def test_a_random_position_costs_about_a_byte(keep: float, most: float) -> None:
    index = (torch.rand(400_000, generator=torch.Generator().manual_seed(1)) < keep).nonzero().squeeze(1)
    assert encode_gaps(index).nbytes <= most * len(index)


def sparse(base: Tensor, tuned: Tensor, *, kind: Any = "weight", scale: Any = 1.0, keep: float = 0.3) -> Change:
    index = (torch.rand(base.numel(), generator=torch.Generator().manual_seed(2)) < keep).nonzero().squeeze(1)
    values = tuned.flatten()[index] if kind == "weight" else (tuned.double() - base.double()).flatten()[index].float()
    return Change(dtype=tuned.dtype, shape=tuple(tuned.shape), kind=kind, values=values, index=index, scale=scale)


def pair(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (40, 30)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=generator).to(dtype)
    return base, (base.float() * torch.randn(shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["weight", "delta"])
@pytest.mark.parametrize("rows", [False, True])
def test_a_change_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, kind: Any, rows: bool) -> None:
    base, tuned = pair(dtype)
    scale = torch.linspace(1, 9, 40) if rows else 3.7
    change = sparse(base, tuned, kind=kind, scale=scale)
    with DeltaWriter(tmp_path / "delta") as writer:
        writer.put("w", change, base=base)
    with DeltaReader(tmp_path / "delta") as reader:
        back = reader.change("w")
        assert back is not None and torch.equal(back.values, change.values) and torch.equal(back.index, change.index)
        assert torch.equal(reader.rebuild("w", base), change.rebuild(base))
    factor = scale.double().unsqueeze(1) if rows else 3.7
    mask = torch.zeros(base.numel(), dtype=torch.bool)
    mask[change.index] = True
    difference = tuned.double() - base.double()
    difference = difference if kind == "weight" else difference.float().double()
    expected = base.double() + mask.view(base.shape) * factor * difference
    torch.testing.assert_close(
        change.rebuild(base),
        expected.to(dtype),
        rtol=1e-6 if dtype == torch.float32 else None,
        atol=1e-6 if dtype == torch.float32 else None,
    )
    torch.testing.assert_close(
        change.difference(base).view(base.shape).double(), expected - base.double(), rtol=1e-5, atol=1e-5
    )


def test_kept_weights_with_factor_one_are_exact_where_differences_are_not() -> None:
    base = torch.tensor([1.0, 0.3, -5.0])
    tuned = torch.tensor([1e-9, 0.1, 7.123456])
    assert (base + (tuned - base)).tolist() != tuned.tolist()  # what exactness is for
    change = Change(dtype=torch.float32, shape=(3,), kind="weight", values=tuned, index=torch.arange(3))
    assert torch.equal(change.rebuild(base), tuned)


def test_a_whole_model_is_restored_from_its_base(tmp_path: Path) -> None:
    base, tuned = pair()
    fresh = torch.arange(6.0).view(2, 3)
    steps = torch.tensor([5, 6])
    folder = write_model(tmp_path / "base", {"a": base, "bare": base, "steps": steps})
    with DeltaWriter(tmp_path / "delta", {"names": {"pre.bare": "bare"}}) as writer:
        writer.put("a", sparse(base, tuned, scale=2.0), base=base)
        writer.same("pre.bare", base)
        writer.put("head", Change(dtype=torch.float32, shape=(2, 3), kind="weight", values=fresh.flatten()), base=None)
        writer.put("steps", Change(dtype=torch.int64, shape=(2,), kind="weight", values=steps + 1), base=steps)
        writer.twin("tied", "a")
    out = tmp_path / "out"
    out.mkdir()
    with ModelFolder(folder, "model") as model:
        restore(tmp_path / "delta", model, OutFolder(out))
    with ModelFolder(out, "out") as result:
        assert set(result) == {"a", "pre.bare", "head", "steps", "tied"}
        assert torch.equal(result["a"], sparse(base, tuned, scale=2.0).rebuild(base))
        assert torch.equal(result["tied"], result["a"]) and torch.equal(result["pre.bare"], base)
        assert torch.equal(result["head"], fresh) and torch.equal(result["steps"], steps + 1)


def test_a_mask_is_drawn_again_and_checked(tmp_path: Path) -> None:
    base, tuned = pair()
    drawn = Drawn(seed=4, name="w", drop=0.9)
    index = drawn.index(base.numel())
    change = Change(
        dtype=torch.float32, shape=(40, 30), kind="weight", values=tuned.flatten()[index], index=index, scale=10.0
    )
    sizes = {}
    for name, again in (("stored", None), ("redrawn", drawn)):
        with DeltaWriter(tmp_path / name) as writer:
            writer.put("w", change, base=base, drawn=again)
        with DeltaReader(tmp_path / name) as reader:
            assert torch.equal(reader.rebuild("w", base), change.rebuild(base))
        sizes[name] = (tmp_path / name / WEIGHTS).stat().st_size
    assert sizes["redrawn"] < sizes["stored"]
    record = tmp_path / "redrawn" / RECORD
    body = json.loads(record.read_text())
    body["tensors"]["w"]["drawn"]["seed"] = 5
    record.write_text(json.dumps(body))
    with DeltaReader(tmp_path / "redrawn") as reader, pytest.raises(DamagedFile, match="could not be drawn again"):
        reader.rebuild("w", base)


def test_another_base_is_refused_by_the_name_of_the_weight(tmp_path: Path) -> None:
    base, tuned = pair()
    with DeltaWriter(tmp_path / "delta") as writer:
        writer.put("w", sparse(base, tuned), base=base)
        writer.same("same", base)
    other = base.clone()
    other[3, 4] += 1e-6
    with DeltaReader(tmp_path / "delta") as reader:
        for name in ("w", "same"):
            for wrong in (other, None, base.bfloat16()):
                with pytest.raises(EngineError, match=name) as caught:
                    reader.rebuild(name, wrong)
                assert caught.value.fault.code == "other_base" and caught.value.fault.way_out


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    base, tuned = pair()
    with DeltaWriter(tmp_path / "delta") as writer:
        writer.put("w", sparse(base, tuned), base=base)
    path = tmp_path / "delta" / WEIGHTS
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with DeltaReader(tmp_path / "delta") as reader, pytest.raises(DamagedFile, match="changed after it was written"):
        reader.rebuild("w", base)
    (tmp_path / "delta" / RECORD).write_text("{}")
    with pytest.raises(DamagedFile, match="no complete delta"):
        DeltaReader(tmp_path / "delta")


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), DeltaWriter(tmp_path / "delta") as writer:
        writer.same("w", torch.zeros(3))
        raise ZeroDivisionError
    assert not (tmp_path / "delta").exists()
    with DeltaWriter(tmp_path / "delta") as writer, pytest.raises(ValueError, match="twice"):
        writer.same("w", torch.zeros(3))
        writer.same("w", torch.zeros(3))
    assert num_bytes(tmp_path / "delta") > 0
