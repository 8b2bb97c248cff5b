"""What a newcomer finds: starter data, starter models, an administrator, and one real run that is learning already."""

from __future__ import annotations

import hashlib
import os
import secrets
from typing import Any

from django.contrib.auth.models import User

from engine.core.artifact import hash_file
from engine.core.control import write_json
from engine.starters import STARTER_DATA
from jobs import inspection
from jobs.actions import Create
from jobs.catalogue import engine, refresh
from jobs.datasets import described
from jobs.models import Dataset, Job, ModelEntry
from jobs.places import home

FIRST_RUN: dict[str, Any] = {
    "name": "First run: sort customer messages",
    "operation": "train",
    "task": "classify",
    "data": {
        "source": "starter:" + next(name for name, data in STARTER_DATA.items() if data.shape == "classification")
    },
    "model": {"source": "starter:minilm-l6"},
    "methods": [{"slug": "paca"}, {"slug": "clip"}, {"slug": "early-dynamics-stopping"}, {"slug": "patience"}],
}
MARKER = "first_run.json"


def ensure_administrator() -> tuple[User, str]:
    """The first administrator, and the password when one was made up now (it is shown once and kept nowhere)."""
    known = User.objects.filter(is_superuser=True, is_active=True).order_by("pk").first()
    if known is not None:
        return known, ""
    given = os.environ.get("BONSAI_ADMIN_PASSWORD", "")
    password = given or secrets.token_urlsafe(12)
    name = os.environ.get("BONSAI_ADMIN_USER", "") or "admin"
    return User.objects.create_superuser(name, password=password), "" if given else password


def ensure_data() -> int:
    """A row for every starter data set; returns how many were added or had changed."""
    num = 0
    for name, starter in STARTER_DATA.items():
        digest = hash_file(starter.path)
        row = Dataset.objects.filter(starter=name, owner=None).first() or Dataset(starter=name)
        if row.sha256 == digest and row.path == str(starter.path):
            continue
        seen = inspection.look(starter.path, starter.path.name, dict(starter.columns))
        values = {
            "name": starter.title,
            "path": str(starter.path),
            "format": seen["facts"]["format"],
            "bytes": starter.path.stat().st_size,
            "sha256": digest,
            **described(seen["facts"], seen),
        }
        for field, value in values.items():
            setattr(row, field, value)
        row.save()
        num += 1
    return num


def ensure_models() -> int:
    """A row for every starter model; returns how many were added."""
    num = 0
    for model in refresh()["models"]:
        if ModelEntry.objects.filter(source=model["source"], owner=None).exists():
            continue
        facts = engine().call("model_facts", source=model["source"])["facts"]
        ModelEntry.objects.create(
            name=model["title"],
            source=model["source"],
            sentence=model["sentence"],
            kind=facts["kind"],
            family=facts["family"],
            num_parameters=facts["num_parameters"],
            facts=facts,
        )
        num += 1
    return num


def ensure_first_run(owner: User) -> Job | None:
    """Queue the first run, once in the life of an installation."""
    marker = home() / MARKER
    if marker.exists() or Job.objects.exists():
        return None
    key = "first-run-" + hashlib.sha256(str(home()).encode()).hexdigest()[:16]
    job = Create(owner=owner, recipe=FIRST_RUN, idempotency_key=key).execute(owner)
    write_json(marker, {"job": str(job.pk)})
    return job
