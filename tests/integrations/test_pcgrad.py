"""PCGrad in a loop of one's own: surgery on the shared parameters, and everywhere else what backward does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from minbert.integrations import PCGrad
from minbert.kernels import native, use_backend

NAN, INF = math.nan, math.inf


class Network(nn.Module):
    """A trunk, a head for each of three tasks, and a layer that none of them uses."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.idle = nn.Linear(4, 1)
        self.inputs = torch.randn(10, 6, dtype=dtype)
        self.targets = 3 * torch.randn(3, 10, 1, dtype=dtype)
        self.to(dtype)

    def losses(self, tasks: int = 3) -> list[Tensor]:
        hidden = self.trunk(self.inputs)
        return [(self.heads[t](hidden) - self.targets[t]).square().mean() for t in range(tasks)]

    def optimizer(self, **options) -> PCGrad:
        return PCGrad(torch.optim.SGD(self.parameters(), lr=0.1), **options)


def trunk_gradients(network: Network) -> list[list[Tensor]]:
    """Each task's gradients of the trunk."""
    return [list(torch.autograd.grad(loss, list(network.trunk.parameters()))) for loss in fresh(network)]


def fresh(network: Network) -> list[Tensor]:
    """The three losses, each with a graph of its own."""
    return [network.losses()[t] for t in range(3)]


def projected(rows: Tensor, seed: int) -> Tensor:
    """Algorithm 1 of Yu et al. 2020 on vectors [T, n]."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(rows), generator=generator).tolist() for _ in rows]
    result = rows.clone()
    for i, order in enumerate(orders):
        for j in order:
            if i != j and result[i] @ rows[j] < 0:
                result[i] -= (result[i] @ rows[j]) / (rows[j] @ rows[j]) * rows[j]
    return result


def flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def grads_of(module: nn.Module) -> Tensor:
    return flat(parameter.grad for parameter in module.parameters())


def with_gradients(*rows: list[float], dtype=torch.float32) -> tuple[nn.Parameter, list[Tensor]]:
    """A parameter, and losses that have these gradients."""
    parameter = nn.Parameter(torch.zeros(len(rows[0]), dtype=dtype))
    return parameter, [(parameter * torch.tensor(row, dtype=dtype)).sum() for row in rows]


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest):
    if request.param == "native" and not native.available():
        pytest.skip(native.missing_reason())
    with use_backend("reference" if request.param == "reference" else "auto"):
        yield


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shared_parameters_get_the_projected_sum_or_mean_of_vectors(backend, dtype, reduction: str) -> None:
    network = Network(dtype)
    rows = torch.stack([flat(row) for row in trunk_gradients(network)]).double()
    assert (rows @ rows.T).min() < 0  # there is a conflict
    optimizer = network.optimizer(reduction=reduction, generator=torch.Generator().manual_seed(7))
    optimizer.pc_backward(network.losses())
    expected = getattr(projected(rows, seed=7), reduction)(0)
    torch.testing.assert_close(grads_of(network.trunk), expected.to(dtype))


def test_in_bfloat16_the_result_is_the_projection_of_its_own_gradients(backend) -> None:
    network = Network(torch.bfloat16)
    rows = torch.stack([flat(row) for row in trunk_gradients(network)]).double()
    network.optimizer(generator=torch.Generator().manual_seed(7)).pc_backward(network.losses())
    expected = projected(rows, seed=7).sum(0)
    error = (grads_of(network.trunk).double() - expected).abs().max()
    assert error <= 2**-8 * expected.abs().max()  # rounded once


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_head_keeps_its_own_gradient_to_the_bit(reduction: str) -> None:
    network = Network()
    own = [torch.autograd.grad(loss, list(network.heads[t].parameters())) for t, loss in enumerate(fresh(network))]
    network.optimizer(reduction=reduction).pc_backward(network.losses())
    for head, expected in zip(network.heads, own, strict=True):
        assert torch.equal(grads_of(head), flat(expected))


def test_what_no_loss_reaches_and_what_is_frozen_keep_none() -> None:
    network = Network()
    network.trunk[0].weight.requires_grad_(False)
    network.optimizer().pc_backward(network.losses(2))
    for parameter in (network.trunk[0].weight, *network.heads[2].parameters(), *network.idle.parameters()):
        assert parameter.grad is None
    assert network.trunk[0].bias.grad is not None


def test_without_conflict_it_is_backward_of_the_sum() -> None:
    parameter, losses = with_gradients([1.0, 2.0], [3.0, 0.5])
    PCGrad(torch.optim.SGD([parameter])).pc_backward(losses)
    assert parameter.grad.tolist() == [4.0, 2.5]


def test_one_loss_is_backward_to_the_bit() -> None:
    one, other = Network(), Network()
    one.losses()[0].backward()
    other.optimizer().pc_backward(other.losses()[:1])
    for expected, parameter in zip(one.parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None)
        assert expected.grad is None or torch.equal(parameter.grad, expected.grad)


def test_with_two_losses_the_update_conflicts_with_neither() -> None:
    network = Network()
    rows = torch.stack([flat(row) for row in trunk_gradients(network)[:2]])
    network.optimizer().pc_backward(network.losses(2))
    update = grads_of(network.trunk)
    assert (rows @ update >= -1e-5 * rows.norm(dim=1) * update.norm()).all()


def test_calls_add_up_in_grad_as_backward_does() -> None:
    network = Network()
    generator = torch.Generator().manual_seed(0)
    optimizer = network.optimizer(generator=generator)
    optimizer.pc_backward(network.losses())
    once = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in network.parameters())
    for _ in range(2):
        generator.manual_seed(0)
        optimizer.pc_backward(network.losses())
    for name, parameter in network.named_parameters():
        assert name not in once or torch.equal(parameter.grad, 2 * once[name])


def test_surgery_is_about_the_shared_parameters_that_were_named() -> None:
    network = Network()
    named, other = network.trunk[0], network.trunk[2]
    gradients = trunk_gradients(network)
    rows = torch.stack([flat(row[:2]) for row in gradients]).double()
    optimizer = network.optimizer(shared=named.parameters(), generator=torch.Generator().manual_seed(3))
    optimizer.pc_backward(network.losses())
    torch.testing.assert_close(grads_of(named), projected(rows, seed=3).sum(0).float())
    torch.testing.assert_close(grads_of(other), sum(flat(row[2:]) for row in gradients))


def test_a_named_parameter_counts_even_where_one_loss_reaches_it() -> None:
    network = Network()
    everything = [*network.trunk.parameters(), *network.heads.parameters()]
    network.optimizer(shared=everything, reduction="mean").pc_backward(network.losses(2))
    alone = torch.autograd.grad(network.losses()[0], list(network.heads[0].parameters()))
    ratio = flat(parameter.grad for parameter in network.heads[0].parameters()) / flat(alone)
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))  # one weight for the whole task
    assert ratio[0] != 1


def test_the_generator_gives_the_order() -> None:
    def draw(**options) -> Tensor:
        network.zero_grad()
        network.optimizer(**options).pc_backward(network.losses())
        return grads_of(network.trunk)

    network = Network()
    seeded = [draw(generator=torch.Generator().manual_seed(seed)) for seed in (*range(8), 0)]
    assert torch.equal(seeded[0], seeded[-1])
    assert any(not torch.equal(seeded[0], other) for other in seeded)
    torch.manual_seed(5)
    first = draw()
    torch.manual_seed(5)
    assert torch.equal(first, draw())


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("weighting", [None, lambda gram: pytest.fail("asked about a Gram matrix that is not finite")])
def test_a_gradient_that_is_not_finite_projects_nothing_and_stays_visible(poison, reduction, weighting) -> None:
    parameter, losses = with_gradients([1.0, poison, 2.0], [-1.0, 1.0, -4.0])
    PCGrad(torch.optim.SGD([parameter]), reduction=reduction, weighting=weighting).pc_backward(losses)
    expected = torch.tensor([0.0, poison, -2.0]) / (2 if reduction == "mean" else 1)
    torch.testing.assert_close(parameter.grad, expected, equal_nan=True)


def test_scaled_losses_take_the_step_of_unscaled_ones_and_overflow_takes_none() -> None:
    plain, scaled = Network(), Network()
    optimizer = plain.optimizer(generator=torch.Generator().manual_seed(0))
    optimizer.pc_backward(plain.losses())
    optimizer.step()

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = scaled.optimizer(generator=torch.Generator().manual_seed(0))
    optimizer.pc_backward([scaler.scale(loss) for loss in scaled.losses()])
    scaler.step(optimizer.optimizer)
    scaler.update()
    torch.testing.assert_close(flat(scaled.parameters()), flat(plain.parameters()), rtol=1e-6, atol=1e-7)

    before = flat(scaled.parameters()).clone()
    optimizer.zero_grad()
    optimizer.pc_backward([scaler.scale(loss) * INF for loss in scaled.losses()])
    scaler.step(optimizer.optimizer)
    scaler.update()
    assert torch.equal(flat(scaled.parameters()), before)
    assert scaler.get_scale() == 2.0**15


def test_any_weighting_takes_pcgrads_place() -> None:
    parameter, losses = with_gradients([1.0, 0.0], [0.0, 1.0])
    grams = []
    weighting = lambda gram: grams.append(gram) or torch.tensor([2.0, 3.0])  # noqa: E731
    PCGrad(torch.optim.SGD([parameter]), weighting=weighting).pc_backward(losses)
    assert parameter.grad.tolist() == [2.0, 3.0]
    assert torch.equal(grams[0], torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["PCGradWeighting", "UPGradWeighting", "MGDAWeighting", "DualProjWeighting"])
def test_torchjds_weightings_work_as_they_are(name: str) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation", reason="needs torchjd, of the extra [bench]")
    try:
        weighting = getattr(aggregation, name)()
    except ImportError as error:  # some need a solver of quadratic programs
        pytest.skip(str(error))
    network = Network()
    rows = torch.stack([flat(row) for row in trunk_gradients(network)]).double()
    torch.manual_seed(1)
    expected = weighting(rows @ rows.T) @ rows
    torch.manual_seed(1)
    network.optimizer(weighting=weighting).pc_backward(network.losses())
    torch.testing.assert_close(grads_of(network.trunk), expected.float(), rtol=1e-4, atol=1e-5)


def test_pcgrad_is_torchjds_under_its_order() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation", reason="needs torchjd, of the extra [bench]")
    updates = []
    for weighting in (None, aggregation.PCGradWeighting()):
        network = Network()
        torch.manual_seed(1)
        network.optimizer(weighting=weighting).pc_backward(network.losses())
        updates.append(grads_of(network.trunk))
    torch.testing.assert_close(*updates)


def test_conflicts_are_those_of_the_last_call() -> None:
    parameter, losses = with_gradients([1.0, 0.0], [-1.0, 1.0])
    optimizer = PCGrad(torch.optim.SGD([parameter]))
    assert optimizer.conflicts is None
    optimizer.pc_backward(losses)
    assert optimizer.conflicts.cosine[0, 1].item() == pytest.approx(-(0.5**0.5))
    assert optimizer.conflicts.magnitude_similarity[0, 1].item() == pytest.approx(2 * 2**0.5 / 3)
    # the projected gradients are [0.5, 0.5] and [0, 1]; the plain sum is [0, 1]
    assert optimizer.conflicts.projected_share == pytest.approx(0.5**0.5)


def test_gradients_never_share_memory() -> None:
    """Autograd hands one tensor to both terms of a sum, and expanded ones to a sum's operand."""
    a, b, c = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    optimizer = PCGrad(torch.optim.SGD([a, b, c]))
    optimizer.pc_backward([(a + b).sum(), c.sum()])
    a.grad.mul_(5)
    assert b.grad.tolist() == [1.0, 1.0, 1.0]
    assert c.grad.is_contiguous()
    optimizer.pc_backward([(a + b).sum(), (a + b).sum() + c.sum()])
    assert a.grad.tolist() == [7.0] * 3


def test_gradients_lie_in_memory_as_their_parameters() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    PCGrad(torch.optim.SGD([weight])).pc_backward([weight.sum(), weight.square().sum().neg()])
    assert weight.grad.stride() == weight.stride()


def test_parameters_of_several_dtypes_share_one_gram_matrix() -> None:
    parameters = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    losses = [sum((p * sign).sum().double() for p in parameters) for sign in (1, -1)]
    optimizer = PCGrad(torch.optim.SGD(parameters))
    optimizer.pc_backward(losses)
    assert optimizer.conflicts.cosine[0, 1].item() == pytest.approx(-1)
    assert all(p.grad.dtype == p.dtype and p.grad.tolist() == [0.0, 0.0] for p in parameters)


def test_losses_may_share_a_graph_and_it_goes_with_the_last() -> None:
    network = Network()
    losses = network.losses()
    network.optimizer().pc_backward(losses)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses[-1].backward()


def test_the_native_ops_run(native_ops: list[str]) -> None:
    network = Network()
    network.optimizer().pc_backward(network.losses())
    assert native_ops == ["gram", "surgery_weights", "surgery_weights", "combine_", "combine_"]  # weights, conflicts


def test_the_rest_is_the_inner_optimizers() -> None:
    network = Network()
    inner = torch.optim.AdamW(network.parameters(), lr=0.01)
    optimizer = PCGrad(inner)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1, gamma=0.5)
    before = [loss.item() for loss in network.losses()]
    for _ in range(5):
        optimizer.zero_grad()
        optimizer.pc_backward(network.losses())
        optimizer.step()
    schedule.step()
    assert optimizer.optimizer is inner
    assert sum(loss.item() for loss in network.losses()) < sum(before)

    other = PCGrad(torch.optim.AdamW(network.parameters(), lr=1.0))
    other.load_state_dict(optimizer.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == 0.005
    assert str(other.state_dict()) == str(inner.state_dict())

    optimizer.zero_grad(set_to_none=False)
    assert grads_of(network.trunk).abs().sum() == 0
    assert optimizer.step(lambda: 3.0) == 3.0
