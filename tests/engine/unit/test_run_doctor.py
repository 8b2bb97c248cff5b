"""The run doctor: what each rule says of a made-up stream, that it depends on the stream alone, and that it stands in every run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.core.compose import compose
from engine.core.control import write_request
from engine.core.recipe import changed
from engine.core.slots import Slot
from engine.methods.early_dynamics_stopping import EarlyDynamics, EarlyDynamicsStopping
from engine.methods.run_doctor import Doctor, RunDoctor
from engine.ops.check import check
from engine.ops.folder import run_folder
from engine.parts.doctor import Plan, single_label
from engine.parts.vitals import Level, Vitals, alignment, without_curve
from engine.train import checkpoint
from engine.train.parts import Look, Remedy, Signal, agreed
from tests.engine.tiny import Tiny, events, lay

STEPS, BATCH, EPOCH = 200, 8, 50
Row = dict[str, Any]
PLAN = Plan(
    rate=1e-3, epochs=4, batch=BATCH, accumulate=1, max_length=128, classes=4, chance=math.log(4),
    dials={"methods.1.params.max_norm": 1.0, "methods.2.params.weight_decay": 0.5},
)  # fmt: skip


def stream(
    change: Callable[[int, Row], None] | None = None, held: Callable[[int], dict[str, Any]] | None = None, *, seed: int = 0, steps: int = STEPS
) -> list[Look]:  # fmt: skip
    """A healthy run, changed row by row; a measurement every 25 steps, as a second look at the same row."""
    rng = np.random.default_rng(seed)
    plan = {"planned_samples": steps * BATCH, "planned_steps": steps, "warmup_steps": 0}
    learners = {"count": 8, "size": 10.0, "idle": 0.0}
    measure = held or (lambda step: {})

    def scores(step: int) -> dict[str, Any]:
        return {"eval_loss": 1.4 / (1 + step / 60), "eval_loss_se": 0.02, "learners": learners, **measure(step)}

    looks = [Look(step=0, samples=0, row={}, evaluation=scores(0), **plan)]
    for step in range(1, steps + 1):
        row: Row = {
            "loss": 1.4 / (1 + step / 60) * math.exp(0.12 * float(rng.standard_normal())), "grad_norm": float(rng.lognormal(0, 0.3)),
            "tokens": step * 500 + int(rng.integers(30)), "weight": 8.0, "clipped": 0.0, "epoch": step / EPOCH,
        }  # fmt: skip
        if change:
            change(step, row)
        looks.append(Look(step=step, samples=step * BATCH, row=row, **plan))
        if step % 25 == 0:
            looks.append(Look(step=step, samples=step * BATCH, row=row, evaluation=scores(step), **plan))
    return looks


def said(looks: list[Look], doctor: Doctor | None = None, **params: Any) -> list[tuple[int, Signal]]:
    doctor = doctor or Doctor(RunDoctor.Params(**params), PLAN)
    return [(look.step, signal) for look in looks for signal in doctor.see(look)]


def rules(looks: list[Look], **params: Any) -> dict[str, int]:
    """rule -> step, without notes; every rule speaks once and in sentences."""
    found = said(looks, **params)
    assert len({signal.rule for _, signal in found}) == len(found)
    assert all(signal.message.endswith(".") and len(signal.message) > 60 for _, signal in found)
    return {signal.rule: step for step, signal in found if signal.action != "note"}


def put(key: str, value: float, when: Callable[[int], bool] = lambda step: True) -> Callable[[int, Row], None]:
    def change(step: int, row: Row) -> None:
        if when(step):
            row[key] = value

    return change


def grow(key: str, factor: Callable[[int], float]) -> Callable[[int, Row], None]:
    def change(step: int, row: Row) -> None:
        row[key] *= factor(step)

    return change


@pytest.mark.parametrize("seed", range(12))
def test_a_healthy_run_is_left_in_peace(seed: int) -> None:
    assert rules(stream(seed=seed)) == {}


@pytest.mark.parametrize(
    ("change", "first", "start"),
    [
        (put("loss", math.nan, lambda step: step >= 90), "loss", "last_good"),
        (put("grad_norm", math.inf, lambda step: step >= 90), "grad_norm", "last_good"),
        (put("loss", math.nan, lambda step: step >= 2), "loss", "beginning"),
    ],
)
def test_what_came_first_and_where_to_start_anew(change: Any, first: str, start: str) -> None:
    ((_, signal),) = said(stream(change))
    assert (signal.rule, signal.numbers["first"]) == ("not-finite", first)
    assert signal.remedy is not None and signal.remedy.start == start
    assert signal.remedy.changes == {"settings.learning_rate": 1e-4} and "0.0001" in signal.remedy.title


def test_zero_loss_with_a_gradient_that_is_no_number_is_about_the_data() -> None:
    def broken(step: int, row: Row) -> None:
        if step >= 40:
            row.update(loss=0.0, grad_norm=math.nan)

    ((_, signal),) = said(stream(broken))
    assert signal.numbers["first"] == "zero_loss" and "cut off" in signal.message
    assert signal.remedy is not None and signal.remedy.changes == {"settings.max_length": 256}


def test_a_restless_run_before_the_end_names_the_rate() -> None:
    def explode(step: int, row: Row) -> None:
        row["loss"] *= 1.0 if step < 60 else 1.5 ** (step - 60)
        row["loss"] = row["loss"] if step < 66 else math.inf

    signal = next(signal for _, signal in said(stream(explode)) if signal.rule == "not-finite")
    assert "too high" in signal.message


def both(**values: float) -> Callable[[int, Row], None]:
    return lambda step, row: row.update(values)


def masked(step: int, row: Row) -> None:
    if step % 3:
        row.update(loss=0.0, grad_norm=0.0)


def sawtooth(step: int, row: Row) -> None:
    row["loss"] = 1.0 + 0.6 * (1 - ((step - 1) % EPOCH) // 7 % 2) + 0.05 * math.sin(step * 1.7)


def borders(step: int, row: Row) -> None:
    row["loss"] = 1.6 * 0.6 ** ((step - 1) // EPOCH) + 0.03 * math.sin(step * 1.7)


def smooth(step: int, row: Row) -> None:
    row.update(loss=2.0 * 0.985**step, tokens=500 * step)


SICK: dict[str, tuple[Callable[[int, Row], None] | None, Callable[[int], dict[str, Any]] | None, set[str]]] = {
    "masked": (masked, None, {"nothing-to-learn"}),
    "all masked": (both(loss=0.0, grad_norm=0.0), None, {"nothing-to-learn"}),
    "no gradient": (put("grad_norm", 0.0), None, {"no-gradient"}),
    "rises at once": (grow("loss", lambda step: min(5.0, 1 + step / 3)), None, {"rate-too-high"}),
    "breaks late": (grow("loss", lambda step: 6.0 if step > 120 else 1.0), None, {"loss-broke", "loss-shift"}),
    "shifts": (grow("loss", lambda step: 2.0 if step > 120 else 1.0), None, {"loss-shift"}),
    "clipped to nothing": (both(clipped=1.0, grad_norm=500.0), None, {"clip-too-small"}),
    "sorted": (sawtooth, None, {"sorted-data"}),
    "one batch": (smooth, None, {"same-batch"}),
    "idle": (None, lambda step: {"learners": {"count": 8, "size": 10.0, "idle": 0.9}}, {"idle-parts"}),
    "fading": (None, lambda step: {"learners": {"count": 8, "size": 10.0 * 0.98**step, "idle": 0.0}}, {"weights-fade"}),
    "rate too low": (put("loss", 1.4), lambda step: {"eval_loss": 1.4 - 1e-6 * step}, {"rate-too-low"}),
    "nothing learned": (grow("loss", lambda step: 1 + step / 60), lambda step: {"eval_loss": 1.4 + 0.05 * math.sin(step)}, {"plateau"}),
    "over-fit": (None, lambda step: {"eval_loss": 1.4 + 0.01 * step}, {"over-fit"}),
    "harder to learn than to know": (grow("loss", lambda step: 3.0), lambda step: {"eval_loss": 0.5}, {"train-above-heldout"}),
    "too easy": (put("loss", 0.01, lambda step: step > 6), lambda step: {"eval_loss": 1.4 if not step else 0.004}, {"too-easy"}),
    "one label": (
        None, lambda step: {"eval_loss": 1.386, "eval_accuracy": 0.25, "eval_macro_f1": 2 * 0.25 / 1.25 / 4}, {"one-answer"}
    ),
    "forgets": (None, lambda step: {"general_loss": 3 + step / 50, "general_loss_se": 0.1}, {"forgetting"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SICK)
def test_each_illness_is_named(name: str) -> None:
    change, held, expected = SICK[name]
    found = rules(stream(change, held))
    assert expected & found.keys(), found


def test_drops_at_the_borders_of_passes_are_learning_by_heart() -> None:
    found = said(stream(borders))
    assert "epoch-jumps" in {signal.rule for _, signal in found}
    assert "epoch-jumps" not in {signal.rule for _, signal in said(stream())}


def test_a_loss_that_swings_around_zero_is_not_judged_by_its_level() -> None:
    rng = np.random.default_rng(0)

    def policy(step: int, row: Row) -> None:
        row["loss"] = 0.1 * float(rng.standard_normal()) + (0.5 if step > 50 else 0.0)

    assert rules(stream(policy)) == {}


def test_one_cause_is_named_once() -> None:
    found = rules(
        stream(grow("loss", lambda step: 6.0 if step > 4 else 1.0), lambda step: {"eval_loss": 5.0 if step else 1.4})
    )
    assert list(found) == ["rate-too-high"]


def test_it_only_warns_unless_it_may_stop() -> None:
    looks = stream(put("grad_norm", 0.0))
    assert [signal.action for _, signal in said(looks)] == ["warn"]
    assert [signal.action for _, signal in said(looks, may_stop=True)] == ["stop"]
    assert said(looks, active=False) == []


@pytest.mark.parametrize("name", SICK)
def test_a_stream_cut_anywhere_gives_the_same_findings(name: str) -> None:
    looks = stream(SICK[name][0], SICK[name][1])
    whole = said(looks)
    for cut in (1, 7, 40, 111, 170):
        first = Doctor(RunDoctor.Params(), PLAN)
        before = said(looks[:cut], first)
        second = Doctor(RunDoctor.Params(), PLAN)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert [*before, *said(looks[cut:], second)] == whole


@pytest.mark.parametrize("name", SICK)
def test_it_never_contradicts_early_signals(name: str) -> None:
    looks = stream(SICK[name][0], SICK[name][1])
    early = EarlyDynamics(EarlyDynamicsStopping.Params())
    lower = {signal.rule for look in looks for signal in early.see(look) if "lower learning rate" in signal.message}
    raises = {rule for rule in rules(looks) if rule == "rate-too-low"}
    assert not (lower - {"always-clipped"} and raises)
    graver = {
        signal.rule
        for look in looks
        for signal in EarlyDynamics(EarlyDynamicsStopping.Params()).see(look)
        if signal.action == "stop"
    }
    assert not graver or rules(looks), "early signals would end a run that the doctor calls healthy"


def test_state_and_time_do_not_grow() -> None:
    doctor = Doctor(RunDoctor.Params(), PLAN)
    said(stream(steps=300), doctor)
    size = len(json.dumps(doctor.state_dict()))
    looks = [look for look in stream(steps=4000) if look.step > 300]
    start = time.process_time()
    said(looks, doctor)
    each = (time.process_time() - start) / len(looks)
    assert len(json.dumps(doctor.state_dict())) < 1.2 * size
    assert each < 3e-4  # about 0.02 ms; a step of a real run takes a thousand times as long


# ── signs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_noise_is_the_standard_deviation_and_hardly_sees_a_trend() -> None:
    rng = np.random.default_rng(3)
    level, falling = Level(), Level()
    for step, value in enumerate(rng.normal(5, 0.4, 3000)):
        level.add(float(value))
        falling.add(float(value) - 0.02 * step)
    assert level.slow == pytest.approx(5, abs=0.3)
    assert level.noise == pytest.approx(0.4, rel=0.4) and falling.noise == pytest.approx(level.noise, rel=0.15)


def test_a_parabola_leaves_nothing_and_a_wave_leaves_itself() -> None:
    curve = [0.3 * x * x - x + 2 for x in range(8)]
    assert np.allclose(without_curve(curve), 0)
    wave = [float(x % 2) for x in range(8)]
    expected = np.array(wave) - np.polyval(np.polyfit(range(8), wave, 2), range(8))
    assert np.allclose(without_curve(wave), expected)
    assert alignment(wave, wave) == pytest.approx(1) and alignment([0.0], [0.0]) == 0.0


def test_one_answer_for_all_is_known_by_its_scores() -> None:
    from sklearn.metrics import f1_score

    truth = [0, 0, 1, 2, 3, 3, 3]
    macro = f1_score(truth, [3] * 7, average="macro", labels=[0, 1, 2, 3], zero_division=0)
    assert single_label(3 / 7, macro, 4)
    other = f1_score(truth, [3, 0, 3, 3, 3, 3, 3], average="macro", labels=[0, 1, 2, 3], zero_division=0)
    assert not single_label(4 / 7, other, 4)


def test_vital_signs_come_back_whole() -> None:
    doctor = Doctor(RunDoctor.Params(), PLAN)
    said(stream(), doctor)
    assert Vitals.of(json.loads(json.dumps(doctor.vitals.state()))) == doctor.vitals


# ── signals and remedies ──────────────────────────────────────────────────────────────────────────────────────────────


def test_watchers_that_see_the_same_speak_once() -> None:
    remedy = Remedy(title="Restart", start="last_good", changes={"settings.epochs": 1.0})
    one = Signal(action="stop", rule="a", message="Grave.")
    other = Signal(action="warn", rule="a", message="Mild.", remedy=remedy)
    third = Signal(action="note", rule="b", message="Else.")
    (first, second) = agreed([third, other, one])
    assert second == Signal(action="stop", rule="a", message="Grave.", remedy=remedy) and first == third
    assert first.to_dict().keys() == {"action", "rule", "message", "numbers"}
    assert second.to_dict()["remedy"] == {"title": "Restart", "start": "last_good", "changes": {"settings.epochs": 1.0}}


@pytest.mark.parametrize("name", SICK)
def test_every_remedy_makes_a_sound_recipe(tiny: Tiny, name: str) -> None:
    methods: list[tuple[str, dict[str, Any]]] = [
        ("full-finetuning", {}),
        ("clip", {}),
        ("adamw", {"weight_decay": 0.5}),
    ]
    recipe = tiny.recipe(methods, task="classify", learning_rate=1e-3, epochs=4, max_steps=None)
    for _, signal in said(stream(SICK[name][0], SICK[name][1])):
        if signal.remedy is not None:
            other = changed(recipe, signal.remedy.changes)
            assert other != recipe and check(other).faults == []
            assert signal.remedy.title.startswith("Restart from the ")


def test_a_recipe_is_changed_at_dotted_names(tiny: Tiny) -> None:
    recipe = tiny.recipe([("lora", {"r": 2}), ("clip", {})])
    other = changed(recipe, {"settings.seed": 3, "methods.0.params.r": 4, "methods.+": [{"slug": "patience"}]})
    assert other.settings.seed == 3 and other.methods[0].params["r"] == 4 and other.methods[-1].slug == "patience"
    assert recipe.settings.seed == 17 and len(recipe.methods) == 2


# ── in real runs ──────────────────────────────────────────────────────────────────────────────────────────────────────

LORA: list[tuple[str, dict[str, Any]]] = [("lora", {"r": 2})]
WILD: list[tuple[str, dict[str, Any]]] = [("full-finetuning", {}), ("constant", {})]


def test_it_stands_in_every_run_and_takes_its_dials_from_the_recipe(tiny: Tiny) -> None:
    alone, _ = compose(tiny.recipe(LORA))
    assert [(item.slug, item.index) for item in alone.in_slot(Slot.WATCHER)] == [("run-doctor", None)]
    beside, _ = compose(tiny.recipe([*LORA, ("patience", {})]))
    assert {item.slug for item in beside.in_slot(Slot.WATCHER)} == {"run-doctor", "patience"}
    (named,) = compose(tiny.recipe([*LORA, ("run-doctor", {"active": False})]))[0].in_slot(Slot.WATCHER)
    assert named.index == 1 and not named.params.active


def test_stop_and_resume_give_the_same_signals(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(WILD, learning_rate=0.5, max_steps=24, epochs=20, evaluations=6)
    whole = lay(tmp_path / "whole", recipe)
    run_folder(whole)
    assert any(signal.get("remedy") for signal in events(whole, "signal"))
    folder = lay(tmp_path / "paused", recipe)
    for _ in range(2):
        write_request(folder, "pause")
        assert run_folder(folder)["outcome"] == "paused"
        (folder / "control.json").unlink()
    run_folder(folder)
    assert events(folder, "signal") == events(whole, "signal")


def test_a_checkpoint_from_before_the_doctor_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path, tiny.recipe(LORA))
    write_request(folder, "pause")
    run_folder(folder)
    (folder / "control.json").unlink()
    newest = checkpoint.newest(folder)[0]
    assert newest is not None and any("run-doctor" in name for name in newest.values["parts"])
    original = checkpoint.newest

    def without(place: Path) -> Any:
        snapshot, complaints = original(place)
        if snapshot is not None:
            for name in [name for name in snapshot.values["parts"] if "run-doctor" in name]:
                del snapshot.values["parts"][name]
        return snapshot, complaints

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "newest", without)
        assert run_folder(folder)["outcome"] == "succeeded"


@pytest.mark.parametrize("active", [True, False])
def test_a_crash_leaves_a_remedy_in_the_log(tiny: Tiny, tmp_path: Path, active: bool) -> None:
    import torch

    methods = [*WILD, ("run-doctor", {"active": active})]
    folder = lay(tmp_path, tiny.recipe(methods, learning_rate=1e-2, max_steps=20, epochs=20))
    original, calls = torch.nn.functional.cross_entropy, []

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        value = original(*args, **kwargs)
        calls.append(value.requires_grad)
        return value * math.nan if value.requires_grad and sum(calls) > 3 else value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", poisoned)
        assert run_folder(folder)["reason"] == "diverged"
    (signal,) = [item for item in events(folder, "signal") if item["rule"] == "not-finite"]
    assert signal["remedy"]["changes"] == {"settings.learning_rate": 1e-3} and ("first" in signal["numbers"]) == active


def test_what_learns_is_described_at_every_measurement(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path, tiny.recipe(LORA, task="classify"))
    run_folder(folder)
    start, *later = [event["learners"] for event in events(folder, "evaluation")]
    assert "idle" not in start and start["size"] > 0
    assert all(item["idle"] == 0.0 and item["count"] == start["count"] for item in later)
