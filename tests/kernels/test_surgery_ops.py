"""gram, surgery_weights and combine: exact enough, repeatable, and indifferent to where the gradients lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert.kernels import clip_weights, combine, gram, reference, surgery_weights, use_backend
from minbert.methods.surgery import mean_weights, pcgrad_weights, sum_weights

Grads = list[list[Tensor | None]]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
CHUNK = 1 << 16
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def task_gradients(draw: st.DrawFn) -> Grads:
    """T tasks over K tensors of mixed dtypes, at any alignment, some of them missing."""
    tasks = draw(st.integers(1, 8))
    columns = draw(
        st.lists(
            st.tuples(st.sampled_from([0, 1, 5, 31, 1024, 1029, 3000]), st.sampled_from(DTYPES), st.integers(0, 3)),
            min_size=1,
            max_size=4,
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    grads: Grads = [[] for _ in range(tasks)]
    for size, dtype, shift in columns:
        for row in grads:
            values = torch.randn(size + shift, generator=generator, dtype=torch.float64).to(dtype)[shift:]
            row.append(None if draw(st.integers(0, 3)) == 0 else values)
    return grads


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def magnitudes(grads: Grads) -> Grads:
    return [[None if g is None else g.double().abs() for g in row] for row in grads]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@quick
@given(grads=task_gradients())
def test_gram_is_within_the_summation_bound(isa: str, grads: Grads) -> None:
    elements = sum(max(0 if row[k] is None else row[k].numel() for row in grads) for k in range(len(grads[0])))
    bound = 2 * (elements + 1) * ROUNDOFF[torch.float64] * reference.gram(magnitudes(grads))  # Higham 2002, section 4.2
    assert ((gram(grads) - reference.gram(grads)).abs() <= bound).all()


@quick
@given(grads=task_gradients(), seed=st.integers(0, 1000))
def test_combine_is_within_the_rounding_bound(isa: str, grads: Grads, seed: int) -> None:
    weights = randn(len(grads), seed=seed, dtype=torch.float64)
    wide = [[None if g is None else g.double() for g in row] for row in grads]
    exact, size = reference.combine(wide, weights), reference.combine(magnitudes(grads), weights.abs())
    for column, result in enumerate(combine(grads, weights)):
        if exact[column] is None:
            assert result is None
            continue
        first = next(row[column] for row in grads if row[column] is not None)
        assert result.dtype == first.dtype
        assert result.shape == first.shape
        steps = (len(grads) + 1) * ROUNDOFF[torch.float64 if first.dtype == torch.float64 else torch.float32]
        bound = (2 * steps + (ROUNDOFF[torch.bfloat16] if first.dtype == torch.bfloat16 else 0)) * size[column]
        assert ((result.double() - exact[column]).abs() <= 1.01 * bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_combine_errs_no_more_than_twice_the_reference(isa: str, tasks: int, dtype: torch.dtype) -> None:
    grads = [[randn(CHUNK + 77, seed=t, dtype=dtype)] for t in range(tasks)]
    weights = randn(tasks, seed=9, dtype=torch.float64)
    wide = torch.stack([row[0].to(torch.float64) for row in grads])
    exact = (weights[:, None] * wide).sum(0)

    def error(result: Tensor | None) -> float:
        return (result.double() - exact).abs().max().item()

    # float64 has no wider type to measure it in: there both are held to one more rounding of the largest element
    slack = 2.0**-52 * exact.abs().max().item() if dtype == torch.float64 else 0.0
    assert error(combine(grads, weights)[0]) <= 2 * error(reference.combine(grads, weights)[0]) + slack


@pytest.mark.parametrize("tasks", [1, 3, 6])
def test_gram_and_combine_do_not_depend_on_the_thread_count(isa: str, tasks: int) -> None:
    grads = [[randn(3 * CHUNK + 11, seed=t), randn(77, 5, seed=t + 50)] for t in range(tasks)]
    weights = randn(tasks, dtype=torch.float64)
    torch.set_num_threads(1)
    expected_gram, expected_sum = gram(grads), combine(grads, weights)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert same_bits(gram(grads), expected_gram)
        assert all(same_bits(a, b) for a, b in zip(combine(grads, weights), expected_sum, strict=True))


def test_gram_is_symmetric_and_counts_missing_tensors_as_zeros(isa: str) -> None:
    grads: Grads = [[randn(40), None], [randn(40, seed=1), randn(9, seed=2)], [None, randn(9, seed=3)]]
    filled = [[torch.zeros(n) if g is None else g for g, n in zip(row, (40, 9), strict=True)] for row in grads]
    result = gram(grads)
    assert same_bits(result, result.T.contiguous())
    assert same_bits(result, gram(filled))
    assert result[0, 2] == 0


def test_gram_of_no_tensor_at_all_is_zero() -> None:
    assert torch.equal(gram([[None, None], [None, None]]), torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(gram([[], []]), torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_with_its_task(isa: str, poison: float) -> None:
    grads: Grads = [[randn(2000, seed=t), randn(30, seed=t + 9)] for t in range(4)]
    healthy = gram(grads)
    grads[1][0][1234] = poison
    grads[3][0] = None  # orthogonal to the sick tensor: only the second tensor counts
    result = gram(grads)
    assert not result[1, 1].isfinite()
    assert not result[1, [0, 2]].isfinite().any()
    assert result[1, 3].isfinite()
    assert torch.equal(result[[0, 0, 2], [0, 2, 2]], healthy[[0, 0, 2], [0, 2, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_passes_nan_and_infinity_on(isa: str, dtype: torch.dtype) -> None:
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0, 3.4e38, -0.0], dtype=dtype)
    for size in (6, 6 * 11):  # within a register, and over many
        grads: Grads = [[special.repeat(size // 6)], [torch.ones(size, dtype=dtype)]]
        weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
        result, expected = combine(grads, weights)[0], reference.combine(grads, weights)[0]
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result[~result.isnan()], expected[~expected.isnan()])


def test_rounding_to_bfloat16_keeps_every_nan(isa: str) -> None:
    """The NaN whose bits are all ones would round up to zero."""
    weights = torch.tensor([2**63 - 1]).view(torch.float64)
    assert combine([[torch.ones(70, dtype=torch.bfloat16)]], weights)[0].isnan().all()


@pytest.mark.parametrize("size", [1, 63, 5000, 5 * 1024 * 1024 + 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_writes_every_element_of_out(isa: str, dtype: torch.dtype, size: int) -> None:
    """The largest size takes the streaming stores."""
    grads: Grads = [[torch.arange(size).remainder(61).to(dtype)], [torch.arange(size).remainder(7).to(dtype)]]
    out = [torch.full((size,), float("nan"), dtype=dtype)]
    results = combine(grads, torch.tensor([1.0, -2.0], dtype=torch.float64), out)
    assert results[0] is out[0]
    assert torch.equal(out[0], grads[0][0] - 2 * grads[1][0])  # small whole numbers: exact


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("size", [100, 5 * 1024 * 1024])
def test_combine_may_write_over_one_of_the_gradients(isa: str, task: int, size: int) -> None:
    grads: Grads = [[randn(size, seed=t), None if t else randn(8)] for t in range(3)]
    weights = torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64)
    expected = combine(grads, weights)
    out = [grads[task][0], grads[0][1]]
    results = combine(grads, weights, out)
    assert [r.data_ptr() for r in results] == [o.data_ptr() for o in out]
    assert all(same_bits(a, b) for a, b in zip(out, expected, strict=True))


def test_a_position_without_gradients_gives_none_and_leaves_out_alone(isa: str) -> None:
    untouched = torch.full((3,), 7.0)
    grads: Grads = [[randn(4), None], [randn(4, seed=1), None]]
    results = combine(grads, torch.ones(2, dtype=torch.float64), [torch.empty(4), untouched])
    assert results[1] is None
    assert (untouched == 7).all()


def test_gradients_may_be_transposed_as_long_as_all_are(isa: str) -> None:
    grads: Grads = [[randn(30, 50, seed=t).T] for t in range(3)]
    straight: Grads = [[row[0].T] for row in grads]
    weights = randn(3, dtype=torch.float64)
    assert same_bits(gram(grads), gram(straight))
    result = combine(grads, weights)[0]
    assert result.shape == (50, 30)
    assert same_bits(result.T, combine(straight, weights)[0])


def test_the_chosen_backend_runs(record, needs_native: None) -> None:
    grads: Grads = [[randn(4)], [randn(4, seed=1)]]

    def surgery() -> list[str]:
        with record() as ops:
            combine(grads, gram(grads)[0].contiguous())
        return [op for op in ops if op.startswith("minbert::")]

    assert surgery() == ["minbert::gram", "minbert::combine_"]
    with use_backend("reference"):
        assert surgery() == []


# Weights ---------------------------------------------------------------------------------------------------------


def walks(tasks: int, seed: int) -> Tensor:
    """The orders that `pcgrad_weights` draws from a generator of this seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tasks, generator=generator) for _ in range(tasks)])


def gram_of(tasks: int, elements: int, seed: int) -> Tensor:
    """Of random gradients; many conflict if they have few elements."""
    rows = randn(tasks, elements, seed=seed, dtype=torch.float64)
    return rows @ rows.T


SUMS = st.sampled_from(["sum", "mean"])
NORMS = st.sampled_from([0.0, 1e-3, 1.0, 1e6])


@quick
@given(tasks=st.integers(1, 9), elements=st.integers(1, 12), seed=st.integers(0, 999), reduction=SUMS, max_norm=NORMS)
def test_weights_equal_the_reference_to_the_bit(isa: str, tasks, elements, seed, reduction, max_norm) -> None:
    matrix, own = gram_of(tasks, elements, seed), torch.tensor(0.5 * (seed % 3), dtype=torch.float64)
    weights = randn(tasks, seed=seed, dtype=torch.float64)
    for given_ in ({"orders": walks(tasks, seed)}, {"weights": weights}, {}):
        options = {"reduction": reduction, "own_square": own, "max_norm": max_norm, **given_}
        result = surgery_weights(matrix, **options)
        with use_backend("reference"):
            expected = surgery_weights(matrix, **options)
        assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))


@quick
@given(tasks=st.integers(1, 9), elements=st.integers(1, 12), seed=st.integers(0, 999), reduction=SUMS)
def test_weights_are_those_of_pcgrad_for_the_same_orders(isa: str, tasks, elements, seed, reduction) -> None:
    matrix = gram_of(tasks, elements, seed)
    weights, stats = surgery_weights(matrix, orders=walks(tasks, seed), reduction=reduction)
    assert same_bits(weights, pcgrad_weights(matrix, torch.Generator().manual_seed(seed), reduction))
    plain = sum_weights(matrix) if reduction == "sum" else mean_weights(matrix)
    removed = weights - plain
    share = ((removed @ matrix @ removed).clamp(min=0) / (plain @ matrix @ plain)).sqrt().item()
    assert stats[3].item() == pytest.approx(share, rel=1e-6, abs=1e-6, nan_ok=True)
    assert stats[0].item() == pytest.approx((weights @ matrix @ weights).clamp(min=0).sqrt().item(), abs=1e-6)


@quick
@given(tasks=st.integers(1, 6), seed=st.integers(0, 999), max_norm=NORMS, own=st.floats(0, 9))
def test_clipping_is_that_of_all_gradients_together(
    isa: str, tasks: int, seed: int, max_norm: float, own: float
) -> None:
    matrix, weights = gram_of(tasks, 9, seed), randn(tasks, seed=seed, dtype=torch.float64)
    square = torch.tensor(own, dtype=torch.float64)
    clipped, (norm, scale, finite, _) = surgery_weights(matrix, weights=weights, own_square=square, max_norm=max_norm)
    assert finite == 1
    assert norm.item() == pytest.approx(((weights @ matrix @ weights).clamp(min=0) + own).sqrt().item(), rel=1e-9)
    assert torch.equal(clipped, weights * scale)
    after = (clipped @ matrix @ clipped).clamp(min=0) + square * scale**2
    assert after.sqrt().item() == pytest.approx(min(norm.item(), max_norm or norm.item()), rel=1e-9)
    alone, of_norm = clip_weights(matrix, weights, max_norm or 1e9)
    if own == 0:
        torch.testing.assert_close((clipped, norm), (alone, of_norm), rtol=1e-9, atol=1e-12)


def test_gradients_that_do_not_conflict_are_left_alone(isa: str) -> None:
    rows = randn(4, 30, dtype=torch.float64).abs()
    weights, stats = surgery_weights(rows @ rows.T, orders=walks(4, 1))
    assert weights.tolist() == [1, 1, 1, 1]
    assert stats[1:].tolist() == [1, 1, 0]
    weights, stats = surgery_weights(rows @ rows.T, reduction="mean")
    assert weights.tolist() == [0.25] * 4
    assert stats[3] == 0


@quick
@given(seed=st.integers(0, 999))
def test_the_projected_sum_of_two_conflicts_with_neither(isa: str, seed: int) -> None:
    matrix = gram_of(2, 3, seed)
    weights, _ = surgery_weights(matrix, orders=walks(2, seed))
    assert (matrix @ weights >= -1e-12 * matrix.abs().max()).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_projects_nothing_clips_nothing_and_is_marked(isa: str, poison: float) -> None:
    matrix, own = gram_of(3, 2, seed=4), torch.tensor(poison, dtype=torch.float64)
    sick = matrix.clone()
    sick[1, 2] = sick[2, 1] = poison
    for weights, stats in (
        surgery_weights(sick, orders=walks(3, 0), max_norm=0.1),
        surgery_weights(matrix, own_square=own, max_norm=0.1),
    ):
        assert weights.tolist() == [1, 1, 1]
        assert stats[1:3].tolist() == [1, 0]
        assert not stats[0].isfinite()


def test_gradients_of_zero_have_weights_and_a_norm_of_zero(isa: str) -> None:
    weights, stats = surgery_weights(torch.zeros(3, 3, dtype=torch.float64), orders=walks(3, 0), max_norm=1.0)
    assert weights.tolist() == [1, 1, 1]
    assert stats[:3].tolist() == [0, 1, 1]
    assert stats[3].isnan()


def test_the_stride_of_a_dimension_of_one_does_not_matter(needs_native: None) -> None:
    row, turned = torch.arange(4.0)[None], torch.ones(4, 1).t()
    assert row.stride() != turned.stride()
    torch.testing.assert_close(gram([[row], [turned]]), torch.tensor([[14.0, 6.0], [6.0, 4.0]], dtype=torch.float64))
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    (found,) = combine([[row], [turned]], weights)
    torch.testing.assert_close(found, row + 2)
