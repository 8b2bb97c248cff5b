"""What the studio remembers: datasets, models, jobs, numbered events, artifacts, tokens, devices."""

from __future__ import annotations

import uuid
from typing import ClassVar

from django.conf import settings
from django.db import models


class Dataset(models.Model):
    """An uploaded file, exactly as it came, with what a look at it told. Without an owner it is a starter that everyone sees."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.CASCADE, related_name="datasets"
    )
    name = models.CharField(max_length=200)
    starter = models.CharField(
        max_length=100, blank=True, help_text="Name of the starter data set, for those that come with the studio."
    )
    path = models.CharField(max_length=1000, editable=False)
    format = models.CharField(max_length=10)
    bytes = models.BigIntegerField(default=0)
    sha256 = models.CharField(max_length=64)
    num_rows = models.IntegerField(default=0)
    shape = models.CharField(
        max_length=30,
        help_text="What kind of rows these are: classification, messages, instruction, text, preferences.",
    )
    columns = models.JSONField(default=list)
    mapping = models.JSONField(default=dict, help_text="Role to column, as guessed or as chosen.")
    labels = models.JSONField(default=list)
    facts = models.JSONField(default=dict)
    findings = models.JSONField(default=list, help_text="What was noticed: sentences with line numbers.")
    preview = models.JSONField(default=list, help_text="The first rows.")
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["-created"]

    def __str__(self) -> str:
        return self.name


class ModelEntry(models.Model):
    """A model that runs may start from."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.CASCADE, related_name="models"
    )
    name = models.CharField(max_length=200)
    source = models.CharField(max_length=1000, help_text="starter:NAME, folder:/path or hub:owner/name")
    sentence = models.CharField(max_length=400, blank=True)
    kind = models.CharField(max_length=20, blank=True)
    family = models.CharField(max_length=50, blank=True)
    num_parameters = models.BigIntegerField(default=0)
    facts = models.JSONField(default=dict)
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["name"]
        verbose_name = "model"

    def __str__(self) -> str:
        return self.name


class Status(models.TextChoices):
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    PAUSED = "paused"
    LOST = "lost"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED})
ACTIVE = frozenset({Status.STARTING, Status.RUNNING, Status.STOPPING})


class Job(models.Model):
    """One run. Its status has one writer, jobs.lifecycle.transition."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="jobs")
    name = models.CharField(max_length=200)
    dataset = models.ForeignKey(Dataset, null=True, on_delete=models.SET_NULL, related_name="jobs")
    model = models.ForeignKey(ModelEntry, null=True, on_delete=models.SET_NULL, related_name="jobs")
    again_of = models.ForeignKey("self", null=True, blank=True, on_delete=models.SET_NULL, related_name="repeats")
    fork_step = models.IntegerField(
        null=True,
        blank=True,
        help_text="The step of that other run at which this one goes on; empty when it began at the beginning.",
    )
    request = models.JSONField(help_text="The recipe as it was asked for.")
    recipe = models.JSONField(help_text="The recipe as it runs, every open setting filled.")
    suggestions = models.JSONField(default=list)
    estimate = models.JSONField(default=dict)
    fingerprint = models.CharField(max_length=64, db_index=True)
    idempotency_key = models.CharField(max_length=100, blank=True)
    priority = models.IntegerField(default=0)

    status = models.CharField(max_length=12, choices=Status.choices, default=Status.QUEUED, db_index=True)
    reason = models.CharField(max_length=20, blank=True)
    message = models.TextField(blank=True, help_text="Why the job is in this state, in a sentence.")
    faults = models.JSONField(default=list)
    stop_request = models.CharField(
        max_length=10, blank=True, help_text="stop, pause or cancel, while it is being carried out."
    )
    attempt = models.IntegerField(default=0)
    crashes = models.IntegerField(
        default=0, help_text="How often in a row the run was lost without a new checkpoint in between."
    )

    lease_owner = models.CharField(max_length=100, blank=True)
    lease_epoch = models.IntegerField(default=0)
    lease_until = models.DateTimeField(null=True, blank=True)
    child_pid = models.IntegerField(null=True, blank=True)
    child_started = models.BigIntegerField(
        null=True, blank=True, help_text="Kernel start time of the child, to tell it from a later process."
    )
    device = models.CharField(max_length=50, blank=True)

    last_seq = models.BigIntegerField(default=0)
    first_seq = models.BigIntegerField(default=1, help_text="The oldest event that was not pruned.")
    log_offset = models.BigIntegerField(default=0)
    log_seq = models.BigIntegerField(default=0)

    done_steps = models.IntegerField(default=0)
    total_steps = models.IntegerField(default=0)
    eta_seconds = models.FloatField(null=True, blank=True)
    loss = models.FloatField(null=True, blank=True)
    metrics = models.JSONField(default=dict, help_text="The newest evaluation.")
    last_signal = models.JSONField(default=dict)

    created = models.DateTimeField(auto_now_add=True)
    queued_at = models.DateTimeField(null=True, blank=True)
    started_at = models.DateTimeField(null=True, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering: ClassVar = ["-created"]
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["owner", "idempotency_key"], condition=~models.Q(idempotency_key=""), name="one_job_per_key"
            ),
        ]

    def __str__(self) -> str:
        return self.name


class Event(models.Model):
    """One numbered thing that happened to a job. Dense per job; never changed."""

    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="events")
    seq = models.BigIntegerField()
    log_seq = models.BigIntegerField(
        null=True, help_text="Its number in the engine's log, for rows that come from there."
    )
    kind = models.CharField(max_length=12)
    step = models.IntegerField(default=0)
    time = models.FloatField(help_text="Seconds since 1970.")
    data = models.JSONField(default=dict)

    class Meta:
        ordering: ClassVar = ["job", "seq"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["job", "seq"], name="event_once"),
            models.UniqueConstraint(
                fields=["job", "log_seq"], condition=models.Q(log_seq__isnull=False), name="log_line_once"
            ),
        ]
        indexes: ClassVar = [models.Index(fields=["job", "kind", "seq"])]

    def __str__(self) -> str:
        return f"{self.kind} {self.seq}"


class Artifact(models.Model):
    """What a job made; the files lie in its folder and are addressed by their content."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    job = models.OneToOneField(Job, on_delete=models.CASCADE, related_name="artifact")
    folder = models.CharField(max_length=1000, editable=False)
    content_id = models.CharField(max_length=64)
    description = models.JSONField(default=dict, help_text="artifact.json")
    files = models.JSONField(default=dict)
    certificate = models.JSONField(default=dict)
    bytes = models.BigIntegerField(default=0)
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["-created"]

    def __str__(self) -> str:
        return f"Result of {self.job.name}"


class ApiToken(models.Model):
    """A personal token for the REST API; only its hash is kept."""

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_tokens")
    name = models.CharField(max_length=100)
    prefix = models.CharField(max_length=12)
    digest = models.CharField(max_length=64, unique=True)
    created = models.DateTimeField(auto_now_add=True)
    last_used = models.DateTimeField(null=True, blank=True)
    revoked = models.BooleanField(default=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix}…)"


class Device(models.Model):
    """A place where one job can run: a GPU, or the processor."""

    name = models.CharField(max_length=50, unique=True, help_text="cpu or cuda:0 …")
    title = models.CharField(max_length=200, blank=True)
    memory_bytes = models.BigIntegerField(default=0)
    enabled = models.BooleanField(default=True)
    seen = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return self.title or self.name
