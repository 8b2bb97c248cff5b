"""The live view's socket: /ws/jobs/<id>/?after=N. Courtesy only; every event can also be asked for by its number.

Plain ASGI applications: the server speaks and a viewer only listens, so one task waits for it to leave, and nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

from django.conf import settings

from jobs.outlet import Send, outlet_for
from jobs.pump import Viewer, pump

Receive = Callable[[], Awaitable[Any]]


async def watch(scope: Any, receive: Receive, send: Send) -> None:
    """One person who watches one job. Whatever the client says is ignored."""
    await receive()  # that it wants to connect
    after = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("after", ["0"])[0]
    session_key = scope["cookies"].get(settings.SESSION_COOKIE_NAME, "")
    job_id = scope["url_route"]["kwargs"]["job_id"]
    here = pump()
    if not after.isdecimal() or len(after) > 18 or not await here.may_watch(session_key, job_id):
        await send({"type": "websocket.close"})  # before accepting: the handshake is refused
        return
    await send({"type": "websocket.accept"})
    viewer = Viewer(job_id=job_id, session_key=session_key, seq=int(after), outlet=outlet_for(scope, send))
    try:
        await here.join(viewer)
        while (await receive())["type"] != "websocket.disconnect":
            continue
    finally:
        here.leave(viewer)
        viewer.outlet.end()


async def nowhere(scope: Any, receive: Receive, send: Send) -> None:
    """Refuses a socket at any other address."""
    await receive()
    await send({"type": "websocket.close"})
