"""The village of our stories: who lives there, what they own, where things hide and what the sky does."""

from __future__ import annotations

from dataclasses import dataclass

_PRONOUNS = {
    "f": ("she", "her", "her", "herself", "girl"),
    "m": ("he", "him", "his", "himself", "boy"),
    "n": ("it", "it", "its", "itself", "animal"),
}


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it, by how its first word sounds."""
    first = phrase.split(" ", 1)[0].lower()
    vowel = first[:1] in "aeiou" and not first.startswith(("one", "use", "uni"))
    return f"{'an' if vowel or first in ('hour', 'honest') else 'a'} {phrase}"


@dataclass(frozen=True)
class Person:
    """Somebody in a story; templates read the attributes, so `{h.he}` is always the right pronoun."""

    name: str
    gender: str
    trait: str = ""
    craft: str = ""
    place: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def he(self) -> str:
        return _PRONOUNS[self.gender][0]

    @property
    def him(self) -> str:
        return _PRONOUNS[self.gender][1]

    @property
    def his(self) -> str:
        return _PRONOUNS[self.gender][2]

    @property
    def He(self) -> str:
        return self.he.capitalize()

    @property
    def His(self) -> str:
        return self.his.capitalize()

    @property
    def self(self) -> str:
        return _PRONOUNS[self.gender][3]

    @property
    def girl(self) -> str:
        return _PRONOUNS[self.gender][4]

    @property
    def s(self) -> str:
        return f"{self.name}'s"

    @property
    def the(self) -> str:
        """A grown-up by craft ("the baker"), anybody else by name."""
        return f"the {self.craft}" if self.craft else self.name

    @property
    def full(self) -> str:
        """The name with the craft, for a first mention."""
        return f"{self.name} the {self.craft}" if self.craft else self.name

    @property
    def aged(self) -> str:
        """A first mention that tells the age: "old Tomas the carpenter", "a boy named Ben"."""
        return f"old {self.full}" if self.craft else f"{article(self.girl)} named {self.name}"


@dataclass(frozen=True)
class Kind:
    """A kind of thing that a story can be about, with what its owner does with it."""

    noun: str
    joy: str
    light: bool = False
    shiny: bool = False
    toy: bool = False


@dataclass(frozen=True)
class Thing:
    """One thing with its colour, which stays the same through the whole story."""

    kind: Kind
    colour: str

    def __str__(self) -> str:
        return self.kind.noun

    @property
    def full(self) -> str:
        return f"{self.colour} {self.kind.noun}"

    @property
    def the(self) -> str:
        return f"the {self.full}"

    @property
    def a(self) -> str:
        return article(self.full)

    @property
    def joy(self) -> str:
        return self.kind.joy


GIRLS = ("Ada", "Clara", "Elsa", "Greta", "Kira", "Mina", "Nora", "Olive", "Rosa", "Tilda", "Vera", "Yara")
BOYS = ("Ben", "Dov", "Finn", "Hugo", "Leo", "Max", "Milo", "Omar", "Pavel", "Sami", "Theo", "Wim")

# Crafts never change hands, so a model trained on the corpus has facts of the world to know.
CRAFTSPEOPLE = (
    Person("Tomas", "m", craft="carpenter", place="workshop"),
    Person("Marta", "f", craft="baker", place="bakery"),
    Person("Otto", "m", craft="miller", place="mill"),
    Person("Agnes", "f", craft="gardener", place="garden"),
    Person("Bruno", "m", craft="blacksmith", place="forge"),
    Person("Irma", "f", craft="weaver", place="weaving room"),
    Person("Silas", "m", craft="clockmaker", place="clock shop"),
    Person("Petra", "f", craft="potter", place="pottery"),
    Person("Edgar", "m", craft="beekeeper", place="bee yard"),
    Person("Hanna", "f", craft="shoemaker", place="shoe shop"),
    Person("Jakob", "m", craft="fisherman", place="boat house"),
    Person("Lotte", "f", craft="teacher", place="school"),
    Person("Felix", "m", craft="postman", place="post house"),
    Person("Wilma", "f", craft="trader", place="market"),
    Person("Rufus", "m", craft="shepherd", place="high meadow"),
    Person("Emil", "m", craft="farmer", place="farm"),
)
BY_CRAFT = {person.craft: person for person in CRAFTSPEOPLE}

# (name, what it is, its colour, where it sleeps)
ANIMALS = (
    ("Pepper", "cat", "grey", "on the warm oven in the bakery"),
    ("Biscuit", "dog", "brown", "under the bench in the workshop"),
    ("Clover", "goat", "white", "in the shed behind the school"),
    ("Barley", "donkey", "grey", "in the stable by the mill"),
    ("Duchess", "goose", "white", "beside the pond"),
    ("Hazel", "hen", "brown", "in the hen house"),
)

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange", "purple", "grey")
METALS = ("silver", "golden", "copper")

KINDS = (
    Kind("kite", "flew it over the hill", light=True, toy=True),
    Kind("ball", "rolled it down the lane", toy=True),
    Kind("lantern", "carried it through the dark lanes"),
    Kind("bell", "rang it at the garden gate", shiny=True),
    Kind("scarf", "wore it on cold days", light=True),
    Kind("hat", "wore it in the sun", light=True),
    Kind("whistle", "blew it to call the dog", shiny=True, toy=True),
    Kind("drum", "played it at every feast", toy=True),
    Kind("flute", "played it by the river", toy=True),
    Kind("basket", "carried eggs in it"),
    Kind("cup", "drank warm milk from it"),
    Kind("spoon", "stirred the soup with it", shiny=True),
    Kind("key", "opened the garden gate with it", shiny=True),
    Kind("ribbon", "tied it around the best presents", light=True),
    Kind("blanket", "slept under it every night", light=True),
    Kind("box", "kept small stones in it"),
    Kind("book", "read it by the window"),
    Kind("boat", "sailed it on the pond", toy=True),
    Kind("doll", "took it everywhere", toy=True),
    Kind("bucket", "carried water in it"),
)
BY_NOUN = {kind.noun: kind for kind in KINDS}

HOMES = (
    "near the mill",
    "beside the river",
    "at the edge of the forest",
    "in the house with the green door",
    "behind the school",
    "at the top of the hill",
    "on the market square",
    "next to the old bridge",
)

TRAITS: dict[str, tuple[str, ...]] = {
    "curious": (
        "{h.he} wanted to know how everything worked",
        "{h.he} asked questions from morning to night",
        "no closed box was safe from {h.him}",
    ),
    "patient": (
        "{h.he} could wait a whole day for one small bird",
        "{h.he} never hurried and never shouted",
        "when others gave up, {h.he} simply began again",
    ),
    "brave": (
        "{h.he} was not afraid of the dark, or of geese",
        "{h.he} climbed the highest tree in the village",
        "{h.he} always went first",
    ),
    "shy": (
        "{h.he} spoke so softly that people had to bend down",
        "{h.he} liked to stand behind somebody bigger",
        "{h.he} had many thoughts and used few words",
    ),
    "careful": (
        "{h.he} counted everything twice",
        "{h.he} never left the house without a piece of string",
        "{h.he} looked at each stone before {h.he} stepped on it",
    ),
    "hasty": (
        "{h.he} was always in a hurry",
        "{h.he} ran down every lane, even with nothing to do at the end of it",
        "{h.he} often put {h.his} shoes on the wrong feet",
    ),
    "stubborn": (
        "{h.he} never gave up, not even when it was time to eat",
        "the word no meant very little to {h.him}",
        "once {h.he} had a plan, nothing could stop {h.him}",
    ),
    "cheerful": (
        "{h.he} sang while {h.he} worked",
        "{h.he} laughed at the rain and at the wind",
        "people smiled when {h.he} came around the corner",
    ),
    "dreamy": (
        "{h.he} saw ships and castles in the clouds",
        "{h.he} often forgot where {h.he} was going",
        "{h.he} walked slowly, with {h.his} eyes on the sky",
    ),
    "clever": (
        "{h.he} could find an answer to almost anything",
        "{h.he} always had a better plan",
        "even the teacher asked {h.him} for advice",
    ),
    "kind": (
        "{h.he} fed the birds before {h.he} fed {h.self}",
        "{h.he} shared every apple",
        "nobody was ever alone for long when {h.he} was near",
    ),
    "proud": (
        "{h.he} did not like to ask for help",
        "{h.he} wanted to be the best at everything",
        "{h.he} held {h.his} head high, even in the mud",
    ),
}

# What can be said of a trait once the story is over.
TRAIT_ENDINGS: dict[str, tuple[str, ...]] = {
    "curious": ("By bedtime {h} already had a new question.",),
    "patient": ("{h} only smiled. Good things take time.",),
    "brave": ("For the first time, {h} said that {h.he} had been a little afraid.",),
    "shy": ("{h} did not say much, but {h.his} eyes were bright.",),
    "careful": ("Then {h} counted everything twice, just to be sure.",),
    "hasty": ("And for once, {h} walked home slowly.",),
    "stubborn": ("It had been good, this time, not to give up.",),
    "cheerful": ("{h} sang all the way home.",),
    "dreamy": ("On the way home {h} saw the whole story again in the clouds.",),
    "clever": ("{h} was already thinking of a better way to do it.",),
    "kind": ("{h} saved a piece of bread for the birds, as always.",),
    "proud": ("{h} was still proud, but in a quieter way.",),
}

SKIES: dict[str, tuple[str, ...]] = {
    "sunny": (
        "the sun shone on every roof",
        "there was not a cloud in the sky",
        "the river was bright with light",
    ),
    "warm": (
        "the air was soft and warm",
        "the bees were busy in the grass",
        "people sat in front of their doors",
    ),
    "windy": (
        "the wind pulled at every door",
        "leaves danced down the lane",
        "the wind blew hats into the river",
    ),
    "rainy": (
        "rain ran down the windows",
        "the lanes were full of mud",
        "grey rain fell on the garden",
    ),
    "foggy": (
        "fog lay over the fields like milk",
        "nobody could see the end of the lane",
        "the bridge was lost in the fog",
    ),
    "cold": (
        "there was ice on the well",
        "smoke rose from every roof",
        "the ground was as hard as stone",
    ),
    "snowy": (
        "snow lay on the roofs",
        "the whole village was white and quiet",
        "the snow reached the window sills",
    ),
    "cloudy": (
        "low clouds hung over the hill",
        "the sky was as grey as a pot",
        "the sun hid behind the clouds",
    ),
}

SEASON_SKIES = {
    "spring": ("sunny", "rainy", "windy", "cloudy", "warm", "foggy"),
    "summer": ("sunny", "warm", "windy", "cloudy", "rainy"),
    "autumn": ("windy", "rainy", "foggy", "cloudy", "sunny"),
    "winter": ("cold", "snowy", "cloudy", "foggy", "windy"),
}

# where things and animals that are looked for may be
HIDING_PLACES = (
    "under the bench in the workshop",
    "behind the flower pots",
    "in the old apple tree",
    "beside the well",
    "on the roof of the shed",
    "in the hay of the barn",
    "between the baskets at the market",
    "under the old bridge",
    "in the grass beside the pond",
    "behind the sacks at the mill",
    "under the big table in the kitchen",
    "among the cabbages",
)
