"""The processes of a sweep: what they print, several at once, one that fails, and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from fake_process import FakeProcess
from groups import SWEEP_OPTIONS

from minbert.runs.run_directory import Run
from minbert.training import child_process


def test_a_sweep_that_is_stopped_stops_its_run(sweep, monkeypatch, capsys, tmp_path):
    """Either signal is passed on, also SIGINT, which a terminal sends to the run as well and a supervisor does not."""
    passed_on = []

    def start(words, **rest):
        stopped = threading.Event()

        def end():
            os.kill(os.getpid(), number)
            assert stopped.wait(30)
            return 128 + number

        def send_signal(number):
            passed_on.append(number)
            stopped.set()

        return FakeProcess(end, [], send_signal)

    monkeypatch.setattr(child_process, "subprocess", SimpleNamespace(Popen=start, PIPE=None))
    said = f"stopped; the same command goes on with what {tmp_path / 'out'} holds"
    for number in (signal.SIGTERM, signal.SIGINT):
        assert sweep("000", "--rows=finetune,pcgrad") == 128 + number
        assert passed_on == [number]
        assert capsys.readouterr().out.splitlines()[-1] == said
        passed_on.clear()


def test_what_a_run_writes_to_standard_error_is_shown(sweep, monkeypatch, capsys):
    said = ["warning: a row left out\n", "error: no such luck\n"]
    fake = SimpleNamespace(Popen=lambda words, **rest: FakeProcess(lambda: 2, said), PIPE=None)
    monkeypatch.setattr(child_process, "subprocess", fake)
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
@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_stops_all_runs_and_they_go_on(number, to_all, course_data, tmp_path):
    """Sent to the sweep alone, or to the runs too, as a terminal does."""
    (tmp_path / "small.yaml").write_text(f"{SWEEP_OPTIONS}log_steps: 1\n")
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-m", "minbert.reproduce", "000", "--rows=finetune,pcgrad,smart", "--jobs=2"]
    command += [f"--data={course_data}", f"--options={tmp_path / 'small.yaml'}", f"--out={out}"]
    with log.open("w") as printed:
        long = [*command, "--steps=100000"]
        sweep = subprocess.Popen(long, stdout=printed, stderr=printed, start_new_session=True)
        for _ in range(600):
            if len([*out.glob("*/seed-0/last")]) == 2 or sweep.poll() is not None:
                break
            time.sleep(0.1)
        (os.killpg if to_all else os.kill)(sweep.pid, number)
        assert sweep.wait(60) == 128 + number, log.read_text()
    runs = [Run(out / row / "seed-0") for row in ("finetune", "pcgrad")]
    steps = [run.records()[-1]["step"] for run in runs]
    assert all(f"{run.last} holds step {step}: " in log.read_text() for run, step in zip(runs, steps, strict=True))
    assert not (out / "smart" / "seed-0").exists()
    assert log.read_text().splitlines()[-1] == f"stopped; the same command goes on with what {out} holds"
    time.sleep(0.5)
    assert [run.records()[-1]["step"] for run in runs] == steps  # both processes have ended
    subprocess.run([*command, f"--steps={max(steps) + 5}", "--rows=finetune,pcgrad"], check=True)
    assert [run.summary()["steps"] for run in runs] == [max(steps) + 5] * 2
