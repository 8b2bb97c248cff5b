"""Who may see what: one place for pages, REST, sockets and downloads.

People see their own things and the starters, staff sees everything. What a person may not see does not exist for them: a foreign
object is answered exactly like a missing one.
"""

from __future__ import annotations

import uuid
from importlib import import_module
from typing import TypeVar

from django.conf import settings
from django.contrib.auth import get_user
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import AnonymousUser
from django.db.models import Q, QuerySet
from django.http import HttpRequest

from jobs.models import ApiToken, Artifact, Dataset, Job, ModelEntry

Person = AbstractBaseUser | AnonymousUser
Row = TypeVar("Row", Dataset, ModelEntry, Artifact)
Shared = TypeVar("Shared", Dataset, ModelEntry)


def is_staff(user: Person) -> bool:
    """Staff of this installation, and active."""
    return bool(user.is_authenticated and user.is_active and getattr(user, "is_staff", False))


def datasets_for(user: Person) -> QuerySet[Dataset]:
    """Data sets that `user` may see: their own and the starters."""
    return _own_or_shared(Dataset.objects.all(), user)


def models_for(user: Person) -> QuerySet[ModelEntry]:
    """Models that `user` may start from: those of everyone and their own."""
    return _own_or_shared(ModelEntry.objects.all(), user)


def jobs_for(user: Person) -> QuerySet[Job]:
    """Jobs that `user` may see: their own."""
    if is_staff(user):
        return Job.objects.all()
    return Job.objects.filter(owner_id=user.pk) if user.is_authenticated else Job.objects.none()


def may_watch(session_key: str, job_id: uuid.UUID) -> bool:
    """Whether this session is open still and its person may see this job: asked anew each time, for sessions end and rights change."""
    request = HttpRequest()
    request.session = import_module(settings.SESSION_ENGINE).SessionStore(session_key or None)
    return jobs_for(get_user(request)).filter(pk=job_id).exists()


def artifacts_for(user: Person) -> QuerySet[Artifact]:
    """Results that `user` may see: those of their own jobs."""
    return Artifact.objects.filter(job__in=jobs_for(user)).select_related("job")


def tokens_for(user: Person) -> QuerySet[ApiToken]:
    """Personal tokens are nobody else's business, not even for staff (the admin can revoke them)."""
    return ApiToken.objects.filter(owner_id=user.pk) if user.is_authenticated else ApiToken.objects.none()


def may_change(user: Person, owner_id: int | None) -> bool:
    """Whether `user` may change or delete a thing that they can see: their own, or anything for staff."""
    return is_staff(user) or (owner_id is not None and user.is_authenticated and owner_id == user.pk)


def parse_id(value: str) -> uuid.UUID | None:
    """An identifier as it came from outside, or None when it is none."""
    try:
        return uuid.UUID(value)
    except ValueError:
        return None


def with_id(rows: QuerySet[Row], value: str) -> Row | None:
    """The row with an identifier that came from outside, or None. It is only ever compared with rows, never made into a path."""
    identifier = parse_id(value)
    return rows.filter(pk=identifier).first() if identifier else None


def _own_or_shared(rows: QuerySet[Shared], user: Person) -> QuerySet[Shared]:
    if is_staff(user):
        return rows
    return rows.filter(Q(owner_id=user.pk) | Q(owner=None)) if user.is_authenticated else rows.none()
