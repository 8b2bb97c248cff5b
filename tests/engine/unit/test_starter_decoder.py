"""The starter decoder: small enough to ship, in the catalogue, and it writes passable English of its little world."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.io.facts import model_facts, starter_models
from engine.starters.corpus import stories
from engine.tasks import task

FOLDER = Path(__file__).resolve().parents[3] / "engine" / "starters" / "models" / "bonsai-stories"


@pytest.fixture(scope="module")
def writer() -> Any:
    facts = model_facts("starter:bonsai-stories", task="causal_lm")
    language = task("causal_lm")
    model = language.load_model(facts, None, dtype=torch.float32, seed=0)  # type: ignore[arg-type]
    return model.eval(), language.load_tokenizer(facts)


def test_it_is_small_and_listed_with_its_recipes() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert {path.name for path in FOLDER.glob("recipe-*.yaml")} == {"recipe-1.yaml", "recipe-2.yaml"}
    (listed,) = [entry for entry in starter_models() if entry["name"] == "bonsai-stories"]
    assert listed["kind"] == "decoder" and listed["sentence"].endswith(".")
    facts = model_facts("starter:bonsai-stories", task="instruct")
    assert facts.has_chat_template and facts.num_parameters < 4_000_000


@torch.no_grad()
def test_it_knows_stories_that_it_has_never_read(writer: Any) -> None:
    model, tokenizer = writer
    total, count = 0.0, 0
    for text in stories(987_654, 24):
        ids = torch.tensor([tokenizer(text)["input_ids"][:320]])
        loss = model(input_ids=ids, labels=ids).loss
        total += float(loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert total / count < 0.6, "nats per token; a model that knows nothing needs more than seven"
    assert math.log(len(tokenizer)) > 7


def test_what_it_writes_are_words_and_sentences(writer: Any) -> None:
    model, tokenizer = writer
    predictor = task("causal_lm").predictor(model, tokenizer, None)  # type: ignore[arg-type]
    known = {word for text in stories(1, 3000) for word in re.findall(r"[a-z]+", text.lower())}
    answers = predictor.predict(
        ["One morning in spring, Ada", "Every winter the baker"], max_new_tokens=60, temperature=0.7, seed=3
    )
    for answer in answers:
        words = re.findall(r"[a-z]+", answer["text"].lower())
        assert len(words) > 25
        assert sum(word in known for word in words) / len(words) > 0.95, answer["text"]
        assert re.search(r"[.!?]", answer["text"])
