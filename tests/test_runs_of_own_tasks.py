"""Runs of tasks files: trained, resumed, evaluated, predicted and reported with, as built-in tasks are."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from compare_runs import assert_equal_runs, interrupted
from groups import quick_options

from minbert import evaluate, predict, train
from minbert.errors import UserError
from minbert.report import write_report
from minbert.runs.run_directory import Run
from minbert.tasks import read_tasks

COURSE = """\
tasks:
  sst: {{text: sentence, label: sentiment, type: classification, delimiter: "\\t",
    train: {0}/ids-sst-train.csv, dev: {0}/ids-sst-dev.csv}}
  sts: {{text: [sentence1, sentence2], label: similarity, type: regression, scale: [0, 5], delimiter: "\\t",
    train: {0}/sts-train.csv, dev: {0}/sts-dev.csv}}
"""
THREE = """\
tasks:
  topic: {text: the message, label: class, type: classification, train: tickets.csv, dev: 0.25, test: test.csv,
    metrics: [f1, accuracy], class_weights: balanced}
  stars: {text: [question, answer], label: stars, type: regression, scale: [1, 5], train: answers.jsonl, dev: 0.25}
  tags: {text: the message, label: tags, type: multilabel, separator: "|", train: tickets.csv, dev: 0.25}
"""
CLASSES = ["bil,ling", 'a "bug"', "sonstiges ä"]


def write_three(directory: Path) -> Path:
    """A tasks file of three kinds of tasks, and its data: a header with a space, a column `class`, classes to quote."""
    directory.mkdir(exist_ok=True)
    draw = random.Random(0)
    for name, rows in (("tickets.csv", 64), ("test.csv", 9)):
        with open(directory / name, "w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(["id", "the message", "class", "tags"])
            for number in range(rows):
                label = draw.choice(CLASSES)
                tags = [tag for tag in ("urgent", "angry") if draw.random() < 0.5]
                lines.writerow([f"t{number}", f"a message of\n{label}, {tags} {number}", label, "|".join(tags)])
    with open(directory / "answers.jsonl", "w", encoding="utf-8") as file:
        for number in range(64):
            stars = draw.randint(1, 5)
            file.write(json.dumps({"question": f"why {number} ?", "answer": f"{stars} of 5", "stars": stars}) + "\n")
    path = directory / "tasks.yaml"
    path.write_text(THREE, encoding="utf-8")
    return path


def options(tasks_file: Path, out: Path, *further: str) -> list[str]:
    quick = [option for option in quick_options(Path(), out) if not option.startswith("--data=")]
    return [*quick, f"--tasks-file={tasks_file}", *further]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tasks file, and a finished run of it."""
    directory = tmp_path_factory.mktemp("three")
    tasks_file = write_three(directory / "data")
    assert train.main(options(tasks_file, directory / "run")) == 0
    return tasks_file, directory / "run"


@pytest.fixture
def run(three: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(three[1], tmp_path / "copy")


def test_the_courses_files_in_a_tasks_file_give_the_weights_of_the_built_in_tasks(course_data, tmp_path):
    (tmp_path / "tasks.yaml").write_text(COURSE.format(course_data))
    assert train.main([*quick_options(course_data, tmp_path / "built-in"), "--tasks=sst,sts"]) == 0
    assert train.main(options(tmp_path / "tasks.yaml", tmp_path / "own")) == 0
    assert_equal_runs(tmp_path / "built-in", tmp_path / "own")
    one, other = (Run(tmp_path / name).summary()["dev"] for name in ("built-in", "own"))
    assert one["sst"] == other["sst"]
    assert one["sts"]["pearson"] == other["sts"]["pearson"]


@pytest.mark.skipif("MINBERT_TEST_DATA" not in os.environ, reason="needs the course's data")
@pytest.mark.skipif("MINBERT_TEST_MODEL" not in os.environ, reason="needs a pretrained model")
@pytest.mark.slow
def test_so_do_the_real_ones(tmp_path):
    data = os.environ["MINBERT_TEST_DATA"]
    (tmp_path / "tasks.yaml").write_text(COURSE.format(Path(data).resolve()))
    shared = [f"--model={os.environ['MINBERT_TEST_MODEL']}", "--steps=2", "--epoch-length=2", "--batch-size=8"]
    shared += ["--precision=fp32", "--matmul=blas", "--max-length=12"]
    assert train.main([*shared, f"--data={data}", "--tasks=sst,sts", f"--out={tmp_path / 'built-in'}"]) == 0
    assert train.main([*shared, f"--tasks-file={tmp_path / 'tasks.yaml'}", f"--out={tmp_path / 'own'}"]) == 0
    assert_equal_runs(tmp_path / "built-in", tmp_path / "own")


def test_own_and_built_in_tasks_train_together(course_data, three, tmp_path):
    tasks_file, _ = three
    assert (
        train.main(options(tasks_file, tmp_path / "run", f"--data={course_data}", "--tasks=tags,sst", "--steps=2")) == 0
    )
    assert list(Run(tmp_path / "run").summary()["dev"]) == ["tags", "sst", "overall"]
    further = [f"--data={course_data}", "--tasks=sst", "--steps=2"]  # none of the file
    assert train.main(options(tasks_file, tmp_path / "built-in", *further, "--heads.stars=linear")) == 0
    assert list(read_tasks(tmp_path / "built-in" / "tasks.yaml")) == ["topic", "stars", "tags"]
    assert evaluate.main([str(tmp_path / "built-in")]) == 0
    with pytest.raises(UserError, match="sst"):
        train.main(options(tasks_file, tmp_path / "other", "--tasks=tags,sst"))


def test_a_run_has_its_records_scores_and_predictions_in_the_users_labels(three):
    tasks_file, run = three
    records = read_tasks(run / "tasks.yaml")
    assert records["topic"].classes == tuple(sorted(CLASSES))
    assert records["topic"].train == str(tasks_file.with_name("tickets.csv"))
    summary = Run(run).summary()
    assert {name: [*scores] for name, scores in summary["dev"].items() if name != "overall"} == {
        "topic": ["f1", "accuracy"],
        "stars": ["pearson"],
        "tags": ["accuracy", "f1_micro"],
    }
    assert list(summary["test"]) == ["topic", "overall"]
    saved = read_checkpoint_tasks(run / "best")
    assert len(saved["tags"].thresholds) == 2
    assert saved["topic"].train is None
    rows = read_csv(run / "predictions" / "topic-dev-output.csv")
    shares = [f"probability of {name}" for name in sorted(CLASSES)]
    assert list(rows[0]) == ["id", "prediction", *shares]
    for row in rows:
        assert row["prediction"] == max(sorted(CLASSES), key=lambda name: float(row[f"probability of {name}"]))
    lines = [json.loads(line) for line in (run / "predictions" / "tags-dev.jsonl").read_text().splitlines()]
    assert {label for line in lines for label in line["label"]} == {"urgent", "angry"}
    assert all(1 <= json.loads(line)["label"] <= 5 for line in (run / "predictions" / "stars-dev.jsonl").open())
    found = Run(run).predictions(read_checkpoint_tasks(run / "best")["tags"], "dev")
    assert {value for each in found for value in (*each.predicted, *each.label)} == {0, 1}


def read_checkpoint_tasks(checkpoint: Path):
    from minbert.tasks import parse_tasks

    return parse_tasks((checkpoint / "tasks.yaml").read_text(), "tasks.yaml", checkpoint, built_in=True)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("further", [[], ["--surgery=gse", "--bregman.mu=0.5"], ["--low-memory", "--accumulate=2"]])
def test_an_interrupted_run_ends_in_the_same_weights(three, tmp_path, further: Sequence[str]):
    tasks_file, whole = three
    if further:
        whole = tmp_path / "whole"
        assert train.main(options(tasks_file, whole, *further)) == 0
    with interrupted("minbert.training.loop.training_step", 5):
        train.main(options(tasks_file, tmp_path / "run", *further))
    assert train.main(options(tasks_file, tmp_path / "run", *further, "--resume")) == 0
    assert_equal_runs(whole, tmp_path / "run")
    assert (whole / "best" / "tasks.yaml").read_text() == (tmp_path / "run" / "best" / "tasks.yaml").read_text()


def test_a_run_is_resumed_without_its_tasks_file_but_not_with_another_record(three, run, capsys):
    _, whole = three
    quick = [option for option in options(Path(), run, "--epochs=3", "--resume") if "tasks-file" not in option]
    assert train.main(quick) == 0
    assert "18 steps" in capsys.readouterr().out or Run(run).summary()["steps"] > Run(whole).summary()["steps"]
    other = run.parent / "tasks.yaml"
    for changed, named in (("class_weights: balanced", "class_weights"), ("metrics: [f1, accuracy]", "metrics")):
        data = f"train: {whole.parent}/data/"
        text = THREE.replace("train: ", data).replace("test: ", f"test: {whole.parent}/data/")
        other.write_text(text.replace(changed, "id: id"), encoding="utf-8")
        with pytest.raises(UserError, match=f"another {named} of task topic"):
            train.main([*quick, f"--tasks-file={other}", "--epochs=4"])


def test_evaluate_reads_the_runs_data_or_that_of_a_tasks_file(three, run, tmp_path, capsys):
    before = (run / "predictions" / "tags-dev-output.csv").read_bytes()
    assert evaluate.main([str(run)]) == 0
    assert "which" in capsys.readouterr().out
    assert (run / "predictions" / "tags-dev-output.csv").read_bytes() == before
    moved = write_three(tmp_path / "moved")
    assert evaluate.main([str(run), f"--tasks-file={moved}", "--split=test", "--tasks=topic"]) == 0
    (written,) = (run / "predictions").glob("tasks_yaml-*/topic-test-output.csv")
    assert written.read_bytes() == (run / "predictions" / "topic-test-output.csv").read_bytes()
    moved.write_text("tasks:\n  other: {text: a, label: b, type: classification, train: c.csv, dev: 0.5}\n")
    with pytest.raises(UserError, match="has none of the run's own tasks: topic, stars, tags"):
        evaluate.main([str(run), f"--tasks-file={moved}"])


def test_a_run_can_be_moved_and_used_without_its_data(run, three, tmp_path, capsys):
    shutil.move(run, tmp_path / "elsewhere")
    data = three[0].parent
    text = (tmp_path / "elsewhere" / "tasks.yaml").read_text().replace(str(data), str(tmp_path / "gone"))
    (tmp_path / "elsewhere" / "tasks.yaml").write_text(text)
    (tmp_path / "input.txt").write_text("a message of a bug\nanother one\n")
    run = str(tmp_path / "elsewhere")
    assert predict.main([run, "--task=topic", f"--input={tmp_path / 'input.txt'}"]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [line["id"] for line in lines] == ["0", "1"]
    assert {line["prediction"] for line in lines} <= {*CLASSES}
    with pytest.raises(UserError, match=r"gone"):
        evaluate.main([run])
    assert "The texts are left out" in write_report(Run(run)).read_text()


@pytest.mark.parametrize("task", ["topic", "tags", "stars"])
def test_predict_reads_the_tasks_own_files(run, three, task, capsys):
    file = three[0].with_name("answers.jsonl" if task == "stars" else "test.csv")
    assert predict.main([str(run), f"--task={task}", f"--input={file}"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == (64 if task == "stars" else 9)
    assert rows[0]["id"] == ("0" if task == "stars" else "t0")
    if task == "tags":
        assert {part for row in rows for part in row["prediction"].split("|") if part} <= {"urgent", "angry"}


def test_data_of_the_hub_that_only_the_run_names_is_not_fetched(run):
    text = (run / "tasks.yaml").read_text()
    (run / "tasks.yaml").write_text(text.replace("dev: 0.25", "dev: hub:owner/name/config/dev", 1))
    with pytest.raises(UserError, match=r"names the data hub:owner/name/config/dev of the hub; give --tasks-file FILE"):
        evaluate.main([str(run)])


def test_a_run_without_its_records_is_refused(run):
    (run / "tasks.yaml").unlink()
    with pytest.raises(UserError, match=r"tasks\.yaml: cannot be read"):
        Run(run).config()


def test_forty_classes_with_one_example_each_train(tmp_path, capsys):
    """As many outputs; none of them can be held out."""
    rows = "".join(f"text number {number},class {number}\n" for number in range(40))
    (tmp_path / "data.csv").write_text("text,label\n" + rows)
    (tmp_path / "tasks.yaml").write_text(
        "tasks:\n  many: {text: text, label: label, type: classification, train: data.csv, dev: data.csv}\n"
    )
    assert train.main(options(tmp_path / "tasks.yaml", tmp_path / "run", "--steps=2")) == 0
    assert len(read_tasks(tmp_path / "run" / "tasks.yaml")["many"].classes) == 40
    text = (tmp_path / "tasks.yaml").read_text()
    (tmp_path / "tasks.yaml").write_text(text.replace("dev: data.csv", "dev: 0.1"))
    with pytest.raises(UserError, match="each class keeps one to train on"):
        train.main(options(tmp_path / "tasks.yaml", tmp_path / "other"))


def test_two_tasks_with_the_same_files_of_predictions_are_refused(quick, tmp_path):
    path = write_three(tmp_path / "own")
    path.write_text(THREE.replace("topic:", "para:"))
    options = [*quick, f"--tasks-file={path}", "--steps=1"]
    with pytest.raises(UserError, match=r"tasks qqp and para both write predictions/para-dev.jsonl; .* another name"):
        train.main([*options, "--tasks=qqp,para"])
    assert train.main([*options, "--tasks=sst,para"]) == 0
