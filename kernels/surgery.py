"""Gradient surgery: the Gram matrix of the task gradients, from it their weights, and with these their weighted sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import checks, reference
from .dispatch import compiled
from .native import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # csrc/kernels.h's DType


def _present(grads: Sequence[Tensor | None]) -> Tensor:
    return next(grad for grad in grads if grad is not None)


def native_arguments(grads: Sequence[Tensor | None], tasks: int) -> tuple[list[int], list[int], list[int], int]:
    """Addresses [T * K] (0 for a missing tensor), sizes [K], dtype codes [K], T; no column is missing in every task."""
    count = len(grads) // tasks
    columns = [first if first is not None else _present(grads[k::count]) for k, first in enumerate(grads[:count])]
    addresses = [0 if g is None else g.data_ptr() for g in grads]
    return addresses, [g.numel() for g in columns], [_DTYPES[g.dtype] for g in columns], tasks


@contextmanager
def stream_of(device: torch.device) -> Iterator[int]:
    """The current stream of a CUDA device, which is the current device meanwhile."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def _scratch_for_gram(sizes: Sequence[int], tasks: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """csrc/kernels.h's partials, and where the Gram matrix goes."""
    chunks = sum(-(-size // library().CHUNK) for size in sizes)
    partials = torch.empty(chunks, parts, tasks, tasks, dtype=torch.float64, device=device)
    return partials, torch.empty(tasks, tasks, dtype=torch.float64, device=device)


@torch.library.custom_op("minbert::gram", mutates_args=(), device_types="cpu")
def _gram(grads: Sequence[Tensor | None], tasks: int) -> Tensor:
    arguments = native_arguments(grads, tasks)
    partials, gram = _scratch_for_gram(arguments[1], tasks, 1, torch.device("cpu"))
    library().gram(arguments, partials.data_ptr(), gram.data_ptr(), torch.get_num_threads())
    return gram


@_gram.register_kernel("cuda")
def _(grads: Sequence[Tensor | None], tasks: int) -> Tensor:
    arguments = native_arguments(grads, tasks)
    device = _present(grads).device
    partials, gram = _scratch_for_gram(arguments[1], tasks, library().CHUNK_PARTS, device)
    with stream_of(device) as stream:
        library().cuda_gram(arguments, partials.data_ptr(), gram.data_ptr(), stream)
    return gram


@_gram.register_fake
def _(grads: Sequence[Tensor | None], tasks: int) -> Tensor:
    device = _present(grads).device
    return torch.empty(tasks, tasks, dtype=torch.float64, device=device)


@torch.library.custom_op("minbert::combine_", mutates_args=("out",), device_types="cpu")
def _combine_(grads: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]) -> None:
    outputs = [tensor.data_ptr() for tensor in out]
    arguments = native_arguments(grads, weights.shape[0])
    library().combine(arguments, weights.data_ptr(), outputs, torch.get_num_threads())


@_combine_.register_kernel("cuda")
def _(grads: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]) -> None:
    outputs = [tensor.data_ptr() for tensor in out]
    arguments = native_arguments(grads, weights.shape[0])
    with stream_of(weights.device) as stream:
        library().cuda_combine(arguments, weights.data_ptr(), outputs, stream)


@_combine_.register_fake
def _(grads: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]) -> None:
    return None


def _surgery_arguments(
    gram: Tensor,
    orders: Tensor | None,
    weights: Tensor | None,
    own_square: Tensor | None,
    max_norm: float,
    mean: bool,
) -> tuple[tuple[int | float, ...], tuple[Tensor, Tensor, Tensor]]:
    """csrc/kernels.h's SurgeryProblem and SurgeryResult, and the tensors of the latter: weights, stats, scratch."""
    tasks = gram.shape[0]
    result = gram.new_empty(tasks), gram.new_empty(4), gram.new_empty(tasks + 3, tasks)
    given = (0 if tensor is None else tensor.data_ptr() for tensor in (gram, orders, weights, own_square))
    return (tasks, *given, max_norm, mean, *(tensor.data_ptr() for tensor in result)), result


@torch.library.custom_op("minbert::surgery_weights", mutates_args=(), device_types="cpu")
def _surgery_weights(
    gram: Tensor, orders: Tensor | None, weights: Tensor | None, own_square: Tensor | None, max_norm: float, mean: bool
) -> tuple[Tensor, Tensor]:
    arguments, result = _surgery_arguments(gram, orders, weights, own_square, max_norm, mean)
    library().surgery_weights(arguments)
    return result[:2]


@_surgery_weights.register_kernel("cuda")
def _(
    gram: Tensor, orders: Tensor | None, weights: Tensor | None, own_square: Tensor | None, max_norm: float, mean: bool
) -> tuple[Tensor, Tensor]:
    with stream_of(gram.device) as stream:
        arguments, result = _surgery_arguments(gram, orders, weights, own_square, max_norm, mean)
        library().cuda_surgery_weights(arguments, stream)
    return result[:2]


@_surgery_weights.register_fake
def _(
    gram: Tensor, orders: Tensor | None, weights: Tensor | None, own_square: Tensor | None, max_norm: float, mean: bool
) -> tuple[Tensor, Tensor]:
    return gram.new_empty(gram.shape[0]), gram.new_empty(4)


def gram(grads: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """The Gram matrix of the task gradients, in one pass over memory whatever T.

    Args:
        grads: for each of T tasks one list of tensors (float32, bfloat16 or float64). None stands for zeros. The
            tensors at one position agree in shape, dtype and layout over the tasks, and are dense.

    Returns:
        float64 [T, T]: entry (i, j) is the sum over all elements of g_i g_j, accumulated in float64. The same bits for
        any number of threads, and whenever it is computed again. NaN and Inf spread to the entries of their own task.

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
        columns_of = [row[k] for row in grads for k, _ in present]
        _combine_(columns_of, weights.to(device), [results[k] for k, _ in present])
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


def surgery_weights(
    gram: Tensor,
    *,
    orders: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "sum",
    own_square: Tensor | None = None,
    max_norm: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """From the Gram matrix to the weights of an update, clipped, and what a log says of it: one launch, and no waiting.

    The weights are PCGrad's (Yu et al. 2020, algorithm 1) where `orders` are given: each task's gradient walks the
    others in its order, and loses its component along each original gradient that it conflicts with. Where `weights`
    are given they are those of any other surgery; with neither, each task has the plain weight.

    Args:
        gram: float64 [T, T], as from `gram`. If one of its numbers is not finite, PCGrad projects nothing.
        orders: int64 [T, T]: row i is a permutation of the tasks (its place for i itself does not matter).
        weights: float64 [T].
        reduction: "sum" or "mean" of the (projected) gradients. It does not change given `weights`, but says what
            plain weights they are compared with: 1, or 1 / T.
        own_square: float64 scalar, the squared L2 norm of the gradients that belong to one task alone: they count for
            clipping. None stands for 0. One that is not finite marks the whole update so.
        max_norm: of all gradients after surgery; 0 does not clip.

    Returns:
        the clipped weights, float64 [T], and float64 [4]:
        0. the norm before clipping, sqrt(w' G w + own_square), where rounding below 0 counts as 0;
        1. the clip scale, by which gradients of one task alone are yet to be multiplied: 1 where nothing is clipped;
        2. 1 where the norm is finite, else 0, for `combine_adamw_`'s `skip_unless`; what is not finite clips nothing;
        3. the projected share, |weighted - plain| / |plain| of the sums of gradients; NaN where the plain sum is 0.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op = "surgery_weights"
    checks.tensor(op, "gram", gram, ["T", "T"], [torch.float64])
    tasks = gram.shape[0]
    checks.tensor(op, "gram", gram, [tasks, tasks], [torch.float64])
    checks.choice(op, "reduction", reduction, ("sum", "mean"))
    checks.number(op, "max_norm", max_norm)
    if orders is not None and weights is not None:
        raise ValueError(f"{op}: orders and weights exclude each other, got both")
    if orders is not None:
        checks.tensor(op, "orders", orders, [tasks, tasks], [torch.int64], like=gram)
        checks.permutations(op, "orders", orders)
    if weights is not None:
        checks.tensor(op, "weights", weights, [tasks], [torch.float64], like=gram)
    if own_square is not None:
        checks.tensor(op, "own_square", own_square, [], [torch.float64], like=gram)
    mean = reduction == "mean"
    if compiled(op, gram.device):
        return _surgery_weights(gram, orders, weights, own_square, max_norm, mean)
    return reference.surgery_weights(gram, orders, weights, own_square, max_norm, mean)
