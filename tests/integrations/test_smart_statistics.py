"""SMARTLoss around modules with running statistics: only the clean batch enters them. And which masks it takes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from minbert.integrations import SMARTLoss, sym_kl_loss
from minbert.integrations.running_statistics import frozen_running_statistics
from minbert.model.layers import BatchNorm

D = 6


class Tokens(nn.Module):
    """A norm over the features of all tokens, given as [tokens, D] or [batch, D, tokens]."""

    def __init__(self, norm: nn.Module, rank: int) -> None:
        super().__init__()
        self.norm, self.rank = norm, rank

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x) if self.rank == 2 else self.norm(x.mT).mT


def spectral(wrap) -> nn.Module:
    torch.manual_seed(1)
    return Tokens(wrap(nn.Linear(D, D)), 2)


NORMS = {
    "BatchNorm1d": lambda: Tokens(nn.BatchNorm1d(D), 2),
    "BatchNorm1d, cumulative": lambda: Tokens(nn.BatchNorm1d(D, momentum=None), 3),
    "InstanceNorm1d": lambda: Tokens(nn.InstanceNorm1d(D, track_running_stats=True), 3),
    "minbert's": lambda: Tokens(BatchNorm(D), 2),
    "spectral_norm": lambda: spectral(nn.utils.parametrizations.spectral_norm),
    "spectral_norm, old": lambda: spectral(nn.utils.spectral_norm),
}


class Network(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(D, D), NORMS[name](), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.first(x))).mean(1))


class Trainer:
    """An object that is no module, whose method is given to SMARTLoss."""

    def __init__(self, network: nn.Module) -> None:
        self.parts = {"network": network}

    def logits(self, x: Tensor) -> Tensor:
        return self.parts["network"](x)


WAYS = {
    "module": lambda network: network,
    "closure": lambda network: lambda x: network(x),
    "method": lambda network: Trainer(network).logits,
    "compiled": lambda network: torch.compile(network, backend="eager"),
}


def embeddings() -> Tensor:
    return torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1))


def smart(eval_fn, **options) -> SMARTLoss:
    generator = torch.Generator().manual_seed(0)
    return SMARTLoss(eval_fn, sym_kl_loss, epsilon=0.1, step_size=0.1, num_steps=2, generator=generator, **options)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("name", "way"), [*((name, "closure") for name in NORMS), *(("BatchNorm1d", way) for way in WAYS)]
)
def test_the_buffers_are_those_of_the_clean_pass(name: str, way: str) -> None:
    network, embed = Network(name), embeddings()
    expected = copy.deepcopy(network)
    expected(embed)
    assert any(not torch.equal(*pair) for pair in zip(network.buffers(), expected.buffers(), strict=True))
    state = network(embed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss = smart(WAYS[way](network))(embed, state)
    assert loss > 1e-4
    loss.backward()
    assert network.first.weight.grad.abs().sum() > 0
    assert dict(network.named_buffers()).keys() == dict(expected.named_buffers()).keys()
    for one, other in zip(network.buffers(), expected.buffers(), strict=True):
        assert torch.equal(one, other)
    network(embed)  # later passes count again
    assert any(not torch.equal(*pair) for pair in zip(network.buffers(), expected.buffers(), strict=True))


def test_perturbed_batches_are_normalised_by_their_own_statistics() -> None:
    network, embed, seen = Network("BatchNorm1d"), embeddings(), []
    network.norm.norm.register_forward_hook(lambda module, inputs, y: seen.append(y.detach()))
    smart(network)(embed, network(embed))
    for y in seen:
        torch.testing.assert_close(y.mean(0), torch.zeros(D), rtol=0, atol=1e-5)
        torch.testing.assert_close(y.var(0, unbiased=False), torch.ones(D), rtol=0, atol=1e-3)


def test_in_evaluation_the_running_statistics_are_used_and_kept() -> None:
    network, embed = Network("BatchNorm1d"), embeddings()
    network(embed)
    network.eval()
    before = [buffer.clone() for buffer in network.buffers()]
    state, shifted = network(embed), embed + 10  # which the batch's own statistics would hide
    zero = SMARTLoss(
        lambda x: network(x + 10), lambda a, b: (a - network(shifted)).abs().sum(), num_steps=0, noise_var=0
    )
    assert zero(embed, state) == 0
    for one, other in zip(before, network.buffers(), strict=True):
        assert torch.equal(one, other)


def test_sync_batch_norm_which_needs_a_gpu_has_no_running_statistics_meanwhile() -> None:
    norm = nn.SyncBatchNorm(D)
    with frozen_running_statistics(norm):
        assert norm.running_mean is norm.running_var is norm.num_batches_tracked is None
    assert norm.running_mean.tolist() == [0.0] * D


def test_a_failure_inside_leaves_the_modules_as_they_were() -> None:
    network, embed = Network("BatchNorm1d"), embeddings()
    state, mean = network(embed), network.norm.norm.running_mean

    def fails(x: Tensor) -> Tensor:
        network(x)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        smart(fails)(embed, state)
    assert network.norm.norm.running_mean is mean
    assert not torch.nn.modules.module._global_forward_pre_hooks


# Masks ------------------------------------------------------------------------------------------------------------

MASK = torch.arange(7)[None] < torch.tensor([5, 2, 7])[:, None]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_a_mask_of_zeros_and_ones_may_have_any_dtype(dtype: torch.dtype) -> None:
    network, embed = Network("minbert's"), embeddings()
    results = [smart(network)(embed, network(embed), mask=mask).item() for mask in (MASK, MASK.to(dtype))]
    assert results[0] == results[1] != smart(network)(embed, network(embed)).item()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            (1 - MASK.float()) * torch.finfo(torch.float32).min,
            "0 at padding, got values from -3.40282e.38 to 0; give the",
        ),
        (torch.zeros(3, 7).masked_fill(~MASK, -torch.inf), "got values from -inf to 0; give the attention_mask"),
        ((~MASK) * -10000.0, "got values from -10000 to 0; give the attention_mask that the tokenizer returns"),
        (MASK * 2, "must be 1 at real tokens and 0 at padding, got values from 0 to 2"),
        (MASK * 0.5, "got values from 0 to 0.5"),
        (MASK.float() * torch.nan, "got values from nan to nan"),
        (torch.zeros(3, 7), "must hold a real token, got none"),  # an additive mask without padding
        (MASK[:, None, None].float(), r"mask must be \[batch, tokens\] .* got \[3, 1, 1, 7\]"),
    ],
)
def test_masks_that_say_something_else_are_refused(mask: Tensor, message: str) -> None:
    network, embed = Network("minbert's"), embeddings()
    with pytest.raises(ValueError, match=message):
        smart(network)(embed, network(embed), mask=mask)
