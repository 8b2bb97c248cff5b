"""What the engine knows, for processes that never load it: asked from the service, kept as a file."""

from __future__ import annotations

import json
import threading
from typing import Any

from engine.client import Engine
from engine.core.control import write_json
from jobs.places import catalogue_file, engine_socket

_lock = threading.Lock()
_kept: tuple[tuple[int, int], dict[str, Any]] | None = None


def engine(timeout: float = 120.0) -> Engine:
    """The way to the engine: the resident service, or a fresh process where none listens."""
    return Engine(engine_socket(), timeout=timeout)


def catalogue() -> dict[str, Any]:
    """Methods, tasks, settings, slots and starter models, as the engine describes them."""
    global _kept
    path = catalogue_file()
    with _lock:
        try:
            stat = path.stat()
        except FileNotFoundError:
            refresh()
            stat = path.stat()
        stamp = (stat.st_mtime_ns, stat.st_ino)
        if _kept is None or _kept[0] != stamp:
            _kept = stamp, json.loads(path.read_text(encoding="utf-8"))
        return _kept[1]


def refresh() -> dict[str, Any]:
    """Ask the engine anew and keep what it says."""
    answer = engine().call("catalogue")
    write_json(catalogue_file(), answer)
    return answer
