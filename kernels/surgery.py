"""Gradient surgery's two passes over memory: the Gram matrix of the task gradients, and their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, reference
from .dispatch import compiled
from .native import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # csrc/launch.h's DType


def native_arguments(grads: Sequence[Tensor | None], tasks: int) -> tuple[list[int], list[int], list[int]]:
    """Addresses [T * K] (0 for a missing tensor), sizes [K] and dtype codes [K]; no column is missing in every task."""
    count = len(grads) // tasks
    columns = [next(g for g in grads[k::count] if g is not None) for k in range(count)]
    addresses = [0 if g is None else g.data_ptr() for g in grads]
    return addresses, [g.numel() for g in columns], [_DTYPES[g.dtype] for g in columns]


@torch.library.custom_op("minbert::gram", mutates_args=(), device_types="cpu")
def _gram(grads: Sequence[Tensor | None], tasks: int) -> Tensor:
    addresses, sizes, dtypes = native_arguments(grads, tasks)
    chunks = sum(-(-size // library().CHUNK) for size in sizes)
    partials = torch.empty(chunks, tasks, tasks, dtype=torch.float64)
    gram = torch.empty(tasks, tasks, dtype=torch.float64)
    library().gram(addresses, sizes, dtypes, tasks, partials.data_ptr(), gram.data_ptr(), torch.get_num_threads())
    return gram


@_gram.register_fake
def _(grads: Sequence[Tensor | None], tasks: int) -> Tensor:
    device = next(g.device for g in grads if g is not None)
    return torch.empty(tasks, tasks, dtype=torch.float64, device=device)


@torch.library.custom_op("minbert::combine_", mutates_args=("out",), device_types="cpu")
def _combine_(grads: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]) -> None:
    tasks = weights.shape[0]
    addresses, sizes, dtypes = native_arguments(grads, tasks)
    outputs = [tensor.data_ptr() for tensor in out]
    library().combine(addresses, sizes, dtypes, tasks, weights.data_ptr(), outputs, torch.get_num_threads())


@_combine_.register_fake
def _(grads: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]) -> None:
    return None


def gram(grads: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """The Gram matrix of the task gradients, in one pass over memory whatever T.

    Args:
        grads: for each of T tasks one list of tensors (float32, bfloat16 or float64). None stands for zeros. The
            tensors at one position agree in shape, dtype and layout over the tasks, and are dense.

    Returns:
        float64 [T, T]: entry (i, j) is the sum over all elements of g_i g_j, accumulated in float64. The same bits for
        any number of threads. NaN and Inf spread to the entries of their own task.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    columns = checks.task_gradients("gram", grads)
    present = [k for k, column in enumerate(columns) if column is not None]
    if not present:
        return torch.zeros(len(grads), len(grads), dtype=torch.float64)
    device = columns[present[0]].device  # type: ignore[union-attr]
    if compiled("gram", device):
        return _gram([row[k] for row in grads for k in present], len(grads))
    return reference.gram(grads)


def combine(
    grads: Sequence[Sequence[Tensor | None]], weights: Tensor, out: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """The weighted sum of the task gradients, tensor by tensor, in one pass over memory.

    Args:
        grads: as for `gram`.
        weights: float64 [T].
        out: where to write, one tensor per position, shaped and laid out like the gradients there; new tensors when
            left out. A tensor of `out` may be one task's gradient at the same position (and may not overlap another).

    Returns:
        one tensor per position, accumulated in float32 (float64 for float64) and rounded once; None where no task has
        a tensor, whatever `out` holds there.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    columns = checks.task_gradients("combine", grads)
    if out is not None and len(out) != len(columns):
        raise ValueError(f"combine: out must have one entry for each of the {len(columns)} tensors, got {len(out)}")
    present = [(k, column) for k, column in enumerate(columns) if column is not None]
    checks.tensor("combine", "weights", weights, [len(grads)], [torch.float64])
    if not present:
        return [None] * len(columns)
    device = present[0][1].device
    if weights.device not in (device, torch.device("cpu")):
        raise ValueError(f"combine: weights must be on {device} like the gradients, got {weights.device}")

    results: list[Tensor | None] = [None] * len(columns)
    for k, column in present:
        target = torch.empty_like(column) if out is None else out[k]
        if not isinstance(target, Tensor):
            raise TypeError(f"combine: out[{k}] must be a tensor, got {type(target).__name__}")
        checks.same("combine", f"out[{k}]", target, column, "the gradients there")
        results[k] = target

    if compiled("combine", device):
        _combine_([row[k] for row in grads for k, _ in present], weights, [results[k] for k, _ in present])
    else:
        for target, value in zip(results, reference.combine(grads, weights), strict=True):
            if target is not None and value is not None:
                target.copy_(value)
    return results


def clip_weights(gram: Tensor, weights: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Weights with which the weighted sum of the gradients has a norm of at most `max_norm`: clipping at no cost.

    The L2 norm of the sum is known from the Gram matrix, |sum w g|^2 = w' G w, and the clip factor scales the weights.
    Nothing waits for a device.

    Args:
        gram: float64 [T, T], as from `gram`.
        weights: float64 [T].
        max_norm: 0 or more.

    Returns:
        the weights [T], and the norm before clipping, a float64 scalar. A norm of NaN or Inf changes no weight: the
        caller decides what to do about the step. (torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm.)

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.tensor("clip_weights", "weights", weights, ["T"], [torch.float64])
    checks.tensor("clip_weights", "gram", gram, [len(weights)] * 2, [torch.float64], like=weights)
    if not max_norm >= 0:
        raise ValueError(f"clip_weights: max_norm must be 0 or more, got {max_norm}")
    return reference.clip_weights(gram, weights, max_norm)
