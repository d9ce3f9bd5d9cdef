"""FreeLB against its algorithm in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_regularisers import (
    COUNTS,
    FREELB,
    LABELS,
    LAMBDAS,
    assert_same,
    embedding_block,
    function,
    gradients,
    into_ball,
    lengths_of,
    normalised,
    objective,
    small_batch,
    small_model,
    task_losses,
    trained,
)
from torch import Tensor

from minbert.data.packing import Packed
from minbert.methods.smart import BregmanConfig, SmartConfig
from minbert.model import MultitaskModel
from minbert.training.batches import make_batch
from minbert.training.freelb import FreeLB
from minbert.training.objective import Objective


@pytest.fixture
def model() -> MultitaskModel:
    return small_model()


@pytest.fixture
def packed() -> Packed:
    return small_batch()


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("normalized", [False, True])
def test_freelb_averages_the_loss_over_the_steps_of_its_ascent(model, packed, steps, normalized):
    config = replace(FREELB, steps=steps, normalized=normalized)
    losses, found = trained(model, packed, config)
    f, n, r, passes = function(model, packed), normalised(model, packed), None, []
    for _ in range(steps + 1):
        r = torch.zeros_like(n) if r is None else r

        def moved(r: Tensor) -> Tensor:
            if normalized:
                return embedding_block(model, packed, n + r)
            return embedding_block(model, packed, n) + r

        passes.append(task_losses(f(moved(r.detach()))))
        leaf = r.detach().requires_grad_()
        (g,) = torch.autograd.grad(sum(task_losses(f(moved(leaf))).values()), leaf)
        r = into_ball(r + config.eta * g / lengths_of(g, packed), packed, config.epsilon)
    mean = {name: sum(each[name] for each in passes) / len(passes) for name in COUNTS}
    total = sum((1 - LAMBDAS[name]) * passes[0][name] + LAMBDAS[name] * mean[name] for name in COUNTS)
    torch.testing.assert_close(losses.total, total, rtol=1e-8, atol=0)
    torch.testing.assert_close(losses.task, passes[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(losses.smart, {name: mean[name] - passes[0][name] for name in COUNTS})
    assert losses.smart["sts"] > 0
    assert_same(found, gradients(model, total))


def test_freelb_that_moves_nothing_has_the_plain_gradient(model, packed):
    plain, wanted = trained(model, packed)
    losses, found = trained(model, packed, replace(FREELB, lambda_s=1.0, epsilon=0.0))
    assert all(value.abs() < 1e-12 for value in losses.smart.values())
    torch.testing.assert_close(losses.total, plain.total)
    assert_same(found, wanted)


def test_freelb_keeps_to_the_callers_scale_and_the_weights_of_losses(model, packed):
    weights = {"sst": 2.0, "sts": 0.5}
    (_, whole), (_, halved) = (trained(model, packed, FREELB, weights=weights) for _ in range(2))
    assert_same(halved, whole)
    model.zero_grad()
    of_half = objective(model, FREELB, weights=weights)
    of_half.share = 0.5
    (0.5 * of_half(make_batch(packed, LABELS, FREELB, seed=0)).total).backward()
    assert_same({n: 2 * p.grad for n, p in model.named_parameters() if p.grad is not None}, whole)
    losses, _ = trained(model, packed, FREELB, weights=weights)
    terms = [weights.get(n, 1.0) * (losses.task[n] + LAMBDAS[n] * losses.smart[n]) for n in COUNTS]
    torch.testing.assert_close(losses.total, sum(terms))
    torch.testing.assert_close(
        losses.smart_term, losses.total - sum(weights.get(n, 1) * losses.task[n] for n in COUNTS)
    )


def test_freelb_of_one_task_runs_the_others_once(model, packed):
    only = replace(FREELB, lambda_s={"sts": 1.0})
    _, plain = trained(model, packed)
    _, found = trained(model, packed, only)
    for name in ("heads.sst.weight", "heads.qqp.weight"):
        torch.testing.assert_close(found[name], plain[name])
    assert not torch.allclose(found["heads.sts.weight"], plain["heads.sts.weight"])


def test_freelbs_bregman_divergence_is_of_clean_inputs(model, packed):
    teacher = {param: (param + 0.1).detach() for param in model.parameters()}
    batch = make_batch(packed, LABELS, FREELB, seed=0)
    wanted = Objective(model, SmartConfig(), BregmanConfig(mu=0.5), teacher)(make_batch(packed, LABELS, FREELB, seed=0))
    found = FreeLB(model, FREELB, BregmanConfig(mu=0.5), teacher)(batch)
    torch.testing.assert_close(found.bregman, wanted.bregman)
