"""Demo paraphrase: pairs of questions that ask the same (1) or not (0).

Each wording of a question draws a form and synonyms. Duplicates are two wordings of one question. Half of the others
differ in a single point, such as the thing, the manner or the direction of a trip, and share nearly all words; the rest
agree only by chance. Half of all pairs of each kind are duplicates. The label is independent of what one question asks,
of its form, and of whether both have the same form: only a comparison of the two predicts it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from minbert.data.demo.seeded_random import SeededRandom
from minbert.data.demo.words import ACTIONS, MANNERS, THINGS, Concept, a, sentence, word

REQUESTS = ("any tips for", "any advice on", "any tricks for", "what helps with", "how about", "who knows about")
CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Lisbon")
ASPECTS = (
    ("how long is the trip", "how many hours is it", "what is the duration"),
    ("how expensive is the trip", "how much money is it", "what is the price"),
    ("is there a train", "can I take a train", "which train goes"),
)
COMMON = 0.75  # probability of a concept's common word
NEAR = 0.5  # share of the pairs with different questions that differ in one point only


@dataclass(frozen=True)
class HowTo:
    """How to do something to a thing in some manner."""

    action: Concept
    thing: Concept
    manner: Concept

    forms: ClassVar[range] = range(len(REQUESTS))

    @classmethod
    def draw(cls, random: SeededRandom) -> HowTo:
        return cls(random.pick(ACTIONS), random.pick(THINGS), random.pick(MANNERS))

    def near(self, random: SeededRandom) -> HowTo:
        """A question that differs in one point."""
        point = random.below(3)
        if point == 0:
            return replace(self, action=random.other(ACTIONS, self.action))
        if point == 1:
            return replace(self, thing=random.other(THINGS, self.thing))
        return replace(self, manner=random.other(MANNERS, self.manner))

    def words(self, random: SeededRandom, form: int) -> str:
        action, thing, manner = (word(random, slot, COMMON) for slot in (self.action, self.thing, self.manner))
        return sentence(f"{REQUESTS[form]} {action} {a(thing)} {manner}", "?")


@dataclass(frozen=True)
class Trip:
    """Something about the way from one city to another."""

    aspect: tuple[str, ...]  # its wordings
    start: str
    end: str

    forms: ClassVar[range] = range(len(ASPECTS[0]))

    @classmethod
    def draw(cls, random: SeededRandom) -> Trip:
        return cls(random.pick(ASPECTS), *random.two(CITIES))

    def near(self, random: SeededRandom) -> Trip:
        """A question that differs in one point."""
        point = random.below(3)
        if point == 0:
            return replace(self, aspect=random.other(ASPECTS, self.aspect))
        if point == 1:
            return replace(self, start=self.end, end=self.start)
        return replace(self, end=random.pick([city for city in CITIES if city not in (self.start, self.end)]))

    def words(self, random: SeededRandom, form: int) -> str:
        way = (f"from {self.start} to {self.end}", f"to {self.end} from {self.start}")
        return sentence(f"{self.aspect[form]} {random.pick(way)}", "?")


KINDS: tuple[type[HowTo] | type[Trip], ...] = (HowTo,) * 9 + (Trip,)


def questions(random: SeededRandom, number: int) -> tuple[tuple[str, str], float]:
    """Two questions and whether they ask the same: the number decides label, kind and whether the forms agree."""
    rest, same = divmod(number, 2)
    rest, index = divmod(rest, len(KINDS))
    kind, same_form = KINDS[index], rest % 2 == 1
    first = second = kind.draw(random)
    if not same:
        second = first.near(random) if random.chance(NEAR) else kind.draw(random)
        while second == first:
            second = kind.draw(random)
    form, other_form = random.two(kind.forms)
    while True:
        texts = first.words(random, form), second.words(random, form if same_form else other_form)
        if texts[0] != texts[1]:
            return texts, float(same)
