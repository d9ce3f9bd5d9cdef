"""Demo paraphrase: pairs of questions that ask the same (1) or not (0).

A question is put into words anew each time: a form and synonyms are drawn for what it asks. Duplicates are two wordings
of one question. Half of the others differ in a single point, such as the thing, the manner or the direction of a trip,
and share nearly all words; the rest agree only by chance. Half of all pairs of each kind are duplicates, and what one
question asks, its form, and whether both have the same form tell nothing of the label: only a comparison does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from minbert.data.demo_dice import Dice
from minbert.data.demo_words import ACTIONS, MANNERS, THINGS, Concept, a, sentence, word

REQUESTS = ("any tips for", "any advice on", "any tricks for", "what helps with", "how about", "who knows about")
CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Lisbon")
ASPECTS = (
    ("how long is the trip", "how many hours is it", "what is the duration"),
    ("how expensive is the trip", "how much money is it", "what is the price"),
    ("is there a train", "can I take a train", "which train goes"),
)
COMMON = 0.75  # how often a concept goes by its common word
NEAR = 0.5  # of the pairs that ask for different things, those that differ in one point


@dataclass(frozen=True)
class HowTo:
    """How to do something to a thing in some manner."""

    action: Concept
    thing: Concept
    manner: Concept

    forms: ClassVar[range] = range(len(REQUESTS))

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

    def words(self, dice: Dice, form: int) -> str:
        action, thing, manner = (word(dice, slot, COMMON) for slot in (self.action, self.thing, self.manner))
        return sentence(f"{REQUESTS[form]} {action} {a(thing)} {manner}", "?")


@dataclass(frozen=True)
class Trip:
    """Something about the way from one city to another."""

    aspect: tuple[str, ...]  # its wordings
    start: str
    end: str

    forms: ClassVar[range] = range(len(ASPECTS[0]))

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

    def words(self, dice: Dice, form: int) -> str:
        way = (f"from {self.start} to {self.end}", f"to {self.end} from {self.start}")
        return sentence(f"{self.aspect[form]} {dice.pick(way)}", "?")


KINDS: tuple[type[HowTo] | type[Trip], ...] = (HowTo,) * 9 + (Trip,)


def questions(dice: Dice, number: int) -> tuple[tuple[str, str], float]:
    """Two questions and whether they ask the same: labels, kinds, and whether the forms are alike take turns."""
    rest, same = divmod(number, 2)
    rest, place = divmod(rest, len(KINDS))
    kind, alike = KINDS[place], rest % 2 == 1
    first = second = kind.draw(dice)
    if not same:
        second = first.near(dice) if dice.chance(NEAR) else kind.draw(dice)
        while second == first:
            second = kind.draw(dice)
    form, other_form = dice.two(kind.forms)
    while True:
        texts = first.words(dice, form), second.words(dice, form if alike else other_form)
        if texts[0] != texts[1]:
            return texts, float(same)
