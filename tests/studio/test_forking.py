"""Going on from a saved state: the page, the buttons that watchers propose, and the family of a run. Checked by the real engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client

from engine.core.fork import fork_of
from jobs import forks
from jobs.actions import ActionRefused
from jobs.models import Event, Job, Status
from jobs.places import job_folder
from jobs.starters import ensure_data, ensure_models
from studio.pages.forking import last_good
from tests.studio.making import RECIPE, make_run

REMEDY = {
    "title": "Restart from the last good state with a learning rate of 0.0002",
    "start": "last_good",
    "changes": {"settings.learning_rate": 0.0002},
}


@pytest.fixture
def ada(db: None) -> User:
    return User.objects.create_user("ada")


@pytest.fixture
def visitor(ada: User, client: Client) -> Client:
    client.force_login(ada)
    return client


@pytest.fixture
def ended(ada: User, engine_here: None) -> Job:
    """A run that has ended and left two saved states; their tensors do not matter here."""
    ensure_data()
    ensure_models()
    recipe = {**RECIPE, "model": {"source": "starter:minilm-l6"}, "data": {"source": "starter:customer-messages"}}
    job = make_run(ada, status=Status.FAILED, done=0.5, recipe=recipe)
    from jobs.catalogue import engine

    job.recipe = engine().call("check", recipe=recipe)["recipe"]
    job.save(update_fields=["recipe"])
    for step in (30, 60):
        saved = job_folder(job.pk) / "checkpoints" / f"step-{step:08d}"
        saved.mkdir(parents=True)
        (saved / "state.json").write_text(json.dumps({"best": {"step": 30}, "event": 5}))
    return job


def html(client: Client, address: str, status: int = 200) -> str:
    answer = client.get(address)
    assert answer.status_code == status, address
    return answer.content.decode()


def test_a_person_chooses_a_state_and_what_changes(visitor: Client, ended: Job) -> None:
    assert f"/runs/{ended.pk}/fork/?step=30" in html(visitor, f"/runs/{ended.pk}/")
    page = html(visitor, f"/runs/{ended.pk}/fork/?step=30")
    assert 'value="30" checked' in page and "Learning rate" in page and "Examples at a time" not in page
    rate = str(ended.recipe["settings"]["learning_rate"])
    form = {
        "step": "30",
        "settings.learning_rate": "0.0005",
        "was.settings.learning_rate": rate,
        "name": "slower",
        "go": "start",
    }
    visitor.post(f"/runs/{ended.pk}/fork/", form)
    made = Job.objects.get(again_of=ended)
    assert (made.fork_step, made.name, made.status) == (30, "slower", Status.QUEUED)
    assert forks.differences(ended, made) == [("settings.learning_rate", 0.002, 0.0005)]
    origin = fork_of(job_folder(made.pk))
    assert origin is not None and origin.step == 30
    both = html(visitor, f"/runs/{made.pk}/")
    assert "goes on from step 30 of" in both and "Learning rate 0.0005 instead of 0.002" in both and ended.name in both


def test_what_cannot_be_read_or_is_gone_is_told_and_nothing_is_lost(visitor: Client, ended: Job) -> None:
    address = f"/runs/{ended.pk}/fork/"
    wrong = {"step": "30", "settings.learning_rate": "fast", "was.settings.learning_rate": "0.002", "go": "start"}
    answer = visitor.post(address, wrong)
    assert (
        answer.status_code == 422
        and "“Learning rate” cannot be read: fast." in answer.content.decode()
        and 'value="fast"' in answer.content.decode()
    )
    answer = visitor.post(address, {"step": "31", "go": "start"})
    assert answer.status_code == 422 and "There is no saved state at step 31." in answer.content.decode()
    assert "No saved state is chosen." in visitor.post(address, {"go": "start"}).content.decode()
    put_back = visitor.post(address, {**wrong, "go": "put-back:settings.learning_rate"}).content.decode()
    assert 'value="0.002"' in put_back and not Job.objects.filter(again_of=ended).exists()


def test_the_button_of_a_signal_goes_back_to_the_last_good_state(visitor: Client, ended: Job) -> None:
    seq = ended.last_seq + 1
    Event.objects.create(job=ended, seq=seq, kind="signal", step=70, time=0.0,
                         data={"action": "warn", "rule": "divergence", "message": "It diverges.", "numbers": {}, "remedy": REMEDY})  # fmt: skip
    assert str(REMEDY["title"]) in html(visitor, f"/runs/{ended.pk}/")
    visitor.post(f"/runs/{ended.pk}/fork/", {"remedy": str(seq)})
    made = Job.objects.get(again_of=ended)
    assert (made.fork_step, made.recipe["settings"]["learning_rate"]) == (last_good(ended, 70), 0.0002)
    assert visitor.post(f"/runs/{ended.pk}/fork/", {"remedy": str(seq + 1)}).status_code == 404
    assert visitor.post(f"/runs/{ended.pk}/fork/", {"remedy": "x"}).status_code == 404


def test_a_run_without_a_saved_state_says_so(visitor: Client, ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "catalogue", lambda: {"settings": {"properties": {}}, "methods": []})
    job = make_run(ada, status=Status.SUCCEEDED, done=1.0)
    assert "This run has saved no state yet." in html(visitor, f"/runs/{job.pk}/fork/")
    with pytest.raises(ActionRefused, match="saved no state"):
        forks.Fork(job=job).execute(ada)


def test_others_do_not_see_it(client: Client, ada: User) -> None:
    job = make_run(ada, status=Status.SUCCEEDED, done=1.0)
    eve = User.objects.create_user("eve")
    client.force_login(eve)
    assert client.get(f"/runs/{job.pk}/fork/").status_code == 404
    assert client.post(f"/runs/{job.pk}/fork/", {"step": "1"}).status_code == 404
    assert forks.Fork(job=job).check(eve) == "This job belongs to somebody else."


def test_a_family_is_a_tree_with_what_changed(ada: User) -> None:
    def changed(**settings: Any) -> dict[str, Any]:
        return {**RECIPE, "settings": {**RECIPE["settings"], **settings}}

    first = make_run(ada, status=Status.SUCCEEDED, done=1.0)
    assert forks.family(first, ada) is None
    child = make_run(ada, recipe=changed(learning_rate=0.001), again_of=first, fork_step=10)
    grandchild = make_run(ada, recipe=changed(learning_rate=0.001, epochs=9.0), again_of=child)
    other = make_run(ada, again_of=first)
    for job in (first, child, grandchild, other):
        tree = forks.family(job, ada)
        assert tree is not None and tree.job == first and [branch.job for branch in tree.children] == [child, other]
        assert tree.children[0].changes == [("settings.learning_rate", 0.002, 0.001)]
        assert [branch.job for branch in tree.children[0].children] == [grandchild] and tree.children[1].changes == []
