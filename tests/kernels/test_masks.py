"""Dropout masks: one stream of random numbers, the same bits whoever draws them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minbert.kernels import attention_dropout_mask, dropout, dropout_mask, native, reference, use_backend

SEEDS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2)  # with the first row's number
STREAM_IDS = st.integers(0, 2**32 - 1)
P = st.floats(0, 0.999)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def lengths_to_cu_seqlens(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@quick
@given(rows=st.integers(1, 9), columns=st.integers(1, 200), p=P, seed=SEEDS, stream_id=STREAM_IDS)
def test_native_mask_equals_the_reference(
    isa: str, rows: int, columns: int, p: float, seed: list[int], stream_id: int
) -> None:
    keep = dropout_mask(rows, columns, p, torch.tensor(seed), stream_id)
    assert torch.equal(keep, reference.dropout_mask(rows, columns, p, torch.tensor(seed), stream_id))


@quick
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    heads=st.integers(1, 13),
    p=P,
    seed=SEEDS,
    stream_id=STREAM_IDS,
)
def test_native_attention_mask_equals_the_reference(
    isa: str, lengths: list[int], heads: int, p: float, seed: list[int], stream_id: int
) -> None:
    cu_seqlens = lengths_to_cu_seqlens(lengths)
    keep = attention_dropout_mask(cu_seqlens, heads, p, torch.tensor(seed), stream_id)
    assert torch.equal(keep, reference.attention_dropout_mask(cu_seqlens, heads, p, torch.tensor(seed), stream_id))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_masks_do_not_depend_on_the_thread_count(isa: str, threads: int) -> None:
    seed, cu_seqlens = torch.tensor(11), lengths_to_cu_seqlens([5, 40, 17, 1, 33])
    torch.set_num_threads(1)
    expected = dropout_mask(301, 129, 0.1, seed, 2), attention_dropout_mask(cu_seqlens, 6, 0.1, seed, 2)
    torch.set_num_threads(threads)
    assert torch.equal(dropout_mask(301, 129, 0.1, seed, 2), expected[0])
    assert torch.equal(attention_dropout_mask(cu_seqlens, 6, 0.1, seed, 2), expected[1])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_keeps_the_promised_share(p: float) -> None:
    elements = 1000 * 1000
    kept = dropout_mask(1000, 1000, p, torch.tensor(3), 0).sum().item()
    deviation = (elements * p * (1 - p)) ** 0.5
    assert abs(kept - elements * (1 - p)) < 5 * deviation


def test_every_site_and_seed_has_its_own_numbers() -> None:
    masks = [
        dropout_mask(64, 64, 0.5, torch.tensor(seed), stream_id) for seed in (1, 2, 2**32 + 1) for stream_id in (0, 1)
    ]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert 0.4 < (one == other).float().mean() < 0.6  # what independent coins do


def test_a_longer_stream_begins_with_the_same_mask() -> None:
    seed = torch.tensor(5)
    assert torch.equal(dropout_mask(20, 33, 0.2, seed, 1)[:7], dropout_mask(7, 33, 0.2, seed, 1))


def test_dropout_without_probability_keeps_everything() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(dropout(x, p=0.0, seed=None, stream_id=0), x)
    assert dropout_mask(4, 6, 0.0, torch.tensor(1), 0).all()


def test_dropout_scales_what_it_keeps() -> None:
    x = torch.randn(50, 31)
    keep = reference.dropout_mask(50, 31, 0.3, torch.tensor([1, 0]), 4)
    torch.testing.assert_close(
        dropout(x, p=0.3, seed=torch.tensor(1), stream_id=4), torch.where(keep, x / 0.7, 0.0), rtol=1e-6, atol=0
    )


def test_the_chosen_backend_draws_the_masks(record, needs_native: None) -> None:
    cu_seqlens, seed = lengths_to_cu_seqlens([3, 4]), torch.tensor(1)

    def draw() -> list[str]:
        with record() as ops:
            dropout_mask(2, 3, 0.5, seed, 0)
            attention_dropout_mask(cu_seqlens, 2, 0.5, seed, 0)
        return [op for op in ops if op.startswith("minbert::")]

    assert draw() == ["minbert::dropout_mask", "minbert::attention_dropout_mask"]
    with use_backend("reference"):
        assert draw() == []


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or not native.cuda_available(), reason="needs CUDA, and minbert built with it"
)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (301, 129), (8192, 768)])
def test_cuda_mask_equals_the_reference(rows: int, columns: int, record) -> None:
    seed = torch.tensor([-(2**40) + 3, 2**32 - 100])
    with record() as ops:
        keep = dropout_mask(rows, columns, 0.1, seed.cuda(), 9)
    assert "minbert::dropout_mask" in ops
    assert torch.equal(keep.cpu(), reference.dropout_mask(rows, columns, 0.1, seed, 9))
