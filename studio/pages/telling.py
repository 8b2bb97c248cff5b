"""What a run is and how it is doing, in sentences that are true in every state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs import schedule
from jobs.access import Person, jobs_for
from jobs.catalogue import catalogue
from jobs.models import ACTIVE, Job, Status
from jobs.plain import Refused
from studio.pages import words
from studio.pages.dials import setting_words

PATIENCE_SECONDS = 30.0  # after the engine could not be asked
_asked_again_at = 0.0
LEARNING = ("train", "flow", "search")
OTHER_INPUTS = {
    "data": "other data",
    "model": "another model",
    "models": "other models besides",
    "task": "another goal",
}
EARLY = 0.1  # of the steps; before that, no news is no news
INPUT_TITLES = {"data": "Data", "model": "Model", "models": "Further models", "task": "Goal", "operation": "Operation"}
VERBS = {
    Status.QUEUED: "Will learn to",
    Status.STARTING: "About to learn to",
    Status.RUNNING: "Learning to",
    Status.STOPPING: "Learning to",
    Status.PAUSED: "Learning to",
    Status.LOST: "Learning to",
    Status.SUCCEEDED: "Learned to",
    Status.FAILED: "Tried to learn to",
    Status.CANCELLED: "Began to learn to",
}


def known() -> Mapping[str, Any]:
    """The catalogue, or nothing while the engine cannot be asked: a page about a run does not depend on the engine."""
    global _asked_again_at
    if time.monotonic() < _asked_again_at:
        return {}
    try:
        return catalogue()
    except (Refused, OSError, ValueError):
        _asked_again_at = time.monotonic() + PATIENCE_SECONDS
        return {}


def goal(job: Job) -> str:
    """What the model shall be able to do: "sort texts into topics"."""
    name = str(job.recipe.get("task", ""))
    titles = {task["name"]: str(task["title"]) for task in known().get("tasks", [])}
    title = titles.get(name) or name.replace("_", " ")
    return title[:1].lower() + title[1:]


def methods(job: Job) -> list[dict[str, str]]:
    """The methods that the recipe names, with their titles and slots, in the order in which they were chosen."""
    cards = {card["slug"]: card for card in known().get("methods", [])}
    found = []
    for ref in job.recipe.get("methods", []):
        card = cards.get(ref["slug"], {})
        found.append(
            {
                "slug": ref["slug"],
                "title": card.get("title", ref["slug"]),
                "slot": next(iter(card.get("slots", [])), ""),
                "role": card.get("role", ""),
            }
        )
    return found


def leading(job: Job) -> str:
    """The methods that a sentence names: the one that leads, those that say what learns, or else the first one."""
    chosen = methods(job)
    shaping = [method["title"] for method in chosen if method["slot"] == "parametrization"]
    heads = [method["title"] for method in chosen if method["role"] not in ("", "train")]
    return words.spoken([*heads, *shaping] or [method["title"] for method in chosen[:1]])


def dial_title(name: str) -> str:
    """What people call a setting: "Learning rate" for settings.learning_rate; the name itself where nobody knows it."""
    head, _, leaf = name.partition(".")
    cards = {card["slug"]: card for card in known().get("methods", [])}
    schema = known().get("settings", {}) if head == "settings" else cards.get(head, {}).get("schema", {})
    return str(schema.get("properties", {}).get(leaf, {}).get("title") or leaf.replace("_", " ") or head)


def setting_title(name: str) -> str:
    """`dial_title` that also says of which method: "Weight decay (AdamW)"."""
    head = name.partition(".")[0]
    if name.startswith("methods["):
        return "Method"
    if name in INPUT_TITLES:
        return INPUT_TITLES[name]
    return dial_title(name) if head == "settings" else f"{dial_title(name)} ({method_title(head)})"


def method_title(slug: Any) -> str:
    """What a method is called; a dash for none."""
    titles = {card["slug"]: str(card["title"]) for card in known().get("methods", [])}
    return titles.get(slug, str(slug)) if slug else "–"


def difference(name: str, before: Any, after: Any) -> str:
    """One difference between two recipes, in words: "learning rate 0.001 instead of 0.01"."""
    if name in OTHER_INPUTS:
        return OTHER_INPUTS[name]
    if name.startswith("methods["):
        mine, theirs = (method_title(slug) if slug else "" for slug in (after, before))
        return f"{mine} instead of {theirs}" if mine and theirs else f"with {mine}" if mine else f"without {theirs}"
    one, other = (setting_words(value) for value in (after, before))
    title = dial_title(name)
    return f"{title[:1].lower()}{title[1:]} {one} instead of {other}"


def learns(job: Job) -> bool:
    """Whether anything is trained in it."""
    return str(job.recipe.get("operation", "train")) in LEARNING


def model_name(job: Job) -> str:
    """The model that the run starts from, by the name that people gave it. Never a path of the server."""
    if job.model is not None:
        return job.model.name
    source = str(job.recipe.get("model", {}).get("source", ""))
    offered = {model["source"]: str(model["title"]) for model in known().get("models", [])}
    if source in offered:
        return offered[source]
    scheme, _, name = source.partition(":")
    return "a model" if scheme == "folder" else name.rsplit("/", 1)[-1]


def lead(job: Job) -> str:
    """What this is: "Learning to sort texts into topics with PaCA on MiniLM"."""
    means, model = leading(job), model_name(job)
    if not learns(job):
        return f"{capital(means)}{f' on {model}' if model else ''}"
    return (
        f"{VERBS[Status(job.status)]} {goal(job)}{f' with {means}' if means else ''}{f' on {model}' if model else ''}"
    )


def share(job: Job) -> int | None:
    """How much is done, in percent. Full only when it has ended: 99.7 % is not all."""
    if not job.total_steps:
        return None
    return 100 if job.done_steps >= job.total_steps else math.floor(100 * job.done_steps / job.total_steps)


def remaining(job: Job) -> str:
    """How much longer: "about 2 minutes left"."""
    if job.eta_seconds is None:
        return ""
    if job.eta_seconds < 8:
        return "a few seconds left"
    coarse = job.eta_seconds if job.eta_seconds >= 90 else max(10, 5 * round(job.eta_seconds / 5))
    return f"about {words.duration(coarse)} left"


def health(signals: Sequence[Mapping[str, Any]], job: Job) -> str:
    """How it looks, from everything that the watchers said so far."""
    if any(signal.get("action") == "stop" for signal in signals):
        return "a watcher stopped it"
    warned = sum(signal.get("action") == "warn" for signal in signals)
    if warned:
        return "one warning" if warned == 1 else f"{warned} warnings"
    return "looks healthy" if job.done_steps >= EARLY * job.total_steps else "too early to judge"


def state(job: Job, signals: Sequence[Mapping[str, Any]] = (), doing: str = "") -> str:
    """How it is doing, as one sentence that continues the lead. `doing` is what the engine said last."""
    status, done = Status(job.status), share(job)
    percent = f"{done} % done" if done is not None else ""
    if status is Status.RUNNING:
        if done == 100:
            return sentence(doing or "All steps are done; the result is being written")
        parts = [percent, remaining(job), health(signals, job)]
        return sentence(", ".join(part for part in parts if part))
    if status is Status.STARTING:
        return sentence(doing or job.message or "Reading the model and the data")
    if status is Status.STOPPING:
        return sentence(f"{percent}. {job.message}" if percent else job.message or "Stops at the next step")
    if status is Status.PAUSED:
        return sentence(
            f"Paused{f' with {percent}' if percent else ''}. Everything is saved, and it goes on from exactly here"
        )
    if status is Status.LOST:
        return sentence(
            f"Interrupted{f' with {percent}' if percent else ''}. {job.message or 'It goes on by itself from its last checkpoint'}"
        )
    if status is Status.QUEUED:
        return sentence(job.message or "Waits for its turn")
    if status is Status.FAILED:  # the faults say why, in full; here stands how far it came
        return (
            f"It failed after {job.done_steps:,} of {words.count(job.total_steps, 'step')}."
            if job.done_steps
            else "It failed before its first step."
        )
    return sentence(job.message or words.STATUS_WORDS[status])


def capital(text: str) -> str:
    """With a capital in front."""
    return f"{text[:1].upper()}{text[1:]}"


def sentence(text: str) -> str:
    """With a capital in front and a full stop behind."""
    text = capital(text.strip())
    return text if not text or text[-1] in ".!?…" else f"{text}."


def browser_title(job: Job) -> str:
    """What the tab of the browser says: how far the run is, then what it is."""
    status, done = Status(job.status), share(job)
    front = f"{done} %" if status in ACTIVE and done is not None else words.STATUS_WORDS[status]
    return f"{front} · {job.name}"


def milestone(job: Job) -> tuple[str, str]:
    """The last thing worth saying aloud: a key that changes with it, and the sentence."""
    status, done = Status(job.status), share(job)
    if status is Status.RUNNING and done is not None and done >= 25:
        quarter = 25 * (done // 25)
        return f"running-{quarter}", sentence(
            f"{quarter} % done, {remaining(job)}" if job.eta_seconds is not None else f"{quarter} % done"
        )
    return status.value, sentence(
        f"{words.STATUS_WORDS[status]}. {job.message}" if job.message else words.STATUS_WORDS[status]
    )


# -- the queue ---------------------------------------------------------------------------------------------------------------------


def in_front(job: Job, user: Person) -> dict[str, Any]:
    """Who goes first: the place in the queue and the runs before it; those of other people are counted, not named."""
    order = schedule.waiting(limit=1000)
    place = order.index(job.pk) if job.pk in order else len(order)
    before = set(order[:place])
    rows = list(Job.objects.filter(status__in=ACTIVE).order_by("started_at")) + sorted(
        Job.objects.filter(pk__in=before), key=lambda row: order.index(row.pk)
    )
    mine = set(jobs_for(user).filter(pk__in=[row.pk for row in rows]).values_list("pk", flat=True))
    visible = [row for row in rows if row.pk in mine]
    others = len(rows) - len(visible)
    ahead = words.count(place, "run waits", "runs wait") + " in front of it" if place else "It is next"
    return {"place": place + 1, "ahead": ahead, "runs": visible, "others": others}


# -- ways out of a failure -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remedy:
    """One change of the settings that is likely to mend what went wrong, for one press of a button."""

    label: str  # continues "Again with"
    settings: Mapping[str, Any] = field(default_factory=dict)


def _slower(settings: Mapping[str, Any]) -> Remedy | None:
    rate = settings.get("learning_rate")
    if not rate:
        return None
    return Remedy(f"a learning rate of {words.number(rate / 10)}", {"learning_rate": rate / 10})


def _smaller(settings: Mapping[str, Any]) -> Remedy | None:
    batch, accumulate = settings.get("batch_size") or 1, settings.get("accumulate") or 1
    if batch > 1:
        return Remedy(
            f"{words.count(batch // 2, 'example')} at a time", {"batch_size": batch // 2, "accumulate": accumulate * 2}
        )
    if settings.get("gradient_checkpointing") not in {"on", True}:
        return Remedy("less memory, a little slower", {"gradient_checkpointing": "on"})
    return None


# By what a fault is called for machines; what the numbers mean is written in the fault's own sentences.
REMEDIES: Mapping[str, Callable[[Mapping[str, Any]], Remedy | None]] = {
    "not_finite": _slower,
    "out_of_memory": _smaller,
}


def remedy(job: Job) -> Remedy | None:
    """What to change for the next try, when the fault says enough to know it."""
    if job.status != Status.FAILED:
        return None
    settings = job.recipe.get("settings", {})
    for fault in job.faults:
        find = REMEDIES.get(str(fault.get("code", "")))
        found = find(settings) if find else None
        if found:
            return found
    return None
