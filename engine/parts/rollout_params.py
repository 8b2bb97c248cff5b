"""The hyperparameters that methods of reinforcement with checkable answers share, and what can be wrong with them."""

from __future__ import annotations

from typing import Any

from engine.core.errors import Fault
from engine.core.facts import Facts
from engine.core.method import Suggestion, Written
from engine.core.params import HyperParams, dial
from engine.core.recipe import Recipe
from engine.parts.rollouts import RolloutPlan

USUAL_TOKENS = 256


class RolloutParams(HyperParams):
    """Attempts, their length, clipping, and how rounds of answers are used."""

    k: int = dial(
        8,
        label="Attempts per problem",
        unit="attempts",
        low=2,
        high=128,
        tier="basic",
        help="How often the model tries each problem. More attempts find rare successes and take more time.",
    )
    max_new_tokens: int | None = dial(
        None,
        label="Longest answer",
        unit="tokens",
        low=1,
        high=32768,
        tier="basic",
        paper=3072,
        suggested="256, or half of what the model can read.",
        help="An attempt is cut off at this many tokens and then checked as it stands.",
    )
    temperature: float = dial(
        1.0,
        label="Variety of the attempts",
        unit="1",
        low=0.05,
        high=2.0,
        help="At 1 the model's own probabilities decide; below, attempts resemble each other; above, they become wilder.",
    )
    clip_low: float = dial(
        0.2,
        label="Least ratio, below 1 by",
        unit="share",
        low=0.01,
        high=0.9,
        help="A token that has become less likely than 1 minus this, relative to when it was written, is pushed down no further.",
    )
    clip_high: float = dial(
        0.2,
        label="Largest ratio, above 1 by",
        unit="share",
        low=0.01,
        high=5.0,
        help="A token that has become more likely than 1 plus this, relative to when it was written, is pushed up no further. "
        "A larger value (0.28 is used elsewhere) leaves rare tokens more room to grow.",
    )
    kl: float = dial(
        0.0,
        label="Pull towards the start",
        unit="1",
        low=0.0,
        high=10.0,
        help="Charges for every step away from the untouched model. Above 0 a second, frozen copy of the model is kept in memory.",
    )
    lowest_accuracy: float = dial(
        0.001,
        label="Least share of right attempts",
        unit="share",
        low=0.0,
        high=1.0,
        help="Problems with fewer right attempts teach nothing by themselves and are left out.",
    )
    highest_accuracy: float = dial(
        0.999,
        label="Largest share of right attempts",
        unit="share",
        low=0.0,
        high=1.0,
        help="Problems with more right attempts are solved already and are left out.",
    )
    extra_batches: int = dial(
        1,
        label="Further problems when too few teach",
        unit="batches",
        low=0,
        high=100,
        help="How many further batches of problems are tried while a round is not full, because problems were left out.",
    )
    mini_batches: int = dial(
        1,
        label="Corrections per round",
        unit="batches",
        low=1,
        high=64,
        help="How many corrections share one round of attempts. With 1, each correction uses attempts of the model as it is.",
    )
    passes: int = dial(
        1,
        label="Uses of a round",
        unit="times",
        low=1,
        high=16,
        help="How many times a round of attempts is learned from. More saves writing and learns from older attempts.",
    )
    answers_at_a_time: int = dial(
        64,
        label="Attempts written together",
        unit="attempts",
        low=1,
        high=4096,
        help="How many attempts are written at once; fewer need less memory and give other draws.",
    )
    rows_at_a_time: int | None = dial(
        None,
        label="Attempts learned from together",
        unit="attempts",
        low=1,
        high=4096,
        suggested="As many as the examples at a time.",
        help="How many attempts are read at once while learning; it changes memory and speed, not what is learned.",
    )

    def written(self) -> Written:
        """What these attempts take, for the estimate."""
        plan = self.plan()
        return Written(
            attempts=plan.k * plan.batches,
            at_once=plan.at_a_time,
            tokens=plan.max_new_tokens,
            rows=plan.rows,
            reference=plan.kl,
        )

    def plan(self) -> RolloutPlan:
        """The plan that the rollouts follow."""
        return RolloutPlan(
            k=self.k,
            max_new_tokens=self.max_new_tokens or USUAL_TOKENS,
            temperature=self.temperature,
            lowest=self.lowest_accuracy,
            highest=self.highest_accuracy,
            batches=self.mini_batches,
            passes=self.passes,
            extra=self.extra_batches,
            at_a_time=self.answers_at_a_time,
            rows=self.rows_at_a_time or 0,
            kl=self.kl > 0,
        )


def rollout_faults(params: Any, facts: Facts) -> list[Fault]:
    """What cannot work, from numbers alone."""
    faults = []
    limit = facts.model.max_positions
    if limit and (params.max_new_tokens or 0) >= limit:
        faults.append(
            Fault(
                where="max_new_tokens",
                what=f"An answer may have {params.max_new_tokens:,} tokens.",
                why=f"This model reads and writes at most {limit:,} together, and the problem needs room too.",
                way_out=f"Choose at most {max(1, limit // 2):,}.",
                code="too_large",
            )
        )
    if params.lowest_accuracy > params.highest_accuracy:
        faults.append(
            Fault(
                where="lowest_accuracy",
                what=f"The least share of right attempts, {params.lowest_accuracy:g}, is above the largest, {params.highest_accuracy:g}.",
                why="Every problem would be left out.",
                way_out="Choose a least share below the largest, for example 0.001 and 0.999.",
                code="empty_range",
            )
        )
    elif not any(params.lowest_accuracy <= right / params.k <= params.highest_accuracy for right in range(1, params.k)):
        faults.append(
            Fault(
                where="lowest_accuracy",
                what=f"No number of right attempts out of {params.k} lies between {params.lowest_accuracy:g} and {params.highest_accuracy:g}.",
                why="Only problems with right and wrong attempts teach anything, and all of them would be left out.",
                way_out="Choose a wider range, for example from 0.001 to 0.999, or more attempts.",
                code="empty_range",
            )
        )
    return faults


def rollout_advice(recipe: Recipe, facts: Facts, slug: str) -> list[Suggestion]:
    """A careful rate, because reinforcement moves a model with noisy signals, and a length that fits the model."""
    size, limit = facts.model.num_parameters, facts.model.max_positions
    longest = min(USUAL_TOKENS, max(1, limit // 2)) if limit else USUAL_TOKENS
    place = next((index for index, ref in enumerate(recipe.methods) if ref.slug == slug), 0)
    rate = 1e-6 if size > 5e8 else 1e-5 if size > 5e7 else 1e-4
    return [
        Suggestion(
            where=f"methods[{place}].params.max_new_tokens",
            value=longest,
            reason=f"This model reads and writes at most {limit:,} tokens together; {longest:,} of them are for the answer."
            if limit and longest < USUAL_TOKENS
            else f"{longest:,} tokens are room for a worked answer of a few sentences.",
        ),
        Suggestion(
            where="settings.learning_rate",
            value=rate,
            reason=f"Right and wrong is a coarse signal: a model of {size:,} parameters is moved carefully, by {rate:g}.",
        ),
    ]
