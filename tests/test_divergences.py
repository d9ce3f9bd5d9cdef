"""The divergences of SMARTLoss: what they are, where they vanish, and that both sides learn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from minbert.integrations import js_loss, kl_loss, sym_kl_loss

DIVERGENCES = (kl_loss, sym_kl_loss, js_loss)


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def test_they_are_what_torch_distributions_says() -> None:
    p, q = (Categorical(logits=logits(seed)) for seed in (0, 1))
    mean = Categorical(probs=(p.probs + q.probs) / 2)
    forth, back = kl_divergence(q, p), kl_divergence(p, q)
    torch.testing.assert_close(kl_loss(logits(0), logits(1)), forth.mean())
    torch.testing.assert_close(sym_kl_loss(logits(0), logits(1)), (forth + back).sum())
    torch.testing.assert_close(sym_kl_loss(logits(0), logits(1), "batchmean", 0.5), (0.5 * forth + back).mean())
    expected = (kl_divergence(p, mean) + kl_divergence(q, mean)) / 2
    torch.testing.assert_close(js_loss(logits(0), logits(1)), expected.sum())
    torch.testing.assert_close(js_loss(logits(0), logits(1), "none", 3.0).sum(-1), 3 * expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_distributions_are_at_no_distance(divergence) -> None:
    assert divergence(logits(0), logits(0) + 3).abs() < 1e-12
    assert divergence(logits(0), logits(1)) > 0.1


@pytest.mark.parametrize("divergence", [sym_kl_loss, js_loss])
def test_the_symmetric_ones_are_symmetric(divergence) -> None:
    torch.testing.assert_close(divergence(logits(0), logits(1)), divergence(logits(1), logits(0)))


def test_jensen_and_shannons_is_at_most_log_2() -> None:
    apart = torch.eye(2, dtype=torch.float64) * 500
    torch.testing.assert_close(js_loss(apart, apart.flip(0)).item(), 2 * math.log(2))


def test_values_beside_smart_pytorchs() -> None:
    """The symmetric one is the same; js_loss there has no upper bound."""
    p, q = logits(0), logits(1)

    def theirs(target: Tensor, of: Tensor) -> Tensor:
        return (target * (target.log() - of.log_softmax(-1))).sum()

    torch.testing.assert_close(sym_kl_loss(p, q), theirs(q.softmax(-1), p) + theirs(p.softmax(-1), q))
    apart, mean = torch.eye(2, dtype=torch.float64) * 30, torch.full((2, 2), 0.5, dtype=torch.float64)
    assert theirs(mean, apart) + theirs(mean, apart.flip(0)) > 50
    assert js_loss(apart, apart.flip(0)) < 2 * math.log(2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_they_are_differentiable_in_both(divergence) -> None:
    assert torch.autograd.gradcheck(divergence, (logits(0).requires_grad_(), logits(1).requires_grad_()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_compared_in_float32(divergence, dtype: torch.dtype) -> None:
    p, q = logits(0, dtype), logits(1, dtype)
    assert torch.equal(divergence(p, q), divergence(p.float(), q.float()))
