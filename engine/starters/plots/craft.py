"""Plots about making: learning a craft, building, baking, clocks, honey and snow."""

from __future__ import annotations

from engine.starters.telling import Teller

# craft -> (what is made, first try, the mistake, the advice)
_LESSONS = {
    "carpenter": ("a small chair", "It had three legs of three lengths", "measure twice and cut once"),
    "potter": ("a bowl", "It fell over like a tired hat", "keep your hands wet and your mind quiet"),
    "weaver": ("a scarf", "It was wide at one end and thin at the other", "count the threads, and do not talk"),
    "baker": ("a loaf of bread", "It was as hard as a brick", "let the dough sleep"),
    "blacksmith": ("an iron hook", "It broke like dry wood", "strike while the iron is red, and never in anger"),
    "clockmaker": ("a little clock", "It ran backwards", "the smallest wheel is as important as the biggest"),
    "shoemaker": ("a pair of shoes", "Both of them were for the left foot", "look at the foot, not at the shoe"),
    "fisherman": ("a net", "The fish swam in, and the fish swam out", "a net is only as good as its worst knot"),
    "beekeeper": (
        "a straw house for bees",
        "The bees looked at it and flew away",
        "move slowly, as if you were under water",
    ),
    "gardener": ("a straight row of beans", "It looked like a snake", "use a string and take your time"),
}


def lesson(t: Teller) -> None:
    """A child learns a craft: a bad first try, a piece of advice, a good last one."""
    c = t.craftsperson("c", *_LESSONS)
    t.scene(seasons=("spring", "summer") if c.craft == "gardener" else ("spring", "summer", "autumn", "winter"))
    h = t.child("h")
    made, failed, advice = _LESSONS[c.craft]
    t.bind(made=made, failed=failed, advice=advice, about=f"{h.he} learned to make {made}")
    t.opening(h)
    t.say(
        '{when}, {H} stood at the door of the {c.place}. "I want to learn what you do," {h.he} told {c.full}.',
        '{when}, {H} watched {c.full} for an hour and then asked, "Can you teach me to make {made}?"',
        "{H} had always wanted to make {made}. {when}, {h.he} went to {c.full} and asked for help.",
    )
    t.ask("What did {h} want to make?", "{h} wanted to make {made}.")
    t.ask("Who taught {h}?", "{c.full} taught {h}.")
    t.may(
        '"It looks easy," said {h}. {c} [smiled|laughed softly]. "Everything looks easy from the outside."',
        '"[Good|Very well]," said {c}. "First you sweep the floor for a week." So {h} swept, and {h.he} watched '
        "while {h.he} swept.",
        '{c} gave {h.him} an apron that was much too big. "[Begin|Try]," {c.he} said.',
    )
    t.say(
        "{h.s} first try was a disaster. {failed}.",
        "The first time, [everything|all of it] went wrong. {failed}.",
        "{h} worked all {time} without a break. The result was sad. {failed}.",
    )
    t.ask("What was wrong with the first try?", "{failed}.")
    t.may(
        '{h} [threw it into the corner|wanted to go home]. "I will never learn it," {h.he} said.',
        "Some children looked in at the door and laughed. {h.s} ears turned red.",
        '"[It is ugly|It is no good]," said {h}. "It is your first," said {c}. "Keep it. One day you will be glad '
        'of it."',
    )
    t.say(
        '"Listen," said {c}. "There is one secret: {advice}."',
        '{c} put a hand on {h.his} shoulder. "My own teacher told me this," {c.he} said. "{advice}."',
    )
    t.ask("What was the advice of {c}?", "The advice was this: {advice}.")
    t.may(
        "So {h} began again, and again, and the days grew longer.",
        "The second one was [a little better|less bad]. The third one was almost good.",
        "At night {h} moved {h.his} fingers under the blanket, as if {h.he} were still working.",
    )
    t.say(
        "{h} [did as {c.he} said|followed the advice], slowly and with care, and [at last|after many days] there it "
        "was: {made}, and a good one.",
        "The [fifth|sixth|seventh] time, something was different. {h.s} hands knew by themselves what to do, and "
        "{made} came out of it.",
    )
    t.may(
        "{c} looked at it [from all sides|for a long time], and nodded. {c} did not nod often.",
        '"Who made this?" a customer asked. "A friend of mine," said {c} with a straight face.',
    )
    to = t.pick("{h.his} grandmother", "{h.his} little sister", "the teacher", "{h.his} father")
    t.bind(to=t.part(to))
    t.close(
        "{h} gave it to {to}, who would not have traded it for gold.",
        "It went to {to}. The first one, the bad one, {h} kept on a shelf, and it made {h.him} smile.",
        "The next morning there was a second apron in the {c.place}, a small one, with the name of {h} on it.",
        "Years later, {h} taught it to other children. And {h.he} said the same words: {advice}.",
    )


_PROJECTS = {
    "a bridge over the stream": (
        "Two boards and a rope",
        "It was too short by the length of a foot",
        "they put a big stone in the middle",
    ),
    "a tree house": (
        "Old boards, nails and a ladder",
        "The floor leaned like a boat in a storm",
        "they put a thick branch under the low side",
    ),
    "a house for the birds": (
        "A box with a round hole",
        "The hole was so big that the cat could get in",
        "they made a smaller door from a piece of leather",
    ),
    "a cart with four wheels": (
        "A crate and the wheels of an old chair",
        "It could only drive in circles",
        "they changed the two front wheels",
    ),
    "a raft": (
        "Six barrels and a door",
        "One side went under the water",
        "they moved the barrels apart and tied them again",
    ),
    "a swing": (
        "A board and a strong rope",
        "It turned around itself like a top",
        "they used two ropes instead of one",
    ),
    "a wind wheel": (
        "Thin wood and an old broom",
        "It stood still, even in a storm",
        "they bent each wing a little to one side",
    ),
    "a snow house": (
        "A hundred blocks of snow",
        "The roof fell in on their heads",
        "they set each block a little further in",
    ),
}


def building(t: Teller) -> None:
    """Two friends build something; the first version fails for a reason, the second works."""
    t.scene(weathers=("sunny", "warm", "windy", "cloudy", "cold", "snowy"), times=("morning", "afternoon"))
    h = t.child("h")
    t.friend("f", h)
    project = t.pick(*[name for name in _PROJECTS if name != "a snow house"])
    if t.weather == "snowy":
        project = "a snow house"
    parts, fault, fix = _PROJECTS[project]
    t.bind(project=project, parts=parts, fault=fault, fix=fix, about=f"{h.he} built {project}")
    t.opening(h)
    t.say(
        '{when}, {H} had an idea. "Let us build {project}," {h.he} said to {f}.',
        "{when}, {H} and {h.his} friend {f} began to build {project}.",
        '{when}, {H} drew a picture in the [dust|sand]. "What is that?" asked {f}. "That is {project}," said {h}, '
        '"and we are going to build it."'
        if t.weather != "snowy"
        else '{when}, {H} looked at the snow and then at {f}. "Let us build {project}," {h.he} said.',
    )
    t.ask("What did {h} and {f} build?", "They built {project}.")
    t.say(
        "They [found|collected] what they needed. {parts}, that was all.",
        '"What do we have?" asked {f}. They counted. {parts}.',
    )
    t.ask("What did they build it from?", "{parts}.")
    t.may(
        "{h} held, and {f} [hammered|pushed]. Then {f} held, and {h} [hammered|pushed]. They [worked|sang] until noon."
        if t.weather != "snowy"
        else "{h} cut, and {f} carried. Then they changed places. Soon their fingers were red and their ears were hot.",
        "It was hard work, and twice they hit a thumb, but they did not stop."
        if t.weather != "snowy"
        else "It was cold work, but they did not stop.",
        "[People came by|A few people stopped] and gave advice. {h} and {f} listened politely and did it their own "
        "way.",
    )
    t.say(
        "Then they tried it out. {fault}!",
        "At last it was done. But what was that? {fault}.",
        '"Ready?" said {f}. "Ready," said {h}. It was not ready. {fault}.',
    )
    t.ask("What was wrong at first?", "{fault}.")
    t.may(
        '"All that work for nothing," said {f} and kicked a stone. {h} said nothing. {h.he} was thinking.',
        "They looked at each other with long faces. Then {h} began to laugh, and {f} had to laugh, too.",
        "They sat down and ate their bread. [With a full mouth one can think better|Bread helps with thinking].",
    )
    t.may(
        'Tomas the carpenter came past. "What did it tell you?" he asked. "It does not talk," said {f}. "Oh yes," '
        'said Tomas. "Each mistake talks."',
        "Tomas the carpenter [looked over the fence|stopped for a moment]. He did not say what to do. He only said "
        "where to look.",
    )
    t.say(
        'Then {h} jumped up. "I know it!" {h.he} cried. And {fix}.',
        "They [thought|talked] for a long time. In the end {fix}.",
        "[The next day|After lunch] they tried it in another way: {fix}.",
    )
    t.ask("How did they solve it?", "At last {fix}.")
    t.may(
        "And this time it worked. They [shouted|danced] so loudly that the [ducks|crows] flew away.",
        "It held! It really held! {f} turned around three times for joy.",
    )
    t.craftsperson("c")
    t.close(
        "In the evening half the village had tried it, even {c.full}.",
        "It was not pretty, but it was theirs, and it stood for many years."
        if t.weather != "snowy"
        else "It was not pretty, but it was theirs, and it stood until the first warm day.",
        '"What do we build tomorrow?" asked {f}. {h} was already drawing.',
        "On a small board they wrote both their names, and below it: made by us.",
    )


_BAKES = {
    "a honey cake": ("honey", "beekeeper"),
    "a loaf of bread": ("flour", "miller"),
    "an apple pie": ("apples", "gardener"),
    "a plum cake": ("plums", "gardener"),
    "a cheese pie": ("cheese", "shepherd"),
    "a milk cake": ("milk", "farmer"),
    "an egg cake": ("eggs", "farmer"),
}


def baking(t: Teller) -> None:
    """Something is missing for a cake, and fetching it brings a guest to the table."""
    t.scene()
    h = t.child("h")
    bake = t.pick(*_BAKES)
    missing, craft = _BAKES[bake]
    t.craftsperson("c", craft)
    t.bind(bake=bake, missing=missing, about=f"{h.he} baked {bake}")
    t.opening(h)
    t.say(
        "{when}, {H} wanted to bake {bake} for {h.his} [grandmother|mother|grandfather].",
        "{when}, Marta the baker let {H} use her big oven. {h} wanted to bake {bake}.",
        "{when}, the kitchen was warm, and {H} felt like baking. It was going to be {bake}.",
    )
    t.ask("What did {h} bake?", "{h} baked {bake}.")
    t.say(
        "{h} put everything on the table and read the list twice. Something was missing: there was no {missing}!"
        if missing in ("honey", "flour", "cheese", "milk")
        else "{h} put everything on the table and read the list twice. Something was missing: there were no {missing}!",
        "The bowl was ready, the oven was hot, and {h.his} sleeves were up. But where the {missing} should be, "
        "there was "
        "only an empty [shelf|jar|basket].",
    )
    t.ask(
        "What was missing?",
        "The {missing} was missing."
        if missing in ("honey", "flour", "cheese", "milk")
        else "The {missing} were missing.",
    )
    t.say(
        "So {h.he} ran to {c.full}, with flour on {h.his} nose."
        if missing != "flour"
        else "So {h.he} ran to the mill, to {c.full}, with butter on {h.his} nose.",
        "{h} put on {h.his} coat over the apron and went to {c.full}.",
    )
    t.ask("Who gave {h} the {missing}?", "{c.full} gave {h} the {missing}.")
    t.may(
        '"You can have some {missing}," said {c}, "if you [help me first|hold the ladder for me|tell me a joke]."',
        '{c} was sitting alone at the table. "{missing}? Take as much as you need," {c.he} said. "I have too much '
        'for one."',
        '"What will it be?" asked {c}. "{bake}," said {h}. {c} closed {c.his} eyes. "I have not eaten that for '
        'years," {c.he} said.',
    )
    t.say(
        "Back in the kitchen {h} [mixed|stirred], and [kneaded|mixed], and tasted, and tasted again.",
        "{h} hurried back. {h.he} [mixed|stirred] until {h.his} arm was tired, and pushed it into the oven.",
    )
    trouble = t.pick("smoke", "cat", "salt", "none")
    if trouble == "smoke":
        t.may(
            "Then {h} sat down for one minute and thought of something else. When {h.he} looked up, there was "
            "smoke! {h.he} pulled it out just in time. Only one side was black.",
            "But the fire was too hot. {h} smelled it, jumped up and saved what could be saved. It was a little "
            "dark on top.",
        )
        t.ask("What went wrong in the kitchen?", "It almost burned in the oven.")
    elif trouble == "cat":
        t.may(
            "It stood by the window to cool. When {h} came back, Pepper the cat sat beside it with a white nose, "
            "and one corner was gone.",
            "Pepper the cat jumped onto the table and left four grey footprints in the sugar. {h} turned that side "
            "to the wall.",
        )
        t.ask("What went wrong in the kitchen?", "Pepper the cat was there first.")
    elif trouble == "salt":
        t.may(
            "But the white powder in the jar was not sugar. It was salt! {h} made a terrible face, and began again "
            "from the start.",
            "{h} licked the spoon and coughed. Salt! {h.he} had taken the wrong jar. There was nothing to do but to "
            "start again.",
        )
        t.ask("What went wrong in the kitchen?", "{h} took salt instead of sugar.")
    else:
        t.may(
            "Soon the smell came out of the window, crossed the lane and knocked at every door.",
            "It rose and rose, gold and round, and {h} did not dare to breathe.",
        )
    t.say(
        "When it was done, {h} thought of {c}. {h.he} cut the biggest piece, and carried it over while it was still "
        "warm.",
        'There were four plates on the table. {h} put down a fifth one. "Who is it for?" {h.his} mother asked. "For '
        '{c}," said {h}.',
        "{h} sent a friend to fetch {c}, and then they all sat around the table.",
    )
    t.close(
        '"[It is perfect|This is the best I ever had]," said {c}, and asked for more.',
        "{c} ate in silence, and that was the highest praise.",
        "They laughed and talked until not a crumb was left.",
        "From then on, {c} had a place at that table every Sunday.",
    )


def clock(t: Teller) -> None:
    """The village clock stands still, and everyone has to live without it."""
    t.scene(times=("morning",))
    h = t.child("h")
    cause, found = t.pick(
        ("a bird had built its nest between the wheels", "a nest"),
        ("a brown nut was stuck between two wheels", "a nut"),
        ("a mouse had stored its winter food inside", "the food of a mouse"),
        ("the ice had stopped the big wheel", "ice")
        if t.season == "winter"
        else ("a leaf was stuck in the smallest wheel", "a leaf"),
    )
    t.bind(cause=cause, found=found, about="the clock that stood still")
    t.opening(h)
    t.say(
        "{when}, {H} looked up at the village clock. It [said|showed] four, and it stayed at four.",
        "{when}, the village clock stood still. {H} was the first who noticed it.",
    )
    t.ask("What happened to the village clock?", "It stood still.")
    t.may(
        "Without the clock, nothing worked. The school began [too late|at noon], the bread was [burned|black], and "
        "two people had breakfast three times.",
        "Nobody knew what time it was. Lotte the teacher let the children go too early, and Marta the baker forgot "
        "her bread.",
        "Some people got up in the middle of the night, and the hens did not know when to sleep.",
    )
    t.say(
        '"My eyes are good, but my legs are old," said Silas the clockmaker. "Who will go up for me?" "I will," '
        "said {h}.",
        "Silas the clockmaker could not climb the tower any more. So {h} went up for him.",
        '"I need young legs," said Silas the clockmaker. So {h} climbed the tower for him.',
    )
    t.ask("Why did Silas not go up alone?", "His legs were too old for the tower.")
    t.may(
        "{h.he} put a lantern on {h.his} belt and climbed, a hundred steps, in the dark.",
        "The steps were full of dust. There were a hundred of them.",
    )
    t.may(
        "Far below, the people looked like ants.",
        "Halfway up, something flew past {h.his} face. {h} stopped, breathed, and climbed on.",
    )
    t.say(
        'At the top were wheels as big as tables. "What do you see?" called Silas from below. {h} looked closely, '
        "and there it was: {cause}.",
        "Up there it was cold and still. {h} held the light to each wheel, one after the other, until {h.he} found "
        "it: {cause}.",
    )
    t.ask("Why did the clock stand still?", "The reason was this: {cause}.")
    if "nest" in found:
        t.say(
            '{h} did not touch the eggs. "We have to wait," {h.he} called down. "Three weeks!" And the whole '
            "village waited, until the young birds had flown.",
            "{h} carried the nest to the window sill, very slowly, while the mother bird watched. Nothing fell.",
        )
    elif "mouse" in found:
        t.say("{h} carried everything into a dry corner, nut by nut, so that the mouse would not be hungry.")
    elif found == "ice":
        t.say("{h} held the warm lantern to it and waited. Drop by drop the ice went away.")
    else:
        t.say(
            "{h} pulled it out with two fingers, brushed away the dust and put one drop of oil on each wheel.",
            "It was so small that {h} almost laughed. {h.he} took it out and put it into {h.his} pocket.",
        )
    t.say(
        "Then {h} gave the big wheel a push. Tick, it said. Tock. Down in the square, hats flew into the air.",
        "Tick. Tock. The wheels began to turn, and the bell struck so loudly that {h} had to cover {h.his} ears.",
    )
    t.close(
        "Since then {h} winds the clock every Sunday, and Silas waits below with tea.",
        '"So small a thing stopped us all," said Silas. "And so small a person helped us," he added.',
        "The school began on time again. Not all the children were happy about that.",
        "{h} had seen how time is made, and it was mostly dust and patience.",
    )


def snow(t: Teller) -> None:
    """Snow has closed the lanes, and bread must reach somebody on the hill."""
    t.scene(seasons=("winter",), weathers=("snowy",))
    h = t.child("h")
    t.friend("f", h)
    c = t.craftsperson("c", "shepherd", "miller", "beekeeper", "potter")
    load = t.pick("bread and soup", "dry wood", "milk and bread", "a warm blanket and bread")
    t.bind(load=load, about=f"{h.he} went through the snow to {c.full}")
    t.opening(h)
    t.say(
        "{when}, every lane was closed. {H} heard that nobody had been to {c.full} for four days.",
        'It had snowed for three days and three nights. {when}, {H} asked, "Who is looking after {c.full}?" Nobody '
        "knew.",
    )
    t.ask("Who needed help?", "{c.full} needed help.")
    t.may(
        '"The way to {c.his} house is closed," people said. "[We have to wait|It is too dangerous]." {h} did not '
        "want to wait.",
        "{h} looked up at the hill. There was a thin line of smoke, thinner than the day before.",
    )
    vehicle = t.pick("an old door", "a sledge", "a big wash tub", "the top of a table")
    t.bind(vehicle=vehicle)
    t.say(
        "{h} and {h.his} friend {f} tied a rope to {vehicle} and loaded it with {load}.",
        "{f} had {vehicle}, and {h} had {load}. Together it was a plan.",
    )
    t.ask("What did they bring to {c}?", "They brought {load}.")
    t.may(
        "Step by step they went up. They sank in to their knees. Where {h} had gone first for a while, {f} went first.",
        "They pulled, they rested, they pulled again. Their breath stood white in the air.",
    )
    t.may(
        "Halfway up they lost the path. Then they saw the tracks of a fox, and the fox knew the way.",
        '"I cannot feel my toes," said {f}. "Then sing," said {h}. So they sang, loudly and badly.',
        "Once the load slid off, and they had to dig for it with their hands.",
    )
    t.say(
        'At last they stood at the door and knocked. It took a long time, and then {c} opened. "Children!" {c} '
        'said. "Where did you fall from?"',
        "{c} had burned {c.his} last wood, and was sitting by the cold oven in three coats, when somebody knocked.",
    )
    t.may(
        "Soon [a fire was burning|the room was warm], there was [hot tea|something hot] in every cup, and {c} was "
        "laughing again.",
        "{c} ate like a wolf, [and then asked for the news|with tears in {c.his} eyes].",
    )
    t.may(
        "And the way back? They sat down on {vehicle} and flew down the hill, faster than birds, right into the "
        "market square.",
        "The way up had taken three hours. The way down, on {vehicle}, took three minutes, and they screamed all "
        "the way.",
    )
    t.close(
        "The next day twenty people went up with shovels, in the tracks of two children.",
        "Since that winter, a red flag hangs on the hill. When it is up, somebody goes.",
        "People in the village were a little ashamed. It did them good.",
        "{f} had cold feet for a week, and would have gone again at once.",
    )


def honey(t: Teller) -> None:
    """A swarm of bees has left its house, and calm wins it back."""
    t.scene(seasons=("spring", "summer"), weathers=("sunny", "warm"), times=("morning", "afternoon"))
    h = t.child("h")
    place = t.pick(
        "on the school bell",
        "on the cart of the farmer",
        "in the hat of the postman",
        "on a branch above the market",
        "under the roof of the bakery",
    )
    t.bind(p=place, about="a swarm of bees")
    t.opening(h)
    t.say(
        "{when}, there was a humming in the air, as deep as a drum. {H} looked up. A brown cloud flew across the "
        "village: bees!",
        "{when}, {H} came around the corner and stood still. Thousands of bees were in the air.",
    )
    t.say(
        "They [sat down|landed] {p}, all of them, one on top of the other, like a living beard.",
        "[After a while|Then] they came down {p} and hung there like a big dark pear.",
    )
    t.ask("Where did the bees land?", "The bees landed {p}.")
    t.may(
        'The people ran. Doors and windows were closed. "Water!" cried one. "Smoke!" cried another.',
        "[The market was empty|Everyone had run away] in a minute. Only {h} stayed.",
    )
    t.may(
        '{h} remembered what Edgar the beekeeper had said: "Bees that look for a home have full bellies. They do '
        'not sting."',
        "{h} was afraid, but {h.he} knew Edgar the beekeeper, and Edgar was never loud and never quick.",
    )
    t.say(
        "So {h} walked backwards, slowly, and then ran to Edgar as fast as {h.he} could.",
        "{h} told the people to stay inside, and went to fetch Edgar from the bee yard.",
    )
    t.ask("Whom did {h} fetch?", "{h} fetched Edgar the beekeeper.")
    t.may(
        'Edgar came with an empty straw house and a feather. "You will hold it," he told {h}. "And you will breathe."',
        'Edgar brought a basket, a white cloth and no gloves. "Two calm people are enough," he said. "I am one of '
        'them. Are you the other?"',
    )
    t.say(
        "{h} held the basket under the bees. Edgar pushed them with the feather, softly, like somebody who is "
        "dusting a vase. They fell in with a soft sound.",
        "One bee walked over {h.s} nose, all the way, from left to right. {h.he} did not move. Edgar covered the "
        "basket with the cloth.",
    )
    t.ask("Was {h} stung?", "No, {h} stayed calm, and no bee stung {h.him}.")
    t.may(
        "In the evening, the bees moved into their new house, and Edgar painted a sign on it with the name of {h}.",
        '"These are your bees now," said Edgar. "You found them, and you did not run."',
    )
    t.close(
        "In autumn there were six jars of honey. Five of them {h} gave to the people who had run away.",
        "Since then, whenever people grow loud, {h} thinks of the bees and breathes.",
        "And the honey of that summer tasted of courage, or so Edgar said.",
        'The others asked how it had felt. "Warm," said {h}. "And it tickled."',
    )


PLOTS = (lesson, building, baking, clock, snow, honey)
