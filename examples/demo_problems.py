"""The two kinds of problem that the demo model is trained on and tested with.

Word problems with worked steps, and contexts of records or of facts among filler to look something up in.
All of it is drawn from a `random.Random`; `train_demo.py` and `eval_accuracy.py` use it.
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
    Ada Ann Ben Cara Dan Ella Finn Gina Hugo Ida Ivy Jack Kim Leo Lena Max Mia Nina Noah Olga Oscar Paul
    Petra Quinn Rosa Sam Sara Theo Tina Uma Vera Victor Wanda Will Yara Zoe
""")
OBJECTS = split("""
    apples pears plums lemons eggs cakes cookies candies books pens pencils stickers stamps cards marbles
    coins shells stones beads buttons balls toys boats flowers roses seeds bottles cups plates candles
""")
CONTAINERS = (("box", "boxes"), ("bag", "bags"), ("jar", "jars"), ("basket", "baskets"), ("crate", "crates"))
GOODS = tuple((one, f"{one}s") for one in split("pen book cup ball cake lamp hat kite map plant"))
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
    amber ancient angry azure bitter black bold brave brief bright broken bronze calm careful cheerful clever
    cloudy cold copper cosy crimson crooked curious daring dark distant dusty eager early elegant empty faint
    famous fearless foggy fragile frozen gentle giant gloomy golden graceful grateful green grey happy heavy
    hidden hollow honest humble icy idle jolly kind lazy lively lonely loud lucky merry mighty modest narrow
    nimble noble odd orange pale patient playful polite proud purple quick quiet rapid restless rough royal
    rusty scarlet secret shy silent silver sleepy smooth solid stormy swift tender tiny velvet wild young
""")
NOUNS = split("""
    anchor badger banjo beacon beaver bell bison bridge camel candle canyon castle cedar cello cliff cobra
    comet condor coral cougar crane cricket crown dagger desert dolphin donkey dragon drum eagle ember engine
    falcon ferret fiddle forest fountain fox garden gecko geyser glacier goose hammer harbor harp hawk
    hedgehog heron hornet island jackal jaguar kettle lantern leopard lighthouse lizard lobster magnet mammoth
    meadow mirror monkey moose mountain mule needle ocean orchid otter owl panther parrot pebble pelican
    penguin piano pony prairie puffin rabbit raven river rocket saddle salmon spider squirrel statue temple
    thunder tiger tower trumpet turtle violin walnut walrus wolf
""")
CITIES = split("""
    Oslo Paris Rome Cairo Lima Tokyo Delhi Quito Berlin Madrid Lisbon Vienna Prague Dublin Athens Boston
    Denver Havana Nairobi Sydney Toronto Geneva Krakow Zurich
""")
FILLER = (  # a sentence has a part of each, in this order
    "The baker, A teacher, The gardener, An old sailor, The mayor, A doctor, The farmer, A painter, "
    "The librarian, A young student, The carpenter, A tired traveller",
    "walked, waited, sang, slept, worked, looked for a chair, told a story, drank some tea, "
    "cleaned the floor, talked to a neighbour, listened to music, carried a ladder",
    "in the kitchen, near the station, behind the school, at the market, under a tree, by the window, "
    "on the hill, beside the lake, in front of the shop, across the street, next to the barn, at home",
    "all morning, until noon, before dinner, after the rain, for an hour, every day, on Monday, "
    "last week, without a word, in the evening, during the storm, as usual",
)
FILLER_PARTS = tuple(part.split(", ") for part in FILLER)
HELD_OUT = 16  # one word problem in so many is kept for the test, by a hash of its text


@dataclass(frozen=True)
class Problem:
    """`answer` is the whole text that is wanted; `result` what of it is right or wrong."""

    question: str
    answer: str
    result: str


class Steps:
    """Worked steps: each operation is done, checked and written down."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def do(self, a: int, operator: str, b: int) -> int:
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if operator == "/" else 0}[operator]
        if not 0 < value < 500 or (operator == "/" and a % b):
            raise ArithmeticError("not a number that the problems use")
        self.lines.append(f"{a} {operator} {b} = {value}.")
        return value

    def finish(self, question: str) -> Problem:
        result = self.lines[-1].split()[-1].removesuffix(".")
        return Problem(question, " ".join([*self.lines, f"The answer is {result}."]), result)


def change_stock(rng: Random, steps: Steps, value: int, name: str, thing: str) -> tuple[int, str]:
    """One event that adds to what somebody has or takes from it."""
    x, other = rng.randint(2, 60), rng.choice(NAMES)
    if rng.random() < 0.5:
        event = rng.choice((f"{name} buys {x} more {thing}.", f"{name} finds {x} {thing}.",
                            f"{other} gives {name} {x} {thing}."))  # fmt: skip
        return steps.do(value, "+", x), event
    event = rng.choice((f"{name} gives {x} {thing} to {other}.", f"{name} loses {x} {thing}.",
                        f"{name} sells {x} {thing}."))  # fmt: skip
    return steps.do(value, "-", x), event


def ask_stock(rng: Random, steps: Steps, value: int, name: str, thing: str, events: list[str]) -> Problem:
    if rng.random() < 0.4:
        k, (one, many) = rng.randint(2, 9), rng.choice(CONTAINERS)
        steps.do(value, "/", k)
        events.append(f"{name} puts the {thing} into {k} equal {many}. How many {thing} are in each {one}?")
    else:
        events.append(f"How many {thing} does {name} have now?")
    return steps.finish(" ".join(events))


def make_stock(rng: Random, steps: Steps) -> Problem:
    name, thing, value = rng.choice(NAMES), rng.choice(OBJECTS), rng.randint(5, 99)
    events = [f"{name} has {value} {thing}."]
    for _ in range(rng.randint(2, 3)):
        value, event = change_stock(rng, steps, value, name, thing)
        events.append(event)
    return ask_stock(rng, steps, value, name, thing, events)


def make_packs(rng: Random, steps: Steps) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    (one, many), (one2, many2) = rng.sample(CONTAINERS, 2)
    a, b, c, d = rng.randint(2, 9), rng.randint(2, 25), rng.randint(2, 9), rng.randint(2, 25)
    value = steps.do(a, "*", b)
    events = [f"{name} has {a} {many} with {b} {thing} in each {one}."]
    if rng.random() < 0.5:
        events.append(f"{name} also has {c} {many2} with {d} {thing} in each {one2}.")
        value = steps.do(value, "+", steps.do(c, "*", d))
    else:
        value, event = change_stock(rng, steps, value, name, thing)
        events.append(event)
    return ask_stock(rng, steps, value, name, thing, events)


def make_shop(rng: Random, steps: Steps) -> Problem:
    name, ((one, many), (one2, many2)) = rng.choice(NAMES), rng.sample(GOODS, 2)
    price, price2, n, n2 = rng.randint(2, 25), rng.randint(2, 25), rng.randint(2, 9), rng.randint(2, 9)
    question = f"A {one} costs {price} dollars and a {one2} costs {price2} dollars."
    question += f" {name} buys {n} {many} and {n2} {many2}."
    total = steps.do(steps.do(n, "*", price), "+", steps.do(n2, "*", price2))
    if rng.random() < 0.5:
        return steps.finish(f"{question} How many dollars does {name} pay?")
    purse = rng.choice([p for p in (50, 100, 200, 300, 400) if p > total] or [499])
    steps.do(purse, "-", total)
    return steps.finish(f"{question} {name} had {purse} dollars. How many dollars does {name} have left?")


def make_comparison(rng: Random, steps: Steps) -> Problem:
    names, thing, first = rng.sample(NAMES, 3), rng.choice(OBJECTS), rng.randint(4, 60)
    values, parts = [first], [f"{names[0]} has {first} {thing}."]
    for before, name in pairwise(names):
        kind, x, k = rng.choice("+-*"), rng.randint(2, 40), rng.randint(2, 5)
        values.append(steps.do(values[-1], kind, k if kind == "*" else x))
        what = {
            "+": f"{x} more {thing} than",
            "-": f"{x} fewer {thing} than",
            "*": f"{k} times as many {thing} as",
        }[kind]
        parts.append(f"{name} has {what} {before}.")
    if rng.random() < 0.4:
        parts.append(f"How many {thing} does {names[2]} have?")
    else:
        parts.append(f"How many {thing} do {names[0]}, {names[1]} and {names[2]} have together?")
        steps.do(steps.do(values[0], "+", values[1]), "+", values[2])
    return steps.finish(" ".join(parts))


def make_rate(rng: Random, steps: Steps) -> Problem:
    name, (verb, thing) = rng.choice(NAMES), rng.choice(WORK)
    each, days, x = rng.randint(2, 25), rng.randint(2, 9), rng.randint(2, 60)
    value = steps.do(steps.do(days, "*", each), "+", x)
    question = f"{name} {verb} {each} {thing} a day for {days} days. Then {name} {verb} {x} more {thing}."
    if rng.random() < 0.5:
        return steps.finish(f"{question} How many {thing} is that in all?")
    goal = value + rng.randint(2, 99)
    steps.do(goal, "-", value)
    return steps.finish(f"{question} The goal is {goal} {thing}. How many {thing} are left to do?")


def make_share(rng: Random, steps: Steps) -> Problem:
    thing, (many, one) = rng.choice(OBJECTS), rng.choice(GROUPS)
    k, share, a = rng.randint(2, 9), rng.randint(3, 40), rng.randint(2, 99)
    steps.do(steps.do(a, "+", k * share - a), "/", k)
    question = f"There are {a} {thing} on one table and {k * share - a} {thing} on another table."
    question += f" They are shared equally by {k} {many}."
    if k * share - a <= 0:
        raise ArithmeticError("an empty table")
    if rng.random() < 0.5:
        return steps.finish(f"{question} How many {thing} does each {one} get?")
    x = rng.randint(2, 40)
    steps.do(share, "-", x)
    return steps.finish(f"{question} Each {one} then sells {x} {thing}. How many {thing} does each {one} have now?")


FAMILIES = (make_stock, make_packs, make_shop, make_comparison, make_rate, make_share)


def make_word_problem(rng: Random, held_out: bool) -> Problem:
    """Two to four operations with numbers under 500. No problem is both for training and held out."""
    while True:
        try:
            problem = rng.choice(FAMILIES)(rng, Steps())
        except ArithmeticError:
            continue
        if (zlib.crc32(problem.question.encode()) % HELD_OUT == 0) == held_out:
            return problem


@dataclass(frozen=True)
class Context:
    """A text to look things up in: its pieces, and for some of these (by index) what can be asked."""

    pieces: list[str]
    facts: list[tuple[int, Problem]]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def make_facts(rng: Random, as_records: bool) -> Iterator[tuple[str, Problem]]:
    """Statements, no two of them about the same thing, each with its question."""
    for key in rng.sample(range(len(ADJECTIVES) * len(NOUNS)), 2000):
        who = f"{ADJECTIVES[key // len(NOUNS)]} {NOUNS[key % len(NOUNS)]}"
        if as_records or rng.random() < 0.5:
            code = f"{rng.randrange(1000, 10000)}"
            answer = f"The code of the {who} is {code}."
            question = f"What is the code of the {who}?"
            yield f"\n- {who}: {code}" if as_records else f" {answer}", Problem(question, answer, code)
        else:
            city = rng.choice(CITIES)
            answer = f"The {who} lives in {city}."
            yield f" {answer}", Problem(f"Where does the {who} live?", answer, city)


def make_context(rng: Random, length_of: Callable[[str], int], budget: int) -> Context:
    """Records, or facts among filler, of at most `budget` tokens."""
    as_records = rng.random() < 0.5
    pieces = ["Records:" if as_records else "Report:"]
    facts: list[tuple[int, Problem]] = []
    source = make_facts(rng, as_records)
    share = 1.0 if as_records else rng.choice((0.05, 0.1, 0.2, 0.4))
    left = budget - length_of(pieces[0])
    for index in count(1):
        piece, problem = "", None
        if index == 1 or rng.random() < share:
            piece, problem = next(source)
        else:
            piece = f" {' '.join(rng.choice(part) for part in FILLER_PARTS)}."
        left -= length_of(piece)
        if left < 0:
            break
        pieces.append(piece)
        if problem is not None:
            facts.append((index, problem))
    return Context(pieces, facts)
