"""The rules that read losses, step by step against torch.optim.Adam and their formulas, and what they promise."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from weighting_cases import LOSS_RULES, gram_of, independent, randn, weights_of

from minbert.methods.weightings import WEIGHTINGS

pytestmark = pytest.mark.usefixtures("weights_backend")
STEPS, TASKS = 12, 3


def losses_of(steps: int = STEPS, tasks: int = TASKS) -> Tensor:
    """Losses that fall at different rates, with noise [steps, T]."""
    rates = torch.linspace(0.9, 0.99, tasks, dtype=torch.float64)
    scales = torch.linspace(1, 3, tasks, dtype=torch.float64)
    return scales * rates ** torch.arange(steps)[:, None] * (1 + 0.1 * randn(steps, tasks))


def grams_of(steps: int = STEPS, tasks: int = TASKS) -> list[Tensor]:
    return [gram_of(independent(tasks, seed)) for seed in range(steps)]


def run(rule: str, losses: Tensor, state: Tensor | None = None, **options: float) -> tuple[Tensor, Tensor | None]:
    """The weights of each step [steps, T], and the state after them."""
    tasks = losses.shape[1]
    weighting = WEIGHTINGS[rule](**options)
    state = weighting.state(tasks) if state is None else state
    grams = grams_of(len(losses), tasks)
    rows = [weighting.weights(gram, loss, state) for gram, loss in zip(grams, losses, strict=True)]
    return torch.stack(rows), state


def parameter(tasks: int, value: float = 0.0) -> Tensor:
    return torch.full((tasks,), value, dtype=torch.float64, requires_grad=True)


def test_famo_learns_its_logits_by_torchs_adam() -> None:
    losses, logits = losses_of(), parameter(TASKS)
    adam, expected = torch.optim.Adam([logits], lr=0.1, weight_decay=0.01), []
    for before, loss in zip([None, *losses], losses, strict=False):
        if before is not None:
            adam.zero_grad()
            (logits.softmax(0) @ ((before + 1e-8).log() - (loss + 1e-8).log())).backward()
            adam.step()
        shares = logits.detach().softmax(0) / (loss + 1e-8)
        expected.append(shares / shares.sum())
    weights, _ = run("famo", losses, lr=0.1, weight_decay=0.01)
    torch.testing.assert_close(weights, torch.stack(expected), rtol=1e-12, atol=0)


def test_uncertainty_learns_its_variances_by_torchs_adam() -> None:
    losses, s = losses_of(), parameter(TASKS)
    adam, expected = torch.optim.Adam([s], lr=0.1), []
    for loss in losses:
        expected.append((-s.detach()).exp() / 2)
        adam.zero_grad()
        ((-s).exp() * loss / 2 + s / 2).sum().backward()
        adam.step()
    torch.testing.assert_close(run("uncertainty", losses, lr=0.1)[0], torch.stack(expected), rtol=1e-12, atol=0)


def test_gradnorm_learns_its_weights_by_torchs_adam() -> None:
    losses, weights = losses_of(), parameter(TASKS, 1.0)
    adam, expected = torch.optim.Adam([weights], lr=0.3), []
    for gram, loss in zip(grams_of(), losses, strict=True):
        expected.append(weights.detach().clone())
        lengths = weights * gram.diagonal().sqrt()
        rates = loss / losses[0]
        aim = lengths.detach().mean() * (rates / rates.mean()) ** 1.5
        adam.zero_grad()
        (lengths - aim).abs().sum().backward()
        adam.step()
        with torch.no_grad():
            weights.clamp_(min=1e-3)
            weights *= TASKS / weights.sum()
    torch.testing.assert_close(run("gradnorm", losses, lr=0.3)[0], torch.stack(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("every", [1, 4])
def test_dwa_compares_windows(every: int) -> None:
    losses = losses_of(14)
    windows = [window.mean(0) for window in losses.split(every)]
    expected = torch.ones_like(losses)
    for index, (older, newer) in enumerate(pairwise(windows), 2):
        expected[index * every : (index + 1) * every] = TASKS * (newer / older / 2).softmax(0)
    torch.testing.assert_close(run("dwa", losses, every=every)[0], expected, rtol=1e-12, atol=0)


def test_geometric_mean_is_its_derivative() -> None:
    losses = losses_of(1, 5)[0].requires_grad_()
    (expected,) = torch.autograd.grad(losses.log().mean().exp(), losses)
    torch.testing.assert_close(run("geometric-mean", losses.detach()[None])[0][0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tasks", [1, 2, 7, 16])
@pytest.mark.parametrize("rule", LOSS_RULES)
def test_weights_are_positive_and_have_the_sum_of_the_rule(rule: str, tasks: int) -> None:
    weights, _ = run(rule, losses_of(tasks=tasks), **({"every": 2} if rule == "dwa" else {}))
    assert (weights > 0).all()
    sums = {"famo": 1.0, "dwa": float(tasks), "gradnorm": float(tasks)}
    if rule in sums:
        torch.testing.assert_close(weights.sum(1), torch.full((STEPS,), sums[rule], dtype=torch.float64))


@pytest.mark.parametrize("rule", LOSS_RULES)
def test_a_run_cut_in_two_is_the_run_in_one(rule: str) -> None:
    options = {"every": 2} if rule == "dwa" else {}
    losses, weighting = losses_of(), WEIGHTINGS[rule](**options)
    grams, state, results = grams_of(), weighting.state(TASKS), []
    for step, (gram, loss) in enumerate(zip(grams, losses, strict=True)):
        if step == 5 and state is not None:
            state, weighting = torch.tensor(state.tolist(), dtype=torch.float64), WEIGHTINGS[rule](**options)
        results.append(weighting.weights(gram, loss, state))
    assert torch.equal(torch.stack(results), run(rule, losses, **options)[0])


@pytest.mark.parametrize("rule", LOSS_RULES)
def test_the_order_of_the_tasks_does_not_matter(rule: str) -> None:
    options = {"every": 2} if rule == "dwa" else {}
    order, losses, weighting = torch.tensor([2, 0, 1]), losses_of(), WEIGHTINGS[rule](**options)
    state = weighting.state(TASKS)
    expected, _ = run(rule, losses, **options)
    for gram, loss, weights in zip(grams_of(), losses, expected, strict=True):
        permuted = weighting.weights(gram[order][:, order].contiguous(), loss[order], state)
        torch.testing.assert_close(permuted, weights[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", ["famo", "dwa", "geometric-mean"])
def test_rescaled_losses_do_not_turn_the_update(rule: str) -> None:
    """An update is the sum of weights times gradients, which scale with the losses; of DWA the weights are the same."""
    options = {"every": 2} if rule == "dwa" else {}
    factors = torch.tensor([0.01, 1.0, 300.0], dtype=torch.float64)
    weights, _ = run(rule, losses_of(), **options)
    others, _ = run(rule, losses_of() * factors, **options)
    if rule != "dwa":
        weights, others = weights / weights[:, :1], others * factors / (others * factors)[:, :1]
    torch.testing.assert_close(others, weights, rtol=1e-5, atol=0)  # FAMO adds 1e-8 to each loss


def test_famo_raises_the_weight_of_the_task_that_does_not_learn() -> None:
    losses = torch.stack([0.9 ** torch.arange(50.0), torch.ones(50)], dim=1).double()
    weights, _ = run("famo", losses)
    assert (weights * losses)[-1, 1] > 1.2 * (weights * losses)[-1, 0]


def test_dwa_raises_the_weight_of_the_task_that_does_not_learn() -> None:
    losses = torch.stack([0.9 ** torch.arange(50.0), torch.ones(50)], dim=1).double()
    weights, _ = run("dwa", losses, every=5)
    assert weights[-1, 1] > 1.1 * weights[-1, 0]


def test_uncertainty_brings_every_weighted_loss_to_one_half() -> None:
    losses = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64).expand(2000, 3)
    weights, _ = run("uncertainty", losses, lr=0.02)
    torch.testing.assert_close(weights[-1] * losses[-1], torch.full((3,), 0.5).double(), rtol=1e-2, atol=0)


def test_gradnorm_with_alpha_0_brings_all_gradients_to_one_length() -> None:
    gram, weighting = torch.diag(torch.tensor([1.0, 9.0, 25.0])).double(), WEIGHTINGS["gradnorm"](alpha=0.0)
    state, losses = weighting.state(3), torch.ones(3, dtype=torch.float64)
    for _ in range(1000):
        weights = weighting.weights(gram, losses, state)
    lengths = weights * gram.diagonal().sqrt()
    torch.testing.assert_close(lengths, lengths.mean().expand(3), rtol=0.1, atol=0)


@pytest.mark.parametrize("losses", [[0.0, 1.0], [0.0, 0.0], [-1.0, 2.0], [1e-300, 1.0], [1e150, 1e-150]])
@pytest.mark.parametrize("rule", LOSS_RULES)
def test_losses_of_all_kinds_have_finite_weights(rule: str, losses: list[float]) -> None:
    rows = torch.tensor([losses, losses[::-1], losses, [1.0, 1.0]], dtype=torch.float64)
    weights, _ = run(rule, rows, **({"every": 1} if rule == "dwa" else {}))
    assert weights.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", LOSS_RULES)
def test_a_loss_that_is_not_finite_skips_the_step(rule: str, value: float) -> None:
    _, state = run(rule, losses_of(4))
    before = None if state is None else state.clone()
    bad = torch.tensor([1.0, value, 1.0], dtype=torch.float64)
    assert weights_of(rule, grams_of(1)[0], losses=bad, state=state).tolist() == [1.0] * TASKS
    assert before is None or torch.equal(before, state)
