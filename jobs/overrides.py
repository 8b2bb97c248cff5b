"""What a person decides about one trial of a search while it runs: the trials as they stand, what may be said of each, and the saying."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.core.overrides import VERDICTS, KeepOrStop, read_overrides, write_override
from jobs.access import Person, may_change
from jobs.actions import ActionRefused
from jobs.catalogue import catalogue
from jobs.models import TERMINAL, Event, Job, Status
from jobs.places import job_folder

MOST_EVENTS = 4000  # about trials, that one look reads


def trial_events(job: Job) -> list[dict[str, Any]]:
    """What a search said about its trials, the newest first; nothing is asked for a run that is none."""
    if job.recipe.get("operation") != "search":
        return []
    rows = Event.objects.filter(job=job, kind="trial").order_by("-seq")[:MOST_EVENTS]
    return list(rows.values_list("data", flat=True))


def newest(events: Iterable[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The last word about each trial, from events that begin with the newest."""
    found: dict[int, Mapping[str, Any]] = {}
    for event in events:
        if isinstance(event.get("trial"), int):
            found.setdefault(event["trial"], event)
    return dict(sorted(found.items()))


def offered(job: Job) -> tuple[KeepOrStop, ...]:
    """What may be decided about a trial of this run: its leading method says so."""
    if job.recipe.get("operation") != "search":
        return ()
    cards = {card["slug"]: card for card in catalogue()["methods"]}
    said = {word for ref in job.recipe.get("methods", []) for word in cards.get(ref["slug"], {}).get("overrides", ())}
    return tuple(verdict for verdict in VERDICTS if verdict in said)


def _taken(job: Job) -> set[int]:
    """Numbers of the decisions that the search has taken up."""
    return set(Event.objects.filter(job=job, kind="override").values_list("data__number", flat=True))


def obstacle(job: Job, number: int, said: Mapping[str, Any] | None, verdict: str) -> tuple[str, str] | None:
    """(code, sentence) of why this cannot be decided about a trial now, or None. said: the last word about the trial."""
    if job.status in TERMINAL:
        return "not_possible", "The search has ended already."
    if job.status == Status.STOPPING:
        return "not_possible", "The search is stopping already."
    if verdict not in offered(job):
        done = "kept" if verdict == "keep" else "stopped"
        return "not_possible", f"In this run no single trial can be {done} by a person."
    if said is None:
        return "unknown_trial", f"Trial {number} has not begun, or there is none with this number."
    state = said.get("state")
    if state == "finished":
        return "not_possible", f"Trial {number} has reached its end already."
    if state == "failed":
        return "not_possible", f"Trial {number} broke down and cannot go on."
    if state == "stopped" and verdict == "stop":
        return "not_possible", f"Trial {number} is stopped already."
    return None


@dataclass(kw_only=True)
class Overrule:
    """Keep a trial that the rule of the search would stop or has stopped, or stop one that it would keep. Taken up at the next safe moment."""

    job: Job
    trial: int
    verdict: KeepOrStop

    def check(self, user: Person) -> str | None:
        """Why `user` cannot do this now, or None."""
        found = self._obstacle(user)
        return found[1] if found else None

    def execute(self, user: Person) -> Job:
        """Leave the decision for the search, or raise ActionRefused with the sentence. Saying the same twice says it once."""
        self.job.refresh_from_db()
        found = self._obstacle(user)
        if found:
            raise ActionRefused(found[1], found[0])
        folder = job_folder(self.job.pk)
        before = [made for made in read_overrides(folder) if made.trial == self.trial]
        if not before or before[-1].verdict != self.verdict:
            write_override(folder, self.trial, self.verdict, user.get_username())
        return self.job

    def _obstacle(self, user: Person) -> tuple[str, str] | None:
        if not may_change(user, self.job.owner_id):
            return "forbidden", "This job belongs to somebody else."
        return obstacle(self.job, self.trial, newest(trial_events(self.job)).get(self.trial), self.verdict)


def trials_of(job: Job, user: Person) -> list[dict[str, Any]]:
    """Every trial that has begun as it stands now, what `user` may decide about it, and what is decided and not yet taken up."""
    last = {made.trial: made for made in read_overrides(job_folder(job.pk))} if job.status not in TERMINAL else {}
    taken = _taken(job) if last else set()
    asked = {number: made for number, made in last.items() if made.number not in taken}
    mine = may_change(user, job.owner_id)

    def possible(number: int, said: Mapping[str, Any]) -> list[KeepOrStop]:
        before = last[number].verdict if number in last else ""
        words = [verdict for verdict in VERDICTS if mine and verdict != before]
        return [verdict for verdict in words if obstacle(job, number, said, verdict) is None]

    return [
        {
            "trial": number,
            "state": said.get("state", ""),
            "done": said.get("done") or 0,
            "total": said.get("total") or 0,
            "score": said.get("score"),
            "values": said.get("values") or {},
            "message": said.get("message") or "",
            "possible": possible(number, said),
            "asked": {"verdict": asked[number].verdict, "by": asked[number].by} if number in asked else None,
        }
        for number, said in newest(trial_events(job)).items()
    ]
