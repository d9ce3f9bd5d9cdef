"""Philox's random words: the known answers, and statistics that words of fewer rounds would fail."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from minbert.kernels import attention_dropout_mask, dropout_mask, native, reference
from minbert.kernels.reference import random_numbers

# Of Random123 (Salmon et al. 2011), kat_vectors, philox4x32 of 7 rounds: counter, key (its low word first), words.
KNOWN = [
    ([0] * 4, 0, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    ([0xFFFFFFFF] * 4, -1, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (  # the digits of pi
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
    ),
]
LEAST_P_VALUE = 1e-6  # the seeds are fixed: a test passes always or never
FURTHEST = 6  # standard deviations; 2e-9 of all normals are beyond, and no test looks at more than 30,000


@pytest.mark.parametrize(("counter", "seed", "answer"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers(counter: list[int], seed: int, answer: list[int], needs_native: None) -> None:
    words = reference.philox(tuple(torch.tensor(counter)), torch.tensor(seed))
    assert [int(word) for word in words] == answer
    assert native.library().philox(*counter, seed) == answer


# Words -----------------------------------------------------------------------------------------------------------


def bits(numbers: tuple[Tensor, ...]) -> Tensor:
    """Of 32-bit numbers [n] each: [n, 32 for each of them]."""
    return (torch.stack(numbers, 1)[..., None] >> torch.arange(32) & 1).flatten(1).bool()


def furthest_from_avalanche() -> float:
    """How far the share of flips is from a half, in standard deviations, where it is furthest.

    Of every bit of the words, when one bit of counter or key flips: counters as dropout uses them, keys of any bits.
    """
    count, generator = 1024, torch.Generator().manual_seed(1)
    below = (192, 8192, 3, 64)  # a group of four columns or a key, a row, a group of heads, a stream id
    inputs = [torch.randint(limit, (count,), generator=generator) for limit in (*below, 2**32, 2**32)]

    def words(changed: int = 0, flip: int = 0) -> Tensor:
        c0, c1, c2, c3, low, high = (x ^ flip if i == changed else x for i, x in enumerate(inputs))
        return bits(reference.philox((c0, c1, c2, c3), low | high << 32))

    before = words()
    flips = torch.stack([(words(i, 1 << bit) ^ before).sum(0) for i in range(len(inputs)) for bit in range(32)])
    return ((flips - count / 2).abs().max() / (count / 4) ** 0.5).item()


def p_value_of_poker(shift: int) -> float:
    """Knuth's simplified poker test: how many of 32 digits, of 5 bits each from consecutive words, are distinct."""
    digits, hands, per_counter = 32, 2**16, 4
    column = torch.arange(digits // per_counter)[None]
    zero = torch.zeros_like(column)
    words = reference.philox((column, torch.arange(hands)[:, None], zero, zero), torch.tensor(5))
    hand = (torch.cat(torch.broadcast_tensors(*words), 1) >> shift & (digits - 1)).sort(1).values
    found = torch.bincount(1 + (hand.diff(dim=1) != 0).sum(1), minlength=digits + 1).double()
    expected = torch.zeros(digits + 1, dtype=torch.float64)
    expected[0] = hands
    seen = torch.arange(digits + 1) / digits
    for _ in range(digits):  # one more digit: seen already, or new
        expected = expected * seen + torch.cat([expected.new_zeros(1), (expected * (1 - seen))[:-1]])
    often = expected >= 5
    classes = [torch.cat([counts[often], counts[~often].sum()[None]]) for counts in (found, expected)]
    return stats.chisquare(*classes).pvalue


def test_a_bit_of_counter_or_key_flips_half_of_all_bits() -> None:
    assert furthest_from_avalanche() < FURTHEST


@pytest.mark.parametrize("shift", [0, 27], ids=["low bits", "high bits"])
def test_poker(shift: int) -> None:
    assert p_value_of_poker(shift) > LEAST_P_VALUE


def test_these_tests_notice_too_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_numbers, "PHILOX_ROUNDS", 4)  # Salmon et al., footnote 11
    assert furthest_from_avalanche() > FURTHEST
    monkeypatch.setattr(random_numbers, "PHILOX_ROUNDS", 2)
    assert p_value_of_poker(27) < LEAST_P_VALUE


# Masks -----------------------------------------------------------------------------------------------------------


def correlation(one: Tensor, other: Tensor, p: float) -> float:
    """Of two masks, in standard deviations."""
    return (((one.double() - (1 - p)) * (other.double() - (1 - p))).mean() / (p * (1 - p)) * one.numel() ** 0.5).item()


def neighbours(mask: Tensor, p: float) -> list[float]:
    """Correlations of a mask with itself, moved by up to 8 elements along each dimension."""
    moves = [(dim, lag) for dim in range(mask.ndim) for lag in range(1, min(9, mask.shape[dim]))]
    lengths = [(dim, lag, mask.shape[dim] - lag) for dim, lag in moves]
    return [correlation(mask.narrow(d, 0, size), mask.narrow(d, lag, size), p) for d, lag, size in lengths]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_of_a_mask_are_independent(p: float) -> None:
    seed = torch.tensor(7)
    assert max(map(abs, neighbours(dropout_mask(2048, 768, p, seed, 3), p))) < FURTHEST
    cu_seqlens = torch.tensor([0, 384], dtype=torch.int32)
    of_attention = attention_dropout_mask(cu_seqlens, 12, p, seed, 3).view(12, 384, 384)
    assert max(map(abs, neighbours(of_attention, p))) < FURTHEST


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rows_and_columns_keep_as_many_as_independent_coins(p: float) -> None:
    mask = dropout_mask(2048, 768, p, torch.tensor(11), 5).double()
    for dim in (0, 1):
        size, sums = mask.shape[dim], mask.sum(dim)
        spread = (sums - size * (1 - p)).square().sum().item() / (size * p * (1 - p))
        assert min(stats.chi2.cdf(spread, len(sums)), stats.chi2.sf(spread, len(sums))) > LEAST_P_VALUE


def test_the_four_elements_of_a_counter_are_independent() -> None:
    patterns = dropout_mask(2048, 768, 0.5, torch.tensor(13), 0).view(-1, 4).long() @ torch.tensor([1, 2, 4, 8])
    assert stats.chisquare(torch.bincount(patterns, minlength=16)).pvalue > LEAST_P_VALUE


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_neighbouring_stream_ids_and_seeds_are_independent(p: float) -> None:
    addresses = [*((0, stream_id) for stream_id in range(8)), *((1 << bit, 0) for bit in range(0, 63, 7))]
    masks = [dropout_mask(512, 768, p, torch.tensor(seed), stream_id) for seed, stream_id in addresses]
    pairs = [(one, other) for i, one in enumerate(masks) for other in masks[:i]]
    assert max(abs(correlation(one, other, p)) for one, other in pairs) < FURTHEST
