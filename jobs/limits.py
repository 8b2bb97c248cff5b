"""How much one person may bring: sizes, quotas and rates, each changeable in the environment under its own name."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from django.conf import settings

MIB = 1 << 20
DEFAULTS: dict[str, int] = {
    "BONSAI_MAX_UPLOAD_BYTES": 512 * MIB,  # one file
    "BONSAI_DATA_QUOTA_BYTES": 4096 * MIB,  # all files of one person
    "BONSAI_MAX_DATASETS": 500,  # of one person
    "BONSAI_REQUESTS_PER_MINUTE": 1200,  # of one person
    "BONSAI_WRITES_PER_MINUTE": 240,
    "BONSAI_UPLOADS_PER_MINUTE": 60,
    "BONSAI_PREDICTIONS_PER_MINUTE": 120,
}
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def limit(name: str) -> int:
    """The limit called `name`: from the settings, else from the environment, else its default."""
    return int(getattr(settings, name, None) or os.environ.get(name) or DEFAULTS[name])


def in_words(num_bytes: int) -> str:
    """A size as people say it: "3.2 MB"."""
    value = float(num_bytes)
    for unit in ("bytes", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}".replace(".0 ", " ")


class BodyLimit:
    """ASGI wrapper that refuses a request whose body is larger than one upload may be, before it fills the disk.

    The body may lie about its length or not state it, so it is counted as it comes. What is too much is read and thrown away for a
    while before the refusal is sent: a browser shows the sentence only when it was allowed to finish sending.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = limit("BONSAI_MAX_UPLOAD_BYTES") + MIB  # the form around the file is not the file's fault
        if _stated_length(scope) > most:
            await _drain(receive, 4 * most)
            await _refuse(scope, send, most - MIB)
            return
        counted, too_much, answered = 0, False, False

        async def counting() -> MutableMapping[str, Any]:
            nonlocal counted, too_much
            message = await receive()
            counted += len(message.get("body", b""))
            if counted > most:
                too_much = True
                if message.get("more_body"):
                    await _drain(receive, 3 * most)
                return {"type": "http.disconnect"}
            return message

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal answered
            answered = True
            await send(message)

        await self.app(scope, counting, noting)
        if too_much and not answered:
            await _refuse(scope, send, most - MIB)


def _stated_length(scope: Scope) -> int:
    for name, value in scope.get("headers", ()):
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0


async def _drain(receive: Receive, most: int) -> None:
    while most > 0:
        message = await receive()
        most -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


async def _refuse(scope: Scope, send: Send, most: int) -> None:
    fault = {
        "where": "request",
        "what": "This upload is too large.",
        "why": f"One file may have at most {in_words(most)} here.",
        "way_out": "Send a part of the rows, or compress the table as Parquet.",
        "code": "too_large",
    }
    sentence = f"{fault['what']} {fault['why']} {fault['way_out']}"
    if str(scope["path"]).startswith("/api/"):
        problem = {
            "type": "urn:bonsai:too_large",
            "title": fault["what"],
            "status": 413,
            "detail": sentence,
            "faults": [fault],
        }
        kind, body = b"application/problem+json", json.dumps(problem).encode()
    else:
        kind, body = b"text/plain; charset=utf-8", sentence.encode()
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})
