"""A plan's tiles are runs of whole sequences that cover the stream in order, as many sequences in each as fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minbert.kernels import attention_plan

LENGTHS = st.lists(st.integers(1, 128), min_size=1, max_size=40)


def cumulative(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths])


@given(LENGTHS)
def test_tiles_hold_whole_sequences_and_none_of_the_next_would_fit(lengths: list[int]) -> None:
    rows = next(rows for rows in (32, 64, 128) if max(lengths) <= rows)
    cu_seqlens = cumulative(lengths)
    plan = attention_plan(cu_seqlens, max(lengths))
    assert plan.tile_bounds.dtype == plan.starts.dtype == torch.int32
    first, last = plan.tile_bounds.T.tolist()
    assert [*first, last[-1]] == [0, *last]
    assert last[-1] == cu_seqlens[-1]
    assert set(first) <= set(cu_seqlens.tolist())
    for i, (start, end) in enumerate(zip(first, last, strict=True)):
        assert 0 < end - start <= rows
        if i + 1 < len(first):
            following = cu_seqlens[cu_seqlens.tolist().index(end) + 1]
            assert following - start > rows
    assert plan.starts.tolist() == [start for start, n in zip(cu_seqlens, lengths, strict=False) for _ in range(n)]


@given(LENGTHS, st.randoms())
def test_plans_of_fixed_size_end_in_empty_tiles(lengths: list[int], random) -> None:
    """Sequences in another order make a plan of the same size."""
    fixed = attention_plan(cumulative(lengths), max(lengths), fixed_size=True).tile_bounds
    full = attention_plan(cumulative(lengths), max(lengths)).tile_bounds
    assert torch.equal(fixed[: len(full)], full)
    assert not fixed[len(full) :].any()
    shuffled = random.sample(lengths, len(lengths))
    assert len(attention_plan(cumulative(shuffled), max(lengths), fixed_size=True).tile_bounds) == len(fixed)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [([0, 100], "max_seqlen is 20, but the longest sequence has 100"), ([0, 5, 5], "increase"), ([1, 9], "start at 0")],
)
def test_a_stream_that_does_not_fit_is_refused(cu_seqlens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"attention_plan: .*{message}"):
        attention_plan(torch.tensor(cu_seqlens), 20)


@pytest.mark.parametrize(("longest", "planned"), [(128, True), (129, False)])
def test_longer_sequences_have_no_plan(longest: int, planned: bool) -> None:
    assert (attention_plan(cumulative([5, longest]), longest) is not None) == planned


def test_takes_tensors() -> None:
    cu_seqlens = torch.tensor([0, 5, 9], dtype=torch.int32)
    plan = attention_plan(cu_seqlens, 5)
    assert plan.tile_bounds.tolist() == [[0, 9]]
    assert plan.starts.tolist() == [0] * 5 + [5] * 4
