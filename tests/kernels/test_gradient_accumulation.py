"""Backwards of `linear` that add weight gradients to `.grad` in the product."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch

from minbert import kernels

OUTPUTS, INPUTS, BOUNDS = 48, 20, [0, 11, 11, 37]


def backward_twice(weight, bias, x):
    """By parameter, the gradients of three views, after two backwards that also read parts of them."""
    views = [[param.detach().requires_grad_() for _ in BOUNDS[1:]] for param in (weight, bias)]
    for factor in (1, 2):
        whole = kernels.linear(x * factor, *views, bounds=BOUNDS)
        parts = [[view[16:] for view in of_param] for of_param in views]
        part = kernels.linear(x, *parts, bounds=[0, 20, 20, 37])
        (whole.float().square().sum() + part.float().sin().sum()).backward()
    return [view.grad for of_param in views for view in of_param]


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = (OUTPUTS, INPUTS), (OUTPUTS,), (BOUNDS[-1], INPUTS)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    ("params", "activations"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_added_gradients_are_as_exact_as_autograds(params, activations):
    weight, bias, x = inputs()
    given = weight.to(params), bias.to(params), x.to(activations)
    exact = backward_twice(*(tensor.double() for tensor in given))
    by_autograd = backward_twice(*given)
    with kernels.weight_gradients_added():
        added = backward_twice(*given)
    for ours, theirs, right in zip(added, by_autograd, exact, strict=True):
        assert ours.dtype == params
        assert (ours - right).norm() <= 2 * (theirs - right).norm()


def test_a_gradient_that_is_there_stays_in_place():
    weight, _, x = inputs()
    weight.requires_grad_().grad = torch.ones(OUTPUTS, INPUTS)
    place = weight.grad
    with kernels.weight_gradients_added():
        kernels.linear(x, weight).sum().backward()
    assert weight.grad is place
    torch.testing.assert_close(place, 1 + x.sum(0).expand(OUTPUTS, INPUTS))


def additions(context):
    """The shapes of the tensors that torch adds to in a second backward."""
    weight, bias, x = inputs()
    weight.requires_grad_(), bias.requires_grad_()
    with context:
        kernels.linear(x, weight, bias).sum().backward()
        with torch.profiler.profile(record_shapes=True) as profile:
            kernels.linear(x, weight, bias).sum().backward()
    return [event.input_shapes[0] for event in profile.events() if event.name == "aten::add_"]


def test_nothing_is_added_to_a_weights_gradient_after_the_product():
    assert [OUTPUTS, INPUTS] in additions(nullcontext())
    assert [OUTPUTS, INPUTS] not in additions(kernels.weight_gradients_added())


def test_it_holds_for_its_thread_and_its_block():
    weight, _, x = inputs()
    weight.requires_grad_()
    found = []

    def elsewhere():
        found.extend(torch.autograd.grad(kernels.linear(x, weight).sum(), weight))

    with kernels.weight_gradients_added():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    elsewhere()
    assert torch.equal(*found)
    assert weight.grad is None


def test_gradients_that_have_no_place_go_through_autograd():
    """Those of a computed weight, and of one whose gradient is sparse."""
    weight, _, x = inputs()
    weight.requires_grad_()
    with kernels.weight_gradients_added():
        kernels.linear(x, 2 * weight).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * x.sum(0).expand(OUTPUTS, INPUTS))
    weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1, INPUTS), weight.shape, check_invariants=True
    )
    with kernels.weight_gradients_added():
        kernels.linear(x, weight).sum().backward()
    expected = x.sum(0).expand(OUTPUTS, INPUTS).clone()
    expected[1] += 1
    torch.testing.assert_close(weight.grad, expected)
