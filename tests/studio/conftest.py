"""People, data and the real engine for tests of pages. The engine answers in this process, so no test waits for another to start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client

from engine.client import Engine
from engine.starters import STARTER_DATA
from jobs import catalogue, datasets, inspection
from jobs.models import Dataset, ModelEntry

TABLE = "text,label\n" + "".join(
    f"I {verb} the garden in week {week},{label}\n"
    for week in range(12)
    for verb, label in (("love", "praise"), ("miss", "complaint"))
)
ENCODER = "starter:minilm-l6"


@pytest.fixture(scope="session")
def engine_here(bonsai_home: Any) -> Iterator[None]:
    """Calls that find no service are answered by the engine itself, imported once for all tests."""
    from engine import answers

    def answer(self: Engine, line: bytes) -> bytes:
        return answers.encode(answers.answer(json.loads(line)))

    patch = pytest.MonkeyPatch()
    patch.setattr(Engine, "_ask_process", answer)
    catalogue.refresh()
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def quick_passwords(settings: Any) -> None:
    """A password that is hard to crack takes a third of a second for each person of each test."""
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@pytest.fixture(scope="session")
def shelf(engine_here: None) -> dict[str, Any]:
    """What a look at the starters tells, taken once."""
    looks = {}
    for name, starter in STARTER_DATA.items():
        seen = inspection.look(starter.path, starter.path.name, dict(starter.columns))
        looks[name] = {
            "name": starter.title,
            "starter": name,
            "path": str(starter.path),
            "format": seen["facts"]["format"],
            "sha256": seen["facts"]["sha256"],
            "bytes": starter.path.stat().st_size,
            **datasets.described(seen["facts"], seen),
        }
    facts = catalogue.engine().call("model_facts", source=ENCODER)["facts"]
    return {"data": looks, "facts": facts}


@pytest.fixture
def starters(db: None, shelf: dict[str, Any]) -> ModelEntry:
    """The starter data and the starter encoder, as a fresh installation has them."""
    for values in shelf["data"].values():
        Dataset.objects.create(**values)
    facts = shelf["facts"]
    known = next(model for model in catalogue.catalogue()["models"] if model["source"] == ENCODER)
    return ModelEntry.objects.create(
        name=known["title"], source=ENCODER, sentence=known["sentence"], kind=facts["kind"], family=facts["family"],
        num_parameters=facts["num_parameters"], facts=facts,
    )  # fmt: skip


@dataclass
class Visitor:
    """Somebody in front of a browser."""

    user: User
    client: Client

    def get(self, address: str, **extra: Any) -> Any:
        return self.client.get(address, **extra)

    def post(self, address: str, data: dict[str, Any] | None = None, **extra: Any) -> Any:
        return self.client.post(address, data or {}, **extra)

    def read(self, address: str, status: int = 200, **extra: Any) -> str:
        """The text of a page."""
        answer = self.get(address, **extra)
        assert answer.status_code == status, f"{address} answers {answer.status_code}"
        return str(answer.content.decode())


def visitor(name: str, **fields: Any) -> Visitor:
    """A new person, logged in."""
    user = User.objects.create_user(name, password="a long password", **fields)
    client = Client(enforce_csrf_checks=False)
    client.force_login(user)
    return Visitor(user, client)


@pytest.fixture
def ada(db: None, engine_here: None) -> Visitor:
    return visitor("ada")


@pytest.fixture
def bob(db: None, engine_here: None) -> Visitor:
    return visitor("bob")


@pytest.fixture
def staff(db: None, engine_here: None) -> Visitor:
    return visitor("grace", is_staff=True)


@pytest.fixture
def table(ada: Visitor) -> Dataset:
    """A small table of Ada's, stored like any upload."""
    return datasets.store(ada.user, "garden.csv", [TABLE.encode()])
