"""Control: how a supervisor asks a running child to stop, pause, cancel or save. Always obeyed at a step border.

The supervisor writes `control.json` beside the event log, whole and renamed: {"request": "stop" | "pause" | "cancel" | "save", "number": n}.
`number` grows with each request, so that one request is obeyed once. SIGTERM means "pause".
"""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any, Literal

Request = Literal["stop", "pause", "cancel", "save"]
CONTROL_NAME = "control.json"
DISK_REFUSED = 74  # exit code of a child that could not even write how it ended (EX_IOERR of sysexits.h)


def write_request(folder: Path, request: Request) -> int:
    """Leave a request for the child that works in `folder`; returns its number."""
    path = folder / CONTROL_NAME
    number = _read(path).get("number", 0) + 1
    write_json(path, {"request": request, "number": number})
    return int(number)


def clear_requests(folder: Path) -> None:
    """Forget earlier requests: a new attempt starts with none."""
    (folder / CONTROL_NAME).unlink(missing_ok=True)


class Control:
    """The child's end: `poll` at every step border costs one stat call."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CONTROL_NAME
        self._stamp: tuple[int, int] | None = None
        self._number = 0
        self._signalled = False

    def listen_for_sigterm(self) -> None:
        """Treat SIGTERM as a request to pause; only possible in the main thread."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_signalled", True))

    def poll(self) -> Request | None:
        """The newest request not yet obeyed, or None."""
        if self._signalled:
            self._signalled = False
            return "pause"
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return None
        if self._stamp == (stat.st_mtime_ns, stat.st_ino):
            return None
        self._stamp = (stat.st_mtime_ns, stat.st_ino)
        body = _read(self.path)
        if body.get("number", 0) <= self._number or body.get("request") not in {"stop", "pause", "cancel", "save"}:
            return None
        self._number = body["number"]
        request: Request = body["request"]
        return request


def write_json(path: Path, body: Any) -> None:
    """Write JSON beside `path`, sync it, and rename it into place: readers see the old file or the new one, never half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            json.dump(body, file, allow_nan=False, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _read(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return body if isinstance(body, dict) else {}
