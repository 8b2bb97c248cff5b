"""The resident engine process: it has imported everything and run nothing, so a fork of it is ready in a few hundredths of a second.

`ping`, `catalogue` and `launch` are answered by the process itself; every other call by a fork, so that no tensor is ever computed here and a call that
hangs can be killed. On a machine with a GPU children are fresh processes instead, because a CUDA context does not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import __version__
from engine.core.control import write_json
from engine.core.errors import EngineError, Fault, RecipeError
from engine.core.method import TrainMethod
from engine.core.recipe import TrainSettings, parse_recipe
from engine.core.registry import catalogue
from engine.core.slots import Slot

MAX_REQUEST_BYTES = 4_000_000
CALL_SECONDS = 110
LONG_CALL_SECONDS = {"certify": 1800}
Answer = dict[str, Any]


def answer_catalogue(request: Answer) -> Answer:
    """Everything a form or a page needs to know about methods, goals and settings."""
    from engine.io.facts import starter_models
    from engine.tasks import tasks

    return {
        "version": __version__,
        "methods": [method.describe() for method in catalogue().values()],
        "tasks": [
            {
                "name": t.name,
                "title": t.title,
                "sentence": t.sentence,
                "data_shapes": list(t.data_shapes),
                "roles": list(t.roles),
                "model_kinds": list(t.model_kinds),
            }
            for t in tasks().values()
        ],
        "settings": TrainSettings.model_json_schema(),
        "slots": [
            {"name": slot.value, "title": slot.words, "arity": slot.arity.value, "law": slot.law} for slot in Slot
        ],
        "models": starter_models(),
    }


def answer_ping(request: Answer) -> Answer:
    """Who is answering."""
    return {
        "pid": os.getpid(),
        "version": __version__,
        "num_train_methods": sum(issubclass(m, TrainMethod) for m in catalogue().values()),
    }


def answer_device(request: Answer) -> Answer:
    """The device that a run would use."""
    from dataclasses import asdict

    from engine.io.facts import machine_facts

    return {"device": asdict(machine_facts())}


def answer_check(request: Answer) -> Answer:
    """What a recipe would do, or everything that is wrong with it."""
    from engine.ops.check import check

    return check(parse_recipe(request.get("recipe"))).to_dict()


def answer_model_facts(request: Answer) -> Answer:
    """What the files of a model tell, without its weights."""
    from dataclasses import asdict

    from engine.io.facts import model_facts

    facts = asdict(model_facts(str(request.get("source")), task=request.get("task")))
    return {"facts": {key: value for key, value in facts.items() if key not in {"tensors", "linears"}}}


def answer_predict(request: Answer) -> Answer:
    """Ask the result of a run, as it is or through a method that stands between."""
    from engine.ops.serve import serve
    from engine.train.export import load_predictor

    artifact = Path(str(request["artifact"]))
    inputs, options = request.get("inputs", []), request.get("options", {})
    if request.get("method"):
        return serve(
            artifact,
            inputs,
            options,
            method=request["method"],
            session=Path(str(request["session"])),
            undo=request.get("undo"),
        )
    return {"answers": load_predictor(artifact).predict(inputs, **options)}


def answer_certify(request: Answer) -> Answer:
    """Load an export again with the official loaders and compare."""
    from engine.train.certificate import certify

    return {"certificate": certify(Path(str(request["artifact"])))}


HERE: dict[str, Callable[[Answer], Answer]] = {"ping": answer_ping, "catalogue": answer_catalogue}
FORKED: dict[str, Callable[[Answer], Answer]] = {
    "check": answer_check,
    "model_facts": answer_model_facts,
    "predict": answer_predict,
    "certify": answer_certify,
    "device": answer_device,
}


def answer(request: Any) -> Answer:
    """Answer one request in this process, faults included."""
    try:
        name = str(request.get("call")) if isinstance(request, dict) else ""
        handler = HERE.get(name) or FORKED.get(name)
        if handler is None:
            raise EngineError(
                Fault(
                    where="call",
                    what=f"There is no call '{name}'.",
                    why="The engine does not know it.",
                    way_out=f"Use one of: {', '.join([*HERE, *FORKED, 'launch'])}.",
                    code="unknown_call",
                )
            )
        return {"ok": True, **handler(request)}
    except RecipeError as error:
        return {"ok": False, "reason": "bad_input", "faults": [fault.to_dict() for fault in error.faults]}
    except EngineError as error:
        return {"ok": False, "reason": error.reason, "faults": [error.fault.to_dict()]}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {
            "ok": False,
            "reason": "bug",
            "faults": [
                Fault(
                    where="engine",
                    what="The engine met a fault of its own.",
                    why=f"{type(error).__name__}: {str(error)[:300]}",
                    way_out="Try again; if it happens twice, report it.",
                    code="bug",
                ).to_dict()
            ],
        }


def encode(body: Answer) -> bytes:
    """One answer as a line of JSON."""
    return json.dumps(body, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=str).encode() + b"\n"


def process_start(pid: int) -> int:
    """The kernel's start time of a process in clock ticks: a pid together with it names one process."""
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])


class Service:
    """Accepts connections on a Unix socket; one request and one answer each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on_gpu = self._has_gpu()
        self.children: dict[int, Path | None] = {}  # pid -> job folder, or None for a call
        self.deadlines: dict[int, float] = {}
        self.spawned: dict[int, subprocess.Popen[bytes]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            self.listener.bind(str(path))
        finally:
            os.umask(previous)
        self.listener.listen(64)
        self.listener.setblocking(False)
        self.running = True

    def serve(self) -> None:
        """Serve until SIGTERM or SIGINT; running jobs are not touched."""
        warm_up()
        gc.collect()
        gc.freeze()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "running", False))
        selector = selectors.DefaultSelector()
        selector.register(self.listener, selectors.EVENT_READ)
        while self.running:
            for _ in selector.select(timeout=0.2):
                with contextlib.suppress(OSError):
                    link, _address = self.listener.accept()
                    self._handle(link)
            self._reap()
        self.path.unlink(missing_ok=True)

    def _handle(self, link: socket.socket) -> None:
        with link:
            link.settimeout(5.0)
            request = self._read(link)
            if request is None:
                return
            name = request.get("call") if isinstance(request, dict) else None
            if name == "launch":
                link.sendall(encode(self._launch(Path(str(request.get("folder"))))))
            elif name in FORKED:
                self._fork_call(link, request)
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

    def _fork_call(self, link: socket.socket, request: Answer) -> None:
        deadline = time.monotonic() + LONG_CALL_SECONDS.get(str(request.get("call")), CALL_SECONDS)
        if self.on_gpu:
            process = subprocess.Popen(
                [sys.executable, "-m", "engine", "call"], stdin=subprocess.PIPE, stdout=link.fileno()
            )
            assert process.stdin is not None
            process.stdin.write(encode(request))
            process.stdin.close()
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

    def _launch(self, folder: Path) -> Answer:
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
        if self.on_gpu:
            with (folder / "child.log").open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "engine", "run", str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env={**os.environ, "BONSAI_ENGINE_SOCKET": str(self.path)},
                )
            self.spawned[process.pid] = process
            self.children[process.pid] = folder
            return {"ok": True, "pid": process.pid, "started": process_start(process.pid)}
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setsid()
                self._become_child()
                os.environ["BONSAI_ENGINE_SOCKET"] = str(self.path)
                output_fd = os.open(folder / "child.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(output_fd, 1)
                os.dup2(output_fd, 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                from engine.ops.folder import run_folder
                from engine.train.run import set_threads

                set_threads()
                run_folder(folder)
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        self.children[pid] = folder
        return {"ok": True, "pid": pid, "started": process_start(pid)}

    def _become_child(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        self.listener.close()
        gc.unfreeze()

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
                write_json(folder / "exit.json", {"pid": pid, "code": max(code, 0), "signal": -min(code, 0)})

    @staticmethod
    def _has_gpu() -> bool:
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # ask the driver without opening a CUDA context
        import torch

        return torch.cuda.is_available()


def warm_up() -> None:
    """Import everything a child needs; run no tensor operation."""
    import importlib

    for name in (
        "torch",
        "transformers",
        "peft",
        "safetensors.torch",
        "sklearn.linear_model",
        "sklearn.metrics",
        "pyarrow.parquet",
        "transformers.models.llama.modeling_llama",
        "transformers.models.bert.modeling_bert",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "engine.ops.check",
        "engine.ops.folder",
        "engine.ops.flow",
        "engine.ops.transform",
        "engine.train.certificate",
    ):
        importlib.import_module(name)
    catalogue()


def serve(path: Path) -> None:
    """Run the service on a Unix socket."""
    Service(path).serve()
