"""The loop: the moment of every hook, endings, refusals, checkpoints and certificates, on real tiny runs."""

from __future__ import annotations

import fcntl
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.ops.train as driver
from engine.core.control import Control, write_request
from engine.core.events import EventLog
from engine.core.slots import Slot
from engine.ops.check import require
from engine.ops.folder import run_folder
from engine.parts.ordinary_step import OrdinaryStep
from engine.parts.signals import noise_corrected
from engine.train import checkpoint
from engine.train.certificate import certify
from engine.train.export import build_slots
from engine.train.parts import MOMENTS
from tests.engine.tiny import Tiny, events, lay, metric_rows

LORA: list[tuple[str, dict[str, Any]]] = [("lora", {"r": 2}), ("clip", {})]
FULL: list[tuple[str, dict[str, Any]]] = [("full-finetuning", {}), ("clip", {})]


def test_every_hook_runs_at_its_documented_moment(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace: list[tuple[Slot, str]] = []

    def traced(*arguments: Any) -> Any:
        composition, slots = build_slots(*arguments)
        for slot in Slot:
            for chosen in composition.in_slot(slot):
                part = slots.names[f"{chosen.slug}.{chosen.index}/{slot.value}"]
                for moment in MOMENTS:
                    if moment.slot is slot and hasattr(part, moment.hook):
                        _spy(part, slot, moment.hook)
        return composition, slots

    def _spy(part: Any, slot: Slot, hook: str) -> None:
        original = getattr(part, hook)

        def call(*args: Any, **kwargs: Any) -> Any:
            trace.append((slot, hook))
            result = original(*args, **kwargs)
            if (slot, hook) == (Slot.OPTIMIZER, "build"):
                _spy(result, Slot.OPTIMIZER, "step")
            return result

        setattr(part, hook, call)

    monkeypatch.setattr(driver, "build_slots", traced)
    recipe = tiny.recipe([*LORA, ("patience", {})], max_steps=2, accumulate=2, evaluations=1)
    assert run_folder(lay(tmp_path, recipe))["outcome"] == "succeeded"

    documented = {(moment.slot, moment.hook) for moment in MOMENTS}
    absent = {
        (Slot.LOSS_TERM, "term"),
        (Slot.DATA_POLICY, "begin"),
        (Slot.DATA_POLICY, "survey"),
        (Slot.DATA_POLICY, "rows"),
        (Slot.DATA_POLICY, "gather"),
        (Slot.DATA_POLICY, "batch"),
        (Slot.OPTIMIZER, "remap"),
    }
    assert set(trace) == documented - absent, "a hook that no part of this run has, or one that is not documented"
    names = [f"{slot.value}.{hook}" for slot, hook in trace]
    once = ["parametrization.calibrate", "parametrization.attach", "parametrization.trainables"]
    assert names[:3] == once and names.index("optimizer.build") > names.index("parametrization.trainables")
    first = names.index("update_rule.update")
    assert "parametrization.sync" in names[:first]
    step = names[first : names.index("watcher.see", first) + 1]
    assert step == [
        "update_rule.update",
        "objective.weight",
        "objective.weight",
        "objective.loss",
        "objective.loss",
        "gradient_rule.apply",
        "schedule.factor",
        "optimizer.step",
        "parametrization.adapt",
        "parametrization.sync",
        "objective.numbers",
        "watcher.see",
    ]
    assert names[-2:] == ["parametrization.export", "parametrization.merge"]


def test_a_request_to_stop_keeps_what_was_learned(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path, tiny.recipe(LORA))
    write_request(folder, "stop")
    result = run_folder(folder)
    assert (result["outcome"], result["reason"]) == ("succeeded", "stopped")
    assert (folder / "artifact" / "adapter" / "adapter_model.safetensors").exists()


def test_a_time_limit_ends_the_run_with_a_result(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path, tiny.recipe(LORA, max_minutes=0.05, max_steps=100_000, epochs=1000, evaluations=1))
    result = run_folder(folder)
    assert result["reason"] == "budget" and (folder / "artifact").exists()
    assert metric_rows(folder)[-1]["step"] < 100_000


def test_a_loss_that_is_not_a_number_fails_with_the_last_good_checkpoint_kept(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(
        [("full-finetuning", {}), ("constant", {}), ("adamw", {})], learning_rate=10.0, max_steps=400, epochs=100
    )
    poisoned = _PoisonAfter(3)
    folder = lay(tmp_path, recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", poisoned)
        result = run_folder(folder)
    assert (result["outcome"], result["reason"]) == ("failed", "diverged")
    assert "learning rate of 1" in result["message"]
    snapshot, _ = checkpoint.newest(folder)
    assert snapshot is not None and all(tensor.isfinite().all() for tensor in snapshot.trainables.values())
    assert metric_rows(folder)[-1]["nonfinite"]


class _PoisonAfter:
    """cross_entropy that gives NaN from the n-th training call on, as an overflow would."""

    def __init__(self, calls: int) -> None:
        self.left, self.original = calls, torch.nn.functional.cross_entropy

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        value = self.original(*args, **kwargs)
        if not value.requires_grad:
            return value
        self.left -= 1
        return value if self.left >= 0 else value * math.nan


def test_out_of_memory_becomes_a_sentence_with_the_way_out(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", refuse)
    result = run_folder(lay(tmp_path, tiny.recipe(LORA)))
    assert result["reason"] == "out_of_memory"
    assert "2 examples at a time and add up 2 batches" in result["faults"][0]["way_out"]


def test_a_flipped_bit_is_refused_and_the_checkpoint_before_is_used(tiny: Tiny, tmp_path: Path) -> None:
    whole = lay(tmp_path / "whole", tiny.recipe(LORA))
    run_folder(whole)
    folder = lay(tmp_path / "flipped", tiny.recipe(LORA))
    write_request(folder, "pause")
    run_folder(folder)
    (folder / "control.json").unlink()
    before, last = checkpoint.listed(folder)[-2:]
    path = last / "optimizer.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    assert run_folder(folder)["outcome"] == "succeeded"
    warned = [event["message"] for event in events(folder, "log") if event["level"] == "warning"]
    assert any(last.name in message and "set aside" in message for message in warned), before
    assert metric_rows(folder) == metric_rows(whole)
    mine, theirs = (checkpoint.load(checkpoint.listed(f)[-1]) for f in (folder, whole))
    assert all(torch.equal(mine.trainables[name], theirs.trainables[name]) for name in theirs.trainables)


def test_the_last_two_and_the_best_checkpoint_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path, tiny.recipe(LORA, checkpoint_every=1, evaluations=4))
    run_folder(folder)
    scores = {event["step"]: event["eval_loss"] for event in events(folder, "evaluation")}
    best = min(scores, key=lambda step: scores[step])
    assert {path.name for path in checkpoint.listed(folder)} == {f"step-{step:08d}" for step in {7, 8, best}}


def test_a_flipped_tensor_turns_the_certificate_red(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path, tiny.recipe(LORA))
    run_folder(folder)
    artifact = folder / "artifact"
    assert certify(artifact)["ok"]
    path = artifact / "merged" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 0x40
    path.write_bytes(raw)
    certificate = certify(artifact)
    assert not certificate["ok"] and certificate["damaged"] == ["merged/model.safetensors"]
    assert "merged/model.safetensors" in certificate["sentence"]


def test_a_job_never_runs_twice_at_once(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path, tiny.recipe(LORA))
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as caught:
            run_folder(folder)
    assert caught.value.code == 3 and not (folder / "events.jsonl").exists()


def test_checkpoints_of_another_recipe_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path, tiny.recipe(LORA))
    write_request(folder, "pause")
    run_folder(folder)
    lay(folder, tiny.recipe(LORA, seed=99))
    result = run_folder(folder)
    assert result["reason"] == "bad_input" and "another recipe" in result["message"]


def test_bf16_keeps_what_learns_in_fp32_and_follows_the_same_curve(tiny: Tiny, tmp_path: Path) -> None:
    exact = lay(tmp_path / "fp32", tiny.recipe(LORA))
    rounded = lay(tmp_path / "bf16", tiny.recipe(LORA, precision="bf16"))
    assert run_folder(exact)["outcome"] == "succeeded" and run_folder(rounded)["outcome"] == "succeeded"
    snapshot = checkpoint.load(checkpoint.listed(rounded)[-1])
    assert {tensor.dtype for tensor in snapshot.trainables.values()} == {torch.float32}
    for one, other in zip(metric_rows(exact), metric_rows(rounded), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)
    run = driver.prepare(require(tiny.recipe(LORA, precision="bf16")), tmp_path, EventLog(tmp_path), Control(tmp_path))
    frozen = {parameter.dtype for parameter in run.model.parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16}


def test_recomputing_activations_changes_no_number(tiny: Tiny, tmp_path: Path) -> None:
    plain = lay(tmp_path / "plain", tiny.recipe(FULL))
    recomputed = lay(tmp_path / "recomputed", tiny.recipe(FULL, gradient_checkpointing=True))
    run_folder(plain)
    assert run_folder(recomputed)["outcome"] == "succeeded"
    for one, other in zip(metric_rows(plain), metric_rows(recomputed), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_the_clip_value_does_not_change_the_logged_norm(tiny: Tiny, tmp_path: Path) -> None:
    norms = []
    for limit in (0.1, 5.0):
        folder = lay(
            tmp_path / str(limit), tiny.recipe([("lora", {"r": 2}), ("clip", {"max_norm": limit})], max_steps=1)
        )
        run_folder(folder)
        norms.append(metric_rows(folder)[0]["grad_norm"])
    assert norms[0] == norms[1] > 0


def test_a_step_that_is_cut_in_two_tells_chance_from_signal_and_is_the_same_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe([("lora", {"r": 2}), ("clip", {"max_norm": 0.5})], max_steps=10, evaluations=1)
    cut = lay(tmp_path / "cut", recipe)
    assert run_folder(cut)["outcome"] == "succeeded"
    monkeypatch.setattr(OrdinaryStep, "cuts", lambda rule, step: False)
    whole = lay(tmp_path / "whole", recipe)
    assert run_folder(whole)["outcome"] == "succeeded"
    ours, plain = metric_rows(cut), metric_rows(whole)
    for one, other in zip(ours, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert [row["step"] for row in ours if "micro_norm" in row] == [8]
    row = ours[7]
    assert (row["micro_size"], row["batch_size"]) == (recipe.settings.batch_size / 2, recipe.settings.batch_size)
    assert not any("noise_scale" in row for row in (*plain, *ours[:7]))
    squared, noise = noise_corrected(row["grad_norm"], row["micro_norm"], row["batch_size"], row["micro_size"])
    assert ("grad_norm_corrected" in row) == (squared > 0)
    if squared > 0:
        assert ours[-1]["grad_norm_corrected"] == row["grad_norm_corrected"] == pytest.approx(math.sqrt(squared))
        assert row["noise_scale"] == pytest.approx(max(0.0, noise / squared))
    clipped = [row["clipped"] for row in ours]
    assert [row["clipped_share"] for row in ours] == [pytest.approx(sum(clipped[: k + 1]) / (k + 1)) for k in range(10)]


def test_result_says_what_it_was_measured_against(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(tmp_path, tiny.recipe([("lora", {"r": 2})], task="classify"))
    assert run_folder(folder)["outcome"] == "succeeded"
    body = json.loads((folder / "artifact" / "artifact.json").read_text())
    assert body["baseline"]["sentence"].endswith(".") and 0 <= body["baseline"]["eval_accuracy"] <= 1
    assert body["before"]["eval_loss"] > 0 and body["data"]["num_holdout"] >= 8


def test_one_method_twice_on_different_layers_is_taken_home_whole(tiny: Tiny, tmp_path: Path) -> None:
    twice = [("lora", {"r": 2, "targets": "attention"}), ("lora", {"r": 4, "targets": "feed-forward"})]
    folder = lay(tmp_path, tiny.recipe(twice, max_steps=3))
    assert run_folder(folder)["outcome"] == "succeeded"
    certificate = json.loads((folder / "artifact" / "certificate.json").read_text())
    assert certificate["ok"], certificate["sentence"]
    assert {"adapter-lora-1", "adapter-lora-2", "merged"} <= {form["form"] for form in certificate["forms"]}


@pytest.mark.parametrize("task", ["classify", "causal_lm"])
def test_answers_are_shown_while_it_learns_and_change_nothing(tiny: Tiny, tmp_path: Path, task: str) -> None:
    folders = []
    for count in (0, 2):
        folder = lay(
            tmp_path / str(count),
            tiny.recipe([("lora", {"r": 2, "dropout": 0.1})], task=task, live_samples=count, evaluations=4),
        )
        assert run_folder(folder)["outcome"] == "succeeded"
        folders.append(folder)
    assert metric_rows(folders[0]) == metric_rows(folders[1])
    live = [[event for event in events(folder, "sample") if event["key"].startswith("live-")] for folder in folders]
    assert not live[0] and [event["step"] for event in live[1]] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert all({"prompt", "output", "expected"} <= event.keys() for event in live[1])
    assert len({event["prompt"] for event in live[1]}) == 2
