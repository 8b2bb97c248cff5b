"""The resident service: forks that never hang, processes that wait for one order, and a new process when the code has changed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.bench.forks import Yard
from engine.client import Engine
from tests.engine.tiny import Tiny

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    built = Yard(tmp_path_factory.mktemp("yard"))
    yield built
    built.close()


def until(holds: Any, seconds: float = 180.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return found


def test_twenty_forks_answer_and_none_stays_behind(yard: Yard) -> None:
    found = yard.soak(20)
    assert found.faults == [] and found.zombies == 0
    assert found.num_jobs == 2 and found.num_calls == 18
    assert found.open_files[0] == found.open_files[1], "every handle is closed"


def test_a_killed_child_is_noticed_with_its_signal(yard: Yard) -> None:
    folder = yard.folder / "killed"
    folder.mkdir()
    recipe = {**yard.recipe, "settings": {**yard.recipe["settings"], "max_steps": None, "epochs": 1000}}
    (folder / "recipe.json").write_text(json.dumps(yard.client.call("check", recipe=recipe)["recipe"]))
    pid = yard.client.call("launch", folder=str(folder))["pid"]
    until(lambda: (folder / "events.jsonl").exists())
    os.kill(pid, 9)
    until(lambda: (folder / "exit.json").exists())
    assert json.loads((folder / "exit.json").read_text()) == {"pid": pid, "code": 0, "signal": 9}
    assert yard.zombies() == []


def test_work_for_a_gpu_goes_to_a_process_that_waits_and_a_successor_comes_also_when_it_dies(yard: Yard) -> None:
    """Without a GPU the process sees none and works on the processor; who takes the order, and what follows, is the same."""
    assert yard.client.call("ping")["spare"] is None, "where no GPU is, nothing waits"
    first = yard.job("on-gpu", gpu="0")
    assert first["outcome"] == "succeeded" and first["exit"] == {"pid": first["pid"], "code": 0, "signal": 0}
    yard.job("forked")
    steps = [_losses(yard.folder / name) for name in ("on-gpu", "forked")]
    assert steps[0] == steps[1] != [], "the same numbers, bit for bit"

    waiting = until(lambda: yard.client.call("ping")["spare"])
    assert waiting != first["pid"]
    until(lambda: _has_imported(waiting))
    assert not any(name in Path(f"/proc/{waiting}/maps").read_text() for name in ("libcuda.so", "/dev/nvidia"))
    second = yard.job("on-gpu-again", gpu="0")
    assert second["pid"] == waiting, "the one that waited took it"
    assert yard.client.call("ping")["spare"] != waiting, "and takes no other"

    waiting = until(lambda: yard.client.call("ping")["spare"])
    os.kill(waiting, 9)
    until(lambda: yard.client.call("ping")["spare"] != waiting)
    ended = yard.job("after-its-death", gpu="0")
    assert ended["outcome"] == "succeeded" and ended["pid"] != waiting


def test_a_waiting_process_ends_with_the_service() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        waiting = subprocess.Popen([sys.executable, "-m", "engine", "spare"], cwd=ROOT, stdin=theirs.fileno())
    ours.close()
    assert waiting.wait(60) == 0


def test_the_service_replaces_itself_when_the_code_has_changed_and_loses_nobody(tiny: Tiny, tmp_path: Path) -> None:
    """On a copy of the code: a child that was started before is still reaped by it, and who asks meanwhile waits."""
    code, path = tmp_path / "code", tmp_path / "engine.sock"
    shutil.copytree(ROOT / "engine", code / "engine", ignore=shutil.ignore_patterns("__pycache__", "data"))
    (code / "engine" / "starters" / "data").symlink_to(ROOT / "engine" / "starters" / "data")
    (code / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    environment = {**os.environ, "PYTHONPATH": str(code), "BONSAI_THREADS": "1"}
    service = subprocess.Popen(
        [sys.executable, "-m", "engine", "serve", "--socket", str(path)], cwd=code, env=environment
    )
    try:
        client = Engine(path, timeout=60)
        until(client.alive)
        folder = tmp_path / "job"
        folder.mkdir()
        recipe = {
            **tiny.inputs("causal_lm"),
            "methods": [{"slug": "lora", "params": {}}],
            "settings": {"epochs": 1000, "max_length": 32},
        }
        (folder / "recipe.json").write_text(json.dumps(client.call("check", recipe=recipe)["recipe"]))
        child = client.call("launch", folder=str(folder))["pid"]
        version = code / "engine" / "__init__.py"
        version.write_text(version.read_text() + '\n__version__ = "new"\n')
        answer = client.call("ping")
        assert answer["version"] == "new" and answer["pid"] == service.pid, "the same process, with the new code"
        os.kill(child, 15)
        until(lambda: (folder / "exit.json").exists())
        assert json.loads((folder / "exit.json").read_text())["pid"] == child
        assert json.loads((folder / "result.json").read_text())["outcome"] == "paused"
    finally:
        service.terminate()
        service.wait(20)


def test_a_child_imports_nothing_before_its_first_step(tmp_path: Path) -> None:
    """What a child of the starter job needs was imported by the service; the few names left are made up by transformers as it goes."""
    program = f"""
import json, os, sys
from pathlib import Path
from engine.answers import answer
from engine.warm import warm_up
warm_up()
before = set(sys.modules)
from engine.core.events import EventLog
from engine.ops.folder import run_folder
recipe = {{"task": "classify", "model": {{"source": "starter:minilm-l6"}}, "data": {{"source": "starter:customer-messages"}},
          "methods": [{{"slug": "paca", "params": {{"r": 8}}}}], "settings": {{"max_steps": 1, "batch_size": 8, "max_length": 48}}}}
folder = Path({str(tmp_path)!r})
(folder / "recipe.json").write_text(json.dumps(answer({{"call": "check", "recipe": recipe}})["recipe"]))
metric = EventLog.metric
def stop(log, row):
    print(json.dumps(sorted(set(sys.modules) - before)), flush=True)
    os._exit(0)
EventLog.metric = stop
run_folder(folder)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-1500:]
    fresh = json.loads(done.stdout.strip().splitlines()[-1])
    assert [name for name in fresh if (ROOT / "engine" / Path(*name.split(".")[1:])).with_suffix(".py").exists()] == []
    assert len(fresh) <= 3, fresh


def _losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row["loss"] for event in rows if event["kind"] == "metric" for row in event["data"]["rows"]]


def _has_imported(pid: int) -> bool:
    return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
