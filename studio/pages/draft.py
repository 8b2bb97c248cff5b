"""The draft of a new run: what a person chose so far, kept in the session, and the recipe that follows from it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from django.http import QueryDict

from studio.pages import garden
from studio.pages.dials import Dial, changed, parse

SESSION_KEY = "draft"
MAX_EXTRAS = 12
MAX_MODELS = 16
RESULT = "artifact:"


def source_of(chosen: str) -> str:
    """A chosen model as a recipe names it."""
    return chosen if chosen.startswith(RESULT) else f"model:{chosen}"


def _can_train(slug: str) -> bool:
    plant = garden.plant(slug)
    return plant is not None and plant.role == "train"


@dataclass
class Draft:
    """Choices by name. Settings and hyperparameters hold only what a person changed; everything else stays open."""

    goal: str = ""
    dataset: str = ""
    model: str = ""  # the id of a model, or "artifact:<id>" of an earlier result
    models: list[str] = field(default_factory=list)  # further models, written alike
    method: str = ""
    extras: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    params: dict[str, dict[str, Any]] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)  # texts that could not be read, as they were typed
    name: str = ""
    again_of: str = ""
    key: str = field(default_factory=lambda: secrets.token_hex(16))  # two clicks on "Start" are one run

    @classmethod
    def of(cls, session: Mapping[str, Any]) -> Draft:
        """The draft that lies in a session, or a new one."""
        kept = session.get(SESSION_KEY)
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in kept.items() if key in known}) if isinstance(kept, dict) else cls()

    def keep(self, session: MutableMapping[str, Any]) -> None:
        session[SESSION_KEY] = asdict(self)

    @property
    def slugs(self) -> list[str]:
        """Every method that the person chose, the main one first."""
        return [slug for slug in (self.method, *self.extras) if slug]

    @property
    def complete(self) -> bool:
        return bool(self.goal and self.dataset and self.model and self.method)

    def recipe(self) -> dict[str, Any]:
        """The recipe in the words of the REST API; data set and model are filled in by the action."""
        main = garden.plant(self.method)
        alone = main is not None and not main.takes_extras
        named = [self.method] if alone else [*self.slugs, *self._turned]
        recipe = {
            "version": 1, "operation": self._operation(named), "task": self.goal, "name": self.name, "settings": self.settings,
            "methods": [{"slug": slug, "params": self.params.get(slug, {})} for slug in named],
        }  # fmt: skip
        if main is not None and main.more_models != (0, 0):
            recipe["models"] = [{"source": source_of(chosen)} for chosen in self.models]
        if self.model.startswith(RESULT):
            recipe["model"] = {"source": self.model}
        return recipe

    @property
    def _turned(self) -> list[str]:
        """Methods that nobody chose by name, but whose dials were changed."""
        return [slug for slug, params in self.params.items() if params and slug not in self.slugs and _can_train(slug)]

    @staticmethod
    def _operation(named: Iterable[str]) -> str:
        """What leads the run: a search around everything, or the main method, or a training."""
        roles = [plant.role for slug in named if (plant := garden.plant(slug))]
        return garden.AROUND if garden.AROUND in roles else next((role for role in roles if role != "train"), "train")

    def choose(self, data: QueryDict) -> None:
        """Take over what a form says about goal, data, model, methods and the name."""
        for name in ("goal", "dataset", "model", "method"):
            if name in data:
                setattr(self, name, str(data[name])[:200])
        if "models.shown" in data:
            self.models = list(dict.fromkeys(str(value)[:200] for value in data.getlist("more") if value))[:MAX_MODELS]
        if "name" in data:
            self.name = " ".join(str(data["name"]).split())[:200]
        if "extras.shown" in data:
            chosen = [*data.getlist("extra"), *(str(value) for key, value in data.items() if key.startswith("one."))]
            self.extras = list(dict.fromkeys(slug for slug in chosen if slug and slug != self.method))[:MAX_EXTRAS]
            self.params = {
                slug: params for slug, params in self.params.items() if slug in self.slugs or slug not in chosen
            }

    def turn(self, data: QueryDict, composed: Iterable[str]) -> list[dict[str, str]]:
        """Take over the dials that a form holds; returns a fault for every text that is no value."""
        faults = self._turn(garden.setting_dials(), data, self.settings)
        for slug in dict.fromkeys([*self.slugs, *composed, *self.params]):
            plant = garden.plant(slug)
            if plant is not None:
                faults += self._turn(plant.dials, data, self.params.setdefault(slug, {}))
        self.params = {slug: params for slug, params in self.params.items() if params}
        return faults

    def unread(self) -> list[dict[str, str]]:
        """A fault for every text that still stands there and is no value."""
        data = QueryDict(mutable=True)
        data.update(self.typed)
        found = [
            *garden.setting_dials(),
            *(dial for slug in self.slugs if (plant := garden.plant(slug)) for dial in plant.dials),
        ]
        return parse([dial for dial in found if dial.where in self.typed], data)[1]

    def _turn(self, found: list[Dial], data: QueryDict, kept: dict[str, Any]) -> list[dict[str, str]]:
        shown = [dial for dial in found if dial.where in data]
        values, faults = parse(shown, data)
        wrong = {fault["where"] for fault in faults}
        for dial in shown:
            self.typed.pop(dial.where, None)
            kept.pop(dial.name, None)
            if dial.where in wrong:
                self.typed[dial.where] = str(data[dial.where])[:500]
        kept.update(changed(shown, values))
        return faults

    def put_back(self, where: str) -> None:
        """Leave one dial open again."""
        self.typed.pop(where, None)
        section, _, rest = where.partition(".")
        if section == "settings":
            self.settings.pop(rest, None)
        elif section == "params":
            slug, _, name = rest.partition(".")
            self.params.get(slug, {}).pop(name, None)

    def read(self, recipe: Mapping[str, Any]) -> None:
        """Take over a whole recipe: from an earlier run, or pasted."""
        self.goal = str(recipe.get("task", ""))
        self.name = str(recipe.get("name", ""))
        mains = [ref for ref in recipe.get("methods", []) if (plant := garden.plant(ref["slug"])) and plant.is_main]
        self.method = mains[0]["slug"] if mains else ""
        self.extras = [
            ref["slug"] for ref in recipe.get("methods", []) if ref["slug"] != self.method and garden.plant(ref["slug"])
        ]
        self.params = {
            ref["slug"]: dict(ref.get("params") or {}) for ref in recipe.get("methods", []) if ref.get("params")
        }
        shared = {dial.name: dial.default for dial in garden.setting_dials()}
        self.settings = {
            name: value
            for name, value in (recipe.get("settings") or {}).items()
            if name in shared and value != shared[name]
        }
        self.typed = {}
        for section, name in (("data", "dataset"), ("model", "model")):
            source = str((recipe.get(section) or {}).get("source", ""))
            kind, _, rest = source.partition(":")
            if kind == name:
                setattr(self, name, rest)
            elif name == "model" and source.startswith(RESULT):
                self.model = source
        named = [str(ref.get("source", "")) for ref in recipe.get("models") or []]
        self.models = [source.removeprefix("model:") for source in named if source.startswith((RESULT, "model:"))]
