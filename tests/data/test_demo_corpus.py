"""The demo corpus: always the same, never leaking, balanced, and labelled as its rules say."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import pytest

from minbert.data.demo import GENERATORS, SIZES, examples
from minbert.data.demo.paraphrase import ASPECTS, CITIES
from minbert.data.demo.sentiment import ADJECTIVES, INTENSIFIERS, NEGATORS, VERBS
from minbert.data.demo.similarity import OTHER_WORD, SLOTS
from minbert.data.demo.words import ACTIONS, MANNERS, THINGS
from minbert.data.examples import Examples

every_split = pytest.mark.parametrize(("task", "split"), [(task, split) for task in GENERATORS for split in SIZES])


def sentences(task: str, split: str) -> list[str]:
    some = examples(task, split)
    return some.texts + (some.pairs or [])


def spoken(concepts: Sequence[tuple[str, ...]], text: str) -> tuple[tuple[str, ...], str]:
    """The one concept that a text names, and the word it uses."""
    named = [
        (concept, word) for concept in concepts for word in concept if re.search(rf"\b{word}\b", text, re.IGNORECASE)
    ]
    assert len(named) == 1, (text, named)
    return named[0]


def test_the_corpus_is_the_same_on_every_machine():
    digest = hashlib.sha256()
    for task in GENERATORS:
        for split in SIZES:
            some = examples(task, split)
            rows = zip(some.ids, some.texts, some.pairs or some.texts, some.labels, strict=True)
            digest.update("\n".join(f"{i}\t{text}\t{pair}\t{label:.1f}" for i, text, pair, label in rows).encode())
    assert digest.hexdigest() == "4f5a3d072b7c8aa899853eb0a0967f2fd10630562eff4d7e80c01aee32757e0e"


@every_split
def test_sizes_are_as_told_and_no_example_comes_twice(task, split):
    some = examples(task, split)
    assert len(some) == SIZES[split]
    assert len(set(zip(some.texts, some.pairs or some.texts, strict=True))) == len(some)
    assert (some.pairs is not None) == (task != "sst")


@pytest.mark.parametrize("task", GENERATORS)
def test_splits_share_no_sentence(task):
    train, dev, test = (set(sentences(task, split)) for split in SIZES)
    assert not train & dev
    assert not train & test
    assert not dev & test


@pytest.mark.parametrize("task", GENERATORS)
def test_dev_speaks_the_language_of_train(task):
    train, dev = (set(re.findall(r"\w+", " ".join(sentences(task, split)))) for split in ("train", "dev"))
    assert dev <= train


@every_split
def test_sentences_are_written_properly(task, split):
    for text in sentences(task, split):
        assert re.fullmatch(r"[A-Z][\w ,é-]*[.!?]", text), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  | ,", text), text


@every_split
def test_no_class_is_rare(task, split):
    labels = examples(task, split).labels
    if task == "sts":
        assert labels.min() == 0
        assert labels.max() == 5
        assert 1.5 < labels.std() < 2.5
        np.testing.assert_allclose(labels * 5, np.round(labels * 5), atol=1e-5)  # steps of 0.2
    else:
        counts = np.bincount(labels.astype(int), minlength=5 if task == "sst" else 2)
        assert counts.min() > 0.8 * counts.mean()


def test_similarity_is_what_the_slots_add_up_to():
    some = examples("sts", "dev")
    for first, second, label in zip(some.texts, some.pairs, some.labels, strict=True):
        score = 0.0
        for concepts, weight in SLOTS:
            (concept, word), (other_concept, other_word) = spoken(concepts, first), spoken(concepts, second)
            if concept == other_concept:
                score += weight if word == other_word else weight - OTHER_WORD
        assert label == pytest.approx(score), (first, second)


def test_questions_are_duplicates_when_they_ask_the_same():
    def asked(text):
        if "from" in text:
            start, end = (re.search(rf"\b{word} (\w+)", text).group(1) for word in ("from", "to"))
            assert {start, end} <= set(CITIES)
            return spoken(ASPECTS, text)[0], start, end
        return tuple(spoken(concepts, text)[0] for concepts in (ACTIONS, THINGS, MANNERS))

    some = examples("qqp", "dev")
    for first, second, label in zip(some.texts, some.pairs, some.labels, strict=True):
        assert label == (asked(first) == asked(second)), (first, second)


def test_hard_negatives_share_nearly_all_words():
    some = examples("qqp", "train")
    overlaps = np.array([len(first & second) / len(first | second) for first, second in word_sets(some)])
    assert np.mean(overlaps[some.labels == 0] > 0.5) > 0.25
    assert np.mean(overlaps[some.labels == 1] < 0.6) > 0.5


# What a classifier that does not compare meanings makes of a pair ---------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def word_sets(some: Examples) -> list[tuple[set[str], set[str]]]:
    return [(set(words(first)), set(words(second))) for first, second in zip(some.texts, some.pairs, strict=True)]


def features(text: str) -> set[str]:
    """The words of a text, each two that follow each other, and its mark."""
    named = words(text)
    return {*named, *(f"{one} {next_}" for one, next_ in pairwise(named)), text[-1]}


def fitted(train: Sequence[set[str]], labels: np.ndarray, dev: Sequence[set[str]]) -> np.ndarray:
    """What ridge regression on the train split's features says of the dev split."""
    place = {feature: i for i, feature in enumerate(sorted(set().union(*train)))}

    def matrix(rows: Sequence[set[str]]) -> np.ndarray:
        x = np.zeros((len(rows), len(place)))
        for i, row in enumerate(rows):
            x[i, [place[feature] for feature in row if feature in place]] = 1
        return x

    x, mean = matrix(train), labels.mean()
    return mean + matrix(dev) @ np.linalg.solve(x.T @ x + 3 * np.eye(len(place)), x.T @ (labels - mean))


def looked_up(train: Iterable[object], labels: np.ndarray, dev: Iterable[object]) -> np.ndarray:
    """For each dev value the mean label of the train examples with that value."""
    seen = defaultdict(list)
    for value, label in zip(train, labels, strict=True):
        seen[value].append(label)
    return np.array([np.mean(seen.get(value, labels)) for value in dev])


def pair_features(some: Examples) -> list[set[str]]:
    pairs = zip(some.texts, some.pairs, strict=True)
    return [{*(f"1 {f}" for f in features(first)), *(f"2 {f}" for f in features(second))} for first, second in pairs]


def lengths(some: Examples) -> list[tuple[int, int]]:
    return [(len(words(first)), len(words(second))) for first, second in zip(some.texts, some.pairs, strict=True)]


def forms(some: Examples) -> list[tuple[str, ...]]:
    """The first two words of both questions: what names the form, and nothing of what is asked."""
    return [(*words(a)[:2], *words(b)[:2]) for a, b in zip(some.texts, some.pairs, strict=True)]


SHORTCUTS: dict[str, tuple[Callable, Callable]] = {
    "the first question": (fitted, lambda some: [features(text) for text in some.texts]),
    "the second question": (fitted, lambda some: [features(text) for text in some.pairs]),
    "the words of both, uncompared": (fitted, pair_features),
    "the lengths": (looked_up, lengths),
    "the forms": (looked_up, forms),
}


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_no_shortcut_tells_duplicates(shortcut):
    predict, look = SHORTCUTS[shortcut]
    train, dev = examples("qqp", "train"), examples("qqp", "dev")
    predicted = predict(look(train), train.labels, look(dev)) > 0.5
    assert np.mean(predicted == dev.labels) < 0.56  # three standard deviations of a guess among 800


OVERLAPS: dict[str, Callable[[set[str], set[str]], float]] = {
    "share": lambda first, second: len(first & second) / len(first | second),
    "common": lambda first, second: len(first & second),
    "different": lambda first, second: len(first ^ second),
    "both": lambda first, second: (len(first & second), len(first ^ second)),
}


@pytest.mark.parametrize("measure", OVERLAPS)
def test_the_overlap_of_words_is_a_poor_judge_of_duplicates(measure):
    train, dev = examples("qqp", "train"), examples("qqp", "dev")
    values = [[OVERLAPS[measure](*pair) for pair in word_sets(some)] for some in (train, dev)]
    assert np.mean((looked_up(values[0], train.labels, values[1]) > 0.5) == dev.labels) < 0.66


@pytest.mark.parametrize("split", SIZES)
def test_half_of_each_kind_of_question_are_duplicates(split):
    some = examples("qqp", split)
    trips = np.array([" from " in text for text in some.texts])
    assert [" from " in text for text in some.pairs] == trips.tolist()
    assert trips.mean() == 0.1
    assert some.labels[trips].mean() == some.labels[~trips].mean() == 0.5


@pytest.mark.parametrize("side", ["texts", "pairs"])
def test_one_scene_tells_nothing_of_the_similarity(side):
    train, dev = examples("sts", "train"), examples("sts", "dev")
    rows = [[features(text) for text in getattr(some, side)] for some in (train, dev)]
    correlation = np.corrcoef(fitted(rows[0], train.labels, rows[1]), dev.labels)[0, 1]
    assert abs(correlation) < 0.106  # three standard deviations of that of 800 unrelated pairs


# Sentiment --------------------------------------------------------------------------------------------------------


def test_a_plain_review_has_the_score_of_its_only_opinion():
    opinions = {word: score for table in (ADJECTIVES, VERBS) for score, words in table.items() for word in words}
    modifiers = re.compile(rf"\b({'|'.join(INTENSIFIERS)}|{'|'.join(NEGATORS)}|far from)\b")
    some = examples("sst", "dev")
    checked = 0
    for text, label in zip(some.texts, some.labels, strict=True):
        named = [score for word, score in opinions.items() if re.search(rf"\b{word}\b", text)]
        if len(named) == 1 and not modifiers.search(text):
            assert label == named[0] + 2, text
            checked += 1
    assert checked > 100


def test_the_main_clause_of_a_contrast_decides():
    some = examples("sst", "train")
    reviews = list(zip(some.texts, some.labels, strict=True))
    best = "|".join(ADJECTIVES[2])
    assert {label for text, label in reviews if re.search(rf" was ({best}), but ", text)} == {1, 2}
    assert {label for text, label in reviews if re.search(rf", but .* was ({best})[.!]$", text)} == {3}
