"""Queues the recipe on standard input as a job of the installation in BONSAI_HOME and prints its id: what Create does after its checks.

The recipe names a folder of weights made for the test, which no person may do; so it does not go through Create.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "studio.settings")

import django


def main() -> None:
    django.setup()
    from django.contrib.auth.models import User
    from django.db import transaction

    from jobs import tasks
    from jobs.lifecycle import begin
    from jobs.models import Job

    recipe = json.load(sys.stdin)
    job = Job(
        id=uuid.uuid4(),
        owner=User.objects.get(is_superuser=True),
        name="Drill",
        request=recipe,
        recipe=recipe,
        fingerprint="0" * 64,
    )
    with transaction.atomic():
        begin(job, "drill")
        tasks.enqueue(job.pk)
    print(job.pk)


if __name__ == "__main__":
    main()
