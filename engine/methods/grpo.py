"""GRPO: several attempts at each problem; those better than their group become likelier, those worse become rarer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, Needs, Suggestion, TrainMethod, Written
from engine.core.recipe import Recipe
from engine.core.slots import Phase, Slot
from engine.parts.policy_gradient import PolicyGradient
from engine.parts.rollout_params import RolloutParams, rollout_advice, rollout_faults
from engine.parts.rollouts import Rollouts
from engine.train.parts import PartContext


class GRPO(TrainMethod):
    """Group-relative policy optimisation."""

    card = Card(
        slug="grpo",
        title="GRPO (learning from right and wrong)",
        pick_when="Pick this when you have problems with answers that can be checked, the model solves some of them by itself, and you want it to "
        "solve more.",
        summary="The model tries every problem several times. Attempts that end in the right answer become likelier and wrong ones rarer, each "
        "measured against the other attempts at the same problem. No worked solutions are needed.",
        paper="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        year=2024,
        arxiv="2402.03300",
        algorithm=(
            "For each problem x sample k answers from the model as it is; keep the log-probability of every token.",
            "Score each answer: 1 when its final answer is right, else 0. No code is run.",
            "Leave out groups in which all answers are right or all are wrong; try further problems while the round is not full.",
            "Advantage of an answer: (R - mean) / (standard deviation + 1e-6) within its group of k.",
            "Ratio of a token: r = exp(log p now - log p when it was written).",
            "Loss: the mean over all answer tokens of the step of max(-A r, -A clip(r, 1 - low, 1 + high)).",
            "With a pull towards the start, add beta (q/p - log(q/p) - 1) for each token, q the untouched model's probability.",
        ),
        avoid_when="The model never solves a problem in any attempt: then nothing is learned from it. Guide-GRPO shows a hint there; learning from "
        "worked solutions first also helps.",
        traps=(
            "Groups without a difference have advantage zero: they cost time and teach nothing, so they are left out.",
            "Averaging each answer by itself favours short wrong answers; here all tokens of a step count the same.",
            "The accuracy with the likeliest answer can stand still while the share of right attempts rises; the log shows both.",
            "The pull towards the start needs a second copy of the model in memory; it is off unless asked for.",
            "The recorded log-probabilities are those at temperature 1. With another temperature the ratio still starts at one, but the attempts are "
            "not quite those of the policy that is improved.",
        ),
        figures=(
            Figure(
                claim="Accuracy of a 7B mathematics model on GSM8K, before and after GRPO",
                paper="82.9 % and 88.2 % (unconfirmed)",
            ),
            Figure(
                claim="Accuracy of the same model on MATH, before and after GRPO",
                paper="46.8 % and 51.7 % (unconfirmed)",
            ),
        ),
        cost=Cost(time=5, memory=3, size=1),
        family="Reinforcement",
    )
    needs = Needs(tasks=("verifiable",), kinds=("decoder",))
    slots = (Slot.DATA_POLICY, Slot.OBJECTIVE)
    phase = Phase.COLLATE
    presets = {
        "tiny": {"k": 4, "max_new_tokens": 8, "mini_batches": 2, "passes": 1},
        "paper": {"k": 64, "max_new_tokens": 1024, "kl": 0.04, "lowest_accuracy": 0.0, "highest_accuracy": 1.0, "extra_batches": 0},
    }  # fmt: skip

    class Params(RolloutParams):
        """Hyperparameters of GRPO."""

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
        return [
            Rollouts(p.plan(), seed=ctx.recipe.settings.seed, slug=ctx.slug),
            PolicyGradient(clip_low=p.clip_low, clip_high=p.clip_high, kl=p.kl),
        ]
