"""bench/gpu.sh: what it refuses, that its phases keep their limits and leave records, whatever their commands do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import build_in_place
import check_build
import phases
import pytest
from phases import Call, Command, Phase

BENCH = Path(__file__).parents[2] / "bench"
ESSENTIAL = ["report", "build", "smoke", "steps", "ops"]
without_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU may be here")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(phases, "INTERRUPTED", 1.0)
    monkeypatch.setattr(phases, "ENDED", 0.5)


def python(code: str) -> Command:
    return Command([sys.executable, "-c", code], 1)


def shell(script: str) -> Command:
    """For what has to have begun within a short limit, on a busy machine too."""
    return Command(["sh", "-c", script], 1)


def phase(name: str, *code: str | Command, limit: float = 60, least: float = 0.1) -> Phase:
    commands = [each if isinstance(each, Command) else python(each) for each in code]
    return Phase(name, limit, least, commands)


def records(directory: Path) -> list[dict]:
    return json.loads((directory / "phases.json").read_text())["phases"]


@without_gpu
def test_without_a_gpu_it_says_so_and_what_can_be_done():
    done = subprocess.run([BENCH / "gpu.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("bench/gpu.sh: no NVIDIA GPU here")
    assert "bench/gpu/ahead_of_time.py" in done.stderr


def test_a_dry_run_shows_the_chosen_phases_with_their_seconds():
    done = subprocess.run([BENCH / "gpu.sh", "--dry-run", "race", "build"], capture_output=True, text=True)
    *shown, total = done.stdout.splitlines()
    heads = [line.split(",")[0] for line in shown if not line.startswith(" ")]
    assert (done.returncode, heads) == (0, ["build", "race"])
    seconds = [int(line.split()[0]) for line in shown if line.startswith(" ")]
    assert total == f"about {sum(seconds)} s in all"
    done = subprocess.run([BENCH / "gpu.sh", "--dry-run", "rice"], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"no phase 'rice'; phases: {', '.join(ESSENTIAL)}, graph, race, rest, sanitize" in done.stderr


def test_the_essential_phases_come_first_and_take_eight_minutes():
    known = phases.phases()
    assert [each.name for each in known[: len(ESSENTIAL)]] == ESSENTIAL
    assert sum(each.seconds for each in known[: len(ESSENTIAL)]) <= 480
    for each in known:
        assert each.least <= each.seconds <= each.limit


def test_the_page_on_gpus_has_the_phases_and_their_seconds():
    page = (BENCH.parent / "docs" / "gpu.md").read_text()
    for each in phases.phases():
        seconds = sum(command.seconds for command in each.commands if "pip" not in command.words)
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {each.name} |")]
        assert line.endswith(f"| {seconds} |")


def test_every_test_file_of_gpus_is_in_one_phase():
    words = {each.name: [word for command in each.commands for word in command.words] for each in phases.phases()}
    own = [word for name in ("smoke", "graph", "race") for word in words[name] if word.startswith("tests/")]
    assert len(own) == len(set(own))
    assert all((BENCH.parent / file).exists() for file in own)
    assert {word for word in words["rest"] if word.startswith("--ignore=")} == {f"--ignore={file}" for file in own}


def test_a_failing_command_fails_its_phase_but_stops_nothing(tmp_path):
    call = Call(tmp_path, 60)
    mixed = Phase(
        "mixed",
        60,
        1,
        [python("print('first'); raise SystemExit(3)"), python("print('second')"), Command(["/no/such/program"], 1)],
    )
    assert call.run(mixed) == "FAILED"
    assert call.run(phase("later", "print('third')")) == "passed"
    found, later = records(tmp_path)
    assert [(each["ok"], each["output"]) for each in found["commands"]] == [
        (False, ["first"]),
        (True, ["second"]),
        (False, []),
    ]
    assert found["commands"][0]["status"] == "exit status 3"
    assert later["ok"]
    assert {"first", "second", "third"} <= set((tmp_path / "log.txt").read_text().splitlines())


def test_a_command_past_its_limit_is_interrupted_and_may_still_write(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "INTERRUPTED", 20.0)
    long = shell("""trap 'echo "{\\"saved\\": 1}"; exit 1' INT; sleep 60 & wait""")
    call = Call(tmp_path, 60)
    assert call.run(phase("long", long, "print('never')", limit=5)) == "FAILED"
    assert call.seconds < 30
    first, second = records(tmp_path)[0]["commands"]
    assert (first["status"], first["output"]) == ("cut off after 5 s", {"saved": 1})
    assert (second["ok"], second["status"]) == (False, "no time left")


def is_gone(process: Path) -> bool:
    """Whether a process ends within ten seconds; it may be left as a zombie, for which nobody has waited."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_command_that_ignores_interrupts_is_killed_with_its_children(tmp_path):
    call = Call(tmp_path, 60)
    assert call.run(phase("stubborn", shell("trap '' INT; sleep 60 & echo $!; wait"), limit=2)) == "FAILED"
    assert call.seconds < 30
    (child,) = records(tmp_path)[0]["commands"][0]["output"]
    assert is_gone(Path("/proc") / child)


def test_a_process_that_outlives_its_command_and_holds_the_pipe_keeps_nobody_waiting(tmp_path):
    """torch.compile's workers have sessions of their own."""
    code = (
        "import subprocess, sys\n"
        "lives_on = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "print(subprocess.Popen(lives_on, start_new_session=True).pid)"
    )
    call = Call(tmp_path, 60)
    assert call.run(phase("forked", code)) == "passed"
    assert call.seconds < 30
    os.kill(int(records(tmp_path)[0]["commands"][0]["output"][0]), signal.SIGKILL)


def test_megabytes_of_output_are_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(phases, "MOST_LOGGED", 10_000)
    call = Call(tmp_path, 60)
    assert call.run(phase("loud", "for i in range(20_000): print(i, 'x' * 100)\nprint('y' * 10**6)")) == "passed"
    output = records(tmp_path)[0]["commands"][0]["output"]
    assert (len(output), output[-1]) == (phases.KEPT, "y" * phases.LONGEST)
    assert output[-2].startswith("19999 ")
    assert (tmp_path / "log.txt").stat().st_size <= 10_010
    assert "19999 " in capsys.readouterr().out


def test_the_budget_shortens_a_phase_and_skips_by_name_what_has_no_time(tmp_path):
    call = Call(tmp_path, 4)  # of which 1.5 s are for ending what hangs
    assert call.run(phase("hangs", "import time; time.sleep(60)")) == "FAILED"
    assert call.run(phase("long", "print('never')", least=30)) == "skipped"
    assert call.seconds < 15
    hangs, long = records(tmp_path)
    assert float(hangs["commands"][0]["status"].split()[3]) <= 3
    assert (long["commands"], long["skipped"]) == ([], "0 s are left, and it needs 30")


def test_few_files_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "OUT", tmp_path)
    words = [word for each in phases.phases() for command in each.commands for word in command.words]
    named = {word.partition("=")[2] for word in words if word.startswith("--minbert-record=")}
    assert {Path(name).parent for name in named} == {tmp_path}
    assert len(named) + 2 <= 8  # with phases.json and log.txt
    assert phases.MOST_LOGGED < 16 * 2**20


def test_the_build_is_of_this_gpu_alone_and_needs_no_package_tools(tmp_path, monkeypatch):
    for name, script in (("nvidia-smi", "echo 9.0; echo 9.0"), ("cmake", ""), ("ninja", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert build_in_place.architectures() == "90-real"
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_cmake_dir=lambda: "cmake of pybind11"))
    configure, compile_ = build_in_place.commands(tmp_path, tmp_path / "build", "90-real")
    assert {"-DMINBERT_CUDA=1", "-DCMAKE_CUDA_ARCHITECTURES=90-real", f"-DPython_EXECUTABLE={sys.executable}"} <= {
        *configure
    }
    assert compile_[-2:] == ["--parallel", str(os.cpu_count())]
    assert not {"pip", "setup.py"} & {*configure, *compile_}


def test_the_kernels_are_linked_once(tmp_path):
    (tmp_path / "minbert").mkdir()
    (tmp_path / "kernels").mkdir()
    for _ in range(2):
        build_in_place.link_kernels(tmp_path)
    assert (tmp_path / "minbert" / "kernels").resolve() == tmp_path / "kernels"


def test_what_minbert_needs_and_the_machine_lacks_is_named_before_anything_runs(tmp_path, monkeypatch):
    assert phases.missing_packages(tmp_path) == []
    everything = list(phases.importlib.metadata.distributions())
    lacking = [each for each in everything if each.metadata["Name"] not in ("platformdirs", "filelock")]
    monkeypatch.setattr(phases.importlib.metadata, "distributions", lambda: lacking)
    assert phases.missing_packages(tmp_path) == ["filelock", "platformdirs"]
    (tmp_path / "platformdirs-4.0.0-py3-none-any.whl").touch()
    assert phases.missing_packages(tmp_path) == ["filelock"]
    monkeypatch.setattr(phases, "missing_packages", lambda: ["filelock"])
    monkeypatch.setattr(sys, "argv", ["phases.py"])
    with pytest.raises(SystemExit, match="2"):
        phases.main()


@pytest.mark.parametrize(("named", "ran"), [([], ["report", "build"]), (["build", "ops"], ["build", "ops"])])
def test_after_a_build_that_failed_only_named_phases_run(named, ran, monkeypatch, tmp_path):
    known = [phase("report", "1"), phase("build", "raise SystemExit(1)"), phase("ops", "1")]
    monkeypatch.setattr(phases, "phases", lambda: known)
    monkeypatch.setattr(phases, "missing_packages", list)
    monkeypatch.setattr(phases, "OUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["phases.py", *named])
    assert phases.main() == 1
    assert [record["phase"] for record in records(tmp_path)] == ran
    assert ("would time the reference" in (tmp_path / "log.txt").read_text()) == (not named)


def test_a_build_without_code_for_an_op_fails(monkeypatch, capsys):
    found = dict.fromkeys(["gram", "attention"], "native") | dict.fromkeys(check_build.WITHOUT, "reference")
    monkeypatch.setattr("minbert.kernels.backends", lambda device: found)
    assert check_build.main() == 0
    found["gram"] = "reference"
    assert check_build.main() == 1
    assert "without code for GPUs: gram;" in capsys.readouterr().err
