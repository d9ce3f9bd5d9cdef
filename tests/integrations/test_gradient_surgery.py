"""GradientSurgery in a loop of one's own: every rule, accumulation, GradScaler, and a state that resumes to the bit."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

from minbert.integrations import GradientSurgery, PCGrad
from minbert.methods.weightings import WEIGHTINGS, Weighting, weighting_from

TEXTS = {"constant": "constant(values=[0.5, 1.0, 2.0])"}
PARTS = [slice(0, 4), slice(4, 8), slice(8, 12)]
RULES = [TEXTS.get(name, name) for name in WEIGHTINGS]
STATEFUL = ["nash-mtl(every=2)", "gradvac", "famo", "uncertainty", "dwa(every=2)", "gradnorm"]


class Network(nn.Module):
    """A trunk, and a head for each of three tasks; float64, so that sums differ by rounding alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.x, self.y = torch.randn(12, 6), 3 * torch.randn(3, 12, 1)
        self.double()
        self.x, self.y = self.x.double(), self.y.double()

    def losses(self, rows: slice = slice(None)) -> list[Tensor]:
        hidden = self.trunk(self.x[rows])
        return [(head(hidden) - y[rows]).square().mean() for head, y in zip(self.heads, self.y, strict=True)]

    def optimizer(self, rule="upgrad", **options) -> GradientSurgery:
        return GradientSurgery(torch.optim.AdamW(self.parameters(), lr=0.01), rule, **options)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def grads_of(module: nn.Module) -> Tensor:
    return flat(parameter.grad for parameter in module.parameters())


def trunk_rows(network: Network) -> Tensor:
    """Each task's gradient of the trunk [T, n]."""
    parameters = list(network.trunk.parameters())
    return torch.stack([flat(torch.autograd.grad(network.losses()[t], parameters)) for t in range(3)])


@pytest.mark.parametrize("rule", RULES)
def test_the_trunk_gets_the_weighted_sum_and_a_head_its_own_gradient(rule: str) -> None:
    network = Network()
    rows, losses = trunk_rows(network), flat(network.losses())
    weighting = weighting_from(rule)
    weights = weighting.weights(rows @ rows.T, losses=losses, state=weighting.state(3), generator=seeded())
    optimizer = network.optimizer(rule, generator=seeded())
    optimizer.backward(network.losses())
    torch.testing.assert_close(optimizer.weights, weights)
    torch.testing.assert_close(grads_of(network.trunk), weights @ rows)
    for head, loss in zip(network.heads, network.losses(), strict=True):
        assert torch.equal(grads_of(head), flat(torch.autograd.grad(loss, list(head.parameters()), retain_graph=True)))


@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_plain_rules_are_backward_of_the_sum_or_mean(rule: str) -> None:
    network = Network()
    rows = trunk_rows(network)
    network.optimizer(rule).backward(network.losses())
    torch.testing.assert_close(grads_of(network.trunk), getattr(rows, rule)(0))


def test_a_name_an_object_and_a_callable_are_one_rule() -> None:
    rule = weighting_from("cagrad(c=0.3)")
    results = []
    for given in ("cagrad(c=0.3)", rule, lambda gram: rule.weights(gram)):
        network = Network()
        network.optimizer(given).backward(network.losses())
        results.append(grads_of(network))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    network = Network()
    network.optimizer("cagrad(c=0.9)").backward(network.losses())
    assert not torch.allclose(results[0], grads_of(network))


def test_a_callable_with_a_parameter_losses_gets_them() -> None:
    network = Network()
    optimizer = network.optimizer(lambda gram, losses: 1 / losses)
    for part in PARTS:
        optimizer.backward(network.losses(part), hold=part is not PARTS[-1])
    expected = sum(flat(network.losses(part)) for part in PARTS)
    torch.testing.assert_close(optimizer.weights, 1 / expected)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_pcgrad_is_one_of_the_rules(reduction: str) -> None:
    one, other = Network(), Network()
    one.optimizer("pcgrad", reduction=reduction, generator=seeded()).backward(one.losses())
    optimizer = PCGrad(torch.optim.AdamW(other.parameters()), reduction, generator=seeded())
    assert isinstance(optimizer, GradientSurgery)
    optimizer.pc_backward(other.losses())
    assert torch.equal(grads_of(one), grads_of(other))


# Accumulation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["upgrad", "famo", "pcgrad", "nash-mtl"])
def test_held_batches_are_one_large_batch(rule: str) -> None:
    whole, parts = Network(), Network()
    whole.optimizer(rule, generator=seeded()).backward(whole.losses())
    optimizer = parts.optimizer(rule, generator=seeded())
    for part in PARTS:
        assert all(parameter.grad is None for parameter in parts.parameters())
        optimizer.backward([loss / 3 for loss in parts.losses(part)], hold=part is not PARTS[-1])
    torch.testing.assert_close(grads_of(parts), grads_of(whole), rtol=1e-10, atol=1e-12)


def test_calls_that_are_not_held_apply_surgery_to_each_batch() -> None:
    network, alone = Network(), []
    for part in PARTS:
        network.zero_grad()
        network.optimizer().backward(network.losses(part))
        alone.append(grads_of(network))
    network.zero_grad()
    optimizer = network.optimizer()
    for part in PARTS:
        optimizer.backward(network.losses(part))
    torch.testing.assert_close(grads_of(network), sum(alone))
    network.zero_grad()
    optimizer.backward([loss * 3 for loss in network.losses()])  # of one batch it is another update
    assert not torch.allclose(grads_of(network.trunk), flat(sum(alone))[: len(grads_of(network.trunk))])


def test_a_task_without_examples_in_a_batch_is_none() -> None:
    network, other = Network(), Network()
    optimizer = network.optimizer("famo")
    first, second = network.losses(PARTS[0]), network.losses(PARTS[1])
    optimizer.backward([first[0], None, first[2]], hold=True)
    optimizer.backward([second[0], second[1], None])
    a, b = other.losses(PARTS[0]), other.losses(PARTS[1])
    other.optimizer("famo").backward([a[0] + b[0], b[1], a[2]])
    torch.testing.assert_close(grads_of(network), grads_of(other), rtol=1e-10, atol=1e-12)

    network.zero_grad()
    optimizer = network.optimizer("upgrad")
    losses = network.losses()
    optimizer.backward([losses[0], None, losses[2]])
    assert network.heads[1].weight.grad is None
    assert optimizer.weights.isfinite().all()


def test_held_gradients_are_neither_lost_nor_used_by_accident() -> None:
    network = Network()
    optimizer = network.optimizer()
    optimizer.backward(network.losses(), hold=True)
    with pytest.raises(ValueError, match=r"GradientSurgery\.step: the gradients of a call with hold=True wait for one"):
        optimizer.step()
    with pytest.raises(ValueError, match="losses must be 3, as many as those whose gradients are held, got 2"):
        optimizer.backward(network.losses()[:2])
    optimizer.zero_grad()
    optimizer.step()
    optimizer.backward(network.losses())
    expected = Network()
    expected.optimizer().backward(expected.losses())
    assert torch.equal(grads_of(network), grads_of(expected))


def test_a_rule_that_needs_losses_says_which_is_missing() -> None:
    network = Network()
    losses = network.losses()
    with pytest.raises(
        ValueError, match=r"the rule needs a loss of every task in each update, got none of losses\[1\]"
    ):
        network.optimizer("famo").backward([losses[0], None, losses[2]])
    assert network.trunk[0].weight.grad is None


# GradScaler and closures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["upgrad", "famo", "gradnorm", "nash-mtl"])
def test_a_grad_scaler_changes_no_rule(rule: str) -> None:
    plain, scaled = Network(), Network()
    one, other = plain.optimizer(rule), scaled.optimizer(rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for _ in range(5):
        one.zero_grad()
        one.backward(plain.losses())
        one.step()
        other.zero_grad()
        other.backward(scaled.losses(), scaler=scaler)
        scaler.unscale_(other)
        assert nn.utils.clip_grad_norm_(scaled.parameters(), 1e6) < 1e3
        scaler.step(other)
        scaler.update()
    assert scaler.get_scale() > 2.0**10
    torch.testing.assert_close(flat(scaled.parameters()), flat(plain.parameters()), rtol=1e-9, atol=1e-11)


def test_overflow_skips_the_step_and_leaves_the_state() -> None:
    network = Network()
    optimizer, scaler = network.optimizer("famo"), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.backward(network.losses(), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    before, state = flat(network.parameters()), optimizer.state_dict()["surgery"]["state"]
    optimizer.zero_grad()
    optimizer.backward([loss * math.inf for loss in network.losses()], scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(network.parameters()), before)
    assert torch.equal(optimizer.state_dict()["surgery"]["state"], state)
    assert scaler.get_scale() == 2.0**9


def test_a_closure_runs_surgery_as_often_as_the_optimizer_asks() -> None:
    network, values = Network(), []
    optimizer = GradientSurgery(torch.optim.LBFGS(network.parameters(), max_iter=4), "upgrad")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = network.losses()
        optimizer.backward(losses)
        values.append(sum(losses).item())
        return sum(losses)

    optimizer.step(closure)
    assert len(values) > 2
    assert values[-1] < values[0]


# State --------------------------------------------------------------------------------------------------------------


class Smoothed:
    """A callable with a state in its attributes."""

    def __init__(self) -> None:
        self.average: Tensor | None = None

    def __call__(self, gram: Tensor) -> Tensor:
        self.average = gram if self.average is None else torch.lerp(self.average, gram, 0.5)
        return self.average.diagonal().rsqrt()


def steps(network: Network, optimizer: GradientSurgery, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        optimizer.backward(network.losses())
        optimizer.step()


@pytest.mark.parametrize("rule", [*STATEFUL, "random", "pcgrad", "upgrad", Smoothed])
def test_a_run_resumes_to_the_bit(rule) -> None:
    def new(seed: int) -> tuple[Network, GradientSurgery]:
        network = Network()
        return network, network.optimizer(rule if isinstance(rule, str) else rule(), generator=seeded(seed))

    network, optimizer = new(1)
    steps(network, optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(network, optimizer, 5)

    other, resumed = new(2)
    file.seek(0)
    saved = torch.load(file)  # weights_only: numbers, strings, containers and tensors
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    steps(other, resumed, 5)
    assert torch.equal(flat(other.parameters()), flat(network.parameters()))
    assert torch.equal(resumed.weights, optimizer.weights)


@pytest.mark.parametrize("rule", STATEFUL)
def test_a_state_from_before_the_first_update_starts_the_rule_anew(rule: str) -> None:
    ends = []
    network = Network()
    optimizer = network.optimizer(rule, generator=seeded())
    weights, start = copy.deepcopy(network.state_dict()), copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        network.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(start))
        steps(network, optimizer, 4)
        ends.append(flat(network.parameters()))
    assert torch.equal(*ends)


def test_a_copy_goes_on_as_the_original_does() -> None:
    network = Network()
    optimizer = network.optimizer("famo")
    steps(network, optimizer, 3)
    optimizer.zero_grad()
    optimizer.backward(network.losses(), hold=True)
    copied, its = copy.deepcopy((network, optimizer))
    for one, other in ((network, optimizer), (copied, its)):
        other.backward(one.losses())
        other.step()
    assert torch.equal(flat(network.parameters()), flat(copied.parameters()))


def test_without_state_the_dictionary_is_the_inner_optimizers() -> None:
    network = Network()
    optimizer = network.optimizer("upgrad")
    steps(network, optimizer, 1)
    assert optimizer.state_dict().keys() == optimizer.optimizer.state_dict().keys()


def test_a_state_of_another_rule_is_refused() -> None:
    network = Network()
    famo, plain = network.optimizer("famo"), network.optimizer("upgrad")
    message = r"load_state_dict: expected the state of the rule famo, got that of None; to start the rule anew"
    with pytest.raises(ValueError, match=message):
        famo.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="expected the state of the rule dwa, got that of famo"):
        network.optimizer("dwa").load_state_dict(famo.state_dict())
    famo.optimizer.load_state_dict(plain.state_dict())
    famo.load_state_dict(famo.state_dict())  # before the first update, too


def test_a_callable_whose_state_cannot_be_saved_is_named() -> None:
    class Odd:
        def __init__(self) -> None:
            self.log = (each for each in ())

        def __call__(self, gram: Tensor) -> Tensor:
            return torch.ones(len(gram))

    optimizer = Network().optimizer(Odd())
    with pytest.warns(UserWarning, match=r"the rule's attribute log \(generator\) cannot be saved"):
        assert "surgery" not in optimizer.state_dict()


# Messages -----------------------------------------------------------------------------------------------------------


def test_messages_of_rules() -> None:
    network = Network()
    with pytest.raises(ValueError, match=r"GradientSurgery: rule cagard: unknown.*cagrad"):
        network.optimizer("cagard")
    with pytest.raises(ValueError, match=r"GradientSurgery: rule cagrad\(d=1\): cagrad has no option d"):
        network.optimizer("cagrad(d=1)")
    with pytest.raises(TypeError, match="rule must be a name, a Weighting or a callable, got float"):
        network.optimizer(0.4)
    with pytest.raises(ValueError, match="must return one weight for each of 3 losses, got"):
        network.optimizer(lambda gram: torch.ones(2)).backward(network.losses())
    with pytest.raises(ValueError, match=r"GradientSurgery\.backward: losses must hold one scalar tensor per task"):
        network.optimizer().backward([None, None])
    assert isinstance(weighting_from("upgrad"), Weighting)
