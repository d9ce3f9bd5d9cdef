"""What `--data` may name, and what is said when it names something else."""

from __future__ import annotations

import os
import sys
import types

import numpy as np
import pytest

from minbert.data import open_source
from minbert.errors import UserError
from minbert.tasks import TASKS

SST, QQP, STS, SST2 = (TASKS[name] for name in ("sst", "qqp", "sts", "sst2"))


def message(data: str | None) -> str:
    with pytest.raises(UserError) as caught:
        open_source(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_data_means_the_demo_corpus():
    source = open_source(None)
    assert source.tasks() == ["sst", "qqp", "sts"]
    assert source.splits(SST) == ["train", "dev", "test"]
    assert source.splits(SST2) == []
    assert len(source.load(STS, "dev")) == 800
    with pytest.raises(UserError, match=r"the built-in demo corpus has no train split of cfimdb; .* give --data"):
        source.load(TASKS["cfimdb"], "train")


def test_a_directory_of_course_files_is_read(course_data):
    source = open_source(str(course_data))
    assert source.name == str(course_data)
    assert source.tasks() == ["sst", "qqp", "sts"]
    assert (source.splits(SST), source.splits(QQP)) == (["train", "dev", "test"], ["train", "dev"])
    assert len(source.load(SST, "train")) == 48
    assert source.load(SST, "test").labels is None


def test_a_split_that_is_not_there_is_named_by_its_file(course_data):
    with pytest.raises(
        UserError, match=r"has no test split of sts: no sts-test-student\.csv or STS-B/test\.tsv; add it"
    ):
        open_source(str(course_data)).load(STS, "test")
    with pytest.raises(UserError, match=r"has no dev split of sst2: no SST-2/dev\.tsv; add it"):
        open_source(str(course_data)).load(SST2, "dev")


def test_training_data_must_have_labels(tmp_path):
    (tmp_path / "ids-sst-dev.csv").write_text("id\tsentence\na\tgood\n")
    (tmp_path / "ids-sst-test-student.csv").write_text("id\tsentence\na\tgood\n")
    source = open_source(str(tmp_path))
    assert source.tasks() == []
    assert len(source.load(SST, "test")) == 1
    with pytest.raises(UserError, match="no column 'sentiment' in the header; found id, sentence"):
        source.load(SST, "dev")


def test_a_directory_of_glue_folders_is_read(tmp_path):
    for folder, header, row in (
        ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\tWho?\tWho is it?\t1"),
        ("STS-B", "index\tsentence1\tsentence2\tscore", "0\ta cat\ta dog\t2.400"),
        ("SST-2", "sentence\tlabel", "good film\t1"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.tsv").write_text(f"{header}\n{row}\n")
    source = open_source(str(tmp_path))
    assert source.tasks() == ["qqp", "sts", "sst2"]
    assert source.load(QQP, "train").pairs == ["Who is it?"]
    assert source.load(STS, "train").labels.tolist() == pytest.approx([2.4])
    assert source.load(SST2, "train").texts == ["good film"]


def test_what_cannot_be_opened_is_said_with_what_can(tmp_path):
    absent = message(str(tmp_path / "absent"))
    assert absent.startswith(f"no such directory: '{tmp_path / 'absent'}'; --data takes a directory of CS224N files")
    file = tmp_path / "file.csv"
    file.write_text("x")
    assert message(str(file)).startswith(f"{file} is a file; --data takes")
    (tmp_path / "empty").mkdir()
    empty = message(str(tmp_path / "empty"))
    assert empty.startswith(f"{tmp_path / 'empty'} holds no file that minbert knows; looked for ids-sst-train.csv, ")
    assert "QQP/train.tsv" in empty


@pytest.mark.parametrize("data", ["x" * 5000, "a\0b", "~nobody-of-this-name/data"])
def test_a_path_that_cannot_be_is_no_directory(data):
    assert message(data).startswith("no such directory: ")


def test_a_data_file_that_is_none_is_refused_and_not_passed_over(tmp_path):
    os.mkfifo(tmp_path / "ids-sst-train.csv")
    (tmp_path / "ids-sst-dev.csv").mkdir()
    (tmp_path / "ids-sst-test-student.csv").symlink_to("absent")
    (tmp_path / "STS-B").mkdir()
    source = open_source(str(tmp_path))
    for split, reason in (("train", "not a regular file"), ("dev", "Is a directory"), ("test", "No such file")):
        with pytest.raises(UserError, match=f"cannot read .*ids-sst.*: {reason}"):
            source.load(SST, split)


class FakeTable:
    def __init__(self, columns: dict[str, list]) -> None:
        self.column_names = list(columns)
        self._columns = columns

    def __getitem__(self, name: str) -> list:
        return self._columns[name]


@pytest.fixture
def hub(monkeypatch):
    """The package `datasets` with a GLUE of three examples, two of them usable."""
    module = types.ModuleType("datasets")
    module.__version__ = "2.20.0"

    def load_dataset(name: str, config: str, split: str) -> FakeTable:
        assert (name, config) == ("nyu-mll/glue", "qqp")
        labels = [-1, -1, -1] if split == "test" else [1, -1, 0]
        return FakeTable({"question1": ["a?", "b?", "c?"], "question2": ["d?"] * 3, "label": labels, "idx": [7, 8, 9]})

    def get_dataset_config_names(name: str) -> list[str]:
        if name != "nyu-mll/glue":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nor cannot be accessed")
        return ["qqp", "other"]

    module.load_dataset = load_dataset
    module.get_dataset_config_names = get_dataset_config_names
    module.get_dataset_split_names = lambda name, config: ["train", "validation", "test"]
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.usefixtures("hub")
def test_glue_on_the_hub_is_read():
    source = open_source("nyu-mll/glue")
    assert (source.name, source.tasks(), source.splits(QQP)) == ("nyu-mll/glue", ["qqp"], ["train", "dev", "test"])
    dev = source.load(QQP, "dev")
    assert (dev.ids, dev.texts, dev.pairs) == (["7", "9"], ["a?", "c?"], ["d?", "d?"])
    np.testing.assert_array_equal(dev.labels, [1, 0])
    assert [(skipped.file, skipped.line) for skipped in dev.skipped] == [("nyu-mll/glue/qqp/validation", 2)]


def test_rows_of_the_hub_without_text_or_label_are_named(hub, monkeypatch):
    columns = {
        "question1": ["a?", None, "c?", "d?", 5, "f?"],
        "question2": ["x?", "y?", None, "\ud800", "z?", "w?"],
        "label": [1, 0, 0, 0, 0, None],
        "idx": [7, 8, None, 10, 11, 12],
    }
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *names, split: FakeTable(columns))
    dev = open_source("nyu-mll/glue").load(QQP, "dev")
    assert dev.ids == ["7"]
    assert [(row.line, row.id, row.reason) for row in dev.skipped] == [
        (2, "8", "expected text for question1, got null"),
        (3, "2", "expected text for question2, got null"),
        (4, "10", "not Unicode text (half a surrogate pair)"),
        (5, "11", "expected text for question1, got a number"),
        (6, "12", "no label"),
    ]


@pytest.mark.usefixtures("hub")
def test_hidden_test_labels_of_the_hub_mean_no_labels():
    test = open_source("nyu-mll/glue").load(QQP, "test")
    assert len(test) == 3
    assert test.labels is None


@pytest.mark.usefixtures("hub")
def test_a_name_the_hub_does_not_know_is_said():
    said = message("nobody/nothing")
    assert said.startswith(
        "no such directory: 'nobody/nothing', nor can it be read from the hub: Dataset 'nobody/nothi"
    )
    assert "--data takes" in said


@pytest.mark.usefixtures("hub")
def test_a_task_the_hub_does_not_hold_is_said():
    with pytest.raises(UserError, match="the hub's nyu-mll/glue has no dev split of sts; it has qqp"):
        open_source("nyu-mll/glue").load(STS, "dev")


def test_a_hub_name_without_the_extra_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = message("nyu-mll/glue")
    assert said.startswith("no such directory: 'nyu-mll/glue'; ")
    assert "pip install 'minbert[data]'" in said
