"""Up to thirty times kill -9 at random moments, at the child, the consumer, the web server and the engine service, alone and in pairs.

A whole studio runs, with real trainings. Afterwards every series and every weight equals that of the uninterrupted run, each job has
one end, and no step was made twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from engine.core.recipe import Recipe
from jobs.processes import process_start
from tests.drills import Told, drill
from tests.engine.tiny import Tiny, lay, metric_rows
from tests.ports import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = int(os.environ.get("BONSAI_DRILL_KILLS", "30"))
MOST_SECONDS = float(os.environ.get("BONSAI_DRILL_SECONDS", "60"))  # of killing; what was reached then is what is told
SEED = int(os.environ.get("BONSAI_DRILL_SEED", "20261"))
TIMING = {"seconds", "tokens_per_second", "memory"}
TARGETS = (
    ("child",),
    ("consumer",),
    ("web",),
    ("engine",),
    ("child", "consumer"),
    ("child", "engine"),
    ("consumer", "engine"),
    ("child",),
    ("child",),
    ("child",),
)
ENDS = ("succeeded", "failed", "cancelled")


@dataclass
class Studio:
    """A studio in a folder of its own."""

    home: Path
    port: int
    up: subprocess.Popen[str]
    environment: dict[str, str]

    def ask(self, question: str, *values: Any) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self.home / "db.sqlite3", timeout=20)) as database:
            return database.execute(question, values).fetchall()

    def queue(self, recipe: Recipe) -> str:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests/jobs/drill_job.py")],
            input=recipe.model_dump_json(),
            text=True,
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            check=True,
        )
        return done.stdout.split()[-1].replace("-", "")

    def job(self, job: str, *columns: str) -> tuple[Any, ...]:
        return self.ask(f"SELECT {', '.join(columns)} FROM jobs_job WHERE id = ?", job)[0]

    def pids(self) -> dict[str, int]:
        state = json.loads((self.home / "up.json").read_text())
        return {name: pid for name, (pid, _) in zip(("engine", "web", "consumer"), state["parts"], strict=True)}

    def folder(self, job: str) -> Path:
        return next(path for path in (self.home / "jobs").iterdir() if path.name.replace("-", "") == job)

    def state(self, job: str) -> str:
        """Where a job stands that does not get on, for a person who has to find out why."""
        columns = (
            "status",
            "reason",
            "message",
            "attempt",
            "crashes",
            "child_pid",
            "lease_owner",
            "lease_epoch",
            "lease_until",
            "done_steps",
        )
        told = [
            (seq, kind, data[:160])
            for seq, kind, data in self.ask(
                "SELECT seq, kind, data FROM jobs_event WHERE job_id = ? AND kind <> 'metric' ORDER BY seq DESC LIMIT 12",
                job,
            )
        ]
        logs = [
            path.read_text()[-1500:] for path in ((self.home / "log" / "consumer.log"), self.folder(job) / "child.log")
        ]
        return "\n".join(
            map(str, [dict(zip(columns, self.job(job, *columns), strict=True)), self.pids(), *told, *logs])
        )

    def healthy(self) -> bool:
        with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{self.port}/api/v1/health", timeout=5) as answer:
            return answer.status == 200
        return False


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    port = free_port()
    home = tmp_path / "home"
    environment = {
        **os.environ,
        "BONSAI_HOME": str(home),
        "BONSAI_THREADS": "1",
        "BONSAI_ENGINE_SOCKET": str(Path(tempfile.gettempdir()) / f"bonsai-drill-{port}.sock"),
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    up = subprocess.Popen(
        [sys.executable, str(ROOT / "manage.py"), "up", "--port", str(port), "--no-first-run"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    made = Studio(home, port, up, environment)
    try:
        wait(lambda: made.healthy() and Path(environment["BONSAI_ENGINE_SOCKET"]).exists(), 90)
        yield made
    finally:
        up.terminate()
        up.wait(120)


def wait(holds: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def learning(studio: Studio, job: str) -> bool:
    """A child is there to be killed, and may be; or the job is over."""
    status, crashes, pid = studio.job(job, "status", "crashes", "child_pid")
    return status in ENDS or (status == "running" and crashes < 2 and process_start(pid or 0) is not None)


def kill(studio: Studio, job: str, target: str) -> bool:
    pid = studio.job(job, "child_pid")[0] if target == "child" else studio.pids()[target]
    with contextlib.suppress(ProcessLookupError, TypeError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def rows_in_database(studio: Studio, job: str) -> list[dict[str, Any]]:
    found = studio.ask("SELECT data FROM jobs_event WHERE job_id = ? AND kind = 'metric' ORDER BY seq", job)
    return [
        {key: value for key, value in row.items() if key not in TIMING}
        for (data,) in found
        for row in json.loads(data)["rows"]
    ]


def weights(folder: Path) -> dict[str, str]:
    files = json.loads((folder / "artifact" / "manifest.json").read_text())["files"]
    return {name: item["sha256"] for name, item in files.items() if name.endswith(".safetensors")}


def test_thirty_kills_change_nothing(studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder = tmp_path / "tiny"
    tiny_folder.mkdir()
    methods = [("paca", {"r": 2}), ("clip", {}), ("patience", {"patience": 1000})]
    recipe = Tiny(tiny_folder).recipe(
        methods, task="classify", epochs=500, max_steps=1500, batch_size=4, evaluations=6, checkpoint_every=40
    )
    reference = lay(tmp_path / "reference", recipe)
    subprocess.run(
        [sys.executable, "-m", "engine", "run", str(reference)],
        cwd=ROOT,
        check=True,
        env=studio.environment,
        capture_output=True,
    )
    expected_rows, expected_weights = metric_rows(reference), weights(reference)
    assert len(expected_rows) == 1500 and expected_weights

    with drill(
        "kill -9",
        "a process of a running studio is killed at a random moment: child, consumer, web or engine service, alone and in pairs",
        unit="kills",
        place="tests/jobs/test_kill_drill.py",
        setting="BONSAI_DRILL_KILLS",
    ) as told:
        _strike(studio, recipe, expected_rows, expected_weights, told, capsys)


def _strike(
    studio: Studio,
    recipe: Recipe,
    expected_rows: list[dict[str, Any]],
    expected_weights: dict[str, str],
    told: Told,
    capsys: Any,
) -> None:
    dice = random.Random(SEED)
    num_kills, jobs, by_target = 0, [], dict.fromkeys(("child", "consumer", "web", "engine"), 0)
    began = time.monotonic()

    def enough() -> bool:
        return num_kills >= NUM_KILLS or time.monotonic() - began > MOST_SECONDS

    while not enough():
        job = studio.queue(recipe)
        jobs.append(job)
        while studio.job(job, "status")[0] not in ENDS:
            assert time.monotonic() - began < 18 * NUM_KILLS, "the drill does not get on"
            targets = () if enough() else dice.choice(TARGETS)
            if "child" in targets:
                # A third death in a row without a new checkpoint rightly ends a run; that is another test.
                try:
                    wait(partial(learning, studio, job))
                except AssertionError:
                    pytest.fail(studio.state(job))
            time.sleep(dice.uniform(0.0, 0.6))
            for target in targets:
                if target == "child" and not learning(studio, job):
                    continue
                if studio.job(job, "status")[0] not in ENDS and kill(studio, job, target):
                    num_kills += 1
                    told.times += 1
                    by_target[target] += 1
    with capsys.disabled():
        print(f"\n{num_kills} kills {by_target} in {time.monotonic() - began:.0f} s over {len(jobs)} jobs")

    assert by_target["child"] >= num_kills // 4 > 0
    wait(studio.healthy)
    for job in jobs:
        status, reason, last_seq, attempt = studio.job(job, "status", "reason", "last_seq", "attempt")
        assert (status, reason) == ("succeeded", "completed"), studio.state(job)
        assert rows_in_database(studio, job) == expected_rows, "the series is that of the uninterrupted run"
        assert weights(studio.folder(job)) == expected_weights, "and so are the weights"
        seqs = [seq for (seq,) in studio.ask("SELECT seq FROM jobs_event WHERE job_id = ? ORDER BY seq", job)]
        assert seqs == list(range(1, last_seq + 1)), "numbers without a hole"
        states = [
            json.loads(data)["to"]
            for (data,) in studio.ask(
                "SELECT data FROM jobs_event WHERE job_id = ? AND kind = 'status' ORDER BY seq", job
            )
        ]
        assert [to for to in states if to in ENDS] == ["succeeded"] and states[-1] == "succeeded", (
            "one end, and nothing after it"
        )
        launches = [
            json.loads(data)["attempt"]
            for (data,) in studio.ask(
                "SELECT data FROM jobs_event WHERE job_id = ? AND kind = 'child' ORDER BY seq", job
            )
        ]
        assert launches == sorted(set(launches)) and launches[-1] == attempt, "no attempt ran twice"
        assert studio.ask("SELECT count(*) FROM jobs_artifact WHERE job_id = ?", job) == [(1,)]
