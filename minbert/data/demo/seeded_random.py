"""Seeded choices for the demo corpus, the same on every platform, Python and NumPy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class SeededRandom:
    """Draws from `random.Random.random` alone: the only sequence that Python promises not to change."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, count: int) -> int:
        """A whole number in [0, count)."""
        return int(self._random() * count)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        """One of the items, all equally likely."""
        return items[self.below(len(items))]

    def other(self, items: Sequence[Item], item: Item) -> Item:
        """One of the items that is not `item`."""
        return self.pick([candidate for candidate in items if candidate != item])

    def two(self, items: Sequence[Item]) -> tuple[Item, Item]:
        """Two different items, in random order."""
        first = self.pick(items)
        return first, self.other(items, first)
