"""The mistakes of a run on a split by properties of the texts: the papers' analyses, as numbers.

Paper 000, section 5, looks at how far off sentiment is, at pronouns in one question of a pair only, and at words in
common that raise the predicted similarity; paper 003, section 5, at confusion matrices, at classes that are never
predicted, at keywords that differ and at negation. They read examples; here each is counted over all of them.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from minbert.errors import one_line
from minbert.runs.predictions import PredictedExample, label_text
from minbert.tasks import Task, metrics
from minbert.tasks.task import SCORE_TOP

PRONOUN = re.compile(
    "i|me|my|mine|myself|we|us|our|ours|ourselves|you|your|yours|yourself|yourselves|he|him|his|himself|she|her|hers"
    "|herself|it|its|itself|they|them|their|theirs|themselves|one's|oneself"
)
NEGATION = re.compile("no|not|never|none|nobody|nothing|neither|nor|nowhere|without|cannot|cant|dont|.*n't")
NAMES = ("no", "yes", "in neither", "in one", "in both")  # of groups
MOST_ORDERED = 20  # classes whose numbers are an order; more are identifiers
LISTED = 5  # classes that a line names
_WORD = re.compile(r"\w+(?:'\w+)*")


@dataclass(frozen=True)
class Example:
    """The prediction for an example with a label, and the example's sentence or two; no texts if they are unknown.

    Labels and predictions are classes by number, scores on the user's scale, or for a multi-label task lists of 0 and
    1, one for each class.
    """

    prediction: PredictedExample
    texts: tuple[str, ...] = ()

    @property
    def label(self) -> Any:
        assert self.prediction.label is not None
        return self.prediction.label

    @property
    def predicted(self) -> Any:
        return self.prediction.predicted

    @property
    def wrong(self) -> list[int]:
        """The numbers of the classes that a multi-label prediction has wrong."""
        pairs = zip(self.label, self.predicted, strict=True)
        return [number for number, (true, predicted) in enumerate(pairs) if true != predicted]

    @property
    def off_by(self) -> float:
        """PredictedExample less label; for a multi-label task how many classes are wrong."""
        return len(self.wrong) if isinstance(self.label, list) else self.predicted - self.label

    @property
    def confidence(self) -> float | None:
        """Probability of the predicted class; for a multi-label task of the surest decision that is wrong.

        None for a task without probabilities, or without a wrong decision.
        """
        classes = self.prediction.probabilities
        if not classes:
            return None
        if isinstance(self.label, list):
            surest = (classes[number] if self.predicted[number] else 1 - classes[number] for number in self.wrong)
            return max(surest, default=None)
        return classes[int(self.predicted)]


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


def is_ordered(task: Task) -> bool:
    """Whether the difference of two labels means something: scores, or a few classes that are numbers."""
    if task.is_regression:
        return True
    classes = task.classes or ()
    if task.is_multilabel or len(classes) > MOST_ORDERED:
        return False
    return all(isinstance(each, int | float) and not isinstance(each, bool) for each in classes)


def value(task: Task, label: Any) -> float:
    """What a label counts as in a mean: the score, the class that is a number, or how many classes there are."""
    if task.is_multilabel:
        return float(sum(label))
    if task.is_regression or not is_ordered(task):
        return float(label)
    return float((task.classes or ())[int(label)])


def decimals(task: Task) -> int:
    """Decimals of a label in a table: two of a scale from 0 to 5, fewer of a larger one."""
    return max(0, 2 - math.floor(math.log10(task.scale[1] - task.scale[0]))) if task.is_regression else 2


def scores(task: Task, examples: Sequence[Example]) -> dict[str, float]:
    """The task's metrics."""
    predicted, labels = (np.array([getattr(each, name) for each in examples]) for name in ("predicted", "label"))
    if task.is_regression:
        low, high = task.scale
        predicted, labels = ((each - low) * (SCORE_TOP / (high - low)) for each in (predicted, labels))
    classes = [example.prediction.probabilities for example in examples]
    return metrics.score(task, predicted, labels, None if None in classes else np.array(classes))


@dataclass(frozen=True)
class Group:
    """The examples that share a property."""

    title: str  # of the property
    name: str
    examples: int
    score: float  # the task's first metric
    label: float  # means over the examples
    predicted: float

    @property
    def bias(self) -> float:
        """How much higher than the labels the predictions are."""
        return self.predicted - self.label


def groups(task: Task, examples: Sequence[Example], looked_at: Sequence[Property]) -> list[Group]:
    """Every group of every property that is not empty."""
    found = []
    decides = replace(task, metrics=(task.metric,))
    members: list[dict[tuple[int, str], list[Example]]] = [{} for _ in looked_at]
    for example in examples:
        for each, by_group in zip(looked_at, members, strict=True):
            by_group.setdefault(each.group(example), []).append(example)
    for each, by_group in zip(looked_at, members, strict=True):
        for (_, name), of_group in sorted(by_group.items()):
            label, predicted = (
                sum(value(task, getattr(example, of)) for example in of_group) / len(of_group)
                for of in ("label", "predicted")
            )
            score = scores(decides, of_group)[task.metric]
            found.append(Group(each.title, name, len(of_group), score, label, predicted))
    return found


def mistakes(task: Task, examples: Sequence[Example]) -> list[Example]:
    """Wrong predictions, the surest first; for a regression all examples, the farthest off first."""
    if task.is_regression:
        return sorted(examples, key=lambda example: -abs(example.off_by))
    wrong = [example for example in examples if example.off_by]
    return sorted(wrong, key=lambda example: (-(example.confidence or 0.0), -abs(example.off_by)))


def facts(task: Task, examples: Sequence[Example]) -> dict[str, str]:
    """Key figures of the mistakes.

    For classes in an order, how many predictions are within one (000, section 5), and which class is never predicted
    (003, section 5); for two classes precision and recall; for a regression whether it is over-scored (000, section 5).
    """
    off_by = np.array([example.off_by for example in examples])
    if task.is_regression:
        places = decimals(task)
        found = {} if "mae" in task.metrics else {"mean absolute error": f"{np.mean(np.abs(off_by)):.{places}f}"}
        found["mean error"] = f"{np.mean(off_by):.{places}f}".replace("-", "−")
        return found | {"over-scored": f"{np.mean(off_by > 0):.0%}"}
    if task.is_multilabel:
        labels, predicted = (np.array([getattr(each, of) for each in examples]) for of in ("label", "predicted"))
        found = {} if "accuracy" in task.metrics else {"all classes right": f"{np.mean(off_by == 0):.1%}"}
        return found | {
            "classes of an example": f"{labels.sum(1).mean():.2f}",
            "classes predicted": f"{predicted.sum(1).mean():.2f}",
            "never predicted": _listed(task, np.flatnonzero(predicted.sum(0) == 0).tolist()),
        }
    labels, predicted = (np.array([int(getattr(each, of)) for each in examples]) for of in ("label", "predicted"))
    found = {"by the commonest class alone": f"{np.bincount(labels).max() / len(labels):.3f}"}
    if task.num_classes == 2:
        both = np.sum((labels == 1) & (predicted == 1))
        for name, of in (("precision", predicted), ("recall", labels)):
            found[name] = f"{both / np.sum(of == 1):.3f}" if (of == 1).any() else "–"
        return found
    wrong = np.sum(off_by != 0)
    if is_ordered(task):
        found["within one class"] = f"{np.mean(np.abs(off_by) <= 1):.1%}"
        found["mistakes off by one"] = f"{np.sum(np.abs(off_by) == 1) / wrong:.1%}" if wrong else "no mistakes"
    found["never predicted"] = _listed(task, sorted({*range(task.num_classes)} - {*predicted.tolist()}))
    return found


def _listed(task: Task, numbers: Sequence[int]) -> str:
    """Classes by number, a few of them."""
    names = [shown(label_text((task.classes or ())[number])) for number in numbers]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more or "no class"


def shown(text: str, limit: int = 30) -> str:
    """A class or another text of the user's for a table: on one line, and not longer than `limit` characters."""
    text = one_line(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
