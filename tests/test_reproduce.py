"""The papers' rows as recipes, and the sweep that trains them beside the published figures."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from course import write_further_data

from minbert import reproduce, train
from minbert.cli import parse_layers
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.recipes import paper, papers, protocol
from minbert.report import paper_table
from minbert.reproduce import FILES, ReproduceConfig, train_options
from minbert.runs.run_directory import Run
from minbert.tasks import TASKS
from minbert.training import child_process as separate_process

ROWS = [(number, name) for number in papers() for name in paper(number).rows]
SMALL = """
checkpoint_steps: 1
precision: fp32
scratch: {hidden_size: 16, num_attention_heads: 2, intermediate_size: 32, num_hidden_layers: 1}
"""


class FakeProcess:
    """A process of one run: its code, and what it prints to standard error."""

    stdout = None

    def __init__(self, end, stderr, send_signal=None):
        self.wait, self.stderr, self.send_signal = end, stderr, send_signal


@pytest.fixture
def sweep(course_data, tmp_path):
    """`sweep(PAPER, options)`: the exit code of a sweep of one-step runs of a very small encoder."""
    (tmp_path / "small.yaml").write_text(SMALL)
    shared = [f"--data={course_data}", f"--options={tmp_path / 'small.yaml'}", f"--out={tmp_path / 'out'}"]
    return lambda number, *options: reproduce.main([number, *shared, "--steps=1", *options])


@pytest.fixture
def in_process(monkeypatch):
    """The command lines of the runs that a sweep starts; they run in this process."""
    calls = []

    def start(words, **rest):
        calls.append(words[3:])
        try:
            code, said = train.main(words[3:]), []
        except UserError as error:
            code, said = 2, [f"error: {error}\n"]
        return FakeProcess(lambda: code, said)

    monkeypatch.setattr(separate_process, "subprocess", SimpleNamespace(Popen=start, PIPE=None))
    return calls


def test_the_papers_tables_are_whole():
    assert {number: len(paper(number).rows) for number in papers()} == {
        "000": 10,
        "001": 10,
        "002": 16,
        "003": 21,
        "004": 13,
    }


@pytest.mark.parametrize(("number", "name"), ROWS)
def test_every_row_is_a_recipe_with_the_papers_figures(number, name):
    row = paper(number).rows[name]
    parse_layers("train", TrainConfig, [f"--recipe={number}/{name}"])
    for split, scores in row.published.items():
        assert split in ("dev", "test")
        assert set(scores) <= {*TASKS, "overall"}
        assert all(0 < score < 1 for score in scores.values())


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


@pytest.fixture
def real(tmp_path):
    """Options that name real data, with splits of 16 rows to evaluate, and a real encoder."""
    if not (os.environ.get("MINBERT_TEST_DATA") and os.environ.get("MINBERT_TEST_MODEL")):
        pytest.skip("needs MINBERT_TEST_DATA and MINBERT_TEST_MODEL")
    directory = tmp_path / "data"
    directory.mkdir()
    for path in Path(os.environ["MINBERT_TEST_DATA"]).glob("*.csv"):
        if "train" in path.name:
            (directory / path.name).symlink_to(path.resolve())
        else:
            (directory / path.name).write_text("".join(path.read_text().splitlines(keepends=True)[:17]))
    return [f"--data={directory}", f"--model={os.environ['MINBERT_TEST_MODEL']}", "--precision=fp32"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", ["000/smart-pcgrad-sts-aug", "001/surgery-auxiliary-2", "002/f-finetune", "003/6", "004/smart-gse"]
)
def test_a_row_of_each_paper_trains_a_real_encoder_on_real_data(row, real, tmp_path):
    files = write_further_data(tmp_path)
    needs = [f"--{FILES[need]}={files[need]}" for need in paper(row[:3]).rows[row[4:]].needs]
    with patch("minbert.training.training_run.write_report"):
        assert train.main([f"--recipe={row}", *real, *needs, "--steps=1", f"--out={tmp_path / 'run'}"]) == 0
    (epoch,) = Run(tmp_path / "run").epochs()
    assert all(math.isfinite(score) for score in (*epoch.scores.values(), epoch.overall))


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


def test_another_run_in_the_place_is_not_taken_for_this_one(sweep, in_process, course_data, tmp_path):
    run, table = tmp_path / "out" / "finetune" / "seed-0", tmp_path / "out" / "table.md"
    assert sweep("000", "--rows=finetune") == 0
    (tmp_path / "other.yaml").write_text(SMALL + "lr: 0.125\n")
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


def test_a_protocol_gives_every_row_as_many_examples(course_data, tmp_path):
    small = protocol("small")
    for number, name in ROWS:
        row = paper(number).rows[name]
        options = small.options(row)
        sizes = options["batch_size"]
        of_tasks = [sizes[task] for task in ("sst", "qqp", "sts")] if isinstance(sizes, dict) else 3 * [sizes]
        assert sum(of_tasks) == 96, (number, name)
        assert options["epochs"] * options["epoch_length"] * 96 == 18_144
        parse_layers("train", TrainConfig, {"recipe": f"{number}/{name}", **options})
    proportions = small.options(paper("000").rows["finetune"])["batch_size"]
    assert proportions == {"sst": 8, "qqp": 80, "sts": 8}
    rates = {name: small.options(paper("002").rows[name])["lr"] for name in ("a-finetune", "c-finetune", "c-pretrain")}
    assert rates == dict(zip(rates, (small.rates[kind] for kind in ("joint", "in-turn", "frozen")), strict=True))


def test_a_protocol_stands_between_the_recipe_and_the_given_options(course_data, tmp_path):
    (tmp_path / "small.yaml").write_text("lr: 0.25\n")
    given = {"data": course_data, "protocol": "small", "options": str(tmp_path / "small.yaml"), "epochs": 1}
    words = train_options(ReproduceConfig("004", **given), paper("004").rows["smart"])
    config = parse_layers("train", TrainConfig, ["--recipe=004/smart", *words])
    assert (config.lr, config.epochs, config.epoch_length, config.batch_size) == (0.25, 1, 63, 32)
    assert (config.smart.lambda_s, config.sampling) == (5.0, "round-robin")


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


def test_a_sweep_that_is_stopped_stops_its_run(sweep, monkeypatch, capsys, tmp_path):
    """SIGTERM is passed on. SIGINT is not: the terminal sends it to the run as well."""
    passed_on = []

    def start(words, **rest):
        stopped = threading.Event()

        def end():
            os.kill(os.getpid(), number)
            assert stopped.wait(30) or number == signal.SIGINT
            return 128 + number

        def send_signal(number):
            passed_on.append(number)
            stopped.set()

        if number == signal.SIGINT:
            stopped.set()
        return FakeProcess(end, [], send_signal)

    monkeypatch.setattr(separate_process, "subprocess", SimpleNamespace(Popen=start, PIPE=None))
    said = f"stopped; the same command goes on with what {tmp_path / 'out'} holds"
    for number, sent in ((signal.SIGTERM, [signal.SIGTERM]), (signal.SIGINT, [])):
        assert sweep("000", "--rows=finetune,pcgrad") == 128 + number
        assert passed_on == sent
        assert capsys.readouterr().out.splitlines()[-1] == said
        passed_on.clear()


def test_what_a_run_writes_to_standard_error_is_shown(sweep, monkeypatch, capsys):
    said = ["warning: a row left out\n", "error: no such luck\n"]
    fake = SimpleNamespace(Popen=lambda words, **rest: FakeProcess(lambda: 2, said), PIPE=None)
    monkeypatch.setattr(separate_process, "subprocess", fake)
    assert sweep("000", "--rows=finetune") == 1
    shown = capsys.readouterr()
    assert shown.err == said[0]
    assert "000/finetune, seed 0: no such luck" in shown.out


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_row_that_fails_leaves_the_others_their_turn(jobs, sweep, tmp_path, capsys):
    (tmp_path / "out" / "finetune" / "seed-0").mkdir(parents=True)
    (tmp_path / "out" / "finetune" / "seed-0" / "config.yaml").write_text("{")
    assert sweep("000", "--rows=finetune,pcgrad", f"--jobs={jobs}") == 1
    assert "000/finetune, seed 0:" in capsys.readouterr().out
    text = (tmp_path / "out" / "table.md").read_text()
    assert "- Baseline finetune: seed 0:" in text
    assert "| PCGRAD finetune | 0.500 / 0." in text


def test_runs_at_once_are_those_of_one_after_the_other(sweep, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("torch.get_num_threads", lambda: 5)
    small = (tmp_path / "small.yaml").read_text()
    (tmp_path / "small.yaml").write_text(f"{small}steps: 3\nlog_steps: 1\n")
    tables = []
    for jobs in (1, 2):
        out = tmp_path / f"jobs-{jobs}"
        assert sweep("000", "--rows=finetune,pcgrad", "--seeds=0,1", f"--jobs={jobs}", f"--out={out}") == 0
        tables.append(json.loads((out / "table.json").read_text()))
        threads = {Run(path).config().threads for path in out.glob("*/seed-*")}
        assert threads == {None if jobs == 1 else 2}
    assert [[run["scores"] for run in row["runs"]] for row in tables[0].values()] == [
        [run["scores"] for run in row["runs"]] for row in tables[1].values()
    ]
    lines = capfd.readouterr().out.splitlines()
    lines = lines[next(number for number, line in enumerate(lines) if line.startswith("written: ")) + 1 :]
    names = [f"000/{row}, seed {seed}: " for row in ("finetune", "pcgrad") for seed in (0, 1)]
    ends = [next(at for at, line in enumerate(lines) if line.startswith(f"{name}report: ")) for name in names]
    second = next(at for at, line in enumerate(lines) if line.startswith("2 of 4: 000/finetune, seed 1 "))
    assert second < min(ends)  # it began before another one ended


@pytest.mark.slow
def test_sigterm_stops_all_runs_and_they_go_on(course_data, tmp_path):
    (tmp_path / "small.yaml").write_text(f"{SMALL}log_steps: 1\n")
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-m", "minbert.reproduce", "000", "--rows=finetune,pcgrad,smart", "--jobs=2"]
    command += [f"--data={course_data}", f"--options={tmp_path / 'small.yaml'}", f"--out={out}"]
    with log.open("w") as printed:
        sweep = subprocess.Popen([*command, "--steps=100000"], stdout=printed, stderr=printed)
        for _ in range(600):
            if len([*out.glob("*/seed-0/last")]) == 2 or sweep.poll() is not None:
                break
            time.sleep(0.1)
        sweep.terminate()
        assert sweep.wait(60) == 143, log.read_text()
    runs = [Run(out / row / "seed-0") for row in ("finetune", "pcgrad")]
    steps = [run.records()[-1]["step"] for run in runs]
    assert not (out / "smart" / "seed-0").exists()
    assert log.read_text().splitlines()[-1] == f"stopped; the same command goes on with what {out} holds"
    time.sleep(0.5)
    assert [run.records()[-1]["step"] for run in runs] == steps  # both processes have ended
    subprocess.run([*command, f"--steps={max(steps) + 5}", "--rows=finetune,pcgrad"], check=True)
    assert [run.summary()["steps"] for run in runs] == [max(steps) + 5] * 2


def test_a_row_says_which_file_it_needs(sweep, tmp_path):
    assert sweep("001", "--rows=auxiliary-0.3") == 1
    assert "needs a file: give --reviews FILE" in (tmp_path / "out" / "table.md").read_text()


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


def test_a_recipe_of_a_paper_is_named_whole():
    with pytest.raises(UserError, match=r"paper 000 has no row 'smrat' \(did you mean 'smart'\?\)"):
        parse_layers("train", TrainConfig, ["--recipe=000/smrat"])


def test_the_names_of_the_rows_can_be_listed(capsys):
    assert reproduce.main(["004", "--rows=list"]) == 0
    assert "smart-gse: SMART Loss w/ GSE" in capsys.readouterr().out


def test_folds_are_refused_for_a_table(tmp_path):
    (tmp_path / "options.yaml").write_text("folds: 3\n")
    with pytest.raises(UserError, match="folds makes several runs of a row; leave it out"):
        reproduce.main(["000", f"--options={tmp_path / 'options.yaml'}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
