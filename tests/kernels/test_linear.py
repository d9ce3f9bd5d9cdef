"""Linear layers: both matrix libraries give the product, and the one that is chosen runs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minbert import kernels
from minbert.kernels import use_backend, use_matmul

module = importlib.import_module("minbert.kernels.linear")  # its name in the package is the function's
libraries = importlib.import_module("minbert.kernels.matmul_library")  # likewise
packed_weight = importlib.import_module("minbert.kernels.packed_weight")


@pytest.fixture(params=[True, False], ids=["oneDNN", "BLAS"])
def onednn(request):
    """Either library as the choice."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    with use_matmul("onednn" if request.param else "blas"):
        yield request.param


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
    by_onednn, calls = libraries.by_onednn, []
    monkeypatch.setattr(libraries, "by_onednn", lambda *tensors: calls.append(tensors) or by_onednn(*tensors))
    kernels.linear(x.requires_grad_(), weight.requires_grad_(), bias).sum().backward()
    assert len(calls) == 2 * onednn  # forward and the gradient of x; that of the weight is BLAS's
    assert kernels.backends("cpu")["linear"] == ("oneDNN" if onednn else "reference")
    with use_backend("reference"):
        kernels.linear(x, weight, bias)
        assert kernels.backends("cpu")["linear"] == "reference"
    assert len(calls) == 2 * onednn


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precisions_that_onednn_does_not_multiply_go_to_torch(onednn, dtype, monkeypatch):
    monkeypatch.setattr(libraries, "by_onednn", lambda *tensors: pytest.fail("asked oneDNN"))
    monkeypatch.setattr(libraries, "multiplies_bfloat16", lambda: False)
    x, weight, bias, _ = (tensor.to(dtype) for tensor in inputs(5, 8, 3))
    assert torch.equal(kernels.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.skipif(not libraries.multiplies_bfloat16(), reason="this processor multiplies no bfloat16")
def test_bfloat16_is_onednns_whatever_is_chosen_for_float32(onednn, monkeypatch):
    by_onednn, calls = libraries.by_onednn, []
    monkeypatch.setattr(libraries, "by_onednn", lambda *tensors: calls.append(tensors) or by_onednn(*tensors))
    x, weight, bias, _ = (tensor.bfloat16() for tensor in inputs(5, 8, 3))
    kernels.linear(x, weight, bias)
    assert len(calls) == 1


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", None])
def test_matrix_units_are_used_where_the_processor_and_onednn_have_them(feature, monkeypatch):
    features = {name: name == feature for name in kernels.native.cpu_features()}
    monkeypatch.setattr(kernels.native, "cpu_features", lambda: features)
    monkeypatch.setattr(libraries, "multiplies_bfloat16", lambda: True)
    assert libraries.multiplies_in_tiles() == (feature == "amx_bf16")
    monkeypatch.setattr(libraries, "multiplies_bfloat16", lambda: False)
    assert not libraries.multiplies_in_tiles()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tasks", [1, 3])
def test_weights_packed_once_give_the_same_products(onednn, dtype, tasks):
    """Views of a weight, parts of it and casts of it, read several times; afterwards it may change."""
    x, weight, bias, grad = inputs(50, 48, 32)
    x, grad, bounds = x.to(dtype), grad.to(dtype), [0, 20, 20, 50] if tasks > 1 else [0, 50]

    def results():
        views = [[param.detach().requires_grad_() for _ in bounds[1:]] for param in (weight, bias)]
        found = []
        for parts in [slice(None), slice(8, 32)]:
            leaf = x.detach().requires_grad_()
            given = [[view[parts] for view in each] for each in views]
            y = kernels.linear(leaf, *given, bounds=bounds)
            found += [y.detach(), *torch.autograd.grad(y, [leaf, *views[0], *views[1]], grad[:, parts])]
        return found

    def near(some, others):
        unit = 4 * torch.finfo(dtype).eps
        return all((one - other).norm() <= unit * other.norm() for one, other in zip(some, others, strict=True))

    apart = results()
    with kernels.weights_packed_once():
        assert near(results(), apart)
        assert near(results(), apart)
    weight.neg_()
    with kernels.weights_packed_once():
        assert not near(results(), apart)
        changed = results()
    assert near(changed, results())


def test_weights_are_packed_once(onednn, monkeypatch):
    packs, pack = [], packed_weight.pack_weight
    monkeypatch.setattr(packed_weight, "pack_weight", lambda *arguments: packs.append(arguments) or pack(*arguments))
    x, weight, bias, _ = inputs(5, 8, 3)
    for _ in range(2):
        packs.clear()
        with kernels.weights_packed_once():
            for _ in range(3):
                kernels.linear(x.requires_grad_(), weight, bias).sum().backward()
        assert len(packs) == 2  # the weight and its transpose
    kernels.linear(x, weight, bias)
    assert len(packs) == 2


def test_another_thread_packs_nothing_and_sees_its_weights_change(onednn):
    x, weight, bias, _ = inputs(5, 8, 3)
    found = []

    def elsewhere():
        for _ in range(2):
            found.append(kernels.linear(x, weight, bias))
            weight.neg_()

    with kernels.weights_packed_once():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0] - bias, bias - found[1])
    assert found[0].ne(found[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_rows_are_as_exact_as_torchs(isa, dtype):
    """The gradient of a bias, for any thread count."""
    grad = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = [slice(0, 33), slice(33, 33), slice(33, 300)]
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(module._sums_of_rows(grad, parts, torch.float32))
    for one, other, rows in zip(*found, parts, strict=True):
        exact, theirs = grad[rows].double().sum(0), grad[rows].sum(0, dtype=torch.float32)
        assert torch.equal(one, other)
        assert (one - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6 * exact.norm()


def test_float32_parameters_are_cast_to_the_precision_of_x(onednn):
    x, weight, bias, grad = inputs(40, 16, 8)
    halves = [tensor.bfloat16() for tensor in (x, weight, bias)]
    ours = gradients(kernels.linear, [halves[0], weight, bias], grad.bfloat16())
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    exact = gradients(F.linear, [tensor.double() for tensor in halves], grad.bfloat16().double())
    for mine, truth in zip(ours, exact, strict=True):  # a float32 sum, rounded once to bfloat16
        assert (mine - truth).norm() <= torch.finfo(torch.bfloat16).eps * truth.norm()


BFLOAT16 = """
import torch
from minbert import kernels
generator = torch.Generator().manual_seed(0)
for rows, columns, outputs in ((1, 3, 5), (40, 48, 33), (130, 384, 70)):
    shapes = ((rows, columns), (outputs, columns), (outputs,), (rows, outputs))
    x, weight, bias, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    tensors = [x, weight, bias]
    results = []
    for kind in (torch.bfloat16, torch.float64):
        leaves = [tensor.to(kind).requires_grad_() for tensor in tensors]
        with kernels.use_backend("auto" if kind == torch.bfloat16 else "reference"):
            y = kernels.linear(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(kind))])
    for got, exact in zip(*results):
        assert got.dtype == torch.bfloat16
        assert (got - exact).norm() <= 2 * torch.finfo(torch.bfloat16).eps * exact.norm(), (rows, columns, outputs)
"""


@pytest.mark.parametrize("widest", ["SSE41", "AVX2", "AVX512_CORE", "ALL"])
def test_bfloat16_products_are_right_whatever_the_processor_multiplies(widest):
    """oneDNN held to sets without bf16 instructions multiplies as it does on processors that have none."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": widest}
    result = subprocess.run([sys.executable, "-c", BFLOAT16], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_gradients_that_nobody_needs_are_not_computed(onednn, needed, monkeypatch):
    tensors = dict(zip(("x", "weight", "bias"), inputs(5, 8, 3)[:3], strict=True))
    tensors[needed].requires_grad_()
    y = kernels.linear(**tensors)
    counted = []

    def counting(function):
        return lambda *tensors: counted.append(tensors) or function(*tensors)

    monkeypatch.setattr(module, "product", counting(module.product))
    monkeypatch.setattr(module, "F", types.SimpleNamespace(linear=counting(F.linear)))
    y.sum().backward()
    assert len(counted) == (needed != "bias")
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [needed]


@pytest.mark.parametrize(
    ("blas", "onednn", "hit", "faster"),
    [
        (1.0, 0.7, "", "onednn"),
        (1.0, 0.7, "onednn", "onednn"),
        (0.7, 1.0, "", "blas"),
        (0.7, 1.0, "blas", "blas"),
        (1.0, 0.98, "", "blas"),
    ],
)
def test_the_faster_library_is_found_by_its_times(blas, onednn, hit, faster, monkeypatch):
    """On a clock that the products move: other work comes and goes, and slows both, or one of them alone."""
    now, calls, load, alone = [0.0], [], [1.0, 3.0, 1.0, 2.0, 5.0], {"": [1], "onednn": [1, 1, 1, 1, 2], "blas": [2, 1]}

    def taking(name, seconds):
        def product(x, weight):
            round_ = len(calls) // 8
            calls.append((name, tuple(x.shape), weight.is_contiguous()))
            now[0] += seconds * load[round_ % len(load)] * (alone[hit][round_ % len(alone[hit])] if name == hit else 1)

        return product

    monkeypatch.setattr(libraries, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(libraries, "F", types.SimpleNamespace(linear=taking("blas", blas)))
    monkeypatch.setattr(libraries, "by_onednn", taking("onednn", onednn))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert kernels.faster_matmul(384, 1536) == faster
    assert calls[:4] == [
        (calls[0][0], (1024, 384), True),
        (calls[0][0], (1024, 1536), True),
        (calls[0][0], (1024, 384), False),
        (calls[0][0], (1024, 1536), False),
    ]
    rounds = len(calls) // 8
    assert rounds == 2 + libraries.ROUNDS[0]
    first = [calls[8 * i][0] for i in range(rounds)]
    assert {*first[::2]} | {*first[1::2]} == {"blas", "onednn"}
    assert len({*first[::2]}) == len({*first[1::2]}) == 1


def test_narrow_encoders_are_not_measured_and_the_measurement_draws_no_random_numbers(monkeypatch):
    before = torch.random.get_rng_state()
    assert kernels.faster_matmul(256, 256) in ("blas", "onednn")
    assert torch.equal(torch.random.get_rng_state(), before)
    monkeypatch.setattr(libraries, "by_onednn", lambda *tensors: pytest.fail("measured"))
    assert kernels.faster_matmul(128, 512) == "blas"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert kernels.faster_matmul(768, 3072) == "blas"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize(("given", "generated"), [({}, 2), (dict.fromkeys(libraries.KEPT, "1024"), 1)])
def test_a_command_keeps_the_code_of_few_products(given, generated):
    """A product of one row is generated again after those of 120 other numbers of rows, unless the user keeps more."""
    code = (
        "import torch\nfrom minbert import cli\nfrom minbert.kernels.matmul_library import by_onednn\n"
        "def main(arguments):\n"
        "    for rows in (*range(1, 122), 1): by_onednn(torch.ones(rows, 64), torch.ones(64, 64))\n"
        "    return 0\n"
        "cli.run(main, [])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in libraries.KEPT}
    environment |= {**given, "ONEDNN_VERBOSE": "2"}  # it names every product that it generates
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if "cache_miss" in line and "mb1ic64oc64" in line]
    assert len(lines) == generated


def test_the_library_is_blas_until_another_is_chosen(monkeypatch):
    assert kernels.matmul() == "blas"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(libraries, "faster_matmul", lambda: "onednn")
    with use_matmul("auto"):
        assert kernels.matmul() == "onednn"
    with use_matmul("onednn"):
        kernels.set_matmul("blas")
        with pytest.raises(ZeroDivisionError), use_matmul("onednn"):
            raise ZeroDivisionError
        assert kernels.matmul() == "blas"
    assert kernels.matmul() == "blas"
    with pytest.raises(ValueError, match="one of 'auto', 'blas', 'onednn', got 'mkl'"):
        kernels.set_matmul("mkl")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="without oneDNN"):
        kernels.set_matmul("onednn")
    assert kernels.matmul() == "blas"


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
        torch.library.opcheck(module._linear_backward, (arguments[0], turned[0].detach(), *arguments[2:]))


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
