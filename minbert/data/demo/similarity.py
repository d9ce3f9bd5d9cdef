"""Demo similarity: pairs of scenes, scored from 0 (nothing in common) to 5 (the same meaning) in steps of 0.2.

A scene has four slots. Each slot in which two scenes agree adds its weight to the score, or 0.2 less when they name it
by different words; the form of the sentence does not count. The sentences of a pair always differ in form, of which
there are six: if pairs of equal scenes in common words ran out, a rare word would predict a high score.
"""

from __future__ import annotations

from minbert.data.demo.seeded_random import SeededRandom
from minbert.data.demo.words import ACTIONS, MANNERS, SUBJECTS, THINGS, a, sentence, word

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
COMMON = 0.9  # probability of a concept's common word
AGREEMENTS = (0.0, 0.1, 0.5, 0.9, 1.0)  # a pair's chance of agreeing in a slot: most pairs are very similar or hardly


def scenes(random: SeededRandom, number: int) -> tuple[tuple[str, str], float]:
    """Two scenes and their similarity; the number decides their chance of agreeing."""
    agreement = AGREEMENTS[number % len(AGREEMENTS)]
    score = 0.0
    first, second = [], []
    for concepts, weight in SLOTS:
        concept = random.pick(concepts)
        first.append(word(random, concept, COMMON))
        if random.chance(agreement):
            second.append(word(random, concept, COMMON))
            score += weight if first[-1] == second[-1] else weight - OTHER_WORD
        else:
            second.append(word(random, random.other(concepts, concept), COMMON))
    form, other_form = random.two(FORMS)
    return (_scene(form, *first), _scene(other_form, *second)), round(score, 1)


def _scene(form: str, subject: str, action: str, thing: str, manner: str) -> str:
    return sentence(form.format(who=a(subject), does=f"{action} {a(thing)} {manner}"), ".")
