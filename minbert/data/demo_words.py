"""The concepts that the demo corpus's pair tasks speak of: each is a group of words that mean the same."""

from __future__ import annotations

from minbert.data.demo_dice import Dice

Concept = tuple[str, ...]  # the first word is the common one
COMMON = 0.8  # how often it is used

SUBJECTS: tuple[Concept, ...] = (
    ("man", "guy"),
    ("woman", "lady"),
    ("child", "kid"),
    ("doctor", "physician"),
    ("farmer",),
    ("teacher",),
)
ACTIONS: tuple[Concept, ...] = (
    ("fixing", "repairing"),
    ("cleaning", "washing"),
    ("buying", "purchasing"),
    ("painting",),
    ("selling",),
    ("moving",),
)
THINGS: tuple[Concept, ...] = (
    ("bicycle", "bike"),
    ("sofa", "couch"),
    ("car", "automobile"),
    ("boat",),
    ("piano",),
    ("tent",),
    ("clock",),
)
MANNERS: tuple[Concept, ...] = (
    ("outside", "outdoors"),
    ("quickly", "fast"),
    ("alone",),
    ("tonight",),
    ("cheaply",),
)


def word(dice: Dice, concept: Concept) -> str:
    """A word for the concept, mostly the common one."""
    return concept[0] if dice.chance(COMMON) else dice.pick(concept)


def a(words: str) -> str:
    """The words behind their indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def sentence(words: str, end: str) -> str:
    """The words with a capital in front and a mark at the end."""
    return words[0].upper() + words[1:] + end
