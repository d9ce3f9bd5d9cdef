"""Demo sentiment: reviews in five classes, from graded adjectives, intensifiers, negation and two-clause contrast.

A review is built from a target score in [-2, 2]; its label is the score plus 2. The rules, which a model has to
discover: "very" makes a mild adjective strong, "not" turns a mild one around and flattens a strong one to neutral, "far
from" turns a strong one into its mild opposite; in a contrast the main clause counts in full and the other one half,
rounded towards zero.
"""

from __future__ import annotations

from minbert.data.demo_dice import Dice
from minbert.data.demo_words import a, sentence

ADJECTIVES = {
    2: ("superb", "wonderful", "brilliant", "outstanding", "excellent", "fantastic"),
    1: ("good", "pleasant", "nice", "enjoyable", "decent", "charming"),
    0: ("average", "ordinary", "acceptable", "unremarkable", "passable", "standard"),
    -1: ("weak", "dull", "poor", "disappointing", "bland", "tedious"),
    -2: ("terrible", "awful", "dreadful", "horrible", "appalling", "abysmal"),
}
INTENSIFIERS = ("very", "really", "extremely", "truly")
SOFTENERS = ("fairly", "quite", "rather", "reasonably")
NEGATORS = ("not", "hardly")
VERBS = {
    2: ("loved", "adored"),
    1: ("liked", "enjoyed"),
    0: ("did not mind", "had no opinion about"),
    -1: ("disliked", "did not like"),
    -2: ("hated", "detested"),
}
DOMAINS = (
    (("film", "movie"), ("plot", "cast", "ending", "script", "soundtrack", "opening scene", "leading actor")),
    (("book", "novel"), ("story", "style", "first chapter", "last chapter", "main character", "narrator", "cover")),
    (("restaurant", "place"), ("soup", "menu", "dessert", "waiter", "wine list", "main course", "salad")),
    (("hotel", "resort"), ("room", "breakfast", "view", "pool", "lobby", "bathroom", "receptionist")),
    (("concert", "show"), ("singer", "band", "stage", "light show", "encore", "drummer", "set list")),
    (("museum", "gallery"), ("collection", "audio guide", "building", "guided tour", "café", "gift shop", "garden")),
)
OPENERS = ("To be honest, ", "In my opinion, ", "Overall, ", "As I remember it, ", "If you ask me, ")
CONTRASTS = {  # the scores of aside and main clause that make each score
    -1: ((1, -2), (2, -2)),
    0: ((-1, 1), (-2, 1), (1, -1), (2, -1)),
    1: ((-1, 2), (-2, 2)),
}


def review(dice: Dice, number: int) -> tuple[tuple[str], float]:
    """A review and its label, a whole number from 0 (worst) to 4 (best): the classes take turns."""
    score = number % 5 - 2
    things, aspects = dice.pick(DOMAINS)
    thing = dice.pick(things)
    form = dice.below(5)
    if form < 2 and abs(score) < 2:
        text = _contrast(dice, score, aspects, thing)
    elif form == 2:
        text = " and ".join(_clause(dice, score, aspect, thing) for aspect in dice.two(aspects))
    else:
        text = _clause(dice, score, dice.pick(aspects), thing)
    if dice.chance(0.3):
        text = dice.pick(OPENERS) + text
    return (sentence(text, dice.pick((".", ".", ".", "!"))),), float(score + 2)


def _contrast(dice: Dice, score: int, aspects: tuple[str, ...], thing: str) -> str:
    """Two clauses of opposite sentiment, of which the main one decides."""
    aside, main = dice.pick(CONTRASTS[score])
    first_aspect, second_aspect = dice.two(aspects)
    aside_text = _clause(dice, aside, first_aspect, thing)
    main_text = _clause(dice, main, second_aspect, thing)
    return dice.pick(
        (
            f"{aside_text}, but {main_text}",
            f"although {aside_text}, {main_text}",
            f"{main_text}, even though {aside_text}",
        )
    )


def _clause(dice: Dice, score: int, aspect: str, thing: str) -> str:
    """A clause of the given score on one aspect of the thing under review."""
    where = dice.pick(("", "", f" of the {thing}", f" of this {thing}"))
    form = dice.below(6)
    if form == 0:
        return f"I {dice.pick(VERBS[score])} the {aspect}{where}"
    if form == 1:
        return f"I found the {aspect}{where} {dice.pick(ADJECTIVES[score])}"
    if form == 2:
        return f"the {thing} had {a(dice.pick(ADJECTIVES[score]))} {aspect}"
    return f"the {aspect}{where} {dice.pick(('was', 'was', 'seemed'))} {_phrase(dice, score)}"


def _phrase(dice: Dice, score: int) -> str:
    """An adjective with what modifies it, worth `score` in all."""
    plain = dice.pick(ADJECTIVES[score])
    if score == 0:
        return dice.pick((plain, f"{dice.pick(NEGATORS)} {dice.pick(ADJECTIVES[dice.pick((-2, 2))])}"))
    sign = 1 if score > 0 else -1
    if abs(score) == 2:
        return dice.pick((plain, f"{dice.pick(INTENSIFIERS)} {dice.pick(ADJECTIVES[sign])}"))
    return dice.pick(
        (
            plain,
            f"{dice.pick(SOFTENERS)} {plain}",
            f"{dice.pick(NEGATORS)} {dice.pick(ADJECTIVES[-sign])}",
            f"far from {dice.pick(ADJECTIVES[-2 * sign])}",
        )
    )
