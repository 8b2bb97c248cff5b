"""What a person may do with a job. Pages, REST and admin call these and nothing else.

Each action has `check(user)`, which says in a sentence why it is impossible now (or None), and `execute(user)`, which does it or raises.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from django.conf import settings
from django.db import IntegrityError, transaction

from engine.core.errors import Fault, RecipeError
from jobs import sources, tasks, wake
from jobs.access import Person, may_change
from jobs.catalogue import engine
from jobs.lifecycle import Overtaken, begin, transition
from jobs.models import TERMINAL, Dataset, Job, ModelEntry, Status
from jobs.places import job_folder

MAX_KEY = 100
WAITING = (Status.QUEUED, Status.PAUSED)


class ActionRefused(Exception):
    """The action is not possible; the text says why, and `code` says it to machines."""

    def __init__(self, sentence: str, code: str = "not_possible") -> None:
        super().__init__(sentence)
        self.code = code


@dataclass
class JobAction:
    """An action on one job that exists."""

    job: Job
    slug: ClassVar[str]
    title: ClassVar[str]

    def check(self, user: Person) -> str | None:
        """Why `user` cannot do this now, or None."""
        if not may_change(user, self.job.owner_id):
            return "This job belongs to somebody else."
        return self.obstacle()

    def obstacle(self) -> str | None:
        """Why the state of the job forbids this, or None."""
        raise NotImplementedError

    def execute(self, user: Person) -> Job:
        """Do it, or raise ActionRefused with the sentence. Somebody who was quicker only makes us look again."""
        for _ in range(5):
            self.job.refresh_from_db()
            sentence = self.check(user)
            if sentence:
                raise ActionRefused(
                    sentence, "forbidden" if not may_change(user, self.job.owner_id) else "not_possible"
                )
            try:
                self.perform(user.get_username())
            except Overtaken:
                continue
            return self.job
        raise ActionRefused("The job changes faster than it can be asked. Try again in a moment.", "busy")

    def perform(self, by: str) -> None:
        raise NotImplementedError


class _Stop(JobAction):
    """Asks the child to end; the supervisor forwards the request, and a second one may be stronger than the first."""

    request: ClassVar[str]
    weaker: ClassVar[frozenset[str]]
    progressive: ClassVar[str]

    def obstacle(self) -> str | None:
        status = self.job.status
        if status == Status.STOPPING:
            if self.job.stop_request in self.weaker:
                return None
            return "The job is stopping already."
        if status in (Status.STARTING, Status.RUNNING):
            return None
        return _not_running(self.job)

    def perform(self, by: str) -> None:
        if self.job.status == Status.STOPPING:
            asked = Job.objects.filter(pk=self.job.pk, status=Status.STOPPING, stop_request=self.job.stop_request)
            if not asked.update(stop_request=self.request):
                raise Overtaken("The job ended in the meantime.")
            self.job.stop_request = self.request
            wake.ring_on_commit(str(self.job.pk))
            return
        transition(self.job, Status.STOPPING, by, self.request, message=self.progressive, stop_request=self.request)


class Pause(_Stop):
    """Save everything and give the device back; Resume goes on as if nothing had happened."""

    slug, title = "pause", "Pause"
    request, weaker, progressive = "pause", frozenset(), "Pauses at the next step and saves its state."


class StopAndKeep(_Stop):
    """End now and keep what was learned as the result."""

    slug, title = "stop", "Stop and keep"
    request, weaker, progressive = (
        "stop",
        frozenset({"pause"}),
        "Stops at the next step and exports what it has learned.",
    )


class Cancel(_Stop):
    """End without a result; the checkpoints stay until the job is deleted."""

    slug, title = "cancel", "Cancel"
    request, weaker, progressive = "cancel", frozenset({"pause", "stop"}), "Stops at the next step, without a result."

    def obstacle(self) -> str | None:
        return None if self.job.status in WAITING else super().obstacle()

    def perform(self, by: str) -> None:
        if self.job.status in WAITING:
            started = (
                "before it started" if self.job.status == Status.QUEUED and not self.job.attempt else "while it waited"
            )
            transition(self.job, Status.CANCELLED, by, message=f"Cancelled {started}.")
        else:
            super().perform(by)


class Resume(JobAction):
    """Queue a paused job again; it goes on from its last checkpoint."""

    slug, title = "resume", "Resume"

    def obstacle(self) -> str | None:
        if self.job.status == Status.PAUSED:
            return None
        return "Only a paused job can be resumed." + (
            " Use “Again” for a new run." if self.job.status in TERMINAL else ""
        )

    def perform(self, by: str) -> None:
        transition(self.job, Status.QUEUED, by, "resumed", message="Waits for its turn to go on.")
        tasks.enqueue(self.job.pk)


class Purge(JobAction):
    """Delete a job that has ended, with its events, checkpoints and result."""

    slug, title = "delete", "Delete"

    def obstacle(self) -> str | None:
        return None if self.job.status in TERMINAL else "A job that has not ended cannot be deleted. Cancel it first."

    def perform(self, by: str) -> None:
        folder = job_folder(self.job.pk)
        with transaction.atomic():
            deleted, _ = Job.objects.filter(pk=self.job.pk, status=self.job.status).delete()
            if not deleted:
                raise ActionRefused("The job was deleted already.", "gone")
            transaction.on_commit(lambda: shutil.rmtree(folder, ignore_errors=True))
            wake.ring_on_commit(str(self.job.pk))


@dataclass
class Again(JobAction):
    """Start a new job with the same recipe; it points back to this one."""

    slug: ClassVar[str] = "again"
    title: ClassVar[str] = "Again"
    idempotency_key: str = ""

    def check(self, user: Person) -> str | None:
        return super().check(user) or self._create(user).check(user)

    def obstacle(self) -> str | None:
        return None

    def execute(self, user: Person) -> Job:
        sentence = self.check(user)
        if sentence:
            raise ActionRefused(sentence)
        return self._create(user).execute(user)

    def _create(self, user: Person) -> Create:
        return Create(
            owner=user,
            name=self.job.name,
            recipe=self.job.request,
            again_of=self.job,
            idempotency_key=self.idempotency_key,
        )


@dataclass(kw_only=True)
class Create:
    """Check a recipe with the engine and queue it as a job.

    In the recipe, `data.source` is "dataset:<id>" or "starter:NAME", and `model.source` is "model:<id>", "starter:NAME", "artifact:<id>"
    or "hub:owner/name"; the arguments `dataset` and `model` fill them in. A path of this machine is refused.
    """

    owner: Person
    recipe: Mapping[str, Any]
    name: str = ""
    dataset: Dataset | None = None
    model: ModelEntry | None = None
    again_of: Job | None = None
    fork_step: int | None = None  # of `again_of`, where the new run goes on
    idempotency_key: str = ""
    priority: int = 0
    lay: Callable[[Job], None] | None = (
        None  # prepares the folder of the new job, or raises; undone when the job is not begun
    )

    def check(self, user: Person) -> str | None:
        """Why `user` cannot queue a job now, or None. What is wrong with the recipe itself, `execute` says."""
        if not user.is_authenticated or not user.is_active:
            return "Log in to start a run."
        if not may_change(user, self.owner.pk):
            return "A run can only be started in one's own name."
        if len(self.idempotency_key) > MAX_KEY:
            return f"The idempotency key is longer than {MAX_KEY} characters."
        if Job.objects.filter(owner_id=self.owner.pk, status=Status.QUEUED).count() >= settings.BONSAI_MAX_WAITING_JOBS:
            return f"You have {settings.BONSAI_MAX_WAITING_JOBS} jobs waiting already. Wait for some of them or cancel them."
        return None

    def resolve(self) -> sources.Resolved:
        """The recipe with every reference looked up; raises RecipeError with all that is wrong about them."""
        return sources.resolve(self.recipe, self.owner, name=self.name, dataset=self.dataset, model=self.model)

    def inspect(self) -> dict[str, Any]:
        """What the engine says about the recipe: resolved recipe, faults, suggestions, estimate, composition, verdicts. Queues nothing."""
        return engine().call("check", recipe=self.resolve().recipe)

    def execute(self, user: Person) -> Job:
        """Queue the job; raises ActionRefused, or RecipeError with every fault. The same idempotency key gives the same job."""
        sentence = self.check(user)
        resolved = None if sentence else self.resolve()
        if resolved is not None:
            earlier = self._earlier(resolved.request)
            if earlier is not None:
                return earlier
        if resolved is None:
            raise ActionRefused(str(sentence), "not_possible" if user.is_authenticated else "forbidden")
        answer = engine().call("check", recipe=resolved.recipe)
        if answer["faults"]:
            raise RecipeError([Fault(**fault) for fault in answer["faults"]])
        job = Job(
            id=uuid.uuid4(),
            owner_id=cast(int, self.owner.pk),
            name=resolved.name,
            dataset=resolved.dataset,
            model=resolved.model,
            again_of=self.again_of,
            fork_step=self.fork_step,
            request=resolved.request,
            recipe=answer["recipe"],
            suggestions=answer.get("suggestions", []),
            estimate=answer.get("estimate", {}),
            fingerprint=answer["fingerprint"],
            idempotency_key=self.idempotency_key,
            priority=self.priority,
            total_steps=answer.get("estimate", {}).get("total_steps") or 0,
        )
        if self.lay is not None:
            self.lay(job)
        try:
            with transaction.atomic():
                begin(job, user.get_username())
                tasks.enqueue(job.pk)
        except IntegrityError:
            shutil.rmtree(job_folder(job.pk), ignore_errors=True)
            earlier = self._earlier(resolved.request)
            if earlier is None:
                raise
            return earlier
        return job

    def _earlier(self, request: Mapping[str, Any]) -> Job | None:
        if not self.idempotency_key:
            return None
        job = Job.objects.filter(owner_id=self.owner.pk, idempotency_key=self.idempotency_key).first()
        if job is not None and job.request != request:
            raise ActionRefused("This idempotency key was used for a different recipe. Choose a new key.", "key_reused")
        return job


ACTIONS: tuple[type[JobAction], ...] = (Pause, Resume, StopAndKeep, Cancel, Again, Purge)


def available(job: Job, user: Person) -> dict[str, str | None]:
    """Every action on `job` by its slug: None when it is possible, else the sentence why not."""
    return {action.slug: action(job).check(user) for action in ACTIONS}


def _not_running(job: Job) -> str:
    status = Status(job.status)
    if status in TERMINAL:
        return f"The job has {'been cancelled' if status is Status.CANCELLED else status.label.lower()} already."
    return f"The job is {status.label.lower()}; only a running job can be stopped or paused."
