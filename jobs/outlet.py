"""How frames leave for one viewer: straight into its socket where the server lets us (jobs.wire), or by a task of its own anywhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from websockets.frames import Frame as WireFrame
from websockets.frames import Opcode

EXTENSION = "bonsai.outlet"  # in the scope, when the server has an outlet of its own
QUEUE_FRAMES = 64
Send = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True)
class Frame:
    """One message for all who get it, and the number of its last event."""

    text: str
    last_seq: int

    @cached_property
    def wire(self) -> bytes:
        """The message as it goes over the wire; what a server sends is never masked, so it is the same for everyone (RFC 6455, 5.1)."""
        return WireFrame(Opcode.TEXT, self.text.encode()).serialize(mask=False)


class Outlet(Protocol):
    """The sending end of one viewer. Nothing here ever waits for the viewer, except `ready`."""

    def offer(self, frame: Frame) -> bool:
        """Hand over a frame; False when too much is unsent already. To one that is leaving, nothing is sent."""

    async def ready(self) -> None:
        """Wait until there is room for a large frame, or nobody to send it to."""

    def close(self, code: int) -> None:
        """Say goodbye; what was handed over before may still go out."""

    def end(self) -> None:
        """The viewer is gone."""


class TaskOutlet:
    """A queue and a task that sends from it, for any ASGI server."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._frames: asyncio.Queue[Frame] = asyncio.Queue(QUEUE_FRAMES)
        self._idle = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def offer(self, frame: Frame) -> bool:
        if self._task.done():
            return True
        try:
            self._frames.put_nowait(frame)
        except asyncio.QueueFull:
            return False
        self._idle.clear()
        return True

    async def ready(self) -> None:
        await self._idle.wait()

    def close(self, code: int) -> None:
        self.end()
        self._task = asyncio.create_task(self._close(code))

    def end(self) -> None:
        self._task.cancel()
        self._idle.set()

    async def _run(self) -> None:
        try:
            while True:
                if self._frames.empty():
                    self._idle.set()
                frame = await self._frames.get()
                await self._send({"type": "websocket.send", "text": frame.text})
        except OSError:  # the viewer went away in the middle of a frame; the server says so as a message too
            return
        finally:
            self._idle.set()

    async def _close(self, code: int) -> None:
        try:
            await self._send({"type": "websocket.close", "code": code})
        except OSError:
            return


def outlet_for(scope: Mapping[str, Any], send: Send) -> Outlet:
    """The server's own outlet of this socket, or one that works with every server."""
    own: Outlet | None = scope.get("extensions", {}).get(EXTENSION)
    return own or TaskOutlet(send)
