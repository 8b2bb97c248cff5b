"""New run: from four answers to a real job; what is wrong is said at its place; nothing that was chosen is lost."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest
from django.http import QueryDict

from jobs.models import Dataset, Job, ModelEntry, Status
from studio.pages import garden
from tests.studio.conftest import Visitor


class Form:
    """The form of the page as a browser without scripts holds it."""

    def __init__(self, person: Visitor, text: str) -> None:
        self.person = person
        self.text = text
        self.data = QueryDict(mutable=True)
        form = re.search(r'<form method="post" action="/new/" class="steps".*?</form>', text, re.DOTALL)
        assert form
        for tag in re.findall(r"<input[^>]*>", form[0]):
            found = {name: unescape(value) for name, value in re.findall(r'([\w-]+)="([^"]*)"', tag)}
            if found.get("type") in {"radio", "checkbox"} and " checked" not in tag:
                continue
            self.data.appendlist(found["name"], found.get("value", ""))
        for name, options in re.findall(r'<select[^>]* name="([^"]*)"[^>]*>(.*?)</select>', form[0], re.DOTALL):
            chosen = re.search(r'<option value="([^"]*)" selected', options)
            self.data.appendlist(name, unescape(chosen[1]) if chosen else "")
        for name, value in re.findall(r'<textarea[^>]* name="([^"]*)"[^>]*>(.*?)</textarea>', form[0], re.DOTALL):
            self.data.appendlist(name, unescape(value))

    def press(self, go: str, **typed: Any) -> Any:
        """Send the form with one button, as the browser would."""
        data = {name: self.data.getlist(name) for name in self.data}
        data.update({name.replace("__", "."): value for name, value in typed.items()})
        return self.person.post("/new/", {**data, "go": go})

    def on(self, go: str = "next", **typed: Any) -> Form:
        """Send the form and follow to the page that comes."""
        answer = self.press(go, **typed)
        if answer.status_code == 302:
            return Form(self.person, self.person.read(answer["Location"]))
        return Form(self.person, answer.content.decode())


def begin(person: Visitor) -> Form:
    return Form(person, person.read("/new/"))


@pytest.fixture
def at_check(ada: Visitor, starters: ModelEntry, table: Dataset) -> Form:
    """The fourth step, reached by pressing Continue only."""
    return begin(ada).on(goal="classify").on(dataset=str(table.pk)).on()


def visible(text: str) -> str:
    return unescape(" ".join(re.sub(r"<[^>]*>", " ", text).split()))


def test_pressing_on_four_times_starts_a_run(ada: Visitor, starters: ModelEntry) -> None:
    form = begin(ada)
    for title in ("Which data?", "How?", "Check and start"):
        form = form.on()
        assert title in visible(form.text)
    assert "Ready to start" in form.text
    answer = form.press("start")
    job = Job.objects.get()
    assert answer.status_code == 302 and answer["Location"] == f"/runs/{job.pk}/"
    assert job.status == Status.QUEUED and job.owner == ada.user and job.dataset and job.model == starters
    assert job.recipe["settings"]["learning_rate"] > 0, "what was left open is filled in"
    assert job.request["settings"] == {}, "and what nobody changed is not stated"
    assert "Not chosen yet" in ada.read("/new/"), "the next run begins with an empty draft"


def test_the_first_goal_is_one_that_can_be_reached(ada: Visitor, starters: ModelEntry, table: Dataset) -> None:
    text = visible(begin(ada).text)
    assert text.index("Sort texts") < text.index("You would have to bring")


def test_what_does_not_fit_stands_there_with_its_reason(ada: Visitor, starters: ModelEntry, table: Dataset) -> None:
    form = begin(ada).on(goal="classify")
    assert "This goal learns from something else." in form.text
    form = form.on(dataset=str(table.pk))
    unfit = re.findall(
        r'<div class="choice unfit"><span class="title">(.*?)</span><span class="says">(.*?)</span>', form.text
    )
    fit = re.findall(r'name="method" value="([^"]+)"', form.text)
    mains = {plant.slug: plant.title for plant in garden.plants() if plant.is_main}
    assert len(fit) + len([title for title, _ in unfit if title in mains.values()]) == len(mains)
    assert all(why.strip().endswith(".") for _, why in unfit)
    assert form.text.count("recommended") == 1


def test_the_recommended_method_is_the_lightest_that_fits(ada: Visitor, starters: ModelEntry, table: Dataset) -> None:
    form = begin(ada).on(goal="classify").on(dataset=str(table.pk))
    fit = re.findall(r'name="method" value="([^"]+)"', form.text)
    weights = [found.weight for slug in fit if (found := garden.plant(slug)) and found.role == "train"]
    first = [found.first_choice for slug in fit if (found := garden.plant(slug)) and found.role == "train"]
    assert first == sorted(first, reverse=True) and weights[: sum(first)] == sorted(weights[: sum(first)])
    roles = [found.role for slug in fit if (found := garden.plant(slug))]
    assert roles == sorted(roles, key=list(garden.KINDS).index), "one kind of work after the other"
    assert form.data["method"] == fit[0]
    assert "asks for the least time and memory" in form.text


def test_five_dials_with_suggestions_and_reasons(at_check: Form) -> None:
    dials = re.findall(
        r'<div class="field dial.*?data-dial>(.*?)<p class="help"', at_check.text.split('id="expert"')[0], re.DOTALL
    )
    names = [re.search(r'name="((?:settings|params)[^"]+)"', dial)[1] for dial in dials]  # type: ignore[index]
    assert names[:4] == ["settings.learning_rate", "settings.epochs", "settings.batch_size", "settings.max_length"]
    assert len(names) == 5 and names[4].startswith("params.")
    assert all("Suggested:" in dial for dial in dials[:4])
    assert all(float(at_check.data[name]) > 0 for name in names[:4])


def test_every_dial_of_every_method_in_the_run_is_on_the_page(at_check: Form) -> None:
    composed = at_check.data.getlist("composed")
    for slug in composed:
        found = garden.plant(slug)
        assert found
        for dial in found.dials:
            assert f'name="{dial.where}"' in at_check.text
    assert all(f'name="{dial.where}"' in at_check.text for dial in garden.setting_dials())


def test_a_changed_dial_is_what_runs(at_check: Form) -> None:
    method = at_check.data.getlist("composed")[0]
    basic = next(dial for dial in garden.plant(method).dials if dial.tier == "basic")  # type: ignore[union-attr]
    at_check.press(
        "start", settings__epochs="2", settings__seed="5", name="  Mine  ", **{basic.where.replace(".", "__"): "4"}
    )
    job = Job.objects.get()
    assert job.name == "Mine"
    assert job.request["settings"] == {"epochs": 2.0, "seed": 5}
    assert job.recipe["methods"][0]["params"][basic.name] == 4


def test_a_default_method_is_named_once_it_is_changed(at_check: Form) -> None:
    default = next(item for item in at_check.data.getlist("composed")[1:] if garden.plant(item).dials)  # type: ignore[union-attr]
    dial = next(dial for dial in garden.plant(default).dials if dial.widget == "number")  # type: ignore[union-attr]
    at_check.press("start", **{dial.where.replace(".", "__"): str(dial.high)})
    named = {ref["slug"]: ref["params"] for ref in Job.objects.get().request["methods"]}
    assert named[default] == {dial.name: dial.high}


def test_faults_are_sentences_at_their_field_and_in_a_list(at_check: Form) -> None:
    answer = at_check.press("start", settings__learning_rate="20", settings__epochs="many")
    text = answer.content.decode()
    assert answer.status_code == 422 and not Job.objects.exists()
    assert "2 things to mend before it can start" in text
    for name, sentence in (("learning_rate", "“Learning rate” is 20"), ("epochs", "That is not a number")):
        note = re.search(rf'name="settings\.{name}".*?data-live>(.*?)<p class="help"', text, re.DOTALL)
        assert note and sentence in note[1], name
        assert sentence in text.split('class="fault-list"')[1]
    form = Form(at_check.person, text)
    assert form.data["settings.epochs"] == "many", "what was typed is still there"
    assert float(form.data["settings.batch_size"]) > 0, "and so is the advice on everything else"


def test_what_could_not_be_read_is_still_said_after_a_reload(at_check: Form) -> None:
    at_check.press("stay", settings__epochs="many")
    text = at_check.person.read("/new/?at=check")
    assert 'value="many"' in text and "1 thing to mend" in text


def test_a_dial_can_be_put_back(at_check: Form) -> None:
    suggested = at_check.data["settings.epochs"]
    form = at_check.on("stay", settings__epochs="99")
    assert f"Suggested was {suggested}" in form.text and "Put back" in form.text
    form = form.on("put-back:settings.epochs")
    assert form.data["settings.epochs"] == suggested and "Suggested was" not in form.text


def test_two_clicks_are_one_run(at_check: Form) -> None:
    key = at_check.person.client.session["draft"]["key"]
    at_check.press("start")
    session = at_check.person.client.session
    session["draft"] = {"goal": "classify", "dataset": str(Dataset.objects.get(name="garden.csv").pk),
                        "model": str(ModelEntry.objects.get().pk), "method": at_check.data.getlist("composed")[0], "key": key}  # fmt: skip
    session.save()
    at_check.press("start")
    assert Job.objects.count() == 1


def test_the_draft_survives_leaving(at_check: Form, ada: Visitor) -> None:
    at_check.press("stay", settings__epochs="3", name="Later")
    ada.read("/data/")
    form = begin(ada)
    assert form.data["settings.epochs"] == "3" and form.data["name"] == "Later"
    assert "Sort texts" in visible(form.text)


def test_another_goal_drops_only_what_no_longer_fits(at_check: Form) -> None:
    form = at_check.on("edit:goal")
    assert form.data["step"] == "goal"
    other = next(goal["name"] for goal in garden.goals() if "encoder" not in goal["model_kinds"])
    form = form.on(goal=other)
    draft = at_check.person.client.session["draft"]
    assert draft["goal"] == other and draft["dataset"] == "" and draft["model"] == ""
    assert "Which data?" in visible(form.text)


def test_a_step_cannot_be_reached_before_the_one_before_it(ada: Visitor, starters: ModelEntry) -> None:
    assert Form(ada, ada.read("/new/?at=check")).data["step"] == "goal"


def test_more_methods_can_be_added(ada: Visitor, starters: ModelEntry, table: Dataset) -> None:
    watchers = [plant.slug for plant in garden.plants() if plant.slots == ["watcher"]]
    schedules = [plant.slug for plant in garden.plants() if plant.slots == ["schedule"] and not plant.default]
    form = begin(ada).on(goal="classify").on(dataset=str(table.pk)).on(extra=watchers[:1], one__schedule=schedules[0])
    titles = [found.title for slug in (watchers[0], schedules[0]) if (found := garden.plant(slug))]
    assert f"with {' and '.join(titles)}" in visible(form.text)
    form.press("start")
    named = [ref["slug"] for ref in Job.objects.get().request["methods"]]
    assert {watchers[0], schedules[0]} <= set(named)


def test_the_recipe_can_be_taken_and_brought_back(at_check: Form) -> None:
    form = at_check.on("stay", settings__epochs="7", settings__seed="3")
    recipe = re.search(r'<pre[^>]*id="recipe-text"[^>]*>(.*?)</pre>', form.text, re.DOTALL)
    assert recipe
    text = unescape(recipe[1])
    assert "/" not in re.search(r"source: (.*)", text)[1], "no path of this machine is shown"  # type: ignore[index]
    at_check.person.post("/new/", {"go": "reset"})
    again = begin(at_check.person).on("paste", recipe=text)
    assert again.data["step"] == "check" and again.data["settings.epochs"] == "7" and again.data["settings.seed"] == "3"
    again.press("start")
    assert Job.objects.get().recipe["settings"]["seed"] == 3


@pytest.mark.parametrize("text", ["a: [", "just words", "- 1", "version: 1\ntask: classify\nsurprise: 1", ""])
def test_a_recipe_that_cannot_be_read_is_refused_in_sentences(at_check: Form, text: str) -> None:
    answer = at_check.press("paste", recipe=text)
    assert answer.status_code == 422
    assert 'class="note error"' in answer.content.decode()
    assert at_check.person.client.session["draft"]["goal"] == "classify", "the draft is kept"


def test_again_with_changes_begins_from_the_earlier_run(at_check: Form, ada: Visitor) -> None:
    at_check.press("start", settings__epochs="2", name="Once")
    earlier = Job.objects.get()
    form = Form(ada, ada.read(ada.get(f"/new/?from={earlier.pk}")["Location"]))
    assert form.data["settings.epochs"] == "2" and form.data["step"] == "check"
    form.press("start", settings__epochs="3", name="Twice")
    later = Job.objects.get(name="Twice")
    assert later.again_of == earlier and later.request["settings"]["epochs"] == 3.0


def test_a_link_can_fill_in_what_is_known(ada: Visitor, starters: ModelEntry, table: Dataset) -> None:
    answer = ada.get(f"/new/?goal=classify&dataset={table.pk}&method=lora&fresh=1")
    form = Form(ada, ada.read(answer["Location"]))
    assert form.data["step"] == "how" and form.data["method"] == "lora"


def test_a_link_with_nonsense_harms_nothing(ada: Visitor, starters: ModelEntry) -> None:
    for address in ("/new/?goal=nope", "/new/?dataset=nope&goal=classify", "/new/?at=nope", "/new/?method=../../etc"):
        answer = ada.get(address)
        assert answer.status_code in (200, 302)
        ada.read("/new/")
    assert ada.get("/new/?from=nope").status_code == 404


def test_a_refused_start_says_why(at_check: Form, settings: Any) -> None:
    settings.BONSAI_MAX_WAITING_JOBS = 0
    answer = at_check.press("start")
    assert answer.status_code == 409
    assert "jobs waiting already" in answer.content.decode()


def test_data_that_vanished_is_asked_for_again(at_check: Form, table: Dataset) -> None:
    table.delete()
    answer = at_check.press("start")
    assert not Job.objects.exists()
    text = answer.content.decode() if answer.status_code != 302 else at_check.person.read(answer["Location"])
    assert "The data set that you had chosen is not there any more." in text
    assert Form(at_check.person, text).data["step"] == "data"


def test_htmx_gets_the_steps_alone(at_check: Form) -> None:
    data = {name: at_check.data.getlist(name) for name in at_check.data}
    answer = at_check.person.post("/new/", {**data, "go": "edit:data"}, headers={"hx-request": "true"})
    text = answer.content.decode()
    assert text.lstrip().startswith('<div id="wizard"') and answer["HX-Push-Url"] == "/new/?at=data"
    answer = at_check.person.post("/new/", {**data, "go": "start"}, headers={"hx-request": "true"})
    assert answer.status_code == 204 and answer["HX-Redirect"] == f"/runs/{Job.objects.get().pk}/"


def test_an_engine_that_is_away_is_said_and_nothing_is_lost(at_check: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.client import Engine
    from engine.core.errors import EngineError, Fault

    def away(self: Engine, name: str, **_: Any) -> dict[str, Any]:
        fault = Fault(
            where="engine", what="The engine could not be started.", why="It is away.", way_out="Wait.", code="away"
        )
        raise EngineError(fault, "environment")

    monkeypatch.setattr(Engine, "call", away)
    form = at_check.on("start")
    assert "The engine could not be started." in form.text and not Job.objects.exists()
    assert form.data["settings.seed"]


def test_the_estimate_is_true_for_what_is_on_the_page(at_check: Form) -> None:
    short = re.search(r"([\d,]+) steps", at_check.text)
    long = re.search(r"([\d,]+) steps", at_check.on("stay", settings__epochs="100").text)
    assert short and long and int(long[1].replace(",", "")) > 5 * int(short[1].replace(",", ""))
