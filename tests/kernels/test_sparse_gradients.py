"""Sparse gradients of an embedding table: the dense ones' numbers, from the rows that tokens name alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert import kernels
from minbert.kernels import combine, combine_adamw_, gram, reference, use_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
OPTIONS: dict[str, Any] = {"step": 3, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
CHUNK = 1 << 16
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Grads = list[list[Tensor | None]]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows_of(table: tuple[int, int], rows: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A sparse matrix with numbers in these rows, which rise."""
    values = randn(len(rows), table[1], seed=seed, dtype=dtype)
    return sparse([rows], values, table)


def sparse(rows: list[list[int]], values: Tensor, shape: tuple[int, int], *, coalesced: bool = True) -> Tensor:
    indices = torch.tensor(rows, dtype=torch.int64)
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=False, is_coalesced=coalesced)


def dense(grads: Grads) -> Grads:
    return [[None if grad is None else grad.to_dense() for grad in row] for row in grads]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@st.composite
def task_gradients(draw: st.DrawFn) -> Grads:
    """T tasks over a table, of which each has some rows, none, or no gradient at all; and over a dense tensor."""
    tasks, dtype = draw(st.integers(1, 5)), draw(st.sampled_from(DTYPES))
    table = draw(st.sampled_from([1, 7, 40])), draw(st.sampled_from([1, 5, 32, 64, 1030]))
    grads: Grads = []
    for t in range(tasks):
        rows = sorted(draw(st.sets(st.integers(0, table[0] - 1))))
        grad = None if draw(st.integers(0, 4)) == 0 else rows_of(table, rows, seed=t, dtype=dtype)
        grads.append([grad, randn(9, seed=50 + t)])
    return grads


@quick
@given(grads=task_gradients())
def test_gram_is_within_the_summation_bound(isa: str, grads: Grads) -> None:
    sizes = [[None if grad is None else grad.double().abs() for grad in row] for row in dense(grads)]
    elements = sum(max(0 if row[k] is None else row[k].numel() for row in sizes) for k in range(2))
    bound = 2 * (elements + 1) * 2.0**-53 * reference.gram(sizes)  # Higham 2002, section 4.2
    assert ((gram(grads) - reference.gram(dense(grads))).abs() <= bound).all()
    with use_backend("reference"):
        assert torch.equal(gram(grads), reference.gram(dense(grads)))


@quick
@given(grads=task_gradients(), seed=st.integers(0, 1000))
def test_an_update_has_the_bits_of_the_dense_gradients(isa: str, grads: Grads, seed: int) -> None:
    weights = randn(len(grads), seed=seed, dtype=torch.float64)
    table = next((row[0] for row in grads if row[0] is not None), None)
    shapes = [(1, 1) if table is None else tuple(table.shape), (9,)]
    dtypes = [torch.float64 if table is not None and table.dtype == torch.float64 else torch.float32, torch.float32]
    pairs = list(zip(shapes, dtypes, strict=True))
    state = [[randn(*of, seed=10 * i + k, dtype=dtype).abs() for k, (of, dtype) in enumerate(pairs)] for i in range(4)]
    copies = [torch.zeros(shapes[0], dtype=torch.bfloat16), None]
    found = []
    for given_ in (grads, dense(grads)):
        params, *moments, ema = mine = copy.deepcopy(state)
        written = copy.deepcopy(copies)
        combine_adamw_(params, given_, weights, *moments, ema=ema, ema_decay=0.3, copies=written, **OPTIONS)
        found.append([*(tensor for part in mine for tensor in part), written[0]])
    if shapes[0][1] % 32 == 0:  # else a row's numbers are computed in other registers, whose average rounds otherwise
        assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=2 * torch.finfo(a.dtype).eps)
    changed = table is not None
    assert (not same_bits(found[0][0], state[0][0])) == changed  # rows without gradients decay as well


@pytest.mark.parametrize("columns", [48, CHUNK + 5])
def test_neither_gram_nor_update_depends_on_the_thread_count(isa: str, columns: int) -> None:
    table, found = (400 if columns == 48 else 6, columns), []
    some = [[0, 1, 3], [2, 3], [0, 3, 5]]
    grads: Grads = [[rows_of(table, some[t] + list(range(6, table[0], t + 2)), seed=t)] for t in range(3)]
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        state = [[randn(*table, seed=i).abs()] for i in range(3)]
        products = gram(grads)
        combine_adamw_(state[0], grads, products[0], *state[1:], **OPTIONS)
        found.append([products, *(part[0] for part in state)])
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_a_nan_stays_with_its_task(isa: str) -> None:
    one, two, three = rows_of((6, 8), [1, 4]), rows_of((6, 8), [2, 4], seed=1), rows_of((6, 8), [0, 3], seed=2)
    one.values()[0, 3] = torch.nan  # row 1, which no other task has
    products = gram([[one], [two], [three]])
    assert products.isnan().tolist() == [[True, False, False], [False] * 3, [False] * 3]
    assert products[0, 2] == 0


def embed(table: list[Tensor], ids: Tensor, bounds: list[int], dtype: torch.dtype, *, sparse: bool) -> list[Any]:
    """The output of the embedding block, and the gradients of three parameters' views, the words' first."""
    of_words, positions, norms = ([tensor.detach().requires_grad_() for _ in bounds[1:]] for tensor in table)
    types = [tensor[:2].detach().requires_grad_() for tensor in positions]
    drop = {"dropout_p": 0.2, "seed": torch.tensor([3, 70]), "stream_id": 4}
    norms = [views.detach().requires_grad_() for views in norms]
    other = torch.arange(len(ids)) % 2
    y = kernels.embedding(
        *(ids, other, other + 3, of_words, types, positions, norms, norms),
        **{"eps": 1e-5, "dtype": dtype, "bounds": bounds, "sparse": sparse, **drop},
    )
    y.backward(randn(*y.shape, seed=9, dtype=dtype))
    return [y.detach(), [view.grad for view in of_words], [view.grad for view in (*types, *positions, *norms)]]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_embedding_gives_the_same_gradient(isa: str, dtype: torch.dtype, backend: str) -> None:
    tokens, bounds = 300, [0, 90, 90, 91, 300]  # the second task has no token, the third one
    ids = torch.randint(60, (tokens,), generator=torch.Generator().manual_seed(1))
    ids[90] = ids[91] = 77
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    table = [randn(*shape, seed=i, dtype=parameter) for i, shape in enumerate([(80, 24), (9, 24), (24,)])]
    with use_backend(backend):
        y, words, others = embed(table, ids, bounds, dtype, sparse=True)
        expected = embed(table, ids, bounds, dtype, sparse=False)
    assert same_bits(y, expected[0])
    for grad, wanted, start, end in zip(words, expected[1], bounds[:-1], bounds[1:], strict=True):
        assert (grad is None) == (wanted is None)  # the reference gives a task without tokens none
        if grad is None:
            continue
        rows = grad.coalesce().indices()[0]
        assert torch.equal(rows, ids[start:end].unique())
        assert grad.dtype == parameter
        assert torch.equal(grad.to_dense(), wanted)
        if backend == "auto" and dtype != torch.float64:  # one row of values for each id
            assert torch.equal(grad._indices()[0], rows)
    assert all(a is b is None or same_bits(a, b) for a, b in zip(others, expected[2], strict=True))


def test_the_embeddings_gradient_does_not_depend_on_the_thread_count(isa: str) -> None:
    tokens, found = 5000, []
    ids = torch.randint(1000, (tokens,), generator=torch.Generator().manual_seed(1))
    table = [randn(*shape, seed=i) for i, shape in enumerate([(1000, 24), (9, 24), (24,)])]
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        _, words, _ = embed(table, ids, [0, 4000, tokens], torch.float32, sparse=True)
        found.append([part for grad in words for part in (grad._indices(), grad._values())])
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


MATRIX = rows_of((6, 8), [1, 4])
TWICE = sparse([[1, 1]], torch.ones(2, 8), (6, 8), coalesced=False)
OTHER = sparse([[1], [1]], torch.ones(1), (6, 8))
STATE = [[torch.zeros(6, 8)], [torch.zeros(6, 8)], [torch.zeros(6, 8)]]
ONE = torch.ones(1, dtype=torch.float64)
REFUSED: list[tuple[Callable[[], object], str]] = [
    (
        lambda: combine([[MATRIX]], ONE),
        "combine: grads[0][0] must be dense, got a sparse tensor on cpu; call .to_dense() on it",
    ),
    (lambda: gram([[TWICE]]), "gram: grads[0][0] must be coalesced; call .coalesce() on it"),
    (lambda: gram([[MATRIX], [TWICE]]), "gram: grads[1][0] must be coalesced; call .coalesce() on it"),
    (
        lambda: gram([[OTHER]]),
        "gram: grads[0][0] must be dense or have sparse rows (sparse_dim 1 and dense_dim 1), got sparse_dim 2 and "
        "dense_dim 0",
    ),
    (
        lambda: gram([[MATRIX], [torch.zeros(6, 8)]]),
        "gram: grads[1][0] must be laid out like its tensor in the other tasks; call .contiguous() on both",
    ),
    (
        lambda: gram([[MATRIX], [rows_of((7, 8), [1])]]),
        "gram: grads[1][0] must have shape [6, 8] like its tensor in the other tasks, got [7, 8]",
    ),
    (
        lambda: combine_adamw_([torch.zeros(5, 8)], [[MATRIX]], ONE, *STATE[1:], **OPTIONS),
        "combine_adamw_: params[0] must have shape [6, 8], got [5, 8]",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message.split(";")[0][:60] for _, message in REFUSED])
def test_what_cannot_be_right_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as found:  # noqa: PT011
        call()
    assert str(found.value) == message


def test_numbers_of_rows_may_lie_apart_in_memory(needs_native: None) -> None:
    pairs = torch.tensor([[1, 0], [2, 0], [5, 0]])
    rows = pairs[:, 0][None]
    strided = torch.sparse_coo_tensor(rows, randn(3, 4), (10, 4), check_invariants=False, is_coalesced=True)
    assert not strided.indices()[0].is_contiguous()
    grads: Grads = [[strided], [rows_of((10, 4), [0, 2, 3], seed=1)]]
    torch.testing.assert_close(gram(grads), gram(dense(grads)))
    weights = torch.tensor([1.0, -0.5], dtype=torch.float64)
    results = []
    for each in (grads, dense(grads)):
        state = [[torch.ones(10, 4)] for _ in range(3)]
        combine_adamw_(state[0], each, weights, state[1], state[2], **OPTIONS)
        optimizer_state = [row[0] for row in state]
        results.append(torch.stack(optimizer_state))
    torch.testing.assert_close(*results)
