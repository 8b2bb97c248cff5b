"""The web process of the study "fanout": the studio's own sockets, and beside them channels' group_send, to be compared in one process.

`/ws/group/` is what the documentation of channels teaches: a consumer that joins a group of the in-memory layer. `/burst` sends the same texts either way.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any
from urllib.parse import parse_qs

from channels.generic.websocket import AsyncWebsocketConsumer
from channels.layers import InMemoryChannelLayer, channel_layers
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from channels.sessions import CookieMiddleware
from django.core.asgi import get_asgi_application
from django.urls import path

pages = get_asgi_application()  # sets Django up, so everything below may import models

from jobs.bench.writer import row  # noqa: E402
from jobs.outlet import Frame  # noqa: E402
from jobs.pump import pump  # noqa: E402
from jobs.routing import websocket_urlpatterns  # noqa: E402

GROUP = "watched"
layer = InMemoryChannelLayer()
channel_layers.set(GROUP, layer)
numbers = count(2)  # a run begins with one event
grouped = count(2)


class GroupViewer(AsyncWebsocketConsumer):
    """A viewer that hears what is sent to a group."""

    channel_layer_alias = GROUP

    async def connect(self) -> None:
        await self.channel_layer.group_add(GROUP, self.channel_name)
        await self.accept()

    async def frame(self, message: dict[str, Any]) -> None:
        """One message of the group."""
        await self.send(text_data=message["text"])

    async def disconnect(self, code: int) -> None:
        await self.channel_layer.group_discard(GROUP, self.channel_name)


async def burst(way: str, num: int, job: str) -> float:
    """Send `num` frames of one event each, as fast as this way can; returns when it began."""
    began = time.time()
    for _ in range(num):
        seq = next(numbers if way == "pump" else grouped)
        event = {"seq": seq, "time": time.time(), "kind": "metric", "step": seq, "data": {"rows": [row(seq)]}}
        text = json.dumps({"type": "events", "events": [event], "last_seq": seq})
        if way == "pump":
            await pump().publish(pump().topics[uuid.UUID(job)], Frame(text, seq))
        else:
            await layer.group_send(GROUP, {"type": "frame", "text": text})
    return began


async def http(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    """`/burst` starts a burst; everything else is the studio's."""
    if scope["path"] != "/burst":
        await pages(scope, receive, send)
        return
    asked = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
    body = json.dumps({"began": await burst(asked["way"], int(asked["num"]), asked["job"])}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


application = ProtocolTypeRouter(
    {
        "http": http,
        "websocket": AllowedHostsOriginValidator(
            CookieMiddleware(URLRouter([path("ws/group/", GroupViewer.as_asgi()), *websocket_urlpatterns]))
        ),
    }
)
