"""Problems with checkable answers: final answers are found and compared, data are recognised, accuracy is that of single greedy answers."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from engine.core.errors import EngineError
from engine.core.recipe import DataRef, ModelRef, Recipe, TrainSettings
from engine.io.datasets import guess_shape, inspect, read_rows
from engine.io.facts import data_facts
from engine.ops.folder import run_folder
from engine.tasks import task
from engine.tasks.base import Row
from engine.tasks.batching import IGNORED
from engine.tasks.checkers import as_number, gives_away, is_right, numbers_in, reference_of
from engine.tasks.verifiable import MAX_MEASURED, TASK, as_problem
from tests.engine.tiny import Tiny, events, lay, metric_rows, problems

# ── final answers ─────────────────────────────────────────────────────────────────────────────────────────────────────

RIGHT = [
    ("18", "She makes $18 every day.\n#### 18"), ("it takes 2\n#### 1,234", "The answer is 1234."), ("1/2", "so \\boxed{0.5}"),
    ("70000", "$70,000"), ("-3", "it is -3"), ("3", "7-3"), ("5", "6 5"), ("0.5", "half is .5"), ("1000", "1e3"), ("25 %", "25%"),
    ("18", "A: 18"), ("18", "#### 18 eggs for 6 people"), ("3/4", "the answer is 3 / 4"), ("2.7", "v 2.7."), ("1234567", "1,234,567"),
    ("5", "answer = 5"), ("18", "18.00"), ("18 eggs", "18"), ("$18", "18 dollars"), ("6", "1,2,3,4,5,6"), ("5", "answer: x = 5"),
    ("B", "The answer is (B)"), ("B", "B."), ("A", "I think it is A."), ("c", "(C) because"), ("Paris", "It is\nParis."),
    ("Paris", "The answer is paris"), ("new york", "Answer: New  York!"), ("\\boxed{\\frac{1}{2}}", "so \\boxed{\\frac{1}{2}}"),
    ("#### -12", "We get -12"), ("#### 3", "first 5\n#### 4\nno:\n#### 3"),
]  # fmt: skip
WRONG = [
    ("-3", "7-3"), ("3", "= -3"), ("5", "5 6"), ("B", "I think it is A."), ("A", "A cat is a B"), ("Paris", "Paris, France"), ("12", "12:30"),
    ("7", "2.7"), ("234", "1,234"), ("5", ""), ("10", "100"), ("3", "1/3"), ("Paris", ""), ("B", ""), ("18", "#### \n"), ("1", "eighteen"),
    ("0", "1/0"), ("#### 3", "3\n#### 4"), ("C", "Cats"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "text"), RIGHT)
def test_a_right_answer_is_recognised(answer: str, text: str) -> None:
    assert is_right(text, reference_of(answer))


@pytest.mark.parametrize(("answer", "text"), WRONG)
def test_a_wrong_answer_is_refused(answer: str, text: str) -> None:
    assert not is_right(text, reference_of(answer))


def test_numbers_are_exact_and_nothing_is_run() -> None:
    values = {
        "1,234.50": Fraction(2469, 2),
        "$ 3": 3,
        "−4": -4,
        "3/8": Fraction(3, 8),
        ".5": Fraction(1, 2),
        "1e-3": Fraction(1, 1000),
        "40%": 40,
    }
    assert {text: as_number(text) for text in values} == values
    for text in ("", "abc", "1/0", "3-2", "2**8", "__import__('os')", "1 2", "9" * 5000, "1,23"):
        assert as_number(text) is None, text
    assert numbers_in("From 3 to 5.5, that is 2.5 (not -1)") == ["3", "5.5", "2.5", "-1"]


def test_every_answer_of_gsm8k_is_a_number_that_its_solution_ends_in(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "train_3000.jsonl").read_text().splitlines()]
    for row in rows:
        reference = reference_of(row["answer"])
        assert reference.kind == "number" and is_right(row["answer"], reference)
        assert is_right(row["answer"].replace("####", "The answer is"), reference)


def test_graded_solutions_of_gsm8k_are_graded_alike(shared_data: Path) -> None:
    """The marks that come with the model solutions, which end in "A: number", agree with ours."""
    same = total = 0
    for line in (shared_data / "gsm8k" / "model_solutions_a.jsonl").read_text().splitlines():
        row = json.loads(line)
        reference = reference_of(row["ground_truth"].replace("\nA: ", "\n#### "))
        for solution in row["solutions"].values():
            same += is_right(solution["solution"], reference) == solution["is_correct"]
            total += 1
    assert total > 2000 and same / total > 0.99, (same, total)


HINTS = [
    ("18", "Nine times two is 18.", True), ("18", "Multiply 9 by 2.", False), ("8", "There are 18 eggs.", False), ("B", "It is (B).", True),
    ("B", "Not the first.", False), ("New York", "think of new york, the city", True), ("New York", "the largest city", False),
    ("1,000", "about 1000 m", True),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "hint", "leaks"), HINTS)
def test_a_hint_that_holds_the_answer_is_noticed(answer: str, hint: str, leaks: bool) -> None:
    assert gives_away(hint, reference_of(answer)) is leaks


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

GUESSES: dict[str, tuple[list[dict[str, Any]], str, dict[str, str]]] = {
    "hint": ([{"question": f"q {n}", "answer": f"a {n}", "hint": "h"} for n in range(9)], "problems", {"question": "question", "answer": "answer", "hint": "hint"}),
    "numbers with a hint": ([{"Problem": f"q {n}", "answer": str(n % 3), "Hint": "4"} for n in range(9)], "problems",
                            {"question": "Problem", "answer": "answer", "hint": "Hint"}),
    "final answer": ([{"problem": f"q {n}", "solution": f"so it is {n}", "final_answer": str(n)} for n in range(9)], "problems",
                     {"question": "problem", "answer": "final_answer", "solution": "solution"}),
    "numbers": ([{"question": f"q {n}", "answer": n} for n in range(9)], "problems", {"question": "question", "answer": "answer"}),
    "ratings stay labels": ([{"question": f"how was it, {n}?", "answer": n % 5} for n in range(40)], "classification", {"text": "question", "label": "answer"}),
    "questions and answers stay requests": ([{"question": f"q {n}", "answer": f"a {n}"} for n in range(9)], "instruction",
                                            {"instruction": "question", "output": "answer"}),
}  # fmt: skip


@pytest.mark.parametrize("case", GUESSES)
def test_problems_are_recognised(case: str) -> None:
    rows, shape, mapping = GUESSES[case]
    found, roles = guess_shape(tuple(rows[0]), rows)
    assert found == shape
    assert mapping.items() <= roles.items() if shape == "classification" else roles == mapping


def test_a_file_of_problems_is_read_with_its_roles(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in problems(12)))
    assert inspect(path).facts.shape == "problems" and list(read_rows(path)) == problems(12)


def test_requests_serve_as_problems_and_problems_as_requests() -> None:
    assert as_problem({"instruction": "add", "input": "1 2", "output": "#### 3"}) == {
        "question": "add\n\n1 2",
        "answer": "#### 3",
    }
    from engine.tasks.instruct import as_messages

    said = as_messages({"question": "1 + 2", "answer": "3", "solution": "it is 3", "hint": "count"})
    assert [turn["content"] for turn in said] == ["1 + 2", "it is 3"]
    assert "problems" in task("instruct").data_shapes and "instruction" in TASK.data_shapes


# ── the task ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def loaded(tiny: Tiny) -> tuple[Any, Any, Any]:
    """(model, tokenizer, data facts)."""
    from engine.io.facts import model_facts

    inputs = tiny.inputs("verifiable")
    facts, data = (
        model_facts(inputs["model"]["source"], task="verifiable"),
        data_facts(DataRef(source=inputs["data"]["source"])),
    )
    return TASK.load_model(facts, data, dtype=torch.float32, seed=1), TASK.load_tokenizer(facts), data


def recipe(**changes: Any) -> Recipe:
    settings = TrainSettings(**{"max_length": 48, "batch_size": 4, "holdout": 0.2, **changes})
    return Recipe(
        task="verifiable", model=ModelRef(source="folder:x"), data=DataRef(source="file:x"), settings=settings
    )


def test_what_is_learned_is_the_solution_and_the_prompt_is_what_is_asked(loaded: Any) -> None:
    _, tokenizer, data = loaded
    rows = [
        {"question": f"{n} + 1", "answer": str(n + 1), "hint": "count", "solution": f"after {n}" if n % 2 else ""}
        for n in range(10)
    ]
    encoded = TASK.encode(rows, tokenizer, recipe(), data)
    for example in (*encoded.train, *encoded.holdout):
        row = rows[example.source]
        prompt = TASK.prompt_ids(row, tokenizer)
        assert example.input_ids[: len(prompt)] == prompt and set(example.labels[: len(prompt)]) == {IGNORED}
        said = tokenizer.decode([label for label in example.labels if label != IGNORED], skip_special_tokens=True)
        assert said == (f"after {example.source}\n#### {row['answer']}" if row["solution"] else row["answer"])
        assert "count" not in tokenizer.decode(example.input_ids)
    assert encoded.rows is rows and len(encoded.holdout_rows) == 2


def test_accuracy_and_loss_are_those_of_one_answer_after_the_other(loaded: Any) -> None:
    model, tokenizer, data = loaded
    rows: list[Row] = [{"question": f"what is {n}", "answer": "nothing"} for n in range(20)]
    asked = [
        TASK.predictor(model, tokenizer, data).predict([row["question"]], max_new_tokens=6)[0]["text"] for row in rows
    ]
    length = max(len(TASK.prompt_ids(row, tokenizer)) for row in rows) + 6
    alone = [TASK.answers(model, [row], tokenizer, len(TASK.prompt_ids(row, tokenizer)) + 6)[0] for row in rows]
    assert alone == asked
    rows = [
        {**row, "answer": text if n % 4 else "something else"}
        for n, (row, text) in enumerate(zip(rows, asked, strict=True))
    ]
    reference = [TASK.reference(row) for row in rows]
    encoded = TASK.encode(rows, tokenizer, recipe(max_length=length + 12), data)
    encoded.holdout_rows = rows
    together = TASK.answers(model, rows, tokenizer, length)
    assert [text[: len(one)] for text, one in zip(together, alone, strict=True)] == alone
    scores = TASK.evaluate(model, encoded, tokenizer, recipe(max_length=length), torch.device("cpu"))
    share = sum(is_right(text, ref) for text, ref in zip(together, reference, strict=True)) / len(rows)
    assert scores["eval_accuracy"] == pytest.approx(share)
    assert scores["eval_accuracy_se"] == pytest.approx(math.sqrt(share * (1 - share) / len(rows)))
    total = count = 0.0
    for example in encoded.holdout:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        total += float(
            functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED], reduction="sum").detach()
        )
        count += int((labels != IGNORED).sum())
    assert scores["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert TASK.goodness({"eval_accuracy": 0.5, "eval_loss": 9.0}) > TASK.goodness(
        {"eval_accuracy": 0.4, "eval_loss": 1.0}
    )


def test_a_large_holdout_is_measured_in_part_and_says_so(loaded: Any) -> None:
    _, tokenizer, data = loaded
    rows = [{"question": f"{n} + 1", "answer": str(n + 1)} for n in range(700)]
    encoded = TASK.encode(rows, tokenizer, recipe(holdout=0.5), data)
    assert len(encoded.holdout) > MAX_MEASURED and any(str(MAX_MEASURED) in note for note in encoded.notes)


def test_answers_that_nobody_can_check_are_refused_with_the_way_out(loaded: Any) -> None:
    _, tokenizer, data = loaded
    essay = "A long explanation with many words that ends nowhere and names no final answer at all."
    with pytest.raises(EngineError) as caught:
        TASK.encode([{"question": f"why {n}?", "answer": essay} for n in range(9)], tokenizer, recipe(), data)
    assert caught.value.fault.code == "no_examples" and "####" in caught.value.fault.way_out
    some = [{"question": f"why {n}?", "answer": essay if n < 3 else str(n)} for n in range(9)]
    assert "3 of 9 problems were left out" in TASK.encode(some, tokenizer, recipe(), data).notes[0]
    long = [{"question": "word " * 60, "answer": str(n)} for n in range(9)]
    with pytest.raises(EngineError, match="no room for an answer"):
        TASK.encode(long, tokenizer, recipe(), data)


def test_worked_solutions_are_learned_with_cross_entropy(tiny: Tiny, tmp_path: Path) -> None:
    """The supervised start: the same goal, the ordinary objective."""
    recipe = tiny.recipe(
        [("full-finetuning", {}), ("patience", {})], task="verifiable", max_steps=30, epochs=30, evaluations=3
    )
    assert run_folder(lay(tmp_path, recipe))["outcome"] == "succeeded"
    rows = metric_rows(tmp_path)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    seen = events(tmp_path, "evaluation")
    assert seen[-1]["eval_loss"] < seen[0]["eval_loss"]
    described = json.loads((tmp_path / "artifact" / "artifact.json").read_text())
    assert "held-out problems" in described["baseline"]["sentence"] and described["samples"][0]["expected"].isdigit()
