"""uvicorn's websockets, with a way for frames that were encoded once and go to many. Chosen by `--ws jobs.wire:SharedFrames`.

A thousand sends through ASGI are a thousand coroutines that encode, and may compress, the same text. Here the same bytes are put into every socket's buffer.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from jobs.outlet import EXTENSION, Frame

MAX_UNSENT = 512 << 10  # bytes that wait in this process for one viewer; the bytes themselves are shared
SEND_BUFFER = (
    64 << 10
)  # bytes that wait in the kernel for one viewer: without a limit it keeps megabytes for one that does not read
CLOSE_SECONDS = 5.0


class SharedFrames(WebSocketsSansIOProtocol):
    """The protocol of one socket; its application finds an outlet in the scope."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        link = transport.get_extra_info("socket")
        if link is not None:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    async def run_asgi(self) -> None:
        cast(dict[str, Any], self.scope["extensions"])[EXTENSION] = SocketOutlet(self)
        await super().run_asgi()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.loop.call_later(
            CLOSE_SECONDS, self.transport.abort
        )  # it reads nothing, so what is unsent would wait for ever


class SocketOutlet:
    """Puts frames into the buffer of a socket."""

    def __init__(self, protocol: SharedFrames) -> None:
        self._protocol = protocol

    def offer(self, frame: Frame) -> bool:
        transport = self._protocol.transport
        if self._protocol.close_sent or transport.is_closing():
            return True
        if transport.get_write_buffer_size() > MAX_UNSENT:
            return False
        transport.write(frame.wire)
        return True

    async def ready(self) -> None:
        await self._protocol.writable.wait()

    def close(self, code: int) -> None:
        protocol = self._protocol
        if protocol.close_sent or protocol.transport.is_closing():
            return
        protocol.conn.send_close(code)
        protocol.transport.write(b"".join(protocol.conn.data_to_send()))
        protocol.close_sent = True
        protocol.close_timer = protocol.loop.call_later(CLOSE_SECONDS, protocol.transport.abort)
        protocol.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": ""})
        if protocol.read_paused:  # its answer has to be read
            protocol.read_paused = False
            protocol.transport.resume_reading()

    def end(self) -> None:
        """Nothing is kept for a viewer that is gone."""
