"""The administrator's pages: they open, cost the same for one row and for many, change nothing they should not, and act like everybody."""

from __future__ import annotations

import pytest
from django.contrib import admin
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from jobs.lifecycle import transition
from jobs.models import ApiToken, Artifact, Dataset, Device, Event, Job, ModelEntry, Status
from tests.jobs.conftest import MakeJob

MODELS = (Job, Device, Dataset, ModelEntry, Artifact, ApiToken, User)


@pytest.fixture
def root(db: None) -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    return client


def rows(make_job: MakeJob, number: int) -> None:
    owner = User.objects.create_user(f"person {number}")
    job = make_job(owner=owner, name=f"run {number}")
    Artifact.objects.create(job=job, folder="/x", content_id="0" * 64)
    Device.objects.create(name=f"cuda:{number}")
    Dataset.objects.create(owner=owner, name="d", path="/d", format="csv", sha256="0" * 64, shape="text")
    ModelEntry.objects.create(owner=owner, name="m", source="starter:m")
    ApiToken.objects.create(owner=owner, name="t", prefix="p", digest=str(number))


@pytest.mark.parametrize("model", MODELS)
def test_lists_cost_the_same_for_one_row_and_for_many(root: Client, make_job: MakeJob, model: type) -> None:
    page = f"/admin/{model._meta.app_label}/{model._meta.model_name}/"  # type: ignore[attr-defined]
    rows(make_job, 0)
    root.get(page)
    with CaptureQueriesContext(connection) as few:
        assert root.get(page).status_code == 200
    for number in range(1, 9):
        rows(make_job, number)
    with CaptureQueriesContext(connection) as many:
        assert root.get(page).status_code == 200
    assert len(many) == len(few)


@pytest.mark.parametrize("model", MODELS)
def test_every_row_can_be_opened(root: Client, make_job: MakeJob, model: type) -> None:
    rows(make_job, 0)
    row = model.objects.first()  # type: ignore[attr-defined]
    page = root.get(f"/admin/{model._meta.app_label}/{model._meta.model_name}/{row.pk}/change/")  # type: ignore[attr-defined]
    assert page.status_code == 200
    assert b"digest" not in page.content


def test_a_status_cannot_be_typed_in(root: Client, make_job: MakeJob) -> None:
    job = make_job()
    answer = root.post(
        f"/admin/jobs/job/{job.pk}/change/",
        {"name": "Renamed", "priority": "3", "status": "succeeded", "lease_epoch": "99"},
    )
    assert answer.status_code == 302
    job.refresh_from_db()
    assert (job.name, job.priority, job.status, job.lease_epoch) == ("Renamed", 3, Status.QUEUED, 0)
    assert Event.objects.filter(job=job).count() == 1


def test_many_rows_at_once_go_through_the_same_actions(root: Client, make_job: MakeJob) -> None:
    waiting, running, ended = make_job(name="waiting"), make_job(name="running"), make_job(name="ended")
    for job in (running, ended):
        transition(job, Status.STARTING, "test")
    transition(ended, Status.FAILED, "test", "bug")
    everything = {"_selected_action": [str(job.pk) for job in (waiting, running, ended)]}
    page = root.post("/admin/jobs/job/", {"action": "cancel", **everything}, follow=True)
    assert b"2 jobs cancelled." in page.content and b"ended: The job has failed already." in page.content
    assert set(Job.objects.values_list("name", "status")) == {
        ("waiting", "cancelled"),
        ("running", "stopping"),
        ("ended", "failed"),
    }
    page = root.post("/admin/jobs/job/", {"action": "purge", **everything}, follow=True)
    assert b"2 jobs deleted." in page.content and list(Job.objects.values_list("name", flat=True)) == ["running"]


def test_nobody_without_the_right_gets_in(make_job: MakeJob, person: User) -> None:
    client = Client()
    client.force_login(person)
    for model in MODELS:
        assert client.get(f"/admin/{model._meta.app_label}/{model._meta.model_name}/").status_code == 302
    assert set(admin.site._registry) >= set(MODELS)
