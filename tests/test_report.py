"""Reports: their numbers, that what a user's file holds is shown and never obeyed, and that they need nothing else."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from course import course_file, write_course_data
from hypothesis import given
from hypothesis import strategies as st

from minbert import train
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.report import Row, write_comparison, write_report
from minbert.report import __main__ as report
from minbert.report.analysis import (
    OF_PAIRS,
    OF_SENTENCES,
    Example,
    confusion,
    facts,
    groups,
    has_pronoun,
    is_negated,
    length_difference,
    mistakes,
    score,
    word_overlap,
)
from minbert.report.comparison import columns, our_scores
from minbert.report.history import curves, epochs, grid, options, phases, thinned
from minbert.runs.predictions import Prediction
from minbert.runs.run_directory import Run
from minbert.tasks import TASKS
from minbert.tasks.metrics import METRICS

HOSTILE = """</td><script>alert(1)</script><img src=x onerror=alert(2)> "quoted' & 'such" {{ 7 * 7 }} <b>film</b>"""
SMALL = ["--batch-size=8", "--log-steps=1", "--scratch.hidden-size=16", "--scratch.num-attention-heads=2"]
SMALL += ["--scratch.intermediate-size=32", "--scratch.num-hidden-layers=1", "--precision=fp32"]


class Page(HTMLParser):
    """A page taken apart: its elements with their attributes, and the text of each but those of style and script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Course data, of which every sentiment's text on dev is hostile, and so is the folder's name."""
    directory = tmp_path_factory.mktemp("data") / "<i>data"
    directory.mkdir()
    write_course_data(directory)
    rows = [[f"s{i}", f"{i} {HOSTILE}", i % 5] for i in range(24)]
    course_file(directory / "ids-sst-dev.csv", ["id", "sentence", "sentiment"], rows)
    return directory


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Run:
    """A run of two epochs; to be read only."""
    path = tmp_path_factory.mktemp("report") / "run <u>1"
    assert train.main([f"--data={data}", f"--out={path}", "--epochs=2", *SMALL]) == 0
    return Run(path)


@pytest.fixture
def copy(run, tmp_path) -> Run:
    """The same, to do with as one likes."""
    return Run(shutil.copytree(run.path, tmp_path / "copy"))


def examples(task: str, predicted: list[float], labels: list[float], texts: list[tuple[str, ...]] | None = None):
    """Examples with all of the probability on what is predicted."""
    classes = TASKS[task].top + 1 if TASKS[task].metric == "accuracy" else 0
    found = []
    for i, (each, label) in enumerate(zip(predicted, labels, strict=True)):
        spread = [float(number == each) for number in range(classes)] or None
        found.append(Example(Prediction(str(i), each, 8 + i, label, spread), texts[i] if texts else ()))
    return found


# The page ----------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_report_of_its_scores(run):
    page = Page(run.path / "report.html")
    dev = run.summary()["dev"]
    for value in (dev["overall"], dev["sst"]["accuracy"], dev["qqp"]["accuracy"], dev["sts"]["pearson"]):
        assert f"{value:.3f}".replace("-", "−") in page.text
    for words in ("SST-5 sentiment", "Quora paraphrase", "STS-B similarity", "pcgrad + SMART", "--max-length"):
        assert words in page.text
    for backend in set(run.summary()["backends"].values()):
        assert f"{backend} kernels" in page.text


def test_what_a_file_holds_is_shown_and_not_obeyed(run, data):
    page = Page(run.path / "report.html")
    assert page.count("script") == 1
    assert {page.count(tag) for tag in ("img", "u", "link", "iframe", "object")} == {0}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert HOSTILE in page.text
    assert str(data) in page.text
    assert "run <u>1" in page.text


def test_it_needs_nothing_but_itself(run):
    page = Page(run.path / "report.html")
    assert not [name for _, attributes in page.elements for name in ("src", "srcset", "data") if name in attributes]
    links = [attributes["href"] for _, attributes in page.elements if "href" in attributes]
    assert all(link.startswith("#") for link in links)
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert {link[1:] for link in links} <= targets
    assert not re.search(r"url\(|@import|https?:", page.source)
    assert any((attributes.get("content") or "").startswith("default-src 'none'") for _, attributes in page.elements)


def test_tables_have_headers_and_pictures_have_words(run):
    page = Page(run.path / "report.html")
    assert page.count("table") >= 10
    tables = re.findall(r"<table.*?</table>", page.source, re.DOTALL)
    assert all('scope="col"' in table and 'scope="row"' in table for table in tables)
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(pictures) >= 9
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 30 for picture in pictures)
    assert "NaN" not in page.source
    assert "nan" not in re.findall(r"[\w.]+", page.source)


def test_without_the_data_it_says_so_and_leaves_the_texts_out(copy, data, capsys):
    lost = Run(copy.path)
    config = lost.config().replace(data="/nowhere/at/all")
    (lost.path / "config.yaml").write_text(config.to_yaml())
    page = Page(write_report(lost))
    assert "The texts are left out: no such directory: '/nowhere/at/all'" in page.text
    assert "alert(1)" not in page.source
    assert "Confusion matrix" in page.text
    assert "words in common" not in page.text
    assert report.main([str(lost.path), f"--data={data}"]) == 0
    assert capsys.readouterr().out == f"{lost.path / 'report.html'}\n"
    assert HOSTILE in Page(lost.path / "report.html").text


def test_other_data_than_was_predicted_is_not_shown(copy, course_data):
    page = Page(write_report(copy, str(course_data)))
    assert f"{course_data} holds other examples than those the run predicted" in page.text


def test_a_run_that_has_not_finished_has_a_report(copy):
    (copy.path / "summary.json").unlink()
    shutil.rmtree(copy.path / "predictions")
    copy.metrics.write_text("".join(line + "\n" for line in copy.metrics.read_text().splitlines()[:3]))
    page = Page(write_report(copy))
    assert "has not finished" in page.text
    assert "minbert.evaluate" in page.text
    copy.metrics.unlink()
    assert "has not finished" in Page(write_report(copy)).text


@pytest.mark.parametrize("options", [["--recipe=plain"], ["--bregman.mu=1"], ["--tasks=sts"], ["--low-memory"]])
def test_every_kind_of_run_has_one(data, tmp_path, options):
    assert train.main([f"--data={data}", f"--out={tmp_path / 'run'}", "--steps=2", *SMALL, *options]) == 0
    page = Page(tmp_path / "run" / "report.html")
    several = options != ["--tasks=sts"]
    assert ("Gradient surgery" in page.text) == (several and options != ["--recipe=plain"])
    assert ("SMART's share" in page.text) == (options != ["--recipe=plain"])
    assert ("Bregman divergence" in page.text) == (options == ["--bregman.mu=1"])


def test_a_large_split_stays_small(copy, monkeypatch):
    text = "what is the way in which such a question of quite some length is asked by one and by another ? "
    many = [Prediction(f"{i}", float(i % 2), 60, float((i + 1) % 2), [0.5, 0.5]) for i in range(10_000)]
    monkeypatch.setattr(Run, "predictions", lambda self, task, split: many)
    pairs = [text * 10] * len(many)

    class Source:
        name = "many"

        def load(self, task, split):
            from minbert.data import Examples

            return Examples([each.id for each in many], pairs, pairs if task.is_pair else None, None)

    monkeypatch.setattr("minbert.report.single.open_source", lambda data: Source())
    assert write_report(copy).stat().st_size < 2_000_000


def test_bad_input_is_one_line(copy, tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="did you mean '--data'"):
        report.main([str(copy.path), "--dta=x"])
    (copy.path / "predictions" / "sst-dev.jsonl").write_text('{"id"')
    with pytest.raises(UserError, match=r"sst-dev\.jsonl is damaged \(line 1: .*minbert\.evaluate"):
        report.main([str(copy.path)])
    (copy.path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*summary\.json \(.*--resume of the run writes it anew"):
        report.main([str(copy.path)])


# Its numbers -------------------------------------------------------------------------------------------------------


def test_the_scores_of_the_predictions_are_those_of_training(run):
    for name, metrics in run.summary()["dev"].items():
        if name in TASKS:
            found = [Example(prediction) for prediction in run.predictions(TASKS[name], "dev")]
            assert score(TASKS[name], found) == pytest.approx(metrics[TASKS[name].metric], abs=1e-6)


labels_and_predictions = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


@given(labels_and_predictions)
def test_a_confusion_matrix_counts_every_example_once(pairs):
    labels, predicted = map(list, zip(*pairs, strict=True))
    found = examples("sst", predicted, labels)
    matrix = np.array(confusion(TASKS["sst"], found))
    assert matrix.sum(axis=1).tolist() == np.bincount(labels, minlength=5).tolist()
    assert matrix.sum(axis=0).tolist() == np.bincount(predicted, minlength=5).tolist()
    assert np.trace(matrix) / len(pairs) == pytest.approx(score(TASKS["sst"], found))
    assert len(mistakes(TASKS["sst"], found)) == matrix.sum() - np.trace(matrix)


@given(labels_and_predictions)
def test_the_groups_of_a_property_part_the_examples(pairs):
    labels, predicted = map(list, zip(*pairs, strict=True))
    texts = [(("not " if label else "") + "good",) for label in labels]
    found = examples("sst", predicted, labels, texts)
    for title in ("tokens", "negation"):
        parts = [group for group in groups(TASKS["sst"], found, OF_SENTENCES) if group.title == title]
        assert sum(group.examples for group in parts) == len(found)
        assert len({group.name for group in parts}) == len(parts)
        for whole, of_group in ((score(TASKS["sst"], found), "score"), (np.mean(predicted) - np.mean(labels), "bias")):
            mean = sum(getattr(group, of_group) * group.examples for group in parts) / len(found)
            assert mean == pytest.approx(whole)


@given(st.text(), st.text())
def test_word_overlap_is_a_share_and_symmetric(one, other):
    assert word_overlap(one, other) == word_overlap(other, one)
    assert 0 <= word_overlap(one, other) <= 1
    assert word_overlap(one, one) == 1


def test_properties_on_the_papers_own_examples():
    chief = "UN chief welcomes peaceful presidential elections in Guinea", "UN chief condemns attack in Mali"
    assert word_overlap(*chief) == pytest.approx(3 / 11)
    assert length_difference("Is atheism growing?", "Why is atheism growing?") == 1
    angry = ("What makes one angry?", "What is the one thing that makes you most angry?")
    assert [has_pronoun(text) for text in angry] == [False, True]
    pronouns = next(each for each in OF_PAIRS if each.title == "pronouns")
    assert pronouns.cell(Example(Prediction("1", 0, 9, 1), angry))[0] == "in one"
    assert is_negated("I think there isn’t a general answer")
    assert is_negated("it does n't work")
    assert not is_negated("nothingness, a knot and a notion")


def test_numbers_are_grouped_between_their_edges():
    tokens = OF_SENTENCES[0]
    names = [tokens.group(Example(Prediction("1", 0, count, 0)))[1] for count in (9, 10, 19, 20, 160, 500)]
    assert names == ["below 10", "10 to 19", "10 to 19", "20 to 29", "160 or more", "160 or more"]
    difference = next(each for each in OF_PAIRS if each.title == "difference in words")
    names = [difference.group(Example(Prediction("1", 0, 9, 0), ("a", "b " * count)))[1] for count in (1, 2, 3, 7)]
    assert names == ["0", "1 to 2", "1 to 2", "6 or more"]
    overlap = OF_PAIRS[0]
    assert overlap.group(Example(Prediction("1", 0, 9, 0), ("a b", "b c d e")))[1] == "below 0.25"
    assert overlap.group(Example(Prediction("1", 0, 9, 0), ("a b", "b c")))[1] == "0.25 to below 0.5"


def test_mistakes_start_with_the_surest_and_the_farthest():
    sure = [Prediction("a", 1, 9, 0, [0.4, 0.6]), Prediction("b", 1, 9, 0, [0.1, 0.9]), Prediction("c", 1, 9, 1)]
    found = mistakes(TASKS["qqp"], [Example(each) for each in sure])
    assert [example.prediction.id for example in found] == ["b", "a"]
    assert [example.confidence for example in found] == [0.9, 0.6]
    far = mistakes(TASKS["sts"], examples("sts", [1.0, 0.5, 4.0], [1.2, 3.5, 3.0]))
    assert [example.off_by for example in far] == pytest.approx([-3.0, 1.0, -0.2])


def test_facts_of_classes_and_of_similarities():
    found = facts(TASKS["sst"], examples("sst", [1, 1, 3, 3], [0, 1, 1, 4]))
    assert found["within one class"] == "75.0%"
    assert found["mistakes off by one"] == "66.7%"
    assert found["never predicted"] == "0, 2, 4"
    assert found["by the commonest class alone"] == "0.500"
    found = facts(TASKS["qqp"], examples("qqp", [1, 1, 0, 0], [1, 0, 1, 1]))
    assert (found["precision"], found["recall"]) == ("0.500", "0.333")
    assert facts(TASKS["qqp"], examples("qqp", [0], [0]))["precision"] == "–"
    assert facts(TASKS["sst"], examples("sst", [0], [0]))["mistakes off by one"] == "no mistakes"
    found = facts(TASKS["sts"], examples("sts", [1.0, 1.0], [2.0, 0.5]))
    assert found == {"mean absolute error": "0.75", "mean error": "−0.25", "over-scored": "50%"}


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300), st.integers(1, 40))
def test_thinning_keeps_order_and_means(values, limit):
    points = [(float(x), y) for x, y in enumerate(values)]
    found = thinned(points, limit)
    assert len(found) == min(limit, len(points))
    assert [x for x, _ in found] == sorted({x for x, _ in found})
    assert thinned(points, len(points)) == points
    assert thinned(points, 1)[0] == pytest.approx(np.mean(points, axis=0), abs=1e-6)
    steps = thinned([(x, 2 * x) for x, _ in points], limit)
    assert all(y == pytest.approx(2 * x) for x, y in steps)


def test_records_become_curves_grids_and_phases():
    records = [
        {"step": 1, "loss": {"sst": 2.0}, "cosine": {"sst/qqp": -1.0}, "seconds": {"forward": 1.0, "backward": 3.0}},
        {"step": 2, "loss": {"sst": None}, "cosine": {"sst/qqp": None}, "seconds": {"forward": 1.0}},
        {"step": 3, "loss": {"sst": 1.0, "qqp": 4.0}, "cosine": {"sst/qqp": 0.5}, "smart_share": 0.1},
    ]
    assert curves(records, "loss") == {"sst": [(1, 2), (3, 1)], "qqp": [(3, 4)]}
    assert curves(records, "smart_share") == {"smart_share": [(3, 0.1)]}
    assert curves(records, "bregman") == {}
    found = grid(records, "cosine")
    assert (found.names, found.spans, found.largest) == (["sst/qqp"], [(1, 1), (2, 2), (3, 3)], 1)
    assert found.values == [[-1.0, None, 0.5]]
    assert grid(records, "cosine", columns=1).values == [[-0.25]]
    assert grid(records, "magnitude_similarity").names == []
    assert {(phase.name, phase.seconds, phase.share) for phase in phases(records)} == {
        ("forward", 1.0, 0.4),
        ("backward", 1.5, 0.6),
    }
    assert phases([]) == []


def test_the_epochs_are_those_that_were_scored(run):
    found = epochs(run.records())
    assert [epoch.epoch for epoch in found] == [1, 2]
    best = found[run.summary()["best_epoch"] - 1]
    assert best.overall == run.summary()["dev"]["overall"]
    assert best.scores["sts"] == run.summary()["dev"]["sts"]["pearson"]
    assert set(best.conflict_rate) == {"sst/qqp", "sst/sts", "qqp/sts"}


def test_options_that_differ_from_the_defaults_come_first():
    config = TrainConfig()
    config = config.replace(lr=0.1, batch_size=7, smart=replace(config.smart, steps=3), out="somewhere")
    found = options(config)
    assert {(each.name, each.value, each.default) for each in found[:2]} == {
        ("--batch-size", 7, 32),
        ("--smart.steps", 3, config.smart.steps - 2),
    }
    assert (found[2].name, found[2].settled) == ("--lr", True)
    assert not [each for each in found[3:] if each.changed or each.settled]
    assert not {"--out", "--resume"} & {each.name for each in found}
    assert not [each for each in options(TrainConfig()) if each.changed or each.settled]


# Several runs ------------------------------------------------------------------------------------------------------


def test_a_comparison_has_published_figures_beside_ours(run, tmp_path):
    rows = [
        Row("Baseline <s>", {"sst": 0.511, "qqp": 0.75, "test": 0.3}, run, "one <em>seed</em>"),
        Row("SMART Loss w/ GSE", {"sst": None, "qqp": None}),
    ]
    page = Page(write_comparison(tmp_path / "table.html", "Paper <004>", rows))
    for words in ("Paper <004>", "Baseline <s>", "one <em>seed</em>", "SMART Loss w/ GSE", "0.511", "0.750", "test"):
        assert words in page.text
    for value in our_scores(run).values():
        assert f"{value:.3f}".replace("-", "−") in page.text
    (link,) = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert ".." in link
    assert {page.count("em"), page.count("s")} == {0}
    assert page.count("details") == 1
    assert not re.search(r"url\(|@import|https?:", page.source)


def test_the_columns_of_a_comparison():
    rows = [Row("one", {"overall": 0.6, "sst test": 0.5, "sst": 0.4}), Row("other", {"sst": 0.6}), Row("third")]
    found = columns(rows, [{}, {"sst": 0.8, "sts": 0.1}, {}])
    assert list(found) == ["sst", "sts", "overall", "sst test"]
    one, other, third = found["sst"]
    assert (one.published_at, other.published_at, other.ours_at) == pytest.approx((0, 0.5, 1))
    assert other.difference == pytest.approx(0.2)
    assert one.difference is None
    assert (one.best_published, other.best_published, other.best_ours, third.best_ours) == (False, True, True, False)
    assert (third.published, third.ours) == (None, None)


def test_every_metric_of_the_task_table_has_an_analysis():
    assert {task.metric for task in TASKS.values()} <= set(METRICS) == {"accuracy", "pearson"}


def test_the_details_are_written_for_reading_by_line(run):
    lines = (run.path / "predictions" / "para-dev.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert list(first) == ["id", "predicted", "tokens", "label", "probabilities"]
