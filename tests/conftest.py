"""Settings and fixtures for every test: one thread, no network, and the way to the shared data."""

import os
import shutil
from pathlib import Path
from typing import Any

# Before anything imports torch: it reads the thread settings once, and spinning threads starve each other.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OMP_WAIT_POLICY="passive",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
)

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--effects-table", default="", help="merge measured effects into this .jsonl file and its page")


@pytest.fixture(scope="session", autouse=True)
def bonsai_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder and a queue of this test run alone, so that no test touches the studio in var/."""
    from django.conf import settings
    from huey.contrib.djhuey import HUEY
    from huey.storage import MemoryStorage

    home = tmp_path_factory.mktemp("home")
    settings.BONSAI_HOME = home
    HUEY.storage = MemoryStorage("tests")
    return home


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the public data sets and weights that tests may read; skips when this machine has none."""
    named = os.environ.get("BONSAI_SHARED_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"No shared data: set BONSAI_SHARED_DATA to its folder (looked for {folder}).")
    return folder


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args: dict[str, Any]) -> dict[str, Any]:
    """Lets Playwright drive the Chromium of the system; skips when there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("No Chromium on this machine: install the package `chromium` to run the tests in a browser.")
    arguments = ["--disable-dev-shm-usage"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium refuses to start its sandbox as root
    return {**browser_type_launch_args, "executable_path": browser, "args": arguments}
