"""Iterative reinforced fine-tuning for tool calls: learn from easy to hard, then search, prefer, and repeat."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from typing import Any, Literal

from engine.core.errors import bad_input
from engine.core.facts import Facts
from engine.core.method import Card, Cost, Figure, FlowMethod, Needs
from engine.core.params import HyperParams, dial
from engine.core.work import Outcome, Report, Step, StepResult
from engine.parts.tool_calls import calls_in
from engine.parts.tool_talk import last_answer

MIN_BUCKET = 24  # examples that a stage of the warm-up needs at least


class IRFT(FlowMethod):
    """iTool: warm-up, then iterations of difficulty scan, tree search and preference optimisation."""

    card = Card(
        slug="irft-tool-use",
        title="Better tool calls, step by step (iTool)",
        pick_when="Pick this when a model calls tools fairly well already, keeps getting small parts wrong, and more of the same examples no longer help.",
        summary="First it learns from your examples, the easy ones before the hard ones. Then it tries the hardest ones in several ways, sees which pieces "
        "led to right calls, and learns to prefer those; as often as you like. Before and after, calls that were never learned from are counted.",
        paper="iTool: Reinforced Fine-Tuning with Dynamic Deficiency Calibration for Advanced Tool Use",
        year=2025,
        arxiv="2501.09766",
        algorithm=(
            "Keep a share of the examples back for counting.",
            "Warm-up: train with LoRA on single calls, then on several calls, then on examples without a call.",
            "Each round: search better and worse fragments of calls for the 30 % hardest examples (see “Search for better tool calls”).",
            "Train a LoRA of rank 8 on the pairs with SimPO (or DPO), and fold it in; go on with the new model.",
            "Count exact calls, wrong names, missing parameters and wrong values after each round, for the hard and the easy examples apart.",
        ),
        avoid_when="There are no right calls to compare with, or the model cannot write a call that can be read.",
        traps=(
            "A model that grades itself gives noise while it is weak; here calls are read and compared.",
            "Too many rounds on the same examples sharpen the errors that are left; watch the easy examples.",
            "With few examples a round finds few pairs: fewer than 12 end the flow early, and it says so.",
        ),
        figures=(
            Figure(claim="Over the same-size base model on tool benchmarks, 8B", paper="+13.11 % (abstract of the final version)"),
            Figure(claim="Complex scenarios, over the baseline", paper="+6.5 % (abstract)"),
        ),
        cost=Cost(time=5, memory=3, size=5),
        family="Tool use",
    )  # fmt: skip
    needs = Needs(tasks=("instruct",), kinds=("decoder",))
    presets = {
        "tiny": {"warm_up": False, "iterations": 1, "select": 0.2, "actions": 2, "simulations": 2, "max_tokens": 10, "gap": 0.0, "floor": -1.0, "rate": 1e-3},
        "paper": {"iterations": 1, "beta": 2.5, "gamma": 0.5, "rate": 1e-6},
    }  # fmt: skip

    class Params(HyperParams):
        """Hyperparameters of the flow."""

        iterations: int = dial(
            2,
            label="Rounds",
            unit="rounds",
            low=1,
            high=10,
            tier="basic",
            paper=1,
            help="How often it searches and learns from what it found.",
        )
        warm_up: bool = dial(
            True,
            label="Learn from the examples first",
            tier="basic",
            help="Easy examples first; switch it off for a model that knows them.",
        )
        select: float = dial(
            0.3,
            label="Hardest share",
            unit="share",
            low=0.01,
            high=1.0,
            paper=0.3,
            help="The share of the examples that is searched in each round.",
        )
        actions: int = dial(
            3,
            label="Tries",
            unit="completions",
            low=2,
            high=16,
            paper=3,
            help="How many completions are sampled at a place.",
        )
        simulations: int = dial(
            5, label="Simulations", unit="1", low=1, high=200, paper=5, help="How often each tree is descended."
        )
        depth: int = dial(
            3,
            label="Depth",
            unit="fragments",
            low=1,
            high=12,
            paper=3,
            help="How many fragments lie on the way to an end.",
        )
        max_tokens: int = dial(
            50,
            label="Longest try",
            unit="tokens",
            low=4,
            high=512,
            paper=50,
            help="Completions are cut at this length.",
        )
        temperature: float = dial(
            1.5,
            label="Daring",
            unit="1",
            low=0.1,
            high=4.0,
            paper=1.5,
            help="How far the tries stray from the likeliest words.",
        )
        exploration: float = dial(
            1.0,
            label="Curiosity",
            unit="1",
            low=0.0,
            high=10.0,
            paper=1.0,
            help="How much little-tried pieces are favoured.",
        )
        gap: float = dial(
            0.1,
            label="Least difference",
            unit="1",
            low=0.0,
            high=2.0,
            paper=0.1,
            help="A pair is kept when its values differ by at least this.",
        )
        floor: float = dial(
            -0.3,
            label="Least value",
            unit="1",
            low=-1.0,
            high=1.0,
            paper=-0.3,
            help="The better piece must be worth at least this.",
        )
        pairs: Literal["search", "random"] = dial(
            "search",
            label="Which is better",
            help="'random' tosses a coin instead; it is the control of the experiment.",
        )
        objective: Literal["simpo", "dpo"] = dial(
            "simpo",
            label="How it prefers",
            paper="simpo",
            help="SimPO needs no reference; DPO stays nearer to the model as it was.",
        )
        beta: float = dial(
            2.5,
            label="Sharpness",
            unit="1",
            low=0.01,
            high=100.0,
            paper=2.5,
            help="How strongly a difference counts (DPO: choose about 0.1).",
        )
        gamma: float = dial(
            0.5,
            label="Margin",
            unit="1",
            low=0.0,
            high=20.0,
            paper=0.5,
            help="By how much the better piece must be ahead (SimPO only).",
        )
        r: int = dial(8, label="Rank", unit="1", low=1, high=256, paper=8, help="The rank of the LoRA of every step.")
        rate: float | None = dial(
            None,
            label="Rate for preferences",
            unit="1",
            low=0.0,
            high=1.0,
            paper=1e-6,
            suggested="It depends on the size of the model.",
            help="The learning rate of the preference steps.",
        )
        epochs: float = dial(
            2.0,
            label="Passes over the pairs",
            unit="epochs",
            low=0.1,
            high=100,
            paper=2,
            help="How often the pairs of a round are read.",
        )
        test: float = dial(
            0.2,
            label="Kept back for counting",
            unit="share",
            low=0.05,
            high=0.5,
            help="This share of the examples is only counted, never learned from.",
        )

    @classmethod
    def num_runs(cls, params: Any, facts: Facts) -> float:
        return float(params.warm_up) + 2.0 * params.iterations

    def plan(self, ctx: Any) -> Generator[Step | list[Step], Any, Outcome]:
        p = self.params
        learn, test = self._split(ctx)
        counted = ctx.write_rows("test", test)
        model, taken = ctx.recipe.model, None
        rounds: list[tuple[str, StepResult]] = []
        before = yield self._count(ctx, "count-0", "Count the calls of the untouched model", model, counted)
        rounds.append(("untouched", before))
        if p.warm_up:
            for place, (title, bucket) in enumerate(buckets(learn), 1):
                data = ctx.write_rows(f"warm-up-{place}", bucket)
                taken = yield Step(
                    name=f"warm-up-{place}", title=f"Learn from {title}", recipe=ctx.train(self._lora(), model=model, data=data, name=title),
                )  # fmt: skip
                model = taken.model
            warm = yield self._count(ctx, "count-warm", "Count the calls after the warm-up", model, counted)
            rounds.append(("after the warm-up", warm))
        data = ctx.write_rows("learn", learn)
        for number in range(1, p.iterations + 1):
            found = yield Step(
                name=f"search-{number}", title=f"Round {number}: search better and worse pieces", may_fail=True,
                recipe=ctx.generate("tool-search", self._search(), model=model, data=data, max_length=None),
            )  # fmt: skip
            if not found.ok or found.description["report"]["numbers"]["rows"] < 12:
                ctx.note(
                    f"Round {number} found too few pairs to learn from; the flow ended there. {'' if found.ok else found.message}".strip(),
                    "warning",
                )
                break
            learned = yield Step(
                name=f"prefer-{number}", title=f"Round {number}: learn to prefer the better pieces",
                recipe=ctx.train(self._preference(), model=model, data=found.data, task="preference", learning_rate=p.rate, epochs=p.epochs, batch_size=8,
                                 max_steps=None, max_length=None, name=f"Round {number}"),
            )  # fmt: skip
            taken, model = learned, learned.model
            after = yield self._count(ctx, f"count-{number}", f"Count the calls after round {number}", model, counted)
            rounds.append((f"after round {number}", after))
        report = self._report(rounds)
        return Outcome(message=report.sentence, take=taken, report=report)

    def _split(self, ctx: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        rows = [{"messages": row["messages"]} for row in ctx.inputs.rows if last_answer(row["messages"])[1]]
        order = list(range(len(rows)))
        random.Random(f"{ctx.seed}/test").shuffle(order)
        count = max(2, round(self.params.test * len(rows)))
        if len(rows) - count < 12:
            raise bad_input("data", f"Only {len(rows)} conversations end with an answer.", "Some must be kept back and some must be left to learn from.",
                            "Bring at least 20 of them.", "too_few_rows")  # fmt: skip
        held = set(order[:count])
        return [row for n, row in enumerate(rows) if n not in held], [row for n, row in enumerate(rows) if n in held]

    def _count(self, ctx: Any, name: str, title: str, model: Any, data: Any) -> Step:
        params = {"rows": "all", "max_tokens": max(16, 2 * self.params.max_tokens)}
        return Step(name=name, title=title, recipe=ctx.probe("tool-accuracy", params, model=model, data=data))

    def _lora(self) -> list[tuple[str, dict[str, Any]]]:
        return [("lora", {"r": self.params.r, "alpha": 2.0 * self.params.r}), ("cosine", {"warmup": 0.1}), ("clip", {})]

    def _preference(self) -> list[tuple[str, dict[str, Any]]]:
        p = self.params
        how = {"beta": p.beta, "gamma": p.gamma} if p.objective == "simpo" else {"beta": p.beta}
        return [*self._lora(), (p.objective, how)]

    def _search(self) -> dict[str, Any]:
        p = self.params
        names = (
            "select",
            "actions",
            "simulations",
            "depth",
            "max_tokens",
            "temperature",
            "exploration",
            "gap",
            "floor",
            "pairs",
        )
        return {name: getattr(p, name) for name in names}

    def _report(self, rounds: Sequence[tuple[str, StepResult]]) -> Report:
        """Hard examples are the third that the first counted model found hardest; the division stays the same for all rounds."""
        tables = {title: {row["row"]: row for row in result.description["report"]["table"]} for title, result in rounds}
        start = tables["after the warm-up" if "after the warm-up" in tables else "untouched"]
        ranked = sorted(start, key=lambda row: (-start[row]["loss"], row))
        hard = set(ranked[: max(1, len(ranked) // 3)])
        rows = []
        for title, found in tables.items():
            parts = {
                "all": list(found),
                "hard": [n for n in found if n in hard],
                "easy": [n for n in found if n not in hard],
            }
            shares = {
                f"exact, {part}": round(sum(found[n]["exact"] for n in chosen) / max(1, len(chosen)), 4)
                for part, chosen in parts.items()
            }
            kinds = ("wrong_names", "missing_parameters", "unknown_parameters", "wrong_values")
            rows.append(
                {
                    "model": title,
                    **shares,
                    **{kind.replace("_", " "): sum(row[kind] for row in found.values()) for kind in kinds},
                }
            )
        first, last = rows[0], rows[-1]
        return Report(
            title="Rounds",
            sentence=f"{last['exact, all']:.0%} of the held-back answers are exactly right, {first['exact, all']:.0%} before; of the hard ones "
            f"{last['exact, hard']:.0%}.",
            numbers={"exact": last["exact, all"], "exact_before": first["exact, all"], "exact_hard": last["exact, hard"], "rounds": len(rounds) - 1},
            table=tuple(rows),
        )  # fmt: skip


def buckets(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """From easy to hard: one call, several calls, no call. A bucket that is too small joins the next (the last joins the one before)."""
    sorted_out: dict[str, list[dict[str, Any]]] = {
        "single calls": [],
        "several calls": [],
        "answers without a call": [],
    }
    for row in rows:
        calls = calls_in(last_answer(row["messages"])[1])
        sorted_out[
            "answers without a call" if calls is None else "single calls" if len(calls) == 1 else "several calls"
        ].append(row)
    found: list[tuple[str, list[dict[str, Any]]]] = []
    waiting: list[dict[str, Any]] = []
    for title, bucket in sorted_out.items():
        waiting = [*waiting, *bucket]
        if len(waiting) >= MIN_BUCKET:
            found.append((title, waiting))
            waiting = []
    if waiting and found:
        title, bucket = found[-1]
        found[-1] = (title, [*bucket, *waiting])
    return found or [("all examples", list(rows))]
