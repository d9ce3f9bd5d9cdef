"""Parameters as one view per task: each view gets the gradient of its task's rows, and nothing else changes."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert import kernels
from minbert.kernels import use_backend

SEED, STREAM_ID, EPS, P = torch.tensor([-(2**41) + 5, 70]), 9, 1e-12, 0.2
OPS = ("linear", "bias_gelu", "dropout_add_layer_norm", "embedding")
TABLES = (50, 2, 40)  # rows of the embedding tables
COLUMNS = 20
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(op: str, rows: int, dtype: torch.dtype, draw: int = 0):
    """Inputs with a row for each token, parameters, and the op as a function of both; `draw` gives other numbers."""
    first = 1000 * draw
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual = (randn(rows, COLUMNS, seed=first + i, dtype=dtype) for i in range(2))
    weight, bias = (randn(COLUMNS, seed=first + i, dtype=parameter) for i in (2, 3))
    drop = {"eps": EPS, "dropout_p": P, "seed": SEED, "stream_id": STREAM_ID}
    if op == "linear":
        matrix = randn(7, COLUMNS, seed=first + 4, dtype=parameter)
        return [x], [matrix, bias[:7].clone()], kernels.linear
    if op == "bias_gelu":
        return [x], [bias], kernels.bias_gelu
    if op == "dropout_add_layer_norm":
        return [x, residual], [weight, bias], lambda *t, **k: kernels.dropout_add_layer_norm(*t, **drop, **k)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(size, (rows,), generator=generator) for size in TABLES]
    tables = [randn(size, COLUMNS, seed=first + 5 + i, dtype=parameter) for i, size in enumerate(TABLES)]
    return [], [*tables, weight, bias], lambda *t, **k: kernels.embedding(*ids, *t, **drop, dtype=dtype, **k)


def by_views(inputs: list[Tensor], params: list[Tensor], function, bounds: list[int], draw: int = 0):
    """The output, the inputs' gradients, and the gradient of every view, under one backward."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    views = [[param.detach().requires_grad_() for _ in pairwise(bounds)] for param in params]
    output = function(*inputs, *views, bounds=bounds)
    output.backward(randn(*output.shape, seed=99 + 1000 * draw, dtype=output.dtype))
    return output.detach(), [tensor.grad for tensor in inputs], [[view.grad for view in each] for each in views]


def by_backwards(inputs: list[Tensor], params: list[Tensor], function, bounds: list[int], draw: int = 0):
    """The same of the op with whole parameters, by one backward per task that sees that task's rows alone."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    params = [param.detach().requires_grad_() for param in params]
    output = function(*inputs, *params)
    whole = randn(*output.shape, seed=99 + 1000 * draw, dtype=output.dtype)
    of_inputs = torch.autograd.grad(output, inputs, whole) if inputs else []
    of_tasks = []
    for start, end in pairwise(bounds):
        grad = torch.zeros_like(whole)
        grad[start:end] = whole[start:end]
        of_tasks.append(torch.autograd.grad(function(*inputs, *params), params, grad))
    return output.detach(), list(of_inputs), [list(each) for each in zip(*of_tasks, strict=True)]


def cuts(rows: int) -> st.SearchStrategy[list[int]]:
    """Bounds of one to four tasks, some perhaps without rows."""
    inner = st.lists(st.integers(0, rows), min_size=0, max_size=3)
    return inner.map(lambda ends: [0, *sorted(ends), rows])


@pytest.mark.parametrize("op", OPS)
@quick
@given(data=st.data(), rows=st.integers(1, 150))
def test_the_reference_gives_each_task_its_gradient(op, data, rows):
    arguments = *case(op, rows, torch.float64), data.draw(cuts(rows))
    with use_backend("reference"):
        output, of_inputs, of_views = by_views(*arguments)
        expected = by_backwards(*arguments)
    torch.testing.assert_close(output, expected[0], rtol=1e-12, atol=1e-12)
    for got, wanted in zip(of_inputs, expected[1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    for each, wanted_each in zip(of_views, expected[2], strict=True):
        for got, wanted in zip(each, wanted_each, strict=True):
            torch.testing.assert_close(torch.zeros_like(wanted) if got is None else got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
@quick
@given(data=st.data(), rows=st.integers(1, 150))
def test_compiled_code_is_as_near_to_float64_as_the_reference(isa, op, dtype, data, rows):
    bounds = data.draw(cuts(rows))
    mine, theirs, noise = errors(op, rows, dtype, bounds)
    if (mine > 2 * theirs + noise).any():  # few numbers may be exact by luck: then those of many draws count
        mine, theirs, noise = (
            torch.stack(each).square().mean(0).sqrt()
            for each in zip(*(errors(op, rows, dtype, bounds, draw) for draw in range(32)), strict=True)
        )
    assert (mine <= 2 * theirs + noise).all()


def errors(op: str, rows: int, dtype: torch.dtype, bounds: list[int], draw: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Of each result: the error of compiled code, that of the reference, and what float32 rounds."""
    inputs, params, function = case(op, rows, dtype, draw)
    ours = by_views(inputs, params, function, bounds, draw)
    with use_backend("reference"):
        theirs = by_backwards(inputs, params, function, bounds, draw)
        _, _, exact_function = case(op, rows, torch.float64, draw)
        exact = by_backwards([t.double() for t in inputs], [t.double() for t in params], exact_function, bounds, draw)
    results = list(zip(_flat(ours), _flat(theirs), _flat(exact), strict=True))
    return (
        torch.stack([(got.double() - wanted).norm() for got, _, wanted in results]),
        torch.stack([(reference.double() - wanted).norm() for _, reference, wanted in results]),
        torch.stack([4e-7 * (wanted.norm() + wanted.numel() ** 0.5) for _, _, wanted in results]),
    )


def test_a_reference_that_is_exact_by_luck_is_no_bound(isa):
    """The case of a bias whose gradient sums three rows."""
    test_compiled_code_is_as_near_to_float64_as_the_reference.hypothesis.inner_test(
        isa, "linear", torch.bfloat16, SimpleNamespace(draw=lambda strategy: [0, 6, 8, 11]), 11
    )


def _flat(result) -> list[Tensor]:
    output, of_inputs, of_views = result
    return [output, *of_inputs, *(view for each in of_views for view in each)]


@pytest.mark.parametrize("op", OPS)
def test_one_view_is_the_plain_parameter_to_the_bit(isa, op):
    arguments = *case(op, 77, torch.float32), [0, 77]
    for got, wanted in zip(_flat(by_views(*arguments)), _flat(by_backwards(*arguments)), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("op", OPS)
def test_views_leave_the_output_and_the_inputs_gradients_as_they_are(isa, op):
    inputs, params, function = case(op, 77, torch.float32)
    whole, split = (by_views(inputs, params, function, bounds) for bounds in ([0, 77], [0, 5, 40, 77]))
    assert torch.equal(whole[0], split[0])
    assert all(torch.equal(*pair) for pair in zip(whole[1], split[1], strict=True))


@pytest.mark.parametrize("op", OPS)
def test_a_task_without_rows_has_a_gradient_of_zeros(needs_native, op):
    _, _, of_views = by_views(*case(op, 9, torch.float32), [0, 4, 4, 9])
    assert all(not each[1].any() and each[0].any() and each[2].any() for each in of_views)


@pytest.mark.parametrize("op", OPS)
def test_compiles_as_one_graph(needs_native, op):
    inputs, params, function = case(op, 9, torch.float32)
    views = [[param.detach().requires_grad_() for _ in range(2)] for param in params]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs, *views, bounds=[0, 4, 9]), function(*inputs, *params))


@pytest.mark.parametrize("op", OPS)
def test_whole_parameters_take_no_notice_of_bounds(op):
    inputs, params, function = case(op, 9, torch.float32)
    assert torch.equal(function(*inputs, *params, bounds=[0, 4, 9]), function(*inputs, *params))


X, BIAS = torch.ones(6, 4), torch.ones(4)
TWO = [BIAS.detach(), BIAS.detach()]


@pytest.mark.parametrize(
    ("bias", "bounds", "message"),
    [
        (TWO, None, r"bias_gelu: parameters given as one view per task need bounds, the rows of each task; got None"),
        (TWO, [0, 6], r"bias_gelu: bias must hold a view for each of 1 tasks, got 2"),
        (TWO, [0, 7, 6], r"bias_gelu: bounds must rise from 0 to the 6 rows of x, got \[0, 7, 6\]"),
        (TWO, [0, 2, 5], r"bias_gelu: bounds must rise from 0 to the 6 rows of x, got \[0, 2, 5\]"),
        (
            [BIAS, torch.ones(4)],
            [0, 3, 6],
            r"bias_gelu: bias\[1\] must be a view of all of bias\[0\]; write param.detach",
        ),
        ([BIAS, 3], [0, 3, 6], r"bias_gelu: bias\[1\] must be a tensor, got int"),
    ],
)
def test_wrong_views_are_named(bias, bounds, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.bias_gelu(X, bias, bounds=bounds)


def test_a_parameter_that_is_not_split_like_the_others_is_named():
    with pytest.raises(ValueError, match=r"linear: bias must be a list of 2 views like the others, got a tensor"):
        kernels.linear(X, [torch.ones(4, 4)] * 2, BIAS, bounds=[0, 3, 6])
