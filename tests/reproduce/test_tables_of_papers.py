"""The sweep that trains a paper's rows beside the published figures, and the table that it keeps."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from course import write_further_data
from groups import SWEEP_OPTIONS

from minbert import reproduce
from minbert.errors import UserError
from minbert.recipes import paper, papers
from minbert.report import paper_table
from minbert.runs.run_directory import Run


@pytest.mark.parametrize("number", papers())
def test_a_papers_table_runs_end_to_end(number, sweep, in_process, tmp_path):
    files = [f"--{name}={path}" for name, path in write_further_data(tmp_path).items()]
    with patch("minbert.training.training_run.write_report"):  # tests/report writes them
        assert sweep(number, *files, "--steps=2") == 0
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(found) == list(paper(number).rows)
    for name, row in paper(number).rows.items():
        tasks = {f"dev {task}" for task in row.options.get("tasks", ["sst", "qqp", "sts"])}
        assert tasks <= set(found[name]["ours"])
        assert all(math.isfinite(score) for scores in found[name]["ours"].values() for score in scores)
    text = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {row.title} |" in text for row in paper(number).rows.values())


def test_a_sweep_shows_the_published_figures_beside_ours(sweep, in_process, tmp_path, capsys):
    assert sweep("000", "--rows=finetune,pcgrad", "--seeds=0,1") == 0
    shown = capsys.readouterr().out
    assert "Baseline" in shown
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.startswith("# SMART Surgery")
    assert "| published / ours | dev sst | dev qqp | dev sts | dev overall |" in text
    assert "| PCGRAD finetune | 0.500 / 0." in text
    found = json.loads((tmp_path / "out" / "table.json").read_text())["pcgrad"]
    assert found["published"] == {"dev sst": 0.5, "dev qqp": 0.76, "dev sts": 0.352}
    assert len(found["ours"]["dev overall"]) == 2
    assert "SMART Surgery" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_done_is_not_done_again_and_what_was_stopped_goes_on(sweep, in_process, tmp_path):
    assert sweep("000", "--rows=finetune") == 0
    summary = tmp_path / "out" / "finetune" / "seed-0" / "summary.json"
    assert sweep("000", "--rows=finetune") == 0
    assert len(in_process) == 1
    summary.unlink()
    assert sweep("000", "--rows=finetune") == 0
    assert "--resume" in in_process[1]
    assert summary.exists()


def test_checkpoints_of_finished_runs_are_deleted_on_demand(sweep, in_process, tmp_path):
    run = Run(tmp_path / "out" / "finetune" / "seed-0")
    assert sweep("000", "--rows=finetune") == 0
    assert run.best.exists()
    assert run.last.exists()
    assert sweep("000", "--rows=finetune", "--delete-checkpoints") == 0  # of one that had finished
    assert not run.has_checkpoint
    assert run.scores() == run.summary()["dev"]
    assert sweep("000", "--rows=finetune") == 0
    assert len(in_process) == 1
    assert sweep("000", "--rows=finetune", "--steps=2", "--delete-checkpoints") == 0  # begins anew
    assert (len(in_process), run.summary()["steps"], run.has_checkpoint) == (2, 2, False)
    (recorded,) = json.loads((tmp_path / "out" / "table.json").read_text())["finetune"]["runs"]
    assert recorded["steps"] == 2


def test_another_run_in_the_place_is_not_taken_for_this_one(sweep, in_process, course_data, tmp_path):
    run, table = tmp_path / "out" / "finetune" / "seed-0", tmp_path / "out" / "table.md"
    assert sweep("000", "--rows=finetune") == 0
    (tmp_path / "other.yaml").write_text(SWEEP_OPTIONS + "lr: 0.125\n")
    moved = shutil.copytree(course_data, tmp_path / "moved")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for option, said in (
        (f"--model={tmp_path}", f"--model (was None, is {tmp_path})"),
        (f"--data={moved}", f"--data (was {course_data}, is {moved})"),
        (f"--options={tmp_path / 'other.yaml'}", "--lr (was 1e-05, is 0.125)"),
        ("--options=/nowhere", "/nowhere"),
    ):
        assert sweep("000", "--rows=finetune", option) == 1
        assert said in table.read_text()
        assert "| Baseline finetune | 0.511 / – |" in table.read_text()
    assert len(in_process) == 1
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_the_table_outlives_the_directories_and_keeps_the_rows_of_other_calls(sweep, in_process, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "kept" / "000.json"
    assert sweep("000", "--rows=finetune", f"--table={file}") == 0
    before = json.loads(file.read_text())["finetune"]
    shutil.rmtree(out)
    assert sweep("000", "--rows=finetune,pcgrad", f"--table={file}") == 0
    assert f"{file} has its scores" in capsys.readouterr().out
    assert [Path(out).name for out in sorted((out).glob("*/seed-*"))] == ["seed-0"]
    assert len(in_process) == 2
    assert sweep("000", "--rows=pcgrad", "--seeds=1", f"--table={file}") == 0
    found = json.loads(file.read_text())
    assert found["finetune"] == before
    assert [run["seed"] for run in found["pcgrad"]["runs"]] == [0, 1]
    assert "| Baseline finetune | 0.511 / 0." in (out / "table.md").read_text()
    assert "Baseline finetune" in (out / "report.html").read_text()


def test_what_a_run_came_to_is_recorded(sweep, in_process, tmp_path):
    assert sweep("000", "--rows=pcgrad", f"--out={tmp_path / 'pcgrad'}") == 0
    (run,) = json.loads((tmp_path / "pcgrad" / "table.json").read_text())["pcgrad"]["runs"]
    (rates,) = [epoch.conflict_rate for epoch in Run(tmp_path / "pcgrad" / "pcgrad" / "seed-0").epochs()]
    assert run["conflict_rate"] == pytest.approx(sum(rates.values()) / 3)
    assert sweep("003", "--rows=sst") == 0
    (run,) = json.loads((tmp_path / "out" / "table.json").read_text())["sst"]["runs"]
    summary = Run(tmp_path / "out" / "sst" / "seed-0").summary()
    assert run["scores"] == {"dev sst": summary["dev"]["sst"]["accuracy"]}  # the overall is that of its one task
    assert (run["steps"], run["examples"]) == (1, 64)
    assert run["step_seconds"] > 0
    assert run["processor"] == summary["processor"]
    assert run["commit"] == summary["versions"].get("commit")
    assert run["options"]["lr"] == 1e-5
    assert run["options"]["data"] == "course0"
    assert not {"out", "seed", "threads"} & set(run["options"])


def test_a_recorded_run_with_other_options_is_kept_and_not_taken_for_this_one(sweep, in_process, tmp_path):
    out = tmp_path / "out"
    assert sweep("000", "--rows=finetune") == 0
    before = json.loads((out / "table.json").read_text())["finetune"]["runs"]
    shutil.rmtree(out / "finetune")
    assert sweep("000", "--rows=finetune", "--steps=2") == 1
    said = f"{out / 'table.json'} holds a run with other options: --steps (was 1, is 2); give another --table"
    assert said in (out / "table.md").read_text()
    assert "| Baseline finetune | 0.511 / – |" in (out / "table.md").read_text()
    assert json.loads((out / "table.json").read_text())["finetune"]["runs"] == before
    assert len(in_process) == 1
    assert sweep("000", "--rows=pcgrad") == 0  # which says nothing of the other row, and keeps what was said
    assert said in (out / "table.md").read_text()
    assert sweep("000", "--rows=finetune") == 0
    assert "- Baseline" not in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read .*table.json"),
        ('{"finetune": 1}', "table.json is damaged .finetune: expected a mapping, got 1.; restore it"),
        ('{"finetune": {"runs": [{"seed": 0}]}}', "table.json is damaged .finetune: runs: no scores.; restore it"),
        ('{"finetune": {"failures": ["no"]}}', "finetune: expected failures of the form 'seed N: why', got 'no'"),
        ('{"gse": {}}', "table.json is damaged .paper 000 has no row 'gse'"),
    ],
)
def test_a_damaged_table_is_one_line(content, message, sweep, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.json").write_text(content)
    with pytest.raises(UserError, match=message):
        sweep("000", "--rows=finetune")
    assert (tmp_path / "out" / "table.json").read_text() == content


def test_a_table_of_an_earlier_minbert_is_read(sweep, in_process, tmp_path):
    assert sweep("000", "--rows=finetune") == 0
    file = tmp_path / "out" / "table.json"
    rows = json.loads(file.read_text())
    for row in rows.values():
        del row["runs"]
    file.write_text(json.dumps(rows))
    assert sweep("000", "--rows=finetune") == 0
    assert len(in_process) == 1
    assert len(json.loads(file.read_text())["finetune"]["runs"]) == 1


def test_a_run_that_is_to_be_longer_is_extended_and_a_longer_one_is_kept(sweep, in_process, tmp_path):
    run = Run(tmp_path / "out" / "finetune" / "seed-0")
    assert sweep("000", "--rows=finetune") == 0
    assert sweep("000", "--rows=finetune", "--steps=3") == 0
    assert (len(in_process), run.summary()["steps"]) == (2, 3)
    assert sweep("000", "--rows=finetune", "--steps=3") == 0
    assert len(in_process) == 2
    assert sweep("000", "--rows=finetune", "--steps=2") == 1
    assert f"{run.path} has taken 3 steps, more than the 2 asked for" in (tmp_path / "out" / "table.md").read_text()
    assert run.summary()["steps"] == 3


def test_results_that_cannot_be_written_are_one_line(sweep, in_process, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out cannot be written .*; choose another --out"):
        sweep("000", f"--out={tmp_path / 'file' / 'out'}")
    with pytest.raises(UserError, match=r"file cannot be written .*; choose another --table"):
        sweep("000", f"--table={tmp_path / 'file' / 'table.json'}")
    assert in_process == []
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        patch.object(paper_table, "write_atomically", side_effect=full),
        pytest.raises(UserError, match="no room left"),
    ):
        sweep("001", "--rows=auxiliary-0.3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["007"], r"unknown paper '007' \(did you mean '00\d'\?\); known: 000, 001, 002, 003, 004"),
        (["000", "--rows=pcgrda"], r"paper 000 has no row 'pcgrda' \(did you mean 'pcgrad'\?\); rows: single"),
        (["000", "--protocol=smal"], r"unknown protocol 'smal' \(did you mean 'small'\?\); known: small"),
        (["000", "--jobs=0"], "--jobs must be at least 1, got 0"),
        (["000", "--seed=1"], r"unknown option --seed \(did you mean '--seeds'\?\)"),
    ],
)
def test_bad_input_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        reproduce.main(words)


def test_folds_are_refused_for_a_table(tmp_path):
    (tmp_path / "options.yaml").write_text("folds: 3\n")
    with pytest.raises(UserError, match="folds makes several runs of a row; leave it out"):
        reproduce.main(["000", f"--options={tmp_path / 'options.yaml'}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
