"""The report of a run: what a user's file holds is text in it, and it needs nothing else."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from pages import HOSTILE, SMALL, Page

from minbert import train
from minbert.errors import UserError
from minbert.report import __main__ as report
from minbert.report import write_report
from minbert.runs.predictions import PredictedExample
from minbert.runs.run_directory import Run


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
    copy.metrics.path.write_text("".join(line + "\n" for line in copy.metrics.path.read_text().splitlines()[:3]))
    page = Page(write_report(copy))
    assert "has not finished" in page.text
    assert "minbert evaluate" in page.text
    copy.metrics.path.unlink()
    assert "has not finished" in Page(write_report(copy)).text


@pytest.mark.parametrize("options", [["--recipe=plain"], ["--bregman.mu=1"], ["--tasks=sts"], ["--low-memory"]])
def test_every_kind_of_run_has_one(data, tmp_path, options):
    assert (
        train.main(
            [f"--data={data}", f"--out={tmp_path / 'run'}", "--recipe=smart-pcgrad", "--steps=2", *SMALL, *options]
        )
        == 0
    )
    page = Page(tmp_path / "run" / "report.html")
    several = options != ["--tasks=sts"]
    assert ("Gradient surgery" in page.text) == (several and options != ["--recipe=plain"])
    assert ("SMART's share" in page.text) == (options != ["--recipe=plain"])
    assert ("Bregman divergence" in page.text) == (options == ["--bregman.mu=1"])


def test_a_large_split_stays_small(copy, monkeypatch):
    text = "what is the way in which such a question of quite some length is asked by one and by another ? "
    many = [PredictedExample(f"{i}", float(i % 2), 60, float((i + 1) % 2), [0.5, 0.5]) for i in range(10_000)]
    monkeypatch.setattr(Run, "predictions", lambda self, task, split: many)
    pairs = [text * 10] * len(many)

    class Source:
        name = "many"

        def load(self, task, split):
            from minbert.data import Examples

            return Examples([each.id for each in many], pairs, pairs if task.is_pair else None, None)

    monkeypatch.setattr(Run, "source", lambda self, config, data=None, tasks_file=None: Source())
    assert write_report(copy).stat().st_size < 2_000_000


def test_bad_input_is_one_line(copy, tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="did you mean '--data'"):
        report.main([str(copy.path), "--dta=x"])
    (copy.path / "predictions" / "sst-dev.jsonl").write_text('{"id"')
    with pytest.raises(UserError, match=r"sst-dev\.jsonl is damaged \(line 1: .*minbert evaluate"):
        report.main([str(copy.path)])
    (copy.path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*summary\.json \(.*--resume of the run writes it again"):
        report.main([str(copy.path)])


def test_the_details_are_written_for_reading_by_line(run):
    lines = (run.path / "predictions" / "para-dev.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert list(first) == ["id", "predicted", "tokens", "label", "probabilities"]
