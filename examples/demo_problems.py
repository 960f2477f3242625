"""The two kinds of problems that the demo model learns and is tested on.

They are word problems with worked steps, and retrieval: a context to look something up in, either a
list of records or facts between filler sentences. Everything is drawn from a `random.Random`.
`train_demo.py` and `eval_accuracy.py` use these problems.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from random import Random


def split(words: str) -> list[str]:
    return words.split()


NAMES = split("""
    Ada Ann Ben Cara Dan Ella Finn Gina Hugo Ida Ivy Jack Kim Leo Lena Max Mia Nina Noah Olga Oscar
    Paul Petra Quinn Rosa Sam Sara Theo Tina Uma Vera Victor Wanda Will Yara Zoe
""")
OBJECTS = split("""
    apples pears plums lemons eggs cakes cookies candies books pens pencils stickers stamps cards
    marbles coins shells stones beads buttons balls toys boats flowers roses seeds bottles cups
    plates candles
""")
CONTAINERS = (  # singular and plural
    ("box", "boxes"),
    ("bag", "bags"),
    ("jar", "jars"),
    ("basket", "baskets"),
    ("crate", "crates"),
)
GOODS = tuple(
    (good, f"{good}s") for good in split("pen book cup ball cake lamp hat kite map plant")
)
WORK = (
    ("reads", "pages"),
    ("paints", "tiles"),
    ("plants", "trees"),
    ("bakes", "cakes"),
    ("writes", "letters"),
    ("folds", "shirts"),
    ("washes", "plates"),
    ("runs", "miles"),
)
GROUPS = (("teams", "team"), ("children", "child"), ("classes", "class"), ("friends", "friend"))

ADJECTIVES = split("""
    amber ancient angry azure bitter black bold brave brief bright broken bronze calm careful
    cheerful clever cloudy cold copper cosy crimson crooked curious daring dark distant dusty eager
    early elegant empty faint famous fearless foggy fragile frozen gentle giant gloomy golden
    graceful grateful green grey happy heavy hidden hollow honest humble icy idle jolly kind lazy
    lively lonely loud lucky merry mighty modest narrow nimble noble odd orange pale patient playful
    polite proud purple quick quiet rapid restless rough royal rusty scarlet secret shy silent
    silver sleepy smooth solid stormy swift tender tiny velvet wild young
""")
NOUNS = split("""
    anchor badger banjo beacon beaver bell bison bridge camel candle canyon castle cedar cello cliff
    cobra comet condor coral cougar crane cricket crown dagger desert dolphin donkey dragon drum
    eagle ember engine falcon ferret fiddle forest fountain fox garden gecko geyser glacier goose
    hammer harbor harp hawk hedgehog heron hornet island jackal jaguar kettle lantern leopard
    lighthouse lizard lobster magnet mammoth meadow mirror monkey moose mountain mule needle ocean
    orchid otter owl panther parrot pebble pelican penguin piano pony prairie puffin rabbit raven
    river rocket saddle salmon spider squirrel statue temple thunder tiger tower trumpet turtle
    violin walnut walrus wolf
""")
CITIES = split("""
    Oslo Paris Rome Cairo Lima Tokyo Delhi Quito Berlin Madrid Lisbon Vienna Prague Dublin Athens
    Boston Denver Havana Nairobi Sydney Toronto Geneva Krakow Zurich
""")
FILLER = (  # a filler sentence takes one phrase from each, in this order
    "The baker, A teacher, The gardener, An old sailor, The mayor, A doctor, The farmer, "
    "A painter, The librarian, A young student, The carpenter, A tired traveller",
    "walked, waited, sang, slept, worked, looked for a chair, told a story, drank some tea, "
    "cleaned the floor, talked to a neighbour, listened to music, carried a ladder",
    "in the kitchen, near the station, behind the school, at the market, under a tree, "
    "by the window, on the hill, beside the lake, in front of the shop, across the street, "
    "next to the barn, at home",
    "all morning, until noon, before dinner, after the rain, for an hour, every day, on Monday, "
    "last week, without a word, in the evening, during the storm, as usual",
)
FILLER_PARTS = tuple(part.split(", ") for part in FILLER)
HELD_OUT = 16  # one in 16 word problems, chosen by a hash of the question, is only used for tests


@dataclass(frozen=True)
class Problem:
    """A question and its answer.

    `answer` is the whole text that the model should write. `result` is the number or word at its
    end, which decides whether an answer is right.
    """

    question: str
    answer: str
    result: str


class Steps:
    """The worked steps of an answer: each operation is computed, checked and written down."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def do(self, a: int, operator: str, b: int) -> int:
        """Compute `a operator b` and write the step down.

        Raises:
            ArithmeticError: The result is not a whole number between 1 and 499.
        """
        if operator == "+":
            value = a + b
        elif operator == "-":
            value = a - b
        elif operator == "*":
            value = a * b
        else:
            value = a // b

        has_remainder = operator == "/" and a % b != 0
        if has_remainder or not 0 < value < 500:
            raise ArithmeticError("not a number that the problems use")
        self.lines.append(f"{a} {operator} {b} = {value}.")
        return value

    def finish(self, question: str) -> Problem:
        result = self.lines[-1].split()[-1].removesuffix(".")
        answer = " ".join([*self.lines, f"The answer is {result}."])
        return Problem(question, answer, result)


def change_stock(rng: Random, steps: Steps, value: int, name: str, thing: str) -> tuple[int, str]:
    """Change how many things a person has. Returns the new number and a sentence about it."""
    amount = rng.randint(2, 60)
    other = rng.choice(NAMES)
    if rng.random() < 0.5:
        event = rng.choice(
            (
                f"{name} buys {amount} more {thing}.",
                f"{name} finds {amount} {thing}.",
                f"{other} gives {name} {amount} {thing}.",
            )
        )
        return steps.do(value, "+", amount), event

    event = rng.choice(
        (
            f"{name} gives {amount} {thing} to {other}.",
            f"{name} loses {amount} {thing}.",
            f"{name} sells {amount} {thing}.",
        )
    )
    return steps.do(value, "-", amount), event


def ask_stock(
    rng: Random, steps: Steps, value: int, name: str, thing: str, events: list[str]
) -> Problem:
    """Add the question to a problem about how many things a person has."""
    if rng.random() < 0.4:
        number = rng.randint(2, 9)
        container, containers = rng.choice(CONTAINERS)
        steps.do(value, "/", number)
        events.append(f"{name} puts the {thing} into {number} equal {containers}.")
        events.append(f"How many {thing} are in each {container}?")
    else:
        events.append(f"How many {thing} does {name} have now?")
    return steps.finish(" ".join(events))


def make_stock(rng: Random, steps: Steps) -> Problem:
    """A person has things, and gains or loses some two or three times."""
    name = rng.choice(NAMES)
    thing = rng.choice(OBJECTS)
    value = rng.randint(5, 99)
    events = [f"{name} has {value} {thing}."]
    for _ in range(rng.randint(2, 3)):
        value, event = change_stock(rng, steps, value, name, thing)
        events.append(event)
    return ask_stock(rng, steps, value, name, thing, events)


def make_packs(rng: Random, steps: Steps) -> Problem:
    """A person has containers, each with the same number of things."""
    name = rng.choice(NAMES)
    thing = rng.choice(OBJECTS)
    (box, boxes), (other_box, other_boxes) = rng.sample(CONTAINERS, 2)
    num_boxes = rng.randint(2, 9)
    per_box = rng.randint(2, 25)
    num_other_boxes = rng.randint(2, 9)
    per_other_box = rng.randint(2, 25)

    value = steps.do(num_boxes, "*", per_box)
    events = [f"{name} has {num_boxes} {boxes} with {per_box} {thing} in each {box}."]
    if rng.random() < 0.5:
        events.append(
            f"{name} also has {num_other_boxes} {other_boxes} "
            f"with {per_other_box} {thing} in each {other_box}."
        )
        value = steps.do(value, "+", steps.do(num_other_boxes, "*", per_other_box))
    else:
        value, event = change_stock(rng, steps, value, name, thing)
        events.append(event)
    return ask_stock(rng, steps, value, name, thing, events)


def make_shop(rng: Random, steps: Steps) -> Problem:
    """A person buys two kinds of goods. Asks for the total price or for the money left."""
    name = rng.choice(NAMES)
    (good, goods), (other_good, other_goods) = rng.sample(GOODS, 2)
    price = rng.randint(2, 25)
    other_price = rng.randint(2, 25)
    number = rng.randint(2, 9)
    other_number = rng.randint(2, 9)

    question = f"A {good} costs {price} dollars and a {other_good} costs {other_price} dollars."
    question += f" {name} buys {number} {goods} and {other_number} {other_goods}."
    paid = steps.do(number, "*", price)
    total = steps.do(paid, "+", steps.do(other_number, "*", other_price))
    if rng.random() < 0.5:
        return steps.finish(f"{question} How many dollars does {name} pay?")

    enough = [money for money in (50, 100, 200, 300, 400) if money > total]
    money = rng.choice(enough or [499])
    steps.do(money, "-", total)
    question += f" {name} had {money} dollars. How many dollars does {name} have left?"
    return steps.finish(question)


def make_comparison(rng: Random, steps: Steps) -> Problem:
    """Three people have things. How many is given for the first, and relative to the one before."""
    names = rng.sample(NAMES, 3)
    thing = rng.choice(OBJECTS)
    value = rng.randint(4, 60)
    values = [value]
    sentences = [f"{names[0]} has {value} {thing}."]
    for previous, name in pairwise(names):
        operator = rng.choice("+-*")
        amount = rng.randint(2, 40)
        factor = rng.randint(2, 5)
        if operator == "+":
            relation = f"{amount} more {thing} than"
        elif operator == "-":
            relation = f"{amount} fewer {thing} than"
        else:
            relation = f"{factor} times as many {thing} as"
        values.append(steps.do(values[-1], operator, factor if operator == "*" else amount))
        sentences.append(f"{name} has {relation} {previous}.")

    if rng.random() < 0.4:
        sentences.append(f"How many {thing} does {names[2]} have?")
    else:
        everyone = f"{names[0]}, {names[1]} and {names[2]}"
        sentences.append(f"How many {thing} do {everyone} have together?")
        steps.do(steps.do(values[0], "+", values[1]), "+", values[2])
    return steps.finish(" ".join(sentences))


def make_rate(rng: Random, steps: Steps) -> Problem:
    """A person does some work every day and then more. Asks for the total or the rest to a goal."""
    name = rng.choice(NAMES)
    verb, thing = rng.choice(WORK)
    per_day = rng.randint(2, 25)
    days = rng.randint(2, 9)
    more = rng.randint(2, 60)
    value = steps.do(steps.do(days, "*", per_day), "+", more)
    question = f"{name} {verb} {per_day} {thing} a day for {days} days."
    question += f" Then {name} {verb} {more} more {thing}."
    if rng.random() < 0.5:
        return steps.finish(f"{question} How many {thing} is that in all?")

    goal = value + rng.randint(2, 99)
    steps.do(goal, "-", value)
    return steps.finish(f"{question} The goal is {goal} {thing}. How many {thing} are left to do?")


def make_share(rng: Random, steps: Steps) -> Problem:
    """The things on two tables are shared equally."""
    thing = rng.choice(OBJECTS)
    people, person = rng.choice(GROUPS)
    num_people = rng.randint(2, 9)
    share = rng.randint(3, 40)
    on_table = rng.randint(2, 99)
    on_other_table = num_people * share - on_table
    steps.do(steps.do(on_table, "+", on_other_table), "/", num_people)
    if on_other_table <= 0:
        raise ArithmeticError("an empty table")

    question = f"There are {on_table} {thing} on one table"
    question += f" and {on_other_table} {thing} on another table."
    question += f" They are shared equally by {num_people} {people}."
    if rng.random() < 0.5:
        return steps.finish(f"{question} How many {thing} does each {person} get?")

    sold = rng.randint(2, 40)
    steps.do(share, "-", sold)
    question += f" Each {person} then sells {sold} {thing}."
    return steps.finish(f"{question} How many {thing} does each {person} have now?")


FAMILIES = (make_stock, make_packs, make_shop, make_comparison, make_rate, make_share)


def make_word_problem(rng: Random, held_out: bool) -> Problem:
    """A problem of two to four operations with numbers under 500.

    Problems with `held_out` are for tests: training never draws them.
    """
    while True:
        family = rng.choice(FAMILIES)
        try:
            problem = family(rng, Steps())
        except ArithmeticError:
            continue
        is_held_out = zlib.crc32(problem.question.encode()) % HELD_OUT == 0
        if is_held_out == held_out:
            return problem


@dataclass(frozen=True)
class Context:
    """A text to look things up in.

    `facts` has the problems that can be asked, each with the index of the piece that answers it.
    """

    pieces: list[str]
    facts: list[tuple[int, Problem]]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def make_facts(rng: Random, as_records: bool) -> Iterator[tuple[str, Problem]]:
    """Statements, each about a different thing, with the question that each one answers."""
    for key in rng.sample(range(len(ADJECTIVES) * len(NOUNS)), 2000):
        subject = f"{ADJECTIVES[key // len(NOUNS)]} {NOUNS[key % len(NOUNS)]}"
        if as_records or rng.random() < 0.5:
            code = f"{rng.randrange(1000, 10000)}"
            answer = f"The code of the {subject} is {code}."
            statement = f"\n- {subject}: {code}" if as_records else f" {answer}"
            yield statement, Problem(f"What is the code of the {subject}?", answer, code)
        else:
            city = rng.choice(CITIES)
            answer = f"The {subject} lives in {city}."
            yield f" {answer}", Problem(f"Where does the {subject} live?", answer, city)


def make_context(rng: Random, length_of: Callable[[str], int], budget: int) -> Context:
    """Records, or facts between filler sentences, of at most `budget` tokens.

    `length_of` counts the tokens of a piece of text.
    """
    as_records = rng.random() < 0.5
    pieces = ["Records:" if as_records else "Report:"]
    facts: list[tuple[int, Problem]] = []
    source = make_facts(rng, as_records)
    fact_share = 1.0 if as_records else rng.choice((0.05, 0.1, 0.2, 0.4))

    tokens_left = budget - length_of(pieces[0])
    for index in count(1):
        problem = None
        if index == 1 or rng.random() < fact_share:
            piece, problem = next(source)
        else:
            sentence = " ".join(rng.choice(part) for part in FILLER_PARTS)
            piece = f" {sentence}."

        tokens_left -= length_of(piece)
        if tokens_left < 0:
            break
        pieces.append(piece)
        if problem is not None:
            facts.append((index, problem))
    return Context(pieces, facts)
