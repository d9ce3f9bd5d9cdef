"""The report of a run of own tasks: many classes, several labels, any scale, and names that are any text."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from pages import SMALL, Page

from minbert import evaluate, predict, train
from minbert.errors import UserError
from minbert.report import Row, write_comparison, write_report
from minbert.runs.run_directory import Run
from minbert.tasks import Task

HOSTILE = (
    "<script>alert(1)</script>",
    """say "it's" & <b>bold</b>""",
    "مرحبا بالعالم",
    "long" * 50,
    "two\nlines",
    "{{ 7 * 7 }}",
    "ov\u202eerride",
)
MANY = tuple(f"intent {number}" for number in range(77))
TASKS = {
    "two": {"text": "body <i>", "label": "kind", "type": "classification", "metrics": ["f1", "mcc", "roc_auc"]},
    "hostile": {"text": "text", "label": "label", "type": "classification"},
    "many": {"text": "text", "label": "label", "type": "classification", "metrics": ["accuracy", "f1_macro"]},
    "tags": {"text": "text", "label": "label", "type": "multilabel", "separator": "|", "title": "Tags <u>"},
    "price": {"text": ["one", "two"], "label": "price", "type": "regression", "scale": [-100, 1000]},
}
TASKS["price"]["metrics"] = ["spearman", "mae"]
CLASSES = {"two": ("ham", "spam"), "hostile": HOSTILE, "many": MANY, "tags": HOSTILE}


def write_data(directory: Path) -> Path:
    """A tasks file, and its data."""
    draw = random.Random(0)
    records = {}
    for name, record in TASKS.items():
        texts = [record["text"]] if isinstance(record["text"], str) else record["text"]
        for split, count in (("train", 160), ("dev", 80)):
            with open(directory / f"{name}-{split}.csv", "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow([*texts, record["label"]])
                for number in range(count):
                    words = [
                        " ".join(draw.choices(["good", "bad", "not", "<em>film</em>", "plot"], k=6)) for _ in texts
                    ]
                    if name == "price":
                        label = f"{draw.uniform(-100, 1000):.2f}"
                    elif name == "tags":
                        label = "|".join(each for each in HOSTILE if draw.random() < 0.3)
                    else:
                        label = CLASSES[name][number % len(CLASSES[name])]
                    writer.writerow([*words, label])
        records[name] = {**record, "train": f"{name}-train.csv", "dev": f"{name}-dev.csv"}
    path = directory / "tasks.yaml"
    path.write_text(yaml.safe_dump({"tasks": records}, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Run:
    """A run of one epoch; to be left as it is."""
    directory = tmp_path_factory.mktemp("own")
    path = directory / "run"
    arguments = [f"--tasks-file={write_data(directory)}", f"--out={path}", "--epochs=1", "--recipe=plain", *SMALL]
    assert train.main(arguments) == 0
    return Run(path)


def section(page: Page, name: str) -> str:
    """The source of a task's section."""
    return page.source.partition(f'<section id="task-{name}"')[2].partition("</section>")[0]


def test_names_are_shown_and_not_obeyed(own):
    page = Page(own.path / "report.html")
    assert page.count("script") == 1
    assert {page.count(tag) for tag in ("em", "u")} == {0}
    assert "<b>bold" not in page.source
    for text in ("<script>alert(1)</script>", """say "it's" & <b>bold</b>""", "مرحبا بالعالم", "two\\nlines"):
        assert text in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "ov\\u202eerride" in page.text
    assert "\u202e" not in page.text
    assert "long" * 50 not in page.text
    assert any(attributes.get("title") == "long" * 50 for tag, attributes in page.elements if tag == "bdi")
    for words in ("body <i>", "Tags <u>", "<em>film</em>", "own tasks: two, hostile, many, tags, price"):
        assert words in page.text


def test_the_headline_has_every_metric(own):
    dev = own.summary()["dev"]
    cards = Page(own.path / "report.html").source.partition('<ul class="cards"')[2].partition("</ul>")[0]
    shown = re.sub(r"<[^>]+>", " ", cards)
    names = {"f1": "F1", "mcc": "MCC", "roc_auc": "ROC AUC", "f1_macro": "F1 macro", "f1_micro": "F1 micro"}
    names |= {"spearman": "Spearman", "mae": "MAE"}
    for name, scores in dev.items():
        for metric, value in scores.items() if name != "overall" else ():
            assert names.get(metric, metric) in shown
            assert f"{value:.3f}".replace("-", "−") in shown


def test_few_classes_have_a_matrix_of_numbers_and_many_a_map(own):
    page = Page(own.path / "report.html")
    two, hostile, many = (section(page, name) for name in ("two", "hostile", "many"))
    for few in (two, hostile):
        assert '<table class="confusion"' in few
        assert "<svg" not in few
    assert '<table class="confusion"' not in many
    found = [prediction for prediction in own.predictions(run_task(own, "many"), "dev")]
    cells = {(prediction.label, prediction.predicted) for prediction in found}
    (svg,) = re.findall(r"<svg.*?</svg>", many, re.DOTALL)
    assert len(re.findall(r"<title>", svg)) == len(cells)
    assert not re.search(r"<text[^>]*>intent", svg)
    assert "The most confused classes" in many
    assert "The most confused classes" not in two
    for name, classes in CLASSES.items():
        table = section(page, name).partition('<table class="classes sortable">')[2].partition("</table>")[0]
        assert table.count("<tr>") == 1 + len(classes)
        assert table.count("data-key") == len(classes) * {"many": 6, "tags": 7}.get(name, 5)


def run_task(run: Run, name: str) -> Task:
    (task,) = run.config().chosen_tasks([name])
    return task


def test_several_labels_have_their_thresholds_and_mistakes(own):
    page = section(Page(own.path / "report.html"), "tags")
    saved = yaml.safe_load((own.best / "tasks.yaml").read_text(encoding="utf-8"))["tasks"]["tags"]["thresholds"]
    assert len(saved) == len(HOSTILE)
    assert saved != [0.5] * len(HOSTILE)
    for threshold in saved:
        assert f'data-key="{threshold}">{threshold:.3f}' in page
    assert "Mistakes that come together" in page
    assert 'class="wrong"' in page


def test_a_regression_is_on_the_users_scale(own):
    page = section(Page(own.path / "report.html"), "price")
    (svg,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    ticks = {float(text) for text in re.findall(r'class="tick"[^>]*>([-\d.]+)<', svg)}
    assert 1000 in ticks
    assert 0 in ticks
    assert "Predicted against true price" in page
    assert "Spearman" in page
    first = own.predictions(run_task(own, "price"), "dev")[0]
    with open(own.path.parent / "price-dev.csv", encoding="utf-8", newline="") as file:
        row = next(csv.DictReader(file))
    assert first.label == float(row["price"])


def test_evaluate_uses_the_thresholds_of_training(own, capsys):
    assert evaluate.main([str(own.path), "--tasks=tags"]) == 0
    value = own.summary()["dev"]["tags"]["f1_micro"]
    assert f"{value:.3f}" in capsys.readouterr().out
    predicted = own.predictions(run_task(own, "tags"), "dev")
    saved = yaml.safe_load((own.best / "tasks.yaml").read_text(encoding="utf-8"))["tasks"]["tags"]["thresholds"]
    for each in predicted:
        assert each.predicted == [
            int(share > threshold) for share, threshold in zip(each.probabilities, saved, strict=True)
        ]


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("hostile", "input.csv", 'id,text\na1,"good, not\nbad"\na2,plot\n'),
        ("hostile", "input.jsonl", '{"id": "a1", "text": "good"}\n{"id": "a2", "text": "bad"}\n'),
        ("hostile", "input.tsv", "id\ttext\na1\tgood\na2\tbad\n"),
        ("tags", "input.csv", "id,text\na1,good\na2,bad\n"),
        ("price", "input.csv", "one,two,id\ngood,bad,a1\ngood,film,a2\n"),
        ("price", "input.txt", "good\tbad\ngood\tfilm\n"),
        ("two", "input.txt", "good, and bad\n<b>plot</b>\n"),
    ],
)
def test_predict_reads_the_tasks_own_files_and_bare_lines(own, tmp_path, capsys, name, file, text):
    (tmp_path / file).write_text(text, encoding="utf-8")
    output = tmp_path / "output.csv"
    assert predict.main([str(own.path), f"--task={name}", f"--input={tmp_path / file}"]) == 0
    shown = capsys.readouterr().out
    assert predict.main([str(own.path), f"--task={name}", f"--input={tmp_path / file}", f"--output={output}"]) == 0
    header, *rows = list(csv.reader(output.read_text(encoding="utf-8").splitlines(keepends=True)))
    assert list(csv.reader(shown.splitlines(keepends=True))) == [header, *rows]
    assert [row[0] for row in rows] == (["0", "1"] if file.endswith(".txt") else ["a1", "a2"])
    if name == "price":
        assert header == ["id", "prediction"]
        assert all(np.isfinite(float(row[1])) for row in rows)
        return
    names = sorted(CLASSES[name])
    assert header == ["id", "prediction", *(f"probability of {each}" for each in names)]
    for row in rows:
        shares = dict(zip(names, map(float, row[2:]), strict=True))
        if name != "tags":
            assert row[1] == max(shares, key=shares.get)
            assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        else:
            assert {*filter(None, row[1].split("|"))} <= {*names}


def test_without_the_data_it_has_no_texts_and_says_which_option_helps(own, tmp_path):
    for file in own.path.parent.glob("*-dev.csv"):
        file.rename(tmp_path / file.name)
    try:
        page = Page(write_report(own))
        assert "minbert report RUN --tasks-file FILE" in page.text
        assert "<em>film</em>" not in page.text
    finally:
        for file in tmp_path.glob("*-dev.csv"):
            file.rename(own.path.parent / file.name)
        write_report(own)


@pytest.mark.parametrize("thresholds", [[0.5], [0.5] * 6 + [1.5], [0.5] * 6 + [-0.1]])
def test_thresholds_of_another_task_are_refused(own, thresholds):
    path = own.best / "tasks.yaml"
    text = path.read_text(encoding="utf-8")
    saved = yaml.safe_load(text)
    saved["tasks"]["tags"]["thresholds"] = thresholds
    path.write_text(yaml.safe_dump(saved), encoding="utf-8")
    try:
        with pytest.raises(UserError, match=r"tasks\.yaml.*tags.*thresholds"):
            write_report(own)
        del saved["tasks"]["tags"]["thresholds"]
        saved["tasks"]["many"]["classes"][3] = "another"
        path.write_text(yaml.safe_dump(saved), encoding="utf-8")
        with pytest.raises(UserError, match=r"has another task many than the run"):
            write_report(own)
    finally:
        path.write_text(text, encoding="utf-8")


def test_a_comparison_has_columns_of_own_tasks(own, tmp_path):
    page = Page(write_comparison(tmp_path / "table.html", "Ours", [Row("one", {"elsewhere": 0.5}, own)]))
    for words in ("Tags <u>", "two", "price", "elsewhere", "Spearman"):
        assert words in page.text
    assert page.count("u") == 0
    columns = re.findall(r'<th scope="col">([^<]*)', page.source)
    order = ["two", "hostile", "many", "Tags &lt;u&gt;", "price", "overall"]
    assert [each for each in columns if each in order][:6] == order


def test_a_thousand_classes_have_no_map_and_a_table_of_the_most_frequent(own, monkeypatch, tmp_path):
    from minbert.report import run_report
    from minbert.runs.predictions import PredictedExample

    task = Task("own", ("text",), "label", classes=tuple(f"class {number}" for number in range(1000)))
    found = [PredictedExample(str(i), (i + i % 3) % 1000, 9, i % 1000, None) for i in range(3000)]
    monkeypatch.setattr(Run, "predictions", lambda self, task, split: found)
    shown = run_report.task_section(own, task, "no data")
    assert (shown["map"], shown["confusion"]) == (None, None)
    assert len(shown["classes"]) == run_report.MOST_CLASSES
    assert len(shown["pairs"]) > 0
    assert json.dumps(shown["facts"])
