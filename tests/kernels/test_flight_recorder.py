"""The flight recorder writes a call's inputs before the call, and reads them back as they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minbert.kernels import flight_recorder
from minbert.kernels.flight_recorder import Call, Recorder, call_files, read_call, recorded, settings, write_call


def test_a_call_is_read_as_it_was_written(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    gaps, expanded, transposed = x[:, :3], x[:1].expand(5, 6), x.bfloat16().t()
    arguments = [gaps, [expanded, None, transposed, x, x], torch.empty(0), torch.bfloat16, None, 3, 0.5, float("inf")]
    write_call(tmp_path / "call", Call("gram", arguments, settings()))
    op, [first, listed, empty, *others], read = read_call(tmp_path / "call")
    assert (op, read, others) == ("gram", settings(), [torch.bfloat16, None, 3, 0.5, float("inf")])
    assert listed[1] is None
    assert listed[3] is listed[4]
    pairs = [(first, gaps), (listed[0], expanded), (listed[2], transposed), (listed[3], x), (empty, torch.empty(0))]
    for one, other in pairs:
        assert torch.equal(one, other)
        assert (one.stride(), one.dtype) == (other.stride(), other.dtype)


@pytest.mark.parametrize("change", [lambda content: content[:-9], lambda content: b"x" + content, lambda content: b""])
def test_a_damaged_file_is_one_line(tmp_path: Path, change) -> None:
    path = tmp_path / "call"
    write_call(path, Call("gram", [torch.ones(3)], settings()))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="is damaged, or no file of a recorded call") as raised:
        read_call(path)
    assert "\n" not in str(raised.value)


def test_the_last_calls_are_kept_and_numbers_go_on(tmp_path: Path) -> None:
    for start in (0, 5):  # of two processes, one after the other
        recorder = Recorder(tmp_path, 3)
        for number in range(start, start + 5):
            recorder("gram", [number])
    assert [path.name for path in call_files(tmp_path)] == [f"{n:06}-gram.safetensors" for n in (8, 9, 10)]
    assert [read_call(path).arguments for path in call_files(tmp_path)] == [[7], [8], [9]]
    assert len(list(tmp_path.iterdir())) == 3


def test_without_a_recorder_an_op_is_itself() -> None:
    assert recorded("gram")(print) is print
    assert not flight_recorder.is_on()


def test_a_call_is_recorded_before_it_runs_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight_recorder, "_recorder", Recorder(tmp_path, 3))

    @recorded("gram", inputs=lambda x: [x + 1])
    def op(x: int) -> int:
        (path,) = call_files(tmp_path)
        assert read_call(path).arguments == [x + 1]
        return 2 * x

    assert op(4) == 8
    monkeypatch.setattr(flight_recorder, "write_call", lambda *_: (tmp_path / "none" / "call").touch())
    with pytest.raises(RuntimeError, match=r"MINBERT_RECORD: .*000002-gram.safetensors cannot be written \(.*No such"):
        op(4)
    monkeypatch.setattr(flight_recorder, "_recorder", None)
    monkeypatch.setattr(flight_recorder, "_refusal", "MINBERT_RECORD cannot be used")
    with pytest.raises(ValueError, match="MINBERT_RECORD cannot be used"):
        recorded("gram")(op)(4)


def test_what_the_environment_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MINBERT_RECORD", raising=False)
    assert flight_recorder._of_environment() == (None, None)
    monkeypatch.setenv("MINBERT_RECORD", str(tmp_path / "new"))
    monkeypatch.setenv("MINBERT_RECORD_CALLS", "0")
    assert flight_recorder._of_environment() == (
        None,
        "MINBERT_RECORD_CALLS must be a number of calls, at least 1, got '0'",
    )
    monkeypatch.setenv("MINBERT_RECORD_CALLS", "2")
    monkeypatch.setenv("RANK", "1")
    recorder, refusal = flight_recorder._of_environment()
    assert refusal is None
    recorder("gram", [])
    assert len(call_files(tmp_path / "new" / "rank-1")) == 1
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINBERT_RECORD", str(tmp_path / "file"))
    recorder, refusal = flight_recorder._of_environment()
    assert recorder is None
    assert refusal.startswith(f"MINBERT_RECORD: {tmp_path / 'file' / 'rank-1'} cannot be used")


def test_after_a_crash_the_last_file_is_the_call_that_crashed(tmp_path: Path, needs_native: None) -> None:
    code = """
import os, torch
from minbert import kernels
from minbert.kernels import gelu, layer_norm

class Crashing:
    def __getattr__(self, name):
        return os.abort() if name == "gelu_backward" else getattr(kernels.native.library(), name)

gelu.library = Crashing
x = torch.arange(12.0).view(3, 4).requires_grad_()
hidden = kernels.bias_gelu(x, torch.ones(4))
kernels.dropout_add_layer_norm(hidden, x, *x.detach()[:2], eps=1.0).sum().backward()
"""

    environment = {**os.environ, "MINBERT_RECORD": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGABRT, done.stderr
    ops = ["bias_gelu", "dropout_add_layer_norm", "dropout_add_layer_norm_backward", "bias_gelu_backward"]
    assert [read_call(path).op for path in call_files(tmp_path)] == ops
    assert torch.equal(read_call(call_files(tmp_path)[-1]).arguments[1], torch.arange(12.0).view(3, 4))
