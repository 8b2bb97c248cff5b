"""A port for a server that a test starts."""

from __future__ import annotations

import os
import random
import socket


def free_port() -> int:
    """A free port below those that the kernel lends to clients, so that nobody takes it between this look and the server's start."""
    draw = random.Random(os.urandom(8))
    while True:
        port = draw.randrange(20_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
