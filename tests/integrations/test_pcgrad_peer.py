"""How PCGrad differs from Pytorch-PCGrad, as its docstring lists it, against a statement of that algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from minbert.integrations import PCGrad


class Network(nn.Module):
    """A body, a layer for some of the tasks, two heads, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.pair, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
        self.x = torch.randn(8, 4)

    def losses(self) -> list[Tensor]:
        z = torch.tanh(self.body(self.x))
        return [(head(z) - target).square().mean() for head, target in zip(self.heads, (1, -2), strict=True)]


def theirs(network: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    """Pytorch-PCGrad's gradients where no order matters: two losses.

    Whole gradients, with zeros where a loss does not reach, are projected. Parameters that all losses reach get
    the mean, all others the sum.
    """
    names, parameters = zip(*network.named_parameters(), strict=True)
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    reached = [all(row[i] is not None for row in rows) for i in range(len(names))]
    flat = [
        torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(row, parameters, strict=True)])
        for row in rows
    ]
    projected = [row.clone() for row in flat]
    for i, row in enumerate(projected):
        for j, other in enumerate(flat):
            if i != j and row @ other < 0:
                row -= (row @ other) / other.norm() ** 2 * other
    total = torch.stack(projected).sum(0).split([p.numel() for p in parameters])
    scale = [len(losses) if by_all else 1 for by_all in reached]
    return {name: piece.view_as(p) / s for name, piece, p, s in zip(names, total, parameters, scale, strict=True)}


def ours(network: nn.Module, losses: list[Tensor], *reduction: str) -> dict[str, Tensor | None]:
    network.zero_grad()
    PCGrad(torch.optim.SGD(network.parameters(), lr=0.1), *reduction).pc_backward(losses)
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def all_shared() -> tuple[nn.Module, list[Tensor]]:
    """Two conflicting losses of one layer."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 2), torch.randn(8, 4)
    y = layer(x)
    return layer, [(y - 1).square().mean(), (3 * y[:, 0] + 5).square().mean()]


def conflicting(losses: list[Tensor], layer: nn.Module) -> bool:
    rows = [torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True) for loss in losses]
    return sum((one * other).sum() for one, other in zip(*rows, strict=True)) < 0


def test_their_call_gives_their_gradients_where_all_is_shared() -> None:
    layer, losses = all_shared()
    assert conflicting(losses, layer)
    expected = theirs(layer, losses)
    for name, gradient in ours(layer, losses, "mean").items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("reduction", [(), ("sum",)])
def test_by_default_theirs_are_as_many_times_smaller_as_there_are_losses(reduction: tuple[str, ...]) -> None:
    layer, losses = all_shared()
    expected = theirs(layer, losses)
    for name, gradient in ours(layer, losses, *reduction).items():
        torch.testing.assert_close(gradient, 2 * expected[name])


def test_their_projection_reaches_into_the_heads_and_ours_does_not() -> None:
    network = Network()
    losses = network.losses()
    assert conflicting(losses, network.body)
    own = [
        torch.autograd.grad(loss, head.weight, retain_graph=True)[0]
        for loss, head in zip(losses, network.heads, strict=True)
    ]
    expected, got = theirs(network, losses), ours(network, losses, "mean")
    for index, gradient in enumerate(own):
        assert torch.equal(got[f"heads.{index}.weight"], gradient)
        assert not torch.allclose(expected[f"heads.{index}.weight"], gradient, rtol=1e-3)
    assert not torch.allclose(got["body.weight"], expected["body.weight"], rtol=1e-3)


def test_their_shared_parameters_are_those_that_all_losses_reach() -> None:
    """Without a conflict nothing is projected: the layer of two tasks gets their mean here, and their sum there."""
    network = Network()
    body = sum(parameter.sum() for parameter in network.body.parameters())
    pair = sum(parameter.sum() for parameter in network.pair.parameters())
    losses = [body, body + pair, body + pair]
    expected, got = theirs(network, losses), ours(network, losses, "mean")
    torch.testing.assert_close(got["body.bias"], expected["body.bias"])
    torch.testing.assert_close(expected["pair.bias"], torch.full((4,), 2.0))
    torch.testing.assert_close(got["pair.bias"], torch.full((4,), 2 / 3))


def test_what_no_loss_reaches_has_zeros_there_and_none_here() -> None:
    network = Network()
    losses = network.losses()
    assert theirs(network, losses)["idle.weight"].eq(0).all()
    assert ours(network, losses)["idle.weight"] is None
