"""Calls of custom ops are compared with the reference, and a comparison finds what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minbert import kernels
from minbert.kernels import example_calls, gelu, op_checks
from minbert.kernels.flight_recorder import Call, settings
from minbert.kernels.op_references import REFERENCES

SOURCES = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))
DTYPES = (torch.float32, torch.bfloat16)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def comparisons(calls: list[Call]) -> list[op_checks.Comparison]:
    return [op_checks.compare(call) for call in calls]


def test_every_custom_op_has_a_reference_and_is_recorded() -> None:
    defined = [name for path in SOURCES for name in re.findall(r'"minbert::(\w+)"', path.read_text())]
    assert sorted(defined) == sorted(REFERENCES)
    for path in SOURCES:
        text = path.read_text()
        kernels_of_ops = re.findall(r"^@(?:torch.library.custom_op\(|\w+.register_kernel\()", text, re.MULTILINE)
        calls_past_them = re.findall(r"\n\n@recorded\(", text)  # have no other decorator
        recorded = re.findall(r"^@recorded\(", text, re.MULTILINE)
        assert len(recorded) == len(kernels_of_ops) + len(calls_past_them), path


def test_the_example_calls_call_every_custom_op_and_agree_with_the_reference(isa: str) -> None:
    found = []
    for call in example_calls.calls("cpu", DTYPES, sizes=example_calls.SMALL).values():
        with op_checks.captured_calls() as captured:
            call()
        found += comparisons(captured)
    assert [each for each in found if not each.ok] == []
    assert {each.op for each in found} == set(REFERENCES)
    bfloat16 = {each.op for each in found if each.dtype == "bfloat16"}
    multiplied = set() if isa == "avx512bf16" else {"encoder_layers"}
    assert set(REFERENCES) - bfloat16 - multiplied == {
        *("attention_dropout_mask", "dropout_mask", "surgery_weights", "task_weights")
    }


def test_sparse_rows_and_other_arguments_of_updates(needs_native: None) -> None:
    rows = torch.sparse_coo_tensor(
        torch.tensor([[0, 3]]), randn(2, 5), (6, 5), check_invariants=True, is_coalesced=True
    )
    grads = [[rows, randn(9, seed=1)], [None, randn(9, seed=2)]]
    weights = torch.tensor([0.5, -2.0], dtype=torch.float64)
    state = [[randn(6, 5, seed=s).abs(), randn(9, seed=s + 1).abs()] for s in (3, 5, 7, 9)]
    copies = [torch.zeros(6, 5, dtype=torch.bfloat16), None]
    options = {**example_calls.ADAMW, "ema": state[3], "ema_decay": 0.9, "copies": copies}
    with op_checks.captured_calls() as captured:
        kernels.gram(grads)
        kernels.combine_adamw_(state[0], grads, weights, *state[1:3], **options)
        kernels.combine_adamw_(
            state[0], grads, weights, *state[1:3], **options, skip_unless=torch.zeros((), dtype=bool)
        )
        kernels.combine_adamw_(state[0], grads, weights, *state[1:3], **{**options, "lr": 0.0})
        kernels.dropout_add_layer_norm(
            randn(3, 8).requires_grad_(), randn(3, 8), *randn(2, 8), eps=1.0
        ).sum().backward()
        kernels.linear(randn(3, 8), randn(2, 8).requires_grad_()).sum().backward()
    found = comparisons(captured)
    assert [each.op for each in found] == [
        "gram",
        *["combine_adamw_"] * 3,
        "dropout_add_layer_norm",
        "dropout_add_layer_norm_backward",
        "linear",
        "linear_backward",
    ]
    assert [each for each in found if not each.ok] == []


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1 + 2e-6), (torch.bfloat16, 1.01)])
def test_a_result_that_is_off_is_found(
    dtype: torch.dtype, factor: float, monkeypatch: pytest.MonkeyPatch, needs_native: None
) -> None:
    call = Call("bias_gelu", [randn(9, 16, dtype=dtype), [randn(16, seed=1)], [0, 9]], settings())
    right = op_checks.run(call)[0].double()
    assert op_checks.compare(call).ok
    monkeypatch.setattr(op_checks, "run", lambda call: [right * factor])
    assert not op_checks.compare(call).ok


def test_what_is_not_finite_is_found_only_where_the_reference_is_finite(
    monkeypatch: pytest.MonkeyPatch, needs_native: None
) -> None:
    x = randn(4, 16)
    x[2] = torch.nan
    call = Call("bias_gelu", [x, [randn(16, seed=1)], [0, 4]], settings())
    assert op_checks.compare(call).ok
    result = op_checks.run(call)[0]
    result[1, 3] = torch.inf
    monkeypatch.setattr(op_checks, "run", lambda call: [result])
    assert not op_checks.compare(call).ok
    monkeypatch.setattr(op_checks, "run", lambda call: [torch.zeros(2, 16)])
    assert not op_checks.compare(call).ok


def test_a_call_runs_under_the_settings_that_it_was_recorded_with(needs_native: None) -> None:
    before, portable = settings(), {**settings(), "isa": "portable", "threads": 1, "matmul": "onednn"}
    if not torch.backends.mkldnn.is_available():
        portable["matmul"] = "blas"
    with op_checks.settings_of(Call("gram", [], portable)):
        assert settings() == portable
    assert settings() == before


def test_an_op_that_is_broken_is_found(monkeypatch: pytest.MonkeyPatch, needs_native: None) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            return getattr(kernels.native.library(), name)

        def gelu_forward(self, shape: object, x: int, bias: int, y: int, threads: int) -> None:
            kernels.native.library().gelu_forward(shape, x, x, y, threads)

    monkeypatch.setattr(gelu, "library", Broken)
    assert not op_checks.compare(Call("bias_gelu", [randn(3, 16), [randn(16, seed=1)], [0, 3]], settings())).ok


@pytest.mark.parametrize(("nearby", "ok"), [(2e-7, True), (5e-7, False)])
def test_beyond_the_bound_the_errors_of_calls_nearby_count(
    monkeypatch: pytest.MonkeyPatch, nearby: float, ok: bool
) -> None:
    grad = randn(5, 3).t()
    call = Call("linear_backward", [grad, randn(3, 4), randn(5, 4), [0, 3], True, False, torch.float32], settings())
    errors = iter([5e-7] + op_checks.NEARBY * [nearby])
    seen = []

    def found(call: Call) -> list[tuple[float, float, float]]:
        seen.append(call.arguments)
        return [(next(errors), 1.5e-7, op_checks.SLACK)]

    monkeypatch.setattr(op_checks, "_errors", found)
    comparison = op_checks.compare(call)
    assert (comparison.ok, comparison.error) == (ok, pytest.approx(nearby))
    assert len({float(arguments[0][0, 0]) for arguments in seen}) == 1 + op_checks.NEARBY
    for arguments in seen:
        assert arguments[0].stride() == grad.stride()
        assert 0 < (arguments[0] / grad - 1).abs().max() < 0.1 or arguments[0] is grad
        assert arguments[3:] == call.arguments[3:]
