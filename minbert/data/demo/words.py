"""The concepts of the demo corpus's pair tasks: each is a pair of synonyms."""

from __future__ import annotations

from minbert.data.demo.seeded_random import SeededRandom

Concept = tuple[str, str]  # the first word is the common one

SUBJECTS: tuple[Concept, ...] = (
    ("man", "guy"),
    ("woman", "lady"),
    ("child", "kid"),
    ("doctor", "physician"),
)
ACTIONS: tuple[Concept, ...] = (
    ("fixing", "repairing"),
    ("cleaning", "washing"),
    ("buying", "purchasing"),
    ("choosing", "selecting"),
)
THINGS: tuple[Concept, ...] = (
    ("bicycle", "bike"),
    ("sofa", "couch"),
    ("car", "automobile"),
    ("carpet", "rug"),
)
MANNERS: tuple[Concept, ...] = (
    ("outside", "outdoors"),
    ("quickly", "fast"),
    ("carefully", "cautiously"),
)


def word(random: SeededRandom, concept: Concept, common: float) -> str:
    """A word for the concept: the common one with that probability."""
    return concept[0] if random.chance(common) else concept[1]


def a(words: str) -> str:
    """The words behind their indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def sentence(words: str, end: str) -> str:
    """The words with a capital in front and a mark at the end."""
    return words[0].upper() + words[1:] + end
