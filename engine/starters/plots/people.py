"""Plots between people: neighbours, friends, rivals and feasts."""

from __future__ import annotations

from engine.starters.telling import Teller
from engine.starters.world import BY_NOUN, KINDS


def neighbour(t: Teller) -> None:
    """Somebody cannot do a daily task, and a child takes it over without a fuss."""
    t.scene(seasons=("autumn", "winter", "spring"))
    h = t.child("h")
    c = t.craftsperson("c")
    ill = t.pick("had a bad cold", "had hurt {c.his} back", "had a broken arm", "could not get out of bed")
    t.bind(ill=t.part(ill), about=f"{h.he} helped {c.full}")
    t.opening(h)
    t.say(
        "{when}, {H} noticed that there was no smoke over the house of {c.full}.",
        "{when}, {H} walked past the {c.place}. The door was closed, and it was strangely quiet.",
        "{when}, people told {H} that {c.full} was not at work. That had not happened for twenty years.",
    )
    t.say(
        '{h} knocked and went in. {c} {ill}. "[It is nothing|Do not worry about me]," said {c}, but it was not '
        "nothing.",
        "{h} looked through the window. {c} lay in bed with a grey face. {c.he} {ill}."
        if "bed" not in ill
        else "{h} looked through the window. {c} lay there with a grey face and {ill}.",
    )
    t.ask("What was wrong with {c}?", "{c} {ill}.")
    first, second = t.rng.sample(
        (
            "carried in wood and made a fire",
            "cooked a pot of soup",
            "fetched water from the well",
            "fed the hens",
            "swept the kitchen",
            "washed the dishes",
            "warmed some milk",
        ),
        2,
    )
    t.bind(d1=first, d2=second)
    t.say(
        "{h} did not ask many questions. {h.he} {d1}, and then {h.he} {d2}.",
        "[So|Without a word], {h} {d1}. When that was done, {h.he} {d2}.",
    )
    t.ask("What did {h} do for {c}?", "{h} {d1} and {d2}.")
    t.may(
        "The soup was a little burned, but {c} ate every spoon of it."
        if "soup" in first + second
        else "It was not perfect, but it was done.",
        '"[Who taught you that|Where did you learn that]?" asked {c}. "You did," said {h}. "I was watching."',
        "{c} watched from the bed and forgot, for a while, that it hurt.",
    )
    t.may(
        "[{h} came back|{h.he} came again] the next day, and the day after that, before school and after school.",
        "For [ten days|two weeks|a whole month], {h} came every morning. {h.he} never said how early {h.he} had to "
        "get up.",
        "The other children heard of it, and soon there was a list on the door: one name for every day.",
    )
    t.may(
        "In the evenings {c} told {h.him} [about the old days|stories about the great flood|how the bridge was "
        'built]. "Nobody has ever '
        'listened so well," {c.he} said.',
        "{c} could not pay, so {c.he} paid with stories, and {h} wanted no other coin.",
    )
    present = t.thing("k", [BY_NOUN[noun] for noun in ("scarf", "box", "cup", "spoon", "basket", "lantern", "flute")])
    t.say(
        "At last {c} could [stand|work] again. The first thing {c.he} did was to bring {h} {k.a}, [made|finished] "
        "in all "
        "those quiet hours.",
        "Then came the day when smoke rose over the house again. {c} stood in the door and gave {h} {k.a}.",
        "When {c} was well again, {c.he} knocked at {h.s} door. In {c.his} hands was {k.a}, wrapped in [a "
        "cloth|leaves].",
    )
    t.ask("What did {h} get from {c}?", f"{{h}} got {present.a}.")
    t.close(
        '"We are neighbours," said {h}. "No," said {c}. "Now we are friends."',
        "And when {h} was ill the next winter, guess who came with soup.",
        "{h} learned that a village is not made of houses.",
        "After that, two people watched for smoke in the morning, each at the other's roof.",
    )


def quarrel(t: Teller) -> None:
    """Two friends fight over one thing and find a way back."""
    t.scene()
    h = t.child("h")
    t.friend("f", h)
    k = t.thing("k", [kind for kind in KINDS if kind.toy])
    t.bind(about=f"a quarrel about {k.a}")
    t.opening(h)
    t.say(
        "{when}, {H} and {h.his} best friend {f} found {k.a} [under the bridge|beside the lane|in the grass].",
        "{h} and {f} were the best of friends. But {when}, they found {k.a} [near the pond|behind the barn].",
    )
    t.ask("What did {h} and {f} find?", "They found {k.a}.")
    t.asks_colour("k")
    t.say(
        '"I saw it first!" cried {h}. "But I picked it up!" cried {f}.',
        '"It is mine," said {h}. "No, mine," said {f}. They said it twenty times.',
        "Both of them reached for it at the same moment, and neither would let go.",
    )
    t.say(
        "They pulled, and they pushed, and then {h} said a word that {h.he} [was sorry for|did not mean]. {f} went "
        "home without [looking back|the {k}].",
        "{h} pulled so hard that {f} fell into the mud. {f} got up, [very white|very quiet], and walked away.",
        '"Then keep it!" said {f}. "I do not want to play with you any more." And {f.he} was gone.',
    )
    t.may(
        "Now the {k} belonged to {h} alone. {h.he} tried to play, but [it was no fun|one is not enough for a game].",
        "{h} sat on the steps with the {k}. It did not look so [bright|beautiful] any more.",
        "That night {h} could not sleep. The {k} lay beside {h.him}, and it felt [cold|like a stone].",
    )
    t.craftsperson("c")
    t.may(
        '{c.full} saw {h} sitting there. "What is heavier, a {k} or a friend?" asked {c}, and went on working.',
        '"You look as if you had won and lost on the same day," said {c.full}. And that was exactly how it felt.',
    )
    how = t.pick("door", "middle", "note")
    if how == "door":
        t.say(
            'In the morning {h} stood at {f.s} door. "It is yours," {h.he} said. "I am sorry." At the same moment '
            '{f} said, "I am sorry, too."',
            "{h} took the {k} and walked to the house of {f}. That walk was only a hundred steps, and it was the "
            'longest of {h.his} life. "I am sorry," {h.he} said. "So am I," said {f}.',
        )
    elif how == "middle":
        t.say(
            "The next day both of them set out at the same time, and they met in the middle of the bridge. Nobody "
            "knew what to say. Then {f} laughed, and {h} laughed, too.",
        )
    else:
        t.say(
            "{h} could not say it, so {h.he} wrote it: [I was wrong|I am sorry]. {h.he} put the paper and the {k} "
            "on {f.s} step and ran. But {f} was faster.",
        )
    t.ask(
        "How did the quarrel end?", t.pick("{h} said sorry, and they were friends again.", "They were friends again.")
    )
    rule = t.pick(
        "on even days it was with {h}, on odd days with {f}",
        "it stayed at the school, where everybody could use it",
        "one week it lived with {h}, the next week with {f}",
        "they only played with it when both of them were there",
    )
    t.bind(rule=t.part(rule))
    t.say(
        "From then on they shared the {k}: {rule}.",
        "They thought about it for a while, and then they had a plan. With the {k} it was like this: {rule}.",
    )
    t.ask("How did they share the {k}?", "It was like this: {rule}.")
    t.close(
        "They quarrelled again, of course, but never for longer than an hour.",
        "The {k} got old and lost its {k.colour} colour. The friendship did not.",
        '"What a silly quarrel," said {f}. "The silliest," said {h}. They were proud of it.',
        'And when somebody asked whose {k} it was, they both said, "Ours."',
    )


def newcomer(t: Teller) -> None:
    """A new child is alone until somebody finds the right way to ask."""
    t.scene()
    h = t.child("h")
    f = t.friend("f", h)
    skill = t.pick(
        ("whistle like a bird", "whistled back, exactly like a blackbird"),
        ("draw animals", "drew a fox in the dust with a stick"),
        ("juggle with apples", "kept four apples in the air at the same time"),
        ("tie any knot", "tied a knot that nobody could open"),
        ("tell stories", "told a story about a fish that wanted to fly"),
        ("throw stones over the water", "threw a flat stone, and it jumped nine times"),
    )
    t.bind(skill=skill[0], showed=skill[1], about=f"a new child named {f}")
    t.opening(h)
    t.say(
        "{when}, a new family came to the village with [one cart|two carts] and a {f.girl} named {f}.",
        '{when}, a {f.girl} stood at the door of the school. "This is {f}," said Lotte the teacher. "[Be kind to '
        '{f.him}|{f.He} is new here]."',
    )
    t.ask("Who was new in the village?", "{f} was new in the village.")
    if "{H}" not in t.told[-1] and t.bound["H"] != h.name:
        t.say("{H} [saw {f.him} from the window|was watching from the fence].")
    t.may(
        "{f} did not speak. At noon {f.he} sat alone under the big tree and [ate {f.his} bread|looked at {f.his} "
        "shoes].",
        "For three days {f} stood at the edge of every game. Nobody was [bad|mean] to {f.him}, but nobody asked "
        "{f.him} to play.",
        "Some said that {f} was proud. {h} did not think so. {h.he} thought that {f} was [afraid|lonely].",
    )
    t.may(
        '{h} went over. "Do you want to play?" {f} shook {f.his} head. That was not the right question.',
        '"What is your name?" asked {h}, although {h.he} knew it. {f} only looked at the ground.',
        "{h} tried to talk to {f.him} about the weather, about the goat, and about supper. No answer came.",
    )
    t.say(
        "{h} sat down beside {f} and said nothing at all. [They watched the ants|They sat there for a whole "
        "hour]. It was not a bad hour.",
        "The next day {h} brought two apples. {h.he} put one between them and ate the other. After a while, the "
        "second apple was gone, too.",
    )
    t.say(
        "Then {h} tried to {skill}, and it went terribly wrong. {f} smiled. {f.he} stood up and {showed}.",
        '"I wish I could {skill}," said {h} to nobody. {f} stood up and {showed}.',
    )
    t.ask("What could {f} do very well?", "{f} could {skill}.")
    t.may(
        '"How did you do that?" cried {h}. The other children came running. "Again!" they shouted. "Show us!"',
        '{h} stared. "Teach me!" {h.he} said, and then everybody wanted to learn it.',
    )
    t.may(
        '{f} turned red, but {f.his} eyes shone. "[You have to begin slowly|It is easy]," {f.he} said. Those were '
        "{f.his} first words in the village.",
        '"I can show you," said {f}. {f.His} voice was [deep and clear|not small at all].',
    )
    t.close(
        "By [Sunday|the end of the week], half the school could {skill}, and nobody could remember a time without {f}.",
        "From then on there was never an empty place next to {f}.",
        "{h} had found a friend, and all it had taken was a little time.",
        "Years later {f} would say that {f.his} life in the village began with an apple."
        if any("apples" in told for told in t.told)
        else "Years later {f} would say that {f.his} life in the village began under a tree.",
    )


def race(t: Teller) -> None:
    """A race where winning is not what matters in the end."""
    t.scene(
        seasons=("spring", "summer", "autumn"),
        weathers=("sunny", "warm", "windy", "cloudy"),
        times=("morning", "afternoon"),
    )
    h = t.child("h")
    t.friend("f", h)
    t.craftsperson("c")
    vehicle, course = t.pick(
        ("little boats", "down the river to the mill"),
        ("wooden carts", "down the hill to the market square"),
        ("sacks", "once around the pond"),
        ("barrels", "from the bakery to the bridge"),
        ("donkeys", "around the whole village"),
        ("snails", "across the school table"),
    )
    t.bind(vehicle=vehicle, course=course, about=f"a race with {vehicle}")
    t.opening(h)
    t.say(
        "{when}, the big race was held, with {vehicle}, {course}. {H} had waited for it the whole year.",
        "Once a year there was a race with {vehicle}, {course}. {when}, it was time again, and {H} wanted to win.",
    )
    t.ask("What kind of race was it?", "It was a race with {vehicle}.")
    t.ask("Where did the race go?", "It went {course}.")
    t.may(
        '"You have no chance," [said|laughed] {f}, who had won the last two times. "We will see," said {h}.',
        "Everyone thought that {f} would win, because {f} always won. {f} thought so, too.",
        "{c.full} had promised the winner [a whole cake|a golden ribbon|a week without washing dishes].",
    )
    t.may(
        "{h} had [prepared well|practised every evening]. {h.he} knew every stone on the way."
        if vehicle not in ("snails", "little boats")
        else "{h} had prepared well. {h.he} had the lightest one of all, and {h.he} had given it a name.",
        '{c.full} [held up|waved] a cloth. "Ready?" {c.he} called. "Go!"',
    )
    t.may(
        "[At first|From the start], {f} was far ahead. But {h} [did not give up|came closer and closer].",
        "In the middle of the race they were side by side, {h} and {f}, and the people [shouted|threw their hats "
        "into the air].",
        "{h} was [fast|quick], and halfway {h.he} was first. {h.he} could already see the end.",
    )
    turn = t.pick("help", "help", "funny", "slow")
    if turn == "help":
        t.say(
            "Then there was a [cry|noise]. {f} had fallen and held {f.his} foot. {h} looked at the finish. {h} "
            "looked at {f}. Then {h.he} turned around.",
            "Suddenly {f} was not there any more. {f.he} had gone off the path and into a ditch. {h} could have "
            "won. {h.he} stopped.",
        )
        t.ask("Did {h} win the race?", "No, {h} stopped to help {f}.")
        t.may(
            "With {f} on {h.his} shoulder, {h} came in last, and the people clapped more than for the winner.",
            '"Why did you stop?" asked {f}. "Because you did," said {h}, and together they walked to the end, very '
            "slowly, as the last of all.",
        )
        t.close(
            "{c.full} cut the prize in three: one part for the winner, one for {h}, and one for {f}.",
            "Nobody remembers who won that day. Everybody remembers who stopped.",
            "The next year the two of them started as a team.",
        )
    elif turn == "funny":
        t.say(
            "Then Duchess the goose came running across the way, wings wide open, and hissed. Everyone stopped, one "
            "fell over the other, and nobody could get past.",
            "Just before the end stood Clover the goat and [ate the finish line|would not move]. {h} stopped, {f} "
            "stopped, everyone stopped.",
        )
        t.may(
            'The people laughed until they had tears in their eyes. "The winner is the animal!" cried {c.full}.',
            "{c.full} said that the animal had won, because it was the only one that had stayed calm.",
        )
        t.ask("Who won the race?", "An animal won the race.")
        t.close(
            "The animal got the prize, and {h} and {f} were allowed to carry it through the village.",
            "{h} and {f} sat in the grass and laughed until their bellies hurt. They had forgotten who wanted to win.",
        )
    else:
        t.say(
            "{f} looked back to see where {h} was. That was a mistake. {f} [lost a second|nearly fell], and in that "
            "second {h} went past.",
            "On the last part, {f} went too fast and could not keep straight. {h} took the corner slowly, just as "
            "{c.full} had taught {h.him}.",
        )
        t.say(
            "{h} won by the length of an arm. {h.he} could not believe it.",
            "One more breath, one more push, and {h} was first.",
        )
        t.ask("Did {h} win the race?", "Yes, {h} won the race.")
        t.close(
            'For a while {f} was angry. Then {f.he} came over and held out {f.his} hand. "Next year," said {f}. '
            '"Next year," said {h}.',
            "{h} shared the prize with everybody, also with {f}, who took the biggest piece.",
        )


def noise(t: Teller) -> None:
    """A strange noise in the night turns out to be something else than feared."""
    t.scene(times=("evening",))
    h = t.child("h")
    f = t.friend("f", h)
    place = t.pick("old barn", "mill", "school", "empty house by the river", "shed behind the bakery")
    sound, cause, truth = t.pick(
        ("a long, deep moan", "the wind blew over an empty bottle on the window sill", "the wind in a bottle"),
        ("a slow knocking", "a loose shutter hit the wall each time the wind came", "a loose shutter"),
        ("a soft scratching", "a family of hedgehogs was looking for beetles in the straw", "a family of hedgehogs"),
        ("strange music", "Edgar the beekeeper was secretly learning to play the violin", "Edgar and his violin"),
        ("a terrible snoring", "Otto the miller had fallen asleep on his sacks", "Otto the miller, asleep"),
        ("white wings and a hiss", "a white owl had its nest there, with two round babies", "a white owl"),
        (
            "steps, up and down, up and down",
            "Barley the donkey could not sleep and was walking about",
            "Barley the donkey",
        ),
    )
    heard = "saw" if "wings" in sound else "heard"
    t.bind(place=place, sound=sound, cause=cause, truth=truth, heard=heard, about=f"a strange noise in the {place}")
    t.opening(h)
    t.say(
        "{when}, {H} came [home late|past] and {heard} {sound} in the {place}.",
        '{when}, {H} met {h.his} friend {f}, who was pale. "There is a ghost in the {place}," {f} said. "I {heard} '
        '{sound}."',
        "For three nights people had talked about {sound} in the {place}. {when}, {H} {heard} it, too.",
    )
    t.bind(ff=f.name if f.name in t.told[-1] else f"{h.his} friend {f}")
    t.ask("Where was the strange thing?", "It was in the {place}.")
    t.may(
        "{h} ran home and [pulled the blanket over {h.his} head|closed all the windows]. But {h.he} could not stop "
        "thinking about it.",
        '"Ghosts do not exist," said {h}, but {h.his} voice was not quite steady.',
        '"[We have to know|Let us look]," said {h}. "What you know cannot scare you."',
    )
    t.say(
        "So {h} and {ff} took a [lantern|candle] and a [wooden spoon|broom] and crept to the {place}.",
        "{h} went there with {ff}, hand in hand, because two are braver than one.",
    )
    t.may(
        "Their shadows were as tall as trees.",
        "The door opened with a long cry. {f} nearly dropped the light.",
        '"You first," whispered {f}. "No, you," whispered {h}. They went in at the same time.',
        "It was so dark that they could not see their own feet.",
    )
    t.say(
        "There it was again! {h} lifted the light, and then {h.he} saw it: {cause}.",
        "{h} counted to three and opened {h.his} eyes. There was no ghost. {cause}.",
        "They came closer, step by step. And what was it? {cause}.",
    )
    t.ask("What was it in the end?", "It was {truth}.")
    t.may(
        "{f} sat down on the floor and laughed so hard that {f.he} could not [stop|speak].",
        "[First|For a moment] they were silent. Then they laughed until they had to hold each other.",
        '"So much fear for so small a thing," said {h}, and shook {h.his} head.',
    )
    t.may(
        "They promised to keep the secret."
        if "Edgar" in truth or "Otto" in truth
        else "They stayed for a while and then went out very quietly.",
        "The next day they told the others, but nobody wanted to believe them. A ghost is a better story.",
    )
    t.close(
        "Ever since, when {h} hears something at night, {h.he} takes a light and goes to look.",
        "And the ghost? It is still there, and it is very nice."
        if "owl" in truth or "hedgehogs" in truth
        else "After that night there was no more talk about ghosts.",
        '"Were you afraid?" {f} asked on the way home. "Only before," said {h}. "Never after."',
        "That night both of them slept like stones.",
    )


def feast(t: Teller) -> None:
    """A shy player, a song and a village feast."""
    t.scene(seasons=("spring", "summer", "autumn"), weathers=("sunny", "warm", "windy", "cloudy"), times=("evening",))
    h = t.child("h")
    t.craftsperson("c", "fisherman", "shepherd", "beekeeper", "shoemaker", "miller")
    k = t.thing("k", [BY_NOUN[noun] for noun in ("flute", "drum", "bell", "whistle")])
    t.bind(about=f"{h.he} played {k.a} at the feast")
    t.opening(h)
    t.say(
        "In {h.his} room {h} had {k.a}. {h.he} played it every day, but only when nobody could hear.",
        "{h} could play {k.the} better than anyone, but nobody knew, because {h.he} always played alone, far from "
        "the village.",
    ) if t.bound["H"] == h.name else t.say(
        "{H} had {k.a}. {h.he} played it every day, but only when nobody could hear.",
    )
    t.asks_colour("k")
    t.say(
        'One day {c.full} came by and stood still. "That was you?" {c} asked. "You must play at the feast." {h} '
        "wanted to sink into the ground.",
        'But {c.full} had heard it. "The feast needs music," said {c}. {h} [shook|only shook] {h.his} head.',
    )
    t.ask("Who heard {h} play?", "{c.full} heard {h} play.")
    t.may(
        '"What if I make a mistake?" asked {h}. "Then you make a mistake," said {c}, "and the sun comes up all the '
        'same."',
        '"I cannot play in front of people," said {h}. "Then play in front of me," said {c}, "and forget the rest."',
        '"They will laugh," said {h}. "Some will," said {c}. "They laugh at my hat, too. I still wear it."',
    )
    t.may(
        "They practised behind the {c.place}, first for one goose, then for two children, then for seven.",
        "Every evening {h} played for {c}, and every evening one more person was listening.",
    )
    t.say(
        "Then the {weather} {time} of the feast was there. [Lights hung in the trees|There was a fire in the "
        "square], and {h.s} knees were [soft|shaking].",
        "The feast came. The square was full, and {h} counted the faces. It was a mistake to count them.",
    )
    wrong = t.pick(True, False)
    if wrong:
        t.say(
            "{h} began, and the first sound was wrong. Somebody coughed. {h} looked at {c}, took a breath and began "
            "again.",
            "In the middle {h} forgot how it went on. It was terribly quiet. Then {c} began to hum, and {h} found "
            "the way back.",
        )
        t.ask("Did everything go well at the feast?", "No, {h} made a mistake, but went on.")
    else:
        t.say(
            "{h} closed {h.his} eyes and thought of the river. Then {h.he} began, and the square grew quiet.",
            "{h} looked only at {c}. And the music came, all by itself.",
        )
        t.ask("Did everything go well at the feast?", "Yes, {h} played very well.")
    t.may(
        "It was an old song about the river. The old people [hummed|sang] along, and the children [began to "
        "dance|stopped running].",
        "The song went over the roofs and up to the high meadow, where even the sheep lifted their heads.",
    )
    t.may(
        "When it was over, there was [silence|no sound] for one long moment, and then everybody clapped.",
        '"Again!" they called. "Again!" And {h} played it again, and three more songs.',
    )
    t.close(
        "Now there is no feast without {h} and the {k.full}.",
        "{c} threw {c.his} hat into the air and never found it again.",
        "{h} had been afraid of all those people, and now they were simply people.",
        'On the way home {h} asked, "When is the next one?"',
    )


PLOTS = (neighbour, quarrel, newcomer, race, noise, feast)
