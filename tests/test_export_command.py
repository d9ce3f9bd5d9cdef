"""`minbert export`, and docs/export.md: its script predicts as minbert does in a process without torch and minbert."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from export_models import task_of
from groups import quick_options
from own_task_files import write_tasks
from test_docs import blocks, text_of

from minbert import train
from minbert.errors import UserError
from minbert.export import __main__ as export
from minbert.export import trained as tolerance
from minbert.export.onnx_record import reading
from minbert.methods.losses import losses_for
from minbert.tasks import Task
from minbert.tasks.labels import decode_labels
from minbert.tasks.metrics import predictions, probabilities

pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
pytest.importorskip("onnx", reason="needs the extra [onnx]")

PAGE = text_of(Path(__file__).parents[1] / "docs" / "export.md")
(SCRIPT,) = (block for block in blocks(PAGE, "python") if block.startswith("# serve.py\n"))


@pytest.fixture(scope="module")
def run(course_data, tmp_path_factory) -> Path:
    """A short run of sst, qqp and sts, whose sentences sts compares by their cosine."""
    path = tmp_path_factory.mktemp("export") / "run"
    assert train.main([*quick_options(course_data, path), "--lr=0.005", "--heads.sts=cosine"]) == 0
    return path


@pytest.fixture(scope="module")
def own_run(tmp_path_factory) -> Path:
    """A short run of tasks of each type, of a file."""
    directory = tmp_path_factory.mktemp("export-own")
    options = quick_options(directory, directory / "run")[1:]
    tasks_file = write_tasks(directory / "data")
    assert train.main([*options, f"--tasks-file={tasks_file}", "--lr=0.005", "--epochs=4", "--max-length=16"]) == 0
    return directory / "run"


def served(directory: Path, examples: list[list[str]], script: Path) -> list[dict[str, Any]]:
    """What the page's script prints, in a process that has neither torch nor minbert."""
    script.write_text(SCRIPT)
    code = (
        f"import runpy, sys; sys.argv = ['serve.py', {str(directory)!r}]; runpy.run_path({str(script)!r}, {{}},"
        " '__main__'); loaded = {name.partition('.')[0] for name in sys.modules};"
        " assert not loaded & {'torch', 'minbert', 'transformers'}; assert 'onnxruntime' in loaded"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    text = "".join(json.dumps(example) + "\n" for example in examples)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=script.parent, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def dev_of(run: Path, task: Task) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The dev texts of a task, and what minbert predicts for them."""
    config = export.Run(run).config()
    examples = export.Run(run).source(config).load(task, "dev")
    texts = [list(each) for each in zip(*filter(None, (examples.texts, examples.pairs)), strict=True)]
    path = run / "predictions" / f"{task.name}-dev.jsonl"
    return texts, [json.loads(line) for line in path.read_text().splitlines()]


def check_served(task: Task, answers: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    assert len(answers) == len(expected)
    for answer, line in zip(answers, expected, strict=True):
        assert answer["task"] == task.name
        if task.is_regression:
            assert answer["label"] == answer["values"] == pytest.approx(line["predicted"], abs=tolerance)
            continue
        values = answer["values"] if isinstance(answer["values"], list) else [1 - answer["values"], answer["values"]]
        assert values == pytest.approx(line["probabilities"], abs=tolerance)
        assert answer["label"] == line["predicted"]


# The script of the page --------------------------------------------------------------------------------------------


def test_the_script_reads_the_outputs_of_every_task_and_loss_as_minbert_does():
    namespace: dict[str, Any] = {"__name__": "serve"}
    exec(SCRIPT, namespace)
    labels = task_of("sst", type="multilabel", classes=("a", "b", "c"), metrics=(), thresholds=(0.2, 0.5, 0.9))
    outputs = np.random.default_rng(0).normal(size=(50, 5), scale=2).astype(np.float32)
    seen = set()
    for task in (task_of("sst"), task_of("qqp"), task_of("sts", scale=(-1.0, 4.0)), labels):
        for loss in losses_for(task):
            one = replace(task, loss=loss)
            seen.add((one.type, loss))
            x = outputs[:, : one.num_outputs] if one.num_outputs > 1 else outputs[:, 0]
            found, values = namespace["predict"]({"type": one.type, **json.loads(json.dumps(reading(one)))}, x)
            expected = decode_labels(one, predictions(one, x))
            if one.is_regression:
                np.testing.assert_allclose(found, expected, atol=1e-6)
                continue
            assert found == expected
            if (of_classes := probabilities(one, x)) is not None:
                np.testing.assert_allclose(values, of_classes if values.ndim == 2 else of_classes[:, 1], atol=1e-6)
    assert len(seen) == 9


def test_the_script_predicts_as_the_run_does_without_torch(own_run, tmp_path, capsys):
    """Tasks of each type, with one output for two classes, several for three, scores from 1 to 5 and thresholds."""
    out = tmp_path / "graph"
    assert export.main([str(own_run), "--to=onnx", f"--out={out}"]) == 0
    for name, task in export.Run(own_run).config().own_tasks.items():
        texts, expected = dev_of(own_run, task)
        answers = [each for each in served(out, texts, tmp_path / "serve.py") if each["task"] == name]
        check_served(task, answers, expected, 1e-5)
    shown = capsys.readouterr().out
    assert shown.count("24 of 24 dev examples: differs from minbert by") == 4
    assert shown.count("24 of 24 labels are equal") == 3


@pytest.mark.parametrize("head", ["cosine", "layers-cosine"])
def test_the_script_predicts_what_heads_of_several_sequences_do(head, course_data, tmp_path):
    run, out = tmp_path / "run", tmp_path / "graph"
    assert train.main([*quick_options(course_data, run), "--tasks=sts", f"--heads.sts={head}", "--steps=4"]) == 0
    assert export.main([str(run), "--to=onnx", f"--out={out}"]) == 0
    task = task_of("sts")
    texts, expected = dev_of(run, task)
    check_served(task, served(out, texts, tmp_path / "serve.py"), expected, 1e-5)


def test_the_examples_of_the_page_run(run, tmp_path, monkeypatch):
    """Its commands, and the code that reads what they wrote."""
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "runs" / "first")
    commands = [block.split() for block in blocks(PAGE, "bash")]
    assert len(commands) == 3
    for program, command, *arguments in commands:
        assert (program, command) == ("minbert", "export")
        assert export.main(arguments) == 0
    codes = [block for block in blocks(PAGE, "python") if block != SCRIPT]
    assert len(codes) == 2
    namespace: dict[str, Any] = {}
    for code in codes:
        exec(code, namespace)
    assert namespace["vectors"].shape == (2, 16)
    pair = {"text": "A cat sleeps.", "text_pair": "A dog sleeps."}
    assert namespace["classify"](pair, truncation=True)["label"] in "01234"


@pytest.mark.slow
def test_onnxruntime_alone_gives_minberts_predictions_on_all_of_sts_and_sst(tmp_path):
    """A pretrained model, trained for a few steps on the real data, and all dev examples."""
    data, model = (os.environ.get(f"MINBERT_TEST_{name}") for name in ("DATA", "MODEL"))
    if not (data and model):
        pytest.skip("needs MINBERT_TEST_DATA and MINBERT_TEST_MODEL")
    run, out = tmp_path / "run", tmp_path / "graph"
    options = ["--tasks=sst,sts", "--steps=10", "--precision=fp32", "--smart.lambda-s=0", "--batch-size=16"]
    assert train.main([f"--data={data}", f"--model={model}", f"--out={run}", *options]) == 0
    assert export.main([str(run), "--to=onnx", f"--out={out}"]) == 0
    for name, count in (("sst", 1101), ("sts", 863)):
        texts, expected = dev_of(run, task_of(name))
        answers = [each for each in served(out, texts, tmp_path / "serve.py") if each["task"] == name]
        assert len(answers) == count
        check_served(task_of(name), answers, expected, 1e-5)
    for to, package in (("transformers", "transformers"), ("sentence-transformers", "sentence_transformers")):
        pytest.importorskip(package)
        assert export.main([str(run), f"--to={to}", "--task=sst", f"--out={tmp_path / to}"]) == 0


# The command -------------------------------------------------------------------------------------------------------


def refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        export.main(arguments)
    assert "\n" not in str(error.value)


def test_int8_shows_the_dev_scores_of_both_graphs(run, tmp_path, capsys):
    out = tmp_path / "graph"
    assert export.main([str(run), "--to=onnx", "--task=sst", "--int8", f"--out={out}"]) == 0
    table = capsys.readouterr().out.partition("overall")[2]
    found = re.findall(r"(\w+), \d+ MB +(\d\.\d{3})", table)
    assert [label for label, _ in found] == ["float32", "int8"]
    accuracy = json.loads((run / "summary.json").read_text())["dev"]["sst"]["accuracy"]
    assert float(found[0][1]) == pytest.approx(accuracy, abs=6e-4)
    assert {path.name for path in out.iterdir()} == {"model.onnx", "model_int8.onnx", "tokenizer.json", "minbert.json"}


def test_an_output_that_differs_leaves_nothing_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tolerance, "TOLERANCE", 0.0)
    for to in export.FORMATS:
        if to == "sentence-transformers":
            pytest.importorskip("sentence_transformers")
        refused(
            [str(run), f"--to={to}", "--task=sst", f"--out={tmp_path / 'out'}"], "differs from minbert by .*nothing is"
        )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_refused_and_left_as_it_is(run, tmp_path):
    (tmp_path / "mine").write_text("kept")
    arguments = [str(run), "--to=onnx", "--task=sst", "--out"]
    refused([*arguments, str(tmp_path)], "not an empty directory")
    refused([*arguments, str(tmp_path / "mine")], "not an empty directory")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("mine", "kept")]
    (tmp_path / "empty").mkdir()
    assert export.main([*arguments, str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "model.onnx").exists()


def test_an_export_that_was_interrupted_leaves_nothing_and_one_that_was_killed_is_replaced(run, tmp_path, monkeypatch):
    arguments = [str(run), "--to=onnx", "--task=sst", f"--out={tmp_path / 'out'}"]
    with monkeypatch.context() as patched:
        patched.setattr(export.onnx_graph, "compare", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export.main(arguments)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new" / "half").write_text("of an export")
    assert export.main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "half").exists()


def test_a_missing_package_names_its_extra(run, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for to, package in (("onnx", "onnx"), ("transformers", "transformers")):
        refused(
            [str(run), f"--to={to}", f"--out={tmp_path / 'out'}"], rf"needs {package}: pip install 'minbert\[{to}\]'"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to=onnx"], "cross-encoder: sst, qqp; bi-encoder: sts.*--task NAME"),
        (["--to=onnx", "--task=cfimdb"], "the run was not trained on cfimdb"),
        (["--to=transformers"], "give --task NAME"),
        (["--to=transformers", "--task=sst", "--int8"], "--int8 is of --to onnx"),
        (["--to=onnx", "--task=sst", "--data=/nowhere"], "no such directory"),
        (["--to=tensorflow"], "--to"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(run, tmp_path, options, message):
    refused([str(run), *options, f"--out={tmp_path / 'out'}"], message)
    assert list(tmp_path.iterdir()) == []


def test_an_altered_checkpoint_is_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    with open(copy / "best" / "heads.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    refused([str(copy), "--to=onnx", "--task=sst", f"--out={tmp_path / 'out'}"], "heads.safetensors was .*altered")


def test_without_the_runs_data_sentences_of_the_demo_corpus_are_compared(run, course_data, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(course_data), str(tmp_path / "gone")))
    arguments = [str(copy), "--to=onnx", "--task=sts", f"--out={tmp_path / 'out'}"]
    refused([*arguments, "--int8"], "no such directory.*--int8 needs the dev split")
    assert export.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "the run's dev split is out of reach (no such directory" in shown
    assert re.search(r"STS-B similarity, \d+ sentences of the demo corpus: differs from minbert by", shown)
    shutil.rmtree(tmp_path / "out")
    assert export.main([*arguments, f"--data={course_data}"]) == 0
    assert "24 of 24 dev examples" in capsys.readouterr().out


def test_the_last_checkpoint_is_exported_where_it_is_asked_for(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "best")
    arguments = [str(tmp_path / "run"), "--to=onnx", "--task=sst", f"--out={tmp_path / 'out'}"]
    refused(arguments, "best")
    assert export.main([*arguments, "--checkpoint=last"]) == 0
