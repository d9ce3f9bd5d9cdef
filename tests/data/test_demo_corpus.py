"""The demo corpus: always the same, never leaking, balanced, and labelled as its rules say."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from minbert.data.demo import SIZES, TASKS, examples
from minbert.data.demo_paraphrase import ASPECTS, CITIES
from minbert.data.demo_sentiment import ADJECTIVES, INTENSIFIERS, NEGATORS, VERBS
from minbert.data.demo_similarity import OTHER_WORD, SLOTS
from minbert.data.demo_words import ACTIONS, MANNERS, THINGS, Concept

every_split = pytest.mark.parametrize(("task", "split"), [(task, split) for task in TASKS for split in SIZES])


def sentences(task: str, split: str) -> list[str]:
    some = examples(task, split)
    return some.texts + (some.pairs or [])


def spoken(concepts: tuple[Concept, ...], text: str) -> tuple[Concept, str]:
    """The one concept that a text names, and the word it uses."""
    named = [
        (concept, word) for concept in concepts for word in concept if re.search(rf"\b{word}\b", text, re.IGNORECASE)
    ]
    assert len(named) == 1, (text, named)
    return named[0]


def test_the_corpus_is_the_same_on_every_machine():
    digest = hashlib.sha256()
    for task in TASKS:
        for split in SIZES:
            some = examples(task, split)
            rows = zip(some.ids, some.texts, some.pairs or some.texts, some.labels, strict=True)
            digest.update("\n".join(f"{i}\t{text}\t{pair}\t{label:.1f}" for i, text, pair, label in rows).encode())
    assert digest.hexdigest() == "86b83843463fcc00457358076a17932f1ed8b71ead33387ade3c4a734b9a5dc0"


@every_split
def test_sizes_are_as_told_and_no_example_comes_twice(task, split):
    some = examples(task, split)
    assert len(some) == SIZES[split]
    assert len(set(zip(some.texts, some.pairs or some.texts, strict=True))) == len(some)
    assert (some.pairs is not None) == (task != "sst")


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_sentence(task):
    train, dev, test = (set(sentences(task, split)) for split in SIZES)
    assert not train & dev
    assert not train & test
    assert not dev & test


@pytest.mark.parametrize("task", TASKS)
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
    pairs = [(set(first.split()), set(second.split())) for first, second in zip(some.texts, some.pairs, strict=True)]
    overlaps = np.array([len(first & second) / len(first | second) for first, second in pairs])
    assert np.mean(overlaps[some.labels == 0] > 0.5) > 0.1
    assert np.mean(overlaps[some.labels == 1] < 0.6) > 0.5


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
    assert {label for text, label in reviews if " was superb, but " in text} == {1, 2}
    assert {label for text, label in reviews if text.endswith(" was superb.") and ", but" in text} == {3}
