"""evaluate and predict agree with what training said."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_gpus import NAME, forget, pretend

from minbert import cli, doctor, evaluate, predict, train
from minbert.model import HEADS


@pytest.fixture(scope="module")
def run(course_data, tmp_path_factory) -> Path:
    """A short run."""
    path = tmp_path_factory.mktemp("commands") / "run"
    options = ["--precision=fp32", "--batch-size=8", "--epochs=4", "--lr=0.005", "--scratch.hidden-size=32"]
    assert train.main([f"--data={course_data}", f"--out={path}", *options, "--scratch.num-hidden-layers=1"]) == 0
    return path


def pairs(path: Path) -> list[tuple[str, str]]:
    """(id, prediction) of a file in the course's format."""
    return [tuple(line.rstrip().split(" , ")) for line in path.read_text().splitlines()[1:]]  # type: ignore[misc]


def test_evaluate_gives_the_scores_of_training_and_the_same_predictions(run, capsys):
    before = {path.name: path.read_text() for path in (run / "predictions").iterdir()}
    assert evaluate.main([str(run)]) == 0
    shown = capsys.readouterr().out
    dev = json.loads((run / "summary.json").read_text())["dev"]
    for number in (dev["sst"]["accuracy"], dev["qqp"]["accuracy"], dev["sts"]["pearson"], dev["overall"]):
        assert f"{number:.3f}" in shown
    assert {path.name: path.read_text() for path in (run / "predictions").iterdir()} == before


def test_evaluate_writes_predictions_for_a_split_without_labels(run, capsys):
    (run / "predictions" / "sst-test-output.csv").unlink()
    assert evaluate.main([str(run), "--split", "test"]) == 0
    assert "no labels in this split" in capsys.readouterr().out
    assert [identifier for identifier, _ in pairs(run / "predictions" / "sst-test-output.csv")] == [
        f"x{i}" for i in range(8)
    ]


def test_predict_reads_course_files_and_agrees_with_evaluate(run, course_data, tmp_path, capsys):
    for task, name, stem in (("sst", "ids-sst", "sst"), ("qqp", "quora", "para"), ("sts", "sts", "sts")):
        output = tmp_path / f"{task}.csv"
        source = course_data / f"{name}-dev.csv"
        assert predict.main([str(run), "--task", task, "--input", str(source), "--output", str(output)]) == 0
        expected = pairs(run / "predictions" / f"{stem}-dev-output.csv")
        predicted = pairs(output)
        assert [identifier for identifier, _ in predicted] == [identifier for identifier, _ in expected]
        assert [float(v) for _, v in predicted] == pytest.approx([float(v) for _, v in expected], abs=1e-4)


def test_predict_reads_sentences_and_pairs_from_standard_input(run, course_data, monkeypatch, capsys):
    for task, name, stem in (("sst", "ids-sst", "sst"), ("sts", "sts", "sts")):
        rows = [line.split("\t")[2:-1] for line in (course_data / f"{name}-dev.csv").read_text().splitlines()[1:]]
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n".join("\t".join(row) for row in rows)))
        assert predict.main([str(run), f"--task={task}", "--input=-"]) == 0
        header, *lines = capsys.readouterr().out.splitlines()
        assert header.startswith("id \t Predicted_")
        predicted = [tuple(line.rstrip().split(" , ")) for line in lines]
        assert [identifier for identifier, _ in predicted] == [str(2 * i) for i in range(len(rows))]  # of their lines
        expected = [float(value) for _, value in pairs(run / "predictions" / f"{stem}-dev-output.csv")]
        assert [float(value) for _, value in predicted] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("head", [head for head in HEADS if HEADS[head].pair_encoding != "cross-encoder"])
def test_every_pair_head_predicts_as_it_was_evaluated(quick, course_data, tmp_path, head, capsys):
    options = ["--steps=2", f"--heads.sts={head}", f"--heads.qqp={head}", "--shared-layer=linear"]
    assert train.main([*quick, *options]) == 0
    run, output = tmp_path / "run", tmp_path / "sts.csv"
    before = pairs(run / "predictions" / "sts-dev-output.csv")
    assert evaluate.main([str(run)]) == 0
    assert pairs(run / "predictions" / "sts-dev-output.csv") == before
    source = course_data / "sts-dev.csv"
    assert predict.main([str(run), "--task=sts", f"--input={source}", f"--output={output}"]) == 0
    assert [float(v) for _, v in pairs(output)] == pytest.approx([float(v) for _, v in before], abs=1e-4)


def test_transformers_loads_the_encoder_of_a_run(run):
    transformers = pytest.importorskip("transformers")
    import torch

    from minbert.data.packing import pack
    from minbert.data.tokenizer import Tokenizer
    from minbert.model import Encoder

    text = "the film was superb ."
    theirs = transformers.BertModel.from_pretrained(run / "best", add_pooling_layer=False).eval()
    ids = transformers.AutoTokenizer.from_pretrained(run / "best")(text)["input_ids"]
    assert ids == Tokenizer.from_pretrained(run / "best").encode(text)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).last_hidden_state[0]
        actual = Encoder.from_pretrained(run / "best")(pack([ids]))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_idle_threads_spin_briefly_unless_the_user_says_otherwise(given, expected):
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", "import minbert, os; print(os.environ.get('GOMP_SPINCOUNT'))"]
    result = subprocess.run(command, env={**environment, **given}, capture_output=True, text=True)
    assert result.stdout.strip() == expected


@pytest.mark.parametrize("command", [train, evaluate, predict, doctor], ids=lambda module: module.__name__)
def test_a_gpu_that_is_too_old_is_refused_by_every_command_in_one_line(command, run, course_data, monkeypatch, capsys):
    options = {
        train: [f"--data={course_data}"],
        evaluate: [str(run)],
        predict: [str(run), "--task=sst", f"--input={course_data / 'ids-sst-dev.csv'}"],
        doctor: ["--check"],
    }
    pretend(monkeypatch, (7, 5))
    with pytest.raises(SystemExit) as stop:
        cli.run(command.main, [*options[command], "--device=cuda"])
    assert stop.value.code == 2
    needed = f"minbert needs a GPU of compute capability 8.0 or newer, and {NAME} has 7.5"
    assert capsys.readouterr().err == f"error: --device cuda: {needed}; use --device cpu\n"
    forget()


def test_evaluate_takes_the_cpu_in_place_of_a_gpu_that_is_too_old(run, monkeypatch, capsys):
    pretend(monkeypatch, (7, 5))
    assert evaluate.main([str(run)]) == 0
    shown = capsys.readouterr()
    assert "/best on CPU (" in shown.out
    assert shown.err.startswith("warning: the CPU is used: minbert needs a GPU of compute capability 8.0 or newer")
    forget()
