"""The live view's socket: /ws/jobs/<id>/?after=N. Courtesy only; every event can also be asked for by its number."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from typing import Any
from urllib.parse import parse_qs

from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.contrib.auth import get_user_model
from django.contrib.sessions.models import Session
from django.utils import timezone

from jobs.access import jobs_for
from jobs.pump import Pump, Viewer, pump

RECHECK_SECONDS = 60.0
TOO_SLOW, NOT_ALLOWED, GONE = 4008, 4403, 4404


class JobConsumer(AsyncWebsocketConsumer):
    """One person who watches one job. The server speaks; whatever the client says is ignored."""

    viewer: Viewer | None = None
    task: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        self.job_id: uuid.UUID = self.scope["url_route"]["kwargs"]["job_id"]
        after = parse_qs(self.scope.get("query_string", b"").decode("latin-1")).get("after", ["0"])[0]
        if not after.isdecimal() or len(after) > 18 or not await self._may_watch():
            await self.close()  # before accepting: the handshake is refused
            return
        self.pump: Pump = pump()
        self.viewer = await self.pump.join(self.job_id)
        if self.viewer is None:
            await self.close()
            return
        await self.accept()
        self.task = asyncio.create_task(self._speak(self.viewer, int(after)))

    async def disconnect(self, code: int) -> None:
        if self.viewer is not None:
            self.pump.leave(self.job_id, self.viewer)
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.task

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Nothing a client says means anything here."""

    async def _speak(self, viewer: Viewer, after: int) -> None:
        if not await self._catch_up(viewer, after):
            await self.send(json.dumps({"type": "resync"}))
        checked = asyncio.get_running_loop().time()
        while True:
            if viewer.dropped:
                await self.close(TOO_SLOW)
                return
            frame_or_nothing: Any = False
            with contextlib.suppress(TimeoutError):
                frame_or_nothing = await asyncio.wait_for(viewer.frames.get(), RECHECK_SECONDS)
            if frame_or_nothing is None:
                await self.close(GONE)
                return
            if frame_or_nothing:
                await self.send(frame_or_nothing.text)
            if asyncio.get_running_loop().time() - checked >= RECHECK_SECONDS:
                checked = asyncio.get_running_loop().time()
                if not await self._may_watch():
                    await self.close(NOT_ALLOWED)
                    return

    async def _catch_up(self, viewer: Viewer, after: int) -> bool:
        """Send what happened between the client's number and the first live frame; False when that is too much."""
        while after != viewer.start:
            frame = await self.pump.backlog(self.job_id, after, viewer.start)
            if frame is None:
                return False
            await self.send(frame.text)
            after = frame.last_seq
        return True

    @database_sync_to_async
    def _may_watch(self) -> bool:
        """Logged in still, and allowed to see this job: asked anew each time, for sessions end and rights change."""
        user = self.scope["user"]
        key = getattr(self.scope.get("session"), "session_key", None)
        if not user.is_authenticated or (
            key and not Session.objects.filter(pk=key, expire_date__gt=timezone.now()).exists()
        ):
            return False
        fresh = get_user_model().objects.filter(pk=user.pk, is_active=True).first()
        return fresh is not None and jobs_for(fresh).filter(pk=self.job_id).exists()


class Nowhere(AsyncWebsocketConsumer):
    """Refuses a socket at any other address."""

    async def connect(self) -> None:
        await self.close()
