"""Tool-call search: let a model try the calls it finds hard, and keep better and worse fragments as preferences."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from engine.core.method import Card, Cost, GenerateMethod, Needs
from engine.core.params import HyperParams, dial
from engine.parts.tool_calls import calls_in, compare, overlap
from engine.parts.tool_talk import Talker, is_call, last_answer
from engine.parts.tree_search import Search, grow, pairs


class ToolSearch(GenerateMethod):
    """Difficulty scan and tree search (steps B1 to B3 of iTool)."""

    card = Card(
        slug="tool-search",
        title="Search for better tool calls",
        pick_when="Pick this when a model calls tools almost right and you want pairs of better and worse pieces of calls to learn from.",
        summary="The model meets the examples it finds hardest and tries several ways to write each call, piece by piece. Every try is compared with the "
        "right call, name by name and value by value; where one piece led to better calls than another, the two become a pair.",
        paper="iTool: Reinforced Fine-Tuning with Dynamic Deficiency Calibration for Advanced Tool Use",
        year=2025,
        arxiv="2501.09766",
        algorithm=(
            "Score every example by the loss per token of its right answer; keep the hardest 30 % of those with a call, and of those without, each.",
            "For each, grow a tree: sample three completions, cut them into fragments behind '. ', ', ', '=' and '(', two pieces each, depth three.",
            "Select by mean value + c × prior × sqrt(ln parent visits / (visits + 1)); prior: how likely the model found the completion.",
            "The reward of a finished answer comes from reading it as a call and comparing names and arguments with the right one; nothing is run.",
            "At each node the best child against the worst becomes a pair, if they are far enough apart; both continue the same beginning.",
        ),
        avoid_when="The model does not yet write calls that can be read: teach it with examples first.",
        traps=(
            "The original lets the model grade itself; a weak model's grades are noise. Here the call is compared.",
            "Descending only through nodes expanded twice, five simulations never leave the top; here it is the ordinary rule from the first visit on.",
            "Sums favour visited nodes; values here are means.",
            "Fragments must not get an end mark unless the answer really ended there.",
            "Examples without a call have a quota of their own, or the model learns to call always.",
        ),
        cost=Cost(time=5, memory=2, size=1),
        family="Tool use",
    )  # fmt: skip
    needs = Needs(tasks=("instruct",), kinds=("decoder",))
    presets = {
        "tiny": {"select": 0.1, "actions": 2, "simulations": 2, "max_tokens": 12, "most": 3, "gap": 0.0, "floor": -1.0},
        "paper": {},
    }

    class Params(HyperParams):
        """Hyperparameters of the search."""

        select: float = dial(
            0.3, label="Hardest share", unit="share", low=0.01, high=1.0, tier="basic", paper=0.3,
            help="The share of the examples, the hardest ones, that are searched.",
        )  # fmt: skip
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
            5,
            label="Simulations",
            unit="1",
            low=1,
            high=200,
            paper=5,
            tier="basic",
            help="How often each tree is descended.",
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
            1.5, label="Daring", unit="1", low=0.1, high=4.0, paper=1.5, help="How far the tries stray from the likeliest words.",
        )  # fmt: skip
        exploration: float = dial(
            1.0, label="Curiosity", unit="1", low=0.0, high=10.0, paper=1.0, help="How much little-tried pieces are favoured.",
        )  # fmt: skip
        gap: float = dial(
            0.1, label="Least difference", unit="1", low=0.0, high=2.0, paper=0.1, help="A pair is kept when its values differ by at least this.",
        )  # fmt: skip
        most_overlap: float = dial(
            0.95, label="Largest likeness", unit="share", low=0.0, high=1.0, paper=0.95, help="Pairs that share more words than this are dropped.",
        )  # fmt: skip
        floor: float = dial(
            -0.3, label="Least value", unit="1", low=-1.0, high=1.0, paper=-0.3, help="The better piece must be worth at least this.",
        )  # fmt: skip
        most: int = dial(
            2000,
            label="Most examples",
            unit="examples",
            low=1,
            high=1_000_000,
            help="No more examples than this are searched.",
        )
        cap: int = dial(
            50,
            label="Most per tool",
            unit="examples",
            low=1,
            high=100_000,
            help="No more examples than this for any one tool.",
        )
        pairs: Literal["search", "random"] = dial(
            "search", label="Which is better", help="'random' tosses a coin instead; it is the control of the experiment.",
        )  # fmt: skip

    def items(self, inputs: Any, ctx: Any) -> Sequence[Any]:
        p = self.params
        talker = Talker(inputs)
        scored = []
        for example in inputs.encoded.train:
            asked, gold = last_answer(inputs.rows[example.source]["messages"])
            if asked and gold:
                scored.append((-talker.loss(asked, gold), example.source, is_call(gold)))
        chosen: list[int] = []
        tools: Counter[str] = Counter()
        for calling in (True, False):
            ranked = sorted(item for item in scored if item[2] is calling)
            for _, source, _ in ranked[: max(1, round(p.select * len(ranked)))] if ranked else []:
                gold = last_answer(inputs.rows[source]["messages"])[1]
                calls = calls_in(gold)
                tool = calls[0].name if calls else ""
                tools[tool] += 1
                if tools[tool] <= p.cap:
                    chosen.append(source)
        ctx.report.update(scanned=len(scored), searched=min(len(chosen), p.most), generated_tokens=0, pairs=0)
        return chosen[: p.most]

    def rows(self, item: Any, inputs: Any, ctx: Any) -> Iterator[dict[str, Any]]:
        p = self.params
        asked, gold = last_answer(inputs.rows[item]["messages"])
        talker = Talker(inputs)
        generator = ctx.generator("tries")

        def fast(text: str, ended: bool) -> float:
            closed = text.rstrip().endswith(")") or text.rstrip().endswith("]")
            agrees = closed == ended
            return (0.1 if agrees else -0.1) + overlap(gold, text) - 0.5

        tree = grow(
            Search(actions=p.actions, simulations=p.simulations, depth=p.depth, exploration=p.exploration),
            lambda prefix, count: talker.tries(asked, prefix, count, p.max_tokens, p.temperature, generator),
            lambda prefix: prefix + talker.finish(asked, prefix, p.max_tokens),
            lambda answer: compare(gold, answer).score,
            fast=fast,
        )
        coin = random.Random(f"{ctx.seed}/{item}")
        for pair in pairs(tree, gap=p.gap, most_overlap=p.most_overlap, floor=p.floor):
            sides = [(pair.chosen, pair.chosen_ended), (pair.rejected, pair.rejected_ended)]
            if p.pairs == "random" and coin.random() < 0.5:
                sides.reverse()
            unfinished = (
                "yes"
                if not sides[0][1] and not sides[1][1]
                else "chosen"
                if not sides[0][1]
                else "rejected"
                if not sides[1][1]
                else ""
            )
            ctx.report["pairs"] += 1
            yield {
                "prompt": asked,
                "prefix": pair.prefix,
                "chosen": sides[0][0],
                "rejected": sides[1][0],
                "open": unfinished,
                "gap": round(pair.gap, 4),
            }
        ctx.report["generated_tokens"] += talker.num_generated
