"""Data on its pages: uploads with and without a script, what was noticed, which column is which, deleting."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile

from jobs import datasets
from jobs.models import Dataset, ModelEntry, Status
from tests.studio.conftest import TABLE, Visitor
from tests.studio.making import make_run

JSON = {"accept": "application/json"}


def upload(person: Visitor, content: bytes, name: str = "garden.csv", **headers: str):  # type: ignore[no-untyped-def]
    return person.post("/data/", {"file": SimpleUploadedFile(name, content)}, headers=headers)


def words(text: str) -> str:
    return unescape(" ".join(re.sub(r"<[^>]*>", " ", text).split()))


def test_an_upload_without_a_script_leads_to_its_page(ada: Visitor) -> None:
    answer = upload(ada, TABLE.encode())
    row = Dataset.objects.get()
    assert answer.status_code == 302 and answer["Location"] == f"/data/{row.pk}/"
    text = words(ada.read(answer["Location"]))
    assert "24 rows, each a text with one of 2 labels." in text
    assert "I love the garden in week 0 praise" in text


def test_an_upload_with_a_script_is_told_where_to_go(ada: Visitor) -> None:
    answer = upload(ada, TABLE.encode(), **JSON)
    assert answer.status_code == 201 and answer.json() == {"next": f"/data/{Dataset.objects.get().pk}/"}


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"", "empty.csv"), (b"text,label\n", "no rows.csv"), (b"\x80\x04\x95junk", "model.pkl"), (b'{"a": 1', "cut off.json")],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_sentences(ada: Visitor, content: bytes, name: str) -> None:
    answer = upload(ada, content, name, **JSON)
    assert answer.status_code == 422
    for fault in answer.json()["faults"]:
        assert fault["what"].endswith(".") and fault["way_out"].endswith(".")
    page = upload(ada, content, name)
    assert page.status_code == 422 and fault["what"] in unescape(page.content.decode())
    assert not Dataset.objects.exists()


def test_a_form_without_a_file_is_told_so(ada: Visitor) -> None:
    answer = ada.post("/data/")
    assert answer.status_code == 422 and "No file came with the form." in answer.content.decode()


def test_findings_name_their_lines(ada: Visitor) -> None:
    upload(ada, (TABLE + ",praise\nI like it,Praise\n").encode())
    text = words(ada.read(f"/data/{Dataset.objects.get().pk}/"))
    assert "Line 26 of the file" in text and "differ only in spelling" in text


def test_conversations_show_what_is_learned(ada: Visitor) -> None:
    turns = [{"role": "user", "content": "Is it dry?"}, {"role": "assistant", "content": "Feel a finger deep."}]
    upload(ada, "\n".join(json.dumps({"messages": turns}) for _ in range(9)).encode(), "talk.jsonl")
    text = words(ada.read(f"/data/{Dataset.objects.get().pk}/"))
    assert "9 conversations between a person and an assistant." in text
    assert "A person says Is it dry? The answer it learns Feel a finger deep." in text


@pytest.mark.parametrize("shape", ["preferences", "instruction", "text"])
def test_every_shape_shows_its_rows(ada: Visitor, shape: str) -> None:
    rows = {
        "preferences": {"prompt": "Why?", "chosen": "Because it rained.", "rejected": "Dunno."},
        "instruction": {"instruction": "Name a tree.", "output": "A juniper, for one."},
        "text": {"text": "Once upon a time a tree stood in a very small pot."},
    }[shape]
    upload(ada, "\n".join(json.dumps(rows) for _ in range(9)).encode(), "rows.jsonl")
    row = Dataset.objects.get()
    assert row.shape == shape
    text = words(ada.read(f"/data/{row.pk}/"))
    assert all(value in text for value in rows.values())


def test_columns_can_be_chosen(ada: Visitor) -> None:
    upload(ada, b"one,two,three\n" + b"".join(b"some words here %d,%d,x%d\n" % (n, n % 2, n % 3) for n in range(12)))
    row = Dataset.objects.get()
    page = ada.read(f"/data/{row.pk}/?map=1")
    assert 'name="classification.text"' in page, "without a script the form stands on the page"
    answer = ada.post(
        f"/data/{row.pk}/columns/",
        {"shape": "classification", "classification.text": "one", "classification.label": "three"},
    )
    assert answer.status_code == 302
    row.refresh_from_db()
    assert row.mapping == {"text": "one", "label": "three"} and row.shape == "classification"
    assert set(row.labels) == {"x0", "x1", "x2"}, "the file is looked at again"


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        ({}, "Say first what each row is."),
        ({"shape": "classification", "classification.text": "text"}, "No column is chosen for the label to learn."),
        (
            {"shape": "classification", "classification.text": "text", "classification.label": "nope"},
            "There is no column 'nope'.",
        ),
        (
            {"shape": "classification", "classification.text": "text", "classification.label": "text"},
            "One column plays two roles.",
        ),
    ],
)
def test_columns_that_cannot_be_are_refused(ada: Visitor, table: Dataset, form: dict[str, str], sentence: str) -> None:
    answer = ada.post(f"/data/{table.pk}/columns/", form)
    assert answer.status_code == 422 and sentence in unescape(answer.content.decode())
    table.refresh_from_db()
    assert table.mapping == {"text": "text", "label": "label"}


def test_data_in_use_cannot_be_deleted(ada: Visitor, table: Dataset, starters: ModelEntry) -> None:
    job = make_run(ada.user, dataset=table)
    answer = ada.post(f"/data/{table.pk}/delete/")
    assert answer.status_code == 422 and "This data is in use." in answer.content.decode()
    type(job).objects.filter(pk=job.pk).update(status=Status.CANCELLED)
    answer = ada.post(f"/data/{table.pk}/delete/")
    assert answer.status_code == 302 and not Dataset.objects.filter(pk=table.pk).exists()
    assert not datasets.folder_of(table.pk).exists()
    assert "“garden.csv” is deleted." in unescape(ada.read("/data/"))


def test_starters_can_be_used_by_all_and_changed_by_nobody(ada: Visitor, starters: ModelEntry) -> None:
    row = Dataset.objects.filter(owner=None).first()
    assert row
    page = ada.read(f"/data/{row.pk}/")
    assert "Delete" not in page and "That is not right" not in page
    assert ada.post(f"/data/{row.pk}/columns/", {}).status_code == 404
    assert ada.post(f"/data/{row.pk}/delete/").status_code == 422
    assert Dataset.objects.filter(pk=row.pk).exists()


def test_training_starts_from_the_page_of_the_data(ada: Visitor, starters: ModelEntry, table: Dataset) -> None:
    link = re.search(r'class="button primary" href="([^"]+)"', ada.read(f"/data/{table.pk}/"))
    assert link
    answer = ada.get(unescape(link[1]))
    text = words(ada.read(answer["Location"]))
    assert "garden.csv, 24 rows" in text and "How?" in text
