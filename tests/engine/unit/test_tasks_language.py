"""Language models: no token is lost between text and blocks, the loss equals a naive loop, and generation follows its seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.core.errors import EngineError
from engine.core.facts import DataFacts, ModelFacts
from engine.core.recipe import DataRef, ModelRef, Recipe, TrainSettings
from engine.io.facts import data_facts, model_facts
from engine.tasks import task
from engine.tasks.base import Example
from engine.tasks.batching import IGNORED, plain_batch
from engine.tasks.chat import PLAIN_TEMPLATE
from engine.tasks.language import Writer
from tests.engine.unit.tiny_models import tiny_llama

WRITE, ANSWER = task("causal_lm"), task("instruct")
CPU = torch.device("cpu")
TEXTS = [f"Once upon a time a fox number {n} lived near the river" + " and ran" * (n % 7) + "." for n in range(30)]
FACTS = DataFacts(
    source="file:x", path="x", format="jsonl", shape="text", num_rows=30, columns=("text",), mapping={"text": "text"}
)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return model_facts(f"folder:{tiny_llama(tmp_path_factory.mktemp('llama'))}", task="causal_lm")


@pytest.fixture(scope="module")
def model(facts: ModelFacts) -> Any:
    return WRITE.load_model(facts, FACTS, dtype=torch.float32, seed=1)


@pytest.fixture(scope="module")
def tokenizer(facts: ModelFacts) -> Any:
    return WRITE.load_tokenizer(facts)


def recipe(**changes: Any) -> Recipe:
    settings = TrainSettings(**{"max_length": 20, "batch_size": 4, "holdout": 0.2, **changes})
    return Recipe(task="causal_lm", model=ModelRef(source="folder:x"), data=DataRef(source="file:x"), settings=settings)


def documents(numbers: list[int], tokenizer: Any) -> list[int]:
    return [token for n in numbers for token in [*tokenizer(TEXTS[n])["input_ids"], tokenizer.eos_token_id]]


def test_blocks_hold_every_token_once_with_start_and_end_marks(tokenizer: Any) -> None:
    rows = [{"text": text} for text in TEXTS]
    encoded = WRITE.encode(rows, tokenizer, recipe(), FACTS)
    held = [rows.index(row) for row in encoded.holdout_rows]
    train = [n for n in range(30) if n not in held]
    assert len(held) == 6
    for examples, numbers in ((encoded.train, train), (encoded.holdout, held)):
        assert [token for example in examples for token in example.input_ids] == documents(numbers, tokenizer)
        assert all(example.labels == example.input_ids for example in examples)
        assert all(len(example) == 20 for example in examples[:-1])
    assert encoded.num_train_tokens == len(documents(train, tokenizer))


def test_without_packing_there_is_one_example_a_text(tokenizer: Any) -> None:
    encoded = WRITE.encode([{"text": text} for text in TEXTS], tokenizer, recipe(packing=False), FACTS)
    assert len(encoded.train) == 24 and max(map(len, encoded.train)) == 20
    assert [example.source for example in encoded.train] == sorted({example.source for example in encoded.train})
    assert any("were cut" in note for note in encoded.notes)


def test_paragraphs_of_one_text_stay_together(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"Paragraph {n} of the story." for n in range(200)))
    data = data_facts(DataRef(source=f"file:{path}"))
    encoded = WRITE.encode(list(WRITE.rows(data)), tokenizer, recipe(max_length=128), data)
    held = [int(row["text"].split()[1]) for row in encoded.holdout_rows]
    runs = [n for n in held if n - 1 not in held]
    assert len(held) == 40 and len(runs) <= 8, "whole stretches are held back"
    text = tokenizer.decode([token for example in encoded.train for token in example.input_ids])
    first = min(n for n in range(199) if n not in held and n + 1 not in held)
    assert f"Paragraph {first} of the story.\n\nParagraph {first + 1} of" in text


def naive(model: Any, examples: list[Example]) -> tuple[float, float]:
    """Mean loss over tokens and its standard error, one example at a time with the official loss."""
    sums, counts = [], []
    with torch.no_grad():
        for example in examples:
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
            count = int((labels[:, 1:] != IGNORED).sum())
            sums.append(float(model(input_ids=ids, labels=labels).loss) * count)
            counts.append(count)
    loss, number = sum(sums) / sum(counts), len(sums)
    spread = sum((total - loss * count) ** 2 for total, count in zip(sums, counts)) * number / (number - 1)
    return loss, math.sqrt(spread) / sum(counts)


def test_scores_equal_those_of_a_naive_loop(model: Any, tokenizer: Any) -> None:
    encoded = WRITE.encode([{"text": text} for text in TEXTS], tokenizer, recipe(packing=False, max_length=60), FACTS)
    model.train()
    state = torch.get_rng_state()
    scores = WRITE.evaluate(model, encoded, tokenizer, recipe(), CPU)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    model.eval()
    loss, error = naive(model, encoded.holdout)
    assert scores["eval_loss"] == pytest.approx(loss, abs=1e-5) and scores["eval_loss_se"] == pytest.approx(
        error, rel=1e-3
    )
    assert scores["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_only_answers_count_in_the_scores(model: Any, tokenizer: Any) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {n}."},
                {"role": "assistant", "content": "The river " * (1 + n % 4)},
            ]
        }
        for n in range(12)
    ]
    chatty = ANSWER.load_tokenizer(model_facts(f"folder:{tokenizer.name_or_path}", task="instruct"))
    encoded = ANSWER.encode(rows, chatty, recipe(max_length=64), FACTS)
    scores = ANSWER.evaluate(model, encoded, chatty, recipe(), CPU)
    assert scores["eval_loss"] == pytest.approx(naive(model, encoded.holdout)[0], abs=1e-5)


def test_the_scores_of_the_story_model_are_known(shared_data: Path) -> None:
    folder = shared_data / "stories260k"
    facts = model_facts(f"folder:{folder}", task="causal_lm")
    tokenizer = WRITE.load_tokenizer(facts)
    model = WRITE.load_model(facts, FACTS, dtype=torch.float32, seed=1)
    stories = [
        text.strip() for text in (folder / "tinystories_sample.txt").read_text().split("<|endoftext|>") if text.strip()
    ]
    tokens = [tokenizer(text)["input_ids"][:512] for text in stories]
    scores = WRITE.measure(model, [Example(ids, list(ids), n) for n, ids in enumerate(tokens)], tokenizer, CPU)  # type: ignore[attr-defined]
    assert len(stories) == 5 and scores["eval_loss"] == pytest.approx(1.266, abs=0.002), "as the data's page says"
    (answer,) = WRITE.predictor(model, tokenizer, FACTS).predict(["Once upon a time"], max_new_tokens=60)
    expected = (folder / "greedy_sample.txt").read_text()
    assert ("Once upon a time" + answer["text"])[:100] == expected[:100]


def test_logits_come_at_supervised_places_in_the_order_of_the_labels(model: Any) -> None:
    examples = [
        Example([1, 9, 8, 7, 6, 5], [IGNORED, IGNORED, 8, IGNORED, 6, 5], 0),
        Example([1, 4, 3], [IGNORED, 4, IGNORED], 1),
    ]
    batch = plain_batch(examples, 0)
    with torch.no_grad():
        logits, labels = WRITE.forward_logits(model, batch)
        whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert labels.tolist() == [8, 6, 5, 4]
    torch.testing.assert_close(
        logits, torch.stack([whole[0, 1], whole[0, 3], whole[0, 4], whole[1, 0]]), atol=1e-5, rtol=1e-5
    )


def test_a_batch_without_labels_has_no_logits(model: Any) -> None:
    batch = WRITE.collate(
        [Example([1, 2, 3], [IGNORED] * 3, 0)], type("Pad", (), {"pad_token_id": 0, "eos_token_id": 2}), recipe()
    )
    logits, labels = WRITE.forward_logits(model, batch)
    assert logits.shape == (0, model.config.vocab_size) and labels.shape == (0,)
    assert functional.cross_entropy(logits, labels, reduction="sum").item() == 0.0


def test_generation_follows_its_seed_and_draws_from_no_global_generator(model: Any, tokenizer: Any) -> None:
    writer = WRITE.predictor(model, tokenizer, FACTS)
    state = torch.get_rng_state()
    same = [writer.predict(["The fox"], temperature=1.5, seed=7, max_new_tokens=12)[0]["text"] for _ in range(2)]
    other = writer.predict(["The fox"], temperature=1.5, seed=8, max_new_tokens=12)[0]["text"]
    assert torch.equal(state, torch.get_rng_state())
    assert same[0] == same[1] != other
    assert writer.predict(["The fox"], max_new_tokens=5)[0]["num_tokens"] <= 5
    assert writer.predict(["word " * 500], max_new_tokens=5)[0]["num_tokens"] >= 1, "a long prompt is cut on the left"
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(EngineError, match="out of range"):
            writer.predict(["x"], **wrong)
    with pytest.raises(EngineError, match="no text to continue"):
        writer.predict([" "])


def test_answers_shown_together_are_those_given_alone(model: Any, tokenizer: Any) -> None:
    writer = WRITE.predictor(model, tokenizer, FACTS)
    assert isinstance(writer, Writer)
    asked = ["The fox", "Once upon a time a fox lived near the river and", "a", "word " * 500]
    state = torch.get_rng_state()
    together = writer.show(asked, 12)
    assert torch.equal(state, torch.get_rng_state())
    assert together == [answer["text"] for answer in writer.predict(asked, max_new_tokens=12)]
    assert len(set(together)) > 1 and writer.show([], 12) == []


def test_the_export_carries_the_chat_format_that_was_trained(facts: ModelFacts, model: Any, tmp_path: Path) -> None:
    tokenizer = ANSWER.load_tokenizer(facts)
    ANSWER.export_model(model, tokenizer, FACTS, tmp_path)
    official = AutoTokenizer.from_pretrained(tmp_path)
    assert official.chat_template == PLAIN_TEMPLATE
    assert model_facts(f"folder:{tmp_path}", task="instruct").has_chat_template
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), loaded.parameters(), strict=True))
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "model.safetensors").is_file()
