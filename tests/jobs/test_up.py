"""One command starts everything, tells where it is, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any
from urllib.request import HTTPCookieProcessor, build_opener, urlopen

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.test import Client

from jobs import parts, starters
from jobs.enter import entry_token
from jobs.processes import is_alive, process_start
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def administrator(db: None) -> User:
    return User.objects.create_superuser("admin", password="a long password")


def test_the_link_opens_the_studio_once(administrator: User) -> None:
    token = entry_token(administrator)
    client, other = Client(), Client()
    answer = client.get(f"/enter/{token}/")
    assert answer.status_code == 302 and answer["Location"] == "/" and "no-store" in answer["Cache-Control"]
    assert client.session["_auth_user_id"] == str(administrator.pk)
    again = other.get(f"/enter/{token}/")
    assert again.status_code == 410 and "_auth_user_id" not in other.session
    assert client.get(f"/enter/{token}/").status_code == 302, "who is inside already is not shut out"


@pytest.mark.parametrize("spoil", ["old", "forged", "inactive", "new password"])
def test_a_stale_link_opens_nothing(administrator: User, spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    token = entry_token(administrator)
    if spoil == "old":
        now = time.time()
        monkeypatch.setattr("django.core.signing.time.time", lambda: now + 1801)
    elif spoil == "forged":
        token = token[:-2] + ("AA" if token[-2:] != "AA" else "BB")
    elif spoil == "inactive":
        User.objects.update(is_active=False)
    else:
        administrator.set_password("another password")
        administrator.save()
    client = Client()
    assert client.get(f"/enter/{token}/").status_code == 410
    assert "_auth_user_id" not in client.session


def test_the_first_administrator_is_made_once(db: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BONSAI_ADMIN_PASSWORD", raising=False)
    monkeypatch.setenv("BONSAI_ADMIN_USER", "gardener")
    user, password = starters.ensure_administrator()
    assert user.username == "gardener" and user.is_superuser and user.check_password(password) and len(password) >= 16
    assert starters.ensure_administrator() == (user, "")


def test_a_given_password_is_used_and_not_printed(db: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BONSAI_ADMIN_PASSWORD", "given beforehand")
    user, shown = starters.ensure_administrator()
    assert shown == "" and user.check_password("given beforehand")


def test_a_taken_port_is_said_in_a_sentence(db: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CommandError, match=f"Port {port} is taken by another program.*--port {port + 1}"):
            call_command("up", port=port)


def test_a_second_studio_of_the_same_folder_is_refused(db: None) -> None:
    parts.remember([], "http://127.0.0.1:1/")
    try:
        with pytest.raises(CommandError, match=r"running already at http://127\.0\.0\.1:1/"):
            call_command("up", port=0)
    finally:
        parts.forget()


def test_a_part_that_falls_is_started_again_later_each_time(bonsai_home: Path) -> None:
    part = parts.Part("short", [sys.executable, "-c", "raise SystemExit(3)"])
    part.start()
    first = part.process
    assert first is not None and first.wait(10) == 3
    waits = []
    for _ in range(3):
        began = time.monotonic()
        while not part.look():
            assert time.monotonic() - began < 10
            time.sleep(0.01)
        waits.append(time.monotonic() - began)
        assert part.process is not None
        part.process.wait(10)
    assert waits[0] < waits[1] < waits[2]


def test_what_a_killed_supervisor_left_is_ended(bonsai_home: Path) -> None:
    part = parts.Part("long", [sys.executable, "-c", "import time; time.sleep(60)"])
    part.start()
    assert part.process is not None
    pid, started = part.process.pid, process_start(part.process.pid)
    parts.remember([part], "http://127.0.0.1:1/")
    parts.clear_leftovers()
    part.process.wait(5)
    assert not is_alive(pid, started)
    parts.forget()


# ── the whole of it ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], str]]]:
    """Start the studio of one folder; returns the process and what it said until it was ready."""
    port = free_port()
    environment = {
        **os.environ,
        "BONSAI_HOME": str(tmp_path),
        "BONSAI_THREADS": "1",
        "BONSAI_ENGINE_SOCKET": str(Path(tempfile.gettempdir()) / f"bonsai-up-{port}.sock"),
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("BONSAI_ADMIN_PASSWORD", None)
    begun: list[subprocess.Popen[str]] = []

    def begin() -> tuple[subprocess.Popen[str], str]:
        up = subprocess.Popen(
            [sys.executable, str(ROOT / "manage.py"), "up", "--port", str(port)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        begun.append(up)
        said = ""
        assert up.stdout is not None
        while "Stop with Ctrl-C" not in said:
            line = up.stdout.readline()
            assert line, f"it ended: {said}"
            said += line
        return up, said

    yield begin
    for up in begun:
        if up.poll() is None:
            up.terminate()
            up.wait(120)


def until(holds: Callable[[], Any], seconds: float = 90.0) -> Any:
    end = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
    return answer


@pytest.mark.slow
def test_a_newcomer_finds_a_run_that_is_learning_and_it_survives_everything(
    start: Callable[[], tuple[subprocess.Popen[str], str]], tmp_path: Path
) -> None:
    def ask(question: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(tmp_path / "db.sqlite3", timeout=20)) as database:
            return database.execute(question).fetchall()

    up, said = start()
    link = re.search(r"http://\S+/enter/\S+/", said)
    assert link and re.search(r"log in as admin with the password \S{16}", said)
    browser = build_opener(HTTPCookieProcessor(CookieJar()))
    with browser.open(link.group()) as page:
        assert page.status == 200 and "/enter/" not in page.url and "/login" not in page.url
    until(lambda: ask("SELECT status FROM jobs_job WHERE status = 'running' AND done_steps > 1"))
    assert (
        ask("SELECT count(*) FROM jobs_dataset")[0][0] >= 3 and ask("SELECT count(*) FROM jobs_modelentry")[0][0] >= 1
    )
    pids = [pid for pid, _ in parts_of(tmp_path)]

    up.send_signal(signal.SIGINT)  # Ctrl-C
    assert up.wait(100) == 0
    assert not any(process_start(pid) for pid in pids)
    assert ask("SELECT status, crashes FROM jobs_job") == [("queued", 0)]
    before = ask("SELECT done_steps FROM jobs_job")[0][0]
    assert before > 1 and not (tmp_path / "up.json").exists()

    began = time.monotonic()
    up, said = start()
    print(f"second start: {time.monotonic() - began:.1f} s")
    assert "password" not in said, "it is shown once"
    assert time.monotonic() - began < 30
    until(lambda: ask(f"SELECT 1 FROM jobs_job WHERE done_steps > {before} AND attempt = 2"))

    child = ask("SELECT child_pid FROM jobs_job")[0][0]
    os.killpg(up.pid, signal.SIGKILL)  # the supervisor alone: its parts have sessions of their own
    up.wait(10)
    assert process_start(child), "the training goes on without any of us"
    up, said = start()
    until(lambda: ask("SELECT 1 FROM jobs_job WHERE attempt = 2 AND status IN ('running', 'succeeded')"))
    assert len(ask("SELECT id FROM jobs_job")) == 1, "the first run is queued once"
    with urlopen(re.search(r"http://127\S+/", said).group() + "api/v1/health") as answer:  # type: ignore[union-attr]
        assert answer.status == 200


def parts_of(home: Path) -> list[tuple[int, int]]:
    return [tuple(pair) for pair in json.loads((home / "up.json").read_text())["parts"]]
