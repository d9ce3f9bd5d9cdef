"""Demo paraphrase: pairs of questions that ask the same (1) or not (0).

A question is put into words anew each time: a template and synonyms are drawn for what it asks. Duplicates are two
wordings of one question. Of the others, many differ in a single point, such as the thing, the manner or the direction
of a trip, and share nearly all words; the rest agree only by chance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from minbert.data.demo_dice import Dice
from minbert.data.demo_words import ACTIONS, MANNERS, THINGS, Concept, a, sentence, word

CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Lisbon", "Prague")
ASPECTS: tuple[Concept, ...] = (
    ("how long is the trip", "what is the duration of the trip", "how many hours is the trip"),
    ("how expensive is the trip", "what is the price of the trip", "how much money is the trip"),
    ("is there a train", "can I take a train", "which train goes"),
)
REQUESTS = (
    "how do I go about",
    "what is a good way of",
    "what should I know about",
    "is there a trick to",
    "any tips for",
    "any advice on",
)


@dataclass(frozen=True)
class HowTo:
    """How to do something to a thing in some manner."""

    action: Concept
    thing: Concept
    manner: Concept

    @classmethod
    def draw(cls, dice: Dice) -> HowTo:
        return cls(dice.pick(ACTIONS), dice.pick(THINGS), dice.pick(MANNERS))

    def near(self, dice: Dice) -> HowTo:
        """A question that differs in one point."""
        point = dice.below(3)
        if point == 0:
            return replace(self, action=dice.other(ACTIONS, self.action))
        if point == 1:
            return replace(self, thing=dice.other(THINGS, self.thing))
        return replace(self, manner=dice.other(MANNERS, self.manner))

    def words(self, dice: Dice) -> str:
        task = f"{word(dice, self.action)} {a(word(dice, self.thing))} {word(dice, self.manner)}"
        return sentence(f"{dice.pick(REQUESTS)} {task}", "?")


@dataclass(frozen=True)
class Trip:
    """Something about the way from one city to another."""

    aspect: Concept
    start: str
    end: str

    @classmethod
    def draw(cls, dice: Dice) -> Trip:
        return cls(dice.pick(ASPECTS), *dice.two(CITIES))

    def near(self, dice: Dice) -> Trip:
        """A question that differs in one point."""
        point = dice.below(3)
        if point == 0:
            return replace(self, aspect=dice.other(ASPECTS, self.aspect))
        if point == 1:
            return replace(self, start=self.end, end=self.start)
        return replace(self, end=dice.pick([city for city in CITIES if city not in (self.start, self.end)]))

    def words(self, dice: Dice) -> str:
        way = (f"from {self.start} to {self.end}", f"to {self.end} from {self.start}")
        return sentence(f"{dice.pick(self.aspect)} {dice.pick(way)}", "?")


KINDS: tuple[type[HowTo] | type[Trip], ...] = (HowTo, HowTo, HowTo, Trip)


def questions(dice: Dice) -> tuple[tuple[str, str], float]:
    """Two questions and whether they ask the same."""
    first = dice.pick(KINDS).draw(dice)
    fate = dice.below(20)
    if fate < 12:
        second = first
    elif fate < 15:
        second = first.near(dice)
    elif fate < 17:
        second = first.draw(dice)
    else:
        second = dice.pick(KINDS).draw(dice)
    return (first.words(dice), second.words(dice)), float(first == second)
