"""Methods: the catalogue as a garden, and one page a method. All of it follows from the cards."""

from __future__ import annotations

from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET

from studio.pages import dials, garden
from studio.pages.asking import PageRequest


@login_required
@require_GET
def methods(request: PageRequest) -> HttpResponse:
    """Every method, under its family, narrowed down by goal, cost, family, slot and needs."""
    every = garden.plants()
    asked = {name: request.GET.get(name, "") for name in ("goal", "cost", "family", "slot", "needs", "q")}
    found = [plant for plant in every if _matches(plant, asked)]
    titles = {slot["name"]: slot["title"] for slot in garden.slots()}
    used = {slot for plant in every for slot in plant.slots}
    context = {
        "beds": garden.families(found), "num_found": len(found), "num_all": len(every), "asked": asked, "narrowed": any(asked.values()),
        "goals": [(goal["name"], goal["title"]) for goal in garden.goals()],
        "costs": [(word, word) for word in garden.WEIGHTS if any(plant.weight_word == word for plant in every)],
        "families": [(title, title[:1].upper() + title[1:]) for title in sorted({plant.family for plant in every})],
        "slots": [(name, title[:1].upper() + title[1:]) for name, title in titles.items() if name in used],
        "needs": [("none", "Nothing special"), ("encoder", "An encoder"), ("decoder", "A decoder")],
    }  # fmt: skip
    return render(request, "pages/methods_found.html" if request.htmx else "pages/methods.html", context)


def _matches(plant: garden.Plant, asked: dict[str, str]) -> bool:
    needs = plant.needs or {}
    haystack = " ".join((plant.title, plant.slug, plant.pick_when, plant.summary, plant.paper, plant.family)).lower()
    return (
        plant.suits(asked["goal"])
        and asked["cost"] in ("", plant.weight_word)
        and asked["family"] in ("", plant.family)
        and (not asked["slot"] or asked["slot"] in plant.slots)
        and (
            not asked["needs"]
            or (not any(needs.values()) if asked["needs"] == "none" else asked["needs"] in needs.get("kinds", ()))
        )
        and all(word in haystack for word in asked["q"].lower().split())
    )


@login_required
@require_GET
def method(request: PageRequest, slug: str) -> HttpResponse:
    """One method: when to pick it, how it works, its dials, its traps, the paper's figures beside ours."""
    plant = garden.plant(slug)
    if plant is None:
        raise Http404("No such method.")
    titles = {slot["name"]: slot["title"] for slot in garden.slots()}
    shown = plant.dials
    return render(request, "pages/method.html", {
        "method": plant, "basic": [dial for dial in shown if dial.tier == "basic"], "expert": [dial for dial in shown if dial.tier != "basic"],
        "slots": [titles.get(name, name) for name in plant.slots],
        "beside": any(slot["arity"] == "many" for slot in garden.slots() if slot["name"] in plant.slots),
        "defaults": {dial.name: _default_words(dial) for dial in shown},
        "others": [other for other in garden.plants() if other.family == plant.family and other.slug != plant.slug][:6],
        "goals": [goal["title"] for goal in garden.goals() if plant.suits(goal["name"])],
        "measured": any(figure.get("ours") for figure in plant.figures),
    })  # fmt: skip


def _default_words(dial: dials.Dial) -> str:
    if dial.default is None:
        return "chosen for you"
    text = dials.text_of(dial.default)
    return {"true": "yes", "false": "no", "": "none"}.get(text, text)
