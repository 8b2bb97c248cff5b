"""A real installation for tests in a browser: web, consumer and engine service, with a data folder of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import BrowserContext

from jobs.parts import STATE
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PERSON, PASSWORD = "ada", "a bonsai grows slowly"
START_SECONDS = 180.0
LOG_IN_MS = 120_000  # the first page waits for the engine, which may still be starting


class Installation:
    """Started with `manage.py up`, as a person would, and stopped as with Ctrl-C."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.said = home / "up.txt"

    def start(self) -> None:
        """Start every process and wait until pages are served."""
        self.home.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "BONSAI_HOME": str(self.home),
            "BONSAI_ADMIN_USER": PERSON,
            "BONSAI_ADMIN_PASSWORD": PASSWORD,
            "BONSAI_THREADS": "1",
        }
        with self.said.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "up", "--port", str(self.port), "--no-first-run"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        until = time.monotonic() + START_SECONDS
        while "runs at" not in self.words():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"The studio did not start:\n{self.words()}")
            time.sleep(0.3)
        while not self.answers():
            if time.monotonic() > until:
                raise RuntimeError(f"The studio does not answer:\n{self.words()}")
            time.sleep(0.3)

    def stop(self) -> None:
        """End it as a person does; what does not listen is killed with its whole group."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)

    def words(self) -> str:
        """What the command has printed."""
        return self.said.read_text(encoding="utf-8", errors="replace")

    def answers(self) -> bool:
        """Whether pages are served."""
        try:
            with urlopen(f"{self.address}/login/", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def processes(self) -> dict[str, int]:
        """Number of each part by its name: engine, web, consumer."""
        pids = [pid for pid, _ in json.loads((self.home / STATE).read_text(encoding="utf-8"))["parts"]]
        return dict(zip(("engine", "web", "consumer"), pids, strict=True))

    def log_in(self, context: BrowserContext) -> None:
        """Log the person in, by the form that people use."""
        page = context.new_page()
        page.goto(f"{self.address}/login/")
        page.fill("[name=username]", PERSON)
        page.fill("[name=password]", PASSWORD)
        page.press("[name=password]", "Enter", timeout=LOG_IN_MS)
        page.wait_for_url(f"{self.address}/", timeout=LOG_IN_MS)
        page.close()

    def post(self, context: BrowserContext, path: str, body: Any) -> Any:
        """Send JSON as the scripts of the pages do: with the session and the CSRF token."""
        token = next(cookie["value"] for cookie in context.cookies() if cookie["name"] == "csrftoken")
        answer = context.request.post(
            f"{self.address}{path}", data=body, headers={"X-CSRFToken": token, "Origin": self.address}
        )
        assert answer.ok, answer.text()
        return answer.json()

    def get(self, context: BrowserContext, path: str) -> Any:
        """Read JSON."""
        answer = context.request.get(f"{self.address}{path}")
        assert answer.ok, answer.text()
        return answer.json()
