"""Carries new events to everyone who watches: one task per web process reads what is new, encodes it once for each job, and fans out.

Nothing is kept for a client: it knows the last number it saw, and asks for what comes after it. A client that does not read is dropped
and comes back with its number.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from django.db import DatabaseError, connection
from django.db.models import TextField
from django.db.models.functions import Cast

from jobs.models import Event, Job
from jobs.wake import Bell

logger = logging.getLogger(__name__)
FRAME_SECONDS = 0.1  # at most ten frames a second on average …
BURST_FRAMES = 3  # … of which so many may follow each other at once after a silence
POLL_SECONDS = 1.0
FRAME_EVENTS = 1000
FRAME_CHARS = 2 << 20  # an event of a backlog may hold hundreds of steps
MAX_BACKLOG = 5000
QUEUE_FRAMES = 64
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Frame:
    """One message, encoded once for all who get it, and the number of its last event."""

    text: str
    last_seq: int


@dataclass(eq=False)
class Viewer:
    """One open socket. `start` is where its live frames begin; what came before it reads by itself."""

    start: int
    frames: asyncio.Queue[Frame | None] = field(default_factory=lambda: asyncio.Queue(QUEUE_FRAMES))
    dropped: bool = False

    def offer(self, frame: Frame | None) -> None:
        """Hand over a frame (None: the job is gone); a viewer that does not keep up is dropped."""
        try:
            self.frames.put_nowait(frame)
        except asyncio.QueueFull:
            self.dropped = True


@dataclass(eq=False)
class _Topic:
    cursor: int
    viewers: set[Viewer] = field(default_factory=set)
    spent: float = 0.0  # until when the frames that were sent use up the rate
    next_frame: float = 0.0


class Pump:
    """The watchers of one event loop and the task that serves them. It runs while somebody watches."""

    def __init__(self) -> None:
        self.topics: dict[uuid.UUID, _Topic] = {}
        self._task: asyncio.Task[None] | None = None
        self._rung = asyncio.Event()
        self._dirty: set[uuid.UUID] = set()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pump")

    async def join(self, job_id: uuid.UUID) -> Viewer | None:
        """Start to watch a job; None when it does not exist."""
        if job_id not in self.topics:
            last = await self.read(lambda: Job.objects.filter(pk=job_id).values_list("last_seq", flat=True).first())
            if last is None:
                return None
            self.topics.setdefault(job_id, _Topic(cursor=last))
        topic = self.topics[job_id]
        viewer = Viewer(start=topic.cursor)
        topic.viewers.add(viewer)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return viewer

    def leave(self, job_id: uuid.UUID, viewer: Viewer) -> None:
        """Stop watching."""
        topic = self.topics.get(job_id)
        if topic is not None:
            topic.viewers.discard(viewer)
            if not topic.viewers:
                del self.topics[job_id]
                self._rung.set()

    async def read(self, question: Callable[[], Answer]) -> Answer:
        """Ask the database in the pump's own thread."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, _asked, question)

    async def backlog(self, job_id: uuid.UUID, after: int, upto: int) -> Frame | None:
        """The next events after a number that a newcomer has not seen. None means: too far back, read the series first."""
        return await self.read(lambda: _backlog(job_id, after, upto))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        bell = Bell()
        loop.add_reader(bell.socket.fileno(), self._hear, bell)
        try:
            polled = 0.0
            while self.topics:
                now = loop.time()
                if now - polled >= POLL_SECONDS:
                    polled, self._dirty = now, set(self.topics)
                due = [
                    job_id for job_id in self._dirty if job_id in self.topics and self.topics[job_id].next_frame <= now
                ]
                for job_id in due:
                    self._dirty.discard(job_id)
                    await self._serve(job_id)
                later = [self.topics[job_id].next_frame for job_id in self._dirty if job_id in self.topics]
                pause = max(0.0, min([polled + POLL_SECONDS, *later]) - loop.time())
                try:
                    await asyncio.wait_for(self._rung.wait(), pause)
                except TimeoutError:
                    continue
                finally:
                    self._rung.clear()
        finally:
            loop.remove_reader(bell.socket.fileno())
            bell.close()

    def _hear(self, bell: Bell) -> None:
        known = {str(job_id): job_id for job_id in self.topics}
        fresh = {known[topic] for topic in bell.heard() if topic in known} - self._dirty
        self._dirty |= fresh
        if fresh:
            self._rung.set()

    async def _serve(self, job_id: uuid.UUID) -> None:
        topic = self.topics[job_id]
        try:
            frame, more = await self.read(lambda: _next_frame(job_id, topic.cursor))
        except DatabaseError:
            logger.warning("The database does not answer; live views wait.", exc_info=True)
            return
        if frame is not None:
            topic.cursor = frame.last_seq
            now = asyncio.get_running_loop().time()
            topic.spent = max(topic.spent, now) + FRAME_SECONDS
            topic.next_frame = topic.spent - (BURST_FRAMES - 1) * FRAME_SECONDS
        if frame is not None or more is None:
            for viewer in tuple(topic.viewers):
                viewer.offer(frame)
        if more:
            self._dirty.add(job_id)


_pumps: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Pump] = weakref.WeakKeyDictionary()


def pump() -> Pump:
    """The pump of this process (of this event loop, to be exact)."""
    return _pumps.setdefault(asyncio.get_running_loop(), Pump())


def _asked(question: Callable[[], Answer]) -> Answer:
    try:
        return question()
    except DatabaseError:
        connection.close()
        raise


def _backlog(job_id: uuid.UUID, after: int, upto: int) -> Frame | None:
    first = Job.objects.filter(pk=job_id).values_list("first_seq", flat=True).first()
    if first is None or after + 1 < first or upto - after > MAX_BACKLOG or after > upto:
        return None
    return _frame(job_id, after, upto)


def _next_frame(job_id: uuid.UUID, cursor: int) -> tuple[Frame | None, bool | None]:
    """What is new, and whether there is more; (None, None) when the job was deleted."""
    now = Job.objects.filter(pk=job_id).values_list("last_seq", "first_seq").first()
    if now is None:
        return None, None
    last, first = now
    if last <= cursor:
        return None, False
    if cursor + 1 < first:
        return Frame(json.dumps({"type": "resync", "first": first}), last), False
    frame = _frame(job_id, cursor, last)
    return frame, frame is not None and frame.last_seq < last


def _frame(job_id: uuid.UUID, after: int, upto: int) -> Frame | None:
    """Events as one message. Their data goes out as the text in which it is stored."""
    rows = (
        Event.objects.filter(job_id=job_id, seq__gt=after, seq__lte=upto)
        .order_by("seq")
        .annotate(text=Cast("data", TextField()))
        .values_list("seq", "time", "kind", "step", "text")[:FRAME_EVENTS]
    )
    events: list[str] = []
    size = last = 0
    for seq, moment, kind, step, text in rows.iterator(chunk_size=100):
        size += len(text)
        if events and size > FRAME_CHARS:
            break
        events.append(
            f'{{"seq":{seq},"time":{json.dumps(moment)},"kind":{json.dumps(kind)},"step":{step},"data":{text}}}'
        )
        last = seq
    return Frame(f'{{"type":"events","events":[{",".join(events)}],"last_seq":{last}}}', last) if events else None
