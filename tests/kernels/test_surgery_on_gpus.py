"""Gradient surgery and the fused update on a CUDA device: as exact as the reference, and always the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from minbert.kernels import (
    adamw_,
    backends,
    combine,
    combine_adamw_,
    gram,
    join_float32,
    reference,
    split_float32,
    surgery_weights,
    use_backend,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TASKS = (1, 2, 3, 4, 5, 9)  # with kernels of their own up to 4, then in tiles of 3
CHUNK, PART = 1 << 16, 1 << 14
SIZES = (1, 0, 7, 1029, PART, PART + 3, 2 * CHUNK + 77, 300)
OPTIONS: dict[str, Any] = {"step": 3, "lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
Grads = list[list[Tensor | None]]


def randn(size: int, seed: int, dtype: torch.dtype = torch.float32, shift: int = 0) -> Tensor:
    """Its address is `shift` elements past an aligned one."""
    values = torch.randn(size + shift, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)[shift:]


def task_gradients(tasks: int, sizes: tuple[int, ...] = SIZES, *, dtype: torch.dtype | None = None) -> Grads:
    """Of mixed dtypes, aligned and not; every third tensor is missing in some task."""
    return [
        [
            None
            if tasks > 1 and k % 3 == 2 and (t + k) % tasks == 0
            else randn(size, 100 * t + k, dtype or DTYPES[k % 7 % 3], shift=k % 4 == 3)
            for k, size in enumerate(sizes)
        ]
        for t in range(tasks)
    ]


def on_cpu(grads: Grads) -> Grads:
    return [[None if grad is None else grad.cpu() for grad in row] for row in grads]


def wide(tensors: Any) -> Any:
    return [None if t is None else wide(t) if isinstance(t, list) else t.double() for t in tensors]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().cpu().view(torch.uint8), b.contiguous().cpu().view(torch.uint8))


def error(results: list[Tensor], exact: list[Tensor]) -> float:
    """The root mean square of all elements' errors; a single element that is wrong stands out."""
    pairs = zip(results, exact, strict=True)
    return torch.cat([(one.double() - truth).flatten() for one, truth in pairs]).square().mean().sqrt().item()


def float64_slack(dtype: torch.dtype, exact: list[Tensor]) -> float:
    """float64 has no wider type to measure it in: both ways are held to a few roundings of the largest element."""
    return 2.0**-50 * max(t.abs().max().item() for t in exact if t.numel()) if dtype == torch.float64 else 0.0


def test_native_code_runs() -> None:
    ops = ("adamw_", "combine", "combine_adamw_", "gram", "surgery_weights")
    assert [backends(DEVICE)[op] for op in ops] == ["native"] * 5


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_gram_is_within_the_summation_bound(tasks: int, dtype: torch.dtype | None) -> None:
    grads = task_gradients(tasks, dtype=dtype)
    magnitudes: Grads = [[None if grad is None else grad.double().abs() for grad in row] for row in grads]
    bound = 2 * sum(SIZES) * 2.0**-53 * reference.gram(magnitudes)  # Higham 2002, section 4.2
    result = gram(grads)
    assert ((result - reference.gram(grads)).abs() <= bound).all()
    assert same_bits(result, result.T)


@pytest.mark.parametrize("tasks", TASKS)
def test_gram_of_whole_numbers_has_the_bits_of_the_cpu(tasks: int) -> None:
    grads: Grads = [[None if g is None else (8 * g).round() for g in row] for row in task_gradients(tasks)]
    assert same_bits(gram(grads), gram(on_cpu(grads)))


@pytest.mark.parametrize("tasks", [2, 5])
def test_chunks_are_added_in_the_order_of_the_cpu(tasks: int) -> None:
    """One number in each of many chunks: within a chunk nothing is rounded."""
    grads: Grads = [[torch.zeros(300 * CHUNK, device=DEVICE)] for _ in range(tasks)]
    for t, (row,) in enumerate(grads):
        row[::CHUNK] = randn(300, t)
    assert same_bits(gram(grads), gram(on_cpu(grads)))


def test_gram_has_the_same_bits_every_time_and_at_every_address() -> None:
    grads = task_gradients(3)
    first = gram(grads)
    shifted: Grads = [
        [None if g is None else torch.cat([g.new_zeros(k % 3), g])[k % 3 :] for k, g in enumerate(row)] for row in grads
    ]
    assert same_bits(gram(shifted), first)
    for _ in range(50):
        assert same_bits(gram(grads), first)


def test_what_is_not_finite_stays_with_its_task() -> None:
    grads: Grads = [[randn(2000, t), randn(30, t + 9)] for t in range(6)]
    healthy = gram(grads)
    grads[1][0][1234] = float("inf")
    grads[3][0] = None  # orthogonal to the sick tensor: only the second tensor counts
    result = gram(grads)
    assert not result[1, [0, 1, 2, 4, 5]].isfinite().any()
    assert result[1, 3].isfinite()
    others = [0, 2, 4, 5]
    assert same_bits(result[others][:, others], healthy[others][:, others])


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_errs_no_more_than_twice_the_reference(tasks: int, dtype: torch.dtype) -> None:
    grads, weights = task_gradients(tasks, dtype=dtype), randn(tasks, 9, torch.float64)
    first = [next(row[k] for row in grads if row[k] is not None) for k in range(len(SIZES))]
    out = [torch.full_like(grad, float("nan")) for grad in first]
    exact, other = reference.combine(wide(grads), weights), reference.combine(grads, weights)
    combine(grads, weights, out)
    assert error(out, exact) <= 2 * error(other, exact) + float64_slack(dtype, exact)


def test_combine_may_write_over_one_of_the_gradients() -> None:
    grads, weights = task_gradients(3), randn(3, 9, torch.float64)
    expected = combine(grads, weights)
    out = [next(row[k] for row in reversed(grads) if row[k] is not None) for k in range(len(SIZES))]
    combine(grads, weights, out)
    assert all(same_bits(a, b) for a, b in zip(out, expected, strict=True))


def state_for(dtypes: list[torch.dtype], sizes: tuple[int, ...] = SIZES) -> list[list[Tensor]]:
    """Parameters and both moments in the middle of a training, float64 for float64 gradients."""
    state = [
        [
            randn(size, 1000 * part + k, torch.float64 if dtype == torch.float64 else torch.float32, shift=k % 5 == 4)
            for k, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))
        ]
        for part in range(3)
    ]
    return [*state[:2], [tensor.square() for tensor in state[2]]]


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_update_errs_no_more_than_twice_the_reference(tasks: int, dtype: torch.dtype) -> None:
    grads, weights = task_gradients(tasks, dtype=dtype), randn(tasks, 9, torch.float64)
    state = state_for([dtype] * len(SIZES))
    state.append([tensor + 1 for tensor in state[0]])
    copies = [
        None if k == 3 else torch.full_like(p, float("nan"), dtype=torch.bfloat16) for k, p in enumerate(state[0])
    ]
    mine, other, exact = copy.deepcopy(state), copy.deepcopy(state), wide(state)
    more = {**OPTIONS, "ema_decay": 0.75}
    combine_adamw_(mine[0], grads, weights, *mine[1:3], **more, ema=mine[3], copies=copies)
    reference.combine_adamw_(other[0], grads, weights, *other[1:3], **more, ema=other[3])
    reference.combine_adamw_(exact[0], wide(grads), weights, *exact[1:3], **more, ema=exact[3])
    for ours, theirs, truths in zip(mine, other, exact, strict=True):
        assert error(ours, truths) <= 2 * error(theirs, truths) + float64_slack(dtype, truths)
    assert all(made is None or same_bits(made, param.bfloat16()) for made, param in zip(copies, mine[0], strict=True))


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_parameters_have_the_bits_of_float32_ones(tasks: int, dtype: torch.dtype) -> None:
    grads, weights = task_gradients(tasks, dtype=dtype), randn(tasks, 9, torch.float64)
    state = state_for([dtype] * len(SIZES))
    other = copy.deepcopy(state)
    halves = [split_float32(param) if k != 3 else (param, None) for k, param in enumerate(other[0])]
    params, low_bits = map(list, zip(*halves, strict=True))
    combine_adamw_(state[0], grads, weights, *state[1:], **OPTIONS)
    combine_adamw_(params, grads, weights, *other[1:], **OPTIONS, low_bits=low_bits)
    joined = [p if low is None else join_float32(p, low) for p, low in zip(params, low_bits, strict=True)]
    for found, expected in zip((joined, *other[1:]), state, strict=True):
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("flag", [0.0, 1.0, False, True])
def test_an_update_is_skipped_where_its_flag_is_zero(flag: float) -> None:
    skip_unless = torch.tensor(flag, dtype=torch.bool if isinstance(flag, bool) else torch.float64, device=DEVICE)
    state, grads = state_for([torch.float32] * 2, (CHUNK + 9, 7)), [randn(CHUNK + 9, 5), randn(7, 6)]
    before = copy.deepcopy(state)
    adamw_(state[0], grads, *state[1:], **OPTIONS, skip_unless=skip_unless)
    for part, old in zip(state, before, strict=True):
        assert [same_bits(a, b) for a, b in zip(part, old, strict=True)] == [not flag] * 2


def test_more_tensors_than_a_launch_takes() -> None:
    grads = task_gradients(3, tuple(range(450)), dtype=torch.float32)
    assert ((gram(grads) - reference.gram(grads)).abs() <= 1e-9 * reference.gram(grads).diagonal().max()).all()
    weights, state = randn(3, 9, torch.float64), state_for([torch.float32] * 450, tuple(range(450)))
    other = copy.deepcopy(state)
    combine_adamw_(state[0], grads, weights, *state[1:], **OPTIONS)
    reference.combine_adamw_(other[0], grads, weights, *other[1:], **OPTIONS)
    torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_weights_have_the_bits_of_the_reference(tasks: int, reduction: str) -> None:
    generator = torch.Generator().manual_seed(tasks)
    rows = torch.randn(tasks, 6, generator=generator, dtype=torch.float64)
    orders = torch.stack([torch.randperm(tasks, generator=generator) for _ in range(tasks)])
    own, matrix = torch.tensor(0.5, dtype=torch.float64), rows @ rows.T
    for given in ({"orders": orders}, {"weights": rows[:, 0].contiguous()}, {}):
        result = surgery_weights(
            matrix.to(DEVICE),
            **{name: value.to(DEVICE) for name, value in given.items()},
            own_square=own.to(DEVICE),
            max_norm=0.1,
            reduction=reduction,
        )
        with use_backend("reference"):
            expected = surgery_weights(matrix, **given, own_square=own, max_norm=0.1, reduction=reduction)
        assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("tasks", TASKS)
def test_each_part_of_the_model_has_the_numbers_of_its_tensors_alone(tasks: int) -> None:
    grads, parts, count = task_gradients(tasks), [k * 5 % 3 for k in range(len(SIZES))], 4  # part 3 has no tensors
    weights = randn(count * tasks, 9, torch.float64).view(count, tasks)
    dtypes = [torch.float64 if k % 7 % 3 == 2 else torch.float32 for k in range(len(SIZES))]
    state, alone = state_for(dtypes), state_for(dtypes)
    matrices, sums = gram(grads, parts, count), combine(grads, weights, parts=parts)
    combine_adamw_(state[0], grads, weights, *state[1:], parts=parts, **OPTIONS)
    for part in range(3):
        columns = [k for k, number in enumerate(parts) if number == part]
        rows = [[row[k] for k in columns] for row in grads]
        assert same_bits(matrices[part], gram(rows))
        for k, wanted in zip(columns, combine(rows, weights[part]), strict=True):
            assert same_bits(sums[k], wanted)
        of_part = [[tensors[k] for k in columns] for tensors in alone]
        combine_adamw_(of_part[0], rows, weights[part], *of_part[1:], **OPTIONS)
    assert not matrices[3].any()
    for mine, wanted in zip(state, alone, strict=True):
        assert all(same_bits(a, b) for a, b in zip(mine, wanted, strict=True))


@pytest.mark.parametrize("parts", [2, 90])
def test_weights_by_part_have_the_bits_of_the_reference(parts: int) -> None:
    rows = torch.randn(parts, 3, 2, generator=torch.Generator().manual_seed(parts), dtype=torch.float64)
    matrices, orders = rows @ rows.mT, torch.tensor([[2, 1, 0], [0, 2, 1], [1, 0, 2]]).repeat(parts, 1, 1)
    result = surgery_weights(matrices.to(DEVICE), orders=orders.to(DEVICE), max_norm=0.1)
    with use_backend("reference"):
        expected = surgery_weights(matrices, orders=orders, max_norm=0.1)
    assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))


class Update:
    """PCGrad, clipping and AdamW, all on the device."""

    def __init__(self) -> None:
        self.grads = task_gradients(3, dtype=torch.float32)
        self.state = state_for([torch.float32] * len(SIZES))
        self.copies = [torch.zeros_like(param, dtype=torch.bfloat16) for param in self.state[0]]
        self.orders = torch.tensor([[2, 1, 0], [0, 2, 1], [1, 0, 2]], device=DEVICE)

    def take(self) -> Tensor:
        weights, stats = surgery_weights(gram(self.grads), orders=self.orders, max_norm=0.5)
        more = {"copies": self.copies, "skip_unless": stats[2]}
        combine_adamw_(self.state[0], self.grads, weights, *self.state[1:], **OPTIONS, **more)
        return stats

    @property
    def results(self) -> list[Tensor]:
        return [tensor for part in (*self.state, self.copies) for tensor in part]


def test_an_update_waits_for_nothing_on_the_host() -> None:
    update = Update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_update_has_the_bits_of_the_same_update_launched() -> None:
    launched, captured = Update(), Update()
    expected = launched.take()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what is done for the first time may not be captured
        Update().take()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = captured.take()
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(stats, expected)
    assert all(same_bits(a, b) for a, b in zip(captured.results, launched.results, strict=True))


def test_updates_have_the_same_bits_every_time_while_other_streams_are_busy() -> None:
    expected = Update()
    expected.take()
    other, noise = torch.cuda.Stream(), torch.randn(1 << 24, device=DEVICE)
    for _ in range(20):
        with torch.cuda.stream(other):
            noise.mul_(1.0)
        update = Update()
        update.take()
        assert all(same_bits(a, b) for a, b in zip(update.results, expected.results, strict=True))
    torch.cuda.synchronize()
