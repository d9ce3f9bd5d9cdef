"""MINBERT_ISA: which instruction set runs, what follows from it, and one line where it cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from minbert import cli
from minbert.device import resolve_precision
from minbert.kernels import gram, native, use_backend
from minbert.training.startup_report import kernels_line

CPU = torch.device("cpu")
EVERYTHING = {"avx2": True, "avx512": True, "avx512_bf16": True, "amx_bf16": True}
OPS = """
import json, torch
from torch.utils._python_dispatch import TorchDispatchMode
from minbert import kernels
from minbert.device import resolve_precision
from minbert.kernels import native
from minbert.training.startup_report import kernels_line

def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

N, D = 40, 48
cu_seqlens, seed = torch.tensor([0, 13, 40], dtype=torch.int32), torch.tensor([5, 0])
drop = {"dropout_p": 0.1, "seed": seed, "stream_id": 3}
ids = torch.arange(N) % 7
ops = {
    "attention": lambda q: kernels.attention(q.view(N, 3, 3, 16), cu_seqlens, 27, **drop),
    "bias_gelu": lambda q: kernels.bias_gelu(q, q[0]),
    "combine": lambda q: kernels.combine([[q[:8]], [q[8:16]]], torch.tensor([0.5, -2.0], dtype=torch.float64))[0],
    "dropout": lambda q: kernels.dropout(q, p=0.1, seed=seed, stream_id=3),
    "dropout_add_layer_norm": lambda q: kernels.dropout_add_layer_norm(q, 2 * q, q[0], q[1], eps=1e-5, **drop),
    "embedding": lambda q: kernels.embedding(ids, ids, ids, q, q, q, q[0], q[1], eps=1e-5, dtype=q.dtype, **drop),
    "gram": lambda q: kernels.gram([[q[:8]], [q[8:16]]]),
    "smart_init": lambda q: kernels.smart_init(q, sigma=0.1, seed=seed, stream_id=3),
}
class Called(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), function.name()]
        return function(*args, **(kwargs or {}))

errors = {}
for name, op in ops.items():
    exact = randn(N, 3 * D if name == "attention" else D)
    with torch.no_grad(), Called() as called:
        got = op(exact.float())
    assert any(each in (f"minbert::{name}", f"minbert::{name}_") for each in called.names), called.names
    with torch.no_grad(), kernels.use_backend("reference"):
        wanted = op(exact)
    errors[name] = ((got.double() - wanted).norm() / wanted.norm()).item()
cpu = torch.device("cpu")
print(json.dumps([native.isa(), resolve_precision("auto", cpu), kernels_line(cpu), errors]))
"""


def python(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MINBERT_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def processor(monkeypatch: pytest.MonkeyPatch, *isas: str) -> SimpleNamespace:
    """A stand-in for the extension on a processor that runs these instruction sets."""
    library = SimpleNamespace(isas=lambda: list(isas), isa=isas[-1], cpu_features=lambda: EVERYTHING)
    library.set_isa = lambda name: setattr(library, "isa", name)
    library.get_isa = lambda: library.isa
    monkeypatch.setattr(native, "_library", library)
    return library


@pytest.mark.parametrize("wanted", native.ISAS)
def test_the_set_that_is_named_runs_and_its_ops_agree_with_float64(wanted: str, needs_native: None) -> None:
    if wanted not in native.library().isas():
        pytest.skip(f"this processor has no {wanted}")
    result = python(OPS, wanted)
    assert result.returncode == 0, result.stderr
    isa, precision, line, errors = json.loads(result.stdout)
    assert isa == wanted
    assert line.startswith(f"kernels ({wanted}): native: ")
    assert wanted == "avx512bf16" or precision == "fp32"
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("value", ["mmx", "AVX2", "auto", "avx2\navx512", " "])
def test_an_unknown_set_is_refused_in_one_line(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = processor(monkeypatch, "portable", "avx2")
    line = native._force_isa(value)
    assert line == (
        f"MINBERT_ISA must be one of portable, avx2 (what this processor runs) or unset for the widest, got {value!r}"
    )
    assert library.isa == "avx2"


def test_a_set_that_the_processor_lacks_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    library = processor(monkeypatch, "portable", "avx2")
    line = native._force_isa("avx512")
    assert line is not None
    assert "one of portable, avx2 (what this processor runs)" in line
    assert "got 'avx512'" in line
    assert native._force_isa("portable") is None
    assert library.isa == "portable"


def test_no_set_runs_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_reason", "the native extension x is not built")
    line = native._force_isa("avx2")
    assert line is not None
    for part in ("MINBERT_ISA is 'avx2'", "x is not built", "pip install", "leave MINBERT_ISA unset"):
        assert part in line
    assert "\n" not in line


def test_what_is_refused_runs_no_op_and_no_command(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(native, "_refusal", "MINBERT_ISA must be another")
    for ask in (native.available, native.library, native.isa, native.cpu_features, native.cuda_available):
        with pytest.raises(ValueError, match="MINBERT_ISA must be another"):
            ask()
    with pytest.raises(ValueError, match="MINBERT_ISA must be another"):
        gram([[torch.ones(3)]])
    with use_backend("reference"):
        assert gram([[torch.ones(3)]]).item() == 3
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda arguments: pytest.fail("the command ran"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: MINBERT_ISA must be another\n"


def test_a_process_with_an_unknown_set_imports_and_says_one_line(needs_native: None) -> None:
    code = """
import sys
import minbert, minbert.kernels, torch
from minbert import cli, train
try:
    minbert.kernels.gram([[torch.ones(3)]])
except ValueError as error:
    print(error)
sys.argv = ["train", "--out=never"]
cli.run(train.main)
"""
    result = python(code, "mmx")
    line = f"MINBERT_ISA must be one of {', '.join(native.library().isas())} (what this processor runs)"
    line += " or unset for the widest, got 'mmx'\n"
    assert (result.stdout, result.stderr, result.returncode) == (line, f"error: {line}", 2)


@pytest.mark.parametrize(("isa", "allowed"), [("portable", 0), ("avx2", 1), ("avx512", 2), ("avx512bf16", 4)])
def test_features_and_precision_follow_the_set_that_runs(isa: str, allowed: int, monkeypatch) -> None:
    processor(monkeypatch, *native.ISAS).set_isa(isa)
    assert native.cpu_features() == {name: i < allowed for i, name in enumerate(EVERYTHING)}
    assert resolve_precision("auto", CPU) == ("bf16" if isa == "avx512bf16" else "fp32")
    assert kernels_line(CPU).startswith(f"kernels ({isa}): native: ")


def test_features_of_avx512_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    library = processor(monkeypatch, *native.ISAS)
    library.cpu_features = lambda: {**EVERYTHING, "avx512_bf16": False, "amx_bf16": False}
    assert resolve_precision("auto", CPU) == "fp32"
    assert native.cpu_features()["avx512"]


def test_the_line_of_kernels_names_no_set_where_none_runs() -> None:
    with use_backend("reference"):
        assert kernels_line(CPU).startswith("kernels: reference: ")
    assert kernels_line(torch.device("meta")).startswith("kernels: ")
