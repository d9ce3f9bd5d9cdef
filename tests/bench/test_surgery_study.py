"""bench/surgery_study.py: its runs, what it makes of their scores, its record, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import scores_of_runs
import surgery_study
from groups import quick_options
from results import result
from scores_of_runs import Row, read_table
from surgery_study import SURGERIES, draw, main, table
from training_runs import directories

from minbert.errors import UserError
from minbert.runs.run_directory import Run


def test_differences_are_taken_seed_by_seed():
    first = Row("sum", [result(0, 0.5, step_seconds=0.6), result(1, 0.7, step_seconds=0.61)])
    row = Row("pcgrad", [result(0, 0.52, rate=0.25), result(1, 0.71, rate=0.75, machine="Another")])
    assert row.record(first)["less_first"] == pytest.approx(0.015)
    assert row.record(first)["overall_deviation"] == pytest.approx(0.134350, abs=1e-6)
    assert row.record(first)["seconds"] == 50
    lines = table([first, row]).splitlines()
    assert lines[0] == "| surgery | sst | sts | overall | less sum | seconds | conflicts | projected |"
    deviation = "0.6000 ± 0.1414"
    assert lines[2] == f"| sum | {deviation} | 0.8000 ± 0.0000 | {deviation} |  | 60 | - | - |"
    assert "| +0.0150 ± 0.0071 | 50 | 0.50 | 0.50 |" in lines[3]
    assert lines[-5:-2] == ["", "Of 2 seeds, 100 steps each.", ""]
    device = "CPU (x86_64), 1 thread, fp32, torch 2.13.0+cpu; commit 779aba2"
    assert lines[-2:] == [f"- Another; {device}: seed 1", f"- Some processor; {device}: seeds 0, 1"]
    assert "± " not in table([Row("sum", first.runs[:1])])


@pytest.mark.slow
def test_runs_are_trained_once_and_recorded(course_data, tmp_path):
    own = quick_options(course_data, tmp_path)
    rest = [option for option in own if option.split("=")[0] not in ("--data", "--out", "--epochs")]
    given = ["--data", course_data, "--surgeries", "sum", "cagrad(c=0.5) --clip-norm=2", "--seeds", "3"]
    command = [*given, "--runs", tmp_path / "runs", "--results", tmp_path / "results", "--", *rest]
    assert main([*map(str, command)]) == 0
    (path,) = (tmp_path / "results").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == ["sum", "cagrad(c=0.5) --clip-norm=2"]
    directories = ("sum", "cagrad-c=0.5-clip-norm=2")
    runs = [Run(tmp_path / "runs" / name / "seed-3") for name in directories]
    assert [run.config().clip_norm for run in runs] == [1, 2]
    for run, found in zip(runs, [found for row in rows for found in row["runs"]], strict=True):
        records = run.metrics.records()
        (scored,) = [record for record in records if "dev" in record]
        assert (found["scores"]["dev overall"], found["steps"]) == (scored["dev"]["overall"], run.summary()["steps"])
        assert found["scores"]["dev sst"] == scored["dev"]["sst"]["accuracy"]
        steps = sorted(sum(record["seconds"].values()) for record in records if "seconds" in record)
        assert found["step_seconds"] == pytest.approx(statistics.median(steps))  # every step is logged
        cosines = [cosine for record in records for cosine in record.get("cosine", {}).values()]
        if cosines:
            assert found["conflict_rate"] == pytest.approx(sum(cosine < 0 for cosine in cosines) / len(cosines))
    assert rows[0]["runs"][0]["conflict_rate"] is None
    text = path.with_suffix(".md").read_text()
    assert "`python bench/surgery_study.py --data DIR --surgeries sum 'cagrad(c=0.5)" in text
    assert "| cagrad(c=0.5) --clip-norm=2 |" in text

    before = [run.metrics.path.stat().st_mtime_ns for run in runs]
    path.unlink()
    assert main([*map(str, command)]) == 0
    assert [run.metrics.path.stat().st_mtime_ns for run in runs] == before

    kept = tmp_path / "kept.json"
    (tmp_path / "runs" / "table.json").rename(kept)
    shutil.rmtree(tmp_path / "runs")
    with_table = [*map(str, command[:2]), "--table", str(kept), *map(str, command[2:])]
    assert main(with_table) == 0
    assert not [*(tmp_path / "runs").rglob("metrics.jsonl")]
    (*_, again) = sorted((tmp_path / "results").glob("*.json"))
    assert json.loads(again.read_text())["rows"] == rows
    with pytest.raises(UserError, match=r"kept.json holds a run with other options: --clip-norm \(was 1.0, is 3.0\)"):
        main([*with_table, "--clip-norm=3"])


def test_a_picture_has_a_line_for_each_surgery_from_the_best_down(tmp_path):
    rows = [Row("sum", [result(0, 0.5), result(1, 0.7)]), Row("pcgrad", [result(0, 0.52), result(1, 0.71)])]
    draw(tmp_path / "scores.svg", rows)
    shown = (tmp_path / "scores.svg").read_text()
    labels = re.findall("<!-- (.*?) -->", shown)
    assert labels.index("pcgrad") < labels.index("sum")
    assert {"seed 0", "seed 1"} <= {*labels}
    with pytest.raises(UserError, match="cannot be written"):
        draw(tmp_path / "nowhere" / "scores.png", rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--surgeries", "cagard"], "--surgery cagard: unknown (did you mean 'cagrad'?)"),
        (["--surgeries", "sum", "sum"], "--surgeries must be a list without repetitions, got sum,sum"),
        (["--surgeries", "cagrad(c=1)", "cagrad[c=1]"], "no two have one directory"),
        (["--surgeries", "sum --lrate=1"], "unknown option --lrate"),
        (["--seeds", "0,one"], "argument --seeds: invalid list of int value: '0,one'"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--jobs", "0"], "argument --jobs: must be at least 1, got 0"),
        (["--plot", "scores.jpg"], "argument --plot: must end in .png or .svg, got 'scores.jpg'"),
        (["--speed"], "unrecognized arguments: --speed; --help lists the options"),
        (["--", "--surgery", "sum"], "--surgery after --: this script gives it to every run"),
    ],
)
def test_bad_input_is_refused_before_the_first_run(arguments, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        main(["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_the_docs_show_the_recorded_runs():
    docs = Path(__file__).parents[2] / "docs"
    text = (docs / "surgery.md").read_text()
    shown = text.partition("## On the course's data")[2].partition("\n## ")[0]
    names = re.findall(r"^\| (\w.*?) \|", shown, re.MULTILINE)[1:]
    lists = re.findall(r": seeds? ([\d, ]+)$", shown, re.MULTILINE)  # one for each machine and commit
    seeds = sorted({int(seed) for listed in lists for seed in listed.split(", ")})
    recorded, places = read_table(docs / "studies" / "surgery.json"), directories(names, "surgeries")
    rows = [Row(name, [recorded[places[name]][seed] for seed in seeds]) for name in names]
    assert {*SURGERIES} <= {*names}
    assert table(rows) in shown


@pytest.mark.parametrize("option", ["--runs", "--results", "--table", "--plot"])
def test_where_nothing_can_be_written_is_said_before_the_first_run(option, monkeypatch, tmp_path):
    monkeypatch.setattr(scores_of_runs, "finish_runs", lambda *arguments, **rest: pytest.fail("a run has begun"))
    (tmp_path / "file").touch()
    place = tmp_path / "file" / {"--table": "table.json", "--plot": "scores.png"}.get(option, "")
    given = {"--runs": tmp_path / "runs", "--results": tmp_path / "results", option: place}
    with pytest.raises(UserError, match=rf"{tmp_path}/file cannot be written .*; choose another {option}"):
        main([str(word) for pair in given.items() for word in pair])


@pytest.mark.parametrize("more", [[], ["--surgeries", "all", "pcgrad --surgery-scope=layer"]], ids=["default", "named"])
def test_all_surgeries_are_studied(more, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(surgery_study, "check", lambda lines, options: seen.extend(lines))
    monkeypatch.setattr(
        scores_of_runs, "finish_runs", lambda *arguments, **rest: (_ for _ in ()).throw(UserError("enough"))
    )
    with pytest.raises(UserError, match="enough"):
        main(["--seeds", "0", "--runs", str(tmp_path), *more])
    named = [option.removeprefix("--surgery=") for line in seen for option in line if "--surgery=" in option]
    assert "dwa(every=20)" in named
    assert named[:5] == ["sum", "mean", "pcgrad", "gse", "upgrad"]
    assert {"famo", "geometric-mean"} <= {*named}
    assert "constant" not in named
    assert named.count("pcgrad") == 1 + bool(more)
