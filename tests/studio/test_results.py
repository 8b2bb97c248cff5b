"""Results on their pages: the verdict, the certificate, trying, taking home, and what others may not see."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from jobs.models import Artifact, Status
from studio.pages import telling
from studio.pages.verdict import rows, verdict
from tests.studio.making import make_data, make_model, make_result, make_run

HOSTILE = '"><script>alert("x")</script>'


@pytest.fixture(autouse=True)
def engine_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on what the engine's catalogue says of a method."""
    monkeypatch.setattr(telling, "catalogue", lambda: {"tasks": [], "methods": []})


@pytest.fixture
def ada(db: None) -> User:
    return User.objects.create_user("ada")


@pytest.fixture
def visitor(ada: User, client: Client) -> Client:
    client.force_login(ada)
    return client


def finished(owner: User, **how: Any) -> Artifact:
    fields = {"dataset": make_data(), "model": make_model(), **how.pop("fields", {})}
    return make_result(make_run(owner, status=Status.SUCCEEDED, done=1.0, **fields), **how)


def html(client: Client, address: str) -> str:
    answer = client.get(address)
    assert answer.status_code == 200, address
    return answer.content.decode()


# -- the verdict ---------------------------------------------------------------------------------------------------------------------


def shares(after: float, baseline: float, num: int = 400, labels: int = 8) -> dict[str, Any]:
    return {
        "metrics": {"eval_accuracy": after},
        "baseline": {"name": "a plain classifier", "eval_accuracy": baseline},
        "data": {"num_holdout": num, "labels": [str(number) for number in range(labels)]},
    }


def losses(after: float, baseline: float, error: float) -> dict[str, Any]:
    sides = {"metrics": after, "baseline": baseline}
    scores = {key: {"eval_loss": loss, "eval_loss_se": error} for key, loss in sides.items()}
    return {**scores, "data": {"num_holdout": 50}}


def test_the_verdict_counts_to_ten_when_ten_is_honest() -> None:
    found = verdict(shares(0.9028, 0.6944))
    assert found.sentence == "Right 9 times of 10 on new examples."
    assert found.rivals == "A plain classifier: 7 times of 10; guessing: 1 of 8."


def test_the_verdict_counts_to_a_hundred_when_ten_would_hide_something() -> None:
    assert verdict(shares(0.75, 0.69)).sentence == "Right 75 times of 100 on new examples."
    assert verdict(shares(0.92, 0.90)).rivals.startswith("A plain classifier: 90 times of 100")


@pytest.mark.parametrize(
    ("description", "tone"),
    [
        (shares(0.90, 0.70), "better"),
        (shares(0.75, 0.69, num=72), "even"),
        (shares(0.60, 0.80), "worse"),
        (losses(1.2, 2.4, 0.03), "better"),
        (losses(1.2, 1.23, 0.03), "even"),
        (losses(2.4, 1.2, 0.03), "worse"),
        ({"metrics": {"eval_accuracy": 0.9}, "baseline": {}, "data": {"num_holdout": 9}}, "unknown"),
        ({"metrics": {}, "baseline": {}}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_a_difference_counts_when_it_is_larger_than_chance(description: Mapping[str, Any], tone: str) -> None:
    assert verdict(description).tone == tone


def test_every_rival_that_was_measured_is_named() -> None:
    description = shares(0.75, 0.69)
    description["baseline"]["also"] = [{"name": "the most frequent label", "eval_accuracy": 0.125}]
    assert (
        verdict(description).rivals == "A plain classifier: 69 times of 100; the most frequent label: 12 times of 100."
    )


def test_perplexity_is_said_in_words() -> None:
    description = losses(1.31, 2.44, 0.02)
    description["metrics"]["eval_perplexity"] = 3.706
    description["baseline"] |= {"eval_perplexity": 11.47, "name": "the same model before training"}
    found = verdict(description)
    assert found.sentence == "On new texts it hesitates between about 3.7 next tokens."
    assert found.rivals == "The same model before training: between 11.5."


def test_the_table_marks_the_best_of_each_row_whichever_way_is_better() -> None:
    table = rows({
        "before": {"eval_loss": 2.0, "eval_accuracy": 0.1}, "baseline": {"eval_loss": 0.5, "eval_accuracy": 0.8},
        "metrics": {"eval_loss": 0.7, "eval_loss_se": 0.01, "eval_accuracy": 0.9, "eval_odd_score": 3.0, "samples": 12, "note": "x"},
    })  # fmt: skip
    assert [(row["name"], row["best"]) for row in table] == [
        ("eval_accuracy", ["after"]), ("eval_loss", ["baseline"]), ("eval_odd_score", ["after"]),
    ]  # fmt: skip
    assert (table[1]["after"], table[1]["error"], table[2]["title"]) == ("0.700", "0.01", "Odd score")


# -- the page ------------------------------------------------------------------------------------------------------------------------


def test_the_page_says_first_how_good_it_is(visitor: Client, ada: User) -> None:
    artifact = finished(ada)
    text = html(visitor, f"/results/{artifact.pk}/")
    order = [
        "Right 9 times of 10",
        "Let it decide",
        "90.3",
        "Certified",
        "merged.zip",
        "Where it comes from",
        artifact.content_id,
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    for form in ("adapter", "lora", "merged"):
        assert f"/api/v1/artifacts/{artifact.pk}/download/{form}" in text
    assert (
        f"/api/v1/jobs/{artifact.job_id}/recipe.yaml" in text and f"/api/v1/jobs/{artifact.job_id}/events.csv" in text
    )
    assert f"/new/?from={artifact.job_id}" in text
    assert f"http://testserver/api/v1/artifacts/{artifact.pk}/predict" in text


def test_the_page_of_the_run_does_not_praise_what_adds_nothing(visitor: Client, ada: User) -> None:
    artifact = finished(ada)
    page = html(visitor, f"/runs/{artifact.job.pk}/")
    assert 'class="note success"' in page and "adds nothing" not in page
    artifact.description["metrics"]["eval_accuracy"] = 0.3
    artifact.save()
    page = html(visitor, f"/runs/{artifact.job.pk}/")
    assert 'class="note warning"' in page and 'class="note success"' not in page and "this result adds nothing" in page


def test_every_download_that_is_offered_is_there(visitor: Client, ada: User) -> None:
    artifact = finished(ada)
    text = html(visitor, f"/results/{artifact.pk}/")
    offered = [part.split('"')[0] for part in text.split('href="/api/v1/')[1:]]
    assert len(offered) == 5
    for address in offered:
        answer = visitor.get(f"/api/v1/{address}")
        assert answer.status_code == 200, address
        assert b"".join(answer.streaming_content) if answer.streaming else answer.content, address


def test_code_fits_what_the_model_does(visitor: Client, ada: User) -> None:
    sorts = html(visitor, f"/results/{finished(ada).pk}/")
    assert "text-classification" in sorts and "num_labels=8" in sorts and "AutoModelForSequenceClassification" in sorts
    writes = html(visitor, f"/results/{finished(ada, writes=True).pk}/")
    assert "text-generation" in writes and "AutoModelForCausalLM" in writes and "Let it write" in writes
    assert "num_labels" not in writes


def test_a_broken_export_is_red_and_says_which_form(visitor: Client, ada: User) -> None:
    text = html(visitor, f"/results/{finished(ada, good=False).pk}/")
    assert "Do not rely on these files" in text and "peft gives the same best answer at 61.0%" in text
    assert "Certified" not in text


def test_a_result_without_a_certificate_says_so(visitor: Client, ada: User) -> None:
    artifact = finished(ada)
    Artifact.objects.filter(pk=artifact.pk).update(certificate={})
    assert "Not checked yet" in html(visitor, f"/results/{artifact.pk}/")


def test_what_others_wrote_never_becomes_markup(visitor: Client, ada: User) -> None:
    artifact = finished(ada, fields={"name": HOSTILE})
    about = artifact.description
    about["samples"] = [{"prompt": HOSTILE, "output": HOSTILE, "expected": HOSTILE}]
    about["data"]["labels"] = [HOSTILE, "other"]
    about["baseline"] |= {"name": HOSTILE, "sentence": HOSTILE}
    about["notes"] = [HOSTILE]
    about["ending"]["message"] = HOSTILE
    about["metrics"]["eval_<script>alert"] = 1.0
    certificate = {"ok": False, "sentence": HOSTILE, "forms": [{"form": HOSTILE, "ok": False, "sentence": HOSTILE}]}
    Artifact.objects.filter(pk=artifact.pk).update(description=about, certificate=certificate)
    for address in (f"/results/{artifact.pk}/", "/results/"):
        text = html(visitor, address)
        assert "<script>alert" not in text and '"><script' not in text
        assert "&lt;script&gt;alert" in text


def test_the_list_and_the_page_read_the_database_a_fixed_number_of_times(visitor: Client, ada: User) -> None:
    counts = []
    for num in (1, 6):
        for _ in range(num):
            artifact = finished(ada)
        with CaptureQueriesContext(connection) as listed:
            html(visitor, "/results/")
        with CaptureQueriesContext(connection) as shown:
            html(visitor, f"/results/{artifact.pk}/")
        counts.append((len(listed), len(shown)))
    assert counts[0] == counts[1]
    assert counts[0][0] <= 6 and counts[0][1] <= 6, counts


def test_the_empty_list_says_what_to_do(visitor: Client) -> None:
    assert "No result yet" in html(visitor, "/results/")


# -- trying it -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"), [("", "There is nothing to read."), ("   ", "There is nothing to read."), ("x" * 20_001, "20,001 characters")]
)  # fmt: skip
def test_a_text_that_cannot_be_read_is_refused_in_a_sentence(visitor: Client, ada: User, text: str, words: str) -> None:
    artifact = finished(ada)
    whole = visitor.post(f"/results/{artifact.pk}/try/", {"text": text})
    assert whole.status_code == 422 and words in whole.content.decode()
    part = visitor.post(f"/results/{artifact.pk}/try/", {"text": text}, headers={"hx-request": "true"})
    assert part.status_code == 200 and words in part.content.decode() and "<html" not in part.content.decode()


def test_files_that_are_gone_are_said_to_be_gone(visitor: Client, ada: User) -> None:
    artifact = finished(ada)
    shutil.rmtree(artifact.folder)
    answer = visitor.post(f"/results/{artifact.pk}/try/", {"text": "hello"})
    assert "The files of this result are gone." in answer.content.decode()


@pytest.mark.slow
def test_what_the_engine_refuses_is_shown_and_keeps_the_text(visitor: Client, ada: User) -> None:
    """The weights of this result are zeros, which the real engine does not take for a model."""
    answer = visitor.post(f"/results/{finished(ada).pk}/try/", {"text": "My parcel & I"})
    text = answer.content.decode()
    assert answer.status_code == 422 and 'class="note error"' in text
    assert "My parcel &amp; I</textarea>" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_check_looks_at_the_files_again(visitor: Client, ada: User) -> None:
    """The certificate says that all is well; the real engine, asked again, finds that the files are no model."""
    artifact = finished(ada)
    answer = visitor.post(f"/results/{artifact.pk}/check/", headers={"hx-request": "true"})
    text = answer.content.decode()
    artifact.refresh_from_db()
    assert (
        "Do not rely on these files" in text
        and "reference.safetensors is missing." in text
        and "Checked just now." in text
    )
    assert artifact.certificate["ok"] is False
