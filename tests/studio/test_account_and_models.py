"""The account page keeps secrets; staff adds models, others do not."""

from __future__ import annotations

import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

from django.contrib.auth.models import User
from django.test import Client

from jobs import tokens
from jobs.models import ApiToken, ModelEntry
from tests.studio.conftest import ENCODER, Visitor


def test_a_token_is_shown_once_and_works(ada: Visitor) -> None:
    answer = ada.post("/account/tokens/", {"name": "my notebook"})
    secret = re.search(r"bonsai_[\w-]{40,}", answer.content.decode())
    assert secret and "no-store" in answer["Cache-Control"]
    assert secret[0] not in ada.read("/account/"), "the second look shows its beginning only"
    assert Client().get("/api/v1/datasets", headers={"authorization": f"Bearer {secret[0]}"}).status_code == 200


def test_a_revoked_token_opens_nothing(ada: Visitor) -> None:
    token, secret = tokens.issue(ada.user, "old script")
    answer = ada.post(f"/account/tokens/{token.pk}/revoke/")
    assert answer.status_code == 302 and "old script" in ada.read("/account/")
    assert Client().get("/api/v1/datasets", headers={"authorization": f"Bearer {secret}"}).status_code == 401
    assert ada.post(f"/account/tokens/{token.pk}/revoke/").status_code == 404


def test_a_token_needs_a_name_and_has_a_limit(ada: Visitor) -> None:
    assert "Give the token a name" in ada.post("/account/tokens/", {"name": "  "}).content.decode()
    for number in range(tokens.MAX_TOKENS):
        tokens.issue(ada.user, str(number))
    answer = ada.post("/account/tokens/", {"name": "one more"})
    assert answer.status_code == 422 and f"You have {tokens.MAX_TOKENS} tokens already." in answer.content.decode()
    assert ApiToken.objects.count() == tokens.MAX_TOKENS


def test_staff_does_not_see_the_tokens_of_others(ada: Visitor, staff: Visitor) -> None:
    token, _ = tokens.issue(ada.user, "mine alone")
    assert "mine alone" not in staff.read("/account/")
    assert staff.post(f"/account/tokens/{token.pk}/revoke/").status_code == 404


def test_the_password_can_be_changed(ada: Visitor) -> None:
    wrong = ada.post("/account/password/", {"old_password": "no", "new_password1": "x", "new_password2": "y"})
    assert wrong.status_code == 422 and 'class="fault"' in wrong.content.decode()
    new = {
        "old_password": "a long password",
        "new_password1": "willow-and-stone-9",
        "new_password2": "willow-and-stone-9",
    }
    assert ada.post("/account/password/", new).status_code == 302
    assert "Your password is changed." in ada.read("/account/"), "and one stays logged in"
    assert Client().login(username="ada", password="willow-and-stone-9")


def test_who_came_by_the_link_can_set_a_first_password(ada: Visitor) -> None:
    ada.user.set_unusable_password()
    ada.user.save()
    ada.client.force_login(ada.user)
    text = ada.read("/account/")
    assert "old_password" not in text and "have no password yet" in text
    new = {"new_password1": "willow-and-stone-9", "new_password2": "willow-and-stone-9"}
    assert ada.post("/account/password/", new).status_code == 302
    assert Client().login(username="ada", password="willow-and-stone-9")


def test_the_admin_is_offered_to_staff_only(ada: Visitor, staff: Visitor) -> None:
    assert "/admin/" in staff.read("/account/") and "/admin/" not in ada.read("/account/")


def test_only_staff_adds_models(ada: Visitor, starters: ModelEntry) -> None:
    assert 'id="add"' not in ada.read("/models/")
    answer = ada.post("/models/", {"place": "hub", "address": "a/b", "name": "Sneaky"})
    assert answer.status_code == 403 and not ModelEntry.objects.filter(name="Sneaky").exists()


def test_staff_adds_a_folder(staff: Visitor, shelf: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(shelf["facts"]["path"], folder)
    form = {"place": "folder", "address": str(folder), "name": "Mine", "sentence": "A reader of our own."}
    answer = staff.post("/models/", form)
    row = ModelEntry.objects.get(name="Mine")
    assert answer.status_code == 302 and answer["Location"] == f"/models/{row.pk}/"
    assert row.kind == "encoder" and row.num_parameters == shelf["facts"]["num_parameters"]
    text = staff.read(answer["Location"])
    assert "A reader of our own." in text and f"{row.num_parameters:,}" in text
    again = staff.post("/models/", form)
    assert again.status_code == 422 and "offered already" in again.content.decode()


def test_a_folder_without_a_model_is_refused_in_sentences(staff: Visitor, tmp_path: Path) -> None:
    for address in (str(tmp_path), str(tmp_path / "missing"), "../../etc"):
        answer = staff.post("/models/", {"place": "folder", "address": address, "name": "Nothing"})
        assert answer.status_code == 422 and 'class="note error"' in answer.content.decode()
        assert 'value="Nothing"' in answer.content.decode(), "what was typed is kept"
    assert staff.post("/models/", {"place": "folder"}).status_code == 422
    assert not ModelEntry.objects.exists()


def test_a_model_leads_to_what_it_can_learn(ada: Visitor, starters: ModelEntry) -> None:
    text = ada.read(f"/models/{starters.pk}/")
    assert ENCODER not in text, "where it lies is for staff"
    link = re.search(r'class="button primary" href="([^"]+)"', text)
    assert link
    ada.get(unescape(link[1]))
    assert starters.name in ada.read("/new/")
    assert User.objects.count() == 1
