"""The nine tasks of GLUE in each of their formats: folders of tab-separated files, and the hub."""

from __future__ import annotations

import sys
import types

import pytest
from glue_data import table, write_glue

from minbert.data import open_source, read_file
from minbert.errors import UserError
from minbert.tasks import TASKS


@pytest.fixture
def glue(tmp_path):
    return open_source(str(write_glue(tmp_path / "glue")))


NINE = ["qqp", "sts", "sst2", "cola", "mrpc", "mnli", "qnli", "rte", "wnli"]


def test_all_nine_tasks_are_found(glue):
    assert glue.tasks() == NINE
    assert all(glue.splits(TASKS[name]) == ["train", "dev", "test"] for name in NINE)
    assert glue.splits(TASKS["mnli-mm"]) == ["dev", "test"]
    assert glue.splits(TASKS["ax"]) == ["test"]


@pytest.mark.parametrize(
    ("name", "texts", "labels"),
    [
        ("cola", ('She said "train" twice.',), [1, 0, 1]),
        ("sst2", ("a fine day",), [1, 0]),
        ("mrpc", ('He said "yes" in train.', "He agreed."), [1, 0]),
        ("sts", ("a man runs", "a man is running"), [4.75, 0.2]),
        ("qqp", ("How old is it?", "What is its age?"), [1, 0]),
        ("mnli", ("Story 0.", "A story."), [1, 0, 2]),
        ("qnli", ("Who wrote it?", "It was written by Ada."), [0, 1]),
        ("rte", ("Who wrote it?", "It was written by Ada."), [0, 1]),
        ("wnli", ("The cup fell off the shelf as it was tilted.", "The shelf was tilted."), [1, 0]),
    ],
)
def test_texts_and_labels_of_a_training_file(glue, name, texts, labels):
    examples = glue.load(TASKS[name], "train")
    assert (examples.texts[0], *(examples.pairs or ())[:1]) == texts
    assert examples.labels.tolist() == pytest.approx(labels)
    assert not examples.skipped
    assert len(glue.load(TASKS[name], "dev")) > 0


@pytest.mark.parametrize("name", [*NINE, "mnli-mm", "ax"])
def test_test_files_have_no_labels_and_their_own_indices(glue, name):
    test = glue.load(TASKS[name], "test")
    assert test.labels is None
    assert test.ids == list(map(str, range(len(test))))


def test_rows_without_a_header_are_numbered_from_the_first_line(glue, tmp_path):
    dev = glue.load(TASKS["cola"], "dev")
    assert dev.ids == ["0", "1", "2"]
    assert dev.lines.tolist() == [1, 2, 3]
    path = tmp_path / "cola.tsv"
    table(path, [], ["mb01", 1, "", "It rains."], ["mb01", 7, "", "It snows."], ["mb01", 1, "It hails."])
    found = read_file(path, TASKS["cola"])
    assert found.texts == ["It rains."]
    assert [(row.line, row.id, row.reason) for row in found.skipped] == [
        (2, "1", "label 7 is outside 0 to 1"),
        (3, "2", "expected 4 fields, found 3"),
    ]


def test_mnli_has_two_dev_sets(glue):
    for name, genres, label in (("mnli", "matched", 0), ("mnli-mm", "mismatched", 2)):
        dev = glue.load(TASKS[name], "dev")
        assert dev.texts == [f"A {genres} story."]
        assert dev.labels.tolist() == [label]
        (skipped,) = dev.skipped
        assert (skipped.line, skipped.reason) == (
            3,
            "label '-' is none of the classes 'entailment', 'neutral', 'contradiction'",
        )
    with pytest.raises(UserError, match="has no train split of mnli-mm: no file known for it"):
        glue.load(TASKS["mnli-mm"], "train")


def test_the_files_of_mrpcs_authors_are_read_without_the_dev_examples(glue, tmp_path):
    folder = tmp_path / "glue" / "MRPC"
    header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    both = [line.split("\t") for file in ("train", "dev") for line in (folder / f"{file}.tsv").read_text().splitlines()]
    (folder / "train.tsv").unlink()
    (folder / "test.tsv").unlink()
    own = [1, 21, 22, "It is late.", "The hour is late."]
    table(folder / "msr_paraphrase_train.txt", header, own, both[4])
    table(folder / "msr_paraphrase_test.txt", header, [0, 23, 24, "It is early.", "It is green."])
    train = glue.load(TASKS["mrpc"], "train")
    assert (train.texts, train.pairs, train.labels.tolist()) == (["It is late."], ["The hour is late."], [1])
    assert [(row.line, row.reason) for row in train.skipped] == [(3, "also an example of the dev split")]
    assert glue.load(TASKS["mrpc"], "test").labels.tolist() == [0]


# The hub -----------------------------------------------------------------------------------------------------------


class ClassLabel:
    def __init__(self, *names: str) -> None:
        self.names = list(names)


class Table:
    """A split of a data set on the hub, as far as it is read."""

    def __init__(self, label: ClassLabel | None, columns: dict[str, list]) -> None:
        self.column_names, self._columns = list(columns), columns
        self.features = {name: label if name == "label" else None for name in columns}

    def __getitem__(self, name: str) -> list:
        return self._columns[name]


HUB = {
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "stsb": (["sentence1", "sentence2"], None),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
    "ax": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
}


@pytest.fixture
def hub(monkeypatch):
    """The package `datasets` with GLUE as the hub has it: a row of each class, numbered."""
    module = types.ModuleType("datasets")
    module.__version__ = "2.20.0"

    def names_of_splits(name: str, config: str) -> list[str]:
        sets = ["_matched", "_mismatched"] if config == "mnli" else [""]
        if config == "ax":
            return ["test"]
        return ["train", *(f"validation{each}" for each in sets), *(f"test{each}" for each in sets)]

    def load_dataset(name: str, config: str, split: str) -> Table:
        assert split in names_of_splits(name, config)
        columns, classes = HUB[config]
        labels = list(range(len(classes))) if classes else [0.0, 3.8]
        texts = {column: [f"{split} {column} {number}" for number in range(len(labels))] for column in columns}
        labels = [-1] * len(labels) if split.startswith("test") else labels
        columns = {**texts, "label": labels, "idx": list(range(len(labels)))}
        return Table(ClassLabel(*classes) if classes else None, columns)

    module.load_dataset, module.get_dataset_split_names = load_dataset, names_of_splits
    module.get_dataset_config_names = lambda name: list(HUB)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return open_source("nyu-mll/glue")


@pytest.mark.parametrize("name", [*NINE, "mnli-mm"])
def test_the_hubs_numbers_are_the_classes_in_order(hub, name):
    assert hub.tasks() == NINE
    task = TASKS[name]
    dev, test = hub.load(task, "dev"), hub.load(task, "test")
    assert dev.labels.tolist() == pytest.approx([0.0, 3.8] if name == "sts" else list(range(task.num_classes)))
    assert len(test) == len(dev)
    assert test.labels is None
    assert "train" not in hub.splits(task) or len(hub.load(task, "train")) == len(dev)
    genres = {"mnli": "validation_matched ", "mnli-mm": "validation_mismatched "}.get(name, "validation ")
    assert all(text.startswith(genres) for text in dev.texts)


def test_the_diagnostic_set_is_a_test_split_alone(hub):
    assert hub.splits(TASKS["ax"]) == ["test"]
    test = hub.load(TASKS["ax"], "test")
    assert (test.labels, test.texts[0], test.pairs[0]) == (None, "test premise 0", "test hypothesis 0")


def test_classes_in_another_order_on_the_hub_keep_their_names(hub, monkeypatch):
    order = ("contradiction", "entailment", "neutral")
    columns = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": [0, 1, 2]}
    monkeypatch.setattr(
        sys.modules["datasets"], "load_dataset", lambda *names, split: Table(ClassLabel(*order), columns)
    )
    assert hub.load(TASKS["mnli"], "dev").labels.tolist() == [2, 0, 1]


# Metrics -----------------------------------------------------------------------------------------------------------


def test_the_metrics_are_glues():
    assert {name: TASKS[name].metrics for name in NINE} == {
        "qqp": ("accuracy", "f1"),
        "sts": ("pearson", "spearman"),
        "sst2": ("accuracy",),
        "cola": ("mcc",),
        "mrpc": ("f1", "accuracy"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "wnli": ("accuracy",),
    }
