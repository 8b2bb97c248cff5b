"""What the four steps of a new run show: choices that fit and why others do not, advice, estimate, faults at their place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from django.contrib.auth.models import User

from jobs import plain
from jobs.access import artifacts_for, datasets_for, models_for, parse_id
from jobs.actions import Create
from jobs.models import Dataset, ModelEntry
from studio.pages import garden, words
from studio.pages.dials import Dial, Field, render
from studio.pages.draft import RESULT, Draft, source_of

STEPS = ("goal", "data", "how", "check")
NUM_BASIC = 5
MAX_RESULTS = 200
_METHOD = re.compile(r"methods\[(\d+)\](?:\.params)?\.?(.*)")


@dataclass
class Choice:
    """One thing to choose, and why not when it does not fit."""

    value: str
    title: str
    sentence: str = ""
    says: str = ""
    fits: bool = True
    why_not: str = ""
    way_out: str = ""
    extra: Any = None


@dataclass(frozen=True)
class Start:
    """Something that a run may start from. `entry` is the row of an offered model; a result has none."""

    value: str  # as the draft holds it
    name: str
    sentence: str
    kind: str
    num_parameters: int
    source: str
    entry: ModelEntry | None


@dataclass
class Group:
    """Dials of one method, or of the run itself."""

    title: str
    sentence: str
    fields: list[Field]
    slug: str = ""


@dataclass
class Plan:
    """A draft, seen with the rights of a person and judged by the engine."""

    user: User
    draft: Draft
    unread: list[dict[str, str]] = field(default_factory=list)  # texts that are no values

    # --- what is chosen ----------------------------------------------------------------------------------------------
    @cached_property
    def goal(self) -> dict[str, Any] | None:
        return garden.goal(self.draft.goal)

    @cached_property
    def datasets(self) -> list[Dataset]:
        return list(datasets_for(self.user).only("id", "name", "shape", "num_rows", "labels", "owner_id", "starter"))

    @cached_property
    def models(self) -> list[ModelEntry]:
        return list(
            models_for(self.user)
            .only("id", "name", "sentence", "kind", "num_parameters", "source")
            .order_by("num_parameters", "name")
        )

    @cached_property
    def starts(self) -> list[Start]:
        """Everything that a run may start from: the models that are offered, and the results that are whole models."""
        offered = [
            Start(str(row.pk), row.name, row.sentence, row.kind, row.num_parameters, row.source, row)
            for row in self.models
        ]
        return [*offered, *self._results]

    @cached_property
    def _results(self) -> list[Start]:
        kinds = {goal["name"]: goal["model_kinds"] for goal in garden.goals()}
        found = []
        for row in artifacts_for(self.user).select_related("job__model").defer("files")[:MAX_RESULTS]:
            about = row.description
            if "merged" not in about.get("forms", {}) or not kinds.get(about.get("task")):
                continue
            kind = row.job.model.kind if row.job.model is not None else kinds[about["task"]][0]
            size = int((about.get("base") or {}).get("num_parameters") or 0)
            found.append(Start(f"{RESULT}{row.pk}", row.job.name, "A result of yours.", kind, size, "", None))
        return found

    @cached_property
    def dataset(self) -> Dataset | None:
        return next((row for row in self.datasets if row.pk == parse_id(self.draft.dataset)), None)

    @cached_property
    def model(self) -> Start | None:
        return next((start for start in self.starts if start.value == self.draft.model), None)

    @cached_property
    def method(self) -> garden.Plant | None:
        return garden.plant(self.draft.method)

    def forget_what_no_longer_fits(self) -> None:
        """A new goal may need other data, another model, another method."""
        draft, goal = self.draft, self.goal
        if goal is None:
            draft.goal = ""
            return
        if self.dataset is None or self.dataset.shape not in goal["data_shapes"]:
            draft.dataset = ""
        if self.model is None or self.model.kind not in goal["model_kinds"]:
            draft.model = ""
        if self.method is None or not self.method.suits(draft.goal):
            draft.method = ""
        for name in ("dataset", "model", "method"):
            self.__dict__.pop(name, None)

    def forget_what_vanished(self) -> None:
        """What was deleted since it was chosen has to be chosen again; the reason is told like any other fault."""
        draft = self.draft
        for name, row, words_for in (
            ("dataset", self.dataset, "data set"),
            ("model", self.model, "model"),
            ("method", self.method, "method"),
        ):
            if getattr(draft, name) and row is None:
                setattr(draft, name, "")
                self.unread.append({
                    "where": name, "what": f"The {words_for} that you had chosen is not there any more.", "why": "It was deleted or removed.",
                    "way_out": "Choose another one.", "code": "vanished",
                })  # fmt: skip

    def step(self, asked: str = "") -> str:
        """The step that is open: the one that was asked for, unless an earlier one is not done."""
        draft = self.draft
        done = {
            "goal": bool(draft.goal),
            "data": bool(draft.dataset),
            "how": bool(draft.model and draft.method),
            "check": False,
        }
        for step in STEPS:
            if step == asked or not done[step]:
                return step
        return "check"

    # --- choices -----------------------------------------------------------------------------------------------------
    @cached_property
    def goals(self) -> list[Choice]:
        """The goals; those first for which there are data and a model already."""
        titles = {shape["name"]: shape["title"] for shape in plain.shapes()}
        choices = []
        for goal in garden.goals():
            learns = words.spoken([titles.get(name, name).lower() for name in goal["data_shapes"]], "or")
            fitting = [row for row in self.datasets if row.shape in goal["data_shapes"]]
            lacks = [] if any(row.kind in goal["model_kinds"] for row in self.models) else ["a model that can do this"]
            lacks = ["such data", *lacks] if not fitting else lacks
            says = f"Learns from {learns}." + (f" You would have to bring {words.spoken(lacks)}." if lacks else "")
            own = any(row.owner_id == self.user.pk for row in fitting)
            choices.append(Choice(goal["name"], goal["title"], goal["sentence"], says, extra=(len(lacks), not own)))
        return sorted(choices, key=lambda choice: choice.extra)

    @property
    def data(self) -> list[Choice]:
        choices = []
        for row in self.datasets:
            fits = self.goal is not None and row.shape in self.goal["data_shapes"]
            labels = f", {words.count(len(row.labels), 'label')}" if row.labels else ""
            says = f"{words.count(row.num_rows, 'row')}{labels} · {plain.shape_title(row.shape)}"
            why = (
                ""
                if fits
                else f"These rows are: {plain.shape_title(row.shape).lower()}. This goal learns from something else."
            )
            choices.append(Choice(str(row.pk), row.name, "Comes with the studio" if row.owner_id is None else "", says, fits, why,
                                  "Open it to say which column is which."))  # fmt: skip
        return sorted(choices, key=lambda choice: not choice.fits)

    @property
    def model_choices(self) -> list[Choice]:
        choices = []
        for start in self.starts:
            fits = self.goal is not None and start.kind in self.goal["model_kinds"]
            wanted = words.spoken([_a(kind) for kind in self.goal["model_kinds"]], "or") if self.goal else ""
            why = "" if fits else f"It is {_a(start.kind)}, and this goal needs {wanted}."
            says = f"{words.short(start.num_parameters)} numbers" if start.num_parameters else ""
            choices.append(Choice(start.value, start.name, start.sentence, says, fits, why))
        return sorted(choices, key=lambda choice: not choice.fits)

    @property
    def more_models(self) -> list[Choice]:
        """Further models that the standing method could take, beside the first."""
        fitting = [choice for choice in self.model_choices if choice.fits and choice.value != self.shown_model]
        return fitting

    @property
    def more_models_words(self) -> str:
        """How many further models the standing method takes."""
        plant = garden.plant(self.shown_method)
        if plant is None or plant.more_models == (0, 0):
            return ""
        low, high = plant.more_models
        how_many = words.count(low, "further model") if low == high else f"at least {words.count(low, 'further model')}"
        return f"{plant.title} takes {how_many}. Its page says what each of them is for."

    @cached_property
    def standing_model(self) -> Choice | None:
        """The model that stands there: the chosen one, or the first that fits."""
        return _standing(self.model_choices, self.draft.model)

    @property
    def shown_model(self) -> str:
        return self.standing_model.value if self.standing_model else ""

    @cached_property
    def methods(self) -> list[Choice]:
        """The methods that say what learns: the recommended one first, the unfit ones last."""
        found = [plant for plant in garden.plants() if plant.is_main]
        choices = [self._choice(plant) for plant in found]
        choices.sort(key=lambda c: (not c.fits, not c.extra.first_choice, c.extra.weight, c.title))
        fitting = [choice for choice in choices if choice.fits and choice.extra.first_choice]
        if fitting and self.verdicts:
            others = len(fitting) - 1
            fitting[0].says = "It fits your data and model" + (
                f", and asks for the least time and memory of the {len(fitting)} that suit nearly everyone."
                if others
                else "."
            )
        kinds = list(garden.KINDS)
        return sorted(choices, key=lambda choice: kinds.index(choice.extra.role))

    @cached_property
    def method_groups(self) -> list[dict[str, Any]]:
        """The methods by kind of work. In front stand those that suit nearly everyone, and the chosen one; the others lie in a fold."""
        groups = []
        for role, (title, sentence) in garden.KINDS.items():
            found = [choice for choice in self.methods if choice.extra.role == role]
            front = [c for c in found if c.fits and (c.extra.first_choice or c.value == self.shown_method)]
            more = [choice for choice in found if choice not in front]
            if found:
                groups.append(
                    {
                        "role": role,
                        "title": title,
                        "sentence": sentence,
                        "front": front,
                        "more": more,
                        "num": len(found),
                    }
                )
        return groups

    @cached_property
    def standing_method(self) -> Choice | None:
        """The method that stands there: the chosen one, or the recommended one."""
        return _standing(self.methods, self.draft.method)

    @property
    def shown_method(self) -> str:
        return self.standing_method.value if self.standing_method else ""

    def _choice(self, plant: garden.Plant) -> Choice:
        verdict = self.verdicts.get(plant.slug)
        fits = verdict["ok"] if verdict else plant.suits(self.draft.goal)
        why, way_out = (verdict["why"], verdict["way_out"]) if verdict else ("It is made for another goal.", "")
        return Choice(
            plant.slug,
            plant.title,
            plant.pick_when,
            fits=fits,
            why_not="" if fits else why,
            way_out="" if fits else way_out,
            extra=plant,
        )

    @cached_property
    def extras(self) -> list[dict[str, Any]]:
        """The other places of a run, with who could stand there."""
        standing = {item["slot"]: item["slug"] for item in self.composition if item["default"]}
        groups = []
        if self.method is not None and not self.method.takes_extras:
            return []
        around = [plant for plant in garden.plants() if plant.role == garden.AROUND and plant.suits(self.draft.goal)]
        if around:
            chosen = [plant.slug for plant in around if plant.slug in self.draft.extras]
            groups.append({"name": garden.AROUND, "title": "Search", "law": "Several trainings, to find better settings.", "one": True,
                           "default": None, "chosen": chosen, "choices": [self._choice(plant) for plant in around]})  # fmt: skip
        for slot in garden.slots():
            found = [plant for plant in garden.plants() if slot["name"] in plant.slots and not plant.is_main]
            found = [plant for plant in found if plant.slots[0] == slot["name"] and plant.suits(self.draft.goal)]
            if slot["name"] == garden.MAIN_SLOT or not found:
                continue
            default = garden.plant(standing.get(slot["name"], ""))
            default = default or next((plant for plant in found if plant.default), None)
            if slot["arity"] == "one" and len(found) < 2:
                continue
            groups.append({
                **slot, "one": slot["arity"] == "one", "default": default, "chosen": [plant.slug for plant in found if plant.slug in self.draft.extras],
                "choices": [self._choice(plant) for plant in found if not (slot["arity"] == "one" and default and plant.slug == default.slug)],
            })  # fmt: skip
        return groups

    # --- what the engine says ------------------------------------------------------------------------------------------
    @cached_property
    def _judged(self) -> tuple[dict[str, Any], list[dict[str, str]]]:
        return self._ask(self.draft)

    def _ask(self, draft: Draft) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """The engine's answer, and what is wrong. Nothing is asked before goal, data and a model are known."""
        model = self.model or next((start for start in self.starts if start.value == self.shown_model), None)
        if self.goal is None or self.dataset is None or model is None:
            return {}, []
        recipe = replace(draft, model=model.value).recipe()
        create = Create(owner=self.user, recipe=recipe, name=draft.name, dataset=self.dataset, model=model.entry)
        try:
            answer = create.inspect()
        except plain.Refused as error:
            return {}, plain.faults_of(error)
        return answer, answer.get("faults", [])

    @property
    def answer(self) -> dict[str, Any]:
        return self._judged[0]

    @property
    def verdicts(self) -> dict[str, dict[str, Any]]:
        return self.answer.get("verdicts", {})

    @property
    def composition(self) -> list[dict[str, Any]]:
        return self.answer.get("composition", [])

    @cached_property
    def faults(self) -> list[dict[str, str]]:
        """Everything that is wrong, at the place of the form where it can be mended."""
        if not self.draft.complete:
            return [*self.unread, *(fault for fault in self._judged[1] if not self.answer)]
        found = [self._at_home(fault) for fault in self._judged[1]]
        return [*map(self._at_home, self.unread), *(fault for fault in found if fault["where"] not in self.draft.typed)]

    def _at_home(self, fault: dict[str, str]) -> dict[str, str]:
        """The fault with the words and the anchor of its field."""
        where = self.place(fault["where"])
        dial = self._dials.get(where)
        if dial is None:
            return {**fault, "where": where}
        what = fault["what"].replace(f"'{dial.name}'", f"“{dial.label}”")
        return {**fault, "where": where, "what": what, "anchor": Field(dial=dial).identifier}

    @cached_property
    def _dials(self) -> dict[str, Dial]:
        """Every dial that a fault can point to, by its place in the form."""
        named = dict.fromkeys([*self.draft.slugs, *self.draft.params])
        found = [
            *garden.setting_dials(),
            *(dial for slug in named if (plant := garden.plant(slug)) for dial in plant.dials),
        ]
        return {dial.where: dial for dial in found}

    def place(self, where: str) -> str:
        """From the engine's path into the recipe to the name of the field."""
        match = _METHOD.match(where)
        if not match:
            return where
        refs = self.draft.recipe()["methods"]
        index, rest = int(match[1]), match[2]
        slug = refs[index]["slug"] if index < len(refs) else ""
        return f"params.{slug}.{rest}" if rest and rest != "slug" else f"method.{slug}"

    @cached_property
    def suggestions(self) -> dict[str, tuple[Any, str]]:
        """Advice by field. The engine advises only on what is sound, so while something is wrong it is asked without that."""
        answer, draft = self.answer, self.draft
        if draft.complete and self.faults and not answer.get("suggestions"):
            sound = {slug: dict(params) for slug, params in draft.params.items()}
            draft = replace(draft, settings=dict(draft.settings), params=sound, typed={})
            for fault in self.faults:
                draft.put_back(fault["where"])
            answer, _ = self._ask(draft)
        return {self.place(item["where"]): (item["value"], item["reason"]) for item in answer.get("suggestions", [])}

    # --- dials ---------------------------------------------------------------------------------------------------------
    def _fields(self, dials: Iterable[Any], values: Mapping[str, Any]) -> list[Field]:
        by_place: dict[str, list[Mapping[str, str]]] = {}
        for fault in self.faults:
            by_place.setdefault(fault["where"], []).append(fault)
        return render(dials, values, self.suggestions, by_place, self.draft.typed)

    @cached_property
    def groups(self) -> list[Group]:
        """All dials: those of the run, then those of each method that stands in it."""
        groups = [
            Group(
                "The run itself",
                "What every training run shares.",
                self._fields(garden.setting_dials(), self.draft.settings),
            )
        ]
        composed = [item["slug"] for item in self.composition]
        for slug in dict.fromkeys([*self.draft.slugs, *composed]):
            plant = garden.plant(slug)
            if plant is not None and plant.dials:
                groups.append(
                    Group(
                        plant.title, plant.pick_when, self._fields(plant.dials, self.draft.params.get(slug, {})), slug
                    )
                )
        return groups

    @cached_property
    def basic(self) -> list[Field]:
        """The five dials that stand on the form at once: four of the run, one of the chosen method."""
        run, *others = self.groups
        lead = next(
            (slug for slug in self.draft.extras if (plant := garden.plant(slug)) and plant.role == garden.AROUND),
            self.draft.method,
        )
        own = next((group for group in others if group.slug == lead), None)
        mine = [shown for shown in own.fields if shown.dial.tier == "basic"] if own else []
        if self.method is not None and not self.method.takes_extras:  # no training of a person's own stands in it
            return mine[:NUM_BASIC]
        shared = [shown for shown in run.fields if shown.dial.tier == "basic"][: NUM_BASIC - 1]
        return [*shared, *mine[:1]] if lead == self.draft.method else [*shared[:2], *mine[: NUM_BASIC - 2]]

    @cached_property
    def expert(self) -> list[Group]:
        """Everything else, by method."""
        shown = {item.dial.where for item in self.basic}
        groups = [
            Group(g.title, g.sentence, [item for item in g.fields if item.dial.where not in shown], g.slug)
            for g in self.groups
        ]
        return [group for group in groups if group.fields]

    @property
    def num_changed(self) -> int:
        return sum(item.mine for group in self.expert for item in group.fields)

    # --- words ---------------------------------------------------------------------------------------------------------
    @property
    def estimate(self) -> dict[str, Any]:
        guess = self.answer.get("estimate") or {}
        if not guess or self.faults:
            return {}
        total = self.model.num_parameters if self.model else 0
        share = 100 * guess["num_trainable"] / total if total else None
        return {
            **guess, "about": words.duration(guess["seconds"]),
            "span": f"{words.duration(guess['seconds_low'])} to {words.duration(guess['seconds_high'])}" if guess.get("seconds_high") else "",
            "memory": words.size(guess["memory_bytes"]), "steps": words.count(guess["total_steps"], "step"),
            "learns": "" if share is None else f"{words.number(min(share, 100.0), 2)} %",
        }  # fmt: skip

    @property
    def recipe_text(self) -> str:
        """The recipe as it would run, as YAML."""
        try:
            recipe = self.answer.get("recipe")
            return plain.recipe_as_text({**recipe, **self._sources}) if recipe else ""
        except plain.Refused:
            return ""

    @property
    def _sources(self) -> dict[str, Any]:
        """References in the words of the studio: a path of this machine is of no use elsewhere, and nobody's business."""
        recipe = self.answer["recipe"]
        return {
            "data": {**recipe["data"], "source": f"dataset:{self.draft.dataset}"},
            "model": {"source": source_of(self.draft.model)},
            "models": self.draft.recipe().get("models", []),
        }

    @property
    def extra_titles(self) -> list[str]:
        return [plant.title for slug in self.draft.extras if (plant := garden.plant(slug))]


def _a(noun: str) -> str:
    return f"an {noun}" if noun[:1] in "aeiou" else f"a {noun}"


def _standing(choices: list[Choice], chosen: str) -> Choice | None:
    fitting = [choice for choice in choices if choice.fits]
    return next((choice for choice in fitting if choice.value == chosen), fitting[0] if fitting else None)
