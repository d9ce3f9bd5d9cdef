"""Argument checks. Each raises a one-line error that names the op, the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRADIENTS = (torch.float32, torch.bfloat16, torch.float64)
MODEL_PARTS = 1 << 15  # csrc/kernels.h's kModelParts


def names(dtypes: Sequence[torch.dtype]) -> str:
    """The dtypes as a message lists them."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensor(
    op: str,
    name: str,
    value: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    *,
    like: Tensor | None = None,
    contiguous: bool = True,
) -> None:
    """Check one tensor.

    Args:
        shape: a number for a dimension that is fixed, a name for one that may be anything but 0.
        like: a tensor whose device it must share.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape) and all(
        actual > 0 if isinstance(wanted, str) else actual == wanted
        for actual, wanted in zip(value.shape, shape, strict=True)
    )
    if not fits:
        wanted_shape = ", ".join(map(str, shape))
        hint = " (no dimension may be 0)" if 0 in value.shape else ""
        raise ValueError(f"{op}: {name} must have shape [{wanted_shape}], got {list(value.shape)}{hint}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {names(dtypes)}, got {names([value.dtype])}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like the other tensors, got {value.device}")
    if contiguous and not value.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, got strides {list(value.stride())} for shape {list(value.shape)}; "
            "call .contiguous() on it"
        )


def float_dtype(op: str, dtype: torch.dtype) -> torch.dtype:
    """Check and return the dtype that a result is to have."""
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype must be {names(FLOATS)}, got {names([dtype])}")
    return dtype


def probability(op: str, p: float) -> None:
    """Check a dropout probability."""
    if not 0 <= p < 1:
        raise ValueError(f"{op}: the dropout probability must lie in [0, 1), got {p}")


def dropout(op: str, p: float, seed: Tensor | None, stream_id: int, device: torch.device) -> Tensor | None:
    """Check a dropout probability and, where elements are dropped, the random numbers' address.

    Returns:
        what `stream` does; None where nothing is dropped.
    """
    probability(op, p)
    if p == 0:
        return None
    if seed is None:
        raise ValueError(f"{op}: dropout with probability {p} needs a seed, an int64 tensor [] or [2]; got None")
    return stream(op, seed, stream_id, device)


def stream(op: str, seed: Tensor, stream_id: int, device: torch.device | None) -> Tensor:
    """Check the address of a stream of random numbers, on this device if one is given.

    Returns:
        int64 [2], what every implementation reads: the seed and the number of the first row.
    """
    pair = isinstance(seed, Tensor) and seed.dim() > 0
    if pair and seed.shape != (2,):
        raise ValueError(f"{op}: seed must have shape [] or, with the first row's number, [2]; got {list(seed.shape)}")
    tensor(op, "seed", seed, [2] if pair else [], [torch.int64])
    if device is not None and seed.device != device:
        raise ValueError(f"{op}: seed must be on {device} like the other tensors, got {seed.device}")
    if not 0 <= stream_id < 2**32:
        raise ValueError(f"{op}: stream_id must be a number from 0 to 2**32 - 1, got {stream_id}")
    return seed if pair else torch.nn.functional.pad(seed[None], (0, 1))


def cu_seqlens(op: str, value: Tensor, tokens: int | None = None, max_seqlen: int | None = None) -> None:
    """Check cumulative sequence lengths; their values only on the CPU, where that waits for nothing."""
    cu_seqlens_shape(op, value)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        cu_seqlens_values(op, value, tokens, max_seqlen)


def cu_seqlens_shape(op: str, value: Tensor) -> None:
    """Check what is known of cumulative sequence lengths without looking at them."""
    tensor(op, "cu_seqlens", value, ["S + 1"], [torch.int32])
    if value.shape[0] < 2:
        raise ValueError(f"{op}: cu_seqlens must have at least 2 entries (one sequence), got {value.shape[0]}")


def cu_seqlens_values(
    op: str, value: Tensor | np.ndarray, tokens: int | None = None, max_seqlen: int | None = None
) -> None:
    """Check cumulative sequence lengths themselves."""
    bounds = value.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must start at 0, got {bounds[0]}")
    if tokens is not None and bounds[-1] != tokens:
        raise ValueError(f"{op}: cu_seqlens must end at the number of tokens, {tokens}, got {bounds[-1]}")
    lengths = [end - start for start, end in pairwise(bounds)]
    if min(lengths) <= 0:
        at = next(i for i, length in enumerate(lengths) if length <= 0)
        raise ValueError(
            f"{op}: cu_seqlens must increase, got {bounds[at]} and then {bounds[at + 1]} at entries {at} and {at + 1}"
        )
    if max_seqlen is not None and max(lengths) > max_seqlen:
        raise ValueError(f"{op}: max_seqlen is {max_seqlen}, but the longest sequence has {max(lengths)} tokens")


def ids(op: str, name: str, value: Tensor, table: Tensor) -> None:
    """Check that ids name rows of an embedding table; their values only on the CPU, where that waits for nothing."""
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = int(value.min()), int(value.max())
    if low < 0 or high >= table.shape[0]:
        wrong = low if low < 0 else high
        raise ValueError(f"{op}: {name} must lie in [0, {table.shape[0] - 1}], the table's rows; got {wrong}")


def permutations(op: str, name: str, value: Tensor) -> None:
    """Check that every row is a permutation; only on the CPU, where that waits for nothing."""
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    expected = list(range(value.shape[-1]))
    for row, entries in enumerate(value.view(-1, len(expected)).tolist()):
        if sorted(entries) != expected:
            at = row if value.dim() == 2 else f"{row // value.shape[1]}, {row % value.shape[1]}"
            raise ValueError(f"{op}: {name}[{at}] must be a permutation of 0 to {len(expected) - 1}, got {entries}")


def parts(op: str, value: Sequence[int] | None, columns: int, count: int | None = None) -> int:
    """Check the number of each column's part of the model.

    Args:
        count: of the parts; one more than the largest number when left out.

    Returns:
        the count of the parts: 1 without numbers.
    """
    if value is None:
        if count is not None:
            raise ValueError(f"{op}: part_count is given with parts, got {count} and None")
        return 1
    if len(value) != columns:
        raise ValueError(f"{op}: parts must have one number for each of the {columns} tensors, got {len(value)}")
    largest = MODEL_PARTS - 1 if count is None else count - 1
    for k, part in enumerate(value):
        if not isinstance(part, int) or not 0 <= part <= largest:
            raise ValueError(f"{op}: parts[{k}] must be a number from 0 to {largest}, got {part!r}")
    count = max(value, default=0) + 1 if count is None else count
    if not 1 <= count <= MODEL_PARTS:
        raise ValueError(f"{op}: there must be 1 to {MODEL_PARTS} parts, got {count}")
    return count


def weights_by_part(op: str, value: Tensor, of_columns: Sequence[int] | None, columns: int, tasks: int) -> int:
    """Check weights [T], or with the numbers of parts [G, T], and these numbers; returns the count of the parts, G."""
    tensor(op, "weights", value, [tasks] if of_columns is None else ["G", tasks], [torch.float64])
    return parts(op, of_columns, columns, None if of_columns is None else value.shape[0])


def is_dense(value: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order."""
    if value.layout != torch.strided:
        return False
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def task_gradients(op: str, grads: Sequence[Sequence[Tensor | None]], *, sparse: bool = False) -> list[Tensor | None]:
    """Check one list of tensors per task, and return one present tensor for each column (None where there is none).

    Args:
        sparse: whether those of a column may be sparse (`sparse_rows`).
    """
    if len(grads) == 0:
        raise ValueError(f"{op}: grads must hold one list of tensors per task, got an empty list")
    for task, row in enumerate(grads):
        if isinstance(row, Tensor):
            raise TypeError(f"{op}: grads[{task}] must be a list of tensors, got a tensor; write [tensor]")
        if len(row) != len(grads[0]):
            raise ValueError(
                f"{op}: every task needs as many tensors: grads[0] has {len(grads[0])}, grads[{task}] {len(row)}"
            )
    columns: list[Tensor | None] = [None] * len(grads[0])
    device = None
    for task, row in enumerate(grads):
        for index, grad in enumerate(row):
            if grad is None:
                continue
            first = columns[index]
            if first is not None and matches(grad, first, first.dtype):
                continue
            name = f"grads[{task}][{index}]"
            if not isinstance(grad, Tensor):
                raise TypeError(f"{op}: {name} must be a tensor or None, got {type(grad).__name__}")
            if first is None:
                columns[index] = grad
                device = device or grad.device
                if grad.dtype not in GRADIENTS:
                    raise TypeError(f"{op}: {name} must be {names(GRADIENTS)}, got {names([grad.dtype])}")
                if grad.device != device:
                    raise ValueError(f"{op}: {name} must be on {device} like the other tensors, got {grad.device}")
                if grad.layout != torch.strided:
                    sparse_rows(op, name, grad, sparse)
                elif not (grad.is_contiguous() or is_dense(grad)):
                    raise ValueError(
                        f"{op}: {name} must be dense, got strides {list(grad.stride())} for shape "
                        f"{list(grad.shape)}; call .contiguous() on it"
                    )
            else:
                same(op, name, grad, first, "its tensor in the other tasks")
                if grad.layout != torch.strided:
                    sparse_rows(op, name, grad, sparse)
    return columns


def sparse_rows(op: str, name: str, value: Tensor, allowed: bool = True) -> None:
    """Check that a sparse tensor has some rows of a matrix, each once and in their order; only CPUs take it."""
    if not allowed or value.device.type != "cpu" or value.layout != torch.sparse_coo:
        raise ValueError(f"{op}: {name} must be dense, got a sparse tensor on {value.device}; call .to_dense() on it")
    if (value.sparse_dim(), value.dense_dim()) != (1, 1):
        raise ValueError(
            f"{op}: {name} must be dense or have sparse rows (sparse_dim 1 and dense_dim 1), "
            f"got sparse_dim {value.sparse_dim()} and dense_dim {value.dense_dim()}"
        )
    if not value.is_coalesced():
        raise ValueError(f"{op}: {name} must be coalesced; call .coalesce() on it")


def matches(value: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dense tensor has this dtype, and device, shape and strides of another: a quick look at each of many."""
    return (
        isinstance(value, Tensor)
        and value.dtype == dtype
        and value.layout == other.layout == torch.strided
        and value.shape == other.shape
        and value.stride() == other.stride()
        and value.device == other.device
    )


def same(op: str, name: str, value: Tensor, other: Tensor, what: str) -> None:
    """Check that a tensor has the dtype, device, shape and layout of another, called `what`."""
    if value.dtype != other.dtype:
        raise TypeError(f"{op}: {name} must be {names([other.dtype])} like {what}, got {names([value.dtype])}")
    alike(op, name, value, other, what)


def alike(op: str, name: str, value: Tensor, other: Tensor, what: str) -> None:
    """Check that a tensor has the device, shape and layout of another, called `what`."""
    if value.shape != other.shape:
        raise ValueError(f"{op}: {name} must have shape {list(other.shape)} like {what}, got {list(value.shape)}")
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other.device} like {what}, got {value.device}")
    strided = value.layout == other.layout == torch.strided
    if value.layout != other.layout or (strided and value.numel() > 0 and _steps(value) != _steps(other)):
        raise ValueError(f"{op}: {name} must be laid out like {what}; call .contiguous() on both")


def _steps(value: Tensor) -> list[int]:
    """The strides of the dimensions along which there is a step to take."""
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1]


def number(op: str, name: str, value: float) -> None:
    """Check that a number is finite and not negative."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{op}: {name} must be finite and at least 0, got {value}")


def choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Check that a word is one of several."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
