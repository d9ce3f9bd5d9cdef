"""AdamW gives torch's numbers and keeps torch's interface."""

from __future__ import annotations

import copy

import pytest
import torch

from minbert.kernels.gradient_table import GradientColumns, GradientTable
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


class Gradients:
    """Parameters whose gradients, all 1, are given to `combined_step`."""

    def __init__(self, params):
        self.params = params
        self.columns = GradientColumns(params, 1)
        self.none = GradientTable(GradientColumns([], 1), [])

    def step(self, optimizer, params=None):
        reached = {id(param) for param in params or self.params}
        grads = [torch.ones_like(param) if id(param) in reached else None for param in self.params]
        one = torch.ones(1, dtype=torch.float64)
        return optimizer.combined_step(self.none, GradientTable(self.columns, grads), one, one)


def steps_of(optimizer, params):
    return [int(optimizer.state[param]["step"]) for param in params]


def test_a_step_is_taken_back_where_it_was_counted():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer, gradients = AdamW([param]), Gradients([param])
    optimizer.select("a")
    counted = gradients.step(optimizer)
    optimizer.select("b")
    gradients.step(optimizer)
    optimizer.uncount(counted)
    assert (optimizer.state[param]["step@a"], optimizer.state[param]["step@b"]) == (0, 1)


def test_a_step_is_taken_back_of_parameters_that_step_apart_since():
    params, _ = models()
    optimizer, gradients = AdamW(params), Gradients(params)
    counted = gradients.step(optimizer)
    gradients.step(optimizer, params[1:3])
    assert steps_of(optimizer, params) == [1, 2, 2, 1]
    optimizer.uncount(counted)
    assert steps_of(optimizer, params) == [0, 1, 1, 0]


def test_parameters_that_step_together_share_a_count():
    params, _ = models()
    optimizer, gradients = AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]), Gradients(params)
    for _ in range(3):
        gradients.step(optimizer)
    counts = [optimizer.state[param]["step"] for param in params]
    assert counts[0] is counts[1]
    assert counts[2] is counts[3]
    assert counts[0] is not counts[2]
    assert {(count.dtype, count.shape, count.item()) for count in counts} == {(torch.float32, torch.Size(), 3.0)}
    saved = [entries["step"] for entries in optimizer.state_dict()["state"].values()]
    assert saved == [3, 3, 3, 3]
    assert len({count.data_ptr() for count in saved}) == 4  # torch's AdamW counts each by itself


@pytest.mark.parametrize("through", ["load", "load_state_dict"])
def test_steps_of_any_parameters_go_on_to_the_bit_where_they_were_saved(through):
    """Each step reaches other parameters; the state is saved after three, and loaded into a new optimizer."""
    reached = [(0, 1, 2, 3), (0, 1), (0, 2), (1, 3), (0, 1, 2, 3), (2,), (0, 1, 2, 3)]

    def run(save_after=None):
        params, _ = models()
        optimizer, gradients = AdamW(params, lr=0.1), Gradients(params)
        for number, chosen in enumerate(reached):
            if number == save_after:
                state, optimizer = copy.deepcopy(optimizer.state_dict()), AdamW(params, lr=0.1)
                if through == "load":
                    optimizer.load({params[i]: entries for i, entries in state["state"].items()})
                else:
                    optimizer.load_state_dict(state)
            gradients.step(optimizer, [params[i] for i in chosen])
        assert steps_of(optimizer, params) == [5, 5, 5, 4]
        return params

    for whole, resumed in zip(run(), run(save_after=3), strict=True):
        assert torch.equal(whole, resumed)


def test_state_that_is_loaded_is_what_the_next_step_reads():
    params, _ = models()
    optimizer, gradients = AdamW(params), Gradients(params)
    gradients.step(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        entries["exp_avg"].fill_(7.0)
    optimizer.load_state_dict(state)
    gradients.step(optimizer)
    for param in params:
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.full_like(param, 0.9 * 7 + 0.1))


def test_a_parameter_that_was_moved_is_updated_where_it_is():
    params, _ = models()
    optimizer, gradients = AdamW(params), Gradients(params)
    gradients.step(optimizer)
    before = params[0].data
    params[0].data = before.clone()
    kept = before.clone()
    gradients.step(optimizer)
    assert torch.equal(before, kept)
    assert (params[0] < kept).all()


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
