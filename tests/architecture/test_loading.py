"""What really gets loaded, seen in a fresh interpreter: importing is cheap and the web process stays free of torch."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.architecture.source import ROOT, python_files, within
from tests.architecture.test_imports import PUBLIC, TORCH

REPORT = f"""
import sys
print("loaded:", sorted(name for name in {TORCH!r} if name in sys.modules))
"""

LOAD_WEB = (
    """
import importlib
importlib.import_module("studio.asgi")
from django.urls import get_resolver
def walk(resolver):
    for entry in resolver.url_patterns:
        if hasattr(entry, "url_patterns"):
            walk(entry)
walk(get_resolver())
"""
    + REPORT
)


def run_fresh(program: str) -> str:
    """What a program prints in an interpreter of its own; fails with the end of its error when it breaks."""
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "studio.settings", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_public_part_of_the_engine_loads_no_torch() -> None:
    names = [s.module for s in python_files("engine") if any(within(s.module, room) for room in PUBLIC)]
    names = [name for name in names if not name.endswith("__main__")]
    program = "import importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in names) + REPORT
    assert "loaded: []" in run_fresh(program)


def test_the_web_process_loads_no_torch() -> None:
    assert "loaded: []" in run_fresh(LOAD_WEB)


def test_the_report_notices_torch() -> None:
    assert "loaded: ['torch']" in run_fresh("import torch\n" + REPORT)
