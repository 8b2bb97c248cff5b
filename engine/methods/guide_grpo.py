"""Guide-GRPO: problems at which every attempt failed are tried again with a hint, and what works is credited to the problem without the hint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from engine.core.errors import Fault, bad_input
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, Needs, Suggestion, TrainMethod, Verdict, Written
from engine.core.params import dial
from engine.core.recipe import Recipe
from engine.core.slots import Phase, Slot
from engine.parts.policy_gradient import PolicyGradient, Squash
from engine.parts.rollout_params import RolloutParams, rollout_advice, rollout_faults
from engine.parts.rollouts import Group, RolloutPlan, Rollouts
from engine.parts.sampling import token_logprobs
from engine.tasks.base import Row
from engine.tasks.batching import IGNORED, measuring, moved
from engine.train.parts import PartContext

Leak = Literal["drop", "refuse", "allow"]


class GuidedRollouts(Rollouts):
    """Rollouts with a second, hinted try for groups that failed altogether.

    A hinted group is filed under the plain prompt (the hint is not in the training input), keeps the log-probabilities under the hinted one, and
    is marked as written for another prompt. `whole_step` sets the scale of the squashing from all hinted tokens of a step, with the weights that
    the step starts from, so that it does not depend on how the step is cut into micro-batches.
    """

    def __init__(
        self, plan: RolloutPlan, *, seed: int, slug: str, threshold: float, leak: Leak, squash: Squash, whole_step: bool
    ) -> None:
        super().__init__(plan, seed=seed, slug=slug)
        self.threshold, self.leak, self.squash, self.whole_step = threshold, leak, squash, whole_step
        self._counts.update({"hinted_answers": 0.0, "hinted_groups": 0.0})

    def begin(self, run: Any) -> None:
        rows = [run.encoded.rows[item.source] for item in run.encoded.train]
        hinted = [row for row in rows if run.task.hint(row)]
        leaking = [row for row in hinted if run.task.leaks(row)]
        if leaking and self.leak == "refuse":
            raise bad_input("data.columns.hint", f"{len(leaking):,} of {len(hinted):,} hints hold the answer.",
                            "Repeating such a hint would count as solving the problem.",
                            "Write hints that name a step of the way, or let the method drop these.", "hint_leaks")  # fmt: skip
        if not any(self.hint(run, row) for row in rows):
            raise bad_input("data.columns.hint", "No problem has a hint that can be used.",
                            f"{len(leaking):,} hints hold the answer, and the other {len(rows) - len(leaking):,} problems have none.",
                            "Write hints that name a step of the way, or choose GRPO, which needs none.", "no_hints")  # fmt: skip
        notes = []
        if leaking and self.leak == "drop":
            notes.append(f"{len(leaking):,} of {len(hinted):,} hints hold the answer and are never shown.")
        if len(hinted) < len(rows):
            missing = len(rows) - len(hinted)
            notes.append(f"{missing:,} of {len(rows):,} problems have no hint; they are tried without one only.")
        for note in notes:
            run.log.emit("log", {"level": "warning", "message": note})

    def hint(self, run: Any, row: Row) -> str:
        """The hint that may be shown for a row, or nothing."""
        hint: str = run.task.hint(row)
        return "" if hint and self.leak != "allow" and run.task.leaks(row) else hint

    def useful(self, run: Any, groups: list[Group]) -> list[Group]:
        failed = [group for group in groups if group.accuracy <= self.threshold]
        kept = super().useful(run, [group for group in groups if group.accuracy > self.threshold])
        retried = self.retry(run, failed)
        passed = [group for group in retried if self.plan.lowest <= group.accuracy <= self.plan.highest]
        self.tell("retried", len(retried), len(groups))
        self.tell("hinted_reward", sum(group.accuracy for group in retried), len(retried))
        self.tell("hinted_kept", len(passed), len(retried))
        self.count("hinted_groups", len(passed))
        return kept + passed

    def retry(self, run: Any, failed: list[Group]) -> list[Group]:
        """The same questions once more, asked with their hints; questions without a hint that fits are left out."""
        limit = int(run.facts.model.max_positions or 0)
        sources, asked, taught = [], [], []
        for group in failed:
            row = run.encoded.rows[group.source]
            hint = self.hint(run, row)
            prompt = run.task.prompt_ids(row, run.tokenizer, hint) if hint else []
            if prompt and (not limit or len(prompt) < limit):
                sources.append(group.source)
                asked.append(prompt)
                taught.append(group.prompt)
        if not sources:
            return []
        again = self.answer(run, sources, asked, taught)
        for group in again:
            group.hinted = True
        self.count("hinted_answers", len(again) * self.plan.k)
        return again

    def prepare(self, run: Any, micro: list[dict[str, Tensor]]) -> None:
        if self.squash.kind != "percentile" or not self.whole_step:
            return
        ratios = []
        with measuring(run.model), run.autocast():
            for batch in micro:
                hinted = ~batch["on_policy"]
                if not bool(hinted.any()):
                    continue
                names = ("input_ids", "attention_mask", "labels")
                now = token_logprobs(run.model, moved({name: batch[name][hinted] for name in names}, run.device)).cpu()
                counted = batch["labels"][hinted][:, 1:] != IGNORED
                ratios.append(torch.exp(now - batch["old_logprobs"][hinted][:, 1:])[counted])
        scale = self.squash.scale(torch.cat(ratios) if ratios else torch.zeros(0))
        for batch in micro:
            batch["squash_scale"] = scale.float().expand(len(batch["on_policy"])).clone()


class GuideGRPO(TrainMethod):
    """GRPO with hints only where every attempt failed."""

    card = Card(
        slug="guide-grpo",
        title="Guide-GRPO (hints where all attempts failed)",
        pick_when="Pick this when practice problems are so hard that the model never solves them: it is shown a hint for those only, and is still "
        "taught to answer without the hint.",
        summary="As in GRPO, the model tries every problem several times and learns from right and wrong. Problems at which every attempt failed are "
        "tried again with a hint below the question. What then works is credited to the question without the hint, so that the finished "
        "model needs none.",
        paper="Adaptive Guidance Accelerates Reinforcement Learning of Reasoning Models",
        year=2025,
        arxiv="2506.13923",
        algorithm=(
            "For each problem x sample k answers without the hint and score them 0 or 1.",
            "Keep groups with an accuracy between 0.001 and 0.999; drop groups that are solved; groups at or below the retry threshold are retried.",
            "For each of those sample k answers to x with its hint h. Keep the hinted group when it holds right and wrong answers, else drop the problem.",
            "File hinted answers under x alone: the hint is not in the training input, the answer tokens are unchanged, positions are counted anew.",
            "Old log-probabilities stay those of the prompt that the answer was written for: log p(o | x, h) for hinted groups.",
            "Ratio of a token: r = exp(log p now (o | x) - old). Advantage: (R - mean) / (standard deviation + 1e-6) within the group of k.",
            "Loss: the mean over all answer tokens; plain rows as in GRPO with clipping, hinted rows -A r / (r + g) without clipping, "
            "g = the 90th percentile of r over the hinted tokens, at least 1e-4, no gradient through it.",
            "Further problems are tried until the round is full; what is left over waits; whole groups are shuffled.",
            "The finished model is used without hints.",
        ),
        avoid_when="There are no hints, or the model solves most problems now and then: then plain GRPO does the same for less.",
        traps=(
            "Old log-probabilities under the plain prompt make every ratio one at first: the method would silently train on hinted text as if "
            "the model had said it by itself.",
            "Ratios of hinted tokens are often tiny, because the model would not have said this without the hint; with the percentile they still count, "
            "but at r = g a row counts half, so hinted groups weigh less than plain ones.",
            "A percentile over a micro-batch depends on how a step is cut; here it is taken over the whole step unless the paper's way is asked for.",
            "The percentile counts easy tokens too, such as the end mark, whose ratio is near one: with very short answers it lets hard tokens move slowly.",
            "A hint that holds the answer makes the second try succeed without thinking: such hints are dropped, or refused if you wish.",
            "When no group teaches anything the step does nothing and says so; solved problems are never sent to the second try.",
            "A larger retry threshold hints too often; hints for every problem end lower without hints.",
        ),
        figures=(
            Figure(
                claim="Macro-average over mathematics benchmarks against GRPO without hints, at 7B and 32B parameters",
                paper="up to 4 % better (abstract)",
                ours="not measured at this size",
            ),
            Figure(
                claim="Sums with base success 0 that a small Llama solves without hint after 150 steps, against GRPO and against hints for all",
                paper="",
                ours="0.63, against 0.00 and 0.47 (mean of four seeds)",
            ),
            Figure(
                claim="Hinted answers written for that, against hints for all",
                paper="",
                ours="5,918 against 15,200",
            ),
            Figure(
                claim="The same with old log-probabilities under the plain prompt, which the paper warns of",
                paper="lower (unconfirmed)",
                ours="0.75: no harm seen where one token is the answer",
            ),
        ),
        cost=Cost(time=5, memory=3, size=1),
        family="Reinforcement",
    )
    needs = Needs(tasks=("verifiable",), kinds=("decoder",))
    slots = (Slot.DATA_POLICY, Slot.OBJECTIVE)
    phase = Phase.COLLATE
    presets = {
        "tiny": {"k": 4, "max_new_tokens": 8, "mini_batches": 2},
        "paper": {"k": 8, "max_new_tokens": 3072, "mini_batches": 2, "extra_batches": 10, "scope": "micro-batch"},
    }

    class Params(RolloutParams):
        """Hyperparameters of Guide-GRPO."""

        retry_threshold: float = dial(
            0.001,
            label="Hint when at most this share was right",
            unit="share",
            low=0.0,
            high=1.0,
            help="At 0.001 a hint is shown only where every attempt failed. Up to 0.25 makes sense; 1 shows every hint.",
        )
        squash: Literal["percentile", "constant", "power", "off"] = dial(
            "percentile",
            label="How hinted attempts are weighed",
            help="Tames the ratio of tokens that the model would not have written without the hint.",
        )
        squash_quantile: float = dial(
            0.9,
            label="Percentile",
            unit="share",
            low=0.05,
            high=1.0,
            help="The hinted token at this place of the ranking, from the least likely up, counts half.",
        )
        squash_constant: float = dial(
            0.1,
            label="Constant",
            unit="1",
            low=1e-4,
            high=100.0,
            help="With the constant way, a ratio of this size counts half.",
        )
        squash_power: float = dial(
            0.5,
            label="Power",
            unit="1",
            low=0.05,
            high=1.0,
            help="With the power way, the ratio is raised to this power; 0.5 is the square root.",
        )
        scope: Literal["step", "micro-batch"] = dial(
            "step",
            label="Tokens behind the percentile",
            paper="micro-batch",
            help="Over the whole step the result does not depend on how it is cut; over each micro-batch is how the authors' program does it.",
        )
        leak: Leak = dial(
            "drop",
            label="Hints that hold the answer",
            help="Drop them, refuse the data, or allow them (for hints in which the answer stands by chance).",
        )

    @classmethod
    def supports(cls, facts: Facts) -> Verdict:
        verdict = super().supports(facts)
        if verdict.ok and "hint" not in facts.data.mapping:
            return Verdict(
                False,
                "Guide-GRPO needs a hint for the problems, and no column plays that role.",
                "Say which column holds the hints, or choose GRPO, which needs none.",
            )
        return verdict

    @classmethod
    def check(cls, params: Any, facts: Facts) -> list[Fault]:
        return rollout_faults(params, facts)

    @classmethod
    def written(cls, params: Any) -> Written:
        found: Written = params.written()
        return found

    @classmethod
    def suggest(cls, recipe: Recipe, params: Any, facts: Facts) -> list[Suggestion]:
        return rollout_advice(recipe, facts, cls.card.slug)

    def parts(self, ctx: PartContext) -> Sequence[Any]:
        p = self.params
        squash = Squash(kind=p.squash, quantile=p.squash_quantile, constant=p.squash_constant, exponent=p.squash_power)
        rollouts = GuidedRollouts(
            p.plan(), seed=ctx.recipe.settings.seed, slug=ctx.slug, threshold=p.retry_threshold, leak=p.leak, squash=squash,
            whole_step=p.scope == "step",
        )  # fmt: skip
        return [rollouts, PolicyGradient(clip_low=p.clip_low, clip_high=p.clip_high, kl=p.kl, squash=squash)]
