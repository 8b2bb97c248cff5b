"""The engine's catalogue as the pages read it. Everything about a method comes from its card; no method is known here by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.catalogue import catalogue
from studio.pages import words
from studio.pages.dials import Dial, dials

MAIN_SLOT = "parametrization"  # the slot that says what learns: the method a person picks first
KINDS = {
    "train": ("Train it", "The model learns from your data."),
    "flow": ("Several steps in a row", "One press runs all of them, one after the other."),
    "transform": ("Change it without training", "New weights are made from given ones; your data measure the result."),
    "generate": ("Make data", "The model makes or judges examples; the result is a data set."),
    "probe": ("Measure it", "Nothing is changed; the result is a report."),
}  # the roles that lead a run, in the order in which they are offered
AROUND = "search"  # a role that stands around a training and repeats it
WEIGHTS = ("Light", "Medium", "Heavy")


@dataclass(frozen=True)
class Plant:
    """One method of the catalogue."""

    data: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def dials(self) -> list[Dial]:
        return dials(self.data["schema"], f"params.{self.data['slug']}")

    @property
    def weight(self) -> int:
        """All cost marks together; a method without marks counts as middling."""
        cost = self.data.get("cost") or {}
        return sum(cost.values()) if cost else 9

    @property
    def weight_word(self) -> str:
        return WEIGHTS[0 if self.weight <= 6 else 1 if self.weight <= 9 else 2]

    @property
    def is_main(self) -> bool:
        """Whether a person picks it first: it says what learns, or it leads a run of another kind."""
        return MAIN_SLOT in self.data["slots"] or (self.role in KINDS and self.role != "train")

    @property
    def takes_extras(self) -> bool:
        """Whether training methods may stand beside it."""
        return self.role == "train" or self.data.get("training") != "none"

    @property
    def more_models(self) -> tuple[int, int | None]:
        """How many models it takes beside the first: least, and most (None: any number)."""
        low, high = self.data.get("num_models") or (1, 1)
        return low - 1, None if high is None else high - 1

    @property
    def kind_words(self) -> str:
        """What kind of work it is, in words."""
        return (
            "Searches around a training"
            if self.role == AROUND
            else KINDS.get(self.role, ("How a result answers", ""))[0]
        )

    @property
    def needs_words(self) -> list[str]:
        """What a run must bring, in words."""
        needs = self.data.get("needs") or {}
        titles = {goal["name"]: goal["title"] for goal in goals()}
        found = []
        if needs.get("tasks"):
            found.append("Goal: " + words.spoken([titles.get(name, name) for name in needs["tasks"]], "or"))
        if needs.get("kinds"):
            found.append(f"{words.spoken([kind.capitalize() for kind in needs['kinds']], 'or')} model")
        if needs.get("linear_layers"):
            found.append("A transformer model (linear layers)")
        return found

    def suits(self, goal: str) -> bool:
        """Whether the method says nothing against this goal."""
        tasks = (self.data.get("needs") or {}).get("tasks") or ()
        return not goal or not tasks or goal in tasks


def plants() -> list[Plant]:
    """All methods, in the order of the slots they fill, then by family and title."""
    order = {slot["name"]: number for number, slot in enumerate(slots())}
    found = map(Plant, catalogue()["methods"])
    return sorted(
        found,
        key=lambda plant: (
            min((order[slot] for slot in plant.slots), default=len(order)),
            plant.family.lower(),
            plant.title.lower(),
        ),
    )


def plant(slug: str) -> Plant | None:
    """The method with this slug."""
    return next((found for found in plants() if found.slug == slug), None)


def goals() -> list[dict[str, Any]]:
    """What a person can want: the engine's tasks."""
    return list(catalogue()["tasks"])


def goal(name: str) -> dict[str, Any] | None:
    """The goal with this name."""
    return next((found for found in goals() if found["name"] == name), None)


def slots() -> list[dict[str, Any]]:
    """The places of a run, in the order in which a person meets them."""
    return list(catalogue()["slots"])


def setting_dials() -> list[Dial]:
    """The dials that every training run shares."""
    return dials(catalogue()["settings"], "settings")


def families(found: Iterable[Plant]) -> list[tuple[str, list[Plant]]]:
    """Methods under the headings of their families."""
    beds: dict[str, list[Plant]] = {}
    for one in found:
        beds.setdefault(one.family, []).append(one)
    return [(title[:1].upper() + title[1:], bed) for title, bed in beds.items()]
