"""Sums modulo seven that a small Llama answers with "unknown" unless a hint names the first step: GRPO, Guide-GRPO and their variants.

The base model is trained here for some twenty seconds: it adds three numbers when the question is written with "+", answers "unknown" when it is
written with "&" (the right answer has a probability of about 1e-5 there), and with the hint (a + b) mod 7 it is right seven times in ten and says
"unknown" otherwise. Answers are a single token. What is measured is the share of the practised "&" questions that are solved greedily, without hint.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch.nn import functional

from engine.core.control import Control
from engine.core.events import EventLog
from engine.core.recipe import parse_recipe
from engine.ops.check import require
from engine.ops.train import prepare
from engine.parts.sampling import completion_batch, token_logprobs
from engine.tasks.batching import measuring
from engine.tasks.verifiable import TASK
from engine.train.loop import train
from engine.train.run import Run
from tests.engine.tiny import metric_rows

pytestmark = pytest.mark.effects

MODULUS, NUM_HARD, STEPS, SEEDS = 7, 48, 150, (1, 2, 3, 4)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ ' ' + m['content'] + ' =' }}{% endif %}{% endfor %}"
)
ROLLOUTS = {"k": 8, "max_new_tokens": 1, "extra_batches": 0, "answers_at_a_time": 4096, "rows_at_a_time": 4096}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "GRPO": ("grpo", {}),
    "Guide": ("guide-grpo", {}),
    "hints always": ("guide-grpo", {"retry_threshold": 1.0}),
    "old log-probabilities under the plain prompt": ("guide-grpo", {}),
}


def row(numbers: Sequence[int], sign: str) -> dict[str, str]:
    a, b, c = numbers
    return {
        "question": f"{a} {sign} {b} {sign} {c}",
        "answer": str((a + b + c) % MODULUS),
        "hint": str((a + b) % MODULUS),
    }


def words() -> Any:
    """A tokenizer with a token for each word of these sums."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "<s>", "</s>", "<unk>", *map(str, range(MODULUS)), "+", "&", "=", "Hint:", "unknown"]
    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def base_model(folder: Path, seed: int, steps: int = 1000) -> None:
    """The model that the studies start from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = words()
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, initializer_range=0.1,
        vocab_size=len(tokenizer), max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(seed)
    every = list(itertools.product(range(MODULUS), repeat=3))
    rows = [row(numbers, sign) for sign in "+&" for numbers in every]
    plain = torch.tensor([TASK.prompt_ids(one, tokenizer) for one in rows])
    hinted = torch.tensor([TASK.prompt_ids(one, tokenizer, one["hint"]) for one in rows])
    ids, half = tokenizer.get_vocab(), len(every)
    right, unknown = torch.tensor([ids[one["answer"]] for one in rows]), torch.tensor(ids["unknown"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.03)
    for step in range(steps):
        asked = torch.randint(0, 2 * half, (40,), generator=generator)
        fails = torch.rand(40, generator=generator) < (0.3 if step > steps // 2 else 0.0)
        alone = torch.randint(0, half, (24,), generator=generator) + half * (torch.arange(24) < 16)
        pairs = (
            (hinted[asked], torch.where(fails, unknown, right[asked]), torch.ones(40)),
            (plain[alone], torch.where(alone >= half, unknown, right[alone]), torch.where(alone >= half, 10.0, 1.0)),
        )
        loss = torch.zeros(())
        for prompts, answers, weights in pairs:
            whole = torch.cat([prompts, answers[:, None], torch.full_like(answers[:, None], 2)], 1)  # [B, T]
            logits = model(input_ids=whole[:, :-1], logits_to_keep=2, use_cache=False).logits
            each = (
                functional.cross_entropy(logits.flatten(0, 1), whole[:, -2:].flatten(), reduction="none")
                .view(-1, 2)
                .sum(1)
            )
            loss = loss + (each * weights).sum() / 128
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def forget_the_hint(run: Run) -> None:
    """The trap of the card: old log-probabilities of hinted answers are taken under the plain prompt."""
    policy: Any = run.slots.policies[0]
    retry = policy.retry

    def wrong(run: Run, failed: list[Any]) -> list[Any]:
        groups: list[Any] = retry(run, failed)
        for group in groups:
            batch = completion_batch([(group.prompt, answer) for answer in group.answers], 0)
            with measuring(run.model):
                found = token_logprobs(run.model, batch)[:, len(group.prompt) - 1 :]
            group.logprobs = [each[: len(answer)].tolist() for each, answer in zip(found, group.answers, strict=True)]
        return groups

    policy.retry = wrong


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], dict[str, float]]:
    """Runs an arm with a seed through the real engine, once, and returns what was measured."""
    done: dict[tuple[str, int], dict[str, float]] = {}
    bases: dict[int, Path] = {}

    def measure(arm: str, seed: int) -> dict[str, float]:
        if (arm, seed) in done:
            return done[arm, seed]
        base = 1 + seed % 2  # two models and sets of sums, two runs on each
        if base not in bases:
            bases[base] = tmp_path_factory.mktemp(f"base{base}")
            base_model(bases[base] / "model", base)
            every = [
                n for n in itertools.product(range(MODULUS), repeat=3) if n[2]
            ]  # with c = 0 the hint is the answer
            random.Random(base).shuffle(every)
            (bases[base] / "data.jsonl").write_text("".join(json.dumps(row(n, "&")) + "\n" for n in every[:NUM_HARD]))
        slug, params = ARMS[arm]
        folder = tmp_path_factory.mktemp("run")
        settings = {"seed": seed, "max_steps": STEPS, "epochs": 1000, "batch_size": 16, "learning_rate": 1e-3, "max_length": 16,
                    "evaluations": 1, "checkpoint_every": 100_000, "holdout": 0.2}  # fmt: skip
        recipe = parse_recipe({
            "task": "verifiable", "model": {"source": f"folder:{bases[base] / 'model'}"}, "data": {"source": f"file:{bases[base] / 'data.jsonl'}"},
            "methods": [{"slug": "full-finetuning"}, {"slug": slug, "params": {**ROLLOUTS, **params}}], "settings": settings,
        })  # fmt: skip
        run = prepare(require(recipe), folder, EventLog(folder), Control(folder))
        if arm.startswith("old"):
            forget_the_hint(run)
        practised = [run.encoded.rows[example.source] for example in run.encoded.train]

        def solved(rows: Any) -> float:
            said = TASK.answers(run.model, rows, run.tokenizer, 16)
            return mean(TASK.reward(one, text) for one, text in zip(rows, said, strict=True))

        before = solved(practised)
        train(run)
        last = metric_rows(folder)[-1]
        done[arm, seed] = {
            "before": before, "solved": solved(practised), "held out": solved(run.encoded.holdout_rows),
            "answers": last["answers"], "hinted answers": last.get("hinted_answers", 0.0),
        }  # fmt: skip
        print(arm, seed, done[arm, seed])
        return done[arm, seed]

    return measure


def told(measured: list[dict[str, float]], what: str = "solved") -> str:
    return f"{mean(one[what] for one in measured):.2f} ({', '.join(f'{one[what]:.2f}' for one in measured)}; seeds {', '.join(map(str, SEEDS))})"


def verdict(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> str:
    """Whether ours is higher by more than two standard errors of the paired difference."""
    apart = [one["solved"] - other["solved"] for one, other in zip(ours, theirs, strict=True)]
    error = stdev(apart) / len(apart) ** 0.5
    return "holds" if mean(apart) > 2 * error else "opposite" if mean(apart) < -2 * error else "not seen at this size"


def test_hints_where_all_attempts_fail_reach_what_grpo_does_not(study: Any, effect_row: Any) -> None:
    guide, plain = ([study(arm, seed) for seed in SEEDS] for arm in ("Guide", "GRPO"))
    assert all(one["before"] == 0.0 for one in (*guide, *plain))
    effect_row(
        slug="guide-grpo", baseline="GRPO with the same filter, steps and k", verdict=verdict(guide, plain), ours=told(guide), theirs=told(plain),
        behaviour=f"Share of practised sums modulo 7 with base success 0 that are solved without hint after {STEPS} steps",
        paper="up to 4 % macro-average over GRPO at 7B and 32B",
        note=f"Held-out sums of the same kind, which a table learned by heart cannot answer: {told(guide, 'held out')} and "
        f"{told(plain, 'held out')}. GRPO stays at 0 until a right answer (probability 1e-5) is drawn by luck: in earlier runs of this "
        "study two of four were lucky and reached 0.32 and 0.55. Two settings in which Guide stayed at 0 (one seed each): answers of two "
        "tokens, where the certain end mark fills the percentile; and hinted attempts that fail with wrong digits instead of 'unknown', "
        "because then nothing lowers the answer that the model gives by itself.",
    )  # fmt: skip
    assert all(one["solved"] > 0.3 for one in guide)
    assert mean(one["solved"] for one in guide) > mean(one["solved"] for one in plain) + 0.2


def test_hints_for_every_problem_cost_more_answers_and_end_lower(study: Any, effect_row: Any) -> None:
    guide, always = ([study(arm, seed) for seed in SEEDS] for arm in ("Guide", "hints always"))
    spent = [mean(one["hinted answers"] for one in arm) for arm in (guide, always)]
    effect_row(
        slug="guide-grpo", baseline="hints for every problem (retry threshold 1)", verdict=verdict(guide, always),
        ours=f"{told(guide)}, {spent[0]:,.0f} hinted answers", theirs=f"{told(always)}, {spent[1]:,.0f} hinted answers",
        behaviour=f"Share of practised hard sums solved without hint after {STEPS} steps, and the extra answers written for hints",
        note="The number of extra answers is exact: k for each failed problem only, against k for every problem.",
    )  # fmt: skip
    rounds = guide[0]["answers"] - guide[0]["hinted answers"]
    assert all(one["hinted answers"] == rounds for one in always), "always: one hinted answer for each plain one"
    assert spent[0] < 0.8 * spent[1]
    assert all(one["solved"] > 0.0 for one in always)


def test_the_right_old_log_probabilities_matter(study: Any, effect_row: Any) -> None:
    guide, wrong = (
        [study(arm, seed) for seed in SEEDS] for arm in ("Guide", "old log-probabilities under the plain prompt")
    )
    effect_row(
        slug="guide-grpo", baseline="old log-probabilities under the plain prompt (every ratio one at first)", ours=told(guide), theirs=told(wrong),
        behaviour=f"Share of practised hard sums solved without hint after {STEPS} steps, with and without importance correction",
        verdict=verdict(guide, wrong),
        note="Where one token decides, ratio one is plain imitation of the hinted answer, which is the quickest way to learn a table of sums; "
        "the corrected ratio starts at 1e-5. Answers that only make sense with the hint, against which the correction protects, do not exist here.",
    )  # fmt: skip
    assert all(one["solved"] > 0.3 for one in wrong)
