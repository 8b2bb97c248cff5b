"""Tool-call accuracy: how many calls a model gets right, and what is wrong with the others."""

from __future__ import annotations

from typing import Any, Literal

from engine.core.errors import bad_input
from engine.core.method import Card, Cost, Needs, ProbeMethod
from engine.core.params import HyperParams, dial
from engine.core.work import Report
from engine.parts.tool_calls import compare
from engine.parts.tool_talk import Talker, is_call, last_answer


class ToolAccuracy(ProbeMethod):
    """Greedy answers, read and compared."""

    card = Card(
        slug="tool-accuracy",
        title="Tool-call accuracy",
        pick_when="Pick this when you want to know how many tool calls a model writes exactly right, and whether names, missing parameters or values are "
        "what it gets wrong.",
        summary="The model answers every example; each answer is read as a call and compared with the right one. Nothing is run.",
        algorithm=(
            "Answer greedily.",
            "Read the answer as calls (f(a=1), a list of them, or JSON).",
            "Compare names and arguments; count exact answers and each kind of error.",
        ),
        traps=("Texts are compared without regard to case; numbers must be equal.",),
        cost=Cost(time=3, memory=2, size=1),
        family="Tool use",
    )
    needs = Needs(tasks=("instruct",), kinds=("decoder",))
    presets = {"tiny": {"max_tokens": 8, "most": 4}, "paper": {}}

    class Params(HyperParams):
        """What is asked."""

        rows: Literal["held-out", "all"] = dial(
            "held-out", label="Which examples", help="Those that are kept back, or all of the data (when it is a test set already).",
        )  # fmt: skip
        max_tokens: int = dial(
            128, label="Longest answer", unit="tokens", low=4, high=4096, help="Answers are cut at this length."
        )
        most: int = dial(
            500,
            label="Most examples",
            unit="examples",
            low=1,
            high=1_000_000,
            tier="basic",
            help="No more than this are asked.",
        )

    def measure(self, inputs: Any, ctx: Any) -> Report:
        p = self.params
        sources = range(len(inputs.rows)) if p.rows == "all" else [example.source for example in inputs.encoded.holdout]
        talker = Talker(inputs)
        table: list[dict[str, Any]] = []
        asked_of = [(source, *last_answer(inputs.rows[source]["messages"])) for source in sources]
        asked_of = [item for item in asked_of if item[1] and item[2]][: p.most]
        if not any(is_call(gold) for _, _, gold in asked_of):
            raise bad_input(
                "data",
                "None of these examples ends with a tool call.",
                "A call is written f(a=1), as a list of such calls, or as JSON with name and arguments.",
                "Choose data whose last answers are calls.",
                "no_calls",
            )
        for place, (source, asked, gold) in enumerate(asked_of):
            found = compare(gold, talker.finish(asked, "", p.max_tokens))
            table.append({
                "row": source, "call": is_call(gold), "exact": found.exact, "score": round(found.score, 4), "loss": round(talker.loss(asked, gold), 5),
                "readable": found.readable, "wrong_names": found.wrong_names, "missing_parameters": found.missing_parameters,
                "unknown_parameters": found.unknown_parameters, "wrong_values": found.wrong_values,
            })  # fmt: skip
            ctx.progress(place + 1, len(asked_of))
        calls = [row for row in table if row["call"]]
        right = sum(row["exact"] for row in table) / len(table)
        numbers = {
            "exact": round(right, 4),
            "exact_calls": round(sum(row["exact"] for row in calls) / len(calls), 4),
            "readable": round(sum(row["readable"] for row in calls) / len(calls), 4),
            "examples": len(table),
            **{name: sum(row[name] for row in table) for name in ("wrong_names", "missing_parameters", "unknown_parameters", "wrong_values")},
        }  # fmt: skip
        return Report(
            title="Tool calls",
            sentence=f"{right:.0%} of {len(table)} answers are exactly right; {numbers['wrong_names']} names and {numbers['wrong_values']} values are wrong, "
            f"{numbers['missing_parameters']} parameters are missing.",
            numbers=numbers,
            table=tuple(table),
        )  # fmt: skip
