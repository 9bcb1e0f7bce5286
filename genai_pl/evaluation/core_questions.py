"""Questions of the core set: ten tasks of a hundred questions with four choices, made of words, numbers and sentences.

Everything is written here or drawn from it by a generator that is seeded by the task's name, so the set is the same
everywhere, is free, and is in no training set but as far as English is. Choices of a question differ in what is asked
and have like lengths. A prompt with solved examples says what is wanted: a model has to read, not to obey.
"""

import random
from collections.abc import Callable, Sequence

from genai_pl.evaluation.choices import Question

N_QUESTIONS, N_CHOICES = 100, 4
WORDS = (
    "apple bread chair cloud dance eagle flame grape horse island jungle knife lemon mouse night ocean paper queen river "
    "stone table uncle voice water yellow zebra anchor bottle candle desert engine forest garden hammer insect jacket "
    "kettle ladder market needle orange pencil rabbit saddle ticket valley window basket circle doctor"
)
CATEGORIES = {
    "animal": "dog cat horse cow sheep lion tiger wolf bear fox rabbit mouse goat pig duck",
    "fruit": "apple pear banana grape cherry lemon peach plum mango orange melon fig kiwi lime apricot",
    "color": "red blue green yellow purple orange pink brown black white gray violet crimson turquoise beige",
    "tool": "hammer saw drill wrench screwdriver pliers axe shovel rake chisel ladder file clamp spade broom",
    "profession": "doctor teacher farmer lawyer baker nurse pilot soldier judge sailor tailor butcher miner actor chef",
    "country": "France Spain Italy Germany Brazil India China Japan Egypt Mexico Canada Peru Norway Greece Kenya",
}
SEQUENCES = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "one two three four five six seven eight nine ten eleven twelve",
    "first second third fourth fifth sixth seventh eighth ninth tenth",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    " ".join(str(n) for n in range(1, 30)),
    " ".join(str(n) for n in range(10, 200, 10)),
    " ".join(str(n) for n in range(5, 100, 5)),
    " ".join(str(2**n) for n in range(1, 12)),
)
OPPOSITES = (
    "hot cold, big small, fast slow, up down, light dark, happy sad, old new, rich poor, high low, early late, full empty, "
    "open closed, strong weak, hard soft, wet dry, clean dirty, near far, long short, loud quiet, good bad, right wrong, "
    "inside outside, begin end, push pull, buy sell, love hate, win lose, day night, black white, summer winter, north "
    "south, east west, top bottom, first last, always never, more less, give take, alive dead, sharp blunt, thick thin"
)
CAPITALS = (
    "France Paris, Germany Berlin, Italy Rome, Spain Madrid, England London, Russia Moscow, China Beijing, Japan Tokyo, "
    "Egypt Cairo, Greece Athens, Austria Vienna, Portugal Lisbon, Ireland Dublin, Norway Oslo, Sweden Stockholm, Denmark "
    "Copenhagen, Finland Helsinki, Poland Warsaw, Hungary Budapest, Belgium Brussels, Cuba Havana, Peru Lima, Kenya "
    "Nairobi, Iran Tehran, Iraq Baghdad, Thailand Bangkok, Turkey Ankara, Canada Ottawa, Cyprus Nicosia, Ukraine Kyiv"
)
SENTENCES = """
She was thirsty, so she drank a glass of | water | sand | ink | nails
It was raining, so he opened his | umbrella | oven | piano | nose
The baby was tired and fell | asleep | upward | ill-bred | bald
To cut the bread she used a | knife | pillow | carpet | window
He was cold, so he put on a warm | coat | plate | spoon | letter
The fish swam in the | river | sky | oven | drawer
Birds build their nests in | trees | pencils | thunder | letters
After the film they left the | cinema | jar | moon | envelope
The farmer milked the | cow | hat | sky | pie
She wrote the letter with a | pen | bee | leg | lamp
The key would not fit in the | lock | tea | wind | air
He lost the race because he ran too | slowly | bluely | wet | deeply
In winter the lake is covered with | ice | tea | jam | wool
The dog wagged its | tail | roof | ink | page
The plane landed at the | airport | cup | mirror | pocket
She turned on the lamp because it was | dark | salty | square | polite
He brushed his teeth with a | toothbrush | wheelbarrow | ladder | photograph
The doctor told the patient to stay in | bed | pie | ink | orbit
They lit a fire to keep | warm | odd | wide | shy
The milk was left in the sun and turned | sour | wooden | famous | silent
The bus was full, so she had to | stand | melt | bloom | fly
He paid for the bread with | money | thunder | silence | shadows
The moon shines at | night | lunch | noon | sea
The hungry lion hunted a | deer | bicycle | violin | bridge
A triangle has three | sides | eyes | wives | ears
The glass fell on the floor and | broke | sang | slept | ran
Bees make | honey | blankets | letters | bottles
The ship sailed across the | ocean | bed | pillow | hat
She watered the flowers so that they would | grow | shout | whistle | argue
He wore glasses because he could not | see | hum | eat | run
The children built a castle of | sand | fog | thunder | air
The teacher wrote on the | board | sea | cloud | tea
Snow is cold, and fire is | hot | shy | wet | sad
The hen laid an | egg | axe | arm | oar
He opened the door and walked into the | room | coin | pen | nail
You can hear with your | ears | lips | hair | toes
The carpenter made a table of | wood | fog | air | tea
The shop was closed, so they could not | buy | fly | nod | hum
To send the parcel she went to the post | office | ocean | hat | stadium
The music was so loud that he covered his | ears | hat | keys | pie
"""


def _choose(draw: random.Random, prompt: str, right: str, wrong: Sequence[str], *, shuffle: bool = True) -> Question:
    """A question with the right choice at a drawn place among N_CHOICES."""
    others = list(dict.fromkeys(text for text in wrong if text != right))
    if shuffle:
        draw.shuffle(others)
    choices = others[: N_CHOICES - 1]
    place = draw.randrange(N_CHOICES)
    return Question(prompt, [*choices[:place], right, *choices[place:]], place)


def _near(draw: random.Random, number: int) -> list[str]:
    """Other numbers of about this size."""
    steps = [step for step in (-12, -10, -3, -2, -1, 1, 2, 3, 10, 12) if number + step > 0]
    return [str(number + step) for step in draw.sample(steps, min(len(steps), 6))]


def _pairs(text: str) -> list[tuple[str, str]]:
    """Pairs of words of a list with commas."""
    return [tuple(pair.split()) for pair in text.split(",")]


def addition(draw: random.Random) -> Question:
    """Sums of two numbers below 50, after two solved ones."""
    a, b, c, d, e, f = (draw.randint(2, 49) for _ in range(6))
    return _choose(draw, f"{a} + {b} = {a + b}\n{c} + {d} = {c + d}\n{e} + {f} =", str(e + f), _near(draw, e + f))


def multiplication(draw: random.Random) -> Question:
    """Products of one-digit numbers, after two solved ones."""
    a, b, c, d, e, f = (draw.randint(2, 9) for _ in range(6))
    wrong = [str(e * (f + 1)), str(e * (f - 1)), str((e + 1) * f), *_near(draw, e * f)]
    return _choose(draw, f"{a} times {b} is {a * b}. {c} times {d} is {c * d}. {e} times {f} is", str(e * f), wrong)


def copying(draw: random.Random) -> Question:
    """The last word of a list that is repeated."""
    words = draw.sample(WORDS.split(), 8)
    listed = " ".join(words)
    return _choose(draw, f"{listed} . {' '.join(words[:5])}", words[5], [words[0], words[2], words[7]])


def brackets(draw: random.Random) -> Question:
    """The bracket that closes the one that was opened last."""
    pairs = dict(zip("([{<", ")]}>", strict=True))
    open_ones: list[str] = []
    text = "( [ ] ) { < > } [ ( ) ]\n"
    while len(open_ones) < 2 or len(text) < 44:
        if len(open_ones) > 2 or (len(open_ones) > 1 and draw.random() < 0.45):
            text += f"{pairs[open_ones.pop()]} "
        else:
            open_ones.append(draw.choice("([{<"))
            text += f"{open_ones[-1]} "
    return _choose(draw, text.rstrip(), pairs[open_ones[-1]], list(pairs.values()))


def spelling(draw: random.Random) -> Question:
    """The word that letters spell."""
    shown, asked, *others = draw.sample(WORDS.split(), 8)
    mixed = [
        asked[1] + asked[0] + asked[2:],
        asked[:-2] + asked[-1] + asked[-2],
        asked[0] + asked[2] + asked[1] + asked[3:],
    ]
    prompt = f"{'-'.join(shown)} spells {shown}. {'-'.join(asked)} spells"
    return _choose(draw, prompt, asked, [*mixed, *others], shuffle=False)


def order(draw: random.Random) -> Question:
    """The next of a sequence that everybody knows."""
    sequence = draw.choice(SEQUENCES).split()
    start = draw.randrange(len(sequence) - 4)
    shown, right = sequence[start : start + 4], sequence[start + 4]
    wrong = [text for text in sequence if text not in shown]
    wrong = wrong if len(wrong) >= N_CHOICES else list(sequence)
    return _choose(draw, ", ".join(shown) + ",", right, wrong)


def categories(draw: random.Random) -> Question:
    """What kind of thing a word names."""
    (a, of_a), (b, of_b) = draw.sample(sorted(CATEGORIES.items()), 2)
    shown, asked = draw.choice(of_a.split()), draw.choice(of_b.split())
    wrong = [name for name, words in CATEGORIES.items() if asked not in words.split()]
    return _choose(draw, f"Word: {shown}. Kind: {a}.\nWord: {asked}. Kind:", b, wrong)


def opposites(draw: random.Random) -> Question:
    """The opposite of a word, after two examples."""
    (a, b), (c, d), (e, f), *rest = draw.sample(_pairs(OPPOSITES), 9)
    if draw.random() < 0.5:
        e, f = f, e
    prompt = f"The opposite of {a} is {b}. The opposite of {c} is {d}. The opposite of {e} is"
    return _choose(draw, prompt, f, [word for pair in rest for word in pair])


def capitals(draw: random.Random) -> Question:
    """The capital of a country, after an example."""
    (a, b), (c, d), *rest = draw.sample(_pairs(CAPITALS), 8)
    return _choose(draw, f"The capital of {a} is {b}. The capital of {c} is", d, [city for _, city in rest])


def sentences() -> list[Question]:
    """Sentences of everyday life with the word that ends them."""
    draw, questions = random.Random("sentences"), []
    for line in SENTENCES.strip().splitlines():
        prompt, right, *wrong = (part.strip() for part in line.split("|"))
        questions.append(_choose(draw, prompt, right, wrong))
    return questions


def _drawn(make: Callable[[random.Random], Question]) -> Callable[[], list[Question]]:
    """A function of no arguments that returns N_QUESTIONS different questions."""

    def questions() -> list[Question]:
        draw, found = random.Random(make.__name__), {}
        while len(found) < N_QUESTIONS:
            question = make(draw)
            found.setdefault(question.prompt, question)
        return list(found.values())

    return questions


DRAWN = (addition, multiplication, copying, brackets, spelling, order, categories, opposites, capitals)
TASKS: dict[str, Callable[[], list[Question]]] = {make.__name__: _drawn(make) for make in DRAWN} | {
    "sentences": sentences
}
