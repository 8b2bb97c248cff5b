"""Tensors on disk: a lazy safetensors reader and writer, and a hash for every tensor, because safetensors alone loads flipped bits silently."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.core.errors import EngineError, Fault
from engine.io.headers import ITEM_BYTES, TensorInfo, UnreadableHeader, read_header

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DamagedFile(EngineError):
    """A file whose bytes are not those that were written; its text is a sentence."""

    def __init__(self, sentence: str) -> None:
        super().__init__(Fault(where="file", what=sentence, why="", way_out="", code="damaged_file"), "environment")


def tensor_hash(tensor: Tensor) -> str:
    """BLAKE2b-128 over type, shape and raw bytes."""
    return _hash(_NAMES[tensor.dtype], tuple(tensor.shape), _raw(tensor))


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write a safetensors file beside `path`, sync it and rename it into place; returns the hash of every tensor."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorWriter(path, layout, metadata) as out:
        for name in out.order:
            out.put(name, tensors[name])
    return out.hashes


def load_tensors(path: Path, hashes: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Read a whole safetensors file into memory of its own; with `hashes`, every tensor must be exactly what was written."""
    with TensorReader(path) as reader:
        found = dict(reader.items())
    if hashes is not None:
        wrong = sorted(set(hashes) ^ set(found)) or sorted(
            name for name, tensor in found.items() if tensor_hash(tensor) != hashes[name]
        )
        if wrong:
            raise DamagedFile(
                f"{path.name} was changed after it was written: the tensor {wrong[0]} is not what it was"
                + (f", nor are {len(wrong) - 1} more." if len(wrong) > 1 else ".")
            )
    return found


class TensorReader:
    """Tensors of one file, or of a sharded model folder's file, read one at a time."""

    def __init__(self, path: Path) -> None:
        try:
            self.header: dict[str, TensorInfo] = read_header(path)
            self._file: Any = safe_open(str(path), framework="pt", device="cpu").__enter__()
        except FileNotFoundError as error:
            raise DamagedFile(f"{path.name} is missing.") from error
        except (UnreadableHeader, SafetensorError, OSError) as error:
            sentence = (
                str(error)
                if isinstance(error, UnreadableHeader)
                else f"{path.name} could not be read as a safetensors file."
            )
            raise DamagedFile(sentence) from error
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __len__(self) -> int:
        return len(self.header)

    def __contains__(self, name: object) -> bool:
        return name in self.header

    def __iter__(self) -> Iterator[str]:
        return iter(self.header)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor.clone()  # the mapped file may be replaced while the tensor lives

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A slice along the first dimension, without reading the rest."""
        tensor: Tensor = self._file.get_slice(name)[start:stop]
        return tensor.clone()

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.header:
            yield name, self[name]

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in `order`, so that a whole model never needs to be in memory.

    `layout` maps names to (dtype, shape). The file appears under its name only when every tensor was put and synced.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.hashes: dict[str, str] = {}
        self._beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._layout = {name: (_NAMES[dtype], shape) for name, (dtype, shape) in layout.items()}
        # Wide types first, as the official writer does: every tensor then starts aligned to its own width.
        self.order = sorted(self._layout, key=lambda name: (-ITEM_BYTES[self._layout[name][0]], name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name in self.order:
            dtype, shape = self._layout[name]
            end = offset + ITEM_BYTES[dtype] * torch.Size(shape).numel()
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._file: BinaryIO = self._beside.open("wb")
        self._file.write(len(raw).to_bytes(8, "little") + raw)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of `order`."""
        expected = self.order[len(self.hashes)] if len(self.hashes) < len(self.order) else None
        if name != expected or (_NAMES[tensor.dtype], tuple(tensor.shape)) != self._layout[name]:
            raise ValueError(
                f"The writer expects {expected} with {self._layout.get(expected or '')} and was given {name} "
                f"with {tensor.dtype}, {tuple(tensor.shape)}."
            )
        raw = _raw(tensor)
        self.hashes[name] = _hash(*self._layout[name], raw)
        self._file.write(raw)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None and len(self.hashes) == len(self.order):
            self._beside.replace(self.path)
            return
        self._beside.unlink(missing_ok=True)
        if kind is None:
            raise ValueError(f"{len(self.order) - len(self.hashes)} tensors of {self.path.name} were never written.")


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _hash(dtype: str, shape: tuple[int, ...], raw: memoryview) -> str:
    digest = hashlib.blake2b(f"{dtype}{list(shape)}".encode(), digest_size=16)
    digest.update(raw)
    return digest.hexdigest()
