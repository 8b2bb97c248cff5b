"""Fixtures for tests of the engine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.client import Engine
from tests.engine.tiny import Tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def engine_service() -> Iterator[Path]:
    """A resident engine service of this test session: certificates come from its forks in a fraction of a second."""
    with tempfile.TemporaryDirectory(prefix="bonsai-") as home:
        path = Path(home) / "engine.sock"
        process = subprocess.Popen([sys.executable, "-m", "engine", "serve", "--socket", str(path)], cwd=ROOT)
        client, deadline = Engine(path), time.monotonic() + 120
        while not client.alive():
            assert process.poll() is None and time.monotonic() < deadline, "The engine service did not start."
            time.sleep(0.1)
        os.environ["BONSAI_ENGINE_SOCKET"] = str(path)
        yield path
        os.environ.pop("BONSAI_ENGINE_SOCKET", None)
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, engine_service: Path) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))
