"""Tensors on disk: what is read is what was written, or a sentence says that it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.io.tensors import DamagedFile, TensorReader, TensorWriter, load_tensors, save_tensors, tensor_hash


def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "wide": torch.randn(3, 4, generator=generator, dtype=torch.float64),
        "half": torch.randn(5, 3, generator=generator).to(torch.bfloat16).t(),  # not contiguous
        "number": torch.tensor(2.5),
        "nothing": torch.zeros(0, 7, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(11, dtype=torch.uint8),
    }


def test_what_is_read_is_what_was_written_and_the_official_loader_agrees(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", sample()
    hashes = save_tensors(path, tensors, {"format": "pt"})
    assert hashes == {name: tensor_hash(tensor) for name, tensor in tensors.items()}
    ours, official = load_tensors(path, hashes), load_file(path)
    assert ours.keys() == official.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == official[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor) and torch.equal(official[name], tensor)
    assert [item.name for item in tmp_path.iterdir()] == ["x.safetensors"]


def test_files_of_the_official_writer_are_read(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in sample().items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"made": "elsewhere"})
    with TensorReader(tmp_path / "x.safetensors") as reader:
        assert reader.metadata == {"made": "elsewhere"} and len(reader) == len(tensors)
        assert torch.equal(reader.rows("wide", 1, 3), tensors["wide"][1:3])


@pytest.mark.parametrize("place", [-1, -30, 40])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, place: int) -> None:
    path = tmp_path / "x.safetensors"
    hashes = save_tensors(path, sample())
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DamagedFile, match=r"\.$"):
        load_tensors(path, hashes)


def test_a_short_or_missing_file_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    hashes = save_tensors(path, sample())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DamagedFile, match="cut short"):
        load_tensors(path, hashes)
    path.unlink()
    with pytest.raises(DamagedFile, match="is missing"):
        load_tensors(path, hashes)


def test_a_tensor_more_or_less_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    hashes = save_tensors(path, {"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(DamagedFile, match="tensor b"):
        load_tensors(path, {"a": hashes["a"]})
    with pytest.raises(DamagedFile, match="tensor c"):
        load_tensors(path, {**hashes, "c": hashes["a"]})


def test_the_writer_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    layout = {"a": (torch.float32, (2,)), "b": (torch.float32, (3,))}
    with pytest.raises(ValueError, match="never written"), TensorWriter(path, layout) as out:
        out.put("a", torch.zeros(2))
    with pytest.raises(ValueError, match="expects a"), TensorWriter(path, layout) as out:
        out.put("b", torch.zeros(3))
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["x.safetensors"]
