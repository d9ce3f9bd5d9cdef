"""How the native extension is found, chosen and described."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minbert.kernels import backends, native, set_backend, use_backend

REPOSITORY = Path(__file__).parents[2]


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in this environment; in the tests' own, without MINBERT_ISA, where none is given."""
    environment = environment or {name: value for name, value in os.environ.items() if name != "MINBERT_ISA"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_the_process_has_one_openmp_runtime(needs_native: None, tmp_path: Path) -> None:
    code = """
import re
import minbert.kernels as kernels, torch
torch.set_num_threads(2)
kernels.gram([[torch.randn(1 << 20)], [torch.randn(1 << 20)]])
torch.randn(1 << 20).exp_()  # torch's own parallel loop
files = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(*sorted(file for file in files if re.search(r"lib(gomp|iomp|omp)[^/]*$", file)), sep="\\n")
"""
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 1, result.stdout


def test_the_folder_cannot_be_imported_as_kernels() -> None:
    result = python("import kernels", REPOSITORY)
    assert result.returncode != 0
    assert "import minbert.kernels" in result.stderr.splitlines()[-1]


def test_transformers_works_in_the_repositorys_root_and_finds_no_kernels_there() -> None:
    pytest.importorskip("transformers")
    result = python("import transformers; transformers.BertModel\nfrom kernels import gram", REPOSITORY)
    assert "cannot import name 'gram' from 'kernels'" in result.stderr.splitlines()[-1]


def test_importing_needs_no_compiler_and_no_triton(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, minbert.kernels as kernels
print(kernels.gram([[torch.ones(3)]]).item())
"""
    result = python(code, tmp_path, PATH=str(tmp_path))
    assert (result.stdout.strip(), result.returncode) == ("3.0", 0), result.stderr


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        ("sys.modules[name] = None", "is not built"),
        (
            "module = sys.modules[name] = types.ModuleType(name); module.__spec__ = object();"
            f" module.INTERFACE = {native.INTERFACE}; module.__file__ = '/elsewhere/_native.so'",
            "is not built here, and that of another minbert is /elsewhere/_native.so",
        ),
        (
            "module = sys.modules[name] = types.ModuleType(name); module.__spec__ = object(); module.INTERFACE = -1",
            "was built from",
        ),
    ],
)
def test_without_native_code_the_reference_runs_and_the_reason_names_the_remedy(
    prepare: str, reason: str, tmp_path: Path
) -> None:
    code = f"""
import sys, types
name = "minbert.kernels._native"
{prepare}
import torch, minbert.kernels as kernels
assert kernels.gram([[torch.ones(3)]]).item() == 3
assert "native" not in kernels.backends("cpu").values()
assert not any(kernels.native.cpu_features().values())
try:
    kernels.native.library()
    raise AssertionError("there is a library")
except RuntimeError as error:
    assert str(error) == kernels.native.missing_reason()
print(kernels.native.missing_reason())
"""
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert reason in result.stdout
    assert "pip install" in result.stdout


def test_a_built_extension_has_no_missing_reason(needs_native: None) -> None:
    assert native.missing_reason() is None
    assert native.library().isas()[0] == "portable"


def test_backends_tells_what_would_run(needs_native: None) -> None:
    assert backends("cpu")["gram"] == "native"
    assert backends(torch.device("meta"))["gram"] == "reference"
    with use_backend("reference"):
        assert set(backends("cpu").values()) == {"reference"}
    assert backends("cpu")["gram"] == "native"


def test_use_backend_restores_the_choice_after_an_error() -> None:
    before = backends("cpu")
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert backends("cpu") == before


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of 'auto', 'reference', got 'cuda'"):
        set_backend("cuda")


def test_an_unknown_instruction_set_is_refused(needs_native: None) -> None:
    with pytest.raises(ValueError, match=r"expected one of auto, portable.*, got mmx"):
        native.library().set_isa("mmx")


def test_cpu_features_agree_with_the_instruction_sets(isa: str) -> None:
    found, here = native.library().cpu_features(), native.library().isas()
    assert found["avx2"] == ("avx2" in here)
    assert found["avx512"] == ("avx512" in here)
    assert found["avx512_bf16"] == ("avx512bf16" in here)
    reached = native.ISAS[: native.ISAS.index(isa) + 1]
    features = ["avx2", "avx512", "avx512_bf16"]  # what each set after the portable one stands for
    assert [feature for feature in features if native.cpu_features()[feature]] == features[: len(reached) - 1]
