"""Queue messages as JSON: whoever can write the queue's file must not be able to run code with it."""

from __future__ import annotations

import json
from typing import Any

from huey.registry import Message
from huey.serializer import Serializer


class JsonSerializer(Serializer):
    """Replaces huey's pickle. A task carries a job's id and nothing else, so JSON is enough."""

    def _serialize(self, data: Any) -> bytes:
        body = {"message": list(data)} if isinstance(data, Message) else {"value": data}
        return json.dumps(body, allow_nan=False).encode()

    def _deserialize(self, data: bytes) -> Any:
        body = json.loads(bytes(data))
        return Message(*body["message"]) if "message" in body else body["value"]
