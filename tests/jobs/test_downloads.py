"""Files that leave the studio: whole, in parts, unchanged, never damaged, and never running in a spreadsheet."""

from __future__ import annotations

import csv
import io
import os
import time
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from django.test import AsyncClient

from engine.core.recipe import parse_recipe_text
from jobs import downloads
from jobs.models import Event
from tests.jobs import api_kit as kit
from tests.jobs.api_kit import Caller

pytestmark = pytest.mark.django_db


@pytest.fixture
def owner() -> Caller:
    return kit.caller("owner")


def _body(response: Any) -> bytes:
    return b"".join(response.streaming_content) if response.streaming else response.content


def _address(row: Any, form: str = "adapter") -> str:
    return f"artifacts/{row.pk}/download/{form}"


def test_a_form_comes_as_an_archive_with_its_recipe_and_card(owner: Caller) -> None:
    row = kit.artifact(owner.user, name="Küchen-Modell / 1")
    response = owner.get(_address(row))
    assert response.status_code == 200
    assert response["Content-Type"] == "application/zip"
    assert 'filename="kuchen-modell-1-adapter.zip"' in response["Content-Disposition"]
    body = _body(response)
    assert len(body) == int(response["Content-Length"])
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.testzip() is None
        names = {name.removeprefix("kuchen-modell-1-adapter/") for name in archive.namelist()}
        assert names == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "recipe.yaml",
            "README.md",
            "certificate.json",
        }
        content = archive.read("kuchen-modell-1-adapter/adapter_model.safetensors")
    assert content == (Path(row.folder) / "adapter/adapter_model.safetensors").read_bytes()


def test_the_same_result_gives_the_same_bytes(owner: Caller) -> None:
    row = kit.artifact(owner.user)
    first = _body(owner.get(_address(row)))
    downloads.zipped(row, "adapter").unlink()
    assert _body(owner.get(_address(row))) == first


def test_a_form_that_it_does_not_have_is_named(owner: Caller) -> None:
    row = kit.artifact(owner.user)
    for form in (
        "lora",
        "nonsense",
        "..",
        "%2e%2e",
        "adapter%00",
        "recipe.yaml",
        "merged%5C..%5C..",
        "adapter%2F..%2F..%2Fevents.jsonl",
    ):
        response = owner.get(_address(row, form))
        body = kit.problem(response, 404 if "/" in unquote(form) else 422)
        assert body["faults"][0]["code"] == ("not_found" if "/" in unquote(form) else "no_such_form")


@pytest.mark.parametrize(("asked", "first", "last"), [
    ("bytes=0-99", 0, 99), ("bytes=100-", 100, None), ("bytes=-50", -50, None), ("bytes=10-10", 10, 10), ("bytes=5-99999999999", 5, None),
    ("bytes=-99999999999", 0, None),
])  # fmt: skip
def test_a_part_can_be_asked_for(owner: Caller, asked: str, first: int, last: int | None) -> None:
    row = kit.artifact(owner.user)
    whole = _body(owner.get(_address(row)))
    response = owner.get(_address(row), Range=asked)
    expected = whole[first:] if last is None else whole[first : last + 1]
    assert response.status_code == 206
    assert _body(response) == expected
    begin = first if first >= 0 else len(whole) + first
    assert response["Content-Range"] == f"bytes {begin}-{begin + len(expected) - 1}/{len(whole)}"
    assert response["Content-Length"] == str(len(expected))


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0"])
def test_a_part_outside_the_file_is_416(owner: Caller, asked: str) -> None:
    row = kit.artifact(owner.user)
    response = owner.get(_address(row), Range=asked)
    assert response.status_code == 416
    assert response["Content-Range"].startswith("bytes */")


@pytest.mark.parametrize(
    "asked",
    ["bytes=5-2", "bytes=", "bytes=-", "bytes=a-b", "items=0-5", "bytes=0-1,5-9", "bytes=0-" + "9" * 500, "bytes=٣-٥"],
)
def test_a_range_that_means_nothing_gives_the_whole(owner: Caller, asked: str) -> None:
    row = kit.artifact(owner.user)
    response = owner.get(_address(row), Range=asked)
    assert response.status_code == 200
    assert len(_body(response)) == int(response["Content-Length"])


def test_a_continued_download_never_mixes_two_versions(owner: Caller) -> None:
    row = kit.artifact(owner.user)
    tag = owner.get(_address(row))["ETag"]
    assert owner.get(_address(row), Range="bytes=0-9", If_Range=tag).status_code == 206
    assert owner.get(_address(row), Range="bytes=0-9", If_Range='"another"').status_code == 200
    assert owner.get(_address(row), Range="bytes=0-9", If_Range="Wed, 21 Oct 2015 07:28:00 GMT").status_code == 200
    assert owner.get(_address(row), If_None_Match=tag).status_code == 304
    assert owner.get(_address(row), If_None_Match=f'"x", {tag}').status_code == 304
    assert owner.get(_address(row), If_None_Match='"x"').status_code == 200
    head = owner.ask("HEAD", _address(row))
    assert (head.status_code, head["ETag"], _body(head)) == (200, tag, b"")
    row.certificate = {
        **row.certificate,
        "ok": False,
    }  # the certificate travels in the archive, so a new one is a new version
    row.save()
    assert owner.get(_address(row), Range="bytes=0-9", If_Range=tag).status_code == 200


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_result_is_not_handed_out(owner: Caller, damage: str) -> None:
    row = kit.artifact(owner.user)
    path = Path(row.folder) / "adapter/adapter_model.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[1234] ^= 1
        path.write_bytes(content)
    body = kit.problem(owner.get(_address(row)), 503)
    assert body["faults"][0]["code"] == "damaged_artifact"
    assert not list(Path(row.folder).parent.glob("downloads/*"))


def test_archives_that_nobody_fetches_are_swept(owner: Caller) -> None:
    row, other = kit.artifact(owner.user), kit.artifact(owner.user)
    archive = downloads.zipped(row, "adapter")
    torn = archive.with_name(".torn.tmp")
    torn.touch()
    long_ago = time.time() - downloads.KEEP_ZIPS_SECONDS - 10
    os.utime(archive, (long_ago, long_ago))
    os.utime(torn, (long_ago, long_ago))
    downloads.zipped(other, "adapter")
    assert not archive.exists()
    assert not torn.exists()
    assert downloads.zipped(row, "adapter").exists()


@pytest.mark.asyncio
@pytest.mark.django_db(transaction=True)
async def test_under_asgi_a_file_is_never_gathered_in_memory() -> None:
    from asgiref.sync import sync_to_async

    owner = await sync_to_async(kit.caller)("owner")
    row = await sync_to_async(lambda: kit.artifact(owner.user, size=3 * downloads.CHUNK))()
    response = await AsyncClient().get(
        f"{kit.API}/{_address(row)}", headers={"Authorization": f"Bearer {owner.secret}"}
    )
    assert response.is_async
    pieces = [piece async for piece in response.streaming_content]
    assert len(pieces) >= 3
    assert max(map(len, pieces)) <= downloads.CHUNK
    assert sum(map(len, pieces)) == int(response["Content-Length"])


EVIL = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\tx", "\r=1", "\n=1", '=HYPERLINK("http://example.org","x")']


def test_no_cell_of_the_events_table_is_a_formula(owner: Caller) -> None:
    row = kit.job(owner.user, num_events=0, name="=cmd")
    for n, text in enumerate(EVIL, start=1):
        Event.objects.create(
            job=row, seq=n, kind=text[:12], step=n, time=1790000000.5, data={"message": text, "=key": text}
        )
    steps = [
        {"step": 1, "loss": -0.5, "grad_norm": 1.0, "learning_rate": 1e-3, "epoch": 0.5},
        {"step": 2, "loss": None, "nonfinite": ["loss"]},
    ]
    Event.objects.create(job=row, seq=len(EVIL) + 1, kind="metric", step=2, time=1790000001.0, data={"rows": steps})
    row.last_seq = len(EVIL) + 1
    row.save()
    response = owner.get(f"jobs/{row.pk}/events.csv")
    assert response["Content-Type"].startswith("text/csv")
    assert "filename=" in response["Content-Disposition"]
    table = list(csv.reader(io.StringIO(_body(response).decode(), newline="")))
    assert tuple(table[0]) == downloads.CSV_HEAD
    assert len(table) == 1 + len(EVIL) + 2
    for line in table[1 : 1 + len(EVIL)]:
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for cell in line)
    loss = table[0].index("loss")
    assert [line[loss] for line in table[-2:]] == ["-0.5", ""]  # a number is a number, also a negative one


def test_the_recipe_can_be_taken_home_and_read_again(owner: Caller) -> None:
    row = kit.job(owner.user)
    response = owner.get(f"jobs/{row.pk}/recipe.yaml")
    recipe = parse_recipe_text(response.content.decode())
    assert recipe.name == "Mine"
    assert recipe.methods[0].params == {"r": 4}
