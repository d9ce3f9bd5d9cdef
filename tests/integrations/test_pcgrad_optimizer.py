"""PCGrad is a torch.optim.Optimizer: schedules, GradScaler, hooks, closures and copies take it as they take others."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from minbert.integrations import PCGrad


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
        self.x = torch.randn(8, 4)

    def losses(self) -> list[Tensor]:
        z = torch.tanh(self.body(self.x))
        return [(head(z) - target).square().mean() for head, target in zip(self.heads, (1.0, -2.0), strict=True)]


def wrapped(network: Network, kind=torch.optim.SGD, **options) -> PCGrad:
    inner = kind(network.parameters(), **{"lr": 0.1, **options})
    return PCGrad(inner, generator=torch.Generator().manual_seed(0))


def step(optimizer: PCGrad, network: Network) -> None:
    optimizer.zero_grad()
    optimizer.pc_backward(network.losses())
    optimizer.step()


SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("name", [*SCHEDULES, "transformers"])
def test_a_schedule_around_it_is_one_around_the_optimizer_inside(name: str) -> None:
    if name == "transformers":
        transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra [test]")
        make = lambda o: transformers.get_linear_schedule_with_warmup(o, 2, 6)  # noqa: E731
    else:
        make = SCHEDULES[name]
    rates, weights = [], []
    for outside in (False, True):
        network = Network()
        optimizer = wrapped(network, momentum=0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as of a schedule's step before the optimizer's
            schedule = make(optimizer if outside else optimizer.optimizer)
            seen = []
            for _ in range(5):
                step(optimizer, network)
                schedule.step(*([1.0] if name == "plateau" else []))
                seen.append(optimizer.param_groups[0]["lr"])
        rates.append(seen)
        weights.append(network.body.weight)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    assert torch.equal(*weights)


def test_a_grad_scaler_unscales_skips_and_steps_it() -> None:
    plain, scaled = Network(), Network()
    step(wrapped(plain, torch.optim.AdamW), plain)

    optimizer, scaler = wrapped(scaled, torch.optim.AdamW), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer.pc_backward([scaler.scale(loss) for loss in scaled.losses()])
    scaler.unscale_(optimizer)
    assert nn.utils.clip_grad_norm_(scaled.parameters(), 1e6) < 100  # not 2**16 times that
    scaler.step(optimizer)
    scaler.update()
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    before = scaled.body.weight.detach().clone()
    optimizer.zero_grad()
    optimizer.pc_backward([scaler.scale(loss) * torch.inf for loss in scaled.losses()])
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(scaled.body.weight, before)
    assert scaler.get_scale() == 2.0**15


def test_its_groups_state_and_defaults_are_those_of_the_optimizer_inside() -> None:
    network = Network()
    inner = torch.optim.AdamW(network.body.parameters(), lr=0.01)
    optimizer = PCGrad(inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.add_param_group({"params": list(network.heads.parameters()), "lr": 0.5})
    assert [group["lr"] for group in inner.param_groups] == [0.01, 0.5]
    step(optimizer, network)
    assert optimizer.state[network.body.weight]["step"] == 1
    inner.load_state_dict(inner.state_dict())  # puts new lists into it
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert "lr: 0.5" in repr(optimizer)


def test_hooks_are_the_inner_optimizers() -> None:
    network, seen = Network(), []
    optimizer = wrapped(network)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o)))
    handle = optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o)))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("saves", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append(("saved", o)))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(("loads", o)))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o)))
    step(optimizer, network)
    optimizer.load_state_dict(optimizer.state_dict())
    handle.remove()
    step(optimizer, network)
    names = ["before", "after", "saves", "saved", "loads", "loaded", "before"]
    assert seen == [(name, optimizer.optimizer) for name in names]


def test_a_closure_runs_surgery_as_often_as_the_optimizer_asks() -> None:
    network, calls = Network(), []
    optimizer = wrapped(network, torch.optim.LBFGS, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = network.losses()
        optimizer.pc_backward(losses)
        calls.append(sum(losses).item())
        return sum(losses)

    optimizer.step(closure)
    assert len(calls) > 2
    assert calls[-1] < calls[0]


def test_gradients_accumulate_after_either_zero_grad() -> None:
    results = []
    for to_none in (True, False):
        network = Network()
        optimizer = wrapped(network)
        step(optimizer, network)
        optimizer.zero_grad(set_to_none=to_none)
        for _ in range(2):
            optimizer.pc_backward(network.losses())
        results.append([parameter.grad for parameter in network.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_copy_goes_on_as_the_original_does() -> None:
    network = Network()
    optimizer = wrapped(network, momentum=0.9)
    step(optimizer, network)
    network_copy, optimizer_copy = copy.deepcopy((network, optimizer))
    for one, other in ((optimizer, network), (optimizer_copy, network_copy)):
        step(one, other)
    assert optimizer_copy.param_groups[0]["params"][0] is network_copy.body.weight
    assert torch.equal(network.body.weight, network_copy.body.weight)
