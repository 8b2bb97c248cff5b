"""The torch-free client of the engine: asks the resident service, or a fresh process where no service listens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine.core.errors import EngineError, Fault, RecipeError

MAX_ANSWER_BYTES = 64_000_000


class Engine:
    """Calls of docs/architecture.md, "Engine service protocol". `socket_path` may point to nothing: then every call starts a process."""

    def __init__(self, socket_path: Path | str | None = None, *, timeout: float = 120.0) -> None:
        self.socket_path = Path(socket_path) if socket_path else None
        self.timeout = timeout

    def call(self, name: str, **request: Any) -> dict[str, Any]:
        """Ask, and return the answer without "ok". A refusal raises RecipeError (several faults) or EngineError."""
        line = json.dumps({"call": name, **request}, allow_nan=False).encode() + b"\n"
        try:
            raw = self._ask_service(line)
        except (FileNotFoundError, ConnectionError):
            raw = self._ask_process(line)
        except TimeoutError:
            raise EngineError(
                Fault(
                    where="engine",
                    what="The engine did not answer in time.",
                    why="It is probably busy with something large.",
                    way_out="Try again in a minute.",
                    code="engine_timeout",
                ),
                "environment",
            ) from None
        answer: dict[str, Any] = json.loads(raw)
        if answer.pop("ok", False):
            return answer
        faults = [Fault(**fault) for fault in answer["faults"]]
        if answer.get("reason") == "bad_input":
            raise RecipeError(faults)
        raise EngineError(faults[0], answer.get("reason", "bug"))

    def alive(self) -> bool:
        """Whether a service listens."""
        try:
            self._ask_service(b'{"call": "ping"}\n', timeout=2.0)
        except OSError:
            return False
        return True

    def _ask_service(self, line: bytes, timeout: float | None = None) -> bytes:
        if self.socket_path is None:
            raise FileNotFoundError("no service")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(timeout or self.timeout)
            link.connect(str(self.socket_path))
            link.sendall(line)
            pieces: list[bytes] = []
            size = 0
            while piece := link.recv(1 << 16):
                pieces.append(piece)
                size += len(piece)
                if piece.endswith(b"\n") or size > MAX_ANSWER_BYTES:
                    break
        if not pieces:
            raise ConnectionError("The service closed the connection.")
        return b"".join(pieces)

    def _ask_process(self, line: bytes) -> bytes:
        done = subprocess.run(
            [sys.executable, "-m", "engine", "call"],
            input=line,
            capture_output=True,
            timeout=self.timeout * 3,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        )
        if done.returncode != 0 or not done.stdout.strip():
            raise EngineError(
                Fault(
                    where="engine",
                    what="The engine could not be started.",
                    why=done.stderr.decode(errors="replace")[-300:],
                    way_out="Check the installation with: python -m engine list",
                    code="engine_start",
                ),
                "environment",
            )
        return done.stdout.strip().splitlines()[-1]
