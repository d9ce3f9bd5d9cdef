"""Linear layers: both matrix libraries give the product, and a machine keeps to the one it chose."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minbert import kernels
from minbert.kernels import use_backend

module = importlib.import_module("minbert.kernels.linear")  # its name in the package is the function's


@pytest.fixture(params=[True, False], ids=["oneDNN", "BLAS"])
def onednn(request, monkeypatch):
    """Either library as the machine's choice."""
    monkeypatch.setattr(module, "_onednn_wins", lambda: request.param)
    return request.param


def inputs(rows, columns, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, columns), (outputs, columns), (outputs,), (rows, outputs))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def gradients(function, tensors, grad):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*tensors)
    output.backward(grad)
    return [output.detach(), *(tensor.grad for tensor in tensors)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_output_and_gradients_are_as_exact_as_torchs(onednn, rows, columns, outputs, with_bias):
    x, weight, bias, grad = inputs(rows, columns, outputs)
    tensors = [x, weight, bias] if with_bias else [x, weight]
    exact = gradients(F.linear, [tensor.double() for tensor in tensors], grad.double())
    theirs = gradients(F.linear, tensors, grad)
    ours = gradients(kernels.linear, tensors, grad)
    longest_sum = max(rows, columns, outputs)  # whose rounding grows as the root of its length, in some order or other
    for mine, reference, truth in zip(ours, theirs, exact, strict=True):
        unit = torch.finfo(torch.float32).eps * truth.abs().max() * longest_sum**0.5
        assert (mine - truth).abs().max() <= 2 * (reference - truth).abs().max() + unit


def test_the_choice_decides_what_runs(onednn, monkeypatch):
    x, weight, bias, _ = inputs(5, 8, 3)
    by_onednn, calls = module._by_onednn, []
    monkeypatch.setattr(module, "_by_onednn", lambda *tensors: calls.append(tensors) or by_onednn(*tensors))
    kernels.linear(x, weight, bias)
    assert len(calls) == onednn
    assert kernels.backends("cpu")["linear"] == ("oneDNN" if onednn else "reference")
    with use_backend("reference"):
        kernels.linear(x, weight, bias)
    assert len(calls) == onednn


def test_other_precisions_go_to_torch(onednn, record):
    x, weight, bias, _ = (tensor.bfloat16() for tensor in inputs(5, 8, 3))
    with record() as ops:
        assert torch.equal(kernels.linear(x, weight, bias), F.linear(x, weight, bias))
    assert "minbert::linear" not in ops


def test_gradients_that_nobody_needs_are_not_computed(onednn, record):
    x, weight, _, _ = inputs(5, 8, 3)
    weight.requires_grad_()
    with record() as ops:
        kernels.linear(x, weight).sum().backward()
    assert ops.count("minbert::linear") == 2
    assert x.grad is None


def test_the_verdict_is_kept_and_read_by_the_next_process(monkeypatch, tmp_path):
    monkeypatch.setenv("MINBERT_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_measure", lambda: True)
    decide = module._onednn_wins.__wrapped__
    assert decide() is True
    monkeypatch.setattr(module, "_measure", lambda: pytest.fail("measured again"))
    assert decide() is True
    (verdict,) = json.loads((tmp_path / "linear.json").read_text()).values()
    assert verdict is True
    (tmp_path / "linear.json").write_text("{")
    monkeypatch.setattr(module, "_measure", lambda: False)
    assert decide() is False


def test_an_unwritable_cache_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINBERT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(module, "_measure", lambda: True)
    assert module._onednn_wins.__wrapped__() is True


def test_opcheck():
    x, weight, bias, _ = inputs(5, 8, 3)
    for tensors in ((x, weight, bias), (x.t().contiguous().t(), weight.t().contiguous().t(), None)):
        torch.library.opcheck(module._linear, [t.requires_grad_() if t is not None else None for t in tensors])


def test_compiles_as_one_graph(monkeypatch):
    x, weight, bias, _ = inputs(5, 8, 3)
    compiled = torch.compile(kernels.linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), torch.ones(2, 3)), r"x must have shape \[N, inputs\], got \[3\]"),
        ((torch.ones(4, 3), torch.ones(2, 5)), r"weight must have shape \[outputs, 3\], got \[2, 5\]"),
        ((torch.ones(4, 3), torch.ones(2, 3), torch.ones(3)), r"bias must have shape \[2\], got \[3\]"),
        ((torch.ones(4, 3), torch.ones(2, 3).double()), "weight must be float32, got float64"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.linear(*arguments)
