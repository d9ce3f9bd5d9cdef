"""Files of task records: what is read, what is refused with file and line, and what a run writes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.methods.smart import SmartConfig
from minbert.tasks import TASKS, Task, parse_tasks, read_tasks, tasks_to_yaml

SUPPORT = """\
tasks:
  support:
    text: message
    label: topic
    type: classification
    classes: [billing, bug, other]
    train: data/train.csv
    dev: 0.1
    metrics: [f1, accuracy]
    class_weights: {bug: 3.0}
  satisfaction: {text: [question, answer], label: stars, type: regression, scale: [1, 5], train: a.jsonl, dev: b.jsonl}
  tags: {text: message, label: tags, type: multilabel, separator: "|", train: "hub:owner/name/config/train", dev: 0.2}
"""


def test_the_records_of_the_design_are_read(tmp_path):
    (tmp_path / "tasks.yaml").write_text(SUPPORT)
    tasks = read_tasks(tmp_path / "tasks.yaml")
    support, satisfaction, tags = tasks.values()
    assert support == Task(
        name="support",
        text=("message",),
        label="topic",
        type="classification",
        classes=("billing", "bug", "other"),
        train=str(tmp_path / "data/train.csv"),
        dev=0.1,
        metrics=("f1", "accuracy"),
        class_weights={"bug": 3.0},
    )
    assert (support.loss, support.num_outputs, support.metric) == ("cross_entropy", 3, "f1")
    assert (satisfaction.is_pair, satisfaction.scale, satisfaction.metrics) == (True, (1.0, 5.0), ("pearson",))
    assert (satisfaction.loss, satisfaction.num_outputs, satisfaction.max_label) == ("mean_squared_error", 1, 5)
    assert (tags.train, tags.separator, tags.metrics) == ("hub:owner/name/config/train", "|", ("accuracy", "f1_micro"))
    assert (tags.classes, tags.loss) == (None, "binary_cross_entropy")


def test_the_loss_of_a_classification_follows_its_number_of_classes():
    task = Task("topic", ("text",), "label")
    assert task.loss == ""
    with pytest.raises(ValueError, match="known once its training file is read"):
        _ = task.num_outputs
    two, three = (dataclasses.replace(task, classes=tuple("abc"[:count])) for count in (2, 3))
    assert (two.loss, two.num_outputs) == ("binary_cross_entropy", 1)
    assert (three.loss, three.num_outputs) == ("cross_entropy", 3)


ONE = "tasks:\n  a:\n    text: t\n    label: l\n    type: classification\n    train: x.csv\n    dev: 0.1\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "tasks.yaml: expected `tasks:` with a record for each task"),
        ("tasks: []", "tasks.yaml: expected `tasks:` with a record for each task, got an object"),
        ("tasks:\n  a: 3", "line 2: task a: expected a record, got 3"),
        ("task: {}\n" + ONE, "line 1: unknown key 'task' (did you mean 'tasks'?)"),
        (ONE + "  ä b: {}", "line 8: task 'ä b': a name has letters, digits, - and _"),
        (ONE + "  ../x: {}", "line 8: task '../x': a name has letters"),
        (ONE + "  overall: {}", "line 8: task 'overall'"),
        (ONE.replace("label:", "lable:"), "line 4: task a: unknown key 'lable' (did you mean 'label'?)"),
        (ONE + "    in_overall: false", "line 8: task a: unknown key 'in_overall'"),
        (ONE.replace("    label: l\n", ""), "line 2: task a: no label"),
        (ONE.replace("classification", "classify"), "line 5: task a: type: expected one of"),
        (ONE.replace("text: t", "text: [t, u, v]"), "line 3: task a: text: expected one column, or two for pairs"),
        (ONE.replace("text: t", "text: [t, t]"), "line 3: task a: text: expected two different columns"),
        (ONE.replace("label: l", "label: t"), "line 4: task a: label: expected a column that is not a text"),
        (ONE + "    classes: [x]", "line 8: task a: classes: expected two classes or more, got 1"),
        (ONE + "    classes: [x, y, x]", "line 8: task a: classes: expected different classes, got 'x' twice"),
        (ONE + "    classes: ['3.1', '3.10']", "line 8: task a: classes: expected different classes, got '3.1' twice"),
        (ONE + "    classes: [a, ' a']", "line 8: task a: classes: expected different classes, got 'a' twice"),
        (ONE + "    classes: [1, '1']", "line 8: task a: classes: expected different classes"),
        (ONE + f"    classes: {[*range(10001)]}", "line 8: task a: classes: expected at most 10000 classes, got 10001"),
        (ONE + "    classes: [{}]", "line 8: task a: classes[0]"),
        (ONE + "    scale: [0, 1]", "line 8: task a: scale: expected it with type regression alone"),
        (ONE.replace("classification", "regression"), "line 2: task a: scale: expected the smallest and the largest"),
        (ONE.replace("classification", "regression") + "    scale: [5, 1]", "line 8: task a: scale"),
        (ONE + "    separator: ;", "line 8: task a: separator: expected it with type multilabel alone"),
        (ONE + "    metrics: [f1, acuracy]", "line 8: task a: unknown metric of a classification 'acuracy' (did you"),
        (ONE + "    metrics: [pearson]", "line 8: task a: unknown metric of a classification 'pearson'"),
        (ONE + "    metrics: [f1, f1]", "line 8: task a: metrics: expected different metrics, got f1 twice"),
        (ONE + "    class_weights: heavy", "line 8: task a: class_weights: expected one of 'balanced' or dict"),
        (ONE + "    class_weights: {x: 0}", "line 8: task a: class_weights: expected weights above 0"),
        (ONE + "    classes: [x, y]\n    class_weights: {z: 1}", "line 9: task a: class_weights: expected a weight"),
        (ONE + "    delimiter: ';;'", "line 8: task a: delimiter: expected one character"),
        (ONE.replace("dev: 0.1", "dev: 1.5"), "line 7: task a: dev: expected a share of train between 0 and 1"),
        (ONE.replace("    dev: 0.1\n", ""), "line 2: task a: dev: expected a file, or a share of train such as 0.1"),
        (ONE.replace("    train: x.csv\n", ""), "line 2: task a: train: expected a file"),
        (ONE + ONE.removeprefix("tasks:\n"), "not valid YAML (line 2, column"),
        ("tasks:\n  a: &x {}\n  b: *x", "not valid YAML (line 3"),
        ("tasks:\n  a: !!python/object:os.system {}", "not valid YAML (line 2"),
    ],
)  # fmt: skip
def test_a_wrong_record_is_one_line_with_file_and_line(tmp_path, text, expected):
    path = tmp_path / "tasks.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_tasks(path)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(path))
    assert "\n" not in message


@pytest.mark.parametrize("classes", ["", "    classes: [0, 1.5, true, x]\n"])
def test_weights_of_classes_that_are_numbers_or_booleans_are_by_their_texts(tmp_path, classes):
    path = tmp_path / "tasks.yaml"
    path.write_text(f"{ONE}{classes}    class_weights: {{0: 2, 1.5: 3, true: 4, x: 5}}\n")
    task = read_tasks(path)["a"]
    assert task.class_weights == {"0": 2.0, "1.5": 3.0, "true": 4.0, "x": 5.0}
    assert parse_tasks(tasks_to_yaml({"a": task}), "again", tmp_path)["a"] == task


def test_a_head_and_a_loss_are_checked_by_the_config(tmp_path):
    path = tmp_path / "tasks.yaml"
    for key, wrong in (
        ("head: linaer", "unknown head 'linaer'"),
        ("loss: mean_squared_error", "does not fit the labels"),
    ):
        path.write_text(f"{ONE}    {key}\n")
        with pytest.raises(UserError, match=wrong):
            TrainConfig(tasks_file=str(path))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^--tasks-file .*none.yaml: cannot be read \(No such file or directory\)"):
        TrainConfig(tasks_file=str(tmp_path / "none.yaml"))


def test_own_tasks_join_the_built_in_ones_and_may_take_their_place(tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text(SUPPORT + "  sst: {text: t, label: l, type: classification, train: x.csv, dev: 0.1}\n")
    config = TrainConfig(tasks_file=str(path), tasks=["sst", "qqp", "tags"], smart=SmartConfig(lambda_s={"tags": 2.0}))
    sst, qqp, tags = config.find(config.tasks)
    assert (sst.text, sst.course, qqp) == (("t",), None, TASKS["qqp"])
    assert tags.is_multilabel
    with pytest.raises(UserError, match=r"unknown task 'suport' \(did you mean 'support'\?\)"):
        TrainConfig(tasks_file=str(path), tasks=["suport"])
    with pytest.raises(UserError, match="unknown task 'support'"):
        TrainConfig(tasks=["support"])


def test_yes_and_no_are_texts(tmp_path):
    """As a class, a column or a task's name."""
    path = tmp_path / "tasks.yaml"
    path.write_text(ONE.replace("  a:", "  no:").replace("label: l", "label: No") + "    classes: [yes, no]\n")
    (task,) = read_tasks(path).values()
    assert (task.name, task.label, task.classes) == ("no", "No", ("yes", "no"))


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "tasks.yaml"
    path.write_text(ONE)
    assert read_tasks(path)["a"].label == "l"
    path.write_text(ONE.replace("label: l", "label: other"))
    assert read_tasks(path)["a"].label == "other"


TEXTS = st.text(min_size=1, max_size=20).filter(lambda text: text.strip() and text.isprintable())
LABELS = st.one_of(TEXTS, st.integers(-1000, 1000), st.booleans())


@settings(deadline=None)
@given(text=TEXTS, label=TEXTS, classes=st.lists(LABELS, min_size=2, max_size=5, unique_by=str))
def test_what_a_run_writes_is_what_it_reads(tmp_path_factory, text, label, classes):
    """Classes and columns may be any text; only a task's name may not."""
    if text == label:
        label += "x"
    task = Task("a", (text,), label, classes=tuple(classes), train="/x/y.csv", dev=0.25, thresholds=None)
    other = Task("b", (text, text + "2"), text + "3", "regression", scale=(-1.0, 3.5), train="/x", dev="/y", test="/z")
    third = Task("c", (text,), label, "multilabel", classes=("u", "v"), train="/x", dev="/y", thresholds=(0.25, 0.75))
    tasks = {each.name: each for each in (task, other, third)}
    assert parse_tasks(tasks_to_yaml(tasks), "tasks.yaml", tmp_path_factory.getbasetemp()) == tasks


def test_the_built_in_tasks_are_records_of_the_same_kind(tmp_path):
    """Without what only they have, they can stand in a tasks file."""
    for task in TASKS.values():
        plain = dataclasses.replace(
            task, train="/x", dev="/y", in_overall=True, evaluated=True, course=None, glue=None, head_of=""
        )
        assert parse_tasks(tasks_to_yaml({task.name: plain}), "x", tmp_path) == {task.name: plain}
