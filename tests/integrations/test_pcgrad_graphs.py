"""PCGrad on graphs that hide parameters from torch.autograd.grad: an error or a warning, never a missing gradient."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minbert.integrations import PCGrad


class Recomputed(torch.autograd.Function):
    """A module that runs again in another backward, which autograd does not see."""

    @staticmethod
    def forward(ctx, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.module(x).backward(grad)
        return x.grad, None


class Doubled(torch.autograd.Function):
    """A function that takes its parameter as an argument."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return 2 * x * factor

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, factor = ctx.saved_tensors
        return 2 * grad * factor, 2 * (grad * x).sum(0)


class Network(nn.Module):
    """A first layer, a body that both heads share, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.body = nn.Linear(4, 4), nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
        self.x = torch.randn(16, 4, requires_grad=True)

    def losses(self, through=None, before: bool = False) -> list[Tensor]:
        x = self.first(self.x) if before else self.x
        z = torch.tanh(self.body(x)) if through is None else through(x)
        return [self.heads[0](z).mean(), self.heads[1](z).square().mean()]

    def optimizer(self) -> PCGrad:
        return PCGrad(torch.optim.SGD(self.parameters(), lr=0.1), generator=torch.Generator().manual_seed(0))


def gradients(network: Network) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("before", [False, True])
def test_a_reentrant_checkpoint_is_refused_and_grad_stays(before: bool) -> None:
    network = Network()
    network.body.weight.grad = kept = torch.ones(4, 4)
    losses = network.losses(lambda x: checkpoint(lambda t: torch.tanh(network.body(t)), x, use_reentrant=True), before)
    with pytest.raises(ValueError, match=r"reentrant checkpoint, which hides the parameters .* use_reentrant=False"):
        network.optimizer().pc_backward(losses)
    assert network.body.weight.grad is kept
    assert network.heads[0].weight.grad is None


def test_a_checkpoint_that_is_not_reentrant_gives_the_same_gradients() -> None:
    one, other = Network(), Network()
    one.optimizer().pc_backward(one.losses(before=True))
    through = lambda x: checkpoint(lambda t: torch.tanh(other.body(t)), x, use_reentrant=False)  # noqa: E731
    other.optimizer().pc_backward(other.losses(through, before=True))
    for expected, got in zip(gradients(one), gradients(other), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_backward_inside_a_function_is_refused_and_grad_stays() -> None:
    network = Network()
    network.body.bias.grad = kept = torch.ones(4)
    message = r"ran another backward, which accumulated in \.grad of parameter 2 without surgery"
    with pytest.raises(ValueError, match=message):
        network.optimizer().pc_backward(network.losses(lambda x: Recomputed.apply(x, network.body), before=True))
    assert network.body.bias.grad is kept
    assert kept.tolist() == [1.0] * 4
    assert network.body.weight.grad is None


def test_a_function_that_may_hide_parameters_is_named_once() -> None:
    network = Network()
    optimizer = network.optimizer()
    message = r"no loss reaches 4 of 8 parameters, and the losses' graph has RecomputedBackward, written in Python"
    with pytest.warns(UserWarning, match=message):
        optimizer.pc_backward(network.losses(lambda x: Recomputed.apply(x, network.body)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.pc_backward(network.losses(lambda x: Recomputed.apply(x, network.body)))


def test_a_function_that_takes_its_parameters_is_fine() -> None:
    network = Network()
    factor = nn.Parameter(torch.ones(4))
    optimizer = PCGrad(torch.optim.SGD([*network.parameters(), factor], lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.pc_backward(network.losses(lambda x: Doubled.apply(torch.tanh(network.body(x)), factor), before=True))
    assert factor.grad is not None


def test_hooks_of_modules_and_parameters_run() -> None:
    network, seen = Network(), []
    network.body.register_full_backward_hook(lambda module, gi, go: seen.append("module"))
    network.body.weight.register_hook(lambda grad: seen.append("gradient"))
    network.body.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.optimizer().pc_backward(network.losses(before=True))
    assert seen[:-1].count("module") == seen[:-1].count("gradient") == 2  # for each loss
    assert torch.equal(seen[-1], network.body.weight.grad)


def test_a_loss_that_reaches_nothing_of_the_optimizer_is_refused() -> None:
    network = Network()
    other = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match=r"losses\[2\] reaches no parameter of the optimizer; leave it out, or give"):
        network.optimizer().pc_backward([*network.losses(), other * 2])
    assert network.body.weight.grad is None


def test_losses_that_share_nothing_get_their_own_gradients() -> None:
    network = Network()
    optimizer = network.optimizer()
    optimizer.pc_backward([head(torch.ones(1, 4)).sum() for head in network.heads])
    assert all(head.weight.grad.tolist() == [[1.0] * 4] for head in network.heads)
    assert optimizer.conflicts.cosine.isnan().all()


def test_the_same_loss_twice_is_twice_its_gradient() -> None:
    network = Network()
    loss = network.losses()[0]
    (expected,) = torch.autograd.grad(loss, network.body.weight, retain_graph=True)
    network.optimizer().pc_backward([loss, loss])
    torch.testing.assert_close(network.body.weight.grad, 2 * expected)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_is_listed_twice_counts_once() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    PCGrad(torch.optim.SGD([parameter, parameter])).pc_backward([parameter.sum(), parameter.sum()])
    assert parameter.grad.tolist() == [2.0] * 3


def test_a_second_call_on_the_same_graph_fails_as_backward_does_and_grad_stays() -> None:
    network = Network()
    optimizer, losses = network.optimizer(), network.losses()
    optimizer.pc_backward(losses)
    before = gradients(network)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        optimizer.pc_backward(losses)
    for expected, got in zip(before, gradients(network), strict=True):
        assert expected is got is None or torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_messages_of_parameters() -> None:
    parameter = nn.Parameter(torch.zeros(10, 2))
    parameter.grad = torch.sparse_coo_tensor([[1], [0]], [1.0], (10, 2))
    with pytest.raises(
        ValueError, match=r"\.grad of parameter 0, of shape \[10, 2\], must be dense .*; call zero_grad"
    ):
        PCGrad(torch.optim.SGD([parameter])).pc_backward([parameter.sum()])
    elsewhere = nn.Parameter(torch.zeros(3, device="meta"))
    with pytest.raises(ValueError, match="the parameters must lie on one device, got cpu and meta"):
        PCGrad(torch.optim.SGD([nn.Parameter(torch.zeros(1)), elsewhere])).pc_backward([elsewhere.sum()])
    values = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match=r"losses\[0\] must be real, got torch.complex64"):
        PCGrad(torch.optim.SGD([values])).pc_backward([torch.complex(values, values).sum()])
    phases = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"must be float32, bfloat16 or float64, got torch.complex64"):
        PCGrad(torch.optim.SGD([phases])).pc_backward([phases.abs().sum()])
