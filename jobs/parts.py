"""The processes of an embedded installation: started together, restarted when one falls, stopped together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from django.conf import settings

from engine.core.control import write_json
from jobs.places import engine_socket, home
from jobs.processes import TRAINING, is_alive, process_start, signal_group

ROOT = Path(__file__).resolve().parent.parent
STATE = "up.json"
MAX_LOG_BYTES = 10 << 20
SECRETS = (
    "BONSAI_SECRET_KEY",
    "BONSAI_ADMIN_PASSWORD",
    "DATABASE_URL",
    "REDIS_URL",
    "BONSAI_FORWARD",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "WANDB_API_KEY",
    "TRACKIO_WRITE_TOKEN",
)
MAX_PAUSE = 30.0
SMALL = {"MALLOC_ARENA_MAX": "2"}  # threads share their free memory instead of keeping a part each


class Part:
    """One process that should always run."""

    def __init__(
        self, name: str, command: Sequence[str], *, secret: bool = True, environment: Mapping[str, str] = {}
    ) -> None:
        self.name, self.command, self.secret, self.environment = name, list(command), secret, environment
        self.process: subprocess.Popen[bytes] | None = None
        self.log = home() / "log" / f"{name}.log"
        self._pause = 0.2
        self._since = 0.0
        self._retry_at = 0.0

    def start(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "BONSAI_HOME": str(settings.BONSAI_HOME),
            "DJANGO_SETTINGS_MODULE": "studio.settings",
            **self.environment,
        }
        if not self.secret:
            environment = {key: value for key, value in environment.items() if key not in SECRETS}
        with self._opened_log() as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._since = time.monotonic()

    def look(self) -> bool:
        """Restart the process when it has fallen, later each time; True when it was restarted now."""
        now = time.monotonic()
        if self.process is None or self.process.poll() is None:
            if now - self._since > 60:
                self._pause = 0.2
            return False
        if not self._retry_at:
            self._retry_at = now + self._pause
            if self.process.returncode != -signal.SIGKILL:  # killed from outside says nothing about the next start
                self._pause = min(self._pause * 2, MAX_PAUSE)
        if now < self._retry_at:
            return False
        self._retry_at = 0.0
        self.start()
        return True

    def stop(self, seconds: float) -> None:
        """Ask it to end, and make it end when it does not."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            signal_group(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def last_words(self) -> str:
        """The end of its log, for a person who has to find out what is wrong."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 2000))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-5:])

    def _opened_log(self) -> IO[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.log.exists() and self.log.stat().st_size > MAX_LOG_BYTES:
            self.log.replace(self.log.with_suffix(".old.log"))
        return self.log.open("ab")


def web_command(host: str, port: int | str) -> list[str]:
    """How the web server is started."""
    return [
        sys.executable,
        "-m",
        "jobs.serve",
        "studio.asgi:application",
        "--host",
        host,
        "--port",
        str(port),
        "--log-level",
        "warning",
        "--no-server-header",
        "--no-access-log",
        "--timeout-graceful-shutdown",
        "3",
        "--ws",
        "jobs.wire:SharedFrames",
        "--ws-max-size",
        "65536",
        "--ws-per-message-deflate",
        "false",
    ]


def parts(host: str, port: int) -> list[Part]:
    """Engine service, consumer and web server, and where curves are sent to a tracker, who does that."""
    python, manage = sys.executable, str(ROOT / "manage.py")
    forwards = []
    if settings.BONSAI_FORWARD:
        from jobs.forwarding import targets  # needs the models, which nobody else here does

        forwards = targets()[0]
    return [
        Part(
            "engine",
            [python, "-m", "engine", "serve", "--socket", str(engine_socket())],
            secret=False,
            environment=TRAINING,
        ),
        Part("web", web_command(host, port), environment=SMALL),
        Part("consumer", [python, manage, "consume"], environment=SMALL),
        *([Part("forward", [python, manage, "forward", "--follow"], environment=SMALL)] if forwards else []),
    ]


def remember(running: Sequence[Part], address: str) -> None:
    """Write down who runs, so that the next start finds what a killed supervisor left behind."""
    pids = [part.process.pid for part in running if part.process is not None]
    write_json(home() / STATE, {"address": address, "up": _named(os.getpid()), "parts": [_named(pid) for pid in pids]})


def forget() -> None:
    (home() / STATE).unlink(missing_ok=True)


def running_address() -> str:
    """Where the studio of this data folder runs already, or nothing."""
    state = _state()
    return str(state.get("address", "")) if is_alive(*state.get("up", (None, None))) else ""


def clear_leftovers() -> None:
    """End the processes of a supervisor that was killed. Trainings are none of them; they go on and are found again."""
    left = [(pid, started) for pid, started in _state().get("parts", []) if is_alive(pid, started)]
    for pid, _ in left:
        os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 5
    while any(is_alive(pid, started) for pid, started in left) and time.monotonic() < until:
        time.sleep(0.05)


def _state() -> dict[str, list]:
    try:
        body = json.loads((home() / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _named(pid: int) -> tuple[int, int | None]:
    return pid, process_start(pid)
