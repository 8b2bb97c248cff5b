"""What a person decides about a trial while a search runs: kept against the rule, stopped against the rule, taken up at the same place after a kill."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.core.control import Control, write_request
from engine.core.overrides import (
    OVERRIDES_NAME,
    KeepOrStop,
    Override,
    SliceControl,
    read_overrides,
    write_override,
)
from engine.core.recipe import parse_recipe
from engine.core.registry import catalogue
from engine.core.work import Trial
from engine.ops import search
from engine.ops.check import require
from engine.ops.folder import run_folder
from tests.engine.tiny import Tiny, events, lay
from tests.engine.unit.test_searches import TWELVE, halved, hill, method, play


def outcome(made: Any, trials: dict[int, Trial]) -> Any:
    return made.report(list(trials.values()), made.winner(list(trials.values())))


# ── the file ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_decisions_have_numbers_without_a_hole_however_many_decide_at_once(tmp_path: Path) -> None:
    threads = [threading.Thread(target=write_override, args=(tmp_path, n, "keep", "ada")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [made.number for made in read_overrides(tmp_path)] == list(range(1, 9))
    with (tmp_path / OVERRIDES_NAME).open("ab") as file:
        file.write(b'{"number": 9, "tri')
    assert len(read_overrides(tmp_path)) == 8, "a torn line is no decision"
    assert write_override(tmp_path, 3, "stop", "bob") == Override(number=9, trial=3, verdict="stop", by="bob")
    assert read_overrides(tmp_path)[-1].trial == 3


def test_a_slice_ends_for_its_own_trial_only_and_requests_of_the_job_go_first(tmp_path: Path) -> None:
    control = SliceControl(Control(tmp_path), 2, set())
    assert control.poll() is None
    write_override(tmp_path, 1, "stop", "ada")
    write_override(tmp_path, 2, "keep", "ada")
    assert control.poll() is None and not control.cut
    write_override(tmp_path, 2, "stop", "ada")
    write_request(tmp_path, "cancel")
    assert control.poll() == "cancel" and not control.cut
    assert control.poll() == "pause" and control.cut
    assert SliceControl(Control(tmp_path), 2, {1, 2, 3}).poll() == "cancel", "asked of an earlier slice"


# ── what the rule does with it ────────────────────────────────────────────────────────────────────────────────────────


def worst(**params: Any) -> int:
    """The trial that the rule stops first and that is worst."""
    trials, _ = play(halved(**params), hill)
    return min(trials.values(), key=lambda trial: (trial.step, trial.score)).number


def test_a_run_that_was_stopped_is_revived_at_the_next_opportunity_and_goes_to_its_end() -> None:
    number, made = worst(), halved()
    trials, asked = play(made, hill, said={13: (number, "keep")})
    assert asked[13].trial == number, "it has the next slice"
    assert [ask.until for ask in asked if ask.trial == number] == [10, 30, 100]
    assert sum(ask.until == 100 for ask in asked) == 3, "two of the four whom the rule chose, and it beside them"
    report = outcome(made, trials)
    mine = [d for d in report.numbers["decisions"] if d["trial"] == number]
    assert [(d["by"], d["person"], d["goes_on"]) for d in mine] == [("you", "ada", True)] * 2
    assert "Stopped by you" not in " ".join(report.notes)
    assert "The rule stopped 8 of 12 at 10% and 2 of 4 at 30%." in report.sentence, "what the rule said stays its own"
    assert f"Kept by you: trial {number} (ada)." in report.notes
    assert report.table[number]["at 10%"] == "goes on, by you" and made.standing(trials[number])[0] == "finished"


def test_a_run_that_is_kept_before_the_look_is_not_stopped_by_it() -> None:
    number, made = worst(), halved()
    _, asked = play(made, hill, said={12: (number, "keep")})
    assert [ask.until for ask in asked if ask.trial == number] == [10, 30, 100]
    decision = next(d for d in made.decisions.values() if d.trial == number)  # type: ignore[attr-defined]
    assert (
        decision.sentence.endswith(", kept by you (ada), against the rule.")
        and "by kept-back examples" in decision.sentence
    )


def test_a_kept_run_that_missed_a_later_look_goes_on_without_the_rule() -> None:
    number, made = worst(), halved()
    trials, asked = play(made, hill, said={17: (number, "keep")})
    assert asked[16].until == 100, "the rule has decided at both looks"
    assert [ask.until for ask in asked[17:]] == [30, 100, 100] and asked[17].trial == number
    assert trials[number].step == 100 and made.standing(trials[number])[0] == "finished"


def test_a_survivor_that_is_stopped_leaves_its_seat_empty() -> None:
    plain, _ = play(halved(), hill)
    winner = halved().winner(list(plain.values()))
    made = halved()
    trials, asked = play(made, hill, said={14: (winner, "stop")})
    assert trials[winner].step < 100 and sum(ask.until == 30 for ask in asked) in (3, 4), "nobody is revived for it"
    assert made.winner(list(trials.values())) != winner
    state, said = made.standing(trials[winner])
    assert state == "stopped" and "is stopped by you (ada)" in said and said.endswith("examples are saved.")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_decision_concerns_its_trial_alone(asynchronous: bool) -> None:
    plain, _ = play(halved(asynchronous=asynchronous), hill)
    ended = {n for n, trial in plain.items() if trial.step == 100}
    for when in (13, 15, 16, 17):
        number = worst(asynchronous=asynchronous)
        trials, _ = play(halved(asynchronous=asynchronous), hill, said={when: (number, "keep")})
        assert {n for n, trial in trials.items() if trial.step == 100} == ended | {number}, f"kept behind slice {when}"
        least = min(ended)
        trials, _ = play(halved(asynchronous=asynchronous), hill, said={when: (least, "stop")})
        left = {n for n, trial in trials.items() if trial.step == 100}
        assert ended - {least} <= left, f"stopped behind slice {when}: nobody else loses a seat"
        assert when < 16 or left <= ended, "behind both looks nobody gets its seat either"


def test_a_decision_by_the_rule_says_so() -> None:
    made = halved()
    trials, _ = play(made, hill)
    said = [made.standing(trial)[1] for trial in trials.values()]
    assert all("by the rule" in text for text in said) and any("is stopped by the rule" in text for text in said)


def test_when_every_survivor_is_stopped_the_next_best_goes_on() -> None:
    _, asked = play(halved(), hill)
    first, second = [ask.trial for ask in asked if ask.until == 100]
    made = halved()
    trials, asked = play(made, hill, said={15: (first, "stop"), 16: (second, "stop")})
    ended = [ask.trial for ask in asked if ask.until == 100]
    assert len(ended) == 1 and ended[0] not in (first, second) and made.winner(list(trials.values())) == ended[0]


def test_the_last_word_counts() -> None:
    number, made = worst(), halved()
    trials, _ = play(made, hill, said={13: (number, "keep"), 14: (number, "stop"), 15: (number, "keep")})
    assert trials[number].step == 100
    made = halved()
    trials, _ = play(made, hill, said={13: (number, "keep"), 14: (number, "stop")})
    assert trials[number].step <= 30 and made.standing(trials[number])[0] == "stopped"


def test_the_asynchronous_form_heeds_both() -> None:
    number = worst(asynchronous=True)
    for when in (12, 14, 17):
        made = halved(asynchronous=True)
        trials, asked = play(made, hill, said={when: (min(number, when - 3), "keep")})
        kept = trials[min(number, when - 3)]
        assert kept.step == 100, "revived and promoted"
    made = halved(asynchronous=True)
    trials, asked = play(made, hill, said={3: (1, "stop")})
    assert trials[1].step == 10 and made.standing(trials[1])[0] == "stopped"
    assert sum(ask.until == 100 for ask in asked) >= 1 and made.winner(list(trials.values())) != 1


def test_whoever_is_stopped_is_not_trained_to_check_the_rule() -> None:
    number, made = worst(), halved(rerun=1.0)
    trials, _ = play(made, hill, said={13: (number, "stop")})
    assert trials[number].step == 10 and all(t.step == 100 for t in trials.values() if t.number != number)


def test_searches_without_a_rule_take_a_stop() -> None:
    for slug in ("grid-search", "random-search", "tpe-search"):
        assert catalogue()[slug].describe()["overrides"] == ["stop"]
    assert catalogue()["successive-halving"].describe()["overrides"] == ["keep", "stop"]
    assert catalogue()["pbt"].describe()["overrides"] == [] == catalogue()["lora"].describe()["overrides"]
    made = method("tpe-search", space=TWELVE, trials=8)
    trials, _ = play(made, hill, said={2: (1, "stop")})
    assert len(trials) == 8 and made.winner(list(trials.values())) != 1


# ── real trainings ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_search_that_was_killed_takes_up_the_same_at_the_same_place(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial is stopped while it learns, and another one, which the rule had stopped, is kept; once in one go, and once with two kills."""
    params = {"space": "learning_rate=1e-4..1e-1", "trials": 6, "first_rung": 0.3, "second_rung": 0.6, "rerun": 0.0}
    body = {
        **tiny.inputs("classify"),
        "operation": "search",
        "methods": [{"slug": "successive-halving", "params": params}, {"slug": "full-finetuning"}],
        "settings": {"max_steps": 10, "batch_size": 4, "max_length": 24, "learning_rate": 1e-2, "evaluations": 1, "precision": "fp32"},
    }  # fmt: skip
    recipe = require(parse_recipe(body)).recipe
    inner, deaths = search.train, {5, 8}

    def stopped_by_rule(job: Path) -> int:
        newest = {event["trial"]: event["state"] for event in events(job, "trial")}
        return next(number for number, state in newest.items() if state == "stopped" and number != 2)

    def train(run: Any) -> Any:
        job, slice_ = run.folder.parents[1], json.loads((run.folder / "slice.json").read_text())["number"]
        wishes: dict[int, tuple[int, KeepOrStop]] = {2: (2, "stop")}
        if slice_ == 7:
            wishes[7] = stopped_by_rule(job), "keep"
        if slice_ in wishes and len(read_overrides(job)) < (1 if slice_ == 2 else 2):
            write_override(job, *wishes[slice_], "ada")
        if job.name == "killed" and slice_ in deaths:
            deaths.remove(slice_)
            raise KeyboardInterrupt
        return inner(run)

    monkeypatch.setattr(search, "train", train)
    whole, killed = lay(tmp_path / "whole", recipe), lay(tmp_path / "killed", recipe)
    assert run_folder(whole)["outcome"] == "succeeded"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_folder(killed)
    assert run_folder(killed)["outcome"] == "succeeded" and not deaths

    def told(job: Path, kind: str) -> list[dict[str, Any]]:
        return [{name: value for name, value in event.items() if name != "key"} for event in events(job, kind)]

    reports = [json.loads((job / "artifact" / "artifact.json").read_text())["report"] for job in (whole, killed)]
    assert reports[0] == reports[1]
    assert told(whole, "override") == told(killed, "override") and told(whole, "trial") == told(killed, "trial")
    taken = told(whole, "override")
    kept = taken[1]["trial"]
    assert [(event["trial"], event["verdict"], event["taken"]) for event in taken] == [
        (2, "stop", True),
        (kept, "keep", True),
    ]
    assert taken[1]["message"] == f"Trial {kept} is kept by you (ada): it goes on at the next opportunity."
    record = [json.loads(line) for line in (whole / search.RECORD).read_text().splitlines()]
    cut = record[2]
    assert cut["ask"]["trial"] == 2 and cut["step"] == 1 < cut["ask"]["until"] and record[3]["override"]["trial"] == 2
    rows = {row["trial"]: row for row in reports[0]["table"]}
    assert rows[2]["state"] == "stopped" and rows[2]["step"] == 1
    assert rows[kept]["state"] == "finished" and rows[kept]["step"] == 10
