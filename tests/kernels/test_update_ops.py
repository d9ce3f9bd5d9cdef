"""adamw_, combine_adamw_ and clip_weights: torch's numbers, one pass, nothing else touched."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert.kernels import adamw_, clip_weights, combine, combine_adamw_, gram, reference, use_backend

OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CHUNK = 1 << 16
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Grads = list[list[Tensor | None]]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_for(shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> list[list[Tensor]]:
    """Parameters, first moments and second moments in the middle of a training: no step is far longer than the rate."""
    params, exp_avgs, exp_avg_sqs = (
        [
            randn(*shape, seed=100 * i + k, dtype=state_dtype(dtype))
            for k, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        ]
        for i in range(3)
    )
    return [params, exp_avgs, [a.square() + b.square() for a, b in zip(exp_avgs, exp_avg_sqs, strict=True)]]


def flat(lists: list[list[Tensor]]) -> list[Tensor]:
    return list(itertools.chain.from_iterable(lists))


def wide(tensors: list[Any]) -> list[Any]:
    return [None if t is None else wide(t) if isinstance(t, list) else t.double() for t in tensors]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def errors(results: list[list[Tensor]], exact: list[list[Tensor]]) -> Tensor:
    """The largest error of each tensor that has elements."""
    pairs = [(one, truth) for one, truth in zip(flat(results), flat(exact), strict=True) if truth.numel()]
    return torch.stack(
        [torch.zeros((), dtype=torch.float64)] + [(one.double() - truth).abs().max() for one, truth in pairs]
    )


def float64_slack(dtype: torch.dtype, exact: list[list[Tensor]]) -> float:
    """float64 has no wider type to measure it in: both ways are held to a few roundings of the largest element."""
    largest = max(tensor.abs().max().item() for tensor in flat(exact) if tensor.numel())
    return 2.0**-50 * largest if dtype == torch.float64 else 0.0


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Tensor]], Grads, Tensor]:
    """State, gradients of T tasks over K tensors of mixed dtypes at any alignment, and weights."""
    tasks = draw(st.integers(1, 5))
    columns = draw(
        st.lists(
            st.tuples(st.sampled_from([0, 1, 5, 31, 1029, 3000]), st.sampled_from(DTYPES), st.integers(0, 3)),
            min_size=1,
            max_size=4,
        )
    )
    seed = draw(st.integers(0, 1000))
    grads: Grads = [[] for _ in range(tasks)]
    for k, (size, dtype, shift) in enumerate(columns):
        for t, row in enumerate(grads):
            values = randn(size + shift, seed=seed + 10 * k + t, dtype=dtype)[shift:]
            row.append(None if draw(st.integers(0, 3)) == 0 else values)
    state = state_for([(size + shift,) for size, _, shift in columns], [dtype for _, dtype, _ in columns])
    shifted = [[tensor[shift:] for tensor, (_, _, shift) in zip(part, columns, strict=True)] for part in state]
    return shifted, grads, randn(tasks, seed=seed, dtype=torch.float64)


@quick
@given(problem=problems(), step=st.integers(1, 1000))
def test_combine_adamw_agrees_with_the_reference_wherever_the_tensors_lie(isa: str, problem, step: int) -> None:
    state, grads, weights = problem
    mine, other, exact = copy.deepcopy(state), copy.deepcopy(state), wide(state)
    combine_adamw_(mine[0], grads, weights, *mine[1:], step=step, **OPTIONS)
    reference.combine_adamw_(other[0], grads, weights, *other[1:], step=step, **OPTIONS)
    reference.combine_adamw_(exact[0], wide(grads), weights, *exact[1:], step=step, **OPTIONS)
    unit = 2.0**-23 * max(10.0, *(tensor.abs().max().item() for tensor in flat(exact) if tensor.numel()), 0.0)
    assert (
        errors(mine, exact) <= 2 * errors(other, exact) + unit
    ).all()  # over few elements the reference may be lucky
    for k in range(len(grads[0])):
        if all(row[k] is None for row in grads):
            assert all(same_bits(part[k], before[k]) for part, before in zip(mine, state, strict=True))


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"betas": (0.0, 0.5), "eps": 1e-3, "weight_decay": 0.0}])
def test_adamw_errs_no_more_than_twice_the_reference(isa: str, grad_dtype: torch.dtype, options) -> None:
    shapes, settings_ = [(CHUNK + 77,), (0,), (2, CHUNK)], {**OPTIONS, **options, "step": 3}
    state = state_for(shapes, [grad_dtype] * len(shapes))
    grads = [randn(*shape, seed=k, dtype=grad_dtype) for k, shape in enumerate(shapes)]
    mine, other, exact = copy.deepcopy(state), copy.deepcopy(state), wide(state)
    adamw_(mine[0], grads, *mine[1:], **settings_)
    reference.adamw_(other[0], grads, *other[1:], **settings_)
    reference.adamw_(exact[0], wide(grads), *exact[1:], **settings_)
    slack = float64_slack(grad_dtype, exact)
    assert (errors(mine, exact) <= 2 * errors(other, exact) + slack).all()


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_combine_adamw_errs_no_more_than_twice_the_reference(isa: str, tasks: int, grad_dtype: torch.dtype) -> None:
    state = state_for([(CHUNK + 77,)], [grad_dtype])
    grads: Grads = [[randn(CHUNK + 77, seed=t, dtype=grad_dtype)] for t in range(tasks)]
    weights = randn(tasks, seed=9, dtype=torch.float64)
    mine, other, exact = copy.deepcopy(state), copy.deepcopy(state), wide(state)
    combine_adamw_(mine[0], grads, weights, *mine[1:], step=7, **OPTIONS)
    reference.combine_adamw_(other[0], grads, weights, *other[1:], step=7, **OPTIONS)
    reference.combine_adamw_(exact[0], wide(grads), weights, *exact[1:], step=7, **OPTIONS)
    slack = float64_slack(grad_dtype, exact)
    assert (errors(mine, exact) <= 2 * errors(other, exact) + slack).all()


def test_one_task_of_weight_one_is_adamw_to_the_bit(isa: str) -> None:
    state, grads = (
        state_for([(CHUNK + 9,), (7,)], [torch.bfloat16, torch.float32]),
        [randn(CHUNK + 9).bfloat16(), randn(7)],
    )
    fused, alone = copy.deepcopy(state), copy.deepcopy(state)
    combine_adamw_(fused[0], [grads], torch.ones(1, dtype=torch.float64), *fused[1:], step=5, **OPTIONS)
    adamw_(alone[0], grads, *alone[1:], step=5, **OPTIONS)
    assert all(same_bits(a, b) for a, b in zip(flat(fused), flat(alone), strict=True))


def test_results_do_not_depend_on_the_thread_count(isa: str) -> None:
    shapes = [(3 * CHUNK + 5,), (17,), (CHUNK,)]
    grads = [[randn(*shape, seed=10 * t + k) for k, shape in enumerate(shapes)] for t in range(3)]
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        state = state_for(shapes, [torch.float32] * 3)
        combine_adamw_(state[0], grads, randn(3, dtype=torch.float64), *state[1:], step=2, **OPTIONS)
        results.append(flat(state))
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_element(isa: str, poison: float) -> None:
    state = state_for([(1000,)], [torch.float32])
    grad = randn(1000)
    healthy = copy.deepcopy(state)
    adamw_(healthy[0], [grad], *healthy[1:], step=1, **OPTIONS)
    sick = grad.clone()
    sick[[3, 995]] = poison
    adamw_(state[0], [sick], *state[1:], step=1, **OPTIONS)
    rest = torch.ones(1000, dtype=torch.bool)
    rest[[3, 995]] = False
    for (one,), (other,) in zip(state, healthy, strict=True):
        assert same_bits(one[rest], other[rest])
        assert not one[~rest].isfinite().any()


def test_gradients_may_be_transposed_like_their_parameter(isa: str) -> None:
    state = [[tensor.T] for (tensor,) in state_for([(30, 50)], [torch.float32])]
    straight = [[tensor.T.clone()] for (tensor,) in state]
    grads = [[randn(30, 50, seed=t).T] for t in range(2)]
    weights = randn(2, dtype=torch.float64)
    combine_adamw_(state[0], grads, weights, *state[1:], step=1, **OPTIONS)
    combine_adamw_(straight[0], [[row[0].T] for row in grads], weights, *straight[1:], step=1, **OPTIONS)
    assert all(same_bits(a.T, b) for (a,), (b,) in zip(state, straight, strict=True))


def test_parameters_that_require_gradients_are_updated(isa: str) -> None:
    params, plain = [randn(9).requires_grad_()], [randn(9)]
    moments, others = ([[torch.zeros(9)], [torch.zeros(9)]] for _ in range(2))
    adamw_(params, [randn(9, seed=1)], *moments, step=1, **OPTIONS)
    adamw_(plain, [randn(9, seed=1)], *others, step=1, **OPTIONS)
    assert same_bits(params[0].detach(), plain[0])
    assert params[0].requires_grad


def test_the_update_needs_no_gradient_at_all() -> None:
    state = state_for([(4,)], [torch.float32])
    before = copy.deepcopy(state)
    combine_adamw_(state[0], [[None], [None]], torch.ones(2, dtype=torch.float64), *state[1:], step=1, **OPTIONS)
    assert same_bits(state[0][0], before[0][0])
    adamw_([], [], [], [], step=1, **OPTIONS)


def test_the_chosen_backend_runs(record, needs_native: None) -> None:
    def ops(grad_dtype: torch.dtype) -> list[str]:
        state, grads = state_for([(4,)], [torch.float32]), [randn(4, dtype=grad_dtype)]
        with record() as names:
            adamw_(state[0], grads, *state[1:], step=1, **OPTIONS)
            if grad_dtype != torch.float16:
                combine_adamw_(state[0], [grads], torch.ones(1, dtype=torch.float64), *state[1:], step=1, **OPTIONS)
        return [name for name in names if name.startswith("minbert::")]

    assert ops(torch.float32) == ops(torch.bfloat16) == ["minbert::combine_adamw_"] * 2
    assert ops(torch.float16) == []  # as adamw_'s documentation says
    with use_backend("reference"):
        assert ops(torch.float32) == []


# Clipping --------------------------------------------------------------------------------------------------------


def norm_of(tensors: list[Tensor | None]) -> float:
    return sum(t.double().square().sum().item() for t in tensors if t is not None) ** 0.5


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.5, 1.0, 2.0])
def test_clipped_weights_give_a_sum_of_the_wanted_norm(share: float) -> None:
    grads: Grads = [[randn(200, seed=t), None if t == 1 else randn(30, seed=9 + t)] for t in range(3)]
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    before = norm_of(combine(wide(grads), weights))
    clipped, norm = clip_weights(gram(grads), weights, share * before)
    assert norm.item() == pytest.approx(before, rel=1e-12)
    after = norm_of(combine(wide(grads), clipped))
    assert after == pytest.approx(min(share, 1) * before, rel=1e-12)
    if share > 1:
        assert torch.equal(clipped, weights)


def test_a_sum_that_cancels_has_norm_zero_and_keeps_its_weights() -> None:
    g = randn(50, seed=3, dtype=torch.float64)
    weights = torch.tensor([1 / 3, -1 / 9], dtype=torch.float64)
    clipped, norm = clip_weights(gram([[g], [3 * g]]), weights, 0.0)
    assert norm.item() == pytest.approx(0, abs=1e-7)
    assert clipped.isfinite().all()
    clipped, norm = clip_weights(torch.tensor([[1.0, 1.0], [1.0, 1.0 - 2**-52]]).double(), weights * 0, 1.0)
    assert norm == 0
    assert torch.equal(clipped, weights * 0)
    below_zero = torch.tensor([[-1e-20]], dtype=torch.float64)  # what rounding may leave
    assert clip_weights(below_zero, weights[:1], 1.0)[1] == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_returned_and_clips_nothing(poison: float) -> None:
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    clipped, norm = clip_weights(torch.tensor([[poison, 0.0], [0.0, 1.0]], dtype=torch.float64), weights, 1.0)
    assert not norm.isfinite()
    assert torch.equal(clipped, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_gram_weights_clip_update_equals_torch_on_the_summed_gradient(isa: str, dtype, max_norm: float) -> None:
    """Twenty whole steps. One parameter is reached by two tasks, one by a single task, one by none."""
    shapes, tasks = [(40, 30), (30,), (7, 3)], 3
    ours = [randn(*shape, seed=k) for k, shape in enumerate(shapes)]
    moments = [[torch.zeros_like(param) for param in ours] for _ in range(2)]
    theirs = [param.double().clone().requires_grad_() for param in ours]
    idle = ours[2].clone()
    optimizer = torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(1, 21):
        grads: Grads = [
            [randn(*s, seed=1000 * step + 10 * t + k, dtype=dtype) for k, s in enumerate(shapes)] for t in range(tasks)
        ]
        grads[1][1] = grads[2][1] = None
        for row in grads:
            row[2] = None
        matrix = gram(grads)
        weights = 1 / matrix.diagonal().sqrt()
        clipped, norm = clip_weights(matrix, weights, max_norm)
        combine_adamw_(ours, grads, clipped, *moments, step=step, **OPTIONS)

        for param, total in zip(theirs, combine(wide(grads), weights), strict=True):
            param.grad = total
        assert torch.nn.utils.clip_grad_norm_(theirs, max_norm).item() == pytest.approx(norm.item(), rel=1e-12)
        optimizer.step()
    assert same_bits(ours[2], idle)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other.detach(), rtol=1e-5, atol=1e-5)


@quick
@given(problem=problems(), ema_decay=st.sampled_from([0.0, 0.3, 0.75, 0.99, 1.0]))
def test_averages_follow_the_parameters_in_the_same_pass(isa: str, problem, ema_decay: float) -> None:
    state, grads, weights = problem
    ema = [tensor.clone().mul_(-2).add_(1) for tensor in state[0]]
    mine, without, kept = copy.deepcopy(state), copy.deepcopy(state), copy.deepcopy(ema)
    options = {"step": 3, **OPTIONS}
    combine_adamw_(without[0], grads, weights, *without[1:], **options)
    combine_adamw_(mine[0], grads, weights, *mine[1:], **options, ema=kept, ema_decay=ema_decay)
    assert all(same_bits(*pair) for pair in zip(flat(mine), flat(without), strict=True))
    for k, (average, before, param) in enumerate(zip(kept, ema, mine[0], strict=True)):
        if all(row[k] is None for row in grads) or ema_decay == 1:
            assert same_bits(average, before)
        elif ema_decay == 0:
            assert same_bits(average, param)
        else:
            expected = ema_decay * before.double() + (1 - ema_decay) * param.double()
            scale = torch.maximum(before.abs(), param.abs()).double()
            assert ((average.double() - expected).abs() <= 2 * torch.finfo(average.dtype).eps * scale).all()


def test_the_reference_keeps_the_same_averages(needs_native: None) -> None:
    params, grad = [randn(300)], [randn(300, seed=1)]
    results = []
    for backend in ("auto", "reference"):
        state, average = state_for([(300,)], [torch.float32]), [params[0].clone()]
        with use_backend(backend):
            adamw_([params[0].clone()], grad, *state[1:], step=1, **OPTIONS, ema=average, ema_decay=0.9)
        results.append(average[0])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@quick
@given(problem=problems(), ema_decay=st.sampled_from([0.0, 0.75]))
def test_copies_are_the_rounded_parameters(isa: str, problem, ema_decay: float) -> None:
    state, grads, weights = problem
    without, mine = copy.deepcopy(state), copy.deepcopy(state)
    blank = [torch.full_like(tensor, float("nan"), dtype=torch.bfloat16) for tensor in state[0]]
    copies = [None if k % 3 == 2 else tensor.clone() for k, tensor in enumerate(blank)]
    ema = [tensor.clone() for tensor in state[0]]
    combine_adamw_(without[0], grads, weights, *without[1:], step=3, **OPTIONS)
    more = {"ema": ema, "ema_decay": ema_decay, "copies": copies}
    combine_adamw_(mine[0], grads, weights, *mine[1:], step=3, **OPTIONS, **more)
    assert all(same_bits(*pair) for pair in zip(flat(mine), flat(without), strict=True))
    for k, made in enumerate(copies):
        if made is not None:
            expected = blank[k] if all(row[k] is None for row in grads) else mine[0][k].bfloat16()
            assert same_bits(made, expected)


def test_adamw_makes_copies_too_and_a_nan_stays_one(isa: str) -> None:
    state, grad = state_for([(70,)], [torch.float32]), randn(70)
    grad[5] = float("nan")
    copies = [torch.zeros(70, dtype=torch.bfloat16)]
    adamw_(state[0], [grad], *state[1:], step=1, **OPTIONS, copies=copies)
    assert copies[0].isnan().nonzero().tolist() == [[5]]
    torch.testing.assert_close(copies[0], state[0][0].bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("flag", [0.0, 1.0, False, True])
def test_an_update_is_skipped_where_its_flag_is_zero(isa: str, backend: str, flag: float) -> None:
    skip_unless = torch.tensor(flag, dtype=torch.bool if isinstance(flag, bool) else torch.float64)
    state = state_for([(CHUNK + 9,), (7,)], [torch.float32, torch.float32])
    grads = [randn(CHUNK + 9, seed=8), randn(7, seed=9)]
    ema = [tensor.clone() for tensor in state[0]]
    copies = [torch.zeros_like(tensor, dtype=torch.bfloat16) for tensor in state[0]]
    every = [*state, ema, copies]
    before = copy.deepcopy(every)
    with use_backend(backend):
        combine_adamw_(
            state[0],
            [grads],
            torch.ones(1, dtype=torch.float64),
            *state[1:],
            step=1,
            **OPTIONS,
            ema=ema,
            copies=copies,
            skip_unless=skip_unless,
        )
    assert [same_bits(a, b) for a, b in zip(flat(every), flat(before), strict=True)] == [not flag] * 10


@pytest.mark.parametrize("ema_decay", [-0.1, 1.5, float("nan")])
def test_ema_decay_is_a_share(ema_decay: float) -> None:
    state = state_for([(3,)], [torch.float32])
    with pytest.raises(ValueError, match="adamw_: ema_decay must be between 0 and 1"):
        adamw_(state[0], [randn(3)], *state[1:], step=1, **OPTIONS, ema=[randn(3)], ema_decay=ema_decay)
