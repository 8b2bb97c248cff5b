"""Carries new events to everyone who watches: one task per web process reads what is new, encodes it once for each job, and puts the same
bytes into every viewer's socket.

A viewer that has arrived has no state: its number is that of its run. One that does not read is dropped, and comes back with its number.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import logging
import math
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from django.db import DatabaseError, connection
from django.db.models import TextField
from django.db.models.functions import Cast

from jobs.access import may_watch
from jobs.models import Event, Job
from jobs.outlet import Frame, Outlet
from jobs.wake import Bell

logger = logging.getLogger(__name__)
FRAME_SECONDS = 0.1  # at most ten frames a second on average …
BURST_FRAMES = 3  # … of which so many may follow each other at once after a silence
POLL_SECONDS = 1.0
RECHECK_SECONDS = 60.0
FRAME_EVENTS = 1000
FRAME_CHARS = 2 << 20  # an event of a backlog may hold hundreds of steps
MAX_BACKLOG = 5000
KEPT_BACKLOGS = 8
FAN_OUT = 250  # viewers that are served before others get their turn on the loop
TRY_AGAIN, TOO_SLOW, NOT_ALLOWED, GONE = 1013, 4008, 4403, 4404
Answer = TypeVar("Answer")


@dataclass(eq=False, kw_only=True)
class Viewer:
    """One open socket. `seq` is the number of the last event that it was given while it arrived."""

    job_id: uuid.UUID
    session_key: str
    seq: int
    outlet: Outlet
    checked: float = 0.0


@dataclass(eq=False)
class Topic:
    """One watched job: how far its viewers are, and who they are."""

    cursor: int
    viewers: set[Viewer] = field(default_factory=set)
    spent: float = 0.0  # until when the frames that were sent use up the rate
    arriving: set[Viewer] = field(default_factory=set)
    backlogs: dict[int, asyncio.Future[Frame | None]] = field(
        default_factory=dict
    )  # by the number it begins after; up to the cursor
    next_frame: float = 0.0

    def everyone(self) -> set[Viewer]:
        return self.viewers | self.arriving


class Pump:
    """The watchers of one event loop and the tasks that serve them. They run while somebody watches."""

    def __init__(self) -> None:
        self.topics: dict[uuid.UUID, Topic] = {}
        self._task: asyncio.Task[None] | None = None
        self._guard: asyncio.Task[None] | None = None
        self._rung = asyncio.Event()
        self._dirty: set[uuid.UUID] = set()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pump")
        self._door = ThreadPoolExecutor(
            1, thread_name_prefix="door"
        )  # a crowd that comes in does not hold up those inside

    async def may_watch(self, session_key: str, job_id: uuid.UUID) -> bool:
        """Ask the database whether this session may see this job."""
        return await self._ask(self._door, lambda: may_watch(session_key, job_id))

    async def join(self, viewer: Viewer) -> None:
        """Give a newcomer what came after its number, and from then on every frame of its job. Closes the socket when that cannot be."""
        try:
            if not await self._arrive(viewer):
                viewer.outlet.close(GONE)
        except DatabaseError:
            logger.warning("The database does not answer; a viewer has to come back.", exc_info=True)
            viewer.outlet.close(TRY_AGAIN)

    def leave(self, viewer: Viewer) -> None:
        """Stop watching."""
        topic = self.topics.get(viewer.job_id)
        if topic is not None:
            topic.viewers.discard(viewer)
            topic.arriving.discard(viewer)
            if not topic.everyone():
                del self.topics[viewer.job_id]
                self._rung.set()

    async def _arrive(self, viewer: Viewer) -> bool:
        """False when the job does not exist (any more)."""
        job_id = viewer.job_id
        if job_id not in self.topics:
            last = await self._ask(
                self._reader, lambda: Job.objects.filter(pk=job_id).values_list("last_seq", flat=True).first()
            )
            if last is None:
                return False
            self.topics.setdefault(job_id, Topic(cursor=last))
        topic = self.topics[job_id]
        topic.arriving.add(viewer)
        viewer.checked = asyncio.get_running_loop().time()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        if self._guard is None or self._guard.done():
            self._guard = asyncio.create_task(self._recheck())
        while viewer in topic.arriving and viewer.seq != topic.cursor:
            frame = await self._backlog(topic, viewer)
            viewer.outlet.offer(frame or Frame(json.dumps({"type": "resync"}), topic.cursor))
            viewer.seq = frame.last_seq if frame else topic.cursor
            await viewer.outlet.ready()
        if viewer in topic.arriving:  # and was not told to go in the meantime
            topic.arriving.discard(viewer)
            topic.viewers.add(viewer)
        return True

    async def _backlog(self, topic: Topic, viewer: Viewer) -> Frame | None:
        """The next events that a newcomer has not seen; None means: too far back, read the series first. Who asks the same shares the answer."""
        after, upto, job_id = viewer.seq, topic.cursor, viewer.job_id
        asked = topic.backlogs.get(after)
        if asked is None:
            if len(topic.backlogs) >= KEPT_BACKLOGS:
                del topic.backlogs[next(iter(topic.backlogs))]
            asked = asyncio.ensure_future(self._ask(self._reader, lambda: _backlog(job_id, after, upto)))
            topic.backlogs[after] = asked
        try:
            return await asyncio.shield(asked)
        except DatabaseError:
            topic.backlogs.pop(after, None)
            raise

    async def _ask(self, thread: ThreadPoolExecutor, question: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(thread, _asked, question)

    async def _recheck(self) -> None:
        """Ask again for everyone within `RECHECK_SECONDS`, a few at a time, so that a crowd that came together is not asked for at once."""
        while self.topics:
            pause = min(1.0, RECHECK_SECONDS / 4)
            await asyncio.sleep(pause)
            now = asyncio.get_running_loop().time()
            present = [viewer for topic in self.topics.values() for viewer in topic.viewers]
            waiting = [viewer for viewer in present if now - viewer.checked >= RECHECK_SECONDS / 2]
            some = math.ceil(len(present) * 2 * pause / RECHECK_SECONDS)
            due = heapq.nsmallest(some, waiting, key=lambda viewer: viewer.checked)
            pairs = {(viewer.session_key, viewer.job_id) for viewer in due}
            if not pairs:
                continue
            try:
                answers = await self._ask(self._door, lambda: {pair: may_watch(*pair) for pair in pairs})  # noqa: B023
            except DatabaseError:
                logger.warning("The database does not answer; rights are asked for later.", exc_info=True)
                continue
            for viewer in due:
                viewer.checked = now
                if not answers[viewer.session_key, viewer.job_id]:
                    self._dismiss(viewer, NOT_ALLOWED)

    def _dismiss(self, viewer: Viewer, code: int) -> None:
        self.leave(viewer)
        viewer.outlet.close(code)

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
        topic = self.topics.get(job_id)
        if topic is None:  # everyone has left
            return
        try:
            frame, more = await self._ask(self._reader, lambda: _next_frame(job_id, topic.cursor))
        except DatabaseError:
            logger.warning("The database does not answer; live views wait.", exc_info=True)
            return
        if more is None:
            for viewer in topic.everyone():
                self._dismiss(viewer, GONE)
            return
        if frame is not None:
            topic.cursor = frame.last_seq
            topic.backlogs.clear()
            now = asyncio.get_running_loop().time()
            topic.spent = max(topic.spent, now) + FRAME_SECONDS
            topic.next_frame = topic.spent - (BURST_FRAMES - 1) * FRAME_SECONDS
            await self.publish(topic, frame)
        if more:
            self._dirty.add(job_id)

    async def publish(self, topic: Topic, frame: Frame) -> None:
        """Give a frame to all who have arrived. Who arrives meanwhile gets it as backlog, for the cursor has moved already."""
        for number, viewer in enumerate(tuple(topic.viewers), start=1):
            if not viewer.outlet.offer(frame):
                self._dismiss(viewer, TOO_SLOW)
            if number % FAN_OUT == 0:
                await asyncio.sleep(0)


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
