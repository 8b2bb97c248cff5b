"""Single-use processes: each has imported everything and opened no GPU; it takes one order, works it off and ends.

A CUDA context does not survive a fork, so on a machine with a GPU these take the place of forks. An order is a request (a file) and the place where the
output goes (a log, or the connection of whoever asked), both handed over as open files on a socket that is the process's standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.answers import answer, encode
from engine.core.control import DISK_REFUSED
from engine.warm import warm_up

SUCCESSOR_SECONDS = 5.0  # a new spare imports for seconds; the job that took the last one starts undisturbed
COMMAND = (sys.executable, "-m", "engine", "spare")


class Spares:
    """Keeps one process in waiting."""

    def __init__(self) -> None:
        self._waiting: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._due: float | None = None

    @property
    def pid(self) -> int | None:
        """The process that waits for an order, if there is one."""
        return self._waiting.pid if self._waiting is not None else None

    def prepare(self) -> None:
        """Start a process that imports everything and waits."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._waiting = subprocess.Popen(COMMAND, stdin=theirs.fileno(), start_new_session=True)
        self._line, self._due = ours, None

    def refill(self) -> None:
        """Start the successor of a process that was used up a while ago, or that has died."""
        if self._waiting is not None and self._waiting.poll() is not None:
            self.close()
            self._due = time.monotonic() + SUCCESSOR_SECONDS
        if self._due is not None and time.monotonic() >= self._due:
            self.prepare()

    def order(self, request: dict[str, Any], output: int) -> subprocess.Popen[bytes]:
        """Give an order to the waiting process, or to one that is started now; returns that process."""
        for _ in range(2):
            if self._waiting is None or self._waiting.poll() is not None:
                self.close()
                self.prepare()
            assert self._waiting is not None and self._line is not None
            with tempfile.TemporaryFile() as file, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                file.write(encode(request))
                file.seek(0)
                socket.send_fds(self._line, [b"\n"], [file.fileno(), output])
                taken = self._waiting
                self.close()
                self._due = time.monotonic() + SUCCESSOR_SECONDS
                return taken
        raise ChildProcessError("A new process ends before it can take an order.")

    def close(self) -> None:
        """Let the waiting process end: it sees that nobody is there any more."""
        if self._line is not None:
            self._line.close()
        self._line, self._waiting, self._due = None, None, None


def wait_for_order() -> int:
    """The process itself: import, wait, work, end. Returns its exit code."""
    warm_up()
    with socket.socket(fileno=os.dup(0)) as line:
        message, handles, _, _ = socket.recv_fds(line, 1, 2)
    if not message:
        return 0
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with os.fdopen(handles[0], "rb") as file:
        request = json.load(file)
    if request["call"] == "launch":
        os.dup2(handles[1], 1)
        os.dup2(handles[1], 2)
        return work_off(Path(request["folder"]), request)
    from engine.train.run import set_threads

    set_threads()
    with os.fdopen(handles[1], "wb") as link:
        link.write(encode(answer(request)))
    return 0


def work_off(folder: Path, request: dict[str, Any]) -> int:
    """Run the job of a launch request in this process; returns its exit code."""
    from engine.ops.folder import exit_code, run_folder
    from engine.train.run import set_threads

    if request.get("gpu") is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(request["gpu"])
    os.environ["BONSAI_ENGINE_SOCKET"] = str(request["socket"])
    set_threads()
    code = exit_code(folder, run_folder(folder))
    return code if code == DISK_REFUSED else 0
