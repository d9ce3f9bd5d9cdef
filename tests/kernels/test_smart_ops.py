"""smart_init and smart_ascend: the right noise, steps of the right length, and never out of the ball."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert.kernels import reference, smart_ascend, smart_init, use_backend

SEED = torch.tensor([20, 2**32 - 10])
DTYPES = (torch.float32, torch.bfloat16)
CHOICES = list(itertools.product(("inf", "2"), ("token", "sequence"), ("ball", "unit")))
NOISE = 1.2 * 2.0**-20  # the worst error of a normal, over all radii; the reference in float32 errs by twice as much
CU_SEQLENS = torch.tensor([0, 1, 6, 19, 40], dtype=torch.int32)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
all_choices = pytest.mark.parametrize(("norm", "per", "projection"), CHOICES, ids=["-".join(c) for c in CHOICES])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def group_norms(x: Tensor, norm: str, per: str) -> Tensor:
    """One norm per token or per sequence, in float64."""
    groups = x.double().unbind(0) if per == "token" else x.double().split(CU_SEQLENS.diff().tolist())
    return torch.stack([torch.linalg.vector_norm(group, math.inf if norm == "inf" else 2) for group in groups])


def inputs(
    dtype: torch.dtype = torch.float32, columns: int = 33, spread: float = 0.05
) -> tuple[Tensor, Tensor, Tensor]:
    """Perturbed, clean, gradient."""
    x = randn(40, columns, dtype=dtype)
    perturbed = (x.double() + spread * randn(40, columns, seed=1, dtype=torch.float64)).to(dtype)
    return perturbed, x, randn(40, columns, seed=2, dtype=dtype)


# smart_init ------------------------------------------------------------------------------------------------------


@quick
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    shift=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2),
    stream_id=st.integers(0, 2**32 - 1),
)
def test_init_is_the_exact_sum_but_for_the_noise_and_one_rounding(
    isa: str, rows: int, columns: int, shift: int, dtype: torch.dtype, seed: list[int], stream_id: int
) -> None:
    x = (randn(rows * columns + shift, dtype=torch.float64) * 0.01).to(dtype)[shift:].view(rows, columns)
    key = torch.tensor(seed)
    exact = reference.smart_init(x.double(), 0.7, key, stream_id)
    error = (smart_init(x, sigma=0.7, seed=key, stream_id=stream_id).double() - exact).abs()
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()
    assert (error <= rounding + 0.7 * NOISE).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_many_elements_the_worst_is_no_worse_than_twice_the_reference(isa: str, dtype: torch.dtype) -> None:
    x, noise, grad = (randn(400, 257, seed=i).to(dtype) for i in range(3))
    cu_seqlens = torch.arange(0, 401, 25, dtype=torch.int32)

    def worst(result: Tensor, exact: Tensor) -> float:
        return (result.double() - exact).abs().max().item()

    for sigma, start in ((1.0, x), (0.1, x * 0)):
        exact = reference.smart_init(start.double(), sigma, SEED, 1)
        mine, other = (
            smart_init(start, sigma=sigma, seed=SEED, stream_id=1),
            reference.smart_init(start, sigma, SEED, 1),
        )
        assert worst(mine, exact) <= 2 * worst(other, exact)
    for choice in CHOICES:
        tensors = (x + 0.1 * noise, x, grad)
        exact = reference.smart_ascend(*(t.double() for t in tensors), cu_seqlens, 0.5, 0.3, *choice)
        options = dict(zip(("norm", "per", "projection"), choice, strict=True))
        mine = smart_ascend(*tensors, cu_seqlens, eta=0.5, epsilon=0.3, **options)
        other = reference.smart_ascend(*tensors, cu_seqlens, 0.5, 0.3, *choice)
        assert worst(mine, exact) <= 2 * worst(other, exact)


def test_the_noise_is_the_same_in_both_dtypes_and_for_any_number_of_threads_and_tokens(isa: str) -> None:
    torch.set_num_threads(1)
    zeros = torch.zeros(301, 129)
    noise = smart_init(zeros, sigma=1.0, seed=SEED, stream_id=2)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert same_bits(smart_init(zeros, sigma=1.0, seed=SEED, stream_id=2), noise)
    assert same_bits(smart_init(zeros.bfloat16(), sigma=1.0, seed=SEED, stream_id=2), noise.bfloat16())
    assert same_bits(smart_init(zeros[:7], sigma=1.0, seed=SEED, stream_id=2), noise[:7])


def test_the_noise_is_standard_normal(isa: str) -> None:
    z = smart_init(torch.zeros(2000, 500), sigma=1.0, seed=SEED, stream_id=0).double()
    count = z.numel()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = math.sqrt((math.prod(range(1, 2 * power, 2)) - moment**2) / count)  # of a mean of z^power
        assert abs((z**power).mean().item() - moment) < 5 * spread
    ordered, _ = z.flatten().sort()
    steps = torch.arange(1, count + 1).double() / count
    distance = (torch.special.ndtr(ordered) - steps).abs().max().item()
    assert distance * math.sqrt(count) < 1.95  # Kolmogorov and Smirnov, 1 in 1000
    neighbours = [(z[:, :-k] * z[:, k:]).mean().item() for k in (1, 2, 3, 4)] + [(z[1:] * z[:-1]).mean().item()]
    assert max(map(abs, neighbours)) < 5 / math.sqrt(count)
    assert 4 < z.abs().max() < 6  # 2.6e-7 expect one in a million beyond 5.2; the largest possible is 5.77


def test_every_site_and_seed_has_its_own_noise() -> None:
    zeros = torch.zeros(64, 64)
    noises = [
        smart_init(zeros, sigma=1.0, seed=torch.tensor(seed), stream_id=stream_id)
        for seed in (1, 2)
        for stream_id in (0, 1)
    ]
    for one, other in itertools.combinations(noises, 2):
        assert (one * other).mean().abs() < 5 / 64


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_without_sigma_nothing_changes(isa: str, dtype: torch.dtype) -> None:
    x = randn(5, 9, dtype=dtype)
    x[0, 0], x[1, 1], x[2, 2] = -0.0, math.nan, math.inf
    result = smart_init(x, sigma=0.0, seed=SEED, stream_id=0)
    assert same_bits(result, x)
    assert result.data_ptr() != x.data_ptr()


def test_init_passes_nan_and_infinity_on(isa: str) -> None:
    for dtype in DTYPES:
        x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0] * 9], dtype=dtype)
        result = smart_init(x, sigma=1.0, seed=SEED, stream_id=0)
        assert torch.equal(result.isnan(), x.isnan())
        assert torch.equal(result[x.isinf()], x[x.isinf()])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_lengths_are_in_units_of_the_scale(isa: str, dtype: torch.dtype) -> None:
    """A power of two, which rounds nothing, gives the same bits; any other what the reference gives."""
    perturbed, x, grad = inputs(dtype)

    def results(unit: float, scale: Tensor | None) -> list[Tensor]:
        noisy = smart_init(x, sigma=0.25 * unit, seed=SEED, stream_id=1, scale=scale)
        lengths = {"eta": 0.25 * unit, "epsilon": 0.125 * unit, "scale": scale}
        options = [dict(zip(("norm", "per", "projection"), choice, strict=True)) for choice in CHOICES]
        return [noisy, *(smart_ascend(perturbed, x, grad, CU_SEQLENS, **lengths, **choice) for choice in options)]

    for scaled, plain in zip(results(2.0, torch.tensor(0.5)), results(1.0, None), strict=True):
        assert same_bits(scaled, plain)
    scale = torch.tensor(0.3137)
    mine = results(1.0, scale)
    with use_backend("reference"):
        tolerance = 4 * torch.finfo(dtype).eps
        for result, expected in zip(mine, results(1.0, scale), strict=True):
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def test_a_scale_of_zero_takes_no_step_and_leaves_a_ball_of_one_point(isa: str) -> None:
    perturbed, x, grad = inputs()
    nothing = {"eta": 0.5, "epsilon": 0.5, "scale": torch.tensor(0.0)}
    assert torch.equal(smart_init(x, sigma=0.5, seed=SEED, stream_id=0, scale=nothing["scale"]), x)
    for norm, per, _ in CHOICES:
        assert torch.equal(smart_ascend(perturbed, x, grad, CU_SEQLENS, norm=norm, per=per, **nothing), x)


# smart_ascend ----------------------------------------------------------------------------------------------------


@st.composite
def ascents(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, object]]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    columns, shift = draw(st.integers(1, 70)), draw(st.integers(0, 3))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1000))
    norm, per, projection = draw(st.sampled_from(CHOICES))
    size = sum(lengths) * columns
    x, noise, grad = (randn(size + shift, seed=seed + i, dtype=torch.float64)[shift:] for i in range(3))
    spread, steep = draw(st.sampled_from([1e-6, 1e-2, 1.0])), draw(st.sampled_from([1e-30, 1e-6, 1.0, 1e30]))
    tensors = [t.to(dtype).view(-1, columns) for t in (x + spread * noise, x, steep * grad)]
    options = {"eta": draw(st.sampled_from([0.0, 1e-3, 0.5])), "epsilon": draw(st.sampled_from([0.0, 1e-5, 0.01, 1.0]))}
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return (*tensors, cu_seqlens), {**options, "norm": norm, "per": per, "projection": projection}


@quick
@given(ascent=ascents())
def test_ascent_errs_no_more_than_twice_the_reference(isa: str, ascent) -> None:
    tensors, options = ascent
    dtype = tensors[0].dtype
    exact = reference.smart_ascend(*(t.double() if t.is_floating_point() else t for t in tensors), **options)
    error, allowed = (
        (result.double() - exact).abs().max()
        for result in (smart_ascend(*tensors, **options), reference.smart_ascend(*tensors, **options))
    )
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()  # the reference may be lucky by one unit


@all_choices
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_lies_in_the_ball_or_on_its_surface(isa: str, dtype, norm: str, per: str, projection: str) -> None:
    perturbed, x, grad = inputs(dtype)
    for eta in (0.0, 0.01, 3.0):
        result = smart_ascend(
            perturbed, x, grad, CU_SEQLENS, eta=eta, epsilon=0.1, norm=norm, per=per, projection=projection
        )
        rounding = group_norms(result.abs() * torch.finfo(dtype).eps, norm, per)
        norms = group_norms(result.double() - x.double(), norm, per)
        assert (norms <= 0.1 + rounding).all()
        if projection == "unit":
            assert (norms >= 0.1 - rounding).all()


@all_choices
def test_the_gradients_scale_does_not_matter(isa: str, norm: str, per: str, projection: str) -> None:
    perturbed, x, grad = inputs()
    results = [
        smart_ascend(
            perturbed, x, grad * scale, CU_SEQLENS, eta=0.1, epsilon=0.1, norm=norm, per=per, projection=projection
        )
        for scale in (1.0, 2.0**-100, 2.0**100)
    ]
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@all_choices
def test_the_step_has_the_length_eta(isa: str, norm: str, per: str, projection: str) -> None:
    """From the centre, with a ball that is never left."""
    _, x, grad = inputs()
    epsilon = 0.3 if projection == "unit" else 1e3
    result = smart_ascend(x, x, grad, CU_SEQLENS, eta=0.3, epsilon=epsilon, norm=norm, per=per, projection=projection)
    offsets = result.double() - x.double()
    torch.testing.assert_close(
        group_norms(offsets, norm, per), torch.full_like(group_norms(x, norm, per), 0.3), rtol=1e-5, atol=0
    )
    assert torch.cosine_similarity(offsets, grad.double(), dim=1).min() > 1 - 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norm", "per"), [choice[:2] for choice in CHOICES[::2]])
def test_without_a_step_what_lies_in_the_ball_stays_to_the_bit(isa: str, dtype, norm: str, per: str) -> None:
    perturbed, x, grad = inputs(dtype)
    perturbed[0, 0], x[0, 0] = -0.0, 0.001
    options = {"epsilon": 100.0, "norm": norm, "per": per}
    assert same_bits(smart_ascend(perturbed, x, grad, CU_SEQLENS, eta=0.0, **options), perturbed)
    assert same_bits(smart_ascend(perturbed, x, grad * 0, CU_SEQLENS, eta=0.5, **options), perturbed)


@all_choices
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stops_its_own_group_only(
    isa: str, poison: float, norm: str, per: str, projection: str
) -> None:
    perturbed, x, grad = inputs()
    options = {"epsilon": 0.1, "norm": norm, "per": per, "projection": projection}
    healthy = smart_ascend(perturbed, x, grad, CU_SEQLENS, eta=0.02, **options)
    still = smart_ascend(perturbed, x, grad, CU_SEQLENS, eta=0.0, **options)
    for column in (5, 32):
        sick = grad.clone()
        sick[8, column] = poison
        result = smart_ascend(perturbed, x, sick, CU_SEQLENS, eta=0.02, **options)
        stopped = torch.zeros(40, dtype=torch.bool)
        stopped[slice(8, 9) if per == "token" else slice(6, 19)] = True
        assert same_bits(result[stopped], still[stopped])
        assert same_bits(result[~stopped], healthy[~stopped])


@all_choices
def test_a_point_that_is_not_finite_is_passed_on(isa: str, norm: str, per: str, projection: str) -> None:
    perturbed, x, grad = inputs()
    perturbed[8, 3], perturbed[30, 32] = math.nan, math.inf
    options = {"eta": 0.02, "epsilon": 0.1, "norm": norm, "per": per, "projection": projection}
    result = smart_ascend(perturbed, x, grad, CU_SEQLENS, **options)
    expected = reference.smart_ascend(perturbed, x, grad, CU_SEQLENS, **options)
    torch.testing.assert_close(result, expected, equal_nan=True)


def test_a_zero_offset_stays_at_the_centre(isa: str) -> None:
    x = randn(40, 33)
    for norm, per, projection in CHOICES:
        options = {"eta": 0.5, "epsilon": 0.1, "norm": norm, "per": per, "projection": projection}
        assert same_bits(smart_ascend(x, x, torch.zeros_like(x), CU_SEQLENS, **options), x)


def test_a_sequence_of_one_token_is_a_token(isa: str) -> None:
    perturbed, x, grad = inputs()
    singles = torch.arange(41, dtype=torch.int32)
    for norm, _, projection in CHOICES[::2] + CHOICES[1::2]:
        options = {"eta": 0.1, "epsilon": 0.05, "norm": norm, "projection": projection}
        assert same_bits(
            smart_ascend(perturbed, x, grad, singles, per="token", **options),
            smart_ascend(perturbed, x, grad, singles, per="sequence", **options),
        )


def test_sequences_do_not_see_each_other_and_tokens_do_within_one(isa: str) -> None:
    perturbed, x, grad = inputs()
    options = {"eta": 0.1, "epsilon": 0.05, "norm": "2"}
    before = smart_ascend(perturbed, x, grad, CU_SEQLENS, per="sequence", **options)
    grad[6] *= 100
    after = smart_ascend(perturbed, x, grad, CU_SEQLENS, per="sequence", **options)
    changed = (before != after).any(1)
    assert changed[6:19].all()
    assert not changed[:6].any()
    assert not changed[19:].any()


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_ascent_does_not_depend_on_the_thread_count(isa: str, per: str) -> None:
    x, noise, grad = (randn(500, 257, seed=i) for i in range(3))
    cu_seqlens = torch.tensor([0, 3, 250, 251, 480, 500], dtype=torch.int32)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(smart_ascend(x + noise, x, grad, cu_seqlens, eta=0.1, epsilon=0.1, norm="2", per=per))
    assert all(same_bits(results[0], other) for other in results[1:])


# Both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [768, 771])
def test_large_results_are_written_whole(isa: str, columns: int) -> None:
    """Beyond the size from which on stores go past the caches, aligned and not."""
    x = torch.arange(6000 * columns).remainder(1021).float().view(6000, columns)
    cu_seqlens = torch.arange(0, 6001, 25, dtype=torch.int32)
    result = smart_ascend(x + 0.25, x, torch.ones_like(x), cu_seqlens, eta=0.25, epsilon=1.0)
    assert torch.equal(result, x + 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [768, 771, 776])
def test_large_noise_is_written_whole(isa: str, columns: int, dtype: torch.dtype) -> None:
    """As above; of 776 columns of bfloat16 the rows lie at multiples of 16 bytes, but not of 32."""
    noise = smart_init(torch.zeros(12000, columns, dtype=dtype), sigma=1.0, seed=SEED, stream_id=0)
    small = smart_init(torch.zeros(20, columns, dtype=dtype), sigma=1.0, seed=SEED, stream_id=0)
    assert same_bits(noise[:20], small)
    assert noise[-20:].float().std().item() == pytest.approx(1, abs=0.05)


def test_results_never_require_gradients(isa: str) -> None:
    perturbed, x, grad = (tensor.requires_grad_() for tensor in inputs())
    assert not smart_init(x, sigma=0.1, seed=SEED, stream_id=0).requires_grad
    assert not smart_ascend(perturbed, x, grad, CU_SEQLENS, eta=0.1, epsilon=0.1).requires_grad


def test_ops_with_a_scale_are_registered_soundly(needs_native: None) -> None:
    perturbed, x, grad = inputs()
    scale = torch.tensor(0.5)
    torch.library.opcheck(torch.ops.minbert.smart_init.default, (x, 0.1, SEED, 1, scale))
    options = (0.1, 0.2, False, True, False, scale)
    torch.library.opcheck(torch.ops.minbert.smart_ascend.default, (perturbed, x, grad, CU_SEQLENS, *options))


def test_a_scale_is_a_float32_scalar() -> None:
    perturbed, x, grad = inputs()
    for scale, message in (
        (torch.ones(1), r"scale must have shape \[\], got \[1\]"),
        (torch.ones((), dtype=torch.float64), "scale must be float32, got float64"),
        (torch.ones((), device="meta"), "scale must be on cpu like the other tensors, got meta"),
        (0.5, "scale must be a tensor, got float"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"smart_init: {message}"):
            smart_init(x, sigma=0.1, seed=SEED, stream_id=0, scale=scale)
        with pytest.raises((ValueError, TypeError), match=f"smart_ascend: {message}"):
            smart_ascend(perturbed, x, grad, CU_SEQLENS, eta=0.1, epsilon=0.1, scale=scale)


def test_the_chosen_backend_runs(record, needs_native: None) -> None:
    def ops(dtype: torch.dtype) -> list[str]:
        perturbed, x, grad = inputs(dtype)
        with record() as names:
            smart_init(x, sigma=0.1, seed=SEED, stream_id=0)
            smart_ascend(perturbed, x, grad, CU_SEQLENS, eta=0.1, epsilon=0.1)
        return [name for name in names if name.startswith("minbert::")]

    assert ops(torch.float32) == ops(torch.bfloat16) == ["minbert::smart_init", "minbert::smart_ascend"]
    assert ops(torch.float64) == ops(torch.float16) == []  # as their documentation says
    with use_backend("reference"):
        assert ops(torch.float32) == []
