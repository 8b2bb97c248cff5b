"""A crowd of viewers in one process: sockets that read frames, check their numbers and note how late each event came.

Run as `python -m jobs.bench.crowd`. Commands come as JSON lines on stdin, answers leave as JSON lines on stdout. The sockets speak the protocol of
RFC 6455 by themselves, because a full client costs more per frame than the server that is measured.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import sys
import time
from array import array
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

KEPT_TEXTS = 64
TEXT, CLOSE, PING = 1, 8, 9
SMALL_BUFFER = 4096


@dataclass(frozen=True)
class Heard:
    """What a frame says, read once for the whole crowd: numbers of its events, and when each was written."""

    kind: str
    seqs: tuple[int, ...] = ()
    written: tuple[float, ...] = ()


@dataclass
class Tally:
    """What a crowd heard since it was last asked."""

    num_frames: int = 0
    num_events: int = 0
    num_bytes: int = 0
    gaps: int = 0
    resyncs: int = 0
    closed: dict[str, int] = field(default_factory=dict)
    latencies: array[float] = field(default_factory=lambda: array("d"))
    first: float = 0.0
    last: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        ordered = sorted(self.latencies)
        at = {
            f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)]
            for share in (50, 95, 99)
            if ordered
        }
        return {
            **{name: value for name, value in vars(self).items() if name != "latencies"},
            **at,
            "cpu": time.process_time(),
        }


class Crowd:
    """All sockets of this process and what they heard."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.sockets: dict[str, list[Socket]] = {}
        self._texts: dict[bytes, Heard] = {}

    def read(self, text: bytes) -> Heard:
        """The meaning of a frame. All viewers of a run get the same bytes, so it is parsed once."""
        heard = self._texts.get(text)
        if heard is None:
            body = json.loads(text)
            events = body.get("events", [])
            written = tuple(
                row["written"] for event in events for row in event["data"].get("rows", []) if "written" in row
            )
            heard = Heard(body["type"], tuple(event["seq"] for event in events), written)
            if len(self._texts) >= KEPT_TEXTS:
                del self._texts[next(iter(self._texts))]
            self._texts[text] = heard
        return heard

    async def open(
        self, group: str, url: str, cookies: list[str], *, num: int, at_once: int = 20, reads: bool = True
    ) -> float:
        """Open `num` sockets, `at_once` at a time; returns the seconds it took."""
        began = time.perf_counter()
        turn = asyncio.Semaphore(at_once)

        async def one(number: int) -> None:
            async with turn:
                self.sockets.setdefault(group, []).append(
                    await connect(self, url, cookies[number % len(cookies)], reads=reads)
                )

        await asyncio.gather(*(one(number) for number in range(num)))
        return time.perf_counter() - began

    async def wait(self, num_frames: int, seconds: float) -> None:
        """Until so many frames were heard since the last tally, or the time is over."""
        until = time.monotonic() + seconds
        while self.tally.num_frames < num_frames and time.monotonic() < until:
            await asyncio.sleep(0.005)

    async def close(self, group: str) -> None:
        leaving = self.sockets.pop(group, [])
        for viewer in leaving:
            viewer.leave()
        await asyncio.gather(*(viewer.gone.wait() for viewer in leaving))


class Socket(asyncio.Protocol):
    """One viewer. It answers pings, knows the last number it heard, and counts the holes."""

    transport: asyncio.Transport

    def __init__(self, crowd: Crowd, request: bytes, *, reads: bool) -> None:
        self.crowd, self.request, self.reads = crowd, request, reads
        self.buffer = bytearray()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone = asyncio.Event()
        self.seq = 0
        self.leaving = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.opened.done():
            head, found, rest = self.buffer.partition(b"\r\n\r\n")
            if not found:
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self.opened.set_exception(ConnectionError(head.decode("latin-1")))
                return
            self.buffer = rest
            if not self.reads:
                self.transport.pause_reading()
            self.opened.set_result(None)
        while self._take_frame():
            pass

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError("The server hung up."))
        if not self.leaving:
            self.crowd.tally.closed["lost"] = self.crowd.tally.closed.get("lost", 0) + 1
        self.gone.set()

    def leave(self) -> None:
        self.leaving = True
        self.transport.resume_reading()
        self.transport.write(_masked(CLOSE, b"\x03\xe8"))
        if not self.reads:
            self.transport.abort()

    def _take_frame(self) -> bool:
        buffer = self.buffer
        if len(buffer) < 2:
            return False
        size, start = buffer[1], 2
        if size == 126:
            size, start = int.from_bytes(buffer[2:4], "big"), 4
        elif size == 127:
            size, start = int.from_bytes(buffer[2:10], "big"), 10
        if len(buffer) < start + size:
            return False
        body = bytes(buffer[start : start + size])
        kind = buffer[0]
        del buffer[: start + size]
        if kind == 0x80 | TEXT:
            self._hear(body)
        elif kind == 0x80 | PING:
            self.transport.write(_masked(10, body))
        elif kind == 0x80 | CLOSE:
            self._farewell(int.from_bytes(body[:2], "big"))
        else:
            raise ConnectionError(f"The server sent a frame that begins with {kind:#x}.")
        return True

    def _hear(self, text: bytes) -> None:
        now = time.time()
        heard, tally = self.crowd.read(text), self.crowd.tally
        tally.num_frames += 1
        tally.num_bytes += len(text)
        tally.first = tally.first or now
        tally.last = now
        if heard.kind == "resync":
            tally.resyncs += 1
        for seq in heard.seqs:
            tally.gaps += seq != self.seq + 1 and self.seq > 0
            self.seq = seq
        tally.num_events += len(heard.seqs)
        for written in heard.written:
            tally.latencies.append(now - written)

    def _farewell(self, code: int) -> None:
        if not self.leaving:
            self.crowd.tally.closed[str(code)] = self.crowd.tally.closed.get(str(code), 0) + 1
            self.leaving = True
        self.transport.write(_masked(CLOSE, code.to_bytes(2, "big")))
        self.transport.close()


async def connect(crowd: Crowd, url: str, cookie: str, *, reads: bool = True) -> Socket:
    """Open one socket; returns when the handshake is done."""
    place = urlsplit(url)
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET {place.path}?{place.query} HTTP/1.1",
        f"Host: {place.netloc}",
        f"Origin: http://{place.netloc}",
        f"Cookie: {cookie}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
    ]
    link = socket.socket()
    link.setblocking(False)
    if not reads:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(link, (place.hostname, place.port))
    _, viewer = await loop.create_connection(
        lambda: Socket(crowd, ("\r\n".join(lines) + "\r\n\r\n").encode(), reads=reads), sock=link
    )
    await viewer.opened
    return viewer


def _masked(opcode: int, body: bytes) -> bytes:
    """A short frame from client to server; the mask is zero, which the protocol allows."""
    return bytes((0x80 | opcode, 0x80 | len(body))) + bytes(4) + body


async def serve() -> None:
    """Obey commands until stdin ends: open, wait, close, take (and forget) the tally."""
    crowd = Crowd()
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        command = json.loads(line)
        verb = command.pop("do")
        answer: dict[str, Any] = {}
        if verb == "open":
            answer = {"seconds": await crowd.open(**command)}
        elif verb == "wait":
            await crowd.wait(**command)
        elif verb == "close":
            await crowd.close(command["group"])
        elif verb == "take":
            answer = {**crowd.tally.to_dict(), "open": {name: len(group) for name, group in crowd.sockets.items()}}
            crowd.tally = Tally()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(serve())
