"""GLUE from training to the benchmark's files: both dev sets of MNLI, and predictions for every row of a test file."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from glue_data import MNLI, mnli_row, table, write_glue
from groups import quick_options

from minbert import evaluate, predict, train
from minbert.data import Examples, Skipped, read_file
from minbert.errors import UserError
from minbert.runs.glue_submission import is_of_glue, write_submission
from minbert.runs.run_directory import Run
from minbert.tasks import TASKS, find_tasks


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    assert header == ["index", "prediction"]
    assert [index for index, _ in rows] == list(map(str, range(len(rows))))
    return [prediction for _, prediction in rows]


def examples_of(name: str, lines: list[int], skipped: list[int]) -> Examples:
    file = f"data/{TASKS[name].glue.folder}/test.tsv"
    texts = [f"text {line}" for line in lines]
    rows = [Skipped(file, line, "empty text") for line in skipped]
    pairs = texts if TASKS[name].is_pair else None
    return Examples(list(map(str, lines)), texts, pairs, None, rows, file, np.array(lines))


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "outputs", "expected"),
    [
        ("cola", "CoLA", [-1.0, 2.0, 3.0], ["0", "1", "1"]),
        ("sst2", "SST-2", [-1.0, 2.0, 3.0], ["0", "1", "1"]),
        ("mrpc", "MRPC", [-1.0, 2.0, 3.0], ["0", "1", "1"]),
        ("qqp", "QQP", [-1.0, 2.0, 3.0], ["0", "1", "1"]),
        ("wnli", "WNLI", [-1.0, 2.0, 3.0], ["0", "1", "1"]),
        ("sts", "STS-B", [-0.3, 2.34567, 7.0], ["0.000", "2.346", "5.000"]),
        ("qnli", "QNLI", [-1.0, 2.0, -3.0], ["entailment", "not_entailment", "entailment"]),
        ("rte", "RTE", [-1.0, 2.0, -3.0], ["entailment", "not_entailment", "entailment"]),
        ("mnli", "MNLI-m", np.eye(3)[::-1], ["contradiction", "neutral", "entailment"]),
        ("mnli-mm", "MNLI-mm", np.eye(3), ["entailment", "neutral", "contradiction"]),
    ],
)
def test_a_file_has_the_benchmarks_name_and_labels(tmp_path, name, file, outputs, expected):
    path, warnings = write_submission(tmp_path, TASKS[name], examples_of(name, [2, 3, 4], []), np.array(outputs))
    assert path == tmp_path / f"{file}.tsv"
    assert rows_of(path) == expected
    assert warnings == []


def test_a_skipped_row_has_the_commonest_class_or_the_mean_and_is_named(tmp_path):
    examples = examples_of("rte", [2, 4, 5], [3, 6])
    path, (warning,) = write_submission(tmp_path, TASKS["rte"], examples, np.array([-1.0, 1.0, 2.0]))
    assert rows_of(path) == ["entailment", "not_entailment", "not_entailment", "not_entailment", "not_entailment"]
    assert warning == (
        "warning: RTE.tsv: a row that was left out has the commonest prediction, not_entailment: index 1, 4"
    )
    examples = examples_of("sts", [2, 4], [3])
    path, (warning,) = write_submission(tmp_path, TASKS["sts"], examples, np.array([1.0, 9.0]))
    assert rows_of(path) == ["1.000", "3.000", "5.000"]
    assert warning.endswith("has the mean prediction, 3.000: index 1")
    many = examples_of("rte", [2], list(range(3, 13)))
    _, (warning,) = write_submission(tmp_path, TASKS["rte"], many, np.array([1.0]))
    assert warning.endswith("index 1, 2, 3, 4, 5 and 5 more")


def test_only_files_of_glue_are_submitted():
    def examples(file: str) -> Examples:
        return Examples(["0"], ["text"], None, None, [], file, np.array([2]))

    assert is_of_glue(TASKS["qqp"], examples("data/QQP/test.tsv"))
    assert is_of_glue(TASKS["qqp"], examples("nyu-mll/glue/qqp/test"))
    assert not is_of_glue(TASKS["qqp"], examples("data/quora-test-student.csv"))
    assert not is_of_glue(TASKS["qqp"], examples("QQP/quora-test-student.csv"))
    assert not is_of_glue(TASKS["sst"], examples("data/SST/test.tsv"))


# A run --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three tasks of GLUE on data whose mismatched dev set is labelled otherwise than the matched one."""
    directory = tmp_path_factory.mktemp("glue")
    data = write_glue(directory / "data")
    labels = ["entailment", "neutral", "contradiction"]
    for genres, rows in (("matched", 3), ("mismatched", 6)):
        of_genres = [mnli_row(n, f"{genres} {n}", "A story.", *["neutral"] * 5, labels[n % 3]) for n in range(rows)]
        header = [*MNLI, *(f"label{n}" for n in range(1, 6)), "gold_label"]
        table(data / "MNLI" / f"dev_{genres}.tsv", header, *of_genres)
    with open(data / "RTE" / "test.tsv", "a", encoding="utf-8") as file:
        file.write("4\tonly one\n5\tA cat sat.\tA cat.\n")
    options = [*quick_options(data, directory / "run"), "--batch-size=2", "--tasks=mnli,rte,sts"]
    assert train.main([*options, "--heads.mnli=difference"]) == 0
    return Run(directory / "run")


def test_both_dev_sets_of_mnli_are_scored_and_one_decides(run):
    config, dev = run.config(), run.summary()["dev"]
    assert config.tasks == ["mnli", "rte", "sts"]
    assert [task.name for task in config.chosen_tasks(config.tasks)] == ["mnli", "rte", "sts", "mnli-mm", "ax"]
    assert dev["mnli-mm"]["accuracy"] in [n / 6 for n in range(7)]
    overall = (dev["mnli"]["accuracy"] + dev["rte"]["accuracy"] + (dev["sts"]["pearson"] + 1) / 2) / 3
    assert dev["overall"] == pytest.approx(overall)
    of_epochs = [record["dev"] for record in run.metrics.records() if "dev" in record]
    assert len(of_epochs) == 2
    assert all(len(scores["mnli-mm"]) == 1 for scores in of_epochs)
    heads = {name.split(".")[0] for name in _tensors(run.best / "heads.safetensors")}
    assert heads == {"mnli", "rte", "sts"}


def _tensors(path):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return [name for name in json.loads(path.read_bytes()[8 : 8 + size]) if name != "__metadata__"]


def test_predictions_and_report_have_both_dev_sets(run):
    task, mismatched, _ = run.config().chosen_tasks(["mnli"])
    assert (task.head, mismatched.head) == ("difference", "difference")
    found = [run.predictions(each, "dev") for each in (task, mismatched)]
    assert [len(each) for each in found] == [3, 6]
    right = [each.predicted == each.label for each in found[1]]
    assert np.mean(right) == run.summary()["dev"]["mnli-mm"]["accuracy"]
    page = (run.path / "report.html").read_text()
    assert "MNLI inference, mismatched" in page
    wrong = [number for number, is_right in enumerate(right) if not is_right]
    assert wrong
    assert all(f"mismatched {number}" in page for number in wrong)
    assert "GLUE diagnostics" not in page


def test_evaluating_a_test_split_writes_what_the_benchmark_takes(run, capsys):
    assert evaluate.main([str(run.path), "--split=test"]) == 0
    out, err = capsys.readouterr()
    folder = run.path / "predictions" / "glue"
    assert sorted(path.name for path in folder.iterdir()) == [
        "AX.tsv",
        "MNLI-m.tsv",
        "MNLI-mm.tsv",
        "RTE.tsv",
        "STS-B.tsv",
    ]
    assert f"MNLI inference, mismatched: {folder / 'MNLI-mm.tsv'} for the GLUE benchmark" in out.replace("\n", "")
    predicted = rows_of(folder / "RTE.tsv")
    assert len(predicted) == 6
    assert "RTE.tsv: a row that was left out has the commonest prediction" in err
    assert err.rstrip().endswith("index 4")
    by_id = {each.id: each.predicted for each in run.predictions(TASKS["rte"], "test")}
    classes = TASKS["rte"].classes
    assert [predicted[index] for index in (0, 1, 2, 3, 5)] == [classes[by_id[str(n)]] for n in (0, 1, 2, 3, 5)]
    assert {*rows_of(folder / "MNLI-m.tsv")} <= {*TASKS["mnli"].classes}
    assert all(len(score.partition(".")[2]) == 3 and 0 <= float(score) <= 5 for score in rows_of(folder / "STS-B.tsv"))


def test_other_splits_write_no_submission(run, capsys):
    for split in ("train", "dev"):
        assert evaluate.main([str(run.path), f"--split={split}", "--tasks=mnli", "--checkpoint=last"]) == 0
    assert "no train split" not in capsys.readouterr().err
    assert (run.path / "predictions" / "last" / "mnli-mm-dev-output.csv").exists()
    assert not (run.path / "predictions" / "last" / "glue").exists()


def test_the_mismatched_set_is_evaluated_and_predicted_by_name(run, capsys, tmp_path):
    assert evaluate.main([str(run.path), "--tasks=mnli-mm"]) == 0
    assert "mnli accuracy" not in capsys.readouterr().out
    for name in ("mnli", "mnli-mm"):
        file = f"{run.config().data}/MNLI/dev_mismatched.tsv"
        assert predict.main([str(run.path), f"--task={name}", f"--input={file}", f"--output={tmp_path / name}"]) == 0
    assert (tmp_path / "mnli").read_text() == (tmp_path / "mnli-mm").read_text()


def test_the_mismatched_set_is_no_task_to_train(run):
    data = run.config().data
    with pytest.raises(UserError, match="mnli-mm is a further dev set of mnli and comes with it; give mnli"):
        train.main([f"--data={data}", "--tasks=mnli,mnli-mm"])


def test_data_without_the_mismatched_set_trains_without_it(tmp_path, capsys):
    data = write_glue(tmp_path / "data")
    for split in ("dev", "test"):
        (data / "MNLI" / f"{split}_mismatched.tsv").unlink()
    (data / "diagnostic" / "diagnostic.tsv").unlink()
    assert train.main([*quick_options(data, tmp_path / "run"), "--tasks=mnli", "--epochs=1"]) == 0
    assert list(Run(tmp_path / "run").summary()["dev"]) == ["mnli", "overall"]
    assert "mismatched" not in capsys.readouterr().out
    assert evaluate.main([str(tmp_path / "run"), "--split=test"]) == 0
    assert "mnli-mm" not in "".join(capsys.readouterr())


def test_an_own_task_of_the_name_has_no_further_dev_set():
    own = {**TASKS, "mnli": TASKS["sst"]}
    assert find_tasks(["mnli"], own) == [TASKS["sst"]]
    assert [task.name for task in find_tasks(["mnli", "rte"])] == ["mnli", "rte", "mnli-mm", "ax"]


def test_cola_is_predicted_from_its_own_files(run):
    cola = read_file(f"{run.config().data}/CoLA/dev.tsv", TASKS["cola"], labels="ignored", bare=True)
    assert cola.texts[1] == "Twice said she had."
