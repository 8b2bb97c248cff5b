"""The starter data keep their promises: size, balance, stated noise, right format, and stories that hold together."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pytest

from engine.starters import STARTER_DATA, StarterData, dialogues, starter_data, stories, world
from engine.starters.corpus import MAX_WORDS, MIN_WORDS, told
from engine.starters.plots import PLOTS

MESSAGES = starter_data("customer-messages").path
README = MESSAGES.parent / "README.md"
SAMPLE = 3000


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def sample() -> list:
    return list(told(5, SAMPLE))


@pytest.fixture(scope="module")
def vocabulary() -> set[str]:
    talk = (message["content"] for row in dialogues(7, SAMPLE) for message in row["messages"])
    return set(words(" ".join([*stories(7, 4 * SAMPLE), *talk])))


# ---- what is offered


def test_importing_the_starters_imports_no_torch() -> None:
    code = "import sys, engine.starters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("data", STARTER_DATA.values(), ids=lambda data: data.name)
def test_columns_of_the_manifest_exist_in_every_row(data: StarterData) -> None:
    rows = read_csv(data.path) if data.path.suffix == ".csv" else read_jsonl(data.path)
    assert all(set(row) == set(data.columns.values()) for row in rows)
    assert data.about.endswith(".") and data.title
    roles = {
        "classification": {"text", "label"},
        "messages": {"messages"},
        "preferences": {"prompt", "chosen", "rejected"},
    }
    assert set(data.columns) == roles[data.shape]


def test_names_fit_into_the_source_of_a_recipe() -> None:
    # A recipe says "starter:NAME"; names are written like every other slug of the project.
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) for name in STARTER_DATA)


def test_an_unknown_name_is_answered_with_the_names_that_exist() -> None:
    with pytest.raises(ValueError) as refused:
        starter_data("unheard_of")
    assert "unheard_of" in str(refused.value)
    assert all(name in str(refused.value) for name in STARTER_DATA)


# ---- customer messages


def test_messages_are_balanced_over_eight_topics() -> None:
    rows = read_csv(MESSAGES)
    assert len(rows) >= 480
    counts = Counter(row["topic"] for row in rows)
    assert len(counts) == 8 and set(counts.values()) == {60}


def test_no_two_messages_are_near_duplicates() -> None:
    bags = [frozenset(re.findall(r"[a-z0-9']+", row["message"].lower())) for row in read_csv(MESSAGES)]
    assert max(len(a & b) / len(a | b) for a, b in combinations(bags, 2)) < 0.7


def test_messages_vary_in_length() -> None:
    lengths = [len(row["message"].split()) for row in read_csv(MESSAGES)]
    sentences = [len(re.findall(r"[.!?]+(?:\s|$)", row["message"])) for row in read_csv(MESSAGES)]
    assert min(lengths) == 3 and max(lengths) > 30
    assert max(sentences) == 4


def test_noise_and_hard_cases_are_as_documented() -> None:
    rows = read_csv(MESSAGES)
    notes = read_csv(MESSAGES.with_name("customer_messages_notes.csv"))
    assert len({note["row"] for note in notes}) == len(notes)
    counts = Counter(note["kind"] for note in notes)
    stated = {kind: int(n) for kind, n in re.findall(r"\| `(\w+)` \| (\d+) rows", README.read_text(encoding="utf-8"))}
    assert stated == counts
    assert 0.06 <= counts["noisy"] / len(rows) <= 0.10
    assert 0.08 <= counts["hard"] / len(rows) <= 0.12
    assert 0.01 <= counts["mislabelled"] / len(rows) <= 0.03
    for note in notes:
        row = rows[int(note["row"]) - 1]
        assert (row["topic"] != note["true_topic"]) == (note["kind"] == "mislabelled")


def test_noisy_messages_hold_words_that_no_clean_message_has() -> None:
    notes = read_csv(MESSAGES.with_name("customer_messages_notes.csv"))
    noisy = {int(note["row"]) for note in notes if note["kind"] == "noisy"}
    rows = read_csv(MESSAGES)
    clean = {word for i, row in enumerate(rows, 1) if i not in noisy for word in words(row["message"])}
    assert all(set(words(rows[i - 1]["message"])) - clean for i in noisy)


# ---- instructions and preferences


def test_instructions_are_valid_conversations_and_differ() -> None:
    rows = read_jsonl(starter_data("village-instructions").path)
    assert len(rows) >= 200
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])
    assert len({row["messages"][0]["content"] + row["messages"][1]["content"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name, share", [("village-instructions", 0.97), ("village-preferences", 0.95)])
def test_village_rows_keep_to_the_words_of_the_corpus(name: str, share: float, vocabulary: set[str]) -> None:
    rows = read_jsonl(starter_data(name).path)
    texts = (
        [row["messages"][0]["content"] + " " + row["messages"][1]["content"] for row in rows]
        if "messages" in rows[0]
        else [" ".join(row.values()) for row in rows]
    )
    used = set(words(" ".join(texts)))
    assert len(used & vocabulary) / len(used) >= share


def test_preferences_differ_and_length_does_not_give_the_better_one_away() -> None:
    rows = read_jsonl(starter_data("village-preferences").path)
    assert len(rows) >= 120
    assert all(row["chosen"] and row["rejected"] and row["chosen"] != row["rejected"] for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert 0.4 <= sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows) <= 0.6


# ---- the story corpus


def test_same_seed_tells_the_same_and_another_seed_does_not() -> None:
    assert list(stories(3, 40)) == list(stories(3, 40))
    assert list(dialogues(3, 40)) == list(dialogues(3, 40))
    assert not set(stories(3, 40)) & set(stories(4, 40))


def test_stories_are_of_the_stated_length_and_hardly_ever_the_same(sample: list) -> None:
    assert all(MIN_WORDS <= len(story.text.split()) <= MAX_WORDS for story in sample)
    assert len({story.text for story in sample}) > 0.99 * len(sample)


def test_every_plot_is_told_about_equally_often(sample: list) -> None:
    counts = Counter(story.plot for story in sample)
    assert len(PLOTS) >= 14 and set(counts) == {plot.__name__ for plot in PLOTS}
    assert min(counts.values()) > 0.5 * len(sample) / len(PLOTS)


def test_vocabulary_is_small_enough_for_a_tiny_model() -> None:
    assert 900 <= len(set(words(" ".join(stories(11, 4 * SAMPLE))))) <= 1400


def test_articles_fit_the_word_that_follows(sample: list) -> None:
    text = " ".join(story.text for story in sample)
    assert set(re.findall(r"\b[Aa] ([aeiou]\w*)", text)) <= {"one"}
    assert set(re.findall(r"\b[Aa]n ([^aeiou\W]\w*)", text)) <= {"hour", "honest"}


def test_sentences_are_clean(sample: list) -> None:
    for story in sample:
        assert not re.search(r"[\[\]{}|]|  | [,.]|\.\.|[.!?] [a-z]|\b(\w+) \1\b", story.text), story.text
        assert story.text[0] == '"' or story.text[0].isupper()
        assert story.text[-1] in '.!?"' and story.text.count('"') % 2 == 0, story.text


def test_a_thing_never_changes_its_colour(sample: list) -> None:
    colours, nouns = {*world.COLOURS, *world.METALS}, {kind.noun for kind in world.KINDS}
    told_colours = 0
    for story in sample:
        seen: dict[str, set[str]] = defaultdict(set)
        for colour, noun in re.findall(r"(?=\b(\w+) (\w+))", story.text):
            if colour in colours and noun in nouns:
                seen[noun].add(colour)
        told_colours += len(seen)
        assert all(len(found) == 1 for found in seen.values()), story.text
    assert told_colours > len(sample) / 4


def test_grown_ups_are_introduced_with_their_craft(sample: list) -> None:
    for story in sample:
        for person in world.CRAFTSPEOPLE:
            first = story.text.find(person.name)
            assert first < 0 or story.text.startswith(person.full, first), story.text


def test_answers_agree_with_the_story(sample: list) -> None:
    checked = Counter()
    for story in sample:
        for asked in story.questions:
            assert asked.question.endswith("?") and asked.question[0].isupper() and asked.answer[0].isupper()
            if colour := re.fullmatch(r"The (\w+) was (\w+)\.", asked.answer):
                noun, shade = colour.groups()
                if noun in {kind.noun for kind in world.KINDS} and "colour" in asked.question:
                    assert f"{shade} {noun}" in story.text
                    checked["colour"] += 1
            elif asked.question.startswith("Where was the ") and "strange" not in asked.question:
                place = asked.answer.split(" was ", 1)[1].rstrip(".")
                assert place.lower() in story.text.lower()
                checked["place"] += 1
            elif asked.question.startswith("Who "):
                people = [person.name for person in world.CRAFTSPEOPLE if person.name in asked.answer]
                assert all(name in story.text for name in people)
                checked["person"] += bool(people)
    assert min(checked[kind] for kind in ("colour", "place", "person")) >= 50


def test_dialogues_are_valid_conversations_of_several_kinds() -> None:
    rows = list(dialogues(1, 400))
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])
    starts = Counter(row["messages"][0]["content"].split()[0] for row in rows)
    assert len(starts) > 20
