"""manage.py up: the whole studio with one command."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections

from jobs import checks, forwarding, parts, starters
from jobs.enter import entry_token
from jobs.places import engine_socket, home

MAX_SOCKET_PATH = 100
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Command(BaseCommand):
    """Start the web server, the consumer, the engine service and who forwards curves; keep them running, and stop them together."""

    help = "Start the studio and keep it running until Ctrl-C."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--host", default=settings.BONSAI_HOST, help="address to listen on (default: BONSAI_HOST or 127.0.0.1)"
        )
        parser.add_argument(
            "--port", type=int, default=settings.BONSAI_PORT, help="port to listen on (default: BONSAI_PORT or 8000)"
        )
        parser.add_argument("--no-first-run", action="store_true", help="queue no first run on a fresh installation")

    def handle(self, *args: Any, **options: Any) -> None:
        host, port = options["host"], options["port"]
        address = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}/"
        self._prepare(host, port)
        stopping = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: stopping.set())
        call_command("migrate", verbosity=0, interactive=False)
        owner, password = starters.ensure_administrator()
        token = entry_token(owner) if host in LOOPBACK else ""
        connections.close_all()
        forwarding.since()  # what is sent from now on, and what is sent no more
        running = parts.parts(host, port)
        first = None
        try:
            for part in running:
                part.start()
            parts.remember(running, address)
            first = self._start_starters(no_run=options["no_first_run"])
            if self._wait_for_web(address, running[1], stopping):
                self._greet(address, owner.username, password, token)
            self._keep(running, address, stopping)
        finally:
            self._stop(running, first)

    def _prepare(self, host: str, port: int) -> None:
        """Everything that would go wrong later is said now."""
        elsewhere = parts.running_address()
        if elsewhere:
            raise CommandError(
                f"The studio of {home()} is running already at {elsewhere}. Stop that one first, or open it in the browser."
            )
        for message in [*checks.check_home(None), *checks.check_disk(None), *checks.check_forwarding(None)]:
            if message.is_serious():
                raise CommandError(f"{message.msg} {message.hint}")
            self.stdout.write(f"{message.msg} {message.hint}")
        if len(str(engine_socket())) > MAX_SOCKET_PATH:
            raise CommandError(
                f"The path {engine_socket()} is too long for a socket. Name a shorter one in BONSAI_ENGINE_SOCKET."
            )
        parts.clear_leftovers()
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise CommandError(
                        f"Port {port} is taken by another program. Stop it, or choose another port: "
                        f'make start ARGS="--port {port + 1}".'
                    ) from None
                raise CommandError(
                    f"The studio cannot listen on {host} port {port}: {error.strerror}. Choose another with --host and --port."
                ) from None

    def _start_starters(self, *, no_run: bool) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            str(parts.ROOT / "manage.py"),
            "starters",
            "--wait",
            "120",
            *(["--no-run"] if no_run else []),
        ]
        with (home() / "log" / "starters.log").open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=parts.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "BONSAI_HOME": str(settings.BONSAI_HOME)},
            )

    def _wait_for_web(self, address: str, web: parts.Part, stopping: threading.Event) -> bool:
        until = time.monotonic() + 60
        while time.monotonic() < until and not stopping.is_set():
            try:
                with urlopen(f"{address}api/v1/health", timeout=2):
                    return True
            except URLError:
                if web.process is not None and web.process.poll() is not None:
                    raise CommandError(
                        f"The web server could not start. Its log, {web.log}, ends with:\n{web.last_words()}"
                    ) from None
            except OSError:
                pass
            stopping.wait(0.1)
        return not stopping.is_set()

    def _greet(self, address: str, name: str, password: str, token: str) -> None:
        lines = [f"Bonsai Studio runs at {address}"]
        if token:
            lines.append(f"Open this link to enter (it works once, for half an hour): {address}enter/{token}/")
        if password:
            lines.append(
                f"Or log in as {name} with the password {password} (shown only now; change it under your name)."
            )
        if settings.BONSAI_FORWARD and (trackers := forwarding.targets()[0]):
            lines.append(f"The curves of runs are also sent to {'; and to '.join(map(str, trackers))}.")
        free = shutil.disk_usage(home()).free / 1e9
        lines.append(
            f"Data and results are kept in {home()} ({free:.0f} GB free). Stop with Ctrl-C; running jobs go on at the next start."
        )
        self.stdout.write("\n".join(lines))
        self.stdout.flush()

    def _keep(self, running: list[parts.Part], address: str, stopping: threading.Event) -> None:
        while not stopping.wait(0.5):
            if [part for part in running if part.look()]:
                parts.remember(running, address)
                self.stdout.write("A process had ended and was started again; its log says why: " + str(home() / "log"))

    def _stop(self, running: list[parts.Part], first: subprocess.Popen[bytes] | None) -> None:
        self.stdout.write("Stopping. Running jobs save their state and go on at the next start.")
        self.stdout.flush()
        if first is not None and first.poll() is None:
            first.terminate()
            first.wait()
        # The consumer first: it asks the trainings to pause and sees them do it.
        for part in sorted(running, key=lambda part: part.name != "consumer"):
            part.stop(2.5 * settings.BONSAI_GRACE_SECONDS if part.name == "consumer" else 8.0)
        parts.forget()
