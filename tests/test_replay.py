"""A recorded training step, replayed: every call agrees with the reference, and one that does not is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minbert import replay
from minbert.errors import UserError
from minbert.kernels import flight_recorder, native, op_checks

STEP = """
from minbert.kernels import flight_recorder
from minbert import train
train.main([
    "--recipe=smart-pcgrad", "--steps=1", "--epochs=1", "--batch-size=4", "--precision=fp32",
    "--scratch.hidden-size=32", "--scratch.num-hidden-layers=1", "--scratch.vocab-size=400", "--max-length=16",
    "--out=run",
])
"""
OF_STEP = {  # by training; what evaluation calls besides is not asked for
    *("embedding", "embedding_backward", "linear", "linear_backward", "first_token_attention"),
    *("first_token_attention_backward", "dropout_add_layer_norm", "dropout_add_layer_norm_backward", "bias_gelu"),
    *("bias_gelu_backward", "dropout", "gram", "surgery_weights", "combine_adamw_", "smart_init", "smart_ascend"),
}


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calls of a run of one step on the demo corpus; not to be changed."""
    if not native.available():
        pytest.skip(native.missing_reason())
    directory = tmp_path_factory.mktemp("recording")
    environment = {**os.environ, "MINBERT_RECORD": str(directory / "calls"), "MINBERT_RECORD_CALLS": "1000"}
    command = [sys.executable, "-c", STEP]
    subprocess.run(command, env=environment, cwd=directory, check=True, capture_output=True)
    return directory / "calls"


def test_a_recorded_step_agrees_with_the_reference(recording, capsys):
    files = flight_recorder.call_files(recording)
    assert {file.name.partition("-")[2].removesuffix(".safetensors") for file in files} >= OF_STEP
    assert replay.main([str(recording)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == len(files)
    assert all(line.endswith("ok") for line in lines)
    assert last == f"{len(files)} calls, none of which differ from the reference"


def copied(recording: Path, to: Path, op: str) -> Path:
    """The first recorded call of an op, alone in a directory."""
    source = next(file for file in flight_recorder.call_files(recording) if op in file.name)
    to.mkdir(exist_ok=True)
    (to / source.name).write_bytes(source.read_bytes())
    return to / source.name


def test_a_call_that_differs_is_found(recording, tmp_path, monkeypatch, capsys):
    copied(recording, tmp_path, "bias_gelu.")
    copied(recording, tmp_path, "gram.")
    right = op_checks.run
    monkeypatch.setattr(op_checks, "run", lambda call: [each * (1 + 1e-5) for each in right(call)])
    monkeypatch.setitem(op_checks.REFERENCES, "gram", lambda *_: [torch.zeros(3)])
    assert replay.main([str(tmp_path)]) == 1
    gelu, gram, last = capsys.readouterr().out.splitlines()
    assert gelu.endswith("WRONG")
    assert gram.endswith("WRONG")
    assert last == "2 calls, 2 of which differ from the reference"


def test_a_call_that_fails_is_found(recording, tmp_path, monkeypatch, capsys):
    copied(recording, tmp_path, "gram.")

    def fail(call):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(op_checks, "run", fail)
    assert replay.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[0].endswith("gram: WRONG, out of")


def test_files_that_cannot_be_replayed_are_one_line(recording, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has no recorded calls; run the command again with MINBERT_RECORD="):
        replay.main([str(tmp_path)])
    path = copied(recording, tmp_path, "gram.")
    call = flight_recorder.read_call(path)
    flight_recorder.write_call(path, call._replace(op="newer"))
    with pytest.raises(UserError, match="has a call of 'newer', which this version of minbert does not have"):
        replay.main([str(tmp_path)])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"is damaged, or no file of a recorded call .*; remove the file to replay"):
        replay.main([str(tmp_path)])
    monkeypatch.setattr(flight_recorder, "is_on", lambda: True)
    with pytest.raises(UserError, match="MINBERT_RECORD is set"):
        replay.main([str(tmp_path)])


def test_the_calls_of_several_processes_are_replayed(recording, tmp_path, capsys):
    for rank in (0, 1):
        copied(recording, tmp_path / f"rank-{rank}", "gram.")
    assert replay.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("2 calls, none of which differ from the reference\n")
