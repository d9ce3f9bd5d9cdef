"""Demo similarity: pairs of scenes, scored from 0 (nothing in common) to 5 (the same meaning) in steps of 0.2.

A scene has four slots. Each slot in which two scenes agree adds its weight to the score, or 0.2 less when they name it
by different words; how the sentence is built does not count. The sentences of a pair always differ in form, of which
there are six: if pairs of equal scenes in common words ran out, a rare word would tell of a high score.
"""

from __future__ import annotations

from minbert.data.demo_dice import Dice
from minbert.data.demo_words import ACTIONS, MANNERS, SUBJECTS, THINGS, a, sentence, word

SLOTS = ((SUBJECTS, 1.2), (ACTIONS, 1.4), (THINGS, 1.4), (MANNERS, 1.0))
OTHER_WORD = 0.2
FORMS = (
    "{who} is {does}",
    "I see {who} {does}",
    "we see {who} {does}",
    "here is {who} {does}",
    "there is {who} {does}",
    "look at {who} {does}",
)
COMMON = 0.9  # how often a concept goes by its common word
AGREEMENTS = (0.0, 0.1, 0.5, 0.9, 1.0)  # a pair's chance of agreeing in a slot: most pairs are much alike or hardly


def scenes(dice: Dice, number: int) -> tuple[tuple[str, str], float]:
    """Two scenes and their similarity; the chances of agreeing take turns."""
    agreement = AGREEMENTS[number % len(AGREEMENTS)]
    score = 0.0
    first, second = [], []
    for concepts, weight in SLOTS:
        concept = dice.pick(concepts)
        first.append(word(dice, concept, COMMON))
        if dice.chance(agreement):
            second.append(word(dice, concept, COMMON))
            score += weight if first[-1] == second[-1] else weight - OTHER_WORD
        else:
            second.append(word(dice, dice.other(concepts, concept), COMMON))
    form, other_form = dice.two(FORMS)
    return (_scene(form, *first), _scene(other_form, *second)), round(score, 1)


def _scene(form: str, subject: str, action: str, thing: str, manner: str) -> str:
    return sentence(form.format(who=a(subject), does=f"{action} {a(thing)} {manner}"), ".")
