"""A PostgreSQL server of a study's own: made in a temporary folder with the installed version's defaults, stopped and deleted afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.bench.installation import free_port

PLAIN_USERS = ("postgres", "nobody")  # the server refuses to run as root, so one of these runs it then


@contextmanager
def private_server() -> Iterator[str]:
    """The address of an empty database on a new server; empty where PostgreSQL's programs are not installed."""
    if not all(shutil.which(program) for program in ("initdb", "pg_ctl", "postgres")):
        yield ""
        return
    with tempfile.TemporaryDirectory(prefix="bonsai-postgres-", ignore_cleanup_errors=True) as name:
        user = _plain_user()
        if user is not None:
            shutil.chown(name, user)
        data, port = Path(name) / "data", free_port()
        options = f"-p {port} -k {name} -c listen_addresses=127.0.0.1"
        _say(user, name, "initdb", "-D", str(data), "-U", "bonsai", "-A", "trust", "-E", "UTF8", "--locale=C")
        _say(user, name, "pg_ctl", "-D", str(data), "-w", "-l", str(Path(name) / "log"), "-o", options, "start")
        try:
            yield f"postgresql://bonsai@127.0.0.1:{port}/postgres"
        finally:
            _say(user, name, "pg_ctl", "-D", str(data), "-w", "-m", "fast", "stop")


def version() -> str:
    """What the installed server calls itself."""
    return subprocess.run(["postgres", "--version"], capture_output=True, text=True, check=True).stdout.strip()


def _plain_user() -> str | None:
    """Who runs the server; None for the one who runs this program."""
    if os.geteuid():
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(user for user in PLAIN_USERS if user in known)


def _say(user: str | None, folder: str, *command: str) -> None:
    # The server inherits the output of pg_ctl; a pipe would stay open as long as it runs.
    subprocess.run(command, check=True, cwd=folder, user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
