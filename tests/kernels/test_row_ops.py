"""The row-wise ops: as near to float64 as the reference, the same masks, the same bits for any thread count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert import kernels
from minbert.kernels import reference, use_backend

SEED, STREAM_ID, EPS = torch.tensor([-(2**41) + 5, 2**32 - 30]), 9, 1e-12
DTYPES = (torch.float32, torch.bfloat16)
UNIT = torch.finfo(torch.float32).eps
OPS = ("dropout", "dropout_add_layer_norm", "bias_gelu", "embedding")
TABLES = (50, 2, 40)  # rows of the embedding tables
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Case = tuple[list[Tensor], Callable[..., Tensor]]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(op: str, rows: int, columns: int, dtype: torch.dtype, p: float = 0.0, seed: int = 0) -> Case:
    """Differentiable inputs, and the op as a function of them; weights and biases are float32, as they train."""
    x = randn(rows, columns, seed=seed, dtype=dtype)
    weight, bias = randn(columns, seed=seed + 1), randn(columns, seed=seed + 2)
    drop = {"seed": SEED, "stream_id": STREAM_ID}
    if op == "dropout":
        return [x], lambda x: kernels.dropout(x, p=p, **drop)
    if op == "bias_gelu":
        return [x, bias], kernels.bias_gelu
    if op == "dropout_add_layer_norm":
        residual = randn(rows, columns, seed=seed + 3, dtype=dtype)
        return [x, residual, weight, bias], lambda *t: kernels.dropout_add_layer_norm(*t, eps=EPS, dropout_p=p, **drop)
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(size, (rows,), generator=generator) for size in TABLES]
    tables = [randn(size, columns, seed=seed + 4 + i, dtype=dtype) for i, size in enumerate(TABLES)]
    return [*tables, weight, bias], lambda *t: kernels.embedding(*ids, *t, eps=EPS, dropout_p=p, **drop)


def run(
    inputs: list[Tensor], function: Callable[..., Tensor], grad_dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """The output, and the gradient of each input under an arbitrary gradient of the output, exact in every dtype."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    grad = randn(*output.shape, seed=99, dtype=grad_dtype).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def exactly(inputs: list[Tensor], function: Callable[..., Tensor]) -> list[Tensor]:
    """`run` of the reference in float64."""
    with use_backend("reference"):
        return run([tensor.double() for tensor in inputs], function)


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).norm().item()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbered_rows_drop_what_they_drop_in_the_whole(isa: str, dtype: torch.dtype, backend: str) -> None:
    """Rows in any order, of two tasks: results, and gradients of inputs, are the whole's to the bit."""
    columns, rows = 50, torch.tensor([40, 3, 4, 70, 0, 99, 12], dtype=torch.int32)
    (x, residual, weight, bias), whole = case("dropout_add_layer_norm", 100, columns, dtype, p=0.4)
    grad = randn(100, columns, seed=99, dtype=torch.bfloat16).to(dtype)
    views = [[param.detach().requires_grad_() for _ in range(2)] for param in (weight, bias)]
    with use_backend(backend):
        given = [tensor.requires_grad_() for tensor in (x, residual)]
        y = whole(*given, weight, bias)
        wanted = [y.detach(), *torch.autograd.grad(y, given, grad)]
        part = [tensor.detach()[rows].requires_grad_() for tensor in given]
        drop = {"dropout_p": 0.4, "seed": SEED, "stream_id": STREAM_ID, "dropout_rows": rows, "bounds": [0, 3, 7]}
        y = kernels.dropout_add_layer_norm(*part, *views, eps=EPS, **drop)
        got = [y.detach(), *torch.autograd.grad(y, part, grad[rows])]
    for some, all_rows in zip(got, wanted, strict=True):
        assert torch.equal(some, all_rows[rows])


def assert_as_near_to_float64_as_the_reference(
    inputs: list[Tensor], function: Callable[..., Tensor], luck: float = 0.0
) -> None:
    """`luck`: by how much few elements may be off together where the reference happens to be exact."""
    ours = run(inputs, function)
    with use_backend("reference"):
        theirs = run(inputs, function)
    for got, reference_got, wanted in zip(ours, theirs, exactly(inputs, function), strict=True):
        assert got.dtype == reference_got.dtype
        slack = UNIT * wanted.norm().item() + luck  # the former: each result's rounding to float32
        if function is kernels.bias_gelu and inputs[0].dtype == torch.bfloat16:
            slack *= 2**6  # of the terms of the bias' gradient csrc/cpu/gelu.cpp keeps 2^-17
        assert error(got, wanted) <= 2 * error(reference_got, wanted) + slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("rows", "columns"), [(70, 384), (3, 768), (1, 3), (33, 130)])
def test_is_as_near_to_float64_as_the_reference(isa, op, rows, columns, dtype):
    for p in (0.0, 0.1):
        assert_as_near_to_float64_as_the_reference(*case(op, rows, columns, dtype, p))


@quick
@given(
    op=st.sampled_from(OPS),
    rows=st.integers(1, 100),
    columns=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.1, 0.7]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(isa, op, rows, columns, dtype, p, seed):
    if op in ("dropout_add_layer_norm", "embedding"):
        columns = max(columns, 16)  # the norm of a few numbers may divide by next to nothing
    # Inputs are about 1: sums over the rows may cancel, and the errors of their partial sums are left, a random walk.
    luck = 4 * UNIT * rows**0.5
    assert_as_near_to_float64_as_the_reference(*case(op, rows, columns, dtype, p, seed), luck=luck)


@pytest.mark.parametrize("bias", [0.0, 0.375])
def test_gelu_of_every_bfloat16_is_as_near_as_the_reference(isa, bias):
    """For each whole part of the argument on its own: the norm of all would hide the tail.

    Below -7, where GELU and its slope are under 1e-9, a result may be 0: there csrc/cpu/gelu.cpp's polynomials end.
    """
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()][None]

    def of(dtype: torch.dtype, backend: str) -> list[Tensor]:
        x = every.to(dtype).requires_grad_()
        with use_backend(backend):
            y = kernels.bias_gelu(x, torch.full(x.shape[1:], bias, dtype=torch.promote_types(dtype, torch.float32)))
            return [y.detach(), *torch.autograd.grad(y.sum(), x)]

    results = of(torch.bfloat16, "auto"), of(torch.bfloat16, "reference"), of(torch.float64, "reference")
    for got, reference_got, wanted in zip(*results, strict=True):
        for whole in range(-9, 9):
            here = (every.double() + bias).floor() == whole
            lost = wanted[here].norm().item() if whole < -7 else 0.0
            assert error(got[here], wanted[here]) <= max(2 * error(reference_got[here], wanted[here]), lost), whole


@pytest.mark.parametrize("columns", [1, 3, 64, 385])
def test_masks_are_the_references_to_the_bit(isa, columns):
    rows, p = 37, 0.3
    keep = reference.dropout_mask(rows, columns, p, SEED, STREAM_ID)
    ones = torch.ones(rows, columns)
    output, gradient = run([ones], lambda x: kernels.dropout(x, p=p, seed=SEED, stream_id=STREAM_ID))
    assert torch.equal(output != 0, keep)
    assert torch.equal(gradient != 0, keep)
    if columns == 1:
        return
    residual = randn(rows, columns, seed=1)
    norm = [ones, residual, torch.ones(columns), torch.zeros(columns)]
    options = {"eps": EPS, "dropout_p": p, "seed": SEED, "stream_id": STREAM_ID}
    _, of_x, of_residual, *_ = run(norm, lambda *t: kernels.dropout_add_layer_norm(*t, **options))
    assert torch.equal(of_x != 0, keep & (of_residual != 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_for_any_number_of_threads(isa, op, dtype):
    inputs, function = case(op, 300, 200, dtype, 0.1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(inputs, function))
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert torch.equal(one, another)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["bias_gelu", "dropout_add_layer_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(isa, op, value, dtype):
    inputs, function = case(op, 40, 96, dtype)
    clean = function(*inputs)
    inputs[0][7, 3] = value
    got, expected = function(*inputs), exactly(inputs, function)[0]
    assert torch.equal(got.isnan(), expected.isnan())
    others = torch.arange(40) != 7
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_large_numbers_is_the_number_or_nothing(isa, dtype):
    inputs = [torch.tensor([[-1e4, -40.0, -6.0, 0.0, 6.0, 40.0, 1e4, 3e38]], dtype=dtype), torch.zeros(8)]
    (got, gradient, _), (expected, wanted, _) = run(inputs, kernels.bias_gelu), exactly(inputs, kernels.bias_gelu)
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=1e-7)
    torch.testing.assert_close(gradient.double(), wanted, rtol=rtol, atol=1e-6)


def test_an_id_that_comes_twice_gets_both_gradients(isa):
    ids = [torch.tensor([4, 1, 4, 4]), torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 2, 3])]
    inputs, _ = case("embedding", 4, 16, torch.float32)
    function = lambda *t: kernels.embedding(*ids, *t, eps=EPS)  # noqa: E731
    ours = run(inputs, function)
    for got, wanted in zip(ours, exactly(inputs, function), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not ours[1][[0, 2, 3]].any()


@pytest.mark.parametrize("op", OPS)
def test_native_code_runs_and_the_reference_when_asked(op, needs_native, record):
    inputs, function = case(op, 5, 8, torch.float32, 0.1)
    with record() as ops:
        run(inputs, function)
    ours = {name for name in ops if name.startswith("minbert::")}
    backward = {f"minbert::{op}_backward"} if op != "dropout" else set()
    assert {f"minbert::{op}", *backward} <= ours
    assert kernels.backends("cpu")[op] == "native"
    with use_backend("reference"), record() as ops:
        run(inputs, function)
    assert not {f"minbert::{op}", *backward} & set(ops)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_other_precisions_run_the_reference(op, dtype, needs_native, record):
    inputs, function = case(op, 5, 8, dtype, 0.1)
    with record() as ops:
        function(*inputs)
    assert f"minbert::{op}" not in ops


@pytest.mark.parametrize("op", [op for op in OPS if op != "dropout"])
def test_a_second_derivative_is_refused(op, needs_native):
    inputs, function = case(op, 5, 8, torch.float32)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    (first,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        first.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_compiles_as_one_graph(op, needs_native):
    inputs, function = case(op, 5, 8, torch.float32, 0.1)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(run(inputs, compiled), run(inputs, function), strict=True):
        assert torch.equal(got, wanted)
