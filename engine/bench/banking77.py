"""Banking77 on MiniLM: LoRA, PaCA, HFT and full fine-tuning on the same data, beside a frozen encoder with logistic regression."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from engine.bench.pages import Goal, Section, Study
from engine.bench.whole_runs import Finished, run_alone, shared_data

EPOCHS, BATCH, SEED = 3, 32, 17
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r=8": ("lora", {"r": 8, "alpha": 16}),
    "PaCA r=16": ("paca", {"r": 16, "alpha": 16}),
    "HFT": ("hft", {}),
    "Full": ("full-finetuning", {}),
}


def measure() -> list[Section]:
    """Run the study and return its tables."""
    data = shared_data() / "banking77"
    test = [json.loads(line) for line in (data / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    section = Section(
        title="77 kinds of questions to a bank, MiniLM-L6 (22.7 M parameters)",
        intro=f"Trained on 10,003 real questions (10 % of them kept back for choosing the best checkpoint), tested on {len(test):,} others; "
        f"{EPOCHS} passes, {BATCH} at a time, fp32, cosine schedule, learning rate as the studio suggests it. Minutes are of training alone, "
        "memory is the peak of the whole process.",
        columns=(
            "method",
            "test accuracy",
            "minutes",
            "peak memory, MB",
            "trainable",
            "adapter, MB",
            "learning rate",
            "certificate",
        ),
    )
    with tempfile.TemporaryDirectory(prefix="bonsai-study-") as home:
        frozen = _frozen_baseline(data, test)
        section.rows.append(("frozen encoder + logistic regression", f"{frozen:.4f}", "–", "–", "–", "–", "–", "–"))
        for title, (slug, params) in WAYS.items():
            done = run_alone(
                Path(home) / slug,
                {
                    "name": f"Banking77, {title}",
                    "task": "classify",
                    "model": {"source": "starter:minilm-l6"},
                    "data": {"source": f"file:{data / 'train.jsonl'}", "columns": {"text": "text", "label": "label"}},
                    "methods": [{"slug": slug, "params": params}, {"slug": "clip"}],
                    "settings": {
                        "epochs": EPOCHS,
                        "batch_size": BATCH,
                        "holdout": 0.1,
                        "evaluations": EPOCHS,
                        "seed": SEED,
                        "max_length": 64,
                    },
                },
            )
            accuracy = _accuracy(done, test)
            section.rows.append(_row(title, accuracy, done))
            section.goals.append(
                Goal(
                    goal=f"Banking77 test accuracy, {title}",
                    value=accuracy,
                    better="more",
                    unit="share",
                    baseline=f"frozen encoder {frozen:.4f}",
                )
            )
            print(f"  {title}: {accuracy:.4f}", flush=True)
    best = max(section.goals, key=lambda goal: goal.value)
    verdict = "beats" if best.value > frozen else "does not beat"
    section.remarks.append(
        f"The best of them, {best.goal.rpartition(', ')[2]} with {best.value:.4f}, {verdict} the frozen encoder with logistic regression."
    )
    return [section]


def _row(title: str, accuracy: float, done: Finished) -> tuple[str, ...]:
    body = done.description
    rate = json.loads((done.artifact.parent / "recipe.json").read_text(encoding="utf-8"))["settings"]["learning_rate"]
    return (
        title,
        f"{accuracy:.4f}",
        f"{body['seconds'] / 60:.1f}",
        f"{done.peak_bytes / 1e6:,.0f}",
        f"{body['num_trainable']:,}",
        f"{done.adapter_bytes / 1e6:.2f}",
        f"{rate:g}",
        "green" if done.certificate["ok"] else "red",
    )


def _accuracy(done: Finished, test: list[dict[str, str]]) -> float:
    from engine.train.export import load_predictor

    predictor = load_predictor(done.artifact)
    answers = predictor.predict([row["text"] for row in test])
    return sum(answer["label"] == row["label"] for answer, row in zip(answers, test, strict=True)) / len(test)


def _frozen_baseline(data: Path, test: list[dict[str, str]]) -> float:
    """Mean-pooled MiniLM features and scikit-learn's logistic regression, on all training rows."""
    import numpy as np
    import torch
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    from engine.io.facts import locate_model

    folder = locate_model("starter:minilm-l6")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    @torch.inference_mode()
    def features(texts: list[str]) -> Any:
        pooled = []
        for start in range(0, len(texts), 128):
            batch = tokenizer(
                texts[start : start + 128], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            pooled.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
        return np.concatenate(pooled)

    train = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    classifier = LogisticRegression(max_iter=1000, C=10.0)
    classifier.fit(features([row["text"] for row in train]), [row["label"] for row in train])
    return float(classifier.score(features([row["text"] for row in test]), [row["label"] for row in test]))


STUDY = Study(name="banking77", page="banking77.md", minutes=40, quick=False, seed=SEED, run=measure)
