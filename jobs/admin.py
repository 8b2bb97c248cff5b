"""The administrator's view: everything to look at, and actions that are the same as everyone's."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.contrib.auth.admin import GroupAdmin, UserAdmin
from django.contrib.auth.models import Group, User
from django.db.models import QuerySet
from django.http import HttpRequest
from unfold.admin import ModelAdmin
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from engine.core.errors import EngineError
from jobs import actions, datasets
from jobs.models import ApiToken, Artifact, Dataset, Device, Job, ModelEntry, Status

admin.site.unregister(User)
admin.site.unregister(Group)


@admin.register(User)
class PeopleAdmin(UserAdmin, ModelAdmin):
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm


@admin.register(Group)
class TeamAdmin(GroupAdmin, ModelAdmin):
    pass


class LookOnly(ModelAdmin):
    """Rows that the studio writes: to be looked at."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Job)
class JobAdmin(ModelAdmin):
    list_display = ("name", "owner", "status", "reason", "device", "attempt", "done_steps", "total_steps", "created")
    list_filter = ("status", "reason", "device")
    list_select_related = ("owner",)
    search_fields = ("name", "owner__username", "fingerprint", "id")
    date_hierarchy = "created"
    show_full_result_count = False
    actions = ("cancel", "requeue", "purge")
    fields = (
        "name",
        "owner",
        "priority",
        "status",
        "reason",
        "message",
        "stop_request",
        "attempt",
        "crashes",
        "device",
        "done_steps",
        "total_steps",
        "loss",
        "metrics",
        "last_signal",
        "faults",
        "dataset",
        "model",
        "again_of",
        "fork_step",
        "request",
        "recipe",
        "suggestions",
        "estimate",
        "fingerprint",
        "idempotency_key",
        "lease_owner",
        "lease_epoch",
        "lease_until",
        "child_pid",
        "last_seq",
        "first_seq",
        "log_offset",
        "created",
        "queued_at",
        "started_at",
        "ended_at",
    )
    readonly_fields = tuple(name for name in fields if name not in ("name", "priority"))

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False  # the action "Delete ended jobs" removes the files as well

    @admin.action(description="Cancel", permissions=["change"])
    def cancel(self, request: HttpRequest, queryset: QuerySet[Job]) -> None:
        self._each(request, queryset, lambda job: actions.Cancel(job).execute(request.user), "cancelled")

    @admin.action(description="Queue again: resume paused jobs, repeat ended ones", permissions=["change"])
    def requeue(self, request: HttpRequest, queryset: QuerySet[Job]) -> None:
        def queue(job: Job) -> Job:
            action = actions.Resume(job) if job.status == Status.PAUSED else actions.Again(job)
            return action.execute(request.user)

        self._each(request, queryset, queue, "queued")

    @admin.action(description="Delete ended jobs with their files", permissions=["change"])
    def purge(self, request: HttpRequest, queryset: QuerySet[Job]) -> None:
        self._each(request, queryset, lambda job: actions.Purge(job).execute(request.user), "deleted")

    def _each(self, request: HttpRequest, queryset: QuerySet[Job], act: Any, done: str) -> None:
        num = 0
        for job in queryset:
            try:
                act(job)
                num += 1
            except (actions.ActionRefused, EngineError) as error:
                self.message_user(request, f"{job.name}: {error}", messages.WARNING)
        if num:
            self.message_user(request, f"{num} {'job' if num == 1 else 'jobs'} {done}.", messages.SUCCESS)


@admin.register(Device)
class DeviceAdmin(ModelAdmin):
    list_display = ("name", "title", "memory_bytes", "enabled", "seen")
    list_editable = ("enabled",)
    readonly_fields = ("name", "title", "memory_bytes", "seen")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False


@admin.register(Dataset)
class DatasetAdmin(LookOnly):
    list_display = ("name", "owner", "shape", "num_rows", "bytes", "created")
    list_filter = ("shape", "format")
    list_select_related = ("owner",)
    search_fields = ("name", "owner__username", "sha256")
    date_hierarchy = "created"
    exclude = ("preview",)

    def delete_model(self, request: HttpRequest, obj: Dataset) -> None:
        self._delete(request, obj)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Dataset]) -> None:
        for row in queryset:
            self._delete(request, row)

    def _delete(self, request: HttpRequest, row: Dataset) -> None:
        try:
            datasets.delete(row)
        except EngineError as error:
            self.message_user(request, f"{row.name}: {error}", messages.WARNING)


@admin.register(ModelEntry)
class ModelEntryAdmin(ModelAdmin):
    list_display = ("name", "owner", "source", "kind", "family", "num_parameters", "created")
    list_filter = ("kind", "family")
    list_select_related = ("owner",)
    search_fields = ("name", "source")
    readonly_fields = ("kind", "family", "num_parameters", "facts", "created")


@admin.register(Artifact)
class ArtifactAdmin(LookOnly):
    list_display = ("job", "content_id", "bytes", "created")
    list_select_related = ("job",)
    search_fields = ("job__name", "content_id")
    date_hierarchy = "created"

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False  # a result goes with its job


@admin.register(ApiToken)
class ApiTokenAdmin(ModelAdmin):
    list_display = ("name", "owner", "prefix", "created", "last_used", "revoked")
    list_filter = ("revoked",)
    list_select_related = ("owner",)
    list_editable = ("revoked",)
    readonly_fields = ("owner", "name", "prefix", "created", "last_used")
    exclude = ("digest",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False
