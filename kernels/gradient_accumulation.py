"""Gradients of a linear layer's parameters that a backward adds to their `.grad` in the product that forms them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_thread = threading.local()  # another thread's backward may want its gradients returned


@contextmanager
def weight_gradients_added() -> Iterator[None]:
    """Let backwards of `linear` in this block add the gradients of weights and biases to `.grad` themselves.

    It holds for this thread. Otherwise autograd holds the gradients of two forwards apart and adds them up afterwards.
    `torch.autograd.grad` finds none of these gradients, and no hook on the parameters runs.
    """
    before = getattr(_thread, "adds", False)
    _thread.adds = True
    try:
        yield
    finally:
        _thread.adds = before


def is_added(*params: Tensor) -> bool:
    """Whether a backward adds the gradients of these parameters itself: leaves of the graph, or parts of leaves."""
    return getattr(_thread, "adds", False) and all(map(_has_place, params))


def _has_place(param: Tensor) -> bool:
    leaf = _leaf(param)
    if leaf is None or not (leaf.is_leaf and leaf.requires_grad and leaf.is_contiguous() and param.is_contiguous()):
        return False
    return leaf.grad is None or (leaf.grad.layout == torch.strided and leaf.grad.is_contiguous())


def _leaf(param: Tensor) -> Tensor | None:
    return param if param.is_leaf else param._base


def add_weight_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add grad.T @ x, of [N, outputs] and [N, inputs], to the gradient of a weight for which `is_added`."""
    same = weight.dtype == grad.dtype
    total, beta = _gradient(weight, zeros=not same)
    if same:
        torch.addmm(total, grad.t(), x, beta=beta, out=total)
    else:
        total += F.linear(grad.t(), x.t())


def add_bias_gradient(bias: Tensor, sums: Tensor) -> None:
    """Add `sums` to the gradient of a bias for which `is_added`."""
    total, _ = _gradient(bias, zeros=True)
    total += sums


def _gradient(param: Tensor, *, zeros: bool) -> tuple[Tensor, int]:
    """The parameter's part of its leaf's gradient, and 0 where nothing is in it yet: zeros only if wanted."""
    leaf = _leaf(param)
    assert leaf is not None  # says `is_added`
    empty = leaf.grad is None and leaf is param and not zeros
    if leaf.grad is None:
        leaf.grad = torch.empty_like(leaf) if empty else torch.zeros_like(leaf)
    start = param.storage_offset() - leaf.storage_offset()
    return leaf.grad.view(-1)[start : start + param.numel()].view(param.shape), int(not empty)
