"""Gradient surgery: the Gram matrix of the task gradients, from it their weights, and with these their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, native_calls, reference
from .dispatch import is_compiled
from .flight_recorder import recorded
from .gradient_table import GradientTable, SelectedColumns
from .native import library


@torch.library.custom_op("minbert::gram", mutates_args=(), device_types=("cpu", "cuda"))
@recorded("gram")
def _gram(
    grads: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    tables: Sequence[int],
    tasks: int,
    first_columns: Sequence[int] | None = None,
) -> Tensor:
    arguments = native_calls.task_gradients(grads, tasks, rows, tables, first_columns)
    of_rows = sum(len(ids) for ids in rows if ids is not None)
    return _launch_gram(arguments, native_calls.chunks(arguments[1]), of_rows, native_calls.any_of(grads).device)


def _launch_gram(arguments: tuple[Any, ...], chunks: int, rows: int, device: torch.device) -> Tensor:
    """Run native code on GradientArguments of so many chunks, and rows of sparse gradients."""
    tasks, first_columns = arguments[3], arguments[7] or None
    parts = library().CHUNK_PARTS if device.type == "cuda" else 1
    chunks += 2 * rows  # each row is a part, and those between two rows are
    partials = torch.empty(chunks, parts, tasks, tasks, dtype=torch.float64, device=device)
    gram = torch.empty(*_parts_of(first_columns), tasks, tasks, dtype=torch.float64, device=device)
    native_calls.run("gram", device, arguments, partials.data_ptr(), gram.data_ptr())
    return gram


@_gram.register_fake
def _(
    grads: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    tables: Sequence[int],
    tasks: int,
    first_columns: Sequence[int] | None = None,
) -> Tensor:
    device = native_calls.any_of(grads).device
    return torch.empty(*_parts_of(first_columns), tasks, tasks, dtype=torch.float64, device=device)


def _parts_of(first_columns: Sequence[int] | None) -> list[int]:
    """The dimension that several parts of the model add: their number."""
    return [] if first_columns is None else [len(first_columns) - 1]


@torch.library.custom_op("minbert::combine_", mutates_args=("out",), device_types=("cpu", "cuda"))
@recorded("combine_")
def _combine_(
    grads: Sequence[Tensor | None],
    weights: Tensor,
    out: Sequence[Tensor],
    first_columns: Sequence[int] | None = None,
) -> None:
    arguments = native_calls.task_gradients(grads, weights.shape[-1], first_columns=first_columns)
    native_calls.run("combine", weights.device, arguments, weights.data_ptr(), [tensor.data_ptr() for tensor in out])


@_combine_.register_fake
def _(*_: Any) -> None:
    return None


@torch.library.custom_op("minbert::surgery_weights", mutates_args=(), device_types=("cpu", "cuda"))
@recorded("surgery_weights")
def _surgery_weights(
    gram: Tensor, orders: Tensor | None, weights: Tensor | None, own_square: Tensor | None, max_norm: float, mean: bool
) -> tuple[Tensor, Tensor]:
    if orders is not None:
        checks.permutations("surgery_weights", "orders", orders)
    tasks, shape = gram.shape[-1], gram.shape[:-1]
    parts = shape[0] if len(shape) > 1 else 1
    result, stats, scratch = gram.new_empty(shape), gram.new_empty(4), gram.new_empty(tasks + 3, *shape)
    given = (native_calls.address(tensor) for tensor in (gram, orders, weights, own_square))
    written = (tensor.data_ptr() for tensor in (result, stats, scratch))
    arguments = (parts, tasks, *given, max_norm, mean, *written)  # csrc/kernels.h's SurgeryProblem and SurgeryResult
    if gram.device.type == "cpu":
        library().surgery_weights(arguments)  # on one thread
    else:
        native_calls.run("surgery_weights", gram.device, arguments)
    return result, stats


@_surgery_weights.register_fake
def _(gram: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return gram.new_empty(gram.shape[:-1]), gram.new_empty(4)


def gram(
    grads: Sequence[Sequence[Tensor | None]], parts: Sequence[int] | None = None, part_count: int | None = None
) -> Tensor:
    """The Gram matrix of the task gradients, in one pass over memory for any T; or one for each part of the model.

    Args:
        grads: for each of T tasks one list of tensors (float32, bfloat16 or float64). None stands for zeros. The
            tensors at one position agree in shape, dtype and layout over the tasks, and are dense; or, on the CPU, all
            are sparse with some rows of a matrix: COO, coalesced, with one sparse dimension and one dense.
        parts: for each position the number of the part of the model that it belongs to.
        part_count: of the parts, G; one more than the largest number when left out. A part without tensors has zeros.

    Returns:
        float64 [T, T]: entry (i, j) is the sum over all elements of g_i g_j, accumulated in float64. With `parts`
        [G, T, T]: matrix p has the bits that the tensors of part p alone give. The same bits for any number of threads
        and in every repetition. NaN and Inf spread to the entries of their own task.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    columns = checks.task_gradients("gram", grads, sparse=True)
    count = checks.parts("gram", parts, len(columns), part_count)
    present = [k for k, column in enumerate(columns) if column is not None]
    if not present:
        shape = [len(grads)] * 2 if parts is None else [count, len(grads), len(grads)]
        return torch.zeros(shape, dtype=torch.float64)
    device = columns[present[0]].device  # type: ignore[union-attr]
    if is_compiled("gram", device):
        ordered, first_columns = native_calls.by_part(present, parts, count)
        return _gram(*native_calls.sparse_parts(grads, ordered), len(grads), first_columns)
    return reference.gram(grads, parts, count)


@recorded("gram", lambda table, selected, first: (*table.op_arguments(selected), table.columns.tasks, first))
def _gram_of(table: GradientTable, selected: SelectedColumns, first_columns: Sequence[int] | None) -> Tensor:
    arguments = table.arguments(selected, first_columns)
    with native_calls.shown_as("gram"):
        return _launch_gram(arguments, selected.chunks, table.sparse_rows(selected), table.columns.device)


def gram_of(table: GradientTable, parts: Sequence[int] | None = None, part_count: int | None = None) -> Tensor:
    """`gram` of an update's gradients, of which at least one is there.

    Args:
        parts: for each column the number of its part of the model; None for one.
        part_count: of the parts; needed with `parts`.

    Returns:
        float64 [T, T], or with `parts` [G, T, T].
    """
    if not is_compiled("gram", table.columns.device):
        return reference.gram(table.rows, parts, 1 if part_count is None else part_count)
    ordered, first_columns = native_calls.by_part(table.present, parts, part_count or 1)
    return _gram_of(table, table.columns.select(ordered), first_columns)


def combine(
    grads: Sequence[Sequence[Tensor | None]],
    weights: Tensor,
    out: Sequence[Tensor | None] | None = None,
    parts: Sequence[int] | None = None,
) -> list[Tensor | None]:
    """The weighted sum of the task gradients, tensor by tensor, in one pass over memory.

    Args:
        grads: as for `gram`, all dense.
        weights: float64 [T]; with `parts` [G, T].
        out: where to write, one tensor per position, shaped and laid out like the gradients there; new tensors when
            left out. A tensor of `out` may be one task's gradient at the same position (and may not overlap another).
        parts: for each position the number of its part of the model, whose row of the weights it has.

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
    count = checks.weights_by_part("combine", weights, parts, len(columns), len(grads))
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
        ordered, first_columns = native_calls.by_part([k for k, _ in present], parts, count)
        columns_of = [row[k] for row in grads for k in ordered]
        _combine_(columns_of, weights.to(device), [results[k] for k in ordered], first_columns)
    else:
        for target, value in zip(results, reference.combine(grads, weights, parts), strict=True):
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
        max_norm: 0 or more; with 0 all weights are 0. (`surgery_weights` does not clip with 0.)

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

    The weights are PCGrad's (Yu et al. 2020, algorithm 1) where `orders` are given: from each task's gradient, in its
    order, the components along the other tasks' original gradients are removed with which it conflicts. Where `weights`
    are given they are those of any other surgery; with neither, each task has the plain weight. The gradients of G
    parts of the model have weights of their own, part by part; norm, clipping and projected share are those of all
    parts together.

    Args:
        gram: float64 [T, T], as from `gram`, or [G, T, T] of G parts. If one of its numbers is not finite, PCGrad
            projects nothing in the part.
        orders: int64, shaped like `gram`: row i is a permutation of the tasks (where i itself stands in it does not
            matter).
        weights: float64 [T] or [G, T].
        reduction: "sum" or "mean" of the (projected) gradients. It does not change given `weights`, only the
            plain weights that they are compared with: 1, or 1 / T.
        own_square: float64 scalar, the squared L2 norm of the gradients that belong to one task alone: they count for
            clipping. None stands for 0. One that is not finite marks the whole update so.
        max_norm: of all gradients after surgery; 0 does not clip.

    Returns:
        the clipped weights, float64 [T] or [G, T], and float64 [4]:
        0. the norm before clipping, the root of own_square and w' G w of all parts, of which one that rounding takes
           below 0 counts as 0;
        1. the clip scale, by which gradients of one task alone are yet to be multiplied: 1 where nothing is clipped;
        2. 1 where the norm is finite, else 0, for `combine_adamw_`'s `skip_unless`; what is not finite clips nothing;
        3. the projected share, |weighted - plain| / |plain| of the sums of gradients; NaN where the plain sum is 0.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op = "surgery_weights"
    parts = ["G"] if isinstance(gram, Tensor) and gram.dim() == 3 else []
    checks.tensor(op, "gram", gram, [*parts, "T", "T"], [torch.float64])
    shape = [*gram.shape[:-1], gram.shape[-2]]
    checks.tensor(op, "gram", gram, shape, [torch.float64])
    checks.choice(op, "reduction", reduction, ("sum", "mean"))
    checks.number(op, "max_norm", max_norm)
    if orders is not None and weights is not None:
        raise ValueError(f"{op}: orders and weights exclude each other, got both")
    if orders is not None:
        checks.tensor(op, "orders", orders, shape, [torch.int64], like=gram)
    if weights is not None:
        checks.tensor(op, "weights", weights, shape[:-1], [torch.float64], like=gram)
    if own_square is not None:
        checks.tensor(op, "own_square", own_square, [], [torch.float64], like=gram)
    mean = reduction == "mean"
    if is_compiled(op, gram.device):
        return _surgery_weights(gram, orders, weights, own_square, max_norm, mean)
    if orders is not None:
        checks.permutations(op, "orders", orders)
    return reference.surgery_weights(gram, orders, weights, own_square, max_norm, mean)
