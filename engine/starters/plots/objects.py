"""Plots about things: something is lost, broken, traded, built or handed on."""

from __future__ import annotations

from engine.starters.telling import Teller
from engine.starters.world import BY_NOUN, HIDING_PLACES, KINDS


def lost(t: Teller) -> None:
    """A child loses something dear, looks in the wrong places and learns why it was gone."""
    t.scene()
    h = t.child("h")
    k = t.thing("k", KINDS)
    t.bind(about=f"{h.he} lost {k.a}", g=t.pick("grandmother", "grandfather", "mother", "aunt", "uncle"))
    t.opening(h)
    t.say(
        "{H} had {k.a}. {h.his} {g} had [made it for {h.him}|given it to {h.him}], and {h} {k.joy}.",
        "{H} owned {k.a}, a present from {h.his} {g}. {h.he} {k.joy}.",
        "[Most of all|More than anything else], {H} loved {k.the}, which {h.his} {g} had [made|found at the market].",
    )
    t.asks_colour("k")
    t.ask("Who gave {h} the {k}?", "{h.his} {g} gave it to {h.him}.")
    t.say(
        "But {when}, the {k} was not [in its place|on its shelf|where it should be].",
        "{when}, {h} looked for the {k}, and it was gone.",
        "But {when}, {h} could not find the {k} anywhere.",
    )
    place, wrong, other = t.rng.sample(HIDING_PLACES, 3)
    t.bind(p=place, w=wrong, o=other)
    t.may(
        "{h.he} [looked|searched] {w}. {h.he} [looked|searched] {o}. [Nothing|There was only dust].",
        "[First|At first] {h.he} looked {w}, then {o}, but [there was no {k}|the {k} was not there].",
        "{h.he} searched {w} and found [an old shoe|two feathers|a sleepy cat]. {h.he} searched {o} and found nothing.",
    )
    t.craftsperson("c")
    t.may(
        '"Have you seen {k.a}?" {h.he} asked {c.full}. "No," said {c}, "but [think back|go back in your mind]. '
        'Where did you have it last?"',
        'At last {h.he} asked {c.full} for help. "[When things are lost|When you lose a thing]," said {c}, '
        '"do not run. [Sit down and think|Stand still and look]."',
        '{c.full} saw {h.his} sad face. "[Lost things like quiet places|A lost thing is never far]," said {c}. '
        '"Look where nobody looks."',
    )
    t.ask("Who gave {h} advice?", "{c.full} gave {h} advice.")
    cause = t.pick("animal", "self", "crow" if k.kind.shiny else "animal", "wind" if k.kind.light else "self")
    if cause in ("crow", "wind"):
        t.bind(p=t.pick("in the old apple tree", "on the roof of the shed", "high up under the roof of the barn"))
    if cause == "animal":
        t.animal("x", "cat", "dog", "goat")
        t.say(
            "Then something moved {p}. It was {x} the {x_kind}, fast asleep on the {k}.",
            "[Just then|A little later] {h} heard a [soft|strange] sound {p}. There lay {x}, the {x_colour} {x_kind}, "
            "with the {k} between its feet.",
            "{h} saw small [marks|footprints] in the [dust|mud] and followed them. {p} sat {x} the {x_kind}, "
            "and beside it lay the {k}.",
        )
        t.ask("Who had taken the {k}?", "{x} the {x_kind} had taken it.")
        t.may(
            '"So it was you!" {h} [laughed|cried]. {h.He} could not be angry.',
            '"You could have asked," said {h}, and {x} [closed its eyes again|looked away].',
            "{h} scratched {x} behind the ears and [gently|slowly] pulled the {k} free.",
        )
    elif cause == "crow":
        t.say(
            "Just then a crow flew over {h.his} head with something bright in its beak. {h} ran after it and found the "
            "nest, {p}. There lay the {k}, between a button and a piece of glass.",
            "A crow cried above {h.him}. It had a nest {p}, full of bright things, and on top lay the {k}.",
        )
        t.ask("Who had taken the {k}?", "A crow had taken it to its nest.")
        t.may(
            '"[Thief|You thief]!" called {h}, but {h.he} left a [button|piece of glass] in the nest, so that the crow '
            "would not be sad.",
            '"You like bright things, and so do I," {h} told the crow, and took the {k} back.',
        )
    elif cause == "wind":
        t.say(
            "[Then|In that moment] a gust of wind came, and {h} understood. The wind had [taken|stolen] the {k}! "
            "{h.he} followed the wind, and there it was, {p}.",
            "{h} thought of the wind. {h.he} threw a leaf into the air and ran after it. The leaf came down {p}, and "
            "there hung the {k}.",
        )
        t.ask("Who had taken the {k}?", "The wind had taken it.")
    else:
        t.bind(task=t.pick("fed the hens", "picked apples", "helped to sweep", "chased a goose", "carried wood"))
        t.say(
            "{h} sat down and thought. [Yesterday|The day before] {h.he} had {task}, and {h.his} hands had been full. "
            "{h.he} jumped up and ran. There, {p}, lay the {k}.",
            "{h} closed {h.his} eyes. Before supper {h.he} had {task}. {h.he} went the same way again, step by step, "
            "and there was the {k}, {p}.",
        )
    t.ask("Where was the {k}?", "The {k} was {p}.")
    t.ask("Was the {k} {w}?", "No, it was {p}.")
    t.close(
        "From that day on, {h} [kept|put] the {k} [on a nail by the door|under {h.his} pillow] every night.",
        "{h} ran home with the {k} in both hands and told {h.his} {g} everything.",
        "[Afterwards|After that], {h} tied a piece of string to the {k}, and it was never lost again.",
        "That evening {h} made a small shelf for the {k}, and there it stayed.",
        "{h} held the {k} tightly all the way home, and the next night it lay beside {h.his} bed.",
    )


# noun -> (how it broke, what was wrong, who mends it, what is done, material)
_BREAKS = {
    "kite": ("flew into the apple tree", "its paper was torn", "teacher", "glued new paper over the hole", "paper"),
    "drum": ("fell down the stairs", "its skin was split", "shoemaker", "put a new skin on it", "leather"),
    "lantern": (
        "fell off its hook",
        "its glass was cracked",
        "blacksmith",
        "bent the frame and put in new glass",
        "glass",
    ),
    "boat": (
        "hit a stone in the pond",
        "it had a hole in its side",
        "carpenter",
        "closed the hole with thin wood",
        "wood",
    ),
    "basket": ("was too full of stones", "its bottom had come out", "weaver", "wove a new bottom", "straw"),
    "bucket": (
        "was hit by a cart",
        "it lost water on all sides",
        "blacksmith",
        "closed it with a ring of iron",
        "iron",
    ),
    "box": ("was kicked by the donkey", "its lid was broken", "carpenter", "made a new lid", "wood"),
    "blanket": (
        "got caught on the garden gate",
        "it was torn in the middle",
        "weaver",
        "closed the tear with thread",
        "thread",
    ),
    "doll": ("was pulled by two dogs at once", "it had lost an arm", "weaver", "gave it a new arm", "cloth"),
    "cup": ("slipped from wet hands", "its handle was gone", "potter", "made a new handle out of clay", "clay"),
    "flute": ("lay under a heavy chair", "it had a crack from end to end", "carpenter", "tied it and glued it", "glue"),
    "bell": ("fell into the well", "it would not ring", "blacksmith", "gave it a new tongue of iron", "iron"),
}


def repair(t: Teller) -> None:
    """Something breaks, and a craftsperson shows how to mend it instead of mending it alone."""
    t.scene()
    h = t.child("h")
    k = t.thing("k", [BY_NOUN[noun] for noun in _BREAKS])
    broke, wrong, craft, mends, material = _BREAKS[k.kind.noun]
    t.craftsperson("c", craft)
    t.bind(broke=broke, wrong=wrong, mends=mends, material=material, about=f"{k.a} that broke")
    t.opening(h)
    t.say(
        "{when}, {h.s} {k.full} {broke}. When {h.he} picked it up, {wrong}."
        if str(t.bound["H"]) == h.name
        else "{when}, {H} had bad luck. {h.his} {k.full} {broke}, and {wrong}.",
        "{when}, {H} cried out. {h.his} {k.full} {broke}, and now {wrong}.",
        "{H} had {k.a} and {k.joy}. But {when}, it {broke}, and {wrong}.",
    )
    t.asks_colour("k")
    t.ask("What was wrong with the {k}?", "The {k} {broke}, and {wrong}.")
    t.may(
        '"It is broken for ever," {h.he} said, and [rubbed {h.his} eyes|sat down on the steps].',
        "{h.he} wanted to [hide|throw] it away, but {h.he} could not.",
        "{h} tried to mend it [alone|with string], but [that made it worse|the string did not hold].",
        '"[Do not cry|Dry your eyes]," said {h.his} [mother|father|brother]. "There is somebody who can help."',
    )
    t.say(
        "So {h.he} carried the {k} to {c.full}.",
        "[With the {k} under {h.his} arm|Carefully], {h.he} walked to the {c.place}, where {c} was at work.",
        "{h.he} wrapped the {k} in a cloth and took it to the {c.place}. {c} the {c.craft} was just [sweeping the "
        "floor|having tea].",
    )
    t.ask("Who helped {h} with the {k}?", "{c.full} helped {h}.")
    t.say(
        '{c} turned the {k} [around|over] twice. "[Good|Well]," {c.he} said, "we need {material} and a little time. '
        'And I need two more hands. Yours."',
        '"I will not mend it for you," said {c}. "I will mend it with you. [Bring|Fetch] me some {material}."',
        '"[Can you mend it|Is it very bad]?" asked {h}. "I have seen worse," said {c}. "Give me the {material}, and '
        'watch."',
    )
    t.ask("What did they need to mend the {k}?", "They needed {material}.")
    t.say(
        "{h} held the {k} [still|with both hands] while {c} {mends}.",
        "[Slowly|Bit by bit], {c} {mends}, and {h} [did the last part alone|held everything in place].",
        "First {c} showed {h} how. Then {h.he} tried, [once|twice], and three times, and [together they|between "
        "them they] {mends}.",
    )
    t.may(
        "It took [the whole {time}|a long time|longer than {h} had thought], and nobody spoke.",
        '"[Slow hands make good work|Do not hurry]," said {c}.',
        "Outside it grew [late|dark], but {h} did not notice.",
    )
    t.may(
        "At the end the {k} was [as good as new|almost better than before]. Only a [thin line|small mark] showed "
        "where it had been broken.",
        "When it was done, {h} could [hardly see|still feel] the place where it had been broken.",
        "At last {c} put the {k} into {h.his} hands. It was whole again.",
    )
    pay = t.pick("six eggs", "a jar of honey", "a bag of apples", "a song", "a loaf of bread")
    t.bind(pay=pay)
    t.may(
        '"What do I owe you?" asked {h}. "{pay}," said {c}, "and a promise: next time you try first."',
        "{h} had no money, so {h.he} paid with {pay}.",
        "The next day {h} came back with {pay} to say thank you.",
    )
    t.ask("How did {h} pay {c}?", "{h} paid with {pay}.")
    t.close(
        "Since then, when something breaks in the village, people [send for|ask] {h}, too.",
        "{h} loved the {k} even more now, because {h.he} knew how it was made.",
        "From then on {h} [visited|came to] the {c.place} every week to learn more.",
        "And {h.he} never again left the {k} [lying about|in a bad place].",
    )


_GOODS = (
    "six brown eggs",
    "a bag of nuts",
    "a jar of honey",
    "a round cheese",
    "a basket of pears",
    "two loaves of bread",
)


def trade(t: Teller) -> None:
    """A child wants one thing, the seller wants another, and a chain of trades leads there."""
    t.scene(weathers=("sunny", "warm", "windy", "cloudy", "cold"), times=("morning",))
    h = t.child("h")
    k = t.thing("k", [kind for kind in KINDS if kind.noun not in ("key", "basket", "box")])
    first, second, third = t.rng.sample(_GOODS, 3)
    a, b = t.craftsperson("a"), t.craftsperson("b")
    if "trader" in (a.craft, b.craft):
        a = t.craftsperson("a")
        b = t.craftsperson("b")
    t.bind(g1=first, g2=second, g3=third, about=f"{h.he} traded for {k.a}")
    t.opening(h)
    t.say(
        "{when}, {H} went to the market with {g1}. {h.he} wanted to [bring|take] home something [special|beautiful].",
        "{when}, {H} stood [in front of|before] the stall of Wilma the trader. {h.he} had no money, only {g1}.",
    )
    t.ask("What did {h} bring to the market?", "{h.he} brought {g1}.")
    t.say(
        "[Among|Between] pots and pans lay {k.a}, and {h} [could not look away|forgot everything else].",
        "On the table lay {k.a}. {h} had never wanted anything so much.",
        "There {h.he} saw {k.a}, and {h.his} heart beat faster.",
    )
    t.asks_colour("k")
    t.say(
        'But Wilma shook her head. "I need {g3} today," she said.',
        '"The {k}? That costs {g3}," said Wilma the trader.',
    )
    t.ask("What did Wilma want for the {k}?", "She wanted {g3}.")
    if t.chance(0.5):
        t.say(
            "{h} looked around. {a.full} had {g3}, but {a.he} wanted {g2}.",
            "So {h} went from stall to stall. {a.full} had {g3} and wanted {g2}.",
        )
        t.say(
            "And {b.full} had {g2} and was hungry for exactly what {h} had.",
            'At the [last stall|end of the market] stood {b.full} with {g2}. "I like what you have there," said {b}.',
        )
        t.ask("Who took {g1} from {h}?", "{b.full} took {g1}.")
        t.say(
            "One trade, two trades: [by noon|before the church bell rang] {h} had {g3} in {h.his} hands.",
            "{h} [ran|hurried] from one to the other. {b} was pleased, {a} was pleased, and soon {h.he} had {g3}.",
        )
        t.ask("Who had {g3}?", "{a.full} had {g3}.")
    else:
        t.say(
            "{h} asked at every stall. At last {h.he} found {a.full}, who had {g3} and was hungry.",
            '{h} looked around. There stood {a.full} with {g3}. "[I have enough of that|I eat it every day]," said '
            "{a}. "
            '"What do you have?"',
        )
        t.may(
            "They looked, they smelled, they counted, and then they shook hands.",
            '"Is that a fair trade?" asked {h}. "If both of us smile, it is fair," said {a}.',
        )
        t.say(
            "{a} took {g1}, and {h} took {g3} and [ran|hurried] back.",
            "So {g1} went to {a}, and {g3} went to {h}.",
        )
        t.ask("Who took {g1} from {h}?", "{a.full} took {g1}.")
    t.say(
        'Wilma laughed. "[You have walked a long way for it|You will be a trader one day]," she said, and gave '
        "{h.him} the {k}.",
        '"I did not think you would come back," said Wilma. She [wrapped up|handed over] the {k} with a [smile|bow].',
    )
    t.may(
        "Nobody had paid a coin, and everybody had what they needed.",
        "Nobody at the market had lost, and everybody had won.",
    )
    t.close(
        "{h.his} family [admired|loved] the {k}, and {h.he} {k.joy}.",
        "All the way home {h} [looked at|held] the {k} and [smiled|whistled].",
        "The next market day, three other children tried the same, [and the market was never so loud|and Wilma "
        "needed a chair].",
        "That evening, at home, {h} told the story three times.",
    )


_GIFTS = ("scarf", "cup", "blanket", "spoon", "lantern", "hat", "box", "flute", "bell")


def surprise(t: Teller) -> None:
    """Two friends prepare a secret present, and it is nearly found out."""
    t.scene()
    h = t.child("h")
    t.friend("f", h)
    c = t.craftsperson("c")
    k = t.thing("k", [BY_NOUN[noun] for noun in _GIFTS])
    place = t.pick(*HIDING_PLACES)
    t.bind(p=place, about=f"a surprise for {c.full}")
    t.opening(h)
    t.say(
        '{when}, {H} had a plan. "Tomorrow is the birthday of {c.full}," {h.he} told {h.his} friend {f}. '
        '"Let us make a present."'
        if t.bound["H"] == h.name
        else '{when}, {H} came running to {h.his} friend {f}. "Tomorrow is the birthday of {c.full}," {h.he} said. "We need a present."',
        "{when}, {H} and {h.his} friend {f} had a secret. They were making something for the birthday of {c.full}.",
    )
    t.ask("Whose birthday was it?", "It was the birthday of {c.full}.")
    t.say(
        "It was {k.a}. {h} [did the hard parts|worked on it for six evenings], and {f} [rubbed it clean|added the "
        "colour].",
        "They [saved|put together] all their coins and bought {k.a} at the market.",
        "{f} had {k.a} that only needed a good wash. {h} had [paper|a long ribbon] to wrap it in.",
    )
    t.asks_colour("k")
    t.may(
        "They hid the {k} {p}.",
        '"Nobody will look {p}," said {f}, and that is where they hid the {k}.',
    )
    t.ask("Where did they hide the {k}?", "They hid it {p}.")
    t.may(
        'But then {c} came by. "What are you doing here?" {c.he} asked. "Counting [ants|clouds]," said {f} '
        "[quickly|and turned red].",
        'Just then the door opened and {c} looked in. {h} [sat down on|stood in front of] the {k}. "We are only '
        'playing," {h.he} said.',
        "Twice {c} walked right past it, and twice {h} and {f} [held their breath|began to sing very loudly].",
    )
    t.may(
        "All day {c} looked a little sad. {c.he} thought that everybody had forgotten.",
        '"Nobody remembers," thought {c}, and [went on working|sighed].',
    )
    t.say(
        "The next morning, {c} [opened the door|came out], and there stood half the village. [Everyone sang|Someone "
        "played a drum].",
        "In the morning a [small|strange] package lay on {c.his} step. {c} opened it with [slow|careful] fingers.",
    )
    t.may(
        'When {c.he} saw the {k}, {c} had to sit down. "For me?" {c.he} asked. "For you," said {h} and {f}.',
        '"[Nobody has given me a present|I have not had a present] for twenty years," said {c}, and held the {k} to '
        "the light.",
        '"So that was your secret!" [laughed|cried] {c}, and [pulled|took] both children into {c.his} arms.',
    )
    t.close(
        "{c} {k.joy} from that day on, and never went anywhere without it."
        if k.kind.noun in ("scarf", "hat")
        else "From that day on the {k} had the best place in the {c.place}.",
        "There was cake for everybody, and {c} told stories until the moon came up.",
        "{h} and {f} had learned that a secret is heavy, but giving is light.",
        "And [when|whenever] {c} looked at the {k}, {c.he} [smiled|thought of two friends].",
    )


def honesty(t: Teller) -> None:
    """A child breaks something that is not theirs and tells the truth."""
    t.scene()
    h = t.child("h")
    c = t.craftsperson("c", "potter", "baker", "clockmaker", "weaver", "teacher", "carpenter")
    item = {
        "potter": "bowl",
        "baker": "big dish",
        "clockmaker": "glass clock",
        "weaver": "wooden wheel",
        "teacher": "globe",
        "carpenter": "chair",
    }[c.craft]
    t.bind(item=item, toy=t.pick("a ball", "a stick", "a big stone", "a hoop"), about=f"{h.he} broke a {item}")
    t.opening(h)
    t.say(
        "{when}, {H} was [playing|running about] with {toy} near the {c.place}, although {c.full} had [warned|told] "
        "{h.him} not to.",
        "{when}, {H} was alone in the {c.place}, because {c.full} had gone [to the well|for flour|to the market]. "
        "{h.he} played with {toy}.",
    )
    t.say(
        "[Crash|Bang]! {c.s} best {item} lay on the floor in [three|many] pieces.",
        "There was a terrible noise. The best {item} of the {c.craft} fell down and broke.",
    )
    t.ask("What did {h} break?", "{h} broke the {item} of {c.full}.")
    t.may(
        "{h} stood very still. Nobody had seen it. {h.he} could [run away|blame the cat], and nobody would ever know.",
        'A bad thought came to {h}: "I could say that it was the [goat|cat|wind]." {h.his} cheeks grew hot.',
        "{h} picked up the pieces and hid them under a sack. But {h.his} heart beat so loudly that {h.he} [could "
        "not go|stayed].",
    )
    t.may(
        "{h.he} walked to the door and back, three times.",
        "The longer {h.he} waited, the [heavier|worse] {h.he} felt.",
        "Every step outside made {h.him} jump.",
    )
    t.say(
        'When {c} came in, {h} took a deep breath. "It was me," {h.he} said. "I broke it, and I am sorry."',
        'Then {c} came back. "I have to tell you something," said {h}, and told the whole truth in one breath.',
    )
    t.ask("Did {h} tell the truth?", "Yes, {h} told {c} the truth.")
    t.say(
        '{c} was quiet for a while. "[A {item} can be made again|That was my best one]," {c.he} said, "but the truth '
        'is hard to make. Thank you."',
        '"[I loved that {item}|It was very old]," said {c}. "But I love an honest child more."',
        '{c} frowned, and then {c.his} face grew soft. "It took more [courage|strength] to tell me than to run," '
        "{c.he} said.",
    )
    work = t.pick("swept the floor", "carried water", "washed the windows", "cut wood", "fed the animals")
    t.bind(work=work)
    t.may(
        "To make up for it, {h} {work} for {c} the whole week.",
        'Every afternoon {h} {work} for {c}, until {c.he} said, "Now we are even."',
        "{h} {work} until the sun went down. Nobody had asked {h.him} to.",
    )
    t.ask("What did {h} do to make up for it?", "{h.he} {work} for {c}.")
    t.close(
        "At the end of the week they made a new {item} together, [a little crooked but strong|and {h} was allowed "
        "to choose the colour].",
        "The broken pieces stayed on a shelf, and {c} called them the most honest pieces in the house.",
        "That evening {h} felt as light as a feather.",
        "And {toy} stayed at home from then on.",
    )


def letter(t: Teller) -> None:
    """A letter must reach somebody, and what it says changes a day."""
    t.scene()
    h = t.child("h")
    c = t.craftsperson("c", "miller", "beekeeper", "shepherd", "fisherman", "gardener", "potter", "weaver", "farmer")
    sender = t.pick("sister", "brother", "son", "daughter", "oldest friend")
    t.bind(sender=sender, about=f"a letter for {c.full}")
    t.opening(h)
    t.say(
        "{when}, Felix the postman had [a bad foot|hurt his knee] and could not walk. "
        '"Who will carry this letter to {c.full}?" he asked. "I will," said {H}.'
        if t.bound["H"] == h.name
        else "{when}, {H} met Felix the postman, who had hurt his knee. {h} promised to carry a letter to {c.full}.",
        "{when}, {H} found a letter in the [grass|mud] beside the lane. On it stood the name of {c.full}.",
    )
    t.ask("Who was the letter for?", "The letter was for {c.full}.")
    obstacle = t.pick("goose", "bridge", "rain", "wind")
    if obstacle == "goose":
        t.may(
            "On the way stood Duchess, the white goose, and [hissed|spread its wings]. {h} [bowed politely|threw it "
            "a piece of bread] and walked on.",
            "Duchess the goose wanted to eat the letter. {h} held it high above {h.his} head and ran.",
        )
        t.ask("Who stood in the way?", "Duchess the goose stood in the way.")
    elif obstacle == "bridge":
        t.may(
            "The old bridge had lost two boards. {h} put the letter between {h.his} teeth and [jumped|climbed across].",
            "There was a hole in the bridge, so {h} took off {h.his} shoes and walked through the cold river.",
        )
        t.ask("What was wrong on the way?", "The old bridge was broken.")
    elif obstacle == "rain":
        t.may(
            "A sudden rain came down. {h} put the letter under {h.his} [shirt|hat] and kept it dry.",
            "Soon big drops fell. {h} did not mind getting wet, but the letter must not, so {h.he} hid it under "
            "{h.his} coat.",
        )
        t.ask("How did {h} keep the letter dry?", "{h} hid it under {h.his} clothes.")
    else:
        t.may(
            "A gust of wind pulled the letter out of {h.his} hand. {h.he} [chased|followed] it over two fences and "
            "caught it at last.",
            "The wind wanted the letter for itself. It blew it into a tree, and {h} had to climb after it.",
        )
        t.ask("What did the wind do?", "The wind took the letter, and {h} had to chase it.")
    t.say(
        "{c} was at the {c.place}. When {c.he} saw the letter, {c.his} hands shook a little.",
        'At the {c.place}, {c} looked up. "For me?" {c.he} said. "Nobody has written to me since [last winter|last '
        'year|the big flood]."',
        'At the {c.place}, {c} [wiped|dried] {c.his} hands. "My eyes are bad," {c.he} said. "Will you read it to me?"',
    )
    news = t.pick(
        "was coming to visit on Sunday",
        "had a new baby",
        "was well again after a long illness",
        "was coming home from the sea",
        "wanted to say sorry for an old quarrel",
    )
    t.bind(news=news)
    t.say(
        "The letter was from {c.his} {sender}, [far away|beyond the hills]. It said that {c.his} {sender} {news}.",
        "The letter came from {c.his} {sender}, who {news}.",
    )
    t.ask("Who had written the letter?", "The {sender} of {c.full} had written it.")
    t.ask("What did the letter say?", "It said that the {sender} of {c} {news}.")
    t.may(
        "{c} laughed and cried at the same time.",
        "{c} read it [again|twice more], and then {c.he} danced around the table.",
        "For a long time {c} said nothing. Then {c.he} [put the letter next to {c.his} heart|kissed the paper].",
    )
    t.close(
        "As a thank you, {h} got [a warm cake|a jar of honey|a bag of nuts], and the two of them wrote an answer "
        "together.",
        "{h} walked home slowly. It was only paper, {h.he} thought, and yet it had changed a whole day.",
        "From then on, {h} helped with the letters every week.",
        "On Sunday there was one more chair at the table of {c}, and one for {h}, too."
        if "Sunday" in news
        else "That evening {c} put a light in the window, and {h} knew why.",
    )


PLOTS = (lost, repair, trade, surprise, honesty, letter)
