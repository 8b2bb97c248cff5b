"""Bells between processes: a datagram says "look again" about one topic. Nothing depends on a bell being heard; polling is the net.

Everyone who waits binds a socket in `var/wake/`; whoever changed something rings all of them. A topic is a job's id, or "queue".
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from django.db import transaction

from jobs.places import wake_folder

QUEUE = "queue"
_MAX_PATH = 100  # a socket's path may have about 104 bytes
_sender_lock = threading.Lock()
_sender: socket.socket | None = None
_sender_pid = 0


def ring(topic: str) -> None:
    """Wake everyone at once. Never blocks and never fails: a bell that nobody hears is replaced by the next look."""
    folder = wake_folder()
    try:
        names = [name for name in os.listdir(folder) if name.endswith(".sock")]
    except FileNotFoundError:
        return
    with _addressed(folder) as base:
        for name in names:
            try:
                _socket().sendto(topic.encode(), f"{base}/{name}")
            except ConnectionRefusedError:  # its owner died without taking it down
                (folder / name).unlink(missing_ok=True)
            except OSError:  # gone already, or its buffer is full of bells
                continue


def ring_on_commit(topic: str) -> None:
    """Ring once the change that it is about can be seen."""
    transaction.on_commit(lambda: ring(topic))


class Bell:
    """The waiting end: a bound socket that asyncio or a thread can watch."""

    def __init__(self) -> None:
        folder = wake_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.sock"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        with _addressed(folder) as base:
            self.socket.bind(f"{base}/{self.path.name}")

    def heard(self) -> set[str]:
        """Every topic that was rung since the last call."""
        topics: set[str] = set()
        while True:
            try:
                topics.add(self.socket.recv(200).decode(errors="replace"))
            except BlockingIOError:
                return topics

    def close(self) -> None:
        self.socket.close()
        self.path.unlink(missing_ok=True)


def _socket() -> socket.socket:
    global _sender, _sender_pid
    with _sender_lock:
        if _sender is None or _sender_pid != os.getpid():
            _sender, _sender_pid = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), os.getpid()
            _sender.setblocking(False)
        return _sender


@contextlib.contextmanager
def _addressed(folder: Path) -> Iterator[str]:
    """The folder, spelled short enough for a socket address."""
    if len(str(folder)) + 30 <= _MAX_PATH or not sys.platform.startswith("linux"):
        yield str(folder)
        return
    handle = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


class Ears(threading.Thread):
    """Listens in the background of one process and sets the flags of whoever waits for a topic."""

    def __init__(self) -> None:
        super().__init__(name="wake", daemon=True)
        self.bell = Bell()
        self._flags: dict[str, list[threading.Event]] = {}
        self._lock = threading.Lock()
        self._open = True

    def listen(self, topic: str) -> threading.Event:
        """A flag that is set whenever somebody rings about `topic`."""
        flag = threading.Event()
        with self._lock:
            self._flags.setdefault(topic, []).append(flag)
        return flag

    def ignore(self, topic: str, flag: threading.Event) -> None:
        """Stop setting a flag."""
        with self._lock:
            flags = self._flags.get(topic, [])
            if flag in flags:
                flags.remove(flag)
            if not flags:
                self._flags.pop(topic, None)

    def run(self) -> None:
        while self._open:
            if select.select([self.bell.socket], [], [], 1.0)[0]:
                self.tell(self.bell.heard())

    def tell(self, topics: set[str]) -> None:
        with self._lock:
            for topic in topics:
                for flag in self._flags.get(topic, []):
                    flag.set()

    def close(self) -> None:
        self._open = False
        self.join(timeout=3)
        self.bell.close()
