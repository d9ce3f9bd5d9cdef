"""Demo sentiment: reviews in five classes, from graded adjectives, intensifiers, negation and two-clause contrast.

A review is built from a target score in [-2, 2]; its label is the score plus 2. The rules, which a model has to
learn: "very" makes a mild adjective strong; "not" turns a mild one around and flattens a strong one to neutral; "far
from" turns a strong one into its mild opposite; in a contrast the main clause counts in full and the other one half,
rounded towards zero.
"""

from __future__ import annotations

from minbert.data.demo.seeded_random import SeededRandom
from minbert.data.demo.words import a, sentence

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


def review(random: SeededRandom, number: int) -> tuple[tuple[str], float]:
    """A review and its label, a whole number from 0 (worst) to 4 (best), which follows from the number."""
    score = number % 5 - 2
    things, aspects = random.pick(DOMAINS)
    thing = random.pick(things)
    form = random.below(5)
    if form < 2 and abs(score) < 2:
        text = _contrast(random, score, aspects, thing)
    elif form == 2:
        text = " and ".join(_clause(random, score, aspect, thing) for aspect in random.two(aspects))
    else:
        text = _clause(random, score, random.pick(aspects), thing)
    if random.chance(0.3):
        text = random.pick(OPENERS) + text
    return (sentence(text, random.pick((".", ".", ".", "!"))),), float(score + 2)


def _contrast(random: SeededRandom, score: int, aspects: tuple[str, ...], thing: str) -> str:
    """Two clauses of opposite sentiment, of which the main one decides."""
    aside, main = random.pick(CONTRASTS[score])
    first_aspect, second_aspect = random.two(aspects)
    aside_text = _clause(random, aside, first_aspect, thing)
    main_text = _clause(random, main, second_aspect, thing)
    return random.pick(
        (
            f"{aside_text}, but {main_text}",
            f"although {aside_text}, {main_text}",
            f"{main_text}, even though {aside_text}",
        )
    )


def _clause(random: SeededRandom, score: int, aspect: str, thing: str) -> str:
    """A clause of the given score on one aspect of the thing under review."""
    owner = random.pick(("", "", f" of the {thing}", f" of this {thing}"))
    form = random.below(6)
    if form == 0:
        return f"I {random.pick(VERBS[score])} the {aspect}{owner}"
    if form == 1:
        return f"I found the {aspect}{owner} {random.pick(ADJECTIVES[score])}"
    if form == 2:
        return f"the {thing} had {a(random.pick(ADJECTIVES[score]))} {aspect}"
    return f"the {aspect}{owner} {random.pick(('was', 'was', 'seemed'))} {_phrase(random, score)}"


def _phrase(random: SeededRandom, score: int) -> str:
    """An adjective with its modifier, of the given score in all."""
    plain = random.pick(ADJECTIVES[score])
    if score == 0:
        return random.pick((plain, f"{random.pick(NEGATORS)} {random.pick(ADJECTIVES[random.pick((-2, 2))])}"))
    sign = 1 if score > 0 else -1
    if abs(score) == 2:
        return random.pick((plain, f"{random.pick(INTENSIFIERS)} {random.pick(ADJECTIVES[sign])}"))
    return random.pick(
        (
            plain,
            f"{random.pick(SOFTENERS)} {plain}",
            f"{random.pick(NEGATORS)} {random.pick(ADJECTIVES[-sign])}",
            f"far from {random.pick(ADJECTIVES[-2 * sign])}",
        )
    )
