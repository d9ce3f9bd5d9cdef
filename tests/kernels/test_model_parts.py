"""Surgery by parts of the model: each part has the numbers that its tensors have alone; clipping is that of all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert.kernels import combine, combine_adamw_, gram, reference, surgery_weights, use_backend

Grads = list[list[Tensor | None]]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CHUNK = 1 << 16
OPTIONS: dict[str, Any] = {"step": 3, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def table_rows(seed: int, dtype: torch.dtype) -> Tensor:
    """A sparse gradient of a matrix [9, 5]."""
    rows = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[: seed % 5].sort().values
    values = randn(len(rows), 5, seed=seed, dtype=dtype)
    return torch.sparse_coo_tensor(rows[None], values, (9, 5), check_invariants=False, is_coalesced=True)


@st.composite
def gradients_by_part(draw: st.DrawFn) -> tuple[Grads, list[int], int]:
    """T tasks over tensors of mixed dtypes, some sparse, some missing; the tensors' parts, in any order; and G."""
    tasks, count = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size = st.sampled_from([0, 1, 31, 1029, 3000, None])  # None: sparse
    columns = draw(st.lists(st.tuples(size, st.sampled_from(DTYPES)), min_size=1, max_size=6))
    grads: Grads = [[] for _ in range(tasks)]
    for k, (numel, dtype) in enumerate(columns):
        for t, row in enumerate(grads):
            grad = table_rows(7 * k + t, dtype) if numel is None else randn(numel, seed=7 * k + t, dtype=dtype)
            row.append(None if draw(st.integers(0, 3)) == 0 else grad)
    return grads, [draw(st.integers(0, count - 1)) for _ in columns], count


def columns_of(lists: list[list[Any]], parts: list[int], part: int) -> list[list[Any]]:
    """The entries of a part's columns."""
    return [[each for each, number in zip(row, parts, strict=True) if number == part] for row in lists]


@quick
@given(problem=gradients_by_part())
def test_each_part_has_the_gram_matrix_of_its_tensors_alone(isa: str, problem: tuple[Grads, list[int], int]) -> None:
    grads, parts, count = problem
    result = gram(grads, parts, count)
    assert result.shape == (count, len(grads), len(grads))
    for part in range(count):
        assert same_bits(result[part], gram(columns_of(grads, parts, part)))
    with use_backend("reference"):
        expected = gram(grads, parts, count)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.sum(0), gram(grads), rtol=1e-10, atol=1e-10)
    assert same_bits(gram(grads, [0] * len(parts))[0], gram(grads))


@quick
@given(problem=gradients_by_part(), seed=st.integers(0, 99))
def test_each_part_has_the_sum_of_its_tensors_alone(isa: str, problem, seed: int) -> None:
    grads, parts, count = problem
    grads = [[None if grad is None else grad.to_dense() for grad in row] for row in grads]
    weights = randn(count, len(grads), seed=seed, dtype=torch.float64)
    result = combine(grads, weights, parts=parts)
    with use_backend("reference"):
        references = combine(grads, weights, parts=parts)
    for part in range(count):
        alone = combine(columns_of(grads, parts, part), weights[part])
        for mine, wanted in zip(columns_of([result], parts, part)[0], alone, strict=True):
            assert mine is wanted is None or same_bits(mine, wanted)
    for mine, wanted in zip(result, references, strict=True):
        assert (mine is None) == (wanted is None)
        if mine is not None:  # float32 sums of both, and a rounding to bfloat16 of each
            within = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[mine.dtype]
            torch.testing.assert_close(mine, wanted, rtol=within, atol=within)


@quick
@given(problem=gradients_by_part(), seed=st.integers(0, 99))
def test_each_part_has_the_update_of_its_tensors_alone(isa: str, problem, seed: int) -> None:
    grads, parts, count = problem
    weights = randn(count, len(grads), seed=seed, dtype=torch.float64)
    firsts = [
        next((grad for grad in column if grad is not None), torch.zeros(2)) for column in zip(*grads, strict=True)
    ]
    dtypes = [torch.float64 if first.dtype == torch.float64 else torch.float32 for first in firsts]
    state = [
        [randn(*firsts[k].shape, seed=20 * i + k, dtype=dtype).abs() for k, dtype in enumerate(dtypes)]
        for i in range(3)
    ]
    state.append([torch.zeros(first.shape, dtype=torch.bfloat16) for first in firsts])
    alone, others = copy.deepcopy(state), copy.deepcopy(state)

    def update(state: list[list[Tensor]], grads: Grads, weights: Tensor, parts: list[int] | None = None) -> None:
        params, exp_avgs, exp_avg_sqs, copies = state
        combine_adamw_(params, grads, weights, exp_avgs, exp_avg_sqs, copies=copies, parts=parts, **OPTIONS)

    update(state, grads, weights, parts)
    for part in range(count):
        update(columns_of(alone, parts, part), columns_of(grads, parts, part), weights[part])
    for mine, wanted in zip(state, alone, strict=True):
        assert all(same_bits(a, b) for a, b in zip(mine, wanted, strict=True))
    with use_backend("reference"):
        update(others, grads, weights, parts)
    torch.testing.assert_close(state[:3], others[:3], rtol=1e-4, atol=1e-4)


def test_many_chunks_of_a_part_are_summed_as_alone_for_any_number_of_threads(isa: str) -> None:
    grads = [[randn(size * CHUNK + 7, seed=10 * t + size) for size in (1, 2, 3)] for t in range(3)]
    parts = [1, 0, 1]
    expected = torch.stack([gram(columns_of(grads, parts, part)) for part in range(2)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert same_bits(gram(grads, parts), expected)


def test_parts_without_gradients_have_zeros(isa: str) -> None:
    grads: Grads = [[randn(4), None, None], [randn(4, seed=1), None, None]]
    result = gram(grads, [2, 0, 1], 5)
    assert not result[[0, 1, 3, 4]].any()
    assert same_bits(result[2], gram(grads))
    assert torch.equal(gram([[None, None]], [0, 1]), torch.zeros(2, 1, 1, dtype=torch.float64))
    assert torch.equal(gram([[], []], [], 3), torch.zeros(3, 2, 2, dtype=torch.float64))


# Weights ---------------------------------------------------------------------------------------------------------


def problem_of(parts: int, tasks: int, elements: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gram matrices of random gradients, many of which conflict if they have few elements; and orders."""
    rows = randn(parts, tasks, elements, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(tasks, generator=generator) for _ in range(parts * tasks)]
    return rows @ rows.mT, torch.stack(orders).view(parts, tasks, tasks)


@quick
@given(
    parts=st.integers(1, 5),
    tasks=st.integers(1, 6),
    seed=st.integers(0, 999),
    reduction=st.sampled_from(["sum", "mean"]),
    max_norm=st.sampled_from([0.0, 1e-3, 1.0, 1e6]),
)
def test_weights_equal_the_reference_to_the_bit(isa: str, parts, tasks, seed, reduction, max_norm) -> None:
    matrices, orders = problem_of(parts, tasks, 1 + seed % 9, seed)
    own, weights = torch.tensor(0.5 * (seed % 3), dtype=torch.float64), randn(parts, tasks, dtype=torch.float64)
    for given_ in ({"orders": orders}, {"weights": weights}, {}):
        options: dict[str, Any] = {"reduction": reduction, "own_square": own, "max_norm": max_norm, **given_}
        result = surgery_weights(matrices, **options)
        with use_backend("reference"):
            expected = surgery_weights(matrices, **options)
        assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))


@quick
@given(parts=st.integers(1, 5), tasks=st.integers(1, 6), seed=st.integers(0, 999))
def test_each_part_has_weights_of_its_own_and_all_one_norm(isa: str, parts: int, tasks: int, seed: int) -> None:
    matrices, orders = problem_of(parts, tasks, 3, seed)
    weights, stats = surgery_weights(matrices, orders=orders)
    alone = [surgery_weights(matrix, orders=order) for matrix, order in zip(matrices, orders, strict=True)]
    assert same_bits(weights, torch.stack([of_part for of_part, _ in alone]))
    norms = torch.stack([of_part[0] for _, of_part in alone])
    assert stats[0].item() == pytest.approx(norms.norm().item(), rel=1e-12, abs=1e-12)
    ones = torch.ones(parts, tasks, 1, dtype=torch.float64)
    change = weights[..., None] - ones
    share = ((change.mT @ matrices @ change).sum() / (ones.mT @ matrices @ ones).sum()).clamp(min=0).sqrt()
    assert stats[3].item() == pytest.approx(share.item(), rel=1e-6, abs=1e-6)
    limit = stats[0].item() / 2
    clipped, clipped_stats = surgery_weights(matrices, orders=orders, max_norm=limit)
    assert torch.equal(clipped, weights * clipped_stats[1])
    after = sum((w @ matrix @ w).item() for w, matrix in zip(clipped, matrices, strict=True))
    assert max(after, 0) ** 0.5 == pytest.approx(limit, rel=1e-9, abs=1e-9)


def test_one_part_has_the_bits_of_the_whole_model(isa: str) -> None:
    matrices, orders = problem_of(1, 4, 3, seed=5)
    result, expected = (
        surgery_weights(matrices, orders=orders, max_norm=0.5),
        surgery_weights(matrices[0], orders=orders[0], max_norm=0.5),
    )
    assert same_bits(result[0][0], expected[0])
    assert same_bits(result[1], expected[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_in_a_part_marks_the_update_and_clips_nothing(isa: str, poison: float) -> None:
    matrices, orders = problem_of(3, 3, 2, seed=4)
    healthy, _ = surgery_weights(matrices, orders=orders)
    matrices[1, 0, 2] = matrices[1, 2, 0] = poison
    weights, stats = surgery_weights(matrices, orders=orders, max_norm=0.1)
    assert weights[1].tolist() == [1, 1, 1]
    assert same_bits(weights[[0, 2]], healthy[[0, 2]])
    assert stats[1:3].tolist() == [1, 0]
    assert not stats[0].isfinite()
    assert not reference.surgery_weights(matrices, orders, None, None, 0.1, False)[1][0].isfinite()
