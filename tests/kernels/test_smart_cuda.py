"""The CUDA kernels have the properties that test_smart_ops proves of the CPU's.

They are proven twice: on a GPU where there is one, and on the host wherever CUDA's toolkit is, compiled as C++ and run
thread by thread (csrc/tests/on_host).
"""

from __future__ import annotations

import ctypes
import itertools
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_smart_ops as properties
import torch
from test_smart_ops import (  # noqa: F401  tests are collected here once more, with this file's `isa`
    CHOICES,
    SEED,
    inputs,
    randn,
    same_bits,
    test_a_gradient_that_is_not_finite_stops_its_own_group_only,
    test_a_point_that_is_not_finite_is_passed_on,
    test_a_sequence_of_one_token_is_a_token,
    test_a_zero_offset_stays_at_the_centre,
    test_ascent_errs_no_more_than_twice_the_reference,
    test_init_is_the_exact_sum_but_for_the_noise_and_one_rounding,
    test_init_passes_nan_and_infinity_on,
    test_lengths_are_in_units_of_the_scale,
    test_sequences_do_not_see_each_other_and_tokens_do_within_one,
    test_the_gradients_scale_does_not_matter,
    test_the_noise_is_standard_normal,
    test_the_result_lies_in_the_ball_or_on_its_surface,
    test_the_step_has_the_length_eta,
    test_without_a_step_what_lies_in_the_ball_stays_to_the_bit,
)
from torch import Tensor

from minbert.kernels import native, native_calls, reference, smart, smart_ascend, smart_init, use_backend

CSRC = Path(__file__).parents[2] / "csrc"
HALVES = (torch.float32, torch.bfloat16, torch.float16)
PER_TOKEN, PER_GROUP = 128, 512  # threads of the kernels for tokens and for other groups
# Columns, threads for float32, threads for halves: every kernel that a token's length chooses, and what lies between.
COLUMNS = [
    *((4, PER_TOKEN, PER_GROUP), *((columns, PER_TOKEN, PER_TOKEN) for columns in (8, 256, 264, 384, 512, 768, 1024))),
    *((columns, PER_GROUP, PER_GROUP) for columns in (1, 33, 1032)),
]


class NormalStart(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *(("dtype", ctypes.c_int32), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64)),
        *(
            ("sigma", ctypes.c_float),
            ("scale", ctypes.c_void_p),
            ("seed", ctypes.c_void_p),
            ("stream_id", ctypes.c_uint32),
        ),
    ]


class Ascent(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("perturbed", "x", "grad", "out")),
        *(("dtype", ctypes.c_int32), ("cu_seqlens", ctypes.c_void_p)),
        *((name, ctypes.c_int64) for name in ("groups", "tokens", "columns")),
        *(("eta", ctypes.c_float), ("epsilon", ctypes.c_float), ("scale", ctypes.c_void_p)),
        *(("infinity_norm", ctypes.c_bool), ("onto_ball", ctypes.c_bool)),
    ]


class OnHost:
    """In place of the native library."""

    def __init__(self, library: Path) -> None:
        self.compiled = ctypes.CDLL(str(library))

    def smart_init(self, start: tuple, threads: int) -> None:
        self.compiled.smart_init(ctypes.byref(NormalStart(*start)))

    def smart_ascend(self, ascent: tuple, threads: int) -> None:
        self.compiled.smart_ascend(ctypes.byref(Ascent(*ascent)))


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> OnHost:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("the CUDA kernels' headers come with nvcc, which is not on PATH")
    library = tmp_path_factory.mktemp("on_host") / "smart.so"
    fuses = native.available() and native.library().cpu_features()["avx2"]  # whatever MINBERT_ISA says
    fused = "-fPIC,-mfma,-ffp-contract=fast" if fuses else "-fPIC"  # as GPUs fuse
    options = f"-x c++ -std=c++17 -O1 -shared --cudart none -Xcompiler {fused}"
    includes = ("-I", CSRC / "tests" / "on_host", "-I", CSRC)
    subprocess.run([nvcc, *options.split(), *includes, CSRC / "tests/on_host/smart.cpp", "-o", library], check=True)
    return OnHost(library)


@pytest.fixture
def isa(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the imported tests call: the CUDA kernels, run on the host."""
    monkeypatch.setattr(native_calls, "library", lambda: on_host)
    monkeypatch.setattr(smart, "is_compiled", lambda op, device, dtype: dtype in HALVES)
    return "cuda"


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def worst(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("columns", "threads_float32", "threads_halves"), COLUMNS)
def test_every_kernel_errs_no_more_than_twice_the_reference(
    isa, on_host, monkeypatch, dtype, columns, threads_float32, threads_halves
) -> None:
    memory: list[Tensor] = []

    def poisoned_like(x: Tensor) -> Tensor:
        memory.append(poisoned(x.numel() + 32, dtype=x.dtype))
        return memory[-1][16:-16].view(x.shape)

    monkeypatch.setattr(torch, "empty_like", poisoned_like)
    x, noise, grad = (randn(11, columns, seed=i).to(dtype) for i in range(3))
    tensors = (x + 0.1 * noise, x, grad)
    cu_seqlens = torch.tensor([0, 1, 4, 11], dtype=torch.int32)
    threads = threads_float32 if dtype == torch.float32 else threads_halves
    for choice in CHOICES:
        exact = reference.smart_ascend(*(t.double() for t in tensors), cu_seqlens, 0.5, 0.3, *choice)
        other = reference.smart_ascend(*tensors, cu_seqlens, 0.5, 0.3, *choice)
        mine = smart_ascend(
            *tensors, cu_seqlens, eta=0.5, epsilon=0.3, **dict(zip(("norm", "per", "projection"), choice, strict=True))
        )
        unit = torch.finfo(dtype).eps * exact.abs().max().item()  # the reference may be lucky by one
        assert worst(mine, exact) <= 2 * worst(other, exact) + unit
        assert on_host.compiled.last_threads() == (threads if choice[1] == "token" else PER_GROUP)
    start = smart_init(x, sigma=0.7, seed=SEED, stream_id=1)
    rounding = torch.finfo(dtype).eps / 2
    exact = reference.smart_init(x.double(), 0.7, SEED, 1)
    assert ((start.double() - exact).abs() <= rounding * exact.abs() + 0.7 * properties.NOISE).all()
    for written in memory:
        assert written[:16].isnan().all()
        assert written[-16:].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shift", [1, 4])
def test_rows_off_16_bytes_give_the_same_result(isa, on_host, dtype, shift: int) -> None:
    x, noise, grad = (randn(5 * 64 + shift, seed=i).to(dtype) for i in range(3))
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)

    def results(move) -> tuple[Tensor, Tensor]:
        a, b, c = (move(t[shift:].view(5, 64)) for t in (x, noise, grad))
        start = smart_init(a, sigma=0.3, seed=SEED, stream_id=2)
        return start, smart_ascend(b, a, c, cu_seqlens, eta=0.1, epsilon=0.1, norm="2")

    for moved, plain in zip(results(lambda t: t), results(Tensor.clone), strict=True):
        assert worst(moved, plain.double()) <= torch.finfo(dtype).eps
    assert on_host.compiled.last_threads() == PER_TOKEN


# On a GPU --------------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Have torch fill what it allocates with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def gpu_inputs(dtype: torch.dtype, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, noise, grad = (randn(211, columns, seed=i).to("cuda", dtype) for i in range(3))
    return x + 0.1 * noise, x, grad, torch.tensor([0, 1, 30, 128, 211], dtype=torch.int32, device="cuda")


@gpu
@on_gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("columns", [columns for columns, *_ in COLUMNS])
def test_on_a_gpu_errors_are_at_most_twice_the_references(poisoned_memory, record, dtype, columns: int) -> None:
    seed, scale = SEED.cuda(), torch.tensor(0.5, device="cuda")
    *tensors, cu_seqlens = gpu_inputs(dtype, columns)
    x = tensors[1]
    wide = [t.double() for t in tensors]

    def run(tensors: list[Tensor], choice: tuple[str, str, str]) -> tuple[Tensor, Tensor]:
        options = dict(zip(("norm", "per", "projection"), choice, strict=True))
        start = smart_init(tensors[1], sigma=1.4, seed=seed, stream_id=1, scale=scale)
        return start, smart_ascend(*tensors, cu_seqlens, eta=1.0, epsilon=0.6, scale=scale, **options)

    for choice in CHOICES:
        with record() as ops:
            mine = run(tensors, choice)
        assert {"minbert::smart_init", "minbert::smart_ascend"} <= set(ops)
        with use_backend("reference"):
            others, exact = run(tensors, choice), run(wide, choice)
        unit = torch.finfo(dtype).eps * max(x.abs().max().item(), 1.0)
        for result, other, wanted in zip(mine, others, exact, strict=True):
            assert worst(result, wanted) <= 2 * worst(other, wanted) + unit


@gpu
@on_gpu
def test_on_a_gpu_a_captured_graph_reads_new_seeds_and_scales() -> None:
    _, x, grad, cu_seqlens = gpu_inputs(torch.bfloat16, 768)
    seed, scale = torch.tensor([1, 0], device="cuda"), torch.tensor(1.0, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        start = smart_init(x, sigma=0.1, seed=seed, stream_id=0, scale=scale)
        return start, smart_ascend(start, x, grad, cu_seqlens, eta=0.1, epsilon=0.1, scale=scale)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for new_seed, new_row, new_scale in itertools.product((5, -9), (0, 70), (0.25, 2.0)):
        seed.copy_(torch.tensor([new_seed, new_row]))
        scale.fill_(new_scale)
        graph.replay()
        for result, wanted in zip(captured, step(), strict=True):
            assert torch.equal(result, wanted)


@gpu
@on_gpu
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_on_a_gpu_every_run_gives_the_same_bits(per: str) -> None:
    perturbed, x, grad, cu_seqlens = gpu_inputs(torch.float32, 768)
    options = {"eta": 0.1, "epsilon": 0.1, "norm": "2", "per": per}
    first = smart_ascend(perturbed, x, grad, cu_seqlens, **options)
    repeats = [smart_ascend(perturbed, x, grad, cu_seqlens, **options) for _ in range(250)]
    assert all(torch.equal(first, other) for other in repeats)


@gpu
@on_gpu
def test_on_a_gpu_the_noise_is_the_cpus(needs_native) -> None:
    """But for the rounding of products and sums, which GPUs fuse."""
    x = torch.zeros(300, 771)
    here = smart_init(x, sigma=1.0, seed=SEED, stream_id=3)
    there = smart_init(x.cuda(), sigma=1.0, seed=SEED.cuda(), stream_id=3).cpu()
    assert worst(there, here.double()) <= 2 * properties.NOISE
