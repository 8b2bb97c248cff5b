"""A method that an installed package brings passes the same conformance list, found by itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.engine.outside import SLUG, make_package

ROOT = Path(__file__).resolve().parents[3]


def test_it_is_listed_and_passes_the_conformance_list(tmp_path: Path, engine_service: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(make_package(tmp_path / "site"))}
    # Certificates come from a service that knows the package too: without an address, from a fresh process.
    environment.pop("BONSAI_ENGINE_SOCKET", None)
    listed = subprocess.run(
        [sys.executable, "-m", "engine", "list", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    card = next(method for method in json.loads(listed.stdout)["methods"] if method["slug"] == SLUG)
    assert card["slots"] == ["parametrization"] and card["schema"]["properties"]["every"]["type"] == "boolean"
    suite = "tests/engine/conformance/test_train_methods.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", suite, "-q", "-k", SLUG, "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-3000:]
    points = (ROOT / suite).read_text(encoding="utf-8").count("\ndef test_")
    assert int(passed[1]) == points, "every point of the list, none left out"
