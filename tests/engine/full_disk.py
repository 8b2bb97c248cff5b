"""A disk that fills up at a chosen moment: the k-th write, sync, rename, new file or new folder below a folder fails, as the kernel would have it."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest


class FullDisk:
    """Counts the calls that need the disk below `folder`; from the `at`-th on (or only that one) they fail. Removing always works.

    A write that fails takes half of its bytes first, for that is what a full disk does. safetensors are written through Python's files here,
    so every write of the engine is seen. Use inside a monkeypatch context.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        folder: Path,
        *,
        at: int = 0,
        once: bool = False,
        only: str = "",
        number: int = errno.ENOSPC,
    ) -> None:
        self.folder, self.at, self.once, self.only, self.number = str(folder.resolve()), at, once, only, number
        self.calls: list[str] = []
        self._open, self._fsync = io.open, os.fsync
        patch.setattr(io, "open", self.open)
        patch.setattr(os, "fsync", self.fsync)
        for name in ("rename", "replace", "mkdir", "link"):
            patch.setattr(os, name, self._guarded(name, getattr(os, name)))

    @property
    def failed(self) -> bool:
        """Whether a call was refused."""
        return 0 < self.at <= len(self.calls)

    def open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: Any = None,
        errors: Any = None,
        newline: Any = None,
        **more: Any,
    ) -> Any:
        """As io.open; what writes below the folder writes through a raw file that can be full."""
        if not set("wxa+") & set(mode) or isinstance(file, int) or not self._ours(file):
            return self._open(file, mode, buffering, encoding, errors, newline, **more)
        self._refuse("open", file)
        raw = _Raw(self, os.fspath(file), mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

    def fsync(self, handle: int) -> None:
        """As os.fsync."""
        name = os.readlink(f"/proc/self/fd/{handle}")
        if self._ours(name):
            self._refuse("fsync", name)
        self._fsync(handle)

    def _guarded(self, name: str, call: Any) -> Any:
        def guarded(path: Any, *arguments: Any, **more: Any) -> Any:
            if self._ours(path):
                self._refuse(name, path)
            return call(path, *arguments, **more)

        return guarded

    def _ours(self, path: Any) -> bool:
        place = os.path.abspath(os.fspath(path))
        return place.startswith(self.folder) and self.only in place

    def _refuse(self, call: str, path: Any) -> None:
        if self.full(call, path):
            raise OSError(self.number, os.strerror(self.number))

    def full(self, call: str, path: Any) -> bool:
        """Count a call, and say whether it fails."""
        self.calls.append(f"{call} {Path(os.fspath(path)).name}")
        return self.at > 0 and (len(self.calls) == self.at if self.once else len(self.calls) >= self.at)


class _Raw(io.FileIO):
    def __init__(self, disk: FullDisk, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self._disk, self._path, self._taken = disk, path, False

    def write(self, data: Any, /) -> int:
        if not self._disk.full("write", self._path):
            return super().write(data) or 0
        half = memoryview(data)[: len(data) // 2]
        if len(half):
            super().write(half)
        raise OSError(self._disk.number, os.strerror(self._disk.number))
