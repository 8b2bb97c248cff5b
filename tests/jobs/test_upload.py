"""Uploads as a new user, or an enemy, would send them: each ends in a sentence, and nothing is left behind or lost."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from pytest_django import Settings

from engine.core.errors import EngineError
from jobs import datasets, inspection
from jobs.models import Dataset, Status
from tests.jobs import api_kit as kit

pytestmark = pytest.mark.django_db
CANARY = Path(tempfile.gettempdir()) / f"bonsai-canary-{os.getpid()}"


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


def _parquet(rows: int, text: str = "x") -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"text": [text] * rows, "label": ["a", "b"] * (rows // 2)})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _zip(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "rows.csv"),
    "white space": (b" \n\n \t\n", "rows.csv"),
    "a header and no rows": (b"text,label\n", "rows.csv"),
    "a pickle called csv": (pickle.dumps(_Payload()), "rows.csv"),
    "a pickle called parquet": (pickle.dumps(_Payload()), "rows.parquet"),
    "a zip called csv": (_zip("../../evil.csv", b"text,label\na,b\n"), "rows.csv"),
    "a zip bomb": (_zip("rows.csv", b"a,b\n" * 5_000_000), "rows.zip"),
    "gzip": (gzip.compress(b"a,b\n" * 1_000_000), "rows.csv.gz"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(200), "rows.csv"),
    "a program": (b"\x7fELF" + bytes(500), "rows.csv"),
    "a PDF": (b"%PDF-1.7\n" + bytes(500), "rows.pdf"),
    "zeros": (bytes(4000), "rows.csv"),
    "noise": (hashlib.sha512(b"x").digest() * 100, "rows.csv"),
    "a line of 10 MB": (b"text,label\n" + b"x" * 10_000_000 + b",a\n", "rows.csv"),
    "a JSON line of 10 MB": (b'{"text": "' + b"x" * 10_000_000 + b'", "label": "a"}\n', "rows.jsonl"),
    "a huge header": (b",".join(b"column%d" % n for n in range(100_000)) + b"\n1\n", "rows.csv"),
    "a column with a huge name": (b"x" * 5_000_000 + b",label\na,b\n", "rows.csv"),
    "Latin-1": (("text,label\n" + "schön,gut\n" * 20).encode("latin-1"), "rows.csv"),
    "bottomless JSON": (b"[" * 100_000, "rows.json"),
    "JSON that is no table": (b"[1, 2, 3]", "rows.json"),
    "a torn JSON": (b'[{"text": "a", "label": "b"}, {"text": ', "rows.json"),
    "JSON with a doubled key": (b'[{"text": "a", "text": "b", "label": "c"}]', "rows.json"),
    "a torn Parquet": (_parquet(100)[:-20], "rows.parquet"),
    "a Parquet of lies": (b"PAR1" + bytes(range(256)) * 4 + b"PAR1", "rows.parquet"),
    "an unclosed quote": (b'text,label\n"never closed,a\n' + b"b,c\n" * 50, "rows.csv"),
}


@pytest.fixture(autouse=True)
def no_canary() -> Iterator[None]:
    CANARY.unlink(missing_ok=True)
    yield
    assert not CANARY.exists(), "An upload was executed."


def _stored() -> set[str]:
    folder = Path(settings.BONSAI_HOME) / "data"
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_a_sentence(name: str) -> None:
    content, filename = HOSTILE[name]
    owner = kit.caller("owner")
    kept, before = kit.table(owner.user), _stored()
    kit.problem(owner.upload(content, filename), 422)
    assert _stored() == before | {str(kept.pk)}
    assert Path(kept.path).read_bytes() == kit.TABLE.encode()
    assert Dataset.objects.count() == 1


@pytest.mark.parametrize("filename", [
    "../../../etc/passwd", "..\\..\\windows\\system32\\rows.csv", "/etc/cron.d/rows", "C:\\rows.csv", "rows.csv\x00.png", "....//....//rows.csv",
    "%2e%2e%2frows.csv", "rows.csv\r\nSet-Cookie: a=b", ".htaccess", "CON", "-rf", "`touch x`.csv", "$(touch x).csv", "a" * 5000 + ".csv",
    "\u202egpj.csv", "<script>alert(1)</script>.csv", "'; DROP TABLE jobs_dataset; --.csv", " ", "~root/rows.csv", "rows\U0001f600.csv",
])  # fmt: skip
def test_a_file_name_is_only_shown(filename: str) -> None:
    owner = kit.caller("owner")
    row = datasets.store(owner.user, filename, [kit.TABLE.encode()])
    assert Path(row.path) == Path(settings.BONSAI_HOME) / "data" / str(row.pk) / "original.csv"
    assert row.name
    assert len(row.name) <= 120
    assert not set(row.name) & set("/\\\x00\r\n\u202e")
    response = owner.upload(kit.TABLE.encode(), filename)
    assert response.status_code == 201
    assert not set(response.json()["name"]) & set("/\\\x00\r\n\u202e")


def test_an_upload_is_kept_as_it_came_and_told_about() -> None:
    owner = kit.caller("owner")
    content = "\ufefftext;label\r\nGrüße;gut\r\nwie bitte;schlecht\r\n".encode()
    response = owner.upload(content, "Meine Daten.csv", name="Mein Name")
    assert response.status_code == 201
    body = response.json()
    assert response["Location"] == f"/api/v1/datasets/{body['id']}"
    assert body["name"] == "Mein Name"
    assert body["sha256"] == hashlib.sha256(content).hexdigest()
    assert (body["bytes"], body["num_rows"], body["columns"]) == (len(content), 2, ["text", "label"])
    assert body["mapping"] == {"text": "text", "label": "label"}
    assert body["labels"] == ["gut", "schlecht"]
    assert body["preview"][0] == {"text": "Grüße", "label": "gut"}
    path = Path(Dataset.objects.get(pk=body["id"]).path)
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert str(settings.BONSAI_HOME) not in json.dumps(body)


def test_what_a_file_is_comes_from_its_content() -> None:
    owner = kit.caller("owner")
    rows = [{"text": f"Text {n}", "label": "ab"[n % 2]} for n in range(12)]
    for content, expected in (
        (json.dumps(rows).encode(), "json"),
        ("\n".join(map(json.dumps, rows)).encode(), "jsonl"),
        (_parquet(12), "parquet"),
    ):
        assert owner.upload(content, "rows").json()["format"] == expected


def test_a_pickle_that_is_also_plain_text_stays_text() -> None:
    owner = kit.caller("owner")
    response = owner.upload(pickle.dumps(_Payload(), protocol=0), "rows.csv")
    assert response.status_code in {201, 422}
    if response.status_code == 201:
        assert all(isinstance(value, str) for row in response.json()["preview"] for value in row.values())


def test_one_class_only_is_noticed_at_once_and_refused_in_a_run() -> None:
    owner = kit.caller("owner")
    body = owner.upload(b"text,label\n" + b"".join(b"row %d,same\n" % n for n in range(20))).json()
    assert "same" in json.dumps(body["findings"])
    assert body["labels"] == ["same"]


def test_a_file_that_unpacks_into_much_more_is_refused_without_reading_it_all() -> None:
    owner = kit.caller("owner")
    content = _parquet(400_000, "abcdefgh" * 2000)  # 6.4 GB of text in a few kilobytes
    assert len(content) < 1_000_000
    kit.problem(owner.upload(content, "rows.parquet"), 422)


def test_one_file_may_have_so_many_bytes(settings: Settings) -> None:
    settings.BONSAI_MAX_UPLOAD_BYTES = 100
    owner, before = kit.caller("owner"), _stored()
    body = kit.problem(owner.upload(kit.TABLE.encode()), 413)
    assert "100 bytes" in body["detail"]
    assert _stored() == before


def test_one_person_has_so_much_room(settings: Settings) -> None:
    settings.BONSAI_DATA_QUOTA_BYTES = len(kit.TABLE) + 50
    owner, other = kit.caller("owner"), kit.caller("other")
    assert owner.upload(kit.TABLE.encode()).status_code == 201
    assert kit.problem(owner.upload(kit.TABLE.encode()), 409)["faults"][0]["code"] == "quota"
    assert other.upload(kit.TABLE.encode()).status_code == 201
    settings.BONSAI_DATA_QUOTA_BYTES, settings.BONSAI_MAX_DATASETS = 1 << 30, 1
    assert kit.problem(owner.upload(kit.TABLE.encode()), 409)["faults"][0]["code"] == "quota"
    usage = owner.get("datasets/usage").json()
    assert (usage["bytes"], usage["datasets"]) == (len(kit.TABLE), 1)


def test_a_stream_that_breaks_leaves_nothing_behind() -> None:
    owner, before = kit.caller("owner"), _stored()

    def broken() -> Iterator[bytes]:
        yield kit.TABLE.encode()
        raise OSError("the wire was cut")

    with pytest.raises(OSError, match="wire"):
        datasets.store(owner.user, "rows.csv", broken())
    assert _stored() == before


def test_a_look_that_takes_too_long_or_dies_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(kit.TABLE, encoding="utf-8")
    monkeypatch.setattr(inspection, "MAX_SECONDS", 0.01)
    with pytest.raises(EngineError, match="took longer"):
        inspection.look(path, "rows.csv")
    monkeypatch.setattr(inspection, "MAX_SECONDS", 60)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(EngineError, match="could not be read"):
        inspection.look(path, "rows.csv")


def test_the_columns_can_be_chosen_and_every_wrong_one_is_named() -> None:
    owner = kit.caller("owner")
    row = kit.table(
        owner.user, "body,topic,other\n" + "".join(f"text {n},{'ab'[n % 2]},{'xyz'[n % 3]}\n" for n in range(12))
    )
    body = owner.ask("PATCH", f"datasets/{row.pk}", {"mapping": {"text": "body", "label": "other"}}).json()
    assert (body["labels"], body["shape"]) == (["x", "y", "z"], "classification")
    body = kit.problem(
        owner.ask("PATCH", f"datasets/{row.pk}", {"mapping": {"text": "nope", "label": "neither", "mood": "body"}}), 422
    )
    assert [fault["where"] for fault in body["faults"]] == ["mapping.text", "mapping.label", "mapping.mood"]
    kit.problem(owner.ask("PATCH", f"datasets/{row.pk}", {"mapping": {"text": "body", "label": "body"}}), 422)
    kit.problem(owner.ask("PATCH", f"datasets/{row.pk}", {"owner": 1}), 422)
    row.refresh_from_db()
    assert row.mapping == {"text": "body", "label": "other"}


def test_data_in_use_stays_and_data_at_rest_goes_with_its_file() -> None:
    owner = kit.caller("owner")
    row = kit.table(owner.user)
    busy = kit.job(owner.user, Status.RUNNING, dataset=row)
    assert kit.problem(owner.ask("DELETE", f"datasets/{row.pk}"), 409)["faults"][0]["code"] == "in_use"
    busy.status = Status.SUCCEEDED
    busy.save()
    assert len(row.sha256) == 64
    made = Path(settings.BONSAI_HOME) / "cache"
    own, note, foreign = (
        made / "tokens" / f"{row.sha256[:24]}-1",
        made / "facts" / f"{row.sha256[:24]}-2.json",
        made / "tokens" / f"{'0' * 24}-1",
    )
    for path in (own, foreign, note.parent):
        path.mkdir(parents=True, exist_ok=True)
    note.write_text("{}")
    twin = kit.table(owner.user)
    Dataset.objects.filter(pk=twin.pk).update(sha256=row.sha256)
    assert owner.ask("DELETE", f"datasets/{row.pk}").status_code == 204
    assert not Path(row.path).parent.exists()
    assert own.exists() and note.exists(), "another data set has the same content"
    assert owner.ask("DELETE", f"datasets/{twin.pk}").status_code == 204
    assert not own.exists() and not note.exists() and foreign.exists(), "nothing that was made of it stays"
    kit.problem(owner.get(f"datasets/{row.pk}"), 404)


def test_starters_belong_to_everyone_and_change_for_no_one() -> None:
    owner = kit.caller("owner")
    row = kit.table(owner.user)
    Dataset.objects.filter(pk=row.pk).update(owner=None, starter="rows")
    assert owner.get(f"datasets/{row.pk}").status_code == 200
    assert kit.problem(owner.ask("DELETE", f"datasets/{row.pk}"), 403)["faults"][0]["code"] == "shared"


@pytest.mark.parametrize(("body", "kind"), [
    (b"no form at all", "multipart/form-data; boundary=x"), (b"", "multipart/form-data"), (b"--x\r\n", "multipart/form-data; boundary=x"),
    (b'--x\r\nContent-Disposition: form-data; name="other"\r\n\r\nhello\r\n--x--\r\n', "multipart/form-data; boundary=x"),
    (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nno file name\r\n--x--\r\n', "multipart/form-data; boundary=x"),
    (b'{"file": "x"}', "application/json"), (b"file=x", "application/x-www-form-urlencoded"), (b"text,label\n", "text/csv"),
])  # fmt: skip
def test_a_form_that_is_none_is_refused(body: bytes, kind: str) -> None:
    from django.test import Client

    owner = kit.caller("owner")
    response = Client().generic(
        "POST", "/api/v1/datasets", body, content_type=kind, headers={"Authorization": f"Bearer {owner.secret}"}
    )
    kit.problem(response, response.status_code)
    assert response.status_code in {400, 422}
