"""What fine-tuning changed, as a small folder: which numbers of which tensors, and by how much. Encoding and decoding are exact.

delta/
    delta.safetensors   stored values, positions as gaps, factors of rows; every tensor by "<name>|<what>"
    delta.json          how each tensor is put together, the hash of its base, the hash of every stored tensor

Positions are written as gaps of 8 or 16 bits, whichever is smaller: a gap of the largest value says "go on counting". Or they are not written at
all: a mask that was drawn from a seed is drawn again, and checked against its digest.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from engine.core.control import write_json
from engine.core.errors import bad_input
from engine.core.recipe import canonical
from engine.io.tensors import DTYPES, DamagedFile, TensorReader, TensorWriter, tensor_hash
from engine.parts.merging import kept_mask

if TYPE_CHECKING:
    from engine.ops.transform import ModelFolder, OutFolder

FOLDER, WEIGHTS, RECORD, VERSION = "delta", "delta.safetensors", "delta.json", 1
Kind = Literal["weight", "delta"]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A mask that can be drawn again: `engine.parts.merging.kept_mask(seed, name, size, drop)`."""

    seed: int
    name: str
    drop: float

    def index(self, size: int) -> Tensor:
        """Kept positions, ascending: [k]."""
        return kept_mask(self.seed, self.name, size, self.drop).nonzero().squeeze(1)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What became of one tensor: at flat positions `index` (None: everywhere) new `values`, elsewhere the base.

    kind "weight": `values` are the fine-tuned weights, kind "delta": their differences from the base.
    The new weight is base + scale * difference; `scale` is one number, or one for each row (first dimension).
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: Kind
    values: Tensor  # [k], or [d] without an index
    index: Tensor | None = None  # int64 [k]
    scale: float | Tensor = 1.0

    def rebuild(self, base: Tensor | None) -> Tensor:
        """The tensor of the changed model. Computed in fp64 and rounded once; a weight with scale 1 comes back bit for bit."""
        size = torch.Size(self.shape).numel()
        start = torch.zeros(size, dtype=torch.float64) if base is None else base.double().reshape(-1).clone()
        places = torch.arange(size) if self.index is None else self.index
        old, values = start[places], self.values.double()
        scale = self._scale_at(places)
        new = old + scale * (values - old if self.kind == "weight" else values)
        if self.kind == "weight":
            new = torch.where(scale == 1, values, new)
        start[places] = new
        return start.reshape(self.shape).to(self.dtype)

    def difference(self, base: Tensor | None) -> Tensor:
        """scale * (new - base) as a dense fp32 vector: [d]."""
        size = torch.Size(self.shape).numel()
        places = torch.arange(size) if self.index is None else self.index
        values = self.values.double()
        if self.kind == "weight" and base is not None:
            values = values - base.double().reshape(-1)[places]
        out = torch.zeros(size)
        out[places] = (self._scale_at(places) * values).float()
        return out

    def _scale_at(self, places: Tensor) -> Tensor:
        if not isinstance(self.scale, Tensor):
            return torch.full(places.shape, float(self.scale), dtype=torch.float64)
        per_row = max(1, torch.Size(self.shape).numel() // max(1, self.shape[0] if self.shape else 1))
        return self.scale.double()[places // per_row]


# ── positions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def encode_gaps(index: Tensor) -> Tensor:
    """Ascending positions [k] as gaps: uint8 or int16 (read as 16 bits without sign), whichever takes fewer bytes."""
    places = index.numpy().astype(np.int64)
    gaps = np.diff(places, prepend=-1) - 1  # numbers that are passed over
    if (gaps < 0).any():
        raise ValueError("Positions must ascend and not repeat.")
    packed = {dtype: _pack(gaps, dtype) for dtype in (np.uint8, np.uint16)}
    best = min(packed.values(), key=lambda one: one.nbytes)
    return torch.from_numpy(best if best.dtype == np.uint8 else best.view(np.int16))


def decode_gaps(code: Tensor) -> Tensor:
    """The inverse of `encode_gaps`: [k]."""
    raw = code.numpy()
    raw = raw if raw.dtype == np.uint8 else raw.view(np.uint16)
    ends = raw < np.iinfo(raw.dtype).max
    passed = np.cumsum(raw.astype(np.int64))[ends]
    return torch.from_numpy(passed + np.arange(len(passed)))


def _pack(gaps: np.ndarray, dtype: Any) -> np.ndarray:
    more = np.iinfo(dtype).max  # "go on counting"
    words = gaps // more + 1
    out = np.full(int(words.sum()), more, dtype=dtype)
    out[np.cumsum(words) - 1] = (gaps % more).astype(dtype)
    return out


def _digest(index: Tensor) -> str:
    return hashlib.blake2b(index.numpy().astype("<i8").tobytes(), digest_size=16).hexdigest()


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class DeltaWriter:
    """Takes changes tensor by tensor, in any order; the folder is complete when the `with` block ends without an error.

    Sizes are known only when a change comes, so the bytes wait in a file without a name until all are there.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any] | None = None) -> None:
        self.folder, self.about = folder, dict(about or {})
        self.entries: dict[str, dict[str, Any]] = {}
        self._stored: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}  # type, shape, place in the waiting file
        self._waiting: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 closed in __exit__

    def put(self, name: str, change: Change, *, base: Tensor | None, drawn: Drawn | None = None) -> None:
        """Add the change of a tensor; `drawn` says that its positions need not be stored."""
        entry = self._entry(name, change.dtype, change.shape, base)
        entry.update(form="whole" if change.index is None else "sparse", kind=change.kind)
        self._store(f"{name}|values", change.values)
        if change.index is not None:
            if change.index.shape != change.values.shape:
                raise ValueError(f"{name} has {len(change.index)} positions for {len(change.values)} values.")
            if drawn is not None:
                entry.update(drawn=asdict(drawn), digest=_digest(change.index))
            else:
                self._store(f"{name}|gaps", encode_gaps(change.index))
        if isinstance(change.scale, Tensor):
            self._store(f"{name}|scale", change.scale)
        else:
            entry["scale"] = float(change.scale)

    def same(self, name: str, base: Tensor) -> None:
        """A tensor that did not change."""
        self._entry(name, base.dtype, tuple(base.shape), base)["form"] = "same"

    def twin(self, name: str, other: str) -> None:
        """A tensor that is stored twice in the model: it equals `other`."""
        first = self.entries[other]
        self.entries[name] = {"form": "twin", "of": other, "dtype": first["dtype"], "shape": first["shape"]}

    def _entry(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], base: Tensor | None) -> dict[str, Any]:
        if name in self.entries:
            raise ValueError(f"{name} was given twice.")
        self.entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "base": None if base is None else tensor_hash(base),
        }
        return self.entries[name]

    def _store(self, key: str, tensor: Tensor) -> None:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._stored[key] = (flat.dtype, tuple(flat.shape), self._waiting.tell())
        self._waiting.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> DeltaWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._waiting:
            if kind is not None:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            layout = {key: (dtype, shape) for key, (dtype, shape, _) in self._stored.items()}
            with TensorWriter(self.folder / WEIGHTS, layout, {"format": "bonsai-delta"}) as writer:
                for key in writer.order:
                    writer.put(key, self._read(key))
        bases = {name: entry.get("base") for name, entry in self.entries.items()}
        body = {
            "version": VERSION,
            "about": self.about,
            "base": hashlib.sha256(canonical(bases).encode()).hexdigest(),
            "tensors": self.entries,
            "stored": writer.hashes,
        }
        write_json(self.folder / RECORD, body)

    def _read(self, key: str) -> Tensor:
        dtype, shape, place = self._stored[key]
        self._waiting.seek(place)
        raw = bytearray(self._waiting.read(torch.Size(shape).numel() * dtype.itemsize))
        return torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class DeltaReader:
    """A delta folder, read tensor by tensor; what was changed on disk, or does not fit the base, is refused."""

    def __init__(self, folder: Path) -> None:
        try:
            body = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            self.about, self.entries, self._hashes = dict(body["about"]), dict(body["tensors"]), dict(body["stored"])
            self.base = str(body["base"])
            version = body["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedFile(f"{folder.name} holds no complete delta.") from error
        if version != VERSION:
            raise DamagedFile(f"{folder.name} was written in form {version}; this program reads form {VERSION}.")
        self._file = TensorReader(folder / WEIGHTS)

    def __enter__(self) -> DeltaReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of every tensor of the changed model."""
        return {name: (DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in self.entries.items()}

    def change(self, name: str) -> Change | None:
        """The change of a tensor; None when it did not change."""
        entry = self.entries[name]
        if entry["form"] == "twin":
            return self.change(entry["of"])
        if entry["form"] == "same":
            return None
        dtype, shape = self.layout[name]
        index = None
        if entry["form"] == "sparse":
            index = self._drawn(name, entry) if "drawn" in entry else decode_gaps(self._stored(f"{name}|gaps"))
        values = self._stored(f"{name}|values")
        if index is not None and (
            len(index) != len(values) or (len(index) and int(index[-1]) >= torch.Size(shape).numel())
        ):
            raise DamagedFile(f"The positions of {name} do not fit its values.")
        scale = float(entry["scale"]) if "scale" in entry else self._stored(f"{name}|scale")
        return Change(dtype=dtype, shape=shape, kind=entry["kind"], values=values, index=index, scale=scale)

    def rebuild(self, name: str, base: Tensor | None) -> Tensor:
        """The tensor of the changed model; `base` must be bit for bit the one that the delta was made from."""
        entry = self.entries[name]
        if entry["form"] == "twin":
            return self.rebuild(entry["of"], base)
        expected = entry["base"]
        if expected is not None and (base is None or tensor_hash(base) != expected):
            raise bad_input(
                "model",
                f"The weight {name} of this base is {'missing' if base is None else 'another one'}.",
                "A delta holds differences, and they mean something only on the base that they were taken from.",
                "Choose the base that the delta was made with; its record names the hash of every weight.",
                "other_base",
            )
        change = self.change(name)
        if change is None:
            assert base is not None
            return base
        return change.rebuild(base)

    def _stored(self, key: str) -> Tensor:
        if key not in self._file or key not in self._hashes:
            raise DamagedFile(f"{key.partition('|')[0]} is not complete in this delta.")
        tensor = self._file[key]
        if tensor_hash(tensor) != self._hashes[key]:
            raise DamagedFile(f"{WEIGHTS} was changed after it was written: {key} is not what it was.")
        return tensor

    def _drawn(self, name: str, entry: Mapping[str, Any]) -> Tensor:
        index = Drawn(**entry["drawn"]).index(torch.Size(entry["shape"]).numel())
        if _digest(index) != entry["digest"]:
            raise DamagedFile(
                f"The random positions of {name} could not be drawn again: this version of PyTorch draws other numbers. "
                "Use the version named in the delta's record."
            )
        return index


def restore(delta: Path, base: ModelFolder, out: OutFolder, names: Mapping[str, str] | None = None) -> None:
    """Write the changed model from its base and a delta. `names`: name in the changed model -> name in the base, where they differ."""
    with DeltaReader(delta) as reader, out.weights(reader.layout) as writer:
        for name in writer.order:
            source = reader.entries[name].get("of", name)
            own = (names or reader.about.get("names", {})).get(source, source)
            writer.put(name, reader.rebuild(name, base[own] if own in base.layout else None))


def num_bytes(folder: Path) -> int:
    """Bytes of a delta on disk."""
    return sum((folder / name).stat().st_size for name in (WEIGHTS, RECORD))
