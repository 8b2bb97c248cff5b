"""Encoded data kept for the next launch, in files that are mapped and not read: <home>/cache/tokens/<data>-<key>/.

The key is a hash of everything that decides the result: the data and its columns, the tokenizer's files, the chat format, the task, its settings, and the
code that encodes. An entry is written beside, synced and renamed, so it is there whole or not at all; a damaged one is thrown away and made again.
Entries that were not used for the longest time go first when the cache has grown beyond BONSAI_TOKEN_CACHE_BYTES.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray

from engine.core.facts import Facts
from engine.core.recipe import Recipe
from engine.io.datasets import file_sha256
from engine.io.models import model_folder
from engine.tasks.base import Encoded, Example, Row, Task
from engine.tasks.examples import Examples, Picked, Places, Ragged, fields_of

LIMIT_BYTES = 5_000_000_000
_MANIFEST = "manifest.json"
_ROWS = "rows.jsonl"
_ABANDONED_SECONDS = 3600  # after this time nobody is still writing an entry
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"}
_CODE = Path(__file__).parent.parent


def encoded_data(task: Task, tokenizer: Any, recipe: Recipe, facts: Facts, say: Callable[[str], None]) -> Encoded:
    """The encoded data of a recipe: from the cache, or made and kept there. Without BONSAI_HOME nothing is kept. `say` hears what went wrong."""
    cache = TokenCache.of_environment()
    if cache is None:
        return task.encode(list(task.rows(facts.data)), tokenizer, recipe, facts.data)
    name = entry_name(task, tokenizer, recipe, facts)
    found = cache.load(name, task.example_type, say)
    if found is None:
        encoded = task.encode(list(task.rows(facts.data)), tokenizer, recipe, facts.data)
        kept = file_sha256(Path(facts.data.path)) == facts.data.sha256 and cache.store(name, encoded, say)
        # The mapped files are the same numbers, and the rows need not stay in memory.
        found = (cache.load(name, task.example_type, say) if kept else None) or encoded
    return found


def entry_name(task: Task, tokenizer: Any, recipe: Recipe, facts: Facts) -> str:
    """The name of an entry: first the data, so that everything made of a data set can be found, then everything else."""
    kind = type(task)
    key = {
        "code": code_digest(),
        "task": f"{kind.__module__}.{kind.__qualname__}",
        "data": [facts.data.sha256, facts.data.format, sorted(facts.data.mapping.items()), facts.data.labels],
        "tokenizer": tokenizer_digest(model_folder(facts.model)),
        "template": tokenizer.chat_template,
        "settings": {name: getattr(recipe.settings, name) for name in task.encoding_settings},
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{facts.data.sha256[:24]}-{digest[:40]}"


@functools.cache
def code_digest() -> str:
    """A hash of the code that reads rows and encodes them, so that no other version's entries are ever taken."""
    digest = hashlib.sha256(f"{tokenizers.__version__} {transformers.__version__}".encode())
    for path in sorted([*(_CODE / "tasks").glob("*.py"), *(_CODE / "io").glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """A hash of every file in a model's folder that is no weight: whatever a tokenizer may read is among them."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHTS:
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


class TokenCache:
    """The folder of all entries; any number of processes share it."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    @classmethod
    def of_environment(cls) -> TokenCache | None:
        """The cache of the installation that started this process; None where there is none, or it was switched off with a limit of 0."""
        home, limit = os.environ.get("BONSAI_HOME"), int(os.environ.get("BONSAI_TOKEN_CACHE_BYTES") or LIMIT_BYTES)
        return cls(Path(home) / "cache" / "tokens", limit) if home and limit > 0 else None

    def load(self, name: str, kind: type[Example], say: Callable[[str], None]) -> Encoded | None:
        """The entry, mapped; None when there is none. A damaged one is removed, and `say` is told."""
        entry = self.folder / name
        try:
            body = _manifest(entry)
            encoded = _mapped(entry, body, kind)
            with contextlib.suppress(OSError):
                os.utime(entry / _MANIFEST)  # used now
            return encoded
        except FileNotFoundError:
            if not entry.exists():
                return None
            problem = "a file is missing"
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = str(error)
        say(f"The kept tokens of these data were damaged ({problem}), so they were made again.")
        self._remove(entry)
        return None

    def store(self, name: str, encoded: Encoded, say: Callable[[str], None]) -> bool:
        """Keep an entry, unless it is larger than the whole cache may be; returns whether it is there now."""
        sides = (encoded.train, encoded.holdout)
        if not all(isinstance(side, Examples) for side in sides) or not isinstance(encoded.holdout_rows, Picked):
            return False  # a task of its own kind
        beside = self.folder / f".{uuid.uuid4().hex}.tmp"
        try:
            beside.mkdir(parents=True, mode=0o700)
            size = _write(beside, encoded, self.limit_bytes)
            if size <= self.limit_bytes:
                self._make_room(size)
                with contextlib.suppress(OSError):  # another run was faster: its entry is the same
                    beside.rename(self.folder / name)
                _sync(self.folder)
        except (OSError, TypeError) as error:  # a full disk, or rows of a kind that is no JSON
            say(
                f"The tokens of these data could not be kept for the next run: {getattr(error, 'strerror', None) or error}."
            )
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return (self.folder / name).exists()

    def _make_room(self, size: int) -> None:
        """Remove entries that nobody used for the longest time, and what a killed process left."""
        entries: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                if not path.name.startswith("."):
                    used = (path / _MANIFEST).stat().st_mtime
                    entries.append((used, sum(file.stat().st_size for file in path.iterdir()), path))
                elif time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
        total = size + sum(bytes_ for _, bytes_, _ in entries)
        for _, bytes_, path in sorted(entries):
            if total <= self.limit_bytes:
                return
            self._remove(path)
            total -= bytes_

    def _remove(self, entry: Path) -> None:
        """Take an entry out of sight at once, then delete it; who has mapped it keeps what he has."""
        gone = self.folder / f".{uuid.uuid4().hex}.tmp"
        with contextlib.suppress(OSError):
            entry.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


class KeptRows(Sequence[Row]):
    """Rows of data in a mapped file of JSON lines; each is read when it is asked for."""

    def __init__(self, text: NDArray[np.uint8], starts: Places) -> None:
        self._text, self._starts = text, starts  # [bytes], [rows + 1]

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        at = range(len(self))[place]  # an IndexError beyond the end, and negative places
        return json.loads(self._text[self._starts[at] : self._starts[at + 1]].tobytes())


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _write(folder: Path, encoded: Encoded, most: int) -> int:
    """Write the files of an entry and its manifest last; returns their bytes. Writes nothing when they are more than `most`."""
    assert isinstance(encoded.train, Examples) and isinstance(encoded.holdout, Examples)
    assert isinstance(encoded.holdout_rows, Picked)
    train, holdout = encoded.train.gathered(), encoded.holdout.gathered()
    arrays: dict[str, NDArray[Any]] = {
        "sources": np.concatenate([train[1], holdout[1]]),
        "held": encoded.holdout_rows.places,
    }
    same: dict[str, str] = {}  # field -> an earlier one with the same numbers
    first: dict[int, str] = {}
    for name, column in train[0].items():
        same[name] = first.setdefault(id(column), name)
        if same[name] == name:
            whole = Ragged.joined([column, holdout[0][name]])
            arrays[f"{name}.flat"], arrays[f"{name}.starts"] = whole.flat, whole.starts
    lines = [json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in encoded.rows]
    arrays["rows.starts"] = np.concatenate([[0], np.cumsum([len(line) for line in lines], dtype=np.int64)]).astype(np.int64)  # fmt: skip
    size = int(arrays["rows.starts"][-1]) + sum(array.nbytes for array in arrays.values())
    if size > most:
        return size
    files = {_ROWS: _written(folder / _ROWS, b"".join(lines))}
    for name, array in arrays.items():
        files[f"{name}.bin"] = _written(folder / f"{name}.bin", np.ascontiguousarray(array).data.cast("B") if array.size else b"")  # fmt: skip
    body = {
        "num_train": len(encoded.train),
        "num_train_tokens": encoded.num_train_tokens,
        "notes": encoded.notes,
        "same": same,
        "types": {name: array.dtype.str for name, array in arrays.items()},
        "files": files,
    }
    _written(folder / _MANIFEST, json.dumps({"body": body, "sha256": _digest(body)}).encode())
    _sync(folder)
    return size


def _written(path: Path, content: bytes | memoryview) -> list[int]:
    """Write and sync a file; its size and checksum."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return [len(content), zlib.crc32(content)]


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _manifest(entry: Path) -> Any:
    read = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
    if _digest(read["body"]) != read["sha256"]:
        raise ValueError("the list of its files is not what was written")
    return read["body"]


def _mapped(entry: Path, body: Any, kind: type[Example]) -> Encoded:
    """The entry as encoded data, every file checked against its checksum (some 3 GB a second)."""
    files = dict(_checked(entry, body["files"]))
    arrays = {name: files[f"{name}.bin"].view(np.dtype(code)) for name, code in body["types"].items()}
    columns: dict[str, Ragged] = {}
    for name in fields_of(kind):
        own = body["same"][name]
        columns[name] = columns[own] if own != name else Ragged(arrays[f"{name}.flat"], arrays[f"{name}.starts"])
    sources, number = arrays["sources"], int(body["num_train"])
    places = np.arange(len(sources))
    rows = KeptRows(files[_ROWS], arrays["rows.starts"])
    return Encoded(
        train=Examples(columns, sources, kind, places[:number]),
        holdout=Examples(columns, sources, kind, places[number:]),
        holdout_rows=Picked(rows, arrays["held"]),
        rows=rows,
        notes=list(body["notes"]),
        num_train_tokens=int(body["num_train_tokens"]),
    )


def _checked(entry: Path, files: dict[str, list[int]]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for name, (size, checksum) in files.items():
        path = entry / name
        if path.stat().st_size != size:
            raise ValueError(f"{name} has another size than was written")
        content = np.memmap(path, np.uint8, "r").view(np.ndarray) if size else np.zeros(0, np.uint8)
        if zlib.crc32(content.data) != checksum:
            raise ValueError(f"{name} has another checksum than was written")
        yield name, content
