"""Split parameters: bfloat16 and 16 low bits train to the bits of a float32 parameter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert.kernels import adamw_, combine_adamw_, join_float32, split_float32, use_backend

OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
CHUNK = 1 << 16
HALF = 0x8000  # what lies between two bfloat16 numbers, in bits of float32
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Tensors = list[Tensor]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def float32s(first: int, last: int) -> Tensor:
    """The float32 numbers whose upper 16 bits are `first` to `last`."""
    return torch.arange(first << 16, (last + 1) << 16, dtype=torch.int64).to(torch.int32).view(torch.float32)


# Around 0 and the subnormals, 1, the largest numbers with infinity and NaN, and the same with a sign.
@pytest.mark.parametrize("sign", [0, 0x8000])
@pytest.mark.parametrize("high", [0x0000, 0x0080, 0x3F7F, 0x3F80, 0x7F7E])
def test_every_number_is_joined_to_the_bit_and_rounded_to_nearest(high: int, sign: int) -> None:
    x = float32s(sign + high, sign + high + 3)
    rounded, low_bits = split_float32(x)
    assert (rounded.dtype, low_bits.dtype) == (torch.bfloat16, torch.int16)
    joined, number = join_float32(rounded, low_bits), ~x.isnan()
    assert same_bits(joined[number], x[number])
    assert joined.isnan().equal(~number)
    assert rounded.isnan().equal(~number)
    ties = (x.view(torch.int32) & 0xFFFF) == HALF
    assert same_bits(rounded[number & ~ties], x[number & ~ties].bfloat16())
    finite_ties = x[number & ties]
    toward_zero = (finite_ties.view(torch.int32) - HALF).view(torch.float32)
    assert len(finite_ties) >= 2
    assert (rounded[number & ties].float().abs() > toward_zero.abs()).all()


def test_a_split_needs_float32() -> None:
    with pytest.raises(TypeError, match="split_float32: x must be float32, got float64"):
        split_float32(torch.zeros(2, dtype=torch.float64))


def split_lists(params: Tensors, is_split: list[bool]) -> tuple[Tensors, list[Tensor | None]]:
    pairs = [split_float32(p) if wanted else (p, None) for p, wanted in zip(params, is_split, strict=True)]
    return [pair[0].clone() for pair in pairs], [pair[1] for pair in pairs]


def joined(params: Tensors, low_bits: list[Tensor | None]) -> Tensors:
    return [p if low is None else join_float32(p, low) for p, low in zip(params, low_bits, strict=True)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensors], list[list[Tensor | None]], list[bool]]:
    """Parameters, moments and averages at any alignment, task gradients, and which parameters are split."""
    tasks, seed = draw(st.integers(1, 5)), draw(st.integers(0, 1000))
    column = st.tuples(
        st.sampled_from([0, 1, 5, 31, 1029, CHUNK + 3]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans()
    )
    columns = draw(st.lists(column, min_size=1, max_size=4))
    shift = draw(st.integers(0, 3))
    state = [
        [randn(size + shift, seed=seed + 10 * i + k)[shift:] for k, (size, *_) in enumerate(columns)] for i in range(4)
    ]
    state[2] = [tensor.square() for tensor in state[2]]
    grads = [
        [
            None if draw(st.integers(0, 3)) == 0 else randn(size + shift, seed=seed + 50 + t, dtype=dtype)[shift:]
            for size, dtype, _ in columns
        ]
        for t in range(tasks)
    ]
    return state, grads, [is_split for *_, is_split in columns]


@quick
@given(problem=problems(), ema_decay=st.sampled_from([0.0, 0.75]), reference=st.booleans())
def test_steps_have_the_bits_of_float32_parameters(isa: str, problem, ema_decay: float, reference: bool) -> None:
    state, grads, is_split = problem
    weights = randn(len(grads), dtype=torch.float64)
    params, *whole = copy.deepcopy(state)
    _, *mine = copy.deepcopy(state)
    halves, low_bits = split_lists(params, is_split)
    before = copy.deepcopy((halves, low_bits))
    with use_backend("reference" if reference else "auto"):
        for step in range(1, 4):
            options = {**OPTIONS, "step": step, "ema_decay": ema_decay}
            combine_adamw_(params, grads, weights, *whole[:2], ema=whole[2], **options)
            combine_adamw_(halves, grads, weights, *mine[:2], ema=mine[2], low_bits=low_bits, **options)
            found = [joined(halves, low_bits), *mine]
            for ours, theirs in zip(found, (params, *whole), strict=True):
                assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
    for k, param in enumerate(params):
        if all(row[k] is None for row in grads):
            assert same_bits(halves[k], before[0][k])
        elif is_split[k]:
            assert all(same_bits(a, b) for a, b in zip((halves[k], low_bits[k]), split_float32(param), strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_update_that_changes_nothing_keeps_every_bit(isa: str, backend: str) -> None:
    """Without a rate the parameters stay: ties, the largest numbers and infinity among them; and NaN stays NaN."""
    params = torch.cat([float32s(high, high) for high in (0x0000, 0x3F80, 0x3F81, 0x7F7F, 0x8000, 0xBF80, 0xFF7F)])
    params = torch.cat([params, torch.tensor([float("inf"), float("-inf"), float("nan")])])
    high, low_bits = split_float32(params)
    kept = high.clone(), low_bits.clone()
    state = [torch.zeros_like(params), torch.ones_like(params)]
    with use_backend(backend):
        options = {**OPTIONS, "lr": 0.0, "step": 1}
        adamw_([high], [torch.zeros_like(params)], *([part] for part in state), low_bits=[low_bits], **options)
    for part, before in zip((high, low_bits), kept, strict=True):
        assert same_bits(part[:-1], before[:-1])
    assert high[-1].isnan()
    assert join_float32(high, low_bits)[-1].isnan()


def test_rows_of_a_sparse_gradient_update_a_split_table(isa: str) -> None:
    indices, values = torch.tensor([[1, 2, 6]]), randn(3, 64)
    grads = [[torch.sparse_coo_tensor(indices, values, (9, 64), check_invariants=False, is_coalesced=True), randn(5)]]
    found = []
    for is_split in (False, True):
        params = [randn(9, 64, seed=1), randn(5, seed=2)]
        state = [[torch.zeros_like(param) for param in params] for _ in range(2)]
        halves, low_bits = split_lists(params, [is_split, False])
        weights = torch.ones(1, dtype=torch.float64)
        combine_adamw_(halves, grads, weights, *state, step=1, low_bits=low_bits, **OPTIONS)
        found.append([*joined(halves, low_bits), *state[0], *state[1]])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_an_update_is_skipped_where_its_flag_is_zero(isa: str, backend: str, flag: float) -> None:
    high, low_bits = split_float32(randn(77))
    before = high.clone(), low_bits.clone()
    state = [[torch.zeros(77)] for _ in range(2)]
    more = {"low_bits": [low_bits], "skip_unless": torch.tensor(flag, dtype=torch.float64)}
    with use_backend(backend):
        adamw_([high], [randn(77, seed=1)], *state, step=1, **OPTIONS, **more)
    assert [same_bits(*pair) for pair in zip((high, low_bits), before, strict=True)] == [not flag] * 2
