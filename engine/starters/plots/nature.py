"""Plots about plants, animals and weather."""

from __future__ import annotations

from engine.starters.telling import Teller
from engine.starters.world import HIDING_PLACES

# plant -> (what it becomes, what is made of it in the end)
_PLANTS = {
    "pumpkin": ("a pumpkin as big as a wheel", "soup for the whole village"),
    "sunflower": ("a flower taller than the door", "a bag of seeds for the birds"),
    "bean": ("a green tower full of beans", "a big pot of bean soup"),
    "strawberry": ("a bed full of sweet berries", "ten jars of jam"),
    "carrot": ("a carrot as long as an arm", "a carrot cake"),
    "apple tree": ("a small tree with three apples", "one very small apple pie"),
}


def growing(t: Teller) -> None:
    """A seed is planted, waiting is hard, something threatens it, and care pays off."""
    t.scene(seasons=("spring",), weathers=("sunny", "warm", "rainy", "cloudy"))
    h = t.child("h")
    plant = t.pick(*_PLANTS)
    result, made = _PLANTS[plant]
    t.bind(plant=plant, result=result, made=made, about=f"{h.he} planted a {plant}")
    t.opening(h)
    t.say(
        '{when}, Agnes the gardener gave {H} one [small|tiny] seed. "It wants to be a {plant}," she said. "Will you '
        'help it?"',
        "{when}, {H} found a seed at the bottom of a [pocket|basket]. Agnes the gardener said that it was the seed "
        "of a {plant}.",
        "{when}, {H} knelt down beside Agnes in the garden and put a seed into the [dark|wet] earth. One day it "
        "would be a {plant}.",
    )
    t.ask("What did {h} plant?", "{h} planted the seed of a {plant}.")
    t.may(
        "{h} watered it every morning. For [one week|ten days|two weeks] nothing happened.",
        "Every day {h} ran to the garden before breakfast. Every day there was only earth.",
        "{h} gave it water and [sang to it|told it stories], but the seed was in no hurry.",
    )
    t.may(
        '"It is dead," {h} [said|complained]. "It is only busy," said Agnes. "[Roots come first|You cannot see '
        'roots grow]."',
        '{h} wanted to dig it up and look. "If you do that, it has to start again," Agnes said.',
        '"How long does it take?" asked {h}. "As long as it takes," said Agnes [and smiled|and went on digging].',
    )
    t.may(
        "Then, one morning, two green leaves stood there, [no bigger than a mouse ear|as thin as paper].",
        "And one day a green tip broke through the earth. {h} [danced around it|ran to tell everyone].",
    )
    threat = t.pick("snails", "heat", "goat", "frost", "birds")
    if threat == "snails":
        t.say(
            "But in the night the snails came and ate one of the leaves. {h} sat [in the garden|beside the plant] "
            "with a lantern "
            "and carried [twenty|thirty] snails to the other side of the river.",
            "But the snails liked it, too. {h} put a ring of [ash|sand] around the plant, and the snails turned back.",
        )
        t.ask("What was the danger for the plant?", "The snails wanted to eat it.")
    elif threat == "heat":
        t.say(
            "Then [a hot month|the heat] came, and the well was almost dry. {h} gave the plant the water [that "
            "{h.he} had washed in|left from washing the dishes].",
            "In the [hot|dry] weeks the leaves hung down. {h} carried water from the river, two buckets each "
            "evening, and made it a roof of straw.",
        )
        t.ask("What was the danger for the plant?", "It was too hot and dry.")
    elif threat == "goat":
        t.say(
            "But Clover the goat [looked|climbed] over the fence with a hungry face. {h} built [the fence higher|a "
            "little wall of stones] that same day.",
            "One day Clover the white goat got into the garden. {h} came just in time and pulled it away by the tail.",
        )
        t.ask("What was the danger for the plant?", "Clover the goat wanted to eat it.")
    elif threat == "frost":
        t.say(
            "Then there came one more cold night. {h} brought {h.his} own blanket and put it over the plant.",
            "But the cold returned. {h} covered the plant with [straw|dry leaves] every evening.",
        )
        t.ask("What was the danger for the plant?", "A cold night was the danger.")
    else:
        t.say(
            "But the crows had seen it. {h} made a man of straw with an old hat, and the crows [laughed, but they "
            "stayed away|flew off].",
            "But hungry birds came down. {h} hung a [bell|spoon] in the wind beside it, and the noise sent them away.",
        )
        t.ask("What was the danger for the plant?", "The birds wanted to eat it.")
    t.say(
        "[Weeks went by|Summer came and went]. The plant grew and grew, and it became {result}.",
        "After that, nothing could stop it. By [late summer|the end of summer] it was {result}.",
    )
    t.ask("What did the plant become?", "It became {result}.")
    t.may(
        "In autumn, Agnes and {h} made {made} from it.",
        "When autumn came, it turned into {made}, and everyone [had some|came to look].",
    )
    t.ask("What did they make in the end?", "They made {made}.")
    t.say(
        "{h} kept one seed in a small box, for the next spring.",
        '"You did that," said Agnes. "No," said {h}, "it did it alone. I only helped."',
        "And {h} had learned something that no book could teach: how to wait.",
        "Then {h.he} gave a seed to each child in the school, and the next year the whole village was green.",
    )


def storm(t: Teller) -> None:
    """A storm comes, something must be saved, and the village works together."""
    t.scene(seasons=("summer", "autumn"), weathers=("windy", "cloudy"), times=("afternoon", "evening"))
    h = t.child("h")
    c = t.craftsperson("c", "shepherd", "fisherman", "beekeeper", "farmer", "miller")
    save, danger, danger_now, deed = {
        "shepherd": (
            "the sheep",
            "the sheep were still on the high meadow",
            "the sheep are still on the high meadow",
            "drove them down to the barn",
        ),
        "fisherman": (
            "the boat",
            "the boat was still on the river",
            "my boat is still on the river",
            "pulled it onto the grass with a long rope",
        ),
        "beekeeper": (
            "the bee houses",
            "the bee houses stood open to the wind",
            "the bee houses stand open to the wind",
            "tied them down with rope and stones",
        ),
        "farmer": (
            "the hay",
            "the dry hay still lay in the field",
            "the dry hay is still in the field",
            "brought it into the barn, one cart after the other",
        ),
        "miller": (
            "the flour",
            "the roof of the mill had a hole",
            "the roof of the mill has a hole",
            "carried every sack to the school",
        ),
    }[c.craft]
    many = save in ("the sheep", "the bee houses")
    t.bind(save=save, danger=danger, danger_now=danger_now, deed=deed, them="them" if many else "it")
    t.bind(were="were" if many else "was", about=f"a storm and {save}")
    t.opening(h)
    t.say(
        "{when}, {H} saw a [black|dark] wall of clouds behind the hill. The birds had stopped singing.",
        '{when}, {H} held a wet finger into the air. "[A storm is coming|There will be a storm]," {h.he} said.',
        "{when}, the air was [strange and yellow|heavy and still]. Even the dogs were quiet, and {H} knew that a "
        "storm was near.",
    )
    t.say(
        "{h} thought of {c.full}: {danger}!",
        'Then {c.full} came running down the lane. "Help!" {c.he} called. "{danger_now}!"',
        "And {danger}. {c.full} could never save {them} alone in time.",
    )
    t.ask("What was in danger?", "{save} of {c.full} {were} in danger.")
    bell = t.pick(
        "rang the school bell",
        "knocked at every door",
        "blew {h.his} whistle in the square",
        "beat on a pot with a spoon",
    )
    t.bind(bell=t.part(bell))
    t.say(
        "{h} {bell}, and people [came out|left their supper].",
        '{h} ran back and {bell}. "Everybody to {c}!" {h.he} [shouted|called].',
    )
    t.ask("How did {h} call the people?", "{h.he} {bell}.")
    t.say(
        "[Young and old|Big and small|Twelve people], they all came, and together they {deed}.",
        "They made a long line, and hand in hand they went to {c}. There they {deed}.",
        "The first [thunder|drops] came when they began. With cold hands they {deed}.",
    )
    t.ask("What did the people do?", "Together they {deed}.")
    t.may(
        "The wind tore at their coats, and the rain was so thick that they could hardly see.",
        "Once {h} [slipped|fell] in the mud, and {c} pulled {h.him} up again.",
        "Lightning turned the night white, but nobody ran away.",
        '"Hold on!" cried {c}. And they held on.',
    )
    t.may(
        "When the worst [came|began], everything was safe. They sat in {c.s} kitchen, wet and [laughing|tired], "
        "while the storm went by.",
        "Just as the last of it was safe, the sky broke open. All night the thunder rolled, and all night they sat "
        "around the fire.",
    )
    t.may(
        "In the morning a tree lay across the lane, and [two|three] roofs were open, but {save} had come to no harm.",
        "The next day the sun shone on broken branches. Nothing was lost that could not be mended.",
    )
    t.close(
        '"[Alone I would have lost everything|If you had not looked up at the sky]," {c} told {h} and could not '
        "finish.",
        "Since that storm, {h} had the key to the school bell."
        if "bell" in bell
        else "Since that storm, people listened when {h} looked at the sky.",
        "{c} gave [a feast|a dinner] for everyone who had helped, and {h} sat at the head of the table.",
        "People still talk about the day when the whole village [was one family|held together].",
    )


_REASONS = {
    "cat": "Beside it, in the straw, lay four tiny kittens",
    "hen": "Under it, warm and yellow, sat six small chicks",
    "goose": "Under its wings were three big eggs",
    "dog": "The thunder had scared it, and it was shaking all over",
    "goat": "It had found the last green leaves and would not leave them",
    "donkey": "It had a thorn in its foot and could not walk",
}


_SHORT_REASONS = {
    "cat": "had four kittens",
    "hen": "had six chicks",
    "goose": "was sitting on three eggs",
    "dog": "was afraid of the thunder",
    "goat": "had found green leaves",
    "donkey": "had a thorn in its foot",
}
_FOODS = {"cat": "milk", "dog": "soup", "hen": "corn", "goose": "corn", "goat": "cabbage", "donkey": "carrots"}


def hiding(t: Teller) -> None:
    """An animal is missing, and there is a good reason for it."""
    t.scene()
    h = t.child("h")
    t.craftsperson("c")
    t.animal("x")
    place = t.pick(*HIDING_PLACES)
    kind = str(t.bound["x_kind"])
    if kind == "donkey":
        place = t.pick("behind the barn", "in the stable of the farm", "under the old bridge")
    t.bind(food=_FOODS[kind], why=_SHORT_REASONS[kind])
    t.bind(p=place, reason=_REASONS[kind], about=f"{t.bound['x']} the {kind} was hiding")
    t.opening(h)
    t.say(
        "{when}, {H} noticed that {x} the {x_kind} was missing. Its place {x_bed} was empty.",
        '{when}, {H} met {c.full} in the lane. "{x} is gone," said {c}. "It has not slept {x_bed}."',
        "{when}, there was no sign of {x}, the {x_colour} {x_kind}. {H} went to look for it.",
    )
    t.ask("Which animal was missing?", "{x} the {x_kind} was missing.")
    t.ask("What colour was {x}?", "{x} the {x_kind} was {x_colour}.")
    t.may(
        "{h} called and called. {h.he} [held out|put down] a bowl of {food}, but {x} did not come.",
        '"{x}! {x}!" {h} called over the [fields|gardens]. Only [a crow|the wind] answered.',
        "{h} asked everyone. The baker had not seen it, the miller had not seen it, and the geese did not want to talk."
        if kind != "goose"
        else "{h} asked everyone. The baker had not seen it, and the miller had not seen it either.",
    )
    t.may(
        '"Perhaps it ran away," said {c.full}. "{x} would never do that," said {h}.',
        '"[It is getting late|Let us eat first]," said {c.full}. But {h} could not [stop|rest].',
        '{c.full} [shook|scratched] {c.his} head. "Animals do not hide without a reason," {c.he} said.',
    )
    t.say(
        "Then {h} [stood still|held {h.his} breath] and listened. There was a [small|soft] sound {p}.",
        "In the [mud|dust] {h} found footprints. They led past the well, around a corner, and ended {p}.",
        "A single [hair|feather] hung on a thorn. {h} [followed|went] that way and looked {p}."
        if kind in ("hen", "goose")
        else "A little {x_colour} hair hung on a thorn. {h} went that way and looked {p}.",
    )
    t.say(
        "There was {x}! {reason}.",
        "And there it was, quiet as a stone. {reason}.",
        'Two bright eyes looked at {h.him}. "There you are, {x}," {h.he} whispered. {reason}.',
    )
    t.ask("Where was {x}?", "{x} was {p}.")
    t.ask("Why did {x} hide?", "{x} {why}.")
    if kind in ("cat", "hen", "goose"):
        t.may(
            "{h} did not touch them. {h.he} brought [water|food] and a soft cloth, and kept the [other "
            "children|dogs] away.",
            "{h} sat down [at a distance|in the grass] and told nobody but {c}. Each day they brought food and "
            "stayed only a minute.",
        )
        t.close(
            "Three weeks later, a proud {x} walked across the square, and behind it came a row of little ones.",
            "When the little ones were big enough, {h} was allowed to give each of them a name.",
            '"You see," said {c}, "it was not hiding from us. It was looking after somebody."',
        )
    elif kind == "donkey":
        t.say(
            "{h} spoke softly, took the foot in both hands and pulled out the thorn. {c} washed the foot with warm "
            "water.",
            '"This will hurt once and then no more," said {h}, and pulled. {x} gave a loud cry and then was quiet.',
        )
        t.close(
            "The next morning {x} carried {h} around the village, as proud as a king's horse.",
            "Since then, {x} comes when {h} calls, and for nobody else.",
        )
    elif kind == "dog":
        t.may(
            "{h} sat down beside it and put an arm around it. They stayed there together until the sky was quiet.",
            '"I do not like thunder either," said {h}, and sang into its ear until the shaking stopped.',
        )
        t.close(
            "From then on, when clouds came, {x} ran straight to {h}.",
            "That night {x} slept on {h.s} feet, and nobody sent it away.",
        )
    else:
        t.may(
            "{h} laughed so loudly that the crows flew up. {h.he} had to wait until the last leaf was gone.",
            "{h} pulled, and {c} pushed. In the end they tied a leaf to a stick, and {x} walked home behind it.",
        )
        t.close(
            "{c} put a new lock on the gate the same evening. It took {x} two days to learn how it opened.",
            "Since then {h} brings green leaves every week, so that {x} has no reason to go.",
        )


def hurt_animal(t: Teller) -> None:
    """A child finds a hurt animal, cares for it and lets it go."""
    t.scene()
    h = t.child("h")
    t.craftsperson("c", "shepherd", "gardener", "beekeeper", "farmer", "teacher")
    animal, hurt, food, free = t.pick(
        ("owl", "had a hurt wing", "small pieces of meat", "flew over the roofs without a sound"),
        ("crow", "had a broken wing", "bread and cheese", "flew up, turned twice above the mill and was gone"),
        ("hedgehog", "was thin and cold", "cat food and water", "walked into the bushes without looking back"),
        ("rabbit", "had hurt its leg", "grass and carrots", "jumped over the first stones and was away"),
        ("duck", "was caught in a string", "wet bread", "ran to the water and swam off"),
        ("lamb", "was lost and weak", "warm milk from a bottle", "ran to the sheep and found its mother"),
    )
    t.bind(animal=animal, hurt=hurt, food=food, free=free, about=f"{h.he} helped a hurt {animal}")
    t.opening(h)
    t.say(
        "{when}, {H} [found|saw] a [small|young] {animal} beside the [lane|fence|river]. It {hurt}.",
        "{when}, {H} heard a thin cry in the [grass|bushes]. There lay a {animal}. It {hurt}.",
    )
    t.ask("Which animal did {h} find?", "{h} found a {animal}.")
    t.ask("What was wrong with the {animal}?", "It {hurt}.")
    t.say(
        "{h} took off {h.his} [jacket|scarf], wrapped it around the {animal} and carried it to {c.full}.",
        "[Very slowly|Without a word], {h} put it into {h.his} hat and walked to the {c.place}, where {c.full} knew "
        "a lot about animals.",
    )
    t.say(
        '"Will it live?" asked {h}. "That depends on you," said {c}. "It needs {food}, and it needs to be left alone."',
        '{c} looked at it [for a long time|from all sides]. "Warm, dark and quiet," {c.he} said. "And {food}, every '
        'three hours."',
    )
    t.ask("What did the {animal} eat?", "It ate {food}.")
    t.may(
        "So {h} made a bed in a [box|basket] near the oven. {h.he} got up at night, even when it was dark and cold.",
        "{h} slept beside the box, and every three hours {h.he} woke up [by {h.self}|without a clock].",
        "The first day it would not eat. The second day it took a little. The third day it [bit|pulled at] {h.s} "
        "finger, and {h.he} was glad.",
    )
    t.may(
        '{h} wanted to give it a name, but {c} shook {c.his} head. "Names make it hard to say goodbye," {c.he} said.',
        'The other children wanted to touch it. "No," said {h}, and stood in the door.',
    )
    t.say(
        "After [two weeks|a month], the {animal} was strong again. {h} wished that it could stay.",
        "Day by day it grew stronger, and day by day {h} grew a little sadder.",
    )
    t.say(
        "One quiet morning {h} carried it outside and opened {h.his} hands. For a moment it did not move. Then it "
        "{free}.",
        '"It is not yours," said {c} [softly|gently]. "I know," said {h}, and opened the door. The {animal} {free}.',
        "Then the day came. {h} set it down in the grass and stepped back. The {animal} {free}.",
    )
    t.close(
        "{h} looked after it until {h.his} eyes hurt. Then {h.he} smiled.",
        "Some evenings {h} still leaves a little food by the fence, and in the morning it is gone.",
        "It is good to know that somewhere out there is a {animal} that is alive because of {h}.",
        '"Now you know what love is," said {c}. "Holding on, and letting go."',
    )


def fog(t: Teller) -> None:
    """A child loses the way and is led home by something heard, seen or remembered."""
    t.scene(seasons=("autumn", "winter", "spring"), weathers=("foggy",), times=("morning", "afternoon", "evening"))
    h = t.child("h")
    t.friend("f", h)
    goal = (
        t.pick("mushrooms", "nuts", "berries", "dry wood")
        if t.season == "autumn"
        else t.pick("dry wood", "pine cones", "moss")
    )
    t.bind(goal=goal, about=f"{h.he} got lost in the fog")
    t.opening(h)
    t.say(
        "{when}, {H} and {h.his} friend {f} went into the forest to look for {goal}.",
        "{when}, {H} wanted to fetch {goal} from the forest, and {h.his} friend {f} came along.",
    )
    t.ask("What were they looking for?", "They were looking for {goal}.")
    t.say(
        "While their baskets grew full, a thick white fog came up from the river. When they looked up, the path was "
        "gone.",
        '"Where did we come from?" asked {f}, [when the baskets were full|after a while]. {h} turned around. There '
        "was [no path|only white fog].",
        "They walked from tree to tree. After an hour, they came to the same [broken tree|big stone] again.",
    )
    t.may(
        '"We are lost," said {f} in a small voice. "[Not lost|No]," said {h}, "we only do not know where we are."',
        "{f} began to cry, very quietly. {h} took {f.his} hand.",
        '"Do not run," said {h}. "[People who run get more lost|Running makes it worse]."',
    )
    way = t.pick("bell", "stream", "dog", "moss", "nuts")
    if way == "bell":
        t.say(
            "They stood still and listened. Far away the school bell rang. They walked towards it, stopped, "
            "listened, and walked again.",
            '"Hush," said {h}. From somewhere came the sound of the school bell, thin as a thread, and they '
            "followed it.",
        )
        t.ask("How did they find the way home?", "They followed the sound of the school bell.")
    elif way == "stream":
        t.say(
            'They found a little stream. "All water here runs to the mill," said {h}, and so they followed it.',
            "{h} heard water. The stream was small, but it knew the way to the river, and the river knew the way to "
            "the mill.",
        )
        t.ask("How did they find the way home?", "They followed a stream to the mill.")
    elif way == "dog":
        t.say(
            "Then something [wet|cold] touched {h.s} hand. It was Biscuit, the brown dog from the workshop. It "
            "walked ahead and waited at every turn.",
            "Then they heard a bark. Biscuit the dog had come to look for them, with its tail in the air like a flag.",
        )
        t.ask("How did they find the way home?", "Biscuit the dog led them home.")
    elif way == "moss":
        t.say(
            '"Moss grows on the cold side of a tree," said {h}. "And the village is on the warm side." So they went '
            "from tree to tree.",
            "{h} touched the trees. Lotte the teacher had said that moss grows on the north side, and home was in "
            "the south.",
        )
        t.ask("How did they find the way home?", "They looked at the moss on the trees.")
    else:
        t.say(
            "Then {h} saw a small white stone, and another. {f} had [dropped|put down] a stone at every turn, for "
            "fun, and now the stones led them back.",
            '"My stones!" cried {f}. {f.He} had been dropping white stones all morning, just to hear the sound. '
            "They followed them back.",
        )
        t.ask("How did they find the way home?", "They followed the white stones.")
    t.may(
        "[At last|Step by step], a light came out of the fog, and then a roof, and then a whole village.",
        "And there was the bridge, and behind the bridge the first warm window.",
    )
    t.craftsperson("c")
    t.may(
        "Their mothers were standing in the lane with lanterns. Nobody was angry, [which was almost worse|everybody "
        "was glad].",
        "{c.full} had just [wanted|started] to go and search for them.",
        "At home there was hot soup, and {h} told about the forest with a full mouth.",
    )
    t.close(
        "After that day, they never went into the forest without a [bell|ball of red thread].",
        "{f} never again let go of {h.s} hand in the fog.",
        "The {goal} lasted until Sunday, and the story lasted much longer.",
        '"Were you afraid?" {h.his} mother asked. "Yes," said {h}. "But I was not alone."',
    )


def dry_well(t: Teller) -> None:
    """The well is dry, and the village has to find water."""
    t.scene(seasons=("summer",), weathers=("sunny", "warm"), times=("morning", "afternoon"))
    h = t.child("h")
    t.craftsperson("c", "farmer", "gardener", "shepherd", "miller", "carpenter")
    t.bind(about="the well that was dry")
    t.opening(h)
    t.say(
        "It had not rained for [six|seven|eight] weeks. {when}, {H} let the bucket down into the well, and it came "
        "up [empty|full of sand].",
        "{when}, {H} went to the well as always. The bucket hit the bottom with a dry sound. There was no more water.",
    )
    t.ask("What was wrong with the well?", "There was no more water in it.")
    t.may(
        '"We must carry water from the river," said {c.full}. So everyone carried, up the hill and down the hill, '
        "until their arms hurt.",
        'The people stood around the well and argued. "Wait for rain," said some. "Dig deeper," said {c.full}.',
        "The cabbages hung their heads. The hens lay in the dust. {c.full} looked at the sky and said nothing.",
    )
    clue = t.pick("ants", "grass", "song", "donkey")
    if clue == "ants":
        t.say(
            "But {h} had seen something: a long line of ants went under a big stone behind the school, and they "
            "came back wet.",
        )
        t.ask("How did {h} know where the water was?", "{h} saw that the ants came back wet.")
    elif clue == "grass":
        t.say(
            "But {h} knew a place behind the school where the grass was still green, although nobody watered it.",
        )
        t.ask("How did {h} know where the water was?", "The grass was still green there.")
    elif clue == "song":
        t.say(
            "{h} remembered a song that {h.his} grandmother used to sing: where three old trees stand in a ring, "
            "there you will hear the water sing.",
        )
        t.ask("How did {h} know where the water was?", "{h} remembered a song of {h.his} grandmother.")
    else:
        t.say(
            "But {h} had watched Barley the donkey. Every evening it went behind the school, pushed its nose into "
            "the earth and licked the stones.",
        )
        t.ask("How did {h} know where the water was?", "{h} had watched Barley the donkey.")
    t.say(
        'Nobody believed {h.him}. "[A child|You]!" they said. Only {c} came, with two shovels.',
        '{h} told {c}. "It costs us nothing but sweat," said {c}, and fetched the shovels.',
    )
    t.ask("Who helped {h} to dig?", "{c.full} helped {h} to dig.")
    t.may(
        "They dug until noon, and it was dry. They dug until evening, and it was [dry|only a little dark].",
        "They dug all day. {h.s} hands were red, and the hole was as deep as {c.full} was tall.",
    )
    t.say(
        "[Then|Just when they wanted to stop], the earth under their feet grew soft. Water came up, first brown, "
        "then clear and cold.",
        '"Stop," said {h}. "Listen." Deep down, something was running. One more push of the shovel, and water shot '
        "up to their knees.",
    )
    t.may(
        "The whole village drank, and after the people, the animals, and after the animals, the cabbages.",
        "People came with pots and cups and shoes. Somebody began to sing.",
    )
    t.close(
        "They built a wall around the new well, and in one of the stones they cut the name of {h}.",
        "And of course it rained the very next day. Nobody minded.",
        "Since then, people in the village listen to children, at least on hot days.",
        "The first cup went to {c}, the second to {h}, and it was the best water they had ever drunk.",
    )


PLOTS = (growing, storm, hiding, hurt_animal, fog, dry_well)
