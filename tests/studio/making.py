"""Runs in every state, with the events that a real one leaves, made quickly."""

from __future__ import annotations

import math
import random
import time
import uuid
from datetime import timedelta
from typing import Any

from django.contrib.auth.models import User
from django.utils import timezone

from engine.core.artifact import seal
from engine.core.control import write_json
from engine.core.events import LOG_NAME
from engine.core.events import Event as Line
from jobs.ingest import Ingester
from jobs.lifecycle import begin
from jobs.models import Artifact, Dataset, Job, ModelEntry, Status
from jobs.places import job_folder

LABELS = ("billing", "delivery", "login", "praise", "refund", "returns", "technical", "other")
SIGNALS = (
    (
        0.10,
        "note",
        "window-10",
        "After 10 % of the planned examples: the training error averages 1.62 and is falling, and a typical correction has the size 2.4.",
    ),
    (
        0.30,
        "note",
        "window-30",
        "After 30 % of the planned examples: the training error averages 0.94 and is falling, and a typical correction has the size 1.9.",
    ),
)
RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "",
    "operation": "train",
    "task": "classify",
    "model": {"source": "starter:minilm"},
    "data": {"source": "starter:messages", "columns": {"text": "text", "label": "label"}},
    "methods": [{"slug": "paca", "params": {"r": 8}}, {"slug": "early-dynamics-stopping", "params": {}}],
    "settings": {
        "learning_rate": 0.002,
        "epochs": 3.0,
        "batch_size": 16,
        "accumulate": 1,
        "max_length": 64,
        "seed": 17,
        "precision": "fp32",
        "holdout": 0.15,
    },
}


def make_run(
    owner: User,
    *,
    status: Status = Status.QUEUED,
    name: str = "Sort customer messages",
    done: float = 0.0,
    total: int = 240,
    recipe: dict[str, Any] | None = None,
    warn: str = "",
    seed: int = 1,
    **fields: Any,
) -> Job:
    """A run in a state, with `done` of its `total` steps taken and every event on the way."""
    recipe = recipe or RECIPE
    job = Job(
        id=uuid.uuid4(),
        owner=owner,
        name=name,
        request=recipe,
        recipe=recipe,
        fingerprint=f"{seed:x}".rjust(64, "9"),
        total_steps=total,
        estimate={"seconds": 190, "memory_bytes": 610_000_000, "total_steps": total},
        **fields,
    )
    begin(job, owner.get_username())
    if status is not Status.QUEUED:
        learn(job, round(done * total), total, warn=warn, seed=seed)
        now = timezone.now()
        changes: dict[str, Any] = {"status": status, "attempt": 1, "started_at": now - timedelta(seconds=190)}
        if status in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED):
            changes["ended_at"] = now
        if status not in (Status.STARTING, Status.RUNNING, Status.STOPPING, Status.LOST):
            changes |= {"eta_seconds": None, "device": ""}
        Job.objects.filter(pk=job.pk).update(
            **{**changes, **{key: value for key, value in fields.items() if key in ("message", "faults", "reason")}}
        )
        job.refresh_from_db()
    return job


def learn(job: Job, done: int, total: int, *, warn: str = "", seed: int = 1) -> None:
    """Write the events of the first `done` steps and what the job row keeps of them."""
    luck = random.Random(seed)
    start = time.time() - 190
    events: list[tuple[str, int, float, dict[str, Any]]] = []
    say = lambda kind, step, data: events.append((kind, step, start + 0.78 * step, data))  # noqa: E731
    say("state", 0, {"state": "starting", "message": "Reading the model and the data."})
    say(
        "child",
        0,
        {
            "attempt": 1,
            "pid": 4711,
            "device": "cpu",
            "device_name": "AMD EPYC",
            "num_threads": 2,
            "num_trainable": 98_312,
            "total_steps": total,
            "torch": "2.13.0",
        },
    )
    say("state", 0, {"state": "running", "message": "Learning with 98,312 numbers that may change."})
    measured = {round(total * place / 8) for place in range(9)}
    said = {max(1, round(total * share)): (action, rule, message) for share, action, rule, message in SIGNALS}
    if warn:
        said[round(total * 0.34)] = ("warn", "unsteady", warn)
    rows: list[dict[str, Any]] = []
    best = math.inf
    metrics: dict[str, Any] = {}
    last_signal: dict[str, Any] = {}
    for step in range(done + 1):
        if step:
            loss = 0.28 + 1.85 * math.exp(-4.2 * step / total) + luck.gauss(0, 0.16) * math.exp(-1.4 * step / total)
            norm = 1.1 + 2.6 * math.exp(-5 * step / total) + abs(luck.gauss(0, 0.45))
            rows.append(
                {
                    "step": step,
                    "samples": step * 16,
                    "tokens": step * 420,
                    "epoch": round(3 * step / total, 5),
                    "loss": max(0.02, loss),
                    "grad_norm": norm,
                    "learning_rate": 0.002 * (1 - step / total * 0.9),
                    "seconds": round(0.78 * step, 3),
                    "tokens_per_second": 538.0,
                    "memory": 598_000_000,
                }
            )
        if rows and (len(rows) == 3 or step == done or step in measured):
            say("metric", step, {"rows": rows})
            rows = []
        if step and step % 6 == 0:
            say(
                "progress",
                step,
                {
                    "done_steps": step,
                    "total_steps": total,
                    "fraction": step / total,
                    "eta_seconds": 0.78 * (total - step),
                },
            )
        if step in measured:
            held = 0.42 + 1.68 * math.exp(-4.6 * step / total) + (0.05 if step == total else 0)
            metrics = {
                "eval_loss": held,
                "eval_loss_se": 0.03,
                "eval_accuracy": min(0.92, 0.12 + 0.8 * (1 - math.exp(-5 * step / total))),
                "samples": step * 16,
            }
            say("evaluation", step, {**metrics, "best": held < best})
            say("checkpoint", step, {"path": f"checkpoints/step-{step:08d}", "best": held < best})
            best = min(best, held)
        if step in said:
            action, rule, message = said[step]
            last_signal = {"action": action, "rule": rule, "message": message, "numbers": {}}
            say("signal", step, last_signal)
    if done == total:
        say("state", total, {"state": "exporting", "message": "Writing the result and checking it in a clean process."})
        for place, (prompt, output, expected) in enumerate(SAMPLES):
            say("sample", total, {"prompt": prompt, "output": output, "expected": expected, "key": str(place)})
    folder = job_folder(job.pk)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [Line(place, moment, kind, step, data).line() for place, (kind, step, moment, data) in enumerate(events, 1)]
    (folder / LOG_NAME).write_bytes(b"".join(lines))
    Ingester(job, folder, job.lease_epoch).drain()
    newest = next((data["rows"][-1] for kind, _, _, data in reversed(events) if kind == "metric"), {})
    Job.objects.filter(pk=job.pk).update(
        done_steps=done,
        total_steps=total,
        loss=newest.get("loss"),
        metrics={**metrics, "step": done},
        last_signal=last_signal,
        eta_seconds=0.78 * (total - done) if done else None,
        device="cpu",
    )
    job.refresh_from_db()


SAMPLES = (
    ("The parcel was left with a neighbour I do not know.", "delivery", "delivery"),
    ("I was charged twice for the same order in March.", "billing", "billing"),
    ("It says my password is wrong, but I changed it yesterday.", "login", "login"),
    ("You have the friendliest people on the phone, thank you!", "praise", "praise"),
    ("Can I send the shoes back if I wore them once?", "refund", "returns"),
    ("The app closes itself whenever I open the map.", "technical", "technical"),
)


def make_result(job: Job, *, good: bool = True, writes: bool = False) -> Artifact:
    """The result of a finished run, with its folder on the disk."""
    folder = job_folder(job.pk) / "artifact"
    for form, name, num in (
        ("adapter", "adapter.safetensors", 410_000),
        ("lora", "adapter_model.safetensors", 402_000),
        ("merged", "model.safetensors", 900_000),
    ):
        (folder / form).mkdir(parents=True)
        (folder / form / name).write_bytes(b"\0" * num)
    description = describe(job, writes=writes)
    write_json(folder / "artifact.json", description)
    (folder / "recipe.yaml").write_text("version: 1\n", encoding="utf-8")
    (folder / "README.md").write_text("# A result\n", encoding="utf-8")
    content_id = seal(folder)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": "0" * 64}
        for path in folder.rglob("*")
        if path.is_file()
    }
    return Artifact.objects.create(
        job=job,
        folder=str(folder),
        content_id=content_id,
        description=description,
        files=files,
        certificate=certificate(good),
        bytes=sum(entry["bytes"] for entry in files.values()),
    )


def describe(job: Job, *, writes: bool = False) -> dict[str, Any]:
    """What artifact.json says."""
    metrics = {
        "eval_loss": 0.4412,
        "eval_loss_se": 0.041,
        "eval_accuracy": 0.9028,
        "eval_macro_f1": 0.891,
        "samples": 3840,
    }
    before = {"eval_loss": 2.091, "eval_loss_se": 0.02, "eval_accuracy": 0.1111, "eval_macro_f1": 0.06}
    baseline = {
        "name": "a frozen encoder with logistic regression",
        "eval_loss": 0.98,
        "eval_accuracy": 0.6944,
        "eval_macro_f1": 0.672,
        "sentence": "The baseline leaves the model as it is and fits a logistic regression on its sentence vectors.",
    }
    if writes:
        metrics = {"eval_loss": 1.31, "eval_loss_se": 0.02, "eval_perplexity": 3.71}
        before = {"eval_loss": 2.44, "eval_loss_se": 0.03, "eval_perplexity": 11.5}
        baseline = {
            "name": "the same model before training",
            "sentence": "Before training, the model gave each token a loss of 2.440; lower is better.",
            **before,
        }
    return {
        "kind": "model",
        "engine": "0.1.0",
        "name": job.name,
        "task": job.recipe["task"],
        "methods": [],
        "fingerprint": job.fingerprint,
        "parents": ["starter:minilm"],
        "base": {
            "source": "starter:minilm",
            "family": "bert",
            "architecture": "BertModel",
            "num_parameters": 22_713_216,
        },
        "data": {"num_train": 408, "num_holdout": 72, "labels": [] if writes else list(LABELS)},
        "ending": {"reason": "completed", "message": f"Finished all {job.total_steps} steps."},
        "best_step": 210,
        "used_best": True,
        "metrics": metrics,
        "before": before,
        "baseline": baseline,
        "samples": [{"prompt": prompt, "output": output, "expected": expected} for prompt, output, expected in SAMPLES],
        "forms": {"adapter": "bonsai", "lora": "peft", "merged": "transformers"},
        "notes": [],
        "num_trainable": 98_312,
        "steps": job.total_steps,
        "seconds": 187.2,
        "tokens": 100_800,
        "precision": "fp32",
        "seed": 17,
    }


def certificate(good: bool) -> dict[str, Any]:
    """What certificate.json says, for files that passed or that did not."""
    forms = [
        {
            "form": form,
            "loader": loader,
            "max_error": 3.1e-6,
            "scale": 9.1,
            "top1_agreement": 1.0,
            "ok": True,
            "sentence": f"{loader} gives the same best answer.",
        }
        for form, loader in (("adapter", "bonsai"), ("lora", "peft"), ("merged", "transformers"))
    ]
    if not good:
        forms[1] = {
            "form": "lora",
            "loader": "peft",
            "max_error": 2.7,
            "scale": 9.1,
            "top1_agreement": 0.61,
            "ok": False,
            "sentence": "peft gives the same best answer at 61.0% of 32 places; the largest difference is 2.7.",
        }
    said = (
        "A clean process loaded 'adapter', 'lora' and 'merged' and got the answers of the trained model."
        if good
        else (
            "The form 'lora' does not answer like the trained model. peft gives the same best answer at 61.0% of 32 places; the largest difference is 2.7."
        )
    )
    return {"ok": good, "sentence": said, "damaged": [], "forms": forms, "tolerance": 1e-4, "num_prompts": 32}


def make_data(owner: User | None = None) -> Dataset:
    """A data set of messages."""
    return Dataset.objects.create(
        owner=owner,
        name="Customer messages",
        path="messages.csv",
        format="csv",
        bytes=48_211,
        sha256="a" * 64,
        num_rows=480,
        shape="classification",
        columns=["text", "label"],
        mapping={"text": "text", "label": "label"},
        labels=list(LABELS),
    )


def make_model() -> ModelEntry:
    """The starter encoder."""
    return ModelEntry.objects.create(
        name="MiniLM", source="starter:minilm", kind="encoder", family="bert", num_parameters=22_713_216
    )
