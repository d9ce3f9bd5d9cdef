"""What the papers promise of the rules that read a Gram matrix: each on the reference and on the native code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor
from weighting_cases import (
    FUNCTIONS_OF_GRAM,
    GRAM_RULES,
    any_gradients,
    by_enumeration,
    conflicting,
    gram_of,
    independent,
    no_conflict,
    norms,
    randn,
    same_update,
    weights_of,
)

from minbert import kernels
from minbert.methods.weightings import WEIGHTINGS, random_orders

pytestmark = pytest.mark.usefixtures("weights_backend")
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TASKS = (1, 2, 3, 5, 8, 16)


def eps_gram(gram: Tensor, eps: float = 1e-4) -> Tensor:
    return gram / gram.trace() + eps * torch.eye(len(gram), dtype=torch.float64)


@quick
@given(rows=any_gradients())
@pytest.mark.parametrize("rule", GRAM_RULES)
def test_weights_are_finite_whatever_the_gradients(rule: str, rows: Tensor) -> None:
    assert weights_of(rule, gram_of(rows)).isfinite().all()


@quick
@given(rows=any_gradients(), seed=st.integers(0, 100))
@pytest.mark.parametrize("rule", GRAM_RULES)
def test_the_order_of_the_tasks_does_not_matter(rule: str, rows: Tensor, seed: int) -> None:
    tasks = len(rows)
    if rule in ("aligned-mtl", "imtl-g"):  # of dependent gradients rounding decides which eigenvalues count
        rows = torch.cat([rows, norms(rows).max() * torch.eye(tasks, dtype=torch.float64)], dim=1)
    order = torch.randperm(tasks, generator=torch.Generator().manual_seed(seed))
    gram, weighting = gram_of(rows), WEIGHTINGS[rule]()
    given_numbers, permuted = {}, {}
    if weighting.needs_noise:
        given_numbers["noise"] = randn(tasks, seed=seed)
        permuted["noise"] = given_numbers["noise"][order]
    if weighting.needs_orders:
        position = torch.empty_like(order).scatter_(0, order, torch.arange(tasks))
        given_numbers["orders"] = random_orders(gram, torch.Generator().manual_seed(seed))
        permuted["orders"] = position[given_numbers["orders"][order]].contiguous()
    options = weighting.options
    expected = kernels.task_weights(gram, rule, options, **given_numbers, state=weighting.state(tasks))[order]
    moved = gram[order][:, order].contiguous()
    weights = kernels.task_weights(moved, rule, options, **permuted, state=weighting.state(tasks))
    assert same_update(rows[order], weights, expected, slack=1e-6)


@pytest.mark.parametrize("scale", [1e-150, 1e-3, 1e150])
@pytest.mark.parametrize("rule", GRAM_RULES)
def test_tiny_and_huge_gradients_have_the_weights_that_others_have(rule: str, scale: float) -> None:
    gram = gram_of(independent(5))
    options = {"max_norm": 0.0} if rule == "nash-mtl" else {}
    factor = 1 / scale if rule == "fairgrad" else 1.0  # with alpha 1 the update's norm is sqrt(T)
    expected = factor * weights_of(rule, gram, **options)
    torch.testing.assert_close(weights_of(rule, gram * scale * scale, **options), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("rule", ["imtl-g", "nash-mtl", "config", "fairgrad"])
def test_rescaled_losses_do_not_turn_the_update(rule: str) -> None:
    rows, factors = independent(5), torch.tensor([0.01, 1.0, 7.0, 100.0, 0.3], dtype=torch.float64)
    update = weights_of(rule, gram_of(rows)) @ rows
    rescaled = rows * factors[:, None]
    other = weights_of(rule, gram_of(rescaled)) @ rescaled
    torch.testing.assert_close(other / other.norm(), update / update.norm(), rtol=1e-8, atol=1e-8)


@quick
@given(rows=any_gradients())
@pytest.mark.parametrize(
    ("rule", "options"),
    [("mgda", {}), ("cagrad", {"c": 1.0}), ("cagrad", {"c": 3.0}), ("nash-mtl", {}), ("fairgrad", {"alpha": 2.0})],
)
def test_the_update_conflicts_with_no_task(rule: str, options: dict[str, float], rows: Tensor) -> None:
    assert no_conflict(rows, weights_of(rule, gram_of(rows), **options), slack=1e-6)


@quick
@given(rows=any_gradients())
@pytest.mark.parametrize("rule", ["upgrad", "dualproj"])
def test_the_projections_conflict_with_no_task(rule: str, rows: Tensor) -> None:
    gram = gram_of(rows)
    weights = weights_of(rule, gram)
    assert (weights >= 1 / len(rows) - 1e-12).all()
    if gram.trace() > 0:
        assert (eps_gram(gram) @ weights >= -1e-10).all()


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("rule", ["upgrad", "dualproj"])
def test_the_less_eps_the_less_conflict(rule: str, tasks: int) -> None:
    rows = conflicting(tasks, 4)
    assert no_conflict(rows, weights_of(rule, gram_of(rows), eps=1e-10), slack=1e-8)


@pytest.mark.parametrize("rule", ["upgrad", "dualproj", "mgda", "cagrad", "nash-mtl", "fairgrad", "random"])
@quick
@given(rows=any_gradients())
def test_weights_are_not_negative(rule: str, rows: Tensor) -> None:
    assert (weights_of(rule, gram_of(rows)) >= 0).all()


@pytest.mark.parametrize("rule", ["mgda", "imtl-g", "random"])
@quick
@given(rows=any_gradients())
def test_weights_add_up_to_1(rule: str, rows: Tensor) -> None:
    assert weights_of(rule, gram_of(rows)).sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_dual_projections_are_those_of_every_set_of_bounds(tasks: int, seed: int) -> None:
    gram = gram_of(conflicting(tasks, 3, seed))
    regular, mean = eps_gram(gram).numpy(), np.full(tasks, 1 / tasks)
    torch.testing.assert_close(
        weights_of("dualproj", gram), torch.from_numpy(by_enumeration(regular, mean)), rtol=1e-9, atol=1e-10
    )
    projections = [by_enumeration(regular, row / tasks) for row in np.eye(tasks)]
    expected = torch.from_numpy(np.sum(projections, axis=0))
    torch.testing.assert_close(weights_of("upgrad", gram), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", ["upgrad", "dualproj"])
def test_without_conflict_a_projection_is_the_mean(rule: str) -> None:
    gram = gram_of(randn(4, 9).abs())
    torch.testing.assert_close(weights_of(rule, gram), torch.full((4,), 0.25, dtype=torch.float64))


def test_upgrad_is_linear_in_the_length_of_a_gradient() -> None:
    rows = conflicting(4, 8)
    other = rows * torch.tensor([1.0, 5.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    both = rows + other
    first, second, third = (weights_of("upgrad", gram_of(each), eps=1e-12) @ each for each in (rows, other, both))
    torch.testing.assert_close(first + second, third, rtol=1e-6, atol=1e-6)


@quick
@given(rows=any_gradients(), seed=st.integers(0, 1000))
def test_mgda_is_the_shortest_vector_of_the_hull(rows: Tensor, seed: int) -> None:
    weights, longest = weights_of("mgda", gram_of(rows)), norms(rows).max()
    update = weights @ rows
    points = (3 * randn(50, len(rows), seed=seed)).softmax(1)
    assert (norms(points @ rows) >= update.norm() - 1e-7 * longest).all()
    assert (rows @ update >= update @ update - 1e-12 * longest**2).all()  # optimal, not only better than some points


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("c", [0.1, 0.4, 0.9, 2.0])
def test_cagrad_solves_its_dual(tasks: int, c: float) -> None:
    """The gradient of g_w' g_0 + c |g_0| |g_w| in w is the same for all tasks with a weight, and smaller for none."""
    rows = independent(tasks)
    rows = rows / norms(rows).square().sum().sqrt()
    middle, weights = rows.mean(0), weights_of("cagrad", gram_of(rows), c=c)
    own = (weights - 1 / tasks) / (weights.sum() - 1)
    assert (own >= -1e-12).all()
    direction = own @ rows
    slopes = rows @ middle + c * middle.norm() * (rows @ direction) / direction.norm()
    assert (slopes >= own @ slopes - 1e-10).all()
    distance = (weights @ rows - middle).norm()
    assert distance.item() == pytest.approx((c * middle.norm()).item(), rel=1e-10)


@quick
@given(rows=any_gradients(), seed=st.integers(0, 1000))
def test_cagrad_helps_the_worst_task_more_than_another_point_of_its_ball(rows: Tensor, seed: int) -> None:
    update, middle = weights_of("cagrad", gram_of(rows)) @ rows, rows.mean(0)
    slack = 1e-6 if update.any() else 2e-4  # the update is 0 where all that is possible is nearly 0
    steps = randn(50, rows.shape[1], seed=seed)
    others = middle + 0.4 * middle.norm() * steps / norms(steps)[:, None]
    assert (rows @ others.T).amin(0).max() <= (rows @ update).min() + slack * norms(rows).max() ** 2


def test_cagrad_with_c_0_is_the_mean() -> None:
    assert weights_of("cagrad", gram_of(independent(5)), c=0.0).tolist() == [0.2] * 5


def test_cagrad_stops_where_no_direction_helps_all() -> None:
    angles = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert weights_of("cagrad", gram_of(rows), c=1.5).tolist() == [0.0] * 3
    assert weights_of("cagrad", gram_of(rows), c=0.4).min() > 0  # the mean goes on


@pytest.mark.parametrize("tasks", TASKS)
def test_imtl_g_projects_equally_on_all_gradients(tasks: int) -> None:
    rows = independent(tasks)
    projections = (rows @ (weights_of("imtl-g", gram_of(rows)) @ rows)) / norms(rows)
    torch.testing.assert_close(projections, projections.mean().expand(tasks), rtol=1e-10, atol=0)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_aligned_mtl_averages_gradients_of_condition_number_1(tasks: int, mode: str) -> None:
    """With B G B = lambda I, the weights B 1 / T satisfy G^(1/2) w = lambda^(1/2) 1 / T."""
    gram = gram_of(independent(tasks))
    values = torch.linalg.eigvalsh(gram)
    length = {"min": values.min(), "median": values.median(), "rmse": values.mean()}[mode].sqrt()
    aligned = torch.from_numpy(sqrtm(gram.numpy()).real) @ weights_of("aligned-mtl", gram, mode=mode)
    torch.testing.assert_close(aligned, (length / tasks).expand(tasks), rtol=1e-9, atol=0)


@pytest.mark.parametrize("tasks", TASKS)
def test_nash_mtl_gives_all_tasks_the_same_gain(tasks: int) -> None:
    rows = independent(tasks)
    gram = gram_of(rows)
    alpha = weights_of("nash-mtl", gram, max_norm=0.0)
    torch.testing.assert_close(alpha * (gram / gram.norm() @ alpha), torch.ones_like(alpha), rtol=1e-10, atol=0)
    weights, norm = weights_of("nash-mtl", gram), (tasks * gram.norm()).sqrt().item()
    assert (alpha @ rows).norm().item() == pytest.approx(norm)
    assert (weights @ rows).norm().item() == pytest.approx(min(1.0, norm))
    torch.testing.assert_close(weights / weights[0], alpha / alpha[0], rtol=1e-12, atol=0)


def test_nash_mtl_does_not_lengthen_an_update() -> None:
    gram = 1e-6 * gram_of(independent(3))
    assert torch.equal(weights_of("nash-mtl", gram), weights_of("nash-mtl", gram, max_norm=0.0))


def test_nash_mtl_solves_anew_on_every_third_call() -> None:
    weighting = WEIGHTINGS["nash-mtl"](max_norm=0.0, every=3)
    state, results = weighting.state(4), []
    grams = [gram_of(independent(4, seed)) for seed in range(7)]
    for gram in grams:
        results.append(weighting.weights(gram, state=state))
    for call, result in enumerate(results):
        expected = weights_of("nash-mtl", grams[call - call % 3], max_norm=0.0)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_fairgrad_solves_its_equation(tasks: int, alpha: float, scale: float) -> None:
    gram = scale**2 * gram_of(independent(tasks))
    weights = weights_of("fairgrad", gram, alpha=alpha)
    ridge = 1e-14 * gram.diagonal() * weights
    torch.testing.assert_close(gram @ weights + ridge, weights ** (-1 / alpha), rtol=1e-10, atol=0)


def test_fairgrad_with_alpha_0_is_the_mean_and_with_1_nash_mtls_direction() -> None:
    gram = gram_of(independent(4))
    assert weights_of("fairgrad", gram, alpha=0.0).tolist() == [0.25] * 4
    ratio = weights_of("fairgrad", gram) / weights_of("nash-mtl", gram)
    torch.testing.assert_close(ratio, ratio[0].expand(4), rtol=1e-10, atol=0)


@pytest.mark.parametrize("tasks", TASKS)
def test_config_has_the_same_angle_with_all_gradients(tasks: int) -> None:
    rows = independent(tasks)
    update = weights_of("config", gram_of(rows)) @ rows
    cosines = (rows @ update) / norms(rows) / update.norm()
    assert cosines[0] > 0
    torch.testing.assert_close(cosines, cosines[0].expand(tasks), rtol=1e-9, atol=0)
    assert update.norm().item() == pytest.approx((rows @ update).sum().item() / update.norm().item())


@pytest.mark.parametrize("tasks", TASKS)
def test_gradvac_with_beta_0_is_pcgrad(tasks: int) -> None:
    gram = gram_of(conflicting(tasks, 4))
    orders, state = random_orders(gram, torch.Generator().manual_seed(1)), torch.zeros(tasks**2, dtype=torch.float64)
    weights = kernels.task_weights(gram, "gradvac", [0.0], orders=orders, state=state)
    torch.testing.assert_close(weights, kernels.surgery_weights(gram, orders=orders)[0], rtol=1e-9, atol=1e-9)
    assert (state == 0).all()


def test_gradvac_turns_gradients_to_the_average_cosine() -> None:
    rows = torch.tensor([[1.0, 0.0], [-2.0, 3.0]], dtype=torch.float64)
    target = torch.tensor([0.0, 0.6, -0.2, 0.0], dtype=torch.float64)
    gram, state = gram_of(rows), target.clone()
    cosine = gram[0, 1] / norms(rows).prod()
    assert cosine < -0.2  # so both are turned
    weights = weights_of("gradvac", gram, beta=0.25, state=state)
    first, second = rows[0] + (weights[1] - 1) * rows[1], rows[1] + (weights[0] - 1) * rows[0]
    torch.testing.assert_close(torch.cosine_similarity(first, rows[1], 0), target[1])
    torch.testing.assert_close(torch.cosine_similarity(second, rows[0], 0), target[2])
    torch.testing.assert_close(state[1:3], 0.75 * target[1:3] + 0.25 * cosine)
    assert state[[0, 3]].tolist() == [0, 0]


def test_random_weights_are_the_mean_on_average() -> None:
    weighting, generator, gram = WEIGHTINGS["random"](), torch.Generator().manual_seed(0), torch.eye(4).double()
    draws = torch.stack([weighting.weights(gram, generator=generator) for _ in range(2000)])
    assert (draws.mean(0) - 0.25).abs().max() < 4 * draws.std() / 2000**0.5
    assert draws.std(0).min() > 0.1


@pytest.mark.parametrize("rule", FUNCTIONS_OF_GRAM)
def test_parallel_opposing_and_missing_gradients_are_told_apart(rule: str) -> None:
    row = randn(1, 6)
    parallel = torch.cat([row, row])
    update = weights_of(rule, gram_of(parallel)) @ parallel
    assert torch.cosine_similarity(update, row[0], 0).item() == pytest.approx(1)
    opposing = torch.cat([row, -row])
    assert (weights_of(rule, gram_of(opposing)) @ opposing).norm() <= 1e-6 * row.norm()
    missing = torch.cat([row, 0 * row])
    update = weights_of(rule, gram_of(missing)) @ missing
    assert (update.norm() > 0) == (rule not in ("mgda", "cagrad"))  # no direction helps a task without a gradient
