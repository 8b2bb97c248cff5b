"""A studio of its own in a temporary folder, started by `manage.py up` and seen as a person's browser sees it: through HTTP and websockets."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from html.parser import HTMLParser
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urljoin

import requests
from websockets.sync.client import connect
from websockets.typing import Origin

from jobs.parts import ROOT, STATE

ENDED = {"succeeded", "failed", "cancelled"}
START_SECONDS = 180
# The job that is measured: a sentence encoder learns to sort our starter messages.
STARTER_JOB: dict[str, Any] = {
    "task": "classify",
    "model": {"source": "starter:minilm-l6"},
    "data": {"source": "starter:customer-messages"},
    "methods": [{"slug": "paca", "params": {"r": 8}}],
    "settings": {"max_steps": 20, "batch_size": 8, "max_length": 48, "evaluations": 1},
}


class Installation:
    """Use as a context manager: up and entered inside, stopped and deleted behind. Settings go into its environment."""

    def __init__(self, port: int = 0, **settings: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bonsai-measure-")
        self.home = Path(self._folder.name) / "home"
        port = port or free_port()
        self.address = f"http://127.0.0.1:{port}"
        self.output = Path(self._folder.name) / "up.out"
        environment = {**os.environ, "BONSAI_HOME": str(self.home), "HF_HUB_OFFLINE": "1", **settings}
        environment.pop("BONSAI_ENGINE_SOCKET", None)
        with self.output.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "up", "--port", str(port), "--no-first-run"],
                cwd=ROOT,
                env=environment,
                stdout=sink,
                stderr=sink,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.session = requests.Session()
        self.session.trust_env = False

    def __enter__(self) -> Installation:
        try:
            self._enter()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _enter(self) -> None:
        """Wait until everything answers and enter by the printed link."""
        until = time.monotonic() + START_SECONDS
        entered = False
        while time.monotonic() < until and self.process.poll() is None:
            link = re.search(r"http\S+/enter/\S+", self.output.read_text())
            if not entered and link:
                entered = self.session.get(link[0], timeout=START_SECONDS).ok
            if (
                entered
                and self.get("health")["engine"]
                and self.get("models")["count"]
                and self.get("datasets")["count"]
            ):
                return
            time.sleep(0.2)
        raise RuntimeError(f"The studio did not come up: {self.output.read_text()}")

    def get(self, path: str) -> Any:
        """The answer of the REST API."""
        return self.session.get(f"{self.address}/api/v1/{path}", timeout=60).json()

    def start_job(self, recipe: dict[str, Any]) -> str:
        """Queue a job; returns its id as soon as it is accepted."""
        head = {"X-CSRFToken": self.session.cookies.get("csrftoken") or "", "Referer": self.address}
        answer = self.session.post(f"{self.address}/api/v1/jobs", json=recipe, headers=head, timeout=60)
        if answer.status_code != 202:
            raise RuntimeError(f"The job was refused: {answer.text[:500]}")
        return str(answer.json()["id"])

    def follow(self, job: str) -> list[tuple[float, dict[str, Any]]]:
        """All events of a job until it has ended, as a browser gets them, each with the time of its arrival."""
        cookie = "; ".join(f"{item.name}={item.value}" for item in self.session.cookies)
        arrivals: list[tuple[float, dict[str, Any]]] = []
        with connect(
            f"{self.address.replace('http', 'ws')}/ws/jobs/{job}/?after=0",
            additional_headers={"Cookie": cookie},
            origin=Origin(self.address),
            max_size=None,
        ) as link:
            while True:
                frame = json.loads(link.recv(timeout=300))
                now = time.time()
                arrivals += [(now, event) for event in frame.get("events", [])]
                if arrivals and arrivals[-1][1]["kind"] == "status" and arrivals[-1][1]["data"]["to"] in ENDED:
                    return arrivals

    def processes(self) -> dict[str, int]:
        """Number of each part by its name: engine, web, consumer."""
        pids = [pid for pid, _ in json.loads((self.home / STATE).read_text(encoding="utf-8"))["parts"]]
        return dict(zip(("engine", "web", "consumer"), pids, strict=True))

    def visit_every_page(self, limit: int = 200) -> list[str]:
        """Follow every link from the front page, each kind of page at most three times; returns the addresses that were served."""
        waiting, seen, kinds = deque(["/", "/api/v1/docs", "/admin/"]), {"/"}, dict[str, int]()
        served: list[str] = []
        while waiting and len(served) < limit:
            path = waiting.popleft()
            answer = self.session.get(self.address + path, timeout=60)
            served.append(path)
            if answer.status_code >= 500:
                raise RuntimeError(f"{path} answered {answer.status_code}.")
            if "text/html" not in answer.headers.get("Content-Type", ""):
                continue
            links = _Links()
            links.feed(answer.text)
            for found in links.found:
                full = urljoin(self.address + path, found).partition("#")[0]
                there = full.removeprefix(self.address)
                kind = re.sub(r"[0-9a-f-]{36}|\d+|=[^&]*", "*", there)
                if there == full or there in seen or "logout" in there or kinds.get(kind, 0) >= 3:
                    continue
                seen.add(there)
                kinds[kind] = kinds.get(kind, 0) + 1
                waiting.append(there)
        return served

    def stop(self) -> None:
        """As with Ctrl-C."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(90)
        self._folder.cleanup()


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def resident_megabytes(pid: int) -> float:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def maps_library(pid: int, name: str) -> bool:
    """Whether a process has a shared library in its memory."""
    return name in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
