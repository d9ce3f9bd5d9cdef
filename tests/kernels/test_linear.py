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


def test_other_precisions_go_to_torch(onednn, monkeypatch):
    monkeypatch.setattr(module, "_by_onednn", lambda *tensors: pytest.fail("asked oneDNN"))
    x, weight, bias, _ = (tensor.bfloat16() for tensor in inputs(5, 8, 3))
    assert torch.equal(kernels.linear(x, weight, bias), F.linear(x, weight, bias))


def test_float32_parameters_are_cast_to_the_precision_of_x(onednn):
    x, weight, bias, grad = inputs(40, 16, 8)
    by_hand = gradients(lambda x, w, b: F.linear(x, w.bfloat16(), b.bfloat16()), [x.bfloat16(), weight, bias], grad)
    ours = gradients(kernels.linear, [x.bfloat16(), weight, bias], grad.bfloat16())
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for mine, expected in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_gradients_that_nobody_needs_are_not_computed(onednn, needed, monkeypatch):
    tensors = dict(zip(("x", "weight", "bias"), inputs(5, 8, 3)[:3], strict=True))
    tensors[needed].requires_grad_()
    y = kernels.linear(**tensors)
    products, product = [], module._product
    monkeypatch.setattr(module, "_product", lambda *tensors: products.append(tensors) or product(*tensors))
    y.sum().backward()
    assert len(products) == (needed != "bias")
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [needed]


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


def test_a_bfloat16_weight_may_have_a_float32_bias():
    x, weight, bias, grad = inputs(6, 8, 3)
    half = [x.bfloat16(), weight.bfloat16(), bias]
    y, d_x, d_weight, d_bias = gradients(kernels.linear, half, grad.bfloat16())
    assert [tensor.dtype for tensor in (y, d_x, d_weight, d_bias)] == [*[torch.bfloat16] * 3, torch.float32]
    cast = gradients(kernels.linear, [half[0], half[1].float(), bias], grad.bfloat16())
    assert torch.equal(y, cast[0])
    assert torch.equal(d_x, cast[1])
    assert torch.equal(d_weight, cast[2].bfloat16())
    assert torch.equal(d_bias, cast[3])


def test_opcheck():
    x, weight, bias, _ = inputs(5, 8, 3)
    x, weight, bias = (tensor.requires_grad_() for tensor in (x, weight, bias))
    turned = x.detach().t().contiguous().t().requires_grad_(), weight.detach().t().contiguous().t().requires_grad_()
    torch.library.opcheck(module._linear, (x, [weight], [bias], [0, 5]))
    torch.library.opcheck(module._linear, (turned[0], [turned[1]], [], [0, 5]))
    views = [[parameter.detach().requires_grad_() for _ in range(2)] for parameter in (weight, bias)]
    torch.library.opcheck(module._linear, (x, *views, [0, 2, 5]))
    for wanted in ((True, True, torch.float32), (False, True, None)):
        arguments = torch.ones(5, 3), x.detach(), weight.detach(), [0, 2, 5], *wanted
        torch.library.opcheck(module._linear_backward, arguments)


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
        ((torch.ones(4, 3), torch.ones(2, 3).double()), r"weight must be float32, got float64"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.linear(*arguments)
