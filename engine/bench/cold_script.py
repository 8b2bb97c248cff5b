"""What a person without a studio runs: a script that imports torch, transformers and peft, and trains a LoRA for one step.

    python -m engine.bench.cold_script MODEL_FOLDER TEXTS.csv

Nothing of Bonsai takes part. The file's first column holds texts and its second one labels. Prints the loss of the first step.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def main(model_folder: str, texts: str) -> None:
    """One step of AdamW on eight texts, with the default LoRA of rank 8 on query and value."""
    import peft
    import torch
    import transformers

    with Path(texts).open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    labels = sorted({row[1] for row in rows})
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=len(labels))
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, task_type=peft.TaskType.SEQ_CLS))
    batch = tokenizer([row[0] for row in rows[:8]], padding=True, truncation=True, max_length=48, return_tensors="pt")
    truth = torch.tensor([labels.index(row[1]) for row in rows[:8]])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
    loss = model(**batch, labels=truth).loss
    loss.backward()
    optimizer.step()
    print(f"step 1: loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
