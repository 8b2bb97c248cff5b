"""Every page: it answers with and without things to show, in few queries, for the right people, and its links lead somewhere."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from html.parser import HTMLParser

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from jobs import datasets, tokens
from jobs.models import Dataset, ModelEntry, Status
from tests.studio.conftest import Visitor
from tests.studio.making import make_run

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
PLAIN = (
    "/",
    "/new/",
    "/data/",
    "/models/",
    "/methods/",
    "/methods/lora/",
    "/account/",
    "/help/",
    "/search/?q=lo",
    "/queue/",
    "/live/",
)
# One for the session, one for the person, one for the rail; the rest is what the page itself shows.
QUERIES = {
    "/": 7,
    "/new/": 6,
    "/data/": 5,
    "/models/": 4,
    "/methods/": 3,
    "/methods/lora/": 3,
    "/account/": 4,
    "/help/": 3,
    "/search/?q=lo": 6,
    "/queue/": 3,
}
NO_CONTENT = {"input", "img", "br", "hr", "meta", "link", "use", "path", "i", "option", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """What matters about a page's markup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.identifiers: list[str] = []
        self.headings: list[int] = []
        self.labelled: set[str] = set()
        self.fields: list[dict[str, str | None]] = []
        self.scripts: list[str | None] = []
        self.handlers: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if found.get("id"):
            self.identifiers.append(str(found["id"]))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "label" and found.get("for"):
            self.labelled.add(str(found["for"]))
        if tag in {"input", "select", "textarea"} and found.get("type") != "hidden":
            self.fields.append({**found, "inside": "label" if "label" in self.open else None})
        if tag == "script":
            self.scripts.append(found.get("src"))
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name == "style"]
        for name in ("aria-labelledby", "aria-describedby", "popovertarget", "for", "list"):
            self.references += (found.get(name) or "").split()
        if tag not in NO_CONTENT:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass


@pytest.fixture
def full(ada: Visitor, starters: ModelEntry, table: Dataset) -> Visitor:
    """Ada with data, a token, and a run in every state."""
    for number, status in enumerate(Status):
        make_run(
            ada.user, status=status, name=f"Run {status.label}", done=0.5, seed=number, dataset=table, model=starters
        )
    tokens.issue(ada.user, "my notebook")
    return ada


def addresses(person: Visitor) -> list[str]:
    """Every page of this part, with the person's own things."""
    rows = [f"/data/{pk}/" for pk in Dataset.objects.filter(owner__in=[person.user.pk]).values_list("pk", flat=True)]
    entries = [f"/models/{pk}/" for pk in ModelEntry.objects.values_list("pk", flat=True)[:1]]
    return [*PLAIN, *rows, *entries]


def test_every_page_answers_when_there_is_nothing(ada: Visitor) -> None:
    for address in PLAIN:
        ada.read(address)


def test_every_page_answers_when_there_is_much(full: Visitor) -> None:
    for address in addresses(full):
        ada_page = full.read(address)
        assert "None" not in re.sub(r"<[^>]*>", " ", ada_page), address


def test_strangers_are_asked_to_log_in(full: Visitor) -> None:
    for address in [*addresses(full), "/account/tokens/", "/account/password/"]:
        answer = Client().get(address)
        assert answer.status_code == 302 and answer["Location"].startswith("/login/?next="), address


def test_what_belongs_to_others_is_not_there(full: Visitor, bob: Visitor, table: Dataset) -> None:
    own_model = ModelEntry.objects.create(name="Private", source="hub:a/b", kind="encoder", owner=full.user)
    token = full.user.api_tokens.get()
    foreign = uuid.uuid4()
    for address in (f"/data/{table.pk}/", f"/models/{own_model.pk}/", f"/data/{foreign}/", "/methods/no-such-method/"):
        assert bob.get(address).status_code == 404, address
    for address in (f"/data/{table.pk}/columns/", f"/data/{table.pk}/delete/", f"/account/tokens/{token.pk}/revoke/"):
        assert bob.post(address).status_code == 404, address
    assert bob.get(f"/new/?from={full.user.jobs.first().pk}").status_code == 404
    for address in ("/", "/data/", "/models/", "/search/?q=garden", "/search/?q=Run"):
        text = bob.read(address)
        assert "garden.csv" not in text and "Private" not in text and "Run Running" not in text, address


def test_a_foreign_data_set_cannot_be_put_into_a_draft(full: Visitor, bob: Visitor, table: Dataset) -> None:
    bob.get(f"/new/?goal=classify&dataset={table.pk}")
    assert "garden.csv" not in bob.read("/new/")


@pytest.mark.parametrize("address", QUERIES)
def test_pages_ask_the_database_little(full: Visitor, address: str) -> None:
    full.read(address)
    with CaptureQueriesContext(connection) as asked:
        full.read(address)
    assert len(asked) == QUERIES[address], "\n".join(query["sql"][:160] for query in asked)


def test_more_rows_ask_no_more(full: Visitor) -> None:
    counts = []
    for _ in range(2):
        with CaptureQueriesContext(connection) as asked:
            full.read("/data/")
        counts.append(len(asked))
        for number in range(3):
            datasets.store(full.user, f"more {number}.csv", [b"text,label\n" + b"a b,c\nd e,f\n" * 10])
    assert counts[0] == counts[1]


def test_a_page_asks_the_engine_once_at_most(full: Visitor, monkeypatch: pytest.MonkeyPatch, table: Dataset) -> None:
    from engine.client import Engine

    asked: list[str] = []
    call = Engine.call
    monkeypatch.setattr(Engine, "call", lambda self, name, **request: asked.append(name) or call(self, name, **request))
    for address in addresses(full):
        full.read(address)
    assert asked == [], "only the steps of a new run need the engine"
    full.get(f"/new/?goal=classify&dataset={table.pk}&method=lora")
    full.read("/new/")
    assert asked == ["check"]


def test_hostile_text_is_shown_and_not_run(ada: Visitor, starters: ModelEntry) -> None:
    body = f"text,label,{HOSTILE.replace(chr(34), '')}\n" + "".join(
        f"{HOSTILE.replace(chr(34), chr(39))} {n},{'<b>' if n % 2 else '<i>'},x\n" for n in range(20)
    )
    row = datasets.store(ada.user, f"{HOSTILE}.csv".replace("/", "|"), [body.encode()])
    make_run(ada.user, status=Status.RUNNING, name=HOSTILE, done=0.4, warn=HOSTILE, dataset=row, model=starters)
    make_run(ada.user, status=Status.FAILED, name=HOSTILE, message=HOSTILE, reason="bug")
    ModelEntry.objects.create(name=HOSTILE, sentence=HOSTILE, source="hub:a/b", kind=HOSTILE[:20], family=HOSTILE)
    tokens.issue(ada.user, HOSTILE[:100])
    ada.post("/new/", {"step": "goal", "goal": HOSTILE, "name": HOSTILE, "go": "stay", "settings.epochs": HOSTILE})
    pages = [*PLAIN, f"/data/{row.pk}/", f"/models/{ModelEntry.objects.get(source='hub:a/b').pk}/", f"/search/?q={HOSTILE}"]  # fmt: skip
    pages.append(f"/methods/?q={HOSTILE}&goal={HOSTILE}")
    for address in pages:
        text = ada.read(address)
        page = Page(text)
        assert "<script>alert" not in text and "<img" not in text, address
        assert all(page.scripts) and not page.handlers, address


def test_markup_is_sound(full: Visitor) -> None:
    for address in [*addresses(full), "/login/"]:
        text = full.read(address)
        if not text.startswith("<!doctype"):
            continue
        page = Page(text)
        doubled = [name for name, times in Counter(page.identifiers).items() if times > 1]
        assert not doubled, f"{address}: {doubled}"
        assert page.headings.count(1) == 1, f"{address}: one first heading"
        missing = set(page.references) - set(page.identifiers)
        assert not missing, f"{address} refers to {missing}"
        for field in page.fields:
            named = (
                field.get("id") in page.labelled
                or field.get("aria-label")
                or field["inside"]
                or field.get("type") == "submit"
            )
            assert named, f"{address}: a field without a label: {field}"
        assert all(page.scripts), f"{address}: the policy forbids inline scripts"
        assert not page.handlers, f"{address}: {page.handlers}"


def test_links_lead_somewhere(full: Visitor) -> None:
    seen: set[str] = set()
    waiting = ["/", "/help/", *addresses(full)]
    while waiting:
        address = waiting.pop()
        if address in seen:
            continue
        seen.add(address)
        answer = full.get(address)
        assert answer.status_code in (200, 302), f"{address} answers {answer.status_code}"
        if (
            answer.status_code == 302
            or "text/html" not in answer["Content-Type"]
            or address.startswith(("/api/", "/admin/"))
        ):
            continue
        page = Page(answer.content.decode())
        for link in page.links:
            if link.startswith("#"):
                assert link == "#" or link[1:] in page.identifiers or link.startswith("#f-"), (
                    f"{address} points to {link}"
                )
            elif link.startswith(("/", "?")):
                target = link if link.startswith("/") else address.partition("?")[0] + link
                waiting.append(target.partition("#")[0])
            else:
                assert link.startswith("https://arxiv.org/"), f"{address} leads away to {link}"
    assert len(seen) > 60


def test_pages_are_light(full: Visitor) -> None:
    for address in addresses(full):
        assert len(full.read(address).encode()) < 100_000, address


def test_the_rail_says_where_one_is(full: Visitor, table: Dataset) -> None:
    for address, place in (
        ("/", "Home"),
        (f"/data/{table.pk}/", "Data"),
        ("/methods/lora/", "Methods"),
        ("/new/", "New run"),
    ):
        text = full.read(address)
        current = re.search(r'<div class="places">.*?aria-current="page">.*?<span>(.*?)</span>', text, re.DOTALL)
        assert current and current[1] == place


def test_the_queue_is_told_in_numbers_only(full: Visitor, bob: Visitor) -> None:
    text = bob.read("/queue/")
    assert "3 runs at work, 1 waiting" in text and "Run" not in text.replace("runs", "")


def test_home_says_what_runs_and_what_ended(full: Visitor) -> None:
    text = full.read("/")
    assert "is learning" in text and "50 % done" in text and "lower is better" in text
    assert "Run Succeeded" in text and "Run Failed" in text
    panel = full.get("/live/")
    assert "HX-Refresh" not in panel.headers
    full.user.jobs.all().delete()
    assert full.get("/live/").headers["HX-Refresh"] == "true"


def test_home_tells_a_newcomer_three_steps(ada: Visitor, starters: ModelEntry) -> None:
    text = ada.read("/")
    assert "Bring your examples" in text and "Start a run" in text and "Watch it learn" in text
    assert Dataset.objects.get(shape="classification").name in text


def test_the_garden_can_be_narrowed_down(ada: Visitor) -> None:
    everything = ada.read("/methods/")
    assert "LoRA" in everything and "AdamW" in everything
    found = ada.read("/methods/?slot=optimizer")
    assert "AdamW" in found and "LoRA" not in re.sub(r"<option.*?</option>", "", found)
    assert "No method fits all of these at once" in ada.read("/methods/?q=zzzz")
    part = ada.get("/methods/?cost=Light", headers={"hx-request": "true"}).content.decode()
    assert part.lstrip().startswith("<p") and "<html" not in part


def test_a_method_page_tells_everything_of_its_card(ada: Visitor) -> None:
    from django.utils.html import escape

    from engine.core.registry import catalogue

    for slug, method in catalogue().items():
        text = ada.read(f"/methods/{slug}/")
        card = method.card
        for sentence in (
            card.pick_when,
            card.summary,
            card.avoid_when,
            *card.algorithm,
            *card.traps,
            *(figure.paper for figure in card.figures),
        ):
            assert escape(sentence) in text, f"{slug}: {sentence}"
        for field in method.Params.model_fields.values():
            assert escape(field.description) in text


def test_search_finds_by_words_and_answers_in_parts(full: Visitor, table: Dataset) -> None:
    assert "garden.csv" in full.read("/search/?q=gard csv")
    part = full.get("/search/?q=lora", headers={"hx-request": "true"}).content.decode()
    assert "LoRA" in part and "<html" not in part
    assert "Nothing found" in full.read("/search/?q=zzzz")


def test_errors_are_whole_sentences_in_the_same_look(full: Visitor, settings: object) -> None:
    full.client.raise_request_exception = False
    missing = full.get("/nowhere/")
    assert (
        missing.status_code == 404 and b"There is nothing here." in missing.content and b"tokens.css" in missing.content
    )
    forged = Client(enforce_csrf_checks=True)
    forged.force_login(full.user)
    refused = forged.post("/data/")
    assert refused.status_code == 403 and b"The page was open too long." in refused.content


def test_an_unforeseen_error_tells_no_details(full: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("studio.pages.home.found", fail)
    full.client.raise_request_exception = False
    answer = full.get("/search/?q=x")
    assert answer.status_code == 500 and b"Something went wrong inside the studio." in answer.content
    assert b"secret detail" not in answer.content and b"Traceback" not in answer.content


def test_logging_in_and_out(ada: Visitor) -> None:
    client = Client()
    wrong = client.post("/login/", {"username": "ada", "password": "no"})
    assert b"do not belong together" in wrong.content
    right = client.post("/login/?next=/data/", {"username": "ada", "password": "a long password", "next": "/data/"})
    assert right.status_code == 302 and right["Location"] == "/data/"
    away = client.post("/login/", {"username": "ada", "password": "a long password", "next": "https://example.org/"})
    assert away["Location"] == "/"
    assert client.post("/logout/").status_code == 302
    assert client.get("/").status_code == 302
