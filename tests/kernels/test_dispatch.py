"""Where compiled code does not run an op, `backends(explain=True)` gives each reason, and the op runs the reference."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from minbert import kernels
from minbert.kernels import backends, dispatch, native, triton, use_backend, use_matmul

ROW_WISE = ("dropout", "dropout_add_layer_norm", "embedding")
NO_CUDA = "the native extension was built without CUDA; build it with MINBERT_CUDA=1 where nvcc is"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if everything for GPUs were installed."""
    monkeypatch.setattr(native, "cuda_available", lambda: True)
    monkeypatch.setattr(triton, "available", lambda: True)


def against(op: str, device: str, backend: str | None = None, **inputs: object) -> list[str]:
    """The reasons against the only backend that does not run, or the one named."""
    reasons = backends(device, explain=True, **inputs)[op].not_available
    (found,) = reasons.values() if backend is None else (reasons[backend],)
    return found


def test_explanations_agree_with_the_names(needs_native: None, cuda: None) -> None:
    for device in ("cpu", "cuda", "meta"):
        explained = backends(device, explain=True)
        assert {op: each.runs for op, each in explained.items()} == backends(device)
        for each in explained.values():
            assert each.runs not in each.not_available
            assert all(each.not_available.values())
    assert backends("cpu", explain=True)["gram"] == ("native", {})
    assert backends("cuda", explain=True)["attention"] == (
        "triton",
        {"native": ["runs on cpu devices only, not on cuda"]},
    )


def test_other_devices(needs_native: None) -> None:
    assert backends("meta", explain=True)["attention"] == (
        "reference",
        {"native": ["runs on cpu devices only, not on meta"], "triton": ["runs on cuda devices only, not on meta"]},
    )
    assert against("gram", "meta") == ["runs on cpu and cuda devices only, not on meta"]
    assert against("attention_dropout_mask", "cuda") == ["runs on cpu devices only, not on cuda"]
    assert "runs on cpu devices only, not on cuda" in against("linear", "cuda")


def test_the_reference_was_chosen(needs_native: None) -> None:
    with use_backend("reference"):
        for op, each in backends("cpu", explain=True).items():
            assert each.runs == "reference"
            assert all('set_backend("reference") is in effect' in found for found in each.not_available.values()), op


def test_the_extension_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_reason", "the native extension x is not built")
    for device in ("cpu", "cuda"):
        (reason,) = against("gram", device)
        assert reason.startswith("the native extension x is not built: ")
        assert "pip install" in reason


def test_the_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_refusal", "MINBERT_ISA must be another")
    with pytest.raises(ValueError, match="MINBERT_ISA must be another"):
        backends("cpu", explain=True)
    with use_backend("reference"):
        assert against("gram", "cpu") == ['set_backend("reference") is in effect', "MINBERT_ISA must be another"]
        monkeypatch.setattr(native, "isa", lambda: pytest.fail("asks for the instruction set"))
        assert {*backends("cpu", dtype=torch.bfloat16).values()} == {"reference"}


def test_the_extension_has_no_cuda(needs_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda_available", lambda: False)
    assert against("combine_adamw_", "cuda") == [NO_CUDA]
    assert against("dropout_mask", "cuda") == [NO_CUDA]


def test_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "available", lambda: False)
    for op in (*ROW_WISE, "bias_gelu", "attention"):
        assert against(op, "cuda", "triton") == ["triton is not installed; torch's CUDA builds bring it along"]


def test_dtypes(needs_native: None, cuda: None) -> None:
    activations = (*ROW_WISE, "bias_gelu", "attention", "smart_init", "smart_ascend")
    for op in activations:
        on_cuda = "native" if op.startswith("smart") else "triton"
        assert against(op, "cpu", "native", dtype=torch.float16) == ["takes float32 or bfloat16, not float16"]
        assert backends("cuda", dtype=torch.float16)[op] == on_cuda
        wrong = ["takes float32 or bfloat16 or float16, not float64"]
        assert against(op, "cuda", on_cuda, dtype=torch.float64) == wrong
    for op in ("gram", "combine", "combine_adamw_", "adamw_"):
        assert against(op, "cpu", dtype=torch.float16) == ["takes float32 or bfloat16 or float64, not float16"]
        assert backends("cpu", dtype=torch.float64)[op] == "native"
    assert backends("cpu", dtype=torch.float64)["surgery_weights"] == "native"
    assert backends("cpu", dtype=torch.float64)["task_weights"] == "native"


def test_sizes(needs_native: None, cuda: None) -> None:
    for op in ROW_WISE:
        assert backends("cuda", columns=4096)[op] == "triton"
        assert against(op, "cuda", "triton", columns=4097) == ["takes rows of up to 4096 elements, not 4097"]
        assert backends("cpu", columns=4097)[op] == "native"
    assert backends("cuda", columns=4097)["bias_gelu"] == "triton"
    for head_dim, runs in ((8, True), (128, True), (12, False), (136, False)):
        reasons = [] if runs else [f"takes heads of 8, 16, 24, ... or 128 elements, not {head_dim}"]
        for device, backend in (("cpu", "native"), ("cuda", "triton")):
            explained = backends(device, explain=True, head_dim=head_dim)["attention"]
            assert explained.not_available.get(backend, []) == reasons
            assert explained.runs == (backend if runs else "reference")


def test_all_reasons_are_given(needs_native: None, cuda: None) -> None:
    with use_backend("reference"):
        found = against("attention", "cuda", "triton", dtype=torch.float64, head_dim=12)
    assert len(found) == 3


def test_one_dnn(monkeypatch: pytest.MonkeyPatch) -> None:
    library = importlib.import_module("minbert.kernels.matmul_library")
    assert against("linear", "cpu") == ['set_matmul("blas") is in effect']
    if torch.backends.mkldnn.is_available():
        with use_matmul("onednn"):
            assert backends("cpu", explain=True)["linear"] == ("oneDNN", {})
            assert against("linear", "cpu", dtype=torch.float64) == ["takes float32 or bfloat16, not float64"]
        monkeypatch.setattr(library, "multiplies_bfloat16", lambda: True)
        assert backends("cpu", explain=True, dtype=torch.bfloat16)["linear"] == ("oneDNN", {})
        monkeypatch.setattr(library, "multiplies_bfloat16", lambda: False)
        reasons = ["this processor, or oneDNN on it, multiplies no bfloat16"]
        assert against("linear", "cpu", dtype=torch.bfloat16) == reasons
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "torch was built without oneDNN" in against("linear", "cpu")


@pytest.mark.parametrize(
    ("param", "grad", "runs"),
    [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
        (torch.float64, torch.float64, True),
        (torch.float32, torch.float16, False),
        (torch.float64, torch.float32, False),
    ],
)
def test_adamw_takes_gradients_of_the_parameters_precision(param, grad, runs: bool, record, needs_native: None) -> None:
    state = [[torch.zeros(3, dtype=param)] for _ in range(3)]
    with record() as called:
        kernels.adamw_(
            state[0],
            [torch.ones(3, dtype=grad)],
            *state[1:],
            step=1,
            lr=0.1,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=0,
        )
    assert ("minbert::combine_adamw_" in called) == runs


CALLS = {
    "dropout": lambda x: kernels.dropout(x, p=0.5, seed=torch.tensor(1), stream_id=0),
    "bias_gelu": lambda x: kernels.bias_gelu(x, x[0]),
    "dropout_add_layer_norm": lambda x: kernels.dropout_add_layer_norm(x, x, x[0], x[0], eps=1e-5),
    "embedding": lambda x: kernels.embedding(*[torch.tensor([1, 0])] * 3, x, x, x, x[0], x[0], eps=1e-5),
    "smart_init": lambda x: kernels.smart_init(x, sigma=0.1, seed=torch.tensor(1), stream_id=0),
    "attention": lambda x: kernels.attention(x.view(2, 3, 1, -1), torch.tensor([0, 2], dtype=torch.int32), 2),
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_op_runs_what_is_said(op: str, dtype: torch.dtype, record, needs_native: None) -> None:
    x = torch.ones(2, 24).to(dtype)
    with record() as called:
        CALLS[op](x)
    assert (f"minbert::{op}" in called) == (backends("cpu", dtype=dtype)[op] == "native")


@pytest.mark.parametrize("op", CALLS)
def test_calls_of_the_reference_compile_into_one_graph(op: str) -> None:
    if op == "attention":
        pytest.skip("the reference splits the stream at lengths that it reads")

    def call(x: Tensor) -> Tensor:
        return CALLS[op](x)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 5):
        x = torch.linspace(-1, 1, rows * 24, dtype=torch.float64).view(rows, 24)
        torch.testing.assert_close(compiled(x), call(x))


def test_every_public_op_is_listed() -> None:
    computed_by_torch = {"clip_weights", "attention_plan", "split_float32", "join_float32"}
    public = {name for name in kernels.__all__ if callable(getattr(kernels, name)) and not name[0].isupper()}
    of_settings = ("backend", "matmul", "pack", "dispatcher", "added", "state_size")
    settings = {name for name in public if any(word in name for word in of_settings)}
    assert public - settings - computed_by_torch == set(dispatch.OPS)
