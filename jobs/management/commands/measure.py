"""manage.py measure: how long a person waits, from outside: click to first step, event to browser, lost events."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import requests
from django.core.management.base import BaseCommand, CommandError, CommandParser
from websockets.sync.client import connect
from websockets.typing import Origin

from jobs.parts import ROOT

PAGE = ROOT / "docs" / "benchmarks" / "whole-path.md"


class Installation:
    """A studio of its own in a temporary folder, seen through HTTP and websockets only."""

    def __init__(self, home: Path, port: int, **settings: str) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.output = home / "up.out"
        environment = {**os.environ, "BONSAI_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1", **settings}
        with self.output.open("wb") as sink:
            self.process = subprocess.Popen([sys.executable, "manage.py", "up", "--port", str(port), "--no-first-run"], cwd=ROOT,
                                            env=environment, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        self.session = requests.Session()
        self.session.trust_env = False

    def enter(self) -> None:
        """Wait until everything answers and enter by the printed link."""
        until = time.monotonic() + 120
        while time.monotonic() < until:
            link = re.search(r"http\S+/enter/\S+", self.output.read_text())
            if link and self.session.get(link[0], timeout=30).ok:
                break
            time.sleep(0.2)
        while time.monotonic() < until:
            if self.get("health")["engine"] and self.get("models")["count"]:
                return
            time.sleep(0.2)
        raise CommandError(f"The studio did not come up: {self.output.read_text()}")

    def get(self, path: str) -> Any:
        return self.session.get(f"{self.address}/api/v1/{path}", timeout=60).json()

    def start_job(self, recipe: dict[str, Any]) -> str:
        head = {"X-CSRFToken": self.session.cookies.get("csrftoken") or "", "Referer": self.address}
        answer = self.session.post(f"{self.address}/api/v1/jobs", json=recipe, headers=head, timeout=60)
        if answer.status_code != 202:
            raise CommandError(f"The job was refused: {answer.text[:500]}")
        return str(answer.json()["id"])

    def follow(self, job: str) -> tuple[list[dict[str, Any]], list[tuple[float, dict[str, Any]]]]:
        """All events of a job as a browser gets them: (every event, [(arrival, event)] of those that arrived live)."""
        cookie = "; ".join(f"{item.name}={item.value}" for item in self.session.cookies)
        events: list[dict[str, Any]] = []
        arrivals: list[tuple[float, dict[str, Any]]] = []
        with connect(f"{self.address.replace('http', 'ws')}/ws/jobs/{job}/?after=0", additional_headers={"Cookie": cookie},
                     origin=Origin(self.address), max_size=None) as link:  # fmt: skip
            while True:
                frame = json.loads(link.recv(timeout=300))
                now = time.time()
                for event in frame.get("events", []):
                    events.append(event)
                    arrivals.append((now, event))
                    if event["kind"] == "status" and event["data"].get("to", event["data"].get("status")) in {
                        "succeeded",
                        "failed",
                        "cancelled",
                    }:
                        return events, arrivals

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


class Command(BaseCommand):
    """Measure the whole path on a studio of its own and rewrite docs/benchmarks/whole-path.md."""

    help = "Measure click to first step, event to browser and lost events."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--runs", type=int, default=10, help="how many jobs to start, one after the other")
        parser.add_argument(
            "--port", type=int, default=0, help="port of the studio that is measured (default: a free one)"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="bonsai-measure-") as folder:
            studio = Installation(Path(folder), options["port"] or free_port())
            try:
                studio.enter()
                found = [self._one(studio, number) for number in range(options["runs"])]
            finally:
                studio.stop()
        self._report(found)

    def _one(self, studio: Installation, number: int) -> dict[str, Any]:
        recipe = {"name": f"measure {number}", "task": "classify", "model": {"source": "starter:minilm-l6"},
                  "data": {"source": "starter:customer-messages"}, "methods": [{"slug": "paca", "params": {"r": 8}}],
                  "settings": {"max_steps": 20, "batch_size": 8, "max_length": 48, "evaluations": 1, "seed": number}}  # fmt: skip
        click = time.time()
        job = studio.start_job(recipe)
        accepted = time.time()
        events, arrivals = studio.follow(job)
        steps = [(at, event) for at, event in arrivals if event["kind"] == "metric"]
        stored = studio.get(f"jobs/{job}/events?after=0&limit=1000")
        known = {event["seq"] for event in stored["events"]}
        return {
            "accepted": accepted - click,
            "first": steps[0][0] - click,
            "delays": [at - event["time"] for at, event in arrivals if event["kind"] != "status"],
            "lost": len(known - {event["seq"] for event in events}),
            "events": len(known),
        }

    def _report(self, found: list[dict[str, Any]]) -> None:
        first = sorted(run["first"] for run in found)
        delays = sorted(delay for run in found for delay in run["delays"])
        rows = [
            (
                "request accepted (all checks done, job in the queue), median",
                f"{statistics.median(run['accepted'] for run in found):.2f} s",
            ),
            ("click to the first step in the client, median", f"{statistics.median(first):.2f} s"),
            ("click to the first step in the client, worst", f"{first[-1]:.2f} s"),
            ("event written to event in the client, p50", f"{_quantile(delays, 0.5) * 1e3:.0f} ms"),
            ("event written to event in the client, p99", f"{_quantile(delays, 0.99) * 1e3:.0f} ms"),
            ("events in the database", f"{sum(run['events'] for run in found):,}"),
            ("events lost between database and client", f"{sum(run['lost'] for run in found)}"),
        ]
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        PAGE.write_text("\n".join([
            "# Whole path", "",
            f"Command: `python manage.py measure --runs {len(found)}` · commit {commit} · {time.strftime('%Y-%m-%d')} · "
            f"{os.cpu_count()} cores ({platform.processor() or platform.machine()}), load average {os.getloadavg()[0]:.1f}.", "",
            "A real installation started by `manage.py up` in an empty folder; one client over HTTP and a websocket; each job trains MiniLM-L6 with PaCA on",
            "the starter messages for 20 steps. The first step includes loading the model, reading the data and the first evaluation.",
            "", "| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]), encoding="utf-8")  # fmt: skip
        for name, value in rows:
            self.stdout.write(f"{name}: {value}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]
