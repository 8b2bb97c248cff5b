"""What a user would run instead: transformers' Trainer with peft's LoRA, and a hand-written loop."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Pair = tuple[list[int], list[int]]  # input ids and labels of an example


def lora_model(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model with peft's LoRA, r=8, on every linear layer; peft keeps what learns in fp32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def bare_loop(folder: str, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One step of a hand-written loop of twelve lines."""
    model = lora_model(folder)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    inputs, labels = batch["input_ids"], batch["labels"]

    def one() -> None:
        model(input_ids=inputs, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return one


def trainer_steps(
    model: Any,
    batches: Sequence[Sequence[Pair]],
    pad: int,
    *,
    learning_rate: float = 1e-4,
    schedule: str = "linear",
    losses: list[float] | None = None,
) -> Callable[[], float]:
    """A function that trains `model` once over the batches with transformers' Trainer and returns the seconds, its start-up left out.

    `batches` holds (input ids, labels) of each example; rows of a batch are padded to its longest, as the Trainer's collators do. `losses` receives
    the loss of every step; reading it slows the step a little.
    """
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rows = [example for batch in batches for example in batch]

    def collate(examples: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        width = max(len(ids) for ids, _ in examples)
        return {
            "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in examples]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples]),
            "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples]),
        }

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(rows)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if losses is not None:
                losses.append(float(loss.detach()))
            return loss

    class Stopwatch(TrainerCallback):
        start = end = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.start = self.start or time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.end = time.perf_counter()

    def once() -> float:
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            arguments = TrainingArguments(
                output_dir=out, max_steps=len(batches), per_device_train_batch_size=len(batches[0]), learning_rate=learning_rate, lr_scheduler_type=schedule,
                report_to=[],
                save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
                use_cpu=not torch.cuda.is_available(),
            )  # fmt: skip
            trainer = InOrder(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[watch])
            trainer.train()
        return watch.end - watch.start

    return once
