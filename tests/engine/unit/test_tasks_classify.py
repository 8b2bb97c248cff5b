"""Sorting texts: the head is new and repeatable, scores equal a naive loop, and an exported model answers the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine.core.errors import EngineError
from engine.core.facts import DataFacts, Facts, ModelFacts
from engine.core.recipe import DataRef, ModelRef, Recipe, TrainSettings
from engine.io.facts import data_facts, machine_facts, model_facts
from engine.tasks import task, tasks
from tests.engine.unit.tiny_models import tiny_bert, tiny_llama

SORT = task("classify")
CPU = torch.device("cpu")
WORDS = {
    "money": "refund card money paid bill",
    "parcel": "parcel late truck box arrived",
    "lamp": "lamp dark light bulb flickers",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFacts:
    path = tmp_path_factory.mktemp("data") / "a.csv"
    rows = [f"{' '.join(words.split()[: 1 + n % 5])} {n},{label}" for n in range(20) for label, words in WORDS.items()]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return data_facts(DataRef(source=f"file:{path}"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return model_facts(f"folder:{tiny_bert(tmp_path_factory.mktemp('bert'))}", task="classify")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return model_facts(f"folder:{tiny_llama(tmp_path_factory.mktemp('llama'))}", task="classify")


def recipe(facts: ModelFacts, data: DataFacts) -> Recipe:
    settings = TrainSettings(max_length=24, batch_size=4, holdout=0.25)
    return Recipe(
        task="classify", model=ModelRef(source=facts.source), data=DataRef(source=data.source), settings=settings
    )


def prepared(facts: ModelFacts, data: DataFacts) -> tuple[Any, Any, Any]:
    tokenizer = SORT.load_tokenizer(facts)
    encoded = SORT.encode(list(SORT.rows(data)), tokenizer, recipe(facts, data), data)
    return SORT.load_model(facts, data, dtype=torch.float32, seed=3), tokenizer, encoded


def test_tasks_are_found_and_an_unknown_one_is_refused() -> None:
    assert set(tasks()) >= {"classify", "causal_lm", "instruct"}
    with pytest.raises(EngineError, match=r"Choose one of: .*classify"):
        task("fly")


def test_the_new_head_comes_from_the_seed_alone(encoder: ModelFacts, data: DataFacts) -> None:
    state = torch.get_rng_state()
    one, same, other = (SORT.load_model(encoder, data, dtype=torch.float32, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.classifier.weight, same.classifier.weight) and not torch.equal(
        one.classifier.weight, other.classifier.weight
    )
    assert one.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3) and not one.classifier.bias.any()
    assert one.config.id2label == {0: "lamp", 1: "money", 2: "parcel"} and not one.training
    assert SORT.fresh(one) == ("classifier",)


def test_the_split_keeps_every_label_on_both_sides(encoder: ModelFacts, data: DataFacts) -> None:
    _, _, encoded = prepared(encoder, data)
    assert len(encoded.holdout) == 15 and len(encoded.train) == 45
    for side in (encoded.train, encoded.holdout):
        assert {example.labels[0] for example in side} == {0, 1, 2}
    assert [data.labels[example.labels[0]] for example in encoded.holdout] == [
        row["label"] for row in encoded.holdout_rows
    ]


def test_long_texts_are_cut_with_their_end_mark_and_said(data: DataFacts) -> None:
    facts = model_facts("starter:minilm-l6", task="classify")
    tokenizer = SORT.load_tokenizer(facts)
    rows = [{"text": word * n, "label": "money"} for n in (3, 50, 60) for word in ("word ", "case ", "note ")]
    encoded = SORT.encode(rows, tokenizer, recipe(facts, data), data)
    lengths = {len(example) for example in [*encoded.train, *encoded.holdout]}
    assert lengths == {5, 24} and "6 of 9 texts are longer than 24 tokens" in encoded.notes[0]
    assert {example.input_ids[-1] for example in encoded.train} == {tokenizer.sep_token_id}


def test_texts_that_are_all_the_same_are_refused_in_a_sentence(data: DataFacts) -> None:
    facts = model_facts("starter:minilm-l6", task="classify")
    rows = [{"text": "the same again", "label": "money"}] * 12
    with pytest.raises(EngineError, match="too few different texts"):
        SORT.encode(rows, SORT.load_tokenizer(facts), recipe(facts, data), data)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_scores_equal_those_of_a_naive_loop(kind: str, data: DataFacts, request: pytest.FixtureRequest) -> None:
    facts: ModelFacts = request.getfixturevalue(kind)
    model, tokenizer, encoded = prepared(facts, data)
    model.train()
    state = torch.get_rng_state()
    scores = SORT.evaluate(model, encoded, tokenizer, recipe(facts, data), CPU)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    model.eval()
    losses, guesses, truth = [], [], []
    with torch.no_grad():
        for example in encoded.holdout:  # one at a time, without padding
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
            losses.append(float(-torch.log_softmax(logits, -1)[example.labels[0]]))
            guesses.append(int(logits.argmax()))
            truth.append(example.labels[0])
    assert scores["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert scores["eval_loss_se"] == pytest.approx(float(torch.tensor(losses).std()) / len(losses) ** 0.5, abs=1e-5)
    assert scores["eval_accuracy"] == pytest.approx(sum(g == t for g, t in zip(guesses, truth)) / len(truth))
    assert scores["eval_macro_f1"] == pytest.approx(f1_score(truth, guesses, average="macro", zero_division=0.0))


def test_the_baseline_is_the_better_of_two_rivals(data: DataFacts) -> None:
    facts = model_facts("starter:minilm-l6", task="classify")
    model, tokenizer, encoded = prepared(facts, data)
    everything = Facts(task="classify", model=facts, data=data, machine=machine_facts())
    found = SORT.baseline(lambda: model, {}, encoded, tokenizer, everything, CPU)
    assert found["eval_accuracy"] >= 0.9, "these three topics share no word"
    (frequent,) = found["also"]
    assert frequent["eval_accuracy"] == pytest.approx(1 / 3) and frequent["eval_loss"] == pytest.approx(
        torch.tensor(3.0).log().item(), abs=1e-6
    )
    assert found["sentence"].endswith("of the held-out texts.")


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_an_exported_model_answers_the_same(
    kind: str, data: DataFacts, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    facts: ModelFacts = request.getfixturevalue(kind)
    model, tokenizer, _ = prepared(facts, data)
    before = SORT.predictor(model, tokenizer, data).predict(["money paid", "a dark lamp that flickers"])
    SORT.export_model(model, tokenizer, data, tmp_path)
    again = model_facts(f"folder:{tmp_path}", task="classify")
    assert not any(name.startswith(("classifier", "score")) for name in again.tensors)
    loaded = SORT.load_model(again, data, dtype=torch.float32, seed=99)
    assert (
        SORT.predictor(loaded, SORT.load_tokenizer(again), data).predict(["money paid", "a dark lamp that flickers"])
        == before
    )
    official, official_tokens = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    logits = official(**official_tokens("money paid", return_tensors="pt")).logits[0]
    assert official.config.id2label[int(logits.argmax())] == before[0]["label"]


def test_a_head_for_other_labels_is_not_kept(encoder: ModelFacts, data: DataFacts, tmp_path: Path) -> None:
    model, tokenizer, _ = prepared(encoder, data)
    SORT.export_model(model, tokenizer, data, tmp_path)
    other = DataFacts(
        **{**{name: getattr(data, name) for name in data.__dataclass_fields__}, "labels": ("x", "y", "z")}
    )
    renewed = SORT.load_model(model_facts(f"folder:{tmp_path}", task="classify"), other, dtype=torch.float32, seed=5)
    assert not torch.equal(renewed.classifier.weight, model.classifier.weight) and renewed.config.id2label[0] == "x"
    assert torch.equal(
        renewed.bert.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight
    )


def test_answers_hold_all_scores(encoder: ModelFacts, data: DataFacts) -> None:
    model, tokenizer, encoded = prepared(encoder, data)
    predictor = SORT.predictor(model, tokenizer, data)
    (answer,) = predictor.predict(["money"])
    assert sum(item["score"] for item in answer["scores"]) == pytest.approx(1.0, abs=1e-5)
    assert (
        answer["label"] == answer["scores"][0]["label"] and len(predictor.predict(["money"], top=1)[0]["scores"]) == 1
    )
    assert predictor.predict([]) == []
    with pytest.raises(EngineError, match="no text to sort"):
        predictor.predict(["  "])
    samples = SORT.samples(model, encoded, tokenizer, 2)
    assert len(samples) == 2 and all(set(item) == {"prompt", "output", "expected"} for item in samples)
