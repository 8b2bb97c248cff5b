"""Conversations: exactly the assistant's words and end marks are learned, and training sees what prediction will see."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from engine.core.errors import EngineError
from engine.core.facts import DataFacts
from engine.core.recipe import DataRef, ModelRef, Recipe, TrainSettings
from engine.tasks import chat, task
from engine.tasks.batching import IGNORED
from engine.tasks.chat import (
    PLAIN_TEMPLATE,
    CannotRender,
    encode_conversation,
    encode_conversations,
    ensure_template,
    render,
)
from engine.tasks.instruct import Answerer, as_messages
from tests.engine.unit.tiny_models import tiny_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who is Lily?"},
    {"role": "assistant", "content": "A girl.\nShe is big."},
    {"role": "user", "content": "And Tom?"},
    {"role": "assistant", "content": "A boy."},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
# Like templates that add an empty thought before the last answer only: earlier turns are no prefix of the whole.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
MODEL, DATA = ModelRef(source="folder:x"), DataRef(source="file:x")


def spoken(ids: list[int], labels: list[int], tokenizer: Any) -> list[str]:
    """The learned stretches as text, special tokens included."""
    stretches: list[list[int]] = []
    for place, label in enumerate(labels):
        assert label in (IGNORED, ids[place])
        if label != IGNORED:
            if place == 0 or labels[place - 1] == IGNORED:
                stretches.append([])
            stretches[-1].append(label)
    return [tokenizer.decode(stretch) for stretch in stretches]


CASES = {
    "ours": (PLAIN_TEMPLATE, [" A girl.\nShe is big.</s>", " A boy.</s>"]),
    "chatml": (CHATML, ["A girl.\nShe is big.<|im_end|>", "A boy.<|im_end|>"]),
    "without end mark": (NO_END, [" A girl.\nShe is big.\n", " A boy.\n"]),
    "rewrites earlier turns": (THINKING, ["<think></think>\nA boy.<|im_end|>"]),
}


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_answers_are_learned(case: str) -> None:
    template, expected = CASES[case]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    ids, labels = encode_conversation(TALK, tokenizer)
    assert spoken(ids, labels, tokenizer) == expected
    assert tokenizer.decode(ids) == render(TALK, tokenizer)


def test_answers_on_the_story_model_token_by_token(shared_data: Path) -> None:
    tokenizer = ensure_template(AutoTokenizer.from_pretrained(shared_data / "stories260k"))
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    ids, labels = encode_conversation(
        [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A girl.\nBig."}], tokenizer
    )
    marked = [(token, label != IGNORED) for token, label in zip(tokenizer.convert_ids_to_tokens(ids), labels)]
    asked = [
        "<s>",
        "▁",
        "U",
        "s",
        "er",
        ":",
        "▁",
        "W",
        "h",
        "o",
        "?",
        "<0x0A>",
        "A",
        "s",
        "s",
        "is",
        "t",
        "an",
        "t",
        ":",
    ]
    answer = ["▁", "A", "▁g", "ir", "l", ".", "<0x0A>", "B", "ig", ".", "</s>"]
    assert marked == [*((token, False) for token in asked), *((token, True) for token in answer)]


@pytest.mark.parametrize("case", [case for case in CASES if case != "rewrites earlier turns"])
def test_the_tokens_before_an_answer_are_those_of_the_prompt(case: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CASES[case][0]
    ids, labels = encode_conversation(TALK, tokenizer)
    starts = [n for n, label in enumerate(labels) if label != IGNORED and labels[n - 1] == IGNORED]
    for start, turns in zip(starts, (2, 4)):
        prompt = render(TALK[:turns], tokenizer, asking=True)
        assert ids[:start] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_token_that_crosses_the_border_is_cut_there() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}th{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "e river"}]
    assert len(tokenizer("the river", add_special_tokens=False)["input_ids"]) < len(
        [
            *tokenizer("th", add_special_tokens=False)["input_ids"],
            *tokenizer("e river", add_special_tokens=False)["input_ids"],
        ]
    ), "this tokenizer joins th and e, so the border matters"
    ids, labels = encode_conversation(talk, tokenizer)
    assert (
        ids[: labels.index(next(label for label in labels if label != IGNORED))]
        == tokenizer("th", add_special_tokens=False)["input_ids"]
    )
    assert spoken(ids, labels, tokenizer) == ["e river</s>"]


def test_a_template_without_system_messages_gets_them_in_the_first_request() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    text = render(TALK, tokenizer)
    assert text.startswith("<|im_start|>user\nBe brief.\n\nWho is Lily?<|im_end|>")
    assert spoken(*encode_conversation(TALK, tokenizer), tokenizer) == CASES["chatml"][1]
    with pytest.raises(CannotRender, match="no system role"):
        render([TALK[0], TALK[2]], tokenizer)


def recipe(**changes: Any) -> Recipe:
    return Recipe(
        task="instruct", model=MODEL, data=DATA, settings=TrainSettings(**{"max_length": 64, "holdout": 0.2, **changes})
    )


FACTS = DataFacts(source="", path="", format="jsonl", shape="messages", num_rows=9, columns=(), mapping={})


def test_answers_that_do_not_fit_are_left_out_and_said() -> None:
    tokenizer = ensure_template(tiny_tokenizer())
    short = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(10)
    ]
    long_question = {"messages": [{"role": "user", "content": "word " * 80}, {"role": "assistant", "content": "yes"}]}
    long_answer = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 80}]}
    encoded = task("instruct").encode([*short, long_question, long_answer], tokenizer, recipe(), FACTS)
    everything = [*encoded.train, *encoded.holdout]
    assert sorted(item.source for item in everything) == [*range(10), 11]
    assert max(map(len, everything)) == 64
    assert (
        len(encoded.notes) == 2
        and "1 of 12 conversations were left out" in encoded.notes[0]
        and "2 of 12" in encoded.notes[1]
    )
    assert [item.source for item in encoded.holdout] == [
        ([*short, long_question, long_answer]).index(row) for row in encoded.holdout_rows
    ]
    with pytest.raises(EngineError, match="No conversation is left"):
        task("instruct").encode([long_question] * 9, tokenizer, recipe(), FACTS)


def test_requests_with_an_input_become_a_conversation() -> None:
    row = {"instruction": "Translate.", "input": "Hund", "output": "dog", "system": "Be brief."}
    assert as_messages(row) == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Translate.\n\nHund"}, {"role": "assistant", "content": "dog"},
    ]  # fmt: skip
    assert as_messages({"instruction": "Go.", "input": "", "output": "gone"})[0]["content"] == "Go."


def test_the_answerer_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=2,
        )
    )
    for parameter in model.parameters():
        parameter.data.zero_()
    model.lm_head.weight.data[end] = 1.0
    model.model.norm.weight.data.fill_(1.0)
    model.model.embed_tokens.weight.data.fill_(1.0)  # whatever it reads, the end of the turn is the likeliest token
    answerer = Answerer(model, tokenizer)
    assert answerer.ends == [2, end]
    (answer,) = answerer.predict(["Who?"], max_new_tokens=20)
    assert answer == {"text": "", "num_tokens": 1, "ended": True}
    for wrong in ("", [], 5, [{"role": "ghost", "content": "x"}]):
        with pytest.raises(EngineError):
            answerer.predict([wrong])


# ── many at once ──────────────────────────────────────────────────────────────────────────────────────────────────────


def by_hand(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]] | str:
    """One conversation at a time, by the definition: what stands before an answer is the prompt, what stands behind it is not learned."""
    try:
        text = render(messages, tokenizer)
    except CannotRender as error:
        return str(error)
    spans: list[tuple[int, int]] = []
    answers = [place for place, turn in enumerate(messages) if turn["role"] == "assistant"]
    for place in answers:
        content = messages[place]["content"].strip()
        if not content:
            continue
        try:
            before, after = render(messages[:place], tokenizer, asking=True), render(messages[: place + 1], tokenizer)
        except CannotRender:
            before = after = ""
        if before and text.startswith(before) and text.startswith(after) and content in after[len(before) :]:
            said = after[len(before) :]
            stop = said.rstrip()
            span = (len(before), len(before) + len(said if stop.endswith(content) else stop))
        elif place == answers[-1] and content in text:
            span = (text.rfind(content), len(text.rstrip()))
        else:
            continue
        if not spans or span[0] >= spans[-1][1]:
            spans.append(span)
    if not spans:
        return "the model's chat format changes the answers so that they cannot be found again"
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets, labels = whole["input_ids"], whole["offset_mapping"], [IGNORED] * len(whole["input_ids"])
    clean = True
    for start, end in spans:
        inside = [at for at, (left, right) in enumerate(offsets) if right > start and left < end and right > left]
        clean = clean and bool(inside) and offsets[inside[0]][0] >= start and offsets[inside[-1]][1] <= end
        clean = clean and ids[: inside[0]] == tokenizer(text[:start], add_special_tokens=False)["input_ids"]
        if clean:
            labels[inside[0] : inside[-1] + 1] = ids[inside[0] : inside[-1] + 1]
    if clean:
        return ids, labels
    ids, labels, done = [], [], 0
    for start, end in [*spans, (len(text), len(text))]:
        for piece, spoken in ((text[done:start], False), (text[start:end], True)):
            tokens = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            ids, labels = [*ids, *tokens], [*labels, *(tokens if spoken else [IGNORED] * len(tokens))]
        done = end
    return ids, labels


def talks() -> list[list[dict[str, str]]]:
    """Conversations of every make: many turns, system words, answers first, empty and blank answers, marks inside, other scripts."""
    generator = random.Random(7)
    words = [
        "river",
        "e river",
        " fox",
        "</s>",
        "<|im_end|>",
        "Lily\n",
        "狐",
        "naïve",
        "  ",
        "Assistant:",
        "th",
        "3.5",
        "…",
    ]
    found = []
    for _ in range(150):
        turns = [{"role": "system", "content": "Be brief."}] if generator.random() < 0.3 else []
        start = generator.randrange(2)
        for place in range(generator.randrange(1, 6)):
            said = "".join(generator.choices(words, k=generator.randrange(5)))
            turns.append({"role": ("user", "assistant")[(start + place) % 2], "content": said})
        found.append(turns)
    return found


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, CHATML, NO_END, THINKING, NO_SYSTEM])
def test_many_conversations_at_once_are_each_of_them_alone(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    monkeypatch.setattr(chat, "_AT_A_TIME", 40)
    found = encode_conversations(talks(), tokenizer)
    plain = [by_hand(messages, tokenizer) for messages in talks()]
    assert [str(one) if isinstance(one, CannotRender) else (one[0].tolist(), one[1].tolist()) for one in found] == plain
    assert sum(not isinstance(one, str) for one in plain) > 60


def test_a_conversation_that_begins_with_an_answer_is_learned_or_left_out_but_stops_nothing() -> None:
    tokenizer = ensure_template(tiny_tokenizer())
    ids, labels = encode_conversation([{"role": "assistant", "content": "Hello there."}], tokenizer)
    assert "Hello there." in spoken(ids, labels, tokenizer)[0]
    with pytest.raises(CannotRender, match="empty conversation"):
        render([], tokenizer)
