"""The resident engine process: it has imported everything and run nothing, so a fork of it is ready in a few hundredths of a second.

`ping`, `catalogue` and `launch` are answered by the process itself; every other call by a fork, so that no tensor is ever computed here and a call that
hangs can be killed. What needs a GPU goes to a single-use process instead (engine.spare). When the engine's code or the installed packages have changed,
the process replaces itself before it answers: same number, same children, and whoever asked meanwhile waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import traceback
from pathlib import Path
from typing import Any

from engine.answers import FORKED, Answer, answer, encode
from engine.core.control import write_json
from engine.core.errors import Fault
from engine.spare import Spares, work_off
from engine.warm import warm_up

MAX_REQUEST_BYTES = 4_000_000
CALL_SECONDS = 110
LONG_CALL_SECONDS = {"certify": 1800}
HANDOVER = "BONSAI_ENGINE_HANDOVER"  # what a process leaves to the one that replaces it: its socket and its children
CODE = Path(__file__).resolve().parent


def process_start(pid: int) -> int:
    """The kernel's start time of a process in clock ticks: a pid together with it names one process."""
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])


def code_stamp() -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of every file of the engine's code, and the time of the folder of installed packages."""
    found = []
    folders = [str(CODE)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != "__pycache__":
                        folders.append(entry.path)
                elif entry.name.endswith(".py"):
                    stat = entry.stat()
                    found.append((entry.path, stat.st_mtime_ns, stat.st_size))
    packages = sysconfig.get_path("purelib")
    return (*sorted(found), (packages, os.stat(packages).st_mtime_ns, 0))


class Service:
    """Accepts connections on a Unix socket; one request and one answer each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on_gpu = self._has_gpu()
        self.spares = Spares()
        self.children: dict[int, Path | None] = {}  # pid -> job folder, or None for a call
        self.deadlines: dict[int, float] = {}
        self.spawned: dict[int, subprocess.Popen[bytes]] = {}
        self.stamp = code_stamp()
        self.listener = self._inherited() or self._bound()
        self.listener.setblocking(False)
        self.running = True

    def _bound(self) -> socket.socket:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            listener.bind(str(self.path))
        finally:
            os.umask(previous)
        listener.listen(64)
        return listener

    def _inherited(self) -> socket.socket | None:
        left = os.environ.pop(HANDOVER, "")
        if not left:
            return None
        body = json.loads(left)
        self.children = {int(pid): Path(folder) if folder else None for pid, folder in body["children"].items()}
        self.deadlines = {int(pid): float(end) for pid, end in body["deadlines"].items()}
        return socket.socket(fileno=int(body["listener"]))

    def serve(self) -> None:
        """Serve until SIGTERM or SIGINT; running jobs are not touched."""
        warm_up()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "running", False))
        if self.on_gpu:
            self.spares.prepare()
        selector = selectors.DefaultSelector()
        selector.register(self.listener, selectors.EVENT_READ)
        while self.running:
            for _ in selector.select(timeout=0.2):
                if code_stamp() != self.stamp:
                    self._replace()
                with contextlib.suppress(OSError):
                    link, _address = self.listener.accept()
                    self._handle(link)
            self._reap()
            self.spares.refill()
        self.spares.close()
        self.path.unlink(missing_ok=True)

    def _replace(self) -> None:
        """Become a process with the new code. The socket stays open, so no request is lost, and children stay children."""
        self.spares.close()
        children = {pid: str(folder) if folder else "" for pid, folder in self.children.items()}
        body = {"listener": self.listener.fileno(), "children": children, "deadlines": self.deadlines}
        os.set_inheritable(self.listener.fileno(), True)
        os.environ[HANDOVER] = json.dumps(body)
        os.execv(sys.executable, [sys.executable, "-m", "engine", "serve", "--socket", str(self.path)])

    def _handle(self, link: socket.socket) -> None:
        with link:
            link.settimeout(5.0)
            request = self._read(link)
            if request is None:
                return
            name = request.get("call") if isinstance(request, dict) else None
            if name == "launch":
                link.sendall(encode(self._launch(request)))
            elif name in FORKED:
                self._delegate(link, request)
            elif name == "ping":
                link.sendall(encode({**answer(request), "spare": self.spares.pid}))
            else:
                link.sendall(encode(answer(request)))

    def _read(self, link: socket.socket) -> Any:
        raw = b""
        with contextlib.suppress(OSError):
            while not raw.endswith(b"\n") and len(raw) <= MAX_REQUEST_BYTES:
                piece = link.recv(1 << 16)
                if not piece:
                    return None
                raw += piece
        try:
            return json.loads(raw)
        except ValueError:
            return None

    def _delegate(self, link: socket.socket, request: Answer) -> None:
        deadline = time.monotonic() + LONG_CALL_SECONDS.get(str(request.get("call")), CALL_SECONDS)
        if self.on_gpu:
            process = self.spares.order(request, link.fileno())
            self.spawned[process.pid] = process
            self.deadlines[process.pid] = deadline
            return
        pid = os.fork()
        if pid == 0:
            self._become_child()
            try:
                link.settimeout(CALL_SECONDS)
                link.sendall(encode(answer(request)))
            finally:
                os._exit(0)
        self.children[pid] = None
        self.deadlines[pid] = deadline

    def _launch(self, request: Answer) -> Answer:
        """Start the job of a folder, on the GPU that the request names or on the processor."""
        folder = Path(str(request.get("folder")))
        if not (folder / "recipe.json").exists():
            return {
                "ok": False,
                "reason": "bad_input",
                "faults": [
                    Fault(
                        where="folder",
                        what="There is no recipe in this job's folder.",
                        why="It was removed, or never written.",
                        way_out="Start the run again.",
                        code="no_recipe",
                    ).to_dict()
                ],
            }
        order = {**request, "socket": str(self.path)}
        with (folder / "child.log").open("ab") as output:
            if self.on_gpu or request.get("gpu") is not None:
                process = self.spares.order(order, output.fileno())
                self.spawned[process.pid] = process
                pid = process.pid
            else:
                pid = self._fork_job(folder, order, output.fileno())
        self.children[pid] = folder
        return {"ok": True, "pid": pid, "started": process_start(pid)}

    def _fork_job(self, folder: Path, order: Answer, output: int) -> int:
        pid = os.fork()
        if pid != 0:
            return pid
        code = 1
        try:
            os.setsid()
            self._become_child()
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = work_off(folder, order)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _become_child(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        self.listener.close()
        self.spares.close()

    def _reap(self) -> None:
        now = time.monotonic()
        for pid, deadline in list(self.deadlines.items()):
            if now > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.deadlines.pop(pid, None)
            self.spawned.pop(pid, None)
            folder = self.children.pop(pid, None)
            if folder is not None and folder.exists():
                code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(OSError):  # a full disk must not take the service along
                    write_json(folder / "exit.json", {"pid": pid, "code": max(code, 0), "signal": -min(code, 0)})

    @staticmethod
    def _has_gpu() -> bool:
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # ask the driver without opening a CUDA context
        import torch

        return torch.cuda.is_available()


def serve(path: Path) -> None:
    """Run the service on a Unix socket."""
    Service(path).serve()
