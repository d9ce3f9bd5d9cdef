"""The mistakes of a run on a split by properties of the texts: the papers' analyses, as numbers.

Paper 000, section 5, looks at how far off sentiment is, at pronouns in one question of a pair only, and at words in
common that raise the predicted similarity; paper 003, section 5, at confusion matrices, at classes that are never
predicted, at keywords that differ and at negation. They read examples; here each is counted over all of them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from minbert.runs.predictions import Prediction
from minbert.tasks import Task, metrics

PRONOUN = re.compile(
    "i|me|my|mine|myself|we|us|our|ours|ourselves|you|your|yours|yourself|yourselves|he|him|his|himself|she|her|hers"
    "|herself|it|its|itself|they|them|their|theirs|themselves|one's|oneself"
)
NEGATION = re.compile("no|not|never|none|nobody|nothing|neither|nor|nowhere|without|cannot|cant|dont|.*n't")
NAMES = ("no", "yes", "in neither", "in one", "in both")  # of groups
_WORD = re.compile(r"\w+(?:'\w+)*")


@dataclass(frozen=True)
class Example:
    """The prediction for an example with a label, and the example's sentence or two; no texts if they are unknown."""

    prediction: Prediction
    texts: tuple[str, ...] = ()

    @property
    def label(self) -> float:
        assert self.prediction.label is not None
        return self.prediction.label

    @property
    def off_by(self) -> float:
        """Prediction less label."""
        return self.prediction.predicted - self.label

    @property
    def confidence(self) -> float | None:
        """Probability of the predicted class; None for a task without classes."""
        classes = self.prediction.probabilities
        return classes[int(self.prediction.predicted)] if classes else None


# Properties of the texts -------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)  # several properties read the same text one after another
def words(text: str) -> list[str]:
    """The words of a text in lower case, with typewriter apostrophes."""
    return _WORD.findall(text.lower().replace("’", "'"))


def word_overlap(first: str, second: str) -> float:
    """Share of the words of either text that are in both, in [0, 1]; 1 for two texts without words."""
    one, other = set(words(first)), set(words(second))
    return len(one & other) / len(one | other) if one | other else 1.0


def length_difference(first: str, second: str) -> int:
    """Words of the longer text less those of the shorter."""
    return abs(len(words(first)) - len(words(second)))


def has_pronoun(text: str) -> bool:
    """Whether a personal or possessive pronoun is among the words."""
    return any(map(PRONOUN.fullmatch, words(text)))


def is_negated(text: str) -> bool:
    """Whether a word negates: not, never, isn't and the like."""
    return any(map(NEGATION.fullmatch, words(text)))


def _where(holds: Callable[[str], bool]) -> Callable[[Example], str]:
    """In which texts of an example something holds: yes or no for one, in neither, in one or in both for a pair."""

    def value(example: Example) -> str:
        count = sum(map(holds, example.texts))
        return NAMES[count] if len(example.texts) == 1 else NAMES[2 + count]

    return value


@dataclass(frozen=True)
class Property:
    """A property of an example that may be related to mistakes.

    Args:
        of: its value.
        edges: where the groups of a number begin, but for the first; without edges, each value is a group.
    """

    title: str
    of: Callable[[Example], float | str]
    edges: tuple[float, ...] = ()
    needs_texts: bool = True

    def group(self, example: Example) -> tuple[int, str]:
        """The group of the example: its sorting key and its name."""
        value = self.of(example)
        if isinstance(value, str):
            return NAMES.index(value), value
        number = bisect_right(self.edges, value)
        if number == 0:
            return number, "0" if value == 0 and self.edges[0] == 1 else f"below {self.edges[0]:g}"
        if number == len(self.edges):
            return number, f"{self.edges[-1]:g} or more"
        first, end = self.edges[number - 1 : number + 1]
        return number, f"{first:g} to {end - 1:g}" if isinstance(value, int) else f"{first:g} to below {end:g}"

    def cell(self, example: Example) -> tuple[str, float]:
        """The cell of a table for the example, and its sorting key."""
        value = self.of(example)
        if isinstance(value, str):
            return value, NAMES.index(value)
        return str(value) if isinstance(value, int) else f"{value:.2f}", value


TOKENS = Property("tokens", lambda example: example.prediction.tokens, (10, 20, 30, 40, 80, 160), False)
NEGATED = Property("negation", _where(is_negated))  # 003, section 5: "I think there isn't", "I don't think there is"
OF_SENTENCES = (TOKENS, NEGATED)
OF_PAIRS = (
    # 000, section 5: overlap is over-scored; 003, section 5: similar tokens are predicted positive, others negative
    Property("words in common", lambda example: word_overlap(*example.texts), (0.25, 0.5, 0.75)),
    Property("pronouns", _where(has_pronoun)),  # 000, section 5: in one question only
    NEGATED,
    Property("difference in words", lambda example: length_difference(*example.texts), (1, 3, 6)),
    TOKENS,
)


def properties(task: Task, with_texts: bool) -> list[Property]:
    """The properties of a task's examples: all of them, or those that need no texts."""
    return [each for each in (OF_PAIRS if task.is_pair else OF_SENTENCES) if with_texts or not each.needs_texts]


# Numbers -----------------------------------------------------------------------------------------------------------


def score(task: Task, examples: Sequence[Example]) -> float:
    """The task's metric."""
    predicted = np.array([example.prediction.predicted for example in examples], np.float64)
    labels = np.array([example.label for example in examples], np.float64)
    return metrics.score(task, predicted, labels)[task.metric]


def confusion(task: Task, examples: Sequence[Example]) -> list[list[int]]:
    """How many examples of each class (row) are predicted to be of each class (column)."""
    counts = np.zeros((task.max_label + 1, task.max_label + 1), np.int64)
    for example in examples:
        counts[int(example.label), int(example.prediction.predicted)] += 1
    return counts.tolist()


@dataclass(frozen=True)
class Group:
    """The examples that share a property."""

    title: str  # of the property
    name: str
    examples: int
    score: float  # the task's metric
    label: float  # means over the examples
    predicted: float

    @property
    def bias(self) -> float:
        """How much higher than the labels the predictions are."""
        return self.predicted - self.label


def groups(task: Task, examples: Sequence[Example], looked_at: Sequence[Property]) -> list[Group]:
    """Every group of every property that is not empty."""
    found = []
    members: list[dict[tuple[int, str], list[Example]]] = [{} for _ in looked_at]
    for example in examples:
        for each, by_group in zip(looked_at, members, strict=True):
            by_group.setdefault(each.group(example), []).append(example)
    for each, by_group in zip(looked_at, members, strict=True):
        for (_, name), of_group in sorted(by_group.items()):
            label = sum(example.label for example in of_group) / len(of_group)
            predicted = sum(example.prediction.predicted for example in of_group) / len(of_group)
            found.append(Group(each.title, name, len(of_group), score(task, of_group), label, predicted))
    return found


def mistakes(task: Task, examples: Sequence[Example]) -> list[Example]:
    """Wrong classes, the surest first; for a similarity all examples, the farthest off first."""
    if task.is_regression:
        return sorted(examples, key=lambda example: -abs(example.off_by))
    wrong = [example for example in examples if example.off_by]
    return sorted(wrong, key=lambda example: (-(example.confidence or 0.0), -abs(example.off_by)))


def facts(task: Task, examples: Sequence[Example]) -> dict[str, str]:
    """Key figures of the mistakes.

    For classes in an order, how many predictions are within one (000, section 5), and which class is never predicted
    (003, section 5); for two classes precision and recall; for a similarity whether it is over-scored (000, section 5).
    """
    off_by = np.array([example.off_by for example in examples])
    if task.is_regression:
        return {
            "mean absolute error": f"{np.mean(np.abs(off_by)):.2f}",
            "mean error": f"{np.mean(off_by):.2f}".replace("-", "−"),
            "over-scored": f"{np.mean(off_by > 0):.0%}",
        }
    matrix = np.array(confusion(task, examples))
    found = {"by the commonest class alone": f"{matrix.sum(1).max() / matrix.sum():.3f}"}
    if task.max_label == 1:
        for name, predicted_or_true in (("precision", matrix[:, 1]), ("recall", matrix[1])):
            found[name] = f"{matrix[1, 1] / predicted_or_true.sum():.3f}" if predicted_or_true.any() else "–"
        return found
    wrong = np.sum(off_by != 0)
    found["within one class"] = f"{np.mean(np.abs(off_by) <= 1):.1%}"
    found["mistakes off by one"] = f"{np.sum(np.abs(off_by) == 1) / wrong:.1%}" if wrong else "no mistakes"
    never = [str(number) for number in range(task.max_label + 1) if not matrix[:, number].any()]
    found["never predicted"] = ", ".join(never) or "no class"
    return found
