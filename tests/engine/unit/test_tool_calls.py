"""Reading and comparing tool calls, the search tree, and the flow of iTool."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from engine.core.recipe import parse_recipe
from engine.methods.irft_tool_use import buckets
from engine.ops.check import check
from engine.ops.folder import run_folder
from engine.parts.tool_calls import Call, calls_in, compare, overlap
from engine.parts.tree_search import Completion, Node, Search, fragments, grow, pairs
from tests.engine.tiny import Tiny, calls, lay


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f(a=1, b='x')", [Call("f", {"a": 1, "b": "x"})]),
        ("[math.sqrt(x=-2.5), g()]", [Call("math.sqrt", {"x": -2.5}), Call("g", {})]),
        ('{"name": "f", "arguments": {"a": [1, 2]}}', [Call("f", {"a": [1, 2]})]),
        ('<tool_call>[{"name": "f", "parameters": {}}]</tool_call>', [Call("f", {})]),
        ("f(on=true, off=None)", [Call("f", {"on": True, "off": None})]),
        ("```python\nf(1, b=2)\n```", [Call("f", {"b": 2, "#0": 1})]),
        ("I cannot do that.", None),
        ("f(a=", None),
        ("f(a=g(1))", None),
        ("[]", None),
        ("", None),
        ("__import__('os').system('true')", [Call("__import__('os').system", {"#0": "true"})]),
    ],
)
def test_calls_are_read_and_never_run(text: str, expected: list[Call] | None) -> None:
    assert calls_in(text) == expected


def test_a_comparison_counts_each_kind_of_error() -> None:
    gold = "f(a=1, b='Red', c=3)"
    assert compare(gold, "f(c=3, b='red ', a=1)").exact
    wrong_value = compare(gold, "f(a=1, b='blue', c=3)")
    assert (wrong_value.exact, wrong_value.wrong_values, wrong_value.score) == (False, 1, pytest.approx(2 * 3 / 4 - 1))
    missing = compare(gold, "f(a=1, b='red')")
    assert missing.missing_parameters == 1 and missing.score == pytest.approx(0.5)
    unknown = compare(gold, "f(a=1, b='red', c=3, d=4)")
    assert unknown.unknown_parameters == 1 and unknown.score == pytest.approx(2 * 4 / 5 - 1)
    other = compare(gold, "h(a=1)")
    assert other.wrong_names == 2 and other.score == -1
    assert compare(gold, "I do not know").readable is False and compare(gold, "I do not know").score == -1
    assert compare("There is no tool for that.", "Sorry.").exact and not compare("There is no tool.", "f()").exact
    assert not compare("f(a=True)", "f(a=1)").exact, "true is not one"
    assert compare("[f(a=1), f(a=2)]", "[f(a=2), f(a=1)]").exact, "the order of calls does not count"


def test_overlap_counts_shared_words_of_the_smaller_text() -> None:
    assert overlap("a b c", "a b") == 1.0 and overlap("a a b", "a c") == 0.5 and overlap("", "a") == 0.0


def test_fragments_join_two_pieces_and_merge_the_rest() -> None:
    text = "f(a=1, b=2, c=3)"
    assert fragments(text, 99) == ["f(a=", "1, b=", "2, c=", "3)"]
    assert fragments(text, 2) == ["f(a=", "1, b=2, c=3)"]
    assert "".join(fragments("One. Two, three = (four)", 3)) == "One. Two, three = (four)"


def toy(seed: int, simulations: int = 12) -> tuple[Node, list[str]]:
    """A model that writes f(a=DIGIT) with a coin: 7 is right."""
    rng, asked = random.Random(seed), []

    def sample(prefix: str, count: int) -> list[Completion]:
        asked.append(prefix)
        whole = [f"f(a={rng.choice('789')}, b={rng.choice('12')})" for _ in range(count)]
        return [Completion(text[len(prefix) :] if text.startswith(prefix) else text, True, -1.0) for text in whole]

    root = grow(
        Search(actions=3, simulations=simulations, depth=3, exploration=1.0),
        sample,
        lambda prefix: prefix + "1)",
        lambda answer: compare("f(a=7, b=2)", answer).score,
        fast=lambda text, ended: 0.0,
    )
    return root, asked


@pytest.mark.parametrize("simulations", [1, 5, 30])
def test_the_root_is_visited_once_a_simulation_and_values_are_means(simulations: int) -> None:
    root, _ = toy(3, simulations)
    assert root.visits == simulations
    for node in root.walk():
        assert -1 <= node.value <= 1 and node.depth <= 3
        assert node.visits >= sum(child.visits for child in node.children)


def test_selection_is_the_upper_confidence_bound() -> None:
    root = Node(text="", visits=8)
    for text, visits, total, prior in (("a", 5, 2.0, 0.9), ("b", 2, 1.0, 0.5), ("c", 1, -0.5, 0.2)):
        child = root.child(text, True, prior)
        child.visits, child.total = visits, total
    bounds = {
        c.text: c.total / c.visits + 1.5 * c.prior * math.sqrt(math.log(9) / (c.visits + 1)) for c in root.children
    }
    from engine.parts.tree_search import _select

    assert _select(root, 1.5).text == max(bounds, key=lambda text: bounds[text])


def test_pairs_keep_their_gates_and_share_their_beginning() -> None:
    found = 0
    for seed in range(20):
        root, _ = toy(seed)
        for pair in pairs(root, gap=0.1, most_overlap=0.95, floor=-0.3):
            found += 1
            assert pair.gap >= 0.1 and pair.chosen != pair.rejected
            node = next(n for n in root.walk() if n.path == pair.prefix and len(n.children) >= 2)
            values = {child.text: child.value for child in node.children}
            assert values[pair.chosen] == max(values.values()) >= -0.3
            assert values[pair.rejected] == min(values.values())
    assert found > 10
    root, _ = toy(1)
    assert pairs(root, gap=2.1, most_overlap=1.0, floor=-1.0) == []


def test_most_pairs_of_the_toy_prefer_the_right_digit() -> None:
    better = worse = 0
    for seed in range(40):
        for pair in pairs(toy(seed)[0], gap=0.1, most_overlap=0.95, floor=-0.3):
            better += "7" in pair.chosen and "7" not in pair.rejected
            worse += "7" in pair.rejected and "7" not in pair.chosen
    assert better > 3 * worse


def test_the_warm_up_goes_from_easy_to_hard() -> None:
    several = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "[f(), g()]"}]}] * 30
    none = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "No tool fits."}]}] * 5
    staged = buckets([*none, *several, *calls(40)])
    assert [title for title, _ in staged] == ["single calls", "several calls"]
    assert [len(rows) for _, rows in staged] == [40, 35], "a bucket that is too small joins another"


def job(tiny: Tiny, role: str, slug: str, **params: Any) -> Any:
    from engine.core.registry import catalogue

    method = catalogue()[slug]
    body = tiny.recipe_for_work(method).model_dump(mode="json")  # type: ignore[arg-type]
    body["methods"][0]["params"].update(params)
    return parse_recipe(body)


def test_the_hardest_share_is_chosen_the_same_way_every_time(tiny: Tiny, tmp_path: Path) -> None:
    reports = []
    for place in range(2):
        folder = lay(tmp_path / str(place), check(job(tiny, "generate", "tool-search")).recipe)
        assert run_folder(folder)["outcome"] == "succeeded"
        reports.append(json.loads((folder / "artifact" / "artifact.json").read_text())["report"])
        rows = [json.loads(line) for line in (folder / "artifact" / "data" / "rows.jsonl").read_text().splitlines()]
        assert rows and all({"prompt", "prefix", "chosen", "rejected", "open"} <= row.keys() for row in rows)
    assert reports[0] == reports[1]
    assert reports[0]["generated_tokens"] > 0


def test_data_without_calls_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(30)))
    body = job(tiny, "probe", "tool-accuracy").model_dump(mode="json")
    body["data"] = {"source": f"file:{path}"}
    folder = lay(tmp_path / "job", check(parse_recipe(body)).recipe)
    result = run_folder(folder)
    assert result["outcome"] == "failed" and result["reason"] == "bad_input" and "tool call" in result["message"]


def test_the_flow_counts_searches_prefers_and_reports(tiny: Tiny, tmp_path: Path) -> None:
    folder = lay(
        tmp_path, check(job(tiny, "flow", "irft-tool-use", warm_up=True, select=0.8, simulations=3, r=2)).recipe
    )
    result = run_folder(folder)
    assert result["outcome"] == "succeeded", result["message"]
    about = json.loads((folder / "artifact" / "artifact.json").read_text())
    titles = [row["model"] for row in about["report"]["table"]]
    assert titles[:2] == ["untouched", "after the warm-up"]
    steps = sorted(path.name for path in (folder / "steps").iterdir() if path.is_dir())
    assert steps[0] == "01-count-0" and any("search-1" in step for step in steps)
    assert about["kind"] == "model"
