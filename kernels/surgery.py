"""Gradient surgery: the Gram matrix of the task gradients, from it their weights, and with these their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, native_calls, reference
from .dispatch import is_compiled
from .flight_recorder import recorded
from .native import library


@torch.library.custom_op("minbert::gram", mutates_args=(), device_types=("cpu", "cuda"))
@recorded("gram")
def _gram(grads: Sequence[Tensor | None], rows: Sequence[Tensor | None], tables: Sequence[int], tasks: int) -> Tensor:
    arguments, device = native_calls.task_gradients(grads, tasks, rows, tables), native_calls.any_of(grads).device
    parts = library().CHUNK_PARTS if device.type == "cuda" else 1
    chunks = sum(-(-size // library().CHUNK) for size in arguments[1])
    chunks += 2 * sum(len(ids) for ids in rows if ids is not None)  # each row is a part, and those between two rows are
    partials = torch.empty(chunks, parts, tasks, tasks, dtype=torch.float64, device=device)
    gram = torch.empty(tasks, tasks, dtype=torch.float64, device=device)
    native_calls.run("gram", device, arguments, partials.data_ptr(), gram.data_ptr())
    return gram


@_gram.register_fake
def _(grads: Sequence[Tensor | None], rows: Sequence[Tensor | None], tables: Sequence[int], tasks: int) -> Tensor:
    return torch.empty(tasks, tasks, dtype=torch.float64, device=native_calls.any_of(grads).device)


@torch.library.custom_op("minbert::combine_", mutates_args=("out",), device_types=("cpu", "cuda"))
@recorded("combine_")
def _combine_(grads: Sequence[Tensor | None], weights: Tensor, out: Sequence[Tensor]) -> None:
    arguments = native_calls.task_gradients(grads, weights.shape[0])
    native_calls.run("combine", weights.device, arguments, weights.data_ptr(), [tensor.data_ptr() for tensor in out])


@_combine_.register_fake
def _(*_: Any) -> None:
    return None


@torch.library.custom_op("minbert::surgery_weights", mutates_args=(), device_types=("cpu", "cuda"))
@recorded("surgery_weights")
def _surgery_weights(
    gram: Tensor, orders: Tensor | None, weights: Tensor | None, own_square: Tensor | None, max_norm: float, mean: bool
) -> tuple[Tensor, Tensor]:
    tasks = gram.shape[0]
    result, stats, scratch = gram.new_empty(tasks), gram.new_empty(4), gram.new_empty(tasks + 3, tasks)
    given = (native_calls.address(tensor) for tensor in (gram, orders, weights, own_square))
    written = (tensor.data_ptr() for tensor in (result, stats, scratch))
    arguments = (tasks, *given, max_norm, mean, *written)  # csrc/kernels.h's SurgeryProblem and SurgeryResult
    if gram.device.type == "cpu":
        library().surgery_weights(arguments)  # on one thread
    else:
        native_calls.run("surgery_weights", gram.device, arguments)
    return result, stats


@_surgery_weights.register_fake
def _(gram: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return gram.new_empty(gram.shape[0]), gram.new_empty(4)


def gram(grads: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """The Gram matrix of the task gradients, in one pass over memory for any T.

    Args:
        grads: for each of T tasks one list of tensors (float32, bfloat16 or float64). None stands for zeros. The
            tensors at one position agree in shape, dtype and layout over the tasks, and are dense; or, on the CPU, all
            are sparse with some rows of a matrix: COO, coalesced, with one sparse dimension and one dense.

    Returns:
        float64 [T, T]: entry (i, j) is the sum over all elements of g_i g_j, accumulated in float64. The same bits for
        any number of threads and in every repetition. NaN and Inf spread to the entries of their own task.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    columns = checks.task_gradients("gram", grads, sparse=True)
    present = [k for k, column in enumerate(columns) if column is not None]
    if not present:
        return torch.zeros(len(grads), len(grads), dtype=torch.float64)
    device = columns[present[0]].device  # type: ignore[union-attr]
    if is_compiled("gram", device):
        return _gram(*native_calls.sparse_parts(grads, present), len(grads))
    return reference.gram(grads)


def combine(
    grads: Sequence[Sequence[Tensor | None]], weights: Tensor, out: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """The weighted sum of the task gradients, tensor by tensor, in one pass over memory.

    Args:
        grads: as for `gram`, all dense.
        weights: float64 [T].
        out: where to write, one tensor per position, shaped and laid out like the gradients there; new tensors when
            left out. A tensor of `out` may be one task's gradient at the same position (and may not overlap another).

    Returns:
        one tensor per position, accumulated in float32 (float64 for float64) and rounded once; None where no task has
        a tensor, even if `out` has one.

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

    if is_compiled("combine", device):
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
    """The weights of an update, clipped, and statistics for the log, from the Gram matrix: one launch, and no waiting.

    The weights are PCGrad's (Yu et al. 2020, algorithm 1) where `orders` are given: each task's gradient walks the
    others in its order, and loses its component along each original gradient that it conflicts with. Where `weights`
    are given they are those of any other surgery; with neither, each task has the plain weight.

    Args:
        gram: float64 [T, T], as from `gram`. If one of its numbers is not finite, PCGrad projects nothing.
        orders: int64 [T, T]: row i is a permutation of the tasks (where i itself stands in it does not matter).
        weights: float64 [T].
        reduction: "sum" or "mean" of the (projected) gradients. It does not change given `weights`, only the
            plain weights that they are compared with: 1, or 1 / T.
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
    if is_compiled(op, gram.device):
        return _surgery_weights(gram, orders, weights, own_square, max_norm, mean)
    return reference.surgery_weights(gram, orders, weights, own_square, max_norm, mean)
