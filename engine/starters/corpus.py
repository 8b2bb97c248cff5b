"""Our own story corpus: short stories from one small village, and questions about them with the right answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TypedDict

from engine.starters import world
from engine.starters.plots import PLOTS
from engine.starters.telling import Story, Teller

MIN_WORDS, MAX_WORDS = 60, 140


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Dialogue(TypedDict):
    """A request and its answer, in the messages format."""

    messages: list[Message]


def told(seed: int, count: int) -> Iterator[Story]:
    """Tell `count` stories with their questions; the same seed tells the same stories."""
    rng = random.Random(seed)
    for _ in range(count):
        yield _one(rng)


def stories(seed: int, count: int) -> Iterator[str]:
    """Tell `count` short stories of 60 to 140 words; the same seed tells the same stories."""
    for story in told(seed, count):
        yield story.text


def dialogues(seed: int, count: int) -> Iterator[Dialogue]:
    """Ask and answer about the same stories and the same village, as rows of messages."""
    # Another stream than that of the stories, so that equal seeds do not give equal texts twice.
    rng = random.Random(f"dialogues {seed}")
    for _ in range(count):
        request, answer = rng.choices(_WAYS, weights=_WEIGHTS)[0](rng)
        yield {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}


def _one(rng: random.Random) -> Story:
    # The plot stays while a telling is too long, or plots with much to tell would be rare.
    plot = PLOTS[rng.randrange(len(PLOTS))]
    while True:
        teller = Teller(rng)
        plot(teller)
        story = teller.story(plot.__name__, rng.randint(MIN_WORDS + 20, MAX_WORDS))
        if MIN_WORDS <= len(story.text.split()) <= MAX_WORDS:
            return story


# ---- the ways to talk about a story; each gives a request and its answer


def _ask_fact(rng: random.Random) -> tuple[str, str]:
    story = _one(rng)
    asked = rng.choice(story.questions)
    if rng.random() < 0.7:
        return f"{story.text}\n\n{asked.question}", asked.answer
    return f"Read the story and answer the question: {asked.question}\n\n{story.text}", asked.answer


def _tell(rng: random.Random) -> tuple[str, str]:
    story = _one(rng)
    lead = rng.choice(
        ("Tell me a story", "Please tell me a short story", "I would like to hear a story", "Write a story")
    )
    if rng.random() < 0.3:
        return f"{lead} about {story.hero}.", story.text
    return f"{lead}. {story.hero} should be in it, and it should be about this: {story.about}.", story.text


def _finish(rng: random.Random) -> tuple[str, str]:
    story = _one(rng)
    cut = rng.randint(2, max(2, len(story.sentences) - 3))
    lead = rng.choice(("Finish the story:", "How does the story go on?", "Tell the rest of the story:"))
    return f"{lead} {' '.join(story.sentences[:cut])}", " ".join(story.sentences[cut:])


def _about(rng: random.Random) -> tuple[str, str]:
    story = _one(rng)
    lead = rng.choice(("What is the story about?", "Say it in one sentence.", "Who is in the story, and what happens?"))
    return f"{lead}\n\n{story.text}", f"It is about {story.hero}: {story.about}."


def _order(rng: random.Random) -> tuple[str, str]:
    story = _one(rng)
    parts = [story.sentences[index] for index in sorted(rng.sample(range(len(story.sentences)), 3))]
    mixed = rng.sample(parts, 3)
    lead = rng.choice(("Put the parts of the story in order:", "What comes first, and what comes after? Put in order:"))
    return "\n".join([lead, *(f"- {part}" for part in mixed)]), "\n".join(f"- {part}" for part in parts)


def _village(rng: random.Random) -> tuple[str, str]:
    person = rng.choice(world.CRAFTSPEOPLE)
    name, kind, colour, bed = rng.choice(world.ANIMALS)
    return rng.choice(
        (
            (f"Who is the {person.craft} in the village?", f"{person.name} is the {person.craft}."),
            (f"What does {person.name} do?", f"{person.name} is the {person.craft} of the village."),
            (f"Where can I find {person.name}?", f"You can find {person.name} at the {person.place}."),
            (f"Who works at the {person.place}?", f"{person.full} works at the {person.place}."),
            (f"What kind of animal is {name}?", f"{name} is a {kind}."),
            (f"What colour is {name} the {kind}?", f"{name} is {colour}."),
            (f"Where does {name} sleep?", f"{name} the {kind} sleeps {bed}."),
        )
    )


_WAYS = (_ask_fact, _tell, _finish, _about, _order, _village)
_WEIGHTS = (48, 18, 14, 8, 5, 7)
