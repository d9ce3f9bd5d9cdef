"""SIGINT and SIGTERM at every moment of a run: it stops at once, says what is saved, and goes on to the same end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import pytest
from compare_runs import assert_equal_runs
from groups import quick_options, quickly
from rich.console import Console
from spawned_ranks import free_port, joined, run_two_ranks

from minbert import train
from minbert.cli import parse_layers
from minbert.config import TrainConfig
from minbert.distributed.process_group import ProcessGroup
from minbert.runs.run_directory import Run
from minbert.training import loop, stop_signal
from minbert.training.stop_signal import Stopped, StopSignal


@pytest.fixture(scope="module")
def finished(course_data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("stops") / "run"
    assert train.main([*quick_options(course_data, run), "--steps=8"]) == 0
    return run


def signalling(name: str, number: int, calls: int = 1):
    """Have the function of this name send this process a signal instead of returning, in its n-th call."""
    module, _, attribute = name.rpartition(".")
    real, left = getattr(sys.modules[module], attribute), [calls]

    def stopped(*arguments, **options):
        found = real(*arguments, **options)
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(number)
        return found

    return patch(name, stopped)


def losses_and_scores(run: Path) -> list[object]:
    return [(record["step"], record.get("loss"), record.get("dev")) for record in Run(run).metrics.records()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "name",
    [
        "setup.open_tasks",
        "setup.training_examples",
        "setup.encode",
        "setup.MultitaskModel",
        "loop.kernels_line",
        "setup.TaskGradients",
    ],
)
def test_before_the_first_step_nothing_is_left(quick, tmp_path, capsys, name, number):
    with signalling(f"minbert.training.{name}", number):
        assert train.main([*quick, "--steps=8"]) == 128 + number
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == "stopped; nothing is saved yet: the same command begins anew"
    assert shown.err == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "calls", "step"),
    [
        ("minbert.training.loop.learning_rate_factor", 3, 3),  # in a step
        ("minbert.training.training_run.evaluate", 1, 6),  # while the first epoch is scored
        ("minbert.runs.checkpoint.save", 1, 4),  # while a checkpoint is written
        ("minbert.training.loop.learning_rate_factor", 8, 8),  # in the last step
        ("minbert.training.training_run.evaluate", 2, 8),  # while the last epoch is scored
        ("minbert.training.training_run.load_model", 1, 8),
        ("minbert.training.training_run.evaluate", 3, 8),
        ("minbert.runs.predictions.format_predictions", 1, 8),
        ("minbert.training.training_run.plot_run", 1, 8),
        ("minbert.training.training_run.write_report", 1, 8),
    ],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_end(finished, quick, tmp_path, capsys, name, calls, step):
    with signalling(name, signal.SIGTERM, calls):
        assert train.main([*quick, "--steps=8"]) == 128 + signal.SIGTERM
    shown = capsys.readouterr()
    last = tmp_path / "run" / "last"
    if name == "minbert.runs.checkpoint.save":
        step = 5  # the signal came with the checkpoint of step 4 written, and the next step saw it
    said = f"stopped; {last} holds step {step}: the same command with --resume goes on"
    assert shown.out.splitlines()[-1] == said
    assert "Traceback" not in shown.out + shown.err
    assert train.main([*quick, "--steps=8", "--resume"]) == 0
    assert_equal_runs(finished, tmp_path / "run")
    one, other = (Run(path).summary() for path in (finished, tmp_path / "run"))
    assert (one["dev"], one["best_epoch"], one["steps"]) == (other["dev"], other["best_epoch"], other["steps"])
    records = [
        [(r["step"], r.get("loss"), r.get("dev")) for r in Run(path).metrics.records()]
        for path in (finished, last.parent)
    ]
    assert records[0] == records[1]
    assert (last.parent / "report.html").exists()


def test_a_stopped_run_that_nobody_named_says_what_it_is_called(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unnamed = [option for option in quick if not option.startswith("--out=")]
    with signalling("minbert.training.loop.learning_rate_factor", signal.SIGINT, 3):
        assert train.main([*unnamed, "--steps=4"]) == 130
    (run,) = (tmp_path / "runs").iterdir()
    out = run.relative_to(tmp_path)
    stopped, said = capsys.readouterr().out.splitlines()[-2:]
    assert stopped == f"stopped; {out / 'last'} holds step 3: the same command with --resume goes on"
    assert said == f"with --resume, give --out {out}"
    assert train.main([*unnamed, "--steps=4", "--resume", "--out", str(out)]) == 0
    with signalling("minbert.training.setup.encode", signal.SIGINT):
        assert train.main([*unnamed, "--steps=4"]) == 130
    assert capsys.readouterr().out.splitlines()[-1] == "stopped; nothing is saved yet: the same command begins anew"


def test_a_run_whose_loss_was_zero_goes_on(quick, tmp_path):
    """A batch without a second question to confuse the first one with has a ranking loss of exactly 0."""
    ranking = ["--tasks=qqp", "--heads.qqp=concatenated", "--losses.qqp=multiple_negatives_ranking"]
    options = [*quick, *ranking, "--batch-size=1", "--steps=4"]
    with signalling("minbert.training.loop.learning_rate_factor", signal.SIGINT, 3):
        assert train.main(options) == 130
    records = Run(tmp_path / "run").metrics.records()
    assert 0.0 in [record["loss"]["qqp"] for record in records if "loss" in record]
    assert train.main([*options, "--resume"]) == 0


def _rank_of_another_processor(rank: int, port: int, words: list[str], out: Path) -> None:
    chosen = patch("minbert.training.loop.resolve_precision", lambda name, device: ("bf16", "fp32")[rank])
    with joined(rank, 2, port) as group, quickly(), chosen:
        loop.train(
            parse_layers("train", TrainConfig, [*words, "--steps=1", f"--out={out}"]), Console(quiet=True), group
        )
    if rank == 0:
        assert Run(out).config().precision == "bf16"


def test_processes_on_different_processors_take_the_precision_of_the_first(quick, tmp_path):
    run_two_ranks(_rank_of_another_processor, free_port(), [*quick, "--recipe=plain"], tmp_path / "run")


def _stopped_rank(rank: int, port: int, words: list[str], out: Path) -> None:
    waits = []
    all_reduce_max = ProcessGroup.all_reduce_max

    def counted(group: ProcessGroup, number: int) -> int:
        waits.append(number)
        return all_reduce_max(group, number)

    with joined(rank, 2, port) as group, quickly(), patch.object(ProcessGroup, "all_reduce_max", counted):
        # Rank 1 alone gets a signal, in a step; ranks wait for one another where an epoch ends, at steps 6 and 8.
        for call, step, waited in ((3, 4, 0), (8, 8, 2)):
            waits.clear()
            run = out / str(step)
            config = parse_layers("train", TrainConfig, [*words, "--steps=8", f"--out={run}"])
            signals = signalling("minbert.training.loop.gradient_products", signal.SIGTERM, call if rank else 0)
            with signals, pytest.raises(Stopped) as found:
                loop.train(config, Console(quiet=True), group)
            assert found.value.number == signal.SIGTERM
            assert len(waits) == waited
            if group.is_main:  # which writes
                assert f"last holds step {step}:" in Run(run).where_it_stands()


def test_processes_stop_together_without_waiting_for_one_another(finished, quick, tmp_path):
    run_two_ranks(_stopped_rank, free_port(), quick, tmp_path)
    whole = [step for step, *_ in losses_and_scores(finished)]
    for stopped in ("4", "8"):
        assert train.main([*quick, "--steps=8", f"--out={tmp_path / stopped}", "--resume"]) == 0
        assert [step for step, *_ in losses_and_scores(tmp_path / stopped)] == whole


def test_while_a_resumed_run_is_made_ready_it_says_what_is_saved(quick, tmp_path, capsys):
    assert train.main([*quick, "--steps=4"]) == 0
    with signalling("minbert.training.setup.encode", signal.SIGINT):
        assert train.main([*quick, "--steps=8", "--resume"]) == 130
    said = f"stopped; {tmp_path / 'run' / 'last'} holds step 4: the same command with --resume goes on"
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert Run(tmp_path / "run").summary()["steps"] == 4


def test_a_second_signal_does_not_wait(monkeypatch):
    monkeypatch.setattr(stop_signal, "ONE_STOP_SECONDS", 0.0)
    with StopSignal() as stop, stop.deferred():
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
    assert stop.number == signal.SIGTERM


def test_what_comes_twice_at_once_is_one_signal():
    with StopSignal() as stop:
        with stop.deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert stop.number == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_waited_stops_what_does_not_wait():
    with StopSignal() as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), stop.deferred(wait=False):
            raise AssertionError("not reached")


def test_off_the_main_thread_the_programs_own_handlers_stay():
    found = []

    def work() -> None:
        with StopSignal():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_stopped_run_is_a_keyboard_interrupt_to_a_program():
    assert issubclass(Stopped, KeyboardInterrupt)


def test_a_command_that_is_stopped_while_it_reads_data(course_data, tmp_path):
    """In a process of its own, in which the data never ends: nothing but the signal can end it."""
    script = tmp_path / "reading.py"
    script.write_text(
        "import sys, time\n"
        "from minbert import cli, train\n"
        "from minbert.training import setup\n"
        "def endless(*arguments):\n"
        "    print('reading', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
        "setup.open_tasks = endless\n"
        "cli.run(train.main)\n"
    )
    words = [sys.executable, str(script), *quick_options(course_data, tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert any(line == "reading\n" for line in process.stdout)
        process.terminate()
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert output == "stopped; nothing is saved yet: the same command begins anew\n"
    assert errors == ""
    assert not (tmp_path / "run").exists()
