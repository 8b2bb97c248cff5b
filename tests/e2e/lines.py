"""The line between a browser and the studio, which a test may cut or silence at any byte."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

Answer = TypeVar("Answer")
PIECE = 1 << 16


@dataclass(eq=False)
class Line:
    """One connection: what it asked for first, and its two ends."""

    asked: str
    ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    silent: bool = False


class Lines:
    """Hands every connection on to a port, byte by byte. Runs in a thread of its own; use as a context manager."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.lines: set[Line] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lines", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        opening = asyncio.start_server(self._take, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(opening, self._loop).result(10)
        self.address = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._asked(self._cut, "")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut(self, job: str) -> int:
        """End the open sockets of a run without a goodbye; how many there were."""
        return self._asked(self._cut, f"GET /ws/jobs/{job}/")

    def silence(self, job: str) -> int:
        """From now on nothing arrives over the open sockets of a run, and nobody is told; how many there were."""
        return self._asked(self._silence, f"GET /ws/jobs/{job}/")

    def _cut(self, asked: str) -> int:
        found = [line for line in self.lines if line.asked.startswith(asked)]
        for line in found:
            for end in line.ends:
                end.transport.abort()
        return len(found)

    def _silence(self, asked: str) -> int:
        found = [line for line in self.lines if line.asked.startswith(asked) and not line.silent]
        for line in found:
            line.silent = True
        return len(found)

    def _asked(self, question: Callable[[str], Answer], asked: str) -> Answer:
        async def answer() -> Answer:
            return question(asked)

        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result(10)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first = await reader.readuntil(b"\r\n")
            there_reads, there_writes = await asyncio.open_connection("127.0.0.1", self.port)
        except (OSError, asyncio.IncompleteReadError):
            writer.transport.abort()  # nobody is there: no answer, as from a machine that is off
            return
        line = Line(first.decode("latin-1"), (writer, there_writes))
        self.lines.add(line)
        there_writes.write(first)
        await asyncio.gather(self._carry(reader, there_writes, line), self._carry(there_reads, writer, line, back=True))
        self.lines.discard(line)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Line, *, back: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE):
                if not (back and line.silent):
                    writer.write(piece)
                    await writer.drain()
        for end in line.ends:
            end.close()
