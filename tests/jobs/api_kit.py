"""What the tests of the REST API share: people, their things, and a client that speaks like a program."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.contrib.auth.models import User
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client

from engine.core.artifact import MANIFEST, seal
from jobs import datasets, tokens
from jobs.models import ApiToken, Artifact, Dataset, Event, Job, ModelEntry, Status
from jobs.places import job_folder

API = "/api/v1"
TABLE = "text,label\n" + "".join(
    f"I {verb} number {n},{label}\n" for n in range(10) for verb, label in (("love", "good"), ("hate", "bad"))
)
RECIPE = {
    "version": 1,
    "name": "Mine",
    "operation": "train",
    "task": "classify",
    "model": {"source": "starter:minilm"},
    "data": {"source": "starter:customer-messages"},
    "methods": [{"slug": "lora", "params": {"r": 4}}],
    "settings": {"max_steps": 4},
}


@dataclass
class Caller:
    """One person (or nobody) at the other end of the wire, with a personal token."""

    user: User | None
    secret: str = ""

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """A request; `body` becomes JSON unless it is a form with a file."""
        named = {"Authorization": f"Bearer {self.secret}"} if self.secret else {}
        named |= {key.replace("_", "-"): value for key, value in headers.items()}
        client = Client(raise_request_exception=True)
        address = path if path.startswith("/") else f"{API}/{path}"
        if isinstance(body, dict) and any(isinstance(value, SimpleUploadedFile) for value in body.values()):
            return client.post(address, body, headers=named)
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        return client.generic(method, address, data, content_type="application/json", headers=named)

    def get(self, path: str, **headers: str) -> Any:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Any:
        return self.ask("POST", path, body, **headers)

    def upload(self, content: bytes, filename: str = "rows.csv", **fields: str) -> Any:
        return self.ask("POST", "datasets", {"file": SimpleUploadedFile(filename, content), **fields})


def caller(name: str, *, staff: bool = False) -> Caller:
    """A new person with a token."""
    user = User.objects.create_user(name, is_staff=staff)
    return Caller(user, tokens.issue(user, "test")[1])


def table(owner: User, content: str = TABLE) -> Dataset:
    """A data set of `owner`, stored like any upload."""
    return datasets.store(owner, "rows.csv", [content.encode()])


def job(
    owner: User, status: Status = Status.SUCCEEDED, *, num_events: int = 5, name: str = "Mine", **fields: Any
) -> Job:
    """A job in some state, with events 1 … n."""
    row = Job.objects.create(
        owner=owner,
        name=name,
        request=RECIPE,
        recipe=RECIPE,
        fingerprint="f" * 64,
        status=status,
        last_seq=num_events,
        **fields,
    )
    Event.objects.bulk_create(
        Event(
            job=row,
            seq=n,
            log_seq=n,
            kind="log",
            step=n,
            time=1790000000.0 + n,
            data={"level": "info", "message": f"Line {n}."},
        )
        for n in range(1, num_events + 1)
    )
    return row


def artifact(owner: User, *, name: str = "Mine", size: int = 5000) -> Artifact:
    """A sealed result on disk, as the export writes it, and its row."""
    row = job(owner, name=name)
    folder = job_folder(row.pk) / "artifact"
    for file, content in {
        "adapter/adapter_config.json": b'{"peft_type": "LORA"}',
        "adapter/adapter_model.safetensors": bytes(n % 251 for n in range(size)),
        "merged/config.json": b"{}",
        "recipe.yaml": b"version: 1\n",
        "README.md": b"# Mine\n",
        "artifact.json": json.dumps({"forms": {"adapter": "peft", "merged": "transformers"}}).encode(),
    }.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    content_id = seal(folder)
    certificate = {
        "ok": True,
        "sentence": "A clean process loaded 'adapter' and 'merged' and got the answers of the trained model.",
        "forms": [],
    }
    (folder / "certificate.json").write_text(json.dumps(certificate), encoding="utf-8")
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return Artifact.objects.create(
        job=row,
        folder=str(folder),
        content_id=content_id,
        files=files,
        certificate=certificate,
        bytes=sum(entry["bytes"] for entry in files.values()),
        description=json.loads((folder / "artifact.json").read_text(encoding="utf-8")),
    )


def model(owner: User | None = None) -> ModelEntry:
    """A model entry; without an owner it is everyone's."""
    return ModelEntry.objects.create(
        owner=owner, name="Small", source=f"folder:/srv/{owner}", kind="encoder", family="bert", num_parameters=10
    )


def token(owner: User) -> ApiToken:
    return tokens.issue(owner, "another")[0]


def problem(response: Any, status: int) -> dict[str, Any]:
    """The refusal in `response`, whose form is checked: every fault is made of whole sentences, and nothing of the inside shows."""
    assert response.status_code == status, (response.status_code, response.content[:500])
    assert response["Content-Type"] == "application/problem+json"
    body: dict[str, Any] = json.loads(response.content)
    assert body.keys() == {"type", "title", "status", "detail", "faults"}
    assert body["status"] == status
    assert body["faults"]
    for fault in body["faults"]:
        assert fault.keys() == {"where", "what", "why", "way_out", "code"}
        for part in ("what", "why", "way_out"):
            assert (
                fault[part].strip().endswith((".", "?", "!", "…", ")")) or "/" in fault[part] or "curl" in fault[part]
            ), fault
    text = response.content.decode()
    assert "Traceback" not in text
    assert str(Path(__file__).resolve().parents[2]) not in text
    return body
