"""Rollouts: the model answers each question several times, the answers are scored, and groups that teach something become micro-batches.

A group is one question with its k answers. It teaches something when some of its answers are right and some are wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor

from engine.parts.policy_gradient import group_advantages
from engine.parts.sampling import completion_batch, sample, token_logprobs
from engine.tasks.base import Example
from engine.tasks.batching import measuring, moved
from engine.train.parts import DataPolicy, seeded


@dataclass(kw_only=True)
class Group:
    """One question and its k answers. `prompt` is what the model is trained on, which need not be what it was asked with."""

    source: int  # row of the data
    prompt: list[int]
    answers: list[list[int]]
    logprobs: list[list[float]]  # of every answer token, under the prompt that it was asked with
    rewards: list[float]
    hinted: bool = False

    @property
    def accuracy(self) -> float:
        return sum(self.rewards) / len(self.rewards)


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """How answers are gathered."""

    k: int
    max_new_tokens: int
    temperature: float = 1.0
    lowest: float = 0.001  # groups with an accuracy outside of [lowest, highest] are left out
    highest: float = 0.999
    batches: int = 1  # mini-batches of one round of answers
    passes: int = 1  # times that a round is learned from
    extra: int = 0  # further batches of questions that are tried while a round is not full
    at_a_time: int = 64  # answers that are written at once
    rows: int = 0  # sequences of a micro-batch; 0: as many as the recipe's batch size
    kl: bool = False  # whether log-probabilities under the untouched model are needed


class Rollouts(DataPolicy):
    """Makes the micro-batches of a step from the model's own answers.

    A round asks the questions of the optimizer batch, then others from its own shuffled stream, until `batches` mini-batches are full or
    `extra` further batches were tried; what is left over waits for the next round. A round is learned from `passes` times, its groups shuffled each
    time; the questions of the steps between two rounds are passed over. Log-probabilities are those that the sampler recorded: the ratio is
    one where the weights have not moved.
    """

    def __init__(self, plan: RolloutPlan, *, seed: int, slug: str) -> None:
        self.plan, self.seed, self.slug = plan, seed, slug
        self.generator = seeded(seed, slug, "answers")
        self.shuffler = seeded(seed, slug, "shuffle")
        self._round: list[Group] = []
        self._stock: list[list[int]] = []  # mini-batches still to be learned from, as places in the round
        self._surplus: list[Group] = []
        self._stream = [0, 0]  # pass over the questions, place in it
        self._counts: dict[str, float] = {"answers": 0.0, "empty_rounds": 0.0}
        self._told: dict[str, float] = {}
        self._reference: Any = None

    # ── one step ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def gather(self, run: Any, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        if not self._stock:
            with measuring(run.model), run.autocast():
                self._collect(run, examples)
        chosen = [self._round[place] for place in self._stock.pop(0)]
        micro = self._micro_batches(run, chosen, len(examples))
        self.prepare(run, micro)
        return micro

    def prepare(self, run: Any, micro: list[dict[str, Tensor]]) -> None:
        """Add what an objective needs to know about the whole step. Default: nothing."""

    def _collect(self, run: Any, examples: Sequence[Example]) -> None:
        plan, number = self.plan, len(examples)
        wanted, found = number * plan.batches, self._surplus
        batch: Sequence[Example] = examples
        self._told = {}
        for _ in range(plan.batches + plan.extra):
            groups = self.ask(run, batch)
            useful = self.useful(run, groups)
            self.tell("kept", len(useful), len(groups))
            found = found + useful
            if len(found) >= wanted:
                break
            batch = self._more(run, number)
        self._round, self._surplus = found[:wanted], found[wanted:]
        for _ in range(plan.passes):
            # Whole groups are shuffled, so that those that came last are not always learned last.
            order = torch.randperm(len(self._round), generator=self.shuffler).tolist()
            self._stock += [order[at : at + number] for at in range(0, len(order), number)]
        if not self._round:
            self.count("empty_rounds", 1)
            if self._counts["empty_rounds"] == 1:
                said = "No problem taught anything: at each one all attempts were right or all were wrong. Such steps change nothing."
                run.log.emit("log", {"level": "warning", "message": said}, step=run.clock.step)
        self._stock = self._stock or [[]]

    def _more(self, run: Any, number: int) -> list[Example]:
        """The next questions of our own stream: every question once in each pass."""
        train: Sequence[Example] = run.encoded.train
        found: list[Example] = []
        while len(found) < number:
            order = torch.randperm(len(train), generator=seeded(self.seed, self.slug, "stream", str(self._stream[0])))
            taken = order[self._stream[1] : self._stream[1] + number - len(found)].tolist()
            found += [train[index] for index in taken]
            self._stream[1] += len(taken)
            if self._stream[1] >= len(train):
                self._stream = [self._stream[0] + 1, 0]
        return found

    # ── asking ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, run: Any, examples: Sequence[Example]) -> list[Group]:
        """One group for each question, asked as it stands."""
        prompts = [run.task.prompt_ids(run.encoded.rows[item.source], run.tokenizer) for item in examples]
        groups = self.answer(run, [item.source for item in examples], prompts, prompts)
        self.tell("reward", sum(group.accuracy for group in groups), len(groups))
        self.tell("solved", sum(group.accuracy > 0 for group in groups), len(groups))
        lengths = [len(answer) for group in groups for answer in group.answers]
        self.tell("answer_tokens", sum(lengths), len(lengths))
        return groups

    def useful(self, run: Any, groups: list[Group]) -> list[Group]:
        """The groups to learn from."""
        return [group for group in groups if self.plan.lowest <= group.accuracy <= self.plan.highest]

    def answer(
        self, run: Any, sources: Sequence[int], asked: Sequence[list[int]], taught: Sequence[list[int]]
    ) -> list[Group]:
        """Sample k answers to each prompt in `asked`, score them, and file them under the prompt in `taught`."""
        plan, task = self.plan, run.task
        ends, pad = task.ends(run.model, run.tokenizer), run.tokenizer.pad_token_id
        limit = int(run.facts.model.max_positions or 0)
        prompts = [prompt for prompt in asked for _ in range(plan.k)]
        said = []
        for start in range(0, len(prompts), plan.at_a_time):
            part = prompts[start : start + plan.at_a_time]
            room = min(plan.max_new_tokens, limit - max(map(len, part))) if limit else plan.max_new_tokens
            said += sample(run.model, part, max_new_tokens=max(1, room), temperature=plan.temperature, ends=ends, pad=pad,
                           generator=self.generator)  # fmt: skip
        self._counts["answers"] += len(said)
        groups = []
        for place, source in enumerate(sources):
            own = said[place * plan.k : (place + 1) * plan.k]
            row = run.encoded.rows[source]
            rewards = [task.reward(row, task.text_of(one.ids, run.tokenizer)) for one in own]
            groups.append(Group(source=source, prompt=list(taught[place]), answers=[one.ids for one in own],
                                logprobs=[one.logprobs for one in own], rewards=rewards))  # fmt: skip
        return groups

    # ── tensors ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _micro_batches(self, run: Any, groups: list[Group], num_questions: int) -> list[dict[str, Tensor]]:
        pad, size = run.tokenizer.pad_token_id, self.plan.rows or run.settings.batch_size or 1
        rows = [row for group in groups for row in rows_of(group)]
        pieces = [rows[at : at + size] for at in range(0, len(rows), size)]
        if not pieces:
            return [nothing(run.encoded.train[0], pad, num_questions)]
        micro = [rows_as_batch(piece, pad) for piece in pieces]
        for number, batch in enumerate(micro):  # questions are shared out so that they add up to those of the step
            part = ceil((number + 1) * num_questions / len(micro)) - ceil(number * num_questions / len(micro))
            batch["num_samples"] = torch.tensor(part)
        if self.plan.kl:
            self._add_reference(run, micro)
        return micro

    def _add_reference(self, run: Any, micro: list[dict[str, Tensor]]) -> None:
        """Log-probabilities under the untouched model, which is loaded again from its folder: it is never saved with the run."""
        if self._reference is None:
            facts = run.facts
            with torch.random.fork_rng(devices=[]):
                model = run.task.load_model(facts.model, facts.data, dtype=torch.float32, seed=run.settings.seed)
            self._reference = model.to(run.device).requires_grad_(False)
        with measuring(self._reference), run.autocast():
            for batch in micro:
                found = token_logprobs(self._reference, moved(batch, run.device)).cpu()
                batch["ref_logprobs"] = torch.cat([found.new_zeros(len(found), 1), found], 1)

    # ── telling and remembering ───────────────────────────────────────────────────────────────────────────────────────

    def tell(self, name: str, total: float, count: float) -> None:
        """Add to a mean of this round, for the log."""
        self._told[f"{name}/sum"] = self._told.get(f"{name}/sum", 0.0) + float(total)
        self._told[f"{name}/count"] = self._told.get(f"{name}/count", 0.0) + float(count)

    def count(self, name: str, number: float) -> None:
        """Add to a number that grows over the whole run, for the log."""
        self._counts[name] = self._counts.get(name, 0.0) + float(number)

    def numbers(self) -> dict[str, float]:
        names = [name.removesuffix("/sum") for name in self._told if name.endswith("/sum")]
        means = {name: self._told[f"{name}/sum"] / max(1.0, self._told[f"{name}/count"]) for name in names}
        return {**means, **self._counts}

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(), "shuffler": self.shuffler.get_state(), "stock": self._stock, "stream": self._stream,
            "counts": self._counts, "told": self._told, **packed(self._round, "round"), **packed(self._surplus, "surplus"),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.shuffler.set_state(state["shuffler"])
        self._stock, self._stream = [list(batch) for batch in state["stock"]], list(state["stream"])
        self._counts, self._told = dict(state["counts"]), dict(state["told"])
        self._round, self._surplus = unpacked(state, "round"), unpacked(state, "surplus")


@dataclass(slots=True)
class Answer:
    """One row of a micro-batch."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    advantage: float
    on_policy: bool = field(default=True)


def rows_of(group: Group) -> list[Answer]:
    """The answers of a group with their advantages."""
    advantages = group_advantages(torch.tensor([group.rewards], dtype=torch.float64))[0].tolist()
    return [
        Answer(group.prompt, tokens, logprobs, advantage, not group.hinted)
        for tokens, logprobs, advantage in zip(group.answers, group.logprobs, advantages, strict=True)
    ]


def rows_as_batch(rows: Sequence[Answer], pad: int) -> dict[str, Tensor]:
    """Tensors of a micro-batch: prompt and answer one behind the other, and what the objective knows about each."""
    batch = completion_batch([(row.prompt, row.tokens) for row in rows], pad)
    old = torch.zeros(batch["input_ids"].shape)  # [B, T]
    for place, row in enumerate(rows):
        start = len(row.prompt)
        old[place, start : start + len(row.tokens)] = torch.tensor(row.logprobs)
    return {
        **batch,
        "old_logprobs": old,
        "advantages": torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        "on_policy": torch.tensor([row.on_policy for row in rows], dtype=torch.bool),
    }


def nothing(example: Example, pad: int, num_questions: int) -> dict[str, Tensor]:
    """A micro-batch of weight zero, for a step in which no group teaches anything: its loss and its gradient are exactly zero."""
    batch = completion_batch([(example.input_ids, [])], pad)
    return {
        **batch,
        "num_samples": torch.tensor(num_questions),
        "old_logprobs": torch.zeros(batch["input_ids"].shape),
        "ref_logprobs": torch.zeros(batch["input_ids"].shape),
        "advantages": torch.zeros(1),
        "on_policy": torch.ones(1, dtype=torch.bool),
    }


def packed(groups: Iterable[Group], name: str) -> dict[str, Any]:
    """Groups as a few tensors and JSON, for a checkpoint."""
    groups = list(groups)
    ids = [token for group in groups for answer in group.answers for token in answer]
    logprobs = [value for group in groups for answer in group.logprobs for value in answer]
    described = [
        [group.source, group.prompt, [len(answer) for answer in group.answers], group.rewards, group.hinted]
        for group in groups
    ]
    return {
        f"{name}_ids": torch.tensor(ids, dtype=torch.int64),
        f"{name}_logprobs": torch.tensor(logprobs, dtype=torch.float64),
        f"{name}_groups": described,
    }


def unpacked(state: Mapping[str, Any], name: str) -> list[Group]:
    """The inverse of `packed`."""
    ids, logprobs = state[f"{name}_ids"].tolist(), state[f"{name}_logprobs"].tolist()
    groups, at = [], 0
    for source, prompt, lengths, rewards, hinted in state[f"{name}_groups"]:
        answers, values = [], []
        for length in lengths:
            answers.append(ids[at : at + length])
            values.append(logprobs[at : at + length])
            at += length
        groups.append(Group(source=source, prompt=list(prompt), answers=answers, logprobs=values, rewards=list(rewards), hinted=bool(hinted)))  # fmt: skip
    return groups
