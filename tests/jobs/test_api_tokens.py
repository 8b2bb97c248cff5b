"""Personal tokens: shown once, kept as a hash, dead when revoked or when their owner may not sign in."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from django.utils import timezone

from jobs import tokens
from jobs.models import ApiToken
from tests.jobs import api_kit as kit

pytestmark = pytest.mark.django_db


def test_a_token_is_shown_once_and_only_its_hash_is_kept() -> None:
    owner = kit.caller("owner")
    response = owner.post("tokens", {"name": "laptop"})
    assert response.status_code == 201
    assert response["Cache-Control"] == "no-store"
    secret = response.json()["token"]
    assert secret.startswith("bonsai_")
    assert len(secret) > 40
    row = ApiToken.objects.get(pk=response.json()["id"])
    stored = json.dumps([str(value) for value in ApiToken.objects.filter(pk=row.pk).values_list()[0]])
    assert secret not in stored
    assert secret[len(row.prefix) :] not in stored
    assert row.prefix == secret[:12]
    listed = owner.get("tokens").content.decode()
    assert secret not in listed
    assert row.digest not in listed
    assert kit.Caller(owner.user, secret).get("jobs").status_code == 200


def test_a_revoked_token_opens_nothing() -> None:
    owner = kit.caller("owner")
    made = owner.post("tokens", {"name": "laptop"}).json()
    other = kit.Caller(owner.user, made["token"])
    assert other.get("jobs").status_code == 200
    assert owner.ask("DELETE", f"tokens/{made['id']}").status_code == 204
    assert kit.problem(other.get("jobs"), 401)["faults"][0]["code"] == "bad_token"
    kit.problem(owner.ask("DELETE", f"tokens/{made['id']}"), 404)
    assert [item["revoked"] for item in owner.get("tokens").json()["items"] if item["id"] == made["id"]] == [True]


def test_a_token_dies_with_its_owners_account() -> None:
    owner = kit.caller("owner")
    assert owner.user is not None
    owner.user.is_active = False
    owner.user.save()
    kit.problem(owner.get("jobs"), 401)


def test_a_token_remembers_when_it_was_used_without_writing_each_time(django_assert_num_queries: object) -> None:
    owner = kit.caller("owner")
    row = ApiToken.objects.get(owner=owner.user)
    assert row.last_used is None
    owner.get("jobs")
    row.refresh_from_db()
    first = row.last_used
    assert first is not None
    owner.get("jobs")
    row.refresh_from_db()
    assert row.last_used == first
    ApiToken.objects.filter(pk=row.pk).update(last_used=timezone.now() - timedelta(hours=1))
    owner.get("jobs")
    row.refresh_from_db()
    assert row.last_used is not None
    assert timezone.now() - row.last_used < timedelta(minutes=1)


def test_nobody_keeps_tokens_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_TOKENS", 2)
    owner = kit.caller("owner")
    assert owner.post("tokens", {"name": "a"}).status_code == 201
    assert kit.problem(owner.post("tokens", {"name": "b"}), 409)["faults"][0]["code"] == "quota"


@pytest.mark.parametrize(
    "secret",
    ["", "x", "bonsai_", "bonsai_" + "x" * 1000, "bonsai_\x00", "bonsai_\ud800", "Bonsai_abc", "bonsai_" + "ä" * 40],
)
def test_no_odd_secret_is_accepted_or_breaks(secret: str) -> None:
    assert tokens.authenticate(secret) is None
