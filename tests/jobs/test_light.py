"""What the web process does without, seen in a process that has loaded all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from jobs.parts import ROOT

LOOK = """
import json, sys
import jobs.serve, jobs.wire, studio.asgi
from django.urls import get_resolver
get_resolver().url_patterns
loaded = sorted(sys.modules)
import django.test
print(json.dumps([loaded, hasattr(django.test, "Client")]))
"""
NEEDLESS = {
    "torch",
    "numpy",
    "watchfiles",
    "anyio",
    "jinja2",
    "unittest.mock",
    "django.test.client",
    "django.test.testcases",
}


def test_the_web_process_loads_nothing_that_no_page_needs() -> None:
    environment = {"DJANGO_SETTINGS_MODULE": "studio.settings"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    loaded, whole = json.loads(done.stdout.splitlines()[-1])
    assert not NEEDLESS & set(loaded)
    assert "ninja" in loaded and "django.test.signals" in loaded
    assert whole, "who asks for the test tools gets them"
