"""`minbert.load`: what it predicts, embeds and scores is what the commands say of the same run."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from own_task_files import write_tasks

import minbert
from minbert import evaluate, kernels, predict
from minbert.data import open_source
from minbert.errors import UserError
from minbert.model import Encoder
from minbert.runs.run_directory import Run

SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
OPTIONS = {"precision": "fp32", "batch_size": 8, "epochs": 3, "lr": 3e-3, "recipe": "plain", "scratch": SHAPE}
TEXTS = ["the film was superb .", "a  dull meal", "so", "the train was the weak garden of a book"]


@pytest.fixture(scope="module")
def course_run(course_data, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("course") / "run"
    return minbert.fit(data=course_data, out=out, quiet=True, **OPTIONS, heads={"sts": "cosine"})


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """The directory of a tasks file and its data, of a task of each type."""
    return write_tasks(tmp_path_factory.mktemp("own")).parent


@pytest.fixture(scope="module")
def own_run(own, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "run"
    return minbert.fit(tasks_file=own / "tasks.yaml", out=out, quiet=True, **OPTIONS)


def rows_of(own: Path, task: str) -> tuple[list[str], list[str] | None, list[str]]:
    """The texts, the second texts and the labels of a dev file."""
    with open(own / f"{task}-dev.csv", newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    columns = list(zip(*(row.values() for row in rows), strict=True))
    return [*columns[0]], [*columns[1]] if len(columns) == 3 else None, [*columns[-1]]


# What the commands give ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["topics", "same", "stars", "tags"])
def test_predictions_are_those_of_the_run(own_run, own, task):
    texts, pairs, _ = rows_of(own, task)
    found = minbert.load(own_run).predict(task, texts, pairs)
    file = own_run.path / "predictions" / f"{task}-dev.jsonl"
    for prediction, line in zip(found, map(json.loads, file.read_text().splitlines()), strict=True):
        if task == "stars":
            assert prediction.label == prediction.score == pytest.approx(line["predicted"], abs=1e-5)
            assert prediction.probabilities is None
            continue
        assert (prediction.label, type(prediction.label)) == (line["predicted"], type(line["predicted"]))
        assert prediction.probabilities == pytest.approx(line["probabilities"], abs=1e-5)
        expected = None if task == "tags" else max(prediction.probabilities)
        assert prediction.score == expected


def test_predictions_are_those_of_the_command(course_run, tmp_path, capsys):
    (tmp_path / "texts").write_text("".join(f"{text}\n" for text in TEXTS))
    assert predict.main([str(course_run.path), "--task=sst", f"--input={tmp_path / 'texts'}"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    found = minbert.load(course_run).predict("sst", TEXTS)
    assert [int(line.split(" , ")[1]) for line in lines] == [prediction.label for prediction in found]


def test_scores_are_those_of_evaluate(course_run, own_run, course_data, own, capsys):
    assert evaluate.main([str(own_run.path)]) == 0
    shown = capsys.readouterr().out
    for task in ("topics", "same", "stars", "tags"):
        texts, pairs, labels = rows_of(own, task)
        found = minbert.load(own_run).score(task, texts, labels, pairs)
        assert list(found) == list(own_run.scores()[task])
        assert found == pytest.approx(own_run.scores()[task], abs=1e-6)
        assert all(f"{value:.3f}" in shown for value in found.values())
    predictor = minbert.load(course_run)
    examples = open_source(str(course_data)).load(predictor.task("sts"), "dev")
    labels = examples.labels.tolist()
    found = predictor.score("sts", examples.texts, labels, examples.pairs)
    assert found == pytest.approx(course_run.scores()["sts"], abs=1e-6)


def test_labels_have_the_users_type(tmp_path):
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": bool(i % 2)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = "tasks: {liked: {text: text, label: label, type: classification, train: rows.jsonl, dev: 0.2}}"
    (tmp_path / "tasks.yaml").write_text(record)
    run = minbert.fit(tasks_file=tmp_path / "tasks.yaml", out=tmp_path / "run", quiet=True, steps=1, **OPTIONS)
    predictor = minbert.load(run)
    labels = [prediction.label for prediction in predictor.predict("liked", ["good", "bad"])]
    assert [type(label) for label in labels] == [bool, bool]
    assert set(predictor.tasks["liked"].classes) == {False, True}
    assert predictor.score("liked", ["good", "bad"], labels) == {"accuracy": 1.0}


@pytest.mark.parametrize("pooling", ["mean", "max", "cls"])
def test_embeddings_are_the_encoders(course_run, pooling):
    predictor = minbert.load(course_run)
    found = predictor.embed(TEXTS, pooling)
    assert (found.shape, found.dtype) == ((4, 16), np.float32)
    encoder, tokenizer = Encoder.from_pretrained(course_run.best), minbert.Tokenizer.from_pretrained(course_run.best)
    for text, vector in zip(TEXTS, found, strict=True):  # without padding, batch or preparation
        packed = minbert.pack([tokenizer.encode(text)])
        with torch.no_grad(), kernels.use_backend("reference"):
            hidden = encoder(packed)
        expected = {"mean": hidden.mean(0), "max": hidden.amax(0), "cls": hidden[0]}[pooling]
        np.testing.assert_allclose(vector, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_order_is_the_inputs_whatever_the_batches(course_run, monkeypatch):
    predictor = minbert.load(course_run)
    texts = [f"{'the ' * (number % 7)}film was {word}" for number, word in enumerate(["superb", "dull", "so so"] * 9)]
    whole = predictor.predict("sst", texts), predictor.embed(texts)
    monkeypatch.setattr("minbert.inference.TOKENS_PER_BATCH", 16)
    single = [predictor.predict("sst", [text])[0] for text in texts]
    for found in (predictor.predict("sst", iter(texts)), single):
        for one, other in zip(found, whole[0], strict=True):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    np.testing.assert_allclose(predictor.embed(texts), whole[1], atol=1e-5)


# What is loaded -----------------------------------------------------------------------------------------------------


def test_a_run_or_a_checkpoint_is_loaded(course_run, own_run, own, tmp_path):
    texts, _, _ = rows_of(own, "topics")
    expected = minbert.load(own_run.path).predict("topics", texts)
    assert minbert.load(str(own_run.best)).predict("topics", texts) == expected
    last = minbert.load(own_run.last)
    assert last.checkpoint == own_run.last
    copy = shutil.copytree(own_run.best, tmp_path / "model")  # as on a hub: a checkpoint with its run's options
    shutil.copy(own_run.path / "config.yaml", copy)
    assert minbert.load(copy).predict("topics", texts) == expected
    copy = shutil.copytree(course_run.best, tmp_path / "built-in")
    shutil.copy(course_run.path / "config.yaml", copy)
    assert minbert.load(copy).predict("sst", TEXTS) == minbert.load(course_run).predict("sst", TEXTS)


def test_what_is_no_trained_model_is_one_line(course_run, tmp_path):
    with pytest.raises(UserError, match="nothing: no such run directory"):
        minbert.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="is not a run directory of minbert"):
        minbert.load(tmp_path)
    with pytest.raises(UserError, match="expected a run or the path of one, got int"):
        minbert.load(3)
    with pytest.raises(UserError, match="--device must be auto, cpu, cuda or cuda:N, got 'tpu'"):
        minbert.load(course_run, device="tpu")
    copy = shutil.copytree(course_run.path, tmp_path / "copy")
    shutil.rmtree(copy / "best")
    with pytest.raises(UserError, match="best is not there: the run has saved no such checkpoint yet"):
        minbert.load(copy)
    (copy / "last" / "heads.safetensors").write_bytes(b"altered")
    with pytest.raises(UserError, match="was truncated or altered"):
        minbert.load(copy / "last")
    alone = shutil.copytree(course_run.best, tmp_path / "alone" / "best")
    with pytest.raises(UserError, match="alone is not a run directory of minbert"):
        minbert.load(alone)


# What is refused ----------------------------------------------------------------------------------------------------


def test_nothing_gives_nothing(course_run):
    predictor = minbert.load(course_run)
    assert predictor.predict("sst", []) == predictor.predict("sts", [], []) == []
    assert (predictor.embed([]).shape, predictor.embed([]).dtype) == ((0, 16), np.float32)
    with pytest.raises(UserError, match="texts: there are none to score"):
        predictor.score("sst", [], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cfimdb", ["a"]), "the run was not trained on cfimdb; it knows sst, qqp, sts"),
        (("sentiment", ["a"]), "unknown task 'sentiment'"),
        (("sst", "a film"), r"texts: expected a list of texts, got 'a film'"),
        (("sst", 3), r"texts: expected a list of texts, got 3"),
        (("sst", ["a", None]), r"texts\[1\]: expected a text, got null"),
        (("sst", ["a", "b", float("nan")]), r"texts\[2\]: expected a text, got nan"),
        (("sst", ["a", b"b"]), r"texts\[1\]: expected a text, got b'b'"),
        (("sst", ["a", " \n"]), r"texts\[1\]: empty text"),
        (("sst", ["\ud800"]), r"texts\[0\]: not Unicode text"),
        (("sst", ["a"], ["b"]), "the task sst is about single texts; leave pairs out"),
        (("qqp", ["a"]), "the task qqp is about pairs of texts; give the second ones as pairs"),
        (("qqp", ["a"], ["b", "c"]), "pairs: expected 1, one for each text, got 2"),
        (("qqp", ["a"], [""]), r"pairs\[0\]: empty text"),
    ],
)
def test_a_wrong_input_is_named(course_run, arguments, message):
    with pytest.raises(UserError, match=message):
        minbert.load(course_run).predict(*arguments)


def test_wrong_labels_and_poolings_are_named(course_run, own_run):
    predictor = minbert.load(course_run)
    with pytest.raises(UserError, match=r"labels\[1\]: label 7 is outside 0 to 4"):
        predictor.score("sst", ["a", "b"], [0, 7])
    with pytest.raises(UserError, match="labels: expected 2, one for each text, got 1"):
        predictor.score("sst", ["a", "b"], [0])
    with pytest.raises(UserError, match=r"labels\[0\]: label 'Bug' is none of the classes"):
        minbert.load(own_run).score("topics", ["a"], ["Bug"])
    with pytest.raises(UserError, match=r"unknown pooling 'men' \(did you mean 'mean'\?\)"):
        predictor.embed(["a"], "men")
    with pytest.raises(UserError, match="pooling 'pooler': the run's encoder has none"):
        predictor.embed(["a"], "pooler")


# Warnings, threads and the process ------------------------------------------------------------------------------------


def test_texts_that_are_cut_give_one_warning_at_the_callers_line(course_run):
    predictor = minbert.load(course_run)
    long = ["film " * 2 * predictor.max_length] * 2 + ["short"]
    for call in (
        lambda: predictor.predict("sst", long),
        lambda: predictor.embed(long),
        lambda: predictor.score("sst", long, [0, 1, 2]),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert [str(each.message) for each in caught] == [f"2 examples cut to {predictor.max_length} tokens"]
        assert caught[0].filename == __file__


def state() -> Iterator[object]:
    yield from (kernels.dispatch.choice(), kernels.matmul(), torch.get_num_threads(), torch.is_grad_enabled())
    yield torch.get_rng_state().tolist()
    yield threading.enumerate()


def test_the_process_is_left_as_it_was(course_data, tmp_path):
    run = minbert.fit(
        data=course_data, out=tmp_path / "run", backend="reference", tasks=["sst"], steps=1, quiet=True, **OPTIONS
    )
    torch.manual_seed(5)
    before = [*state()]
    predictor = minbert.load(run)
    used = []
    compute = predictor._model.forward
    predictor._model.forward = lambda *args: used.append(kernels.dispatch.choice()) or compute(*args)
    predictor.predict("sst", ["a film"])
    assert used == ["reference"]  # as in its run
    predictor.embed(["a film"])
    with pytest.raises(UserError):
        predictor.predict("sst", [""])
    assert [*state()] == before


def test_threads_share_a_predictor(course_run):
    predictor, other = minbert.load(course_run), minbert.load(course_run.last)
    expected = predictor.predict("sst", TEXTS), other.predict("sst", TEXTS)
    found: list[object] = []
    work = [
        threading.Thread(target=lambda each=each: found.append([each.predict("sst", TEXTS) for _ in range(5)]))
        for each in (predictor, other, predictor)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(found) == 3
    assert all(each in ([expected[0]] * 5, [expected[1]] * 5) for each in found)


def test_a_predictor_says_what_it_is(course_run):
    assert repr(minbert.load(course_run)) == f"Predictor('{course_run.best}': sst, qqp, sts; cpu)"


def test_a_pickled_predictor_is_loaded_again(course_run):
    predictor = minbert.load(course_run)
    data = pickle.dumps(predictor)
    assert len(data) < 20_000  # no weights, which lie as this processor multiplies them
    assert pickle.loads(data).predict("sst", TEXTS) == predictor.predict("sst", TEXTS)


def test_a_predictor_without_compiled_code_says_so(course_run, monkeypatch):
    monkeypatch.setattr(kernels.native, "_library", None)
    monkeypatch.setattr(kernels.native, "_reason", "the native extension x is not built")
    with pytest.warns(UserWarning, match="the native extension x is not built: the slower reference ops run instead"):
        predictor = minbert.load(course_run)
    assert predictor.predict("sst", TEXTS)
