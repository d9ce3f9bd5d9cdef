"""A run directory that a release wrote is evaluated, reported, predicted with and resumed by today's code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minbert import evaluate, predict, train
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.files.atomic import MANIFEST, sha256
from minbert.files.schema_checks import FORMAT
from minbert.kernels.reference import random_numbers
from minbert.report import __main__ as report
from minbert.runs.progress_counters import load_progress
from minbert.runs.run_directory import Run

RELEASES = sorted(path for path in (Path(__file__).parent / "fixtures").glob("run-*"))
OPTIONS = ["--data=data", "--model=model", "--tasks=sst,sts", "--out=run", "--batch-size=4", "--epochs=2", "--lr=0.01"]
OPTIONS += ["--precision=fp32", "--log-steps=1", "--checkpoint-steps=1", "--threads=1"]


@pytest.fixture(params=RELEASES, ids=lambda path: path.name)
def run(request, tmp_path, monkeypatch) -> Run:
    """A copy of a release's run, in the working directory."""
    shutil.copytree(request.param, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Run("run")


def change(path: Path, **values: object) -> None:
    """Change values of a JSON file, and its checksum in the manifest beside it."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    manifest = path.with_name(MANIFEST)
    if manifest.exists():
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), path.name: sha256(path)}))


def test_there_is_a_run_of_each_release():
    assert [path.name for path in RELEASES] == ["run-0.1.0"]


def test_it_is_evaluated_reported_and_predicted_with(run, capsys):
    summary = run.summary()
    found = run.predictions(TrainConfig(tasks=["sts"]).chosen_tasks(["sts"])[0], "dev")
    assert evaluate.main(["run"]) == 0
    shown = capsys.readouterr().out
    assert "data: data, which run/config.yaml names" in shown
    assert f"{summary['dev']['sts']['pearson']:.3f}" in shown
    again = run.predictions(TrainConfig(tasks=["sts"]).chosen_tasks(["sts"])[0], "dev")
    assert [each.predicted for each in again] == pytest.approx([each.predicted for each in found], abs=1e-4)
    assert predict.main(["run", "--task=sts", "--input=data/sts-dev.csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert report.main(["run"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "run/report.html\n"
    assert "data: data, which run/config.yaml names" in captured.err
    assert "the meal was good" in (run.path / "report.html").read_text()


def test_it_is_resumed_and_ends_where_it_did(run, capsys, monkeypatch):
    monkeypatch.setattr(random_numbers, "PHILOX_ROUNDS", 10)  # as in 0.1.0, for its dropout masks
    expected, scores = load_file("run/best/model.safetensors"), run.summary()["dev"]
    assert load_progress(run.last).step == 3
    assert train.main([*OPTIONS, "--resume", "--backend=reference"]) == 0
    assert "resuming run after step 3" in capsys.readouterr().out
    for name, tensor in load_file("run/last/model.safetensors").items():
        assert (tensor - expected[name]).abs().max() < 1e-4, name
    assert run.summary()["dev"]["sts"]["pearson"] == pytest.approx(scores["sts"]["pearson"], abs=1e-3)
    assert [record["step"] for record in run.metrics.records()] == [1, 2, 2, 3, 4, 4]


def test_what_is_written_today_says_its_format(run):
    assert train.main([*OPTIONS, "--resume"]) == 0
    for name in ("summary.json", "last/progress.json", "best/progress.json"):
        assert json.loads((run.path / name).read_text())["format"] == FORMAT
    assert run.path.joinpath("config.yaml").read_text().startswith(f"format: {FORMAT}\n")


def test_a_later_format_is_refused_with_both_versions(run):
    both = rf"has format {FORMAT + 1}, and this minbert reads formats up to {FORMAT}; use a later minbert"
    change(run.last / "progress.json", format=FORMAT + 1)
    with pytest.raises(UserError, match=f"progress.json {both}"):
        train.main([*OPTIONS, "--resume"])
    change(run.path / "summary.json", format=FORMAT + 1)
    with pytest.raises(UserError, match=f"summary.json {both}"):
        report.main(["run"])
    config = run.path / "config.yaml"
    config.write_text(f"format: {FORMAT + 1}\n{config.read_text()}")
    with pytest.raises(UserError, match=f"config.yaml {both}"):
        evaluate.main(["run"])


def test_an_unknown_key_is_named(run):
    change(run.last / "progress.json", epoch=3)
    with pytest.raises(UserError, match=r"progress\.json: unknown 'epoch'"):
        train.main([*OPTIONS, "--resume"])
    config = run.path / "config.yaml"
    config.write_text(f"surgerry: sum\n{config.read_text()}")
    with pytest.raises(UserError, match=r"config\.yaml: unknown 'surgerry' \(did you mean 'surgery'\?\)"):
        report.main(["run"])


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe{}\n", b'{"step": 2}\n', b'{"step": "x", "epoch": 1}\n', b"[" * 9999 + b"\n"]
)
def test_damaged_lines_of_metrics_are_refused_by_report_and_dropped_by_resume(run, damage, capsys):
    lines = run.metrics.path.read_bytes().splitlines(keepends=True)
    run.metrics.path.write_bytes(b"".join([*lines[:2], damage, *lines[2:]]))
    with pytest.raises(
        UserError, match=r"metrics\.jsonl, line 3: .*; 1 such; --resume of the run drops them"
    ) as caught:
        report.main(["run"])
    assert "\n" not in str(caught.value)
    assert train.main([*OPTIONS, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"warning: 1 damaged lines of run/metrics\.jsonl are dropped; run/metrics\.jsonl, line 3: ", shown)
    assert [record["step"] for record in run.metrics.records()] == [1, 2, 2, 3, 4, 4]


def test_a_line_that_a_crash_cut_short_is_left_out(run):
    whole = len(run.metrics.records())
    run.metrics.path.write_bytes(run.metrics.path.read_bytes()[:-5])
    assert len(run.metrics.records()) == whole - 1
