"""The AdamW step, alone and fused with the weighted sum of the task gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch, native_calls, reference
from .flight_recorder import recorded

# The dtype of parameters and moments for gradients of each dtype that native code reads.
_STATE = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
_CHANGED = ("params", "exp_avgs", "exp_avg_sqs", "ema", "copies", "low_bits")


@torch.library.custom_op("minbert::combine_adamw_", mutates_args=_CHANGED, device_types=("cpu", "cuda"))
@recorded("combine_adamw_")
def _combine_adamw_(
    grads: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    tables: Sequence[int],
    weights: Tensor,
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema: Sequence[Tensor],
    copies: Sequence[Tensor],
    low_bits: Sequence[Tensor],
    skip_unless: Tensor | None,
    scalars: Sequence[float],
    first_columns: Sequence[int] | None = None,
) -> None:
    changed = params, exp_avgs, exp_avg_sqs, ema, copies, low_bits
    state = [[tensor.data_ptr() for tensor in tensors] for tensors in changed]
    arguments = native_calls.task_gradients(grads, weights.shape[-1], rows, tables, first_columns)
    launch_combine_adamw(arguments, weights, state, skip_unless, scalars)


def launch_combine_adamw(
    arguments: tuple[Any, ...],
    weights: Tensor,
    state: Sequence[Sequence[int]],
    skip_unless: Tensor | None,
    scalars: Sequence[float],
) -> None:
    """Run native code on GradientArguments, and on the addresses of params, moments, ema, copies and low bits."""
    gate = native_calls.address(skip_unless), skip_unless is not None and skip_unless.dtype == torch.bool
    update = (state, scalars, *gate)  # csrc/kernels.h's AdamWState, AdamWStep and Gate
    native_calls.run("combine_adamw", weights.device, arguments, weights.data_ptr(), update)


@_combine_adamw_.register_fake
def _(*_: Any) -> None:
    return None


def _reasons(exp_avgs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[str]:
    """Why native code does not run `adamw_` for such moments, of the parameters' precision, and gradients."""
    names = checks.names
    pairs = dict.fromkeys((moment.dtype, grad.dtype) for moment, grad in zip(exp_avgs, grads, strict=True))
    found = dispatch.reasons("adamw_", "native", exp_avgs[0].device)
    return found + [
        f"takes no {names([grad])} gradients of {names([moment])} parameters"
        for moment, grad in pairs
        if _STATE.get(grad) != moment
    ]


def step_scalars(
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, ema_decay: float
) -> list[float]:
    """csrc/kernels.h's AdamWStep: bias corrections are folded into eps and the step size, as in `reference.adamw_`."""
    beta1, beta2 = betas
    correction = (1 - beta2**step) ** 0.5
    return [1 - lr * weight_decay, beta1, beta2, eps * correction, lr * correction / (1 - beta1**step), ema_decay]


def _check_lists(op: str, step: int, ema_decay: float, **lists: Sequence[object] | None) -> None:
    lengths = {name: len(tensors) for name, tensors in lists.items() if tensors is not None}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{op}: the lists must be as long as each other, got {got}")
    if not 0 <= ema_decay <= 1:
        raise ValueError(f"{op}: ema_decay must be between 0 and 1, got {ema_decay}")
    if step < 1:
        raise ValueError(f"{op}: step is counted from 1, got {step}")


def _check_like_gradients(op: str, name: str, k: int, value: Tensor | None, column: Tensor, dtype: torch.dtype) -> None:
    if column.layout != torch.strided:
        checks.tensor(op, f"{name}[{k}]", value, column.shape, [dtype], like=column)  # type: ignore[arg-type]
        return
    if not checks.matches(value, column, dtype):  # type: ignore[arg-type]
        checks.tensor(op, f"{name}[{k}]", value, column.shape, [dtype], contiguous=False)  # type: ignore[arg-type]
        checks.alike(op, f"{name}[{k}]", value, column, "the gradients there")  # type: ignore[arg-type]


def _check_gate(op: str, skip_unless: Tensor | None, device: torch.device) -> None:
    if skip_unless is not None:
        checks.tensor(op, "skip_unless", skip_unless, [], [torch.float64, torch.bool])
        if skip_unless.device != device:
            raise ValueError(f"{op}: skip_unless must be on {device} like the other tensors, got {skip_unless.device}")


def filled(tensors: Sequence[Tensor | None] | None, device: torch.device) -> list[Tensor]:
    """An empty tensor (address 0) for each None, which torch.compile refuses in a list that an op changes."""
    return [torch.empty(0, device=device) if tensor is None else tensor for tensor in tensors or []]


def _at(tensors: Sequence[Tensor | None] | None, k: int) -> Tensor | None:
    return None if tensors is None else tensors[k]


def _check_not_copied(op: str, k: int, copies: Sequence[Tensor | None] | None) -> None:
    if _at(copies, k) is not None:
        raise ValueError(f"{op}: copies[{k}] must be None where low_bits are given: params[{k}] is bfloat16 itself")


def check_state(
    op: str,
    columns: Sequence[Tensor | None],
    lists: Mapping[str, Sequence[Tensor]],
    copies: Sequence[Tensor | None] | None,
    low_bits: Sequence[Tensor | None] | None,
) -> None:
    """Check what `combine_adamw_` changes against a gradient of each column, None for one without.

    Args:
        lists: params, exp_avgs, exp_avg_sqs and perhaps ema.
    """
    for k, column in enumerate(columns):
        if column is None:
            continue
        low, made = _at(low_bits, k), _at(copies, k)
        for name, tensors in lists.items():
            dtype = _STATE[column.dtype] if low is None or name != "params" else torch.bfloat16
            _check_like_gradients(op, name, k, tensors[k], column, dtype)
        if low is not None:
            if column.dtype == torch.float64:
                raise TypeError(
                    f"{op}: low_bits[{k}] must be None for float64 gradients, whose parameters have no split"
                )
            _check_like_gradients(op, "low_bits", k, low, column, torch.int16)
            _check_not_copied(op, k, copies)
        if made is not None:
            _check_like_gradients(op, "copies", k, made, column, torch.bfloat16)


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema: Sequence[Tensor] | None = None,
    ema_decay: float = 0.0,
    copies: Sequence[Tensor | None] | None = None,
    low_bits: Sequence[Tensor | None] | None = None,
    skip_unless: Tensor | None = None,
) -> None:
    """One AdamW step on every parameter, in place (Loshchilov and Hutter 2019, algorithm 2).

    Args:
        params, exp_avgs, exp_avg_sqs: float32 or float64 tensors, updated in place.
        grads: their gradients, in any float dtype. Native code takes float32 and bfloat16 for float32 parameters and
            float64 for float64; a call with any other pair runs the reference.
        step: counted from 1, for the bias corrections.
        lr, betas, eps, weight_decay: as in the paper; the decay is multiplied by lr.
        ema: the exponential moving average of each parameter, in its dtype: updated in place, in the same pass over
            memory, to ema_decay ema + (1 - ema_decay) param (Jiang et al. 2019, section 3.2). None keeps none.
        ema_decay: from 0, which copies the parameters, to 1, which leaves the averages as they are.
        copies: for each parameter a bfloat16 tensor, written in the same pass with the parameter rounded to nearest
            even; None for one that needs none.
        low_bits: for each parameter that is split (`split_float32`) its low bits, int16; None for another. A split
            parameter is bfloat16, with float32 moments and average, and gets no copy. Its float32 value is updated to
            the bits that a float32 parameter would have.
        skip_unless: a scalar, float64 or bool, on the parameters' device. Where it is 0, nothing changes, and no host
            has to know.

    Raises:
        ValueError, TypeError: an argument is not as described; nothing has been changed.
    """
    op, lists = "adamw_", {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if ema is not None:
        lists["ema"] = ema
    _check_lists(op, step, ema_decay, grads=grads, **lists, copies=copies, low_bits=low_bits)
    for i, param in enumerate(params):
        low, made = _at(low_bits, i), _at(copies, i)
        dtypes = (torch.float32, torch.float64) if low is None else (torch.bfloat16,)
        checks.tensor(op, f"params[{i}]", param, param.shape, dtypes)
        for name, tensors in lists.items():
            dtype = param.dtype if low is None or name == "params" else torch.float32
            checks.tensor(op, f"{name}[{i}]", tensors[i], param.shape, [dtype], like=param)
        checks.tensor(op, f"grads[{i}]", grads[i], param.shape, checks.FLOATS, like=param)
        if low is not None:
            checks.tensor(op, f"low_bits[{i}]", low, param.shape, [torch.int16], like=param)
            _check_not_copied(op, i, copies)
        if made is not None:
            checks.tensor(op, f"copies[{i}]", made, param.shape, [torch.bfloat16], like=param)
    if not params:
        return
    device = params[0].device
    _check_gate(op, skip_unless, device)
    if not _reasons(exp_avgs, grads):
        scalars = step_scalars(step, lr, betas, eps, weight_decay, ema_decay)
        weights = torch.ones(1, dtype=torch.float64, device=device)
        state = params, exp_avgs, exp_avg_sqs, ema or [], filled(copies, device), filled(low_bits, device)
        _combine_adamw_(grads, [], [], weights, *state, skip_unless, scalars)
    else:
        reference.adamw_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            step=step,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            ema=ema,
            ema_decay=ema_decay,
            copies=copies,
            low_bits=low_bits,
            skip_unless=skip_unless,
        )


@torch.no_grad()
def combine_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor | None]],
    weights: Tensor,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema: Sequence[Tensor] | None = None,
    ema_decay: float = 0.0,
    copies: Sequence[Tensor | None] | None = None,
    low_bits: Sequence[Tensor | None] | None = None,
    skip_unless: Tensor | None = None,
    parts: Sequence[int] | None = None,
) -> None:
    """One AdamW step with the weighted sum of the task gradients, in one pass over memory: the sum is never stored.

    With `gram` and `surgery_weights`, which clips, a whole update reads every gradient twice. Where gradients are
    sparse, the other rows have a gradient of zeros: their moments decay, and so do the parameters.

    Args:
        params, exp_avgs, exp_avg_sqs: one tensor per position, updated in place: float64 for float64 gradients, float32
            for others, shaped and laid out like the gradients there. A parameter without any gradient stays as it is.
            With `low_bits`, parameters of float32 moments may be bfloat16.
        grads: for each of T tasks one list of tensors, as for `gram`.
        weights: float64 [T]; with `parts` [G, T].
        step, lr, betas, eps, weight_decay, ema, ema_decay, copies, low_bits, skip_unless: as for `adamw_`. Where no
            task has a gradient, moving average, copy and low bits stay as they are too.
        parts: for each position the number of its part of the model, whose row of the weights it has.

    Raises:
        ValueError, TypeError: an argument is not as described; nothing has been changed.
    """
    op = "combine_adamw_"
    columns = checks.task_gradients(op, grads, sparse=True)
    lists = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if ema is not None:
        lists["ema"] = ema
    _check_lists(op, step, ema_decay, grads=columns, **lists, copies=copies, low_bits=low_bits)
    count = checks.weights_by_part(op, weights, parts, len(columns), len(grads))
    check_state(op, columns, lists, copies, low_bits)
    present = [k for k, column in enumerate(columns) if column is not None]
    if not present:
        return
    device = columns[present[0]].device  # type: ignore[union-attr]
    if weights.device not in (device, torch.device("cpu")):
        raise ValueError(f"{op}: weights must be on {device} like the gradients, got {weights.device}")
    _check_gate(op, skip_unless, device)
    if dispatch.is_compiled(op, device):
        state = params, exp_avgs, exp_avg_sqs, ema, filled(copies, device), filled(low_bits, device)
        ordered, first_columns = native_calls.by_part(present, parts, count)
        _combine_adamw_(
            *native_calls.sparse_parts(grads, ordered),
            weights.to(device),
            *([tensors[k] for k in ordered] if tensors else [] for tensors in state),
            skip_unless,
            step_scalars(step, lr, betas, eps, weight_decay, ema_decay),
            first_columns,
        )
    else:
        reference.combine_adamw_(
            params,
            grads,
            weights,
            exp_avgs,
            exp_avg_sqs,
            step=step,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            ema=ema,
            ema_decay=ema_decay,
            copies=copies,
            low_bits=low_bits,
            skip_unless=skip_unless,
            parts=parts,
        )
