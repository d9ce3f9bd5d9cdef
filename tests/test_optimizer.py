"""AdamW gives torch's numbers and keeps torch's interface."""

from __future__ import annotations

import copy

import pytest
import torch

from minbert.training.optimizer import AdamW

SHAPES = [(7, 5), (64,), (3, 2, 2), (1,)]


def models(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]
    return ours, [torch.nn.Parameter(p.detach().clone()) for p in ours]


def set_gradients(params, twins, step, scale):
    generator = torch.Generator().manual_seed(1000 + step)
    for index, (param, twin) in enumerate(zip(params, twins, strict=True)):
        reached = not (index == 1 and step % 3)  # a parameter that only every third step reaches
        gradient = torch.randn(param.shape, generator=generator, dtype=param.dtype) * scale
        param.grad, twin.grad = (gradient.clone(), gradient.clone()) if reached else (None, None)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-9])  # gradients near eps show a misplaced eps
@pytest.mark.parametrize("options", [{}, {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}])
def test_equals_torch_to_float32_rounding(options, scale):
    ours, twins = models()
    exact = [torch.nn.Parameter(p.detach().double()) for p in ours]
    mine = AdamW(ours, **{"lr": 1e-3, **options})
    theirs = torch.optim.AdamW(twins, **{"lr": 1e-3, "weight_decay": 0.01, **options})
    truth = torch.optim.AdamW(exact, **{"lr": 1e-3, "weight_decay": 0.01, **options})
    for step in range(60):
        set_gradients(ours, twins, step, scale)
        for param, twin in zip(exact, twins, strict=True):
            param.grad = None if twin.grad is None else twin.grad.double()
        mine.step()
        theirs.step()
        truth.step()
    for param, twin, reference in zip(ours, twins, exact, strict=True):
        theirs_off = (twin.double() - reference).abs().max()
        unit = (
            torch.finfo(torch.float32).eps * reference.abs().max()
        )  # torch may be lucky; allow one unit in the last place
        assert (param.double() - reference).abs().max() <= 2 * theirs_off + unit


def test_weight_decay_follows_the_groups():
    ours, twins = models()
    groups = lambda params: [{"params": params[:2], "weight_decay": 0.5}, {"params": params[2:], "weight_decay": 0.0}]  # noqa: E731
    mine, theirs = AdamW(groups(ours), lr=0.1), torch.optim.AdamW(groups(twins), lr=0.1)
    set_gradients(ours, twins, 0, 1.0)
    mine.step()
    theirs.step()
    for param, twin in zip(ours, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)


def test_state_moves_to_torch_and_back():
    ours, twins = models()
    mine, theirs = AdamW(ours, lr=0.01), torch.optim.AdamW(twins, lr=0.01, weight_decay=0.01)
    for step in range(3):
        set_gradients(ours, twins, step, 1.0)
        mine.step()
    state = copy.deepcopy(mine.state_dict()["state"])
    theirs.load_state_dict({**theirs.state_dict(), "state": state})
    with torch.no_grad():
        for param, twin in zip(ours, twins, strict=True):
            twin.copy_(param)
    set_gradients(ours, twins, 3, 1.0)
    mine.step()
    theirs.step()
    for param, twin in zip(ours, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)


def test_selected_moments_are_those_of_an_optimizer_of_its_own():
    (one, *_), (other, *_) = models()
    mine, theirs = AdamW([one], lr=0.01), {name: AdamW([other], lr=0.01) for name in "ab"}
    for step, name in enumerate("aabaabb"):
        set_gradients([one], [other], step, 1.0)
        mine.select(name)
        mine.step()
        theirs[name].step()
        assert torch.equal(one, other)
    assert mine.state[one]["step@a"] == 4
    assert mine.state[one]["step@b"] == 3


def test_a_step_is_taken_back_where_it_was_counted():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([param])
    param.grad = torch.ones(2)
    optimizer.select("a")
    counted = optimizer.combined_step({}, torch.ones(0, dtype=torch.float64))
    optimizer.select("b")
    optimizer.step()
    optimizer.uncount(counted)
    assert (optimizer.state[param]["step@a"], optimizer.state[param]["step@b"]) == (0, 1)


def test_closure_and_parameters_without_a_gradient():
    param, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([param, idle], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0
    assert torch.equal(idle, torch.ones(2))
    assert (param < 1).all()


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"eps": -1e-8}, {"weight_decay": -1.0}, {"betas": (1.0, 0.9)}, {"lr": float("nan")}]
)
def test_arguments_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdamW([torch.nn.Parameter(torch.ones(1))], **bad)
