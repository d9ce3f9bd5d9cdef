"""`minbert doctor` shows what is here, finds what is wrong and says what to do; its exit code follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import minbert
from minbert import diagnosis, doctor, kernels
from minbert.errors import UserError
from minbert.kernels import dispatch, gelu, native

SECTIONS = ["versions", "processor", "threads", "native extension", "GPUs", "memory", "cache", "extras", "environment"]


@pytest.fixture
def needs_native() -> None:
    if not native.available():
        pytest.skip(native.missing_reason())


def test_the_report_is_plain_text(needs_native, capsys):
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert all(line.isprintable() for line in lines)
    assert [line for line in lines if line in SECTIONS] == SECTIONS
    assert lines[-1] == "nothing is wrong"
    rows = {" ".join(line.split()) for line in lines}
    assert f"minbert {minbert.__version__}" in rows
    assert f"torch {torch.__version__}" in rows
    assert f"instruction set chosen {native.isa()}" in rows
    assert f"path {native.library().__file__}" in rows
    assert f"CPU threads {torch.get_num_threads()}" in rows
    assert f"directory {os.environ['MINBERT_CACHE']}" in rows
    assert "limit 2.0 GiB" in rows
    assert "gram native" in rows
    assert 'linear torch not oneDNN: set_matmul("blas") is in effect' in rows


def test_the_same_as_json(needs_native, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MINBERT_CACHE", str(tmp_path))
    monkeypatch.setenv("MINBERT_CACHE_LIMIT", "1MiB")
    (tmp_path / f"{'0' * 64}.safetensors").write_bytes(bytes(100))
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [*SECTIONS, "ops", "checks", "notes", "problems"]
    assert found["cache"] == {"directory": str(tmp_path), "files": 1, "size": 100, "limit": 2**20}
    assert found["ops"]["cpu"].keys() == set(dispatch.OPS)
    assert {op: row["runs"] for op, row in found["ops"]["cpu"].items()} == kernels.backends("cpu") | {"linear": "torch"}
    assert found["memory"]["total"] > 2**28
    assert found["problems"] == found["checks"] == []


def test_the_check_runs_every_op_in_every_dtype(needs_native, capsys):
    assert doctor.main(["--check", "--device=cpu", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert all(check["ok"] and check["error"] <= check["bound"] for check in checks)
    ran = {(check["op"], check["dtype"]) for check in checks}
    for op in ("attention_backward", "bias_gelu", "embedding_backward", "linear_backward", "combine_adamw_"):
        assert {(op, "float32"), (op, "bfloat16")} <= ran
    assert {"oneDNN", "torch"} >= {check["backend"] for check in checks if check["op"] == "linear"}


class BrokenGelu:
    """The native extension with a GELU that forgets the bias."""

    def __getattr__(self, name):
        return getattr(native.library(), name)

    def gelu_forward(self, shape, x, bias, y, threads):
        native.library().gelu_forward(shape, x, torch.zeros(shape[1]).data_ptr(), y, threads)


def test_the_check_finds_an_op_that_is_broken(needs_native, monkeypatch, capsys):
    monkeypatch.setattr(gelu, "library", BrokenGelu)
    assert doctor.main(["--check", "--device=cpu"]) == 1
    shown = capsys.readouterr().out
    wrong = [line.split()[:3] for line in shown.splitlines() if line.endswith("WRONG")]
    assert wrong == [["bias_gelu", dtype, "native"] for dtype in ("float32", "bfloat16")]
    assert "wrong: bias_gelu of float32 by native gives wrong results; please report it" in shown


def test_a_missing_extension_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_reason", "the native extension x is not built")
    assert doctor.main(["--check"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("wrong: the native extension x is not built")
    assert "pip install" in last


def test_a_refused_instruction_set_is_wrong_and_the_rest_is_shown():
    environment = {**os.environ, "MINBERT_ISA": "avx9"}
    done = subprocess.run([sys.executable, "-m", "minbert.doctor"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "wrong: MINBERT_ISA " in done.stdout.splitlines()[-1]
    assert "memory" in done.stdout.splitlines()


def test_a_limit_that_is_no_size_is_wrong(needs_native, monkeypatch, capsys):
    monkeypatch.setenv("MINBERT_CACHE_LIMIT", "much")
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("wrong: MINBERT_CACHE_LIMIT must be a size")


def test_bad_options_are_refused():
    with pytest.raises(UserError, match="unknown option --chek"):
        doctor.main(["--chek"])


def test_gpus_are_described(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "NVIDIA Old", 7, 5, 16 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(diagnosis, "too_old", lambda device: "needs a GPU of another kind")
    assert diagnosis.gpus() == {
        "cuda:0": {
            "name": "NVIDIA Old",
            "compute capability": "7.5",
            "memory": 16 * 2**30,
            "multiplies bfloat16": False,
            "supported": False,
        }
    }
    assert list(diagnosis.notes()) == [
        "cuda:0 is not used: minbert needs a GPU of another kind; --device auto takes the CPU"
    ]


def test_extras_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(diagnosis.importlib.metadata, "requires", lambda _: REQUIRES)
    monkeypatch.setattr(diagnosis.importlib.metadata, "metadata", lambda _: Metadata())
    monkeypatch.setattr(diagnosis, "_version", {"pytest": "9.0", "old": "1.0", "torch": "2.0"}.get)
    assert diagnosis.extras() == {
        "test": {"installed": {"pytest": "9.0"}, "missing": ["absent"], "of another version": []},
        "more": {"installed": {"old": "1.0"}, "missing": [], "of another version": ["old>=2"]},
    }


REQUIRES = ["torch>=2", 'pytest>=8; extra == "test"', 'absent; extra == "test"', 'old>=2; extra == "more"']


class Metadata:
    def get_all(self, name):
        return ["test", "more"]
