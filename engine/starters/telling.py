"""How a story is told: a teller chooses among ways to say a thing and remembers what is true in the story."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from engine.starters import world
from engine.starters.world import Kind, Person, Thing

T = TypeVar("T")

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
# A new sentence begins after . ! or ?, but after a closing quote only where a full stop or a new quote shows it,
# because '"Why?" she asked' goes on, and so does '"Well," she said, "that is all"'.
_SENTENCE_START = re.compile(r'(^"?|[.!?] "?|\." "?|[!?]" ")([a-z])')
_ARTICLE = re.compile(r"\b([Aa])n? (?=([a-z]+))")


@dataclass(frozen=True)
class Question:
    """A question about one story, with the answer that is right in it."""

    question: str
    answer: str


@dataclass(frozen=True)
class Story:
    """A finished story with the things that can be asked about it."""

    plot: str
    hero: str
    about: str
    sentences: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


class Teller:
    """Tells one story: holds who and what is in it, picks the words, and collects facts to ask about."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.told: list[str] = []
        self._asked: list[tuple[int, Question]] = []
        self._optional: set[int] = set()
        self.bound: dict[str, object] = {}
        self.season = self.weather = self.time = ""
        self._taken: set[str] = set()

    # ---- words

    def pick(self, *options: T) -> T:
        return options[self.rng.randrange(len(options))]

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def bind(self, **named: object) -> None:
        self.bound.update(named)

    def part(self, template: str) -> str:
        """Resolve [this|that] and fill in {who.what}; the result may stand anywhere in a sentence."""
        while True:
            chosen = _CHOICE.sub(lambda found: self.pick(*found.group(1).split("|")), template)
            if chosen == template:
                break
            template = chosen
        return " ".join(template.format_map(self.bound).split())

    def expand(self, template: str) -> str:
        """Make whole sentences of a template: its parts, then articles and capitals."""
        filled = self.part(template)
        return _SENTENCE_START.sub(lambda found: found.group(1) + found.group(2).upper(), _right_articles(filled))

    def say(self, *options: str) -> None:
        self.told.append(self.expand(self.pick(*options)))

    def may(self, *options: str) -> None:
        """Say something that the story can do without; some of it is left out where the story grows too long."""
        self._optional.add(len(self.told))
        self.say(*options)

    def ask(self, question: str, answer: str) -> None:
        """Note a question about what was said just now; it goes when that is left out."""
        self._asked.append((len(self.told) - 1, Question(self.expand(question), self.expand(answer))))

    # ---- people and things

    def _free(self, options: Sequence[T]) -> T:
        """One of the options that is not yet in this story."""
        option = self.pick(*[option for option in options if str(option) not in self._taken])
        self._taken.add(str(option))
        return option

    def child(self, name: str, gender: str | None = None) -> Person:
        gender = gender or self.pick("f", "m")
        chosen = Person(
            self._free(world.GIRLS if gender == "f" else world.BOYS), gender, trait=self.pick(*world.TRAITS)
        )
        self.bind(**{name: chosen})
        return chosen

    def friend(self, name: str, hero: Person) -> Person:
        """A second child; mostly of the other gender, which keeps pronouns clear."""
        return self.child(name, ("m" if hero.gender == "f" else "f") if self.chance(0.8) else hero.gender)

    def craftsperson(self, name: str, *crafts: str) -> Person:
        chosen = self._free([world.BY_CRAFT[craft] for craft in crafts] or world.CRAFTSPEOPLE)
        self.bind(**{name: chosen})
        return chosen

    def animal(self, name: str, *kinds: str) -> Person:
        """One of the animals that everyone in the village knows; `{x}` is its name and `{x_kind}` what it is."""
        chosen, kind, colour, bed = self.pick(*[animal for animal in world.ANIMALS if not kinds or animal[1] in kinds])
        animal = Person(chosen, "n")
        self.bind(**{name: animal, f"{name}_kind": kind, f"{name}_colour": colour, f"{name}_bed": bed})
        return animal

    def thing(self, name: str, kinds: Sequence[Kind], colours: Sequence[str] | None = None) -> Thing:
        kind = self._free(kinds)
        colours = colours or (world.METALS if kind.shiny else world.COLOURS)
        chosen = Thing(kind, self.pick(*colours))
        self.bind(**{name: chosen})
        return chosen

    def asks_colour(self, name: str) -> None:
        self.ask(f"What colour was the {{{name}}}?", f"[The {{{name}}} was {{{name}.colour}}|It was {{{name}.a}}].")

    # ---- scenes

    def scene(
        self,
        seasons: Sequence[str] = ("spring", "summer", "autumn", "winter"),
        weathers: Sequence[str] = (),
        times: Sequence[str] = ("morning", "afternoon", "evening"),
    ) -> None:
        """Settle when the story happens and under which sky, within what the plot allows."""
        self.season = self.pick(*seasons)
        skies = [sky for sky in world.SEASON_SKIES[self.season] if not weathers or sky in weathers]
        self.weather = self.pick(*(skies or list(weathers)))
        self.time = self.pick(*times)
        self.bind(season=self.season, weather=self.weather, time=self.time)
        self.bind(sky=self.pick(*world.SKIES[self.weather]))

    def opening(self, hero: Person) -> None:
        """Introduce the hero and the day, in one of several orders; `{when}` and `{H}` then fit the first event."""
        self.bind(h=hero, home=self.pick(*world.HOMES))
        self.bind(line=self.part(self.pick(*world.TRAITS[hero.trait])))
        way = self.pick("day", "hero", "hero", "day and hero", "neither")
        if way.startswith("day"):
            self._say_day()
        if way.endswith("hero"):
            self._say_hero(hero)
        first = self.pick(
            hero.aged,
            f"{world.article(hero.girl)} called {hero.name}",
            f"{world.article(hero.trait)} {hero.girl} named {hero.name}",
            hero.name,
        )
        self.bind(H=hero.name if way.endswith("hero") else first)
        if way.startswith("day"):
            self.bind(when=self.pick("that day", f"that {self.time}"))
            return
        when = self.pick(
            f"one {self.time} in {self.season}",
            f"one {self.weather} {self.time}",
            f"on a {self.weather} {self.time} in {self.season}",
            f"one {self.season} {self.time}",
        )
        self.bind(when=f"{when}, when {self.bound['sky']}" if self.chance(0.3) else when)

    def _say_day(self) -> None:
        self.say(
            "It was a {weather} {time} in {season}, and {sky}.",
            "It was a {weather} {season} {time}. {sky}.",
            "{sky}, for it was a {weather} {time} in {season}.",
            "It was {season}, and {sky}.",
        )
        self.ask("Was it spring, summer, autumn or winter?", "It was {season}.")
        if self.weather in self.told[-1]:
            self.ask(
                "What was the weather like?", self.pick("It was a {weather} {time}.", "It was {weather} that {time}.")
            )

    def _say_hero(self, hero: Person) -> None:
        self.may(
            "In the village by the river lived a {h.girl} named {h}. {line}.",
            "{h} was a {h.trait} {h.girl} who lived {home}.",
            "There was once a {h.trait} {h.girl} called {h}, and {line}.",
            "A {h.girl} named {h} lived {home}. {line}.",
            "{h} lived {home}. {h.he} was a {h.trait} {h.girl}, and {line}.",
            "Everybody in the village knew {h}, a {h.trait} {h.girl} who lived {home}.",
            "{h} was known in the whole village: {line}.",
            "People said that no {h.girl} was as {h.trait} as {h}. {line}.",
        )
        if hero.trait in self.told[-1]:
            self.ask("What kind of {h.girl} was {h}?", "{h} was a {h.trait} {h.girl}.")
        if str(self.bound["home"]) in self.told[-1]:
            self.ask("Where did {h} live?", "{h} lived {home}.")

    def close(self, *options: str) -> None:
        """End with the plot's own consequence, now and then with a look at the hero or the sky."""
        self.say(*options)
        hero = self.bound["h"]
        assert isinstance(hero, Person)
        if self.chance(0.4):
            return
        if any(hero.trait in sentence for sentence in self.told):
            self.may(*world.TRAIT_ENDINGS[hero.trait])
        elif self.chance(0.4):
            self.may(
                "It had been a good day.",
                "{h} never forgot it.",
                "And that is how it was.",
                "[Outside|Far away], an owl called twice.",
                "[The river|The mill] went on singing, as it always did.",
            )

    # ---- the finished story

    def story(self, plot: str, max_words: int) -> Story:
        """Leave out what the story can do without until it is short enough, and put first mentions right."""
        kept = list(range(len(self.told)))
        spare = sorted(self._optional)
        self.rng.shuffle(spare)
        while spare and sum(len(self.told[index].split()) for index in kept) > max_words:
            kept.remove(spare.pop())
        return Story(
            plot=plot,
            hero=str(self.bound["h"]),
            about=_right_articles(str(self.bound["about"])),
            sentences=tuple(_introduce([self.told[index] for index in kept])),
            questions=tuple(question for index, question in self._asked if index in kept),
        )


def _right_articles(text: str) -> str:
    return _ARTICLE.sub(lambda found: found.group(1) + world.article(found.group(2))[1 : -len(found.group(2))], text)


def _introduce(told: list[str]) -> list[str]:
    """Name the craft of a grown-up at the first mention, wherever that is now, and only there."""
    for person in world.CRAFTSPEOPLE:
        mention = re.compile(rf"\b{person.name}( the {person.craft})?\b")
        seen = False
        for index, text in enumerate(told):
            if person.name not in text:
                continue
            parts = []
            end = 0
            for found in mention.finditer(text):
                parts += [text[end : found.start()], person.name if seen else person.full]
                seen, end = True, found.end()
            told[index] = "".join([*parts, text[end:]])
    return told
