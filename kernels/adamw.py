"""The AdamW step, alone and fused with the weighted sum of the task gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, reference
from .dispatch import compiled
from .native import library
from .surgery import native_arguments

# The dtype of parameters and moments for gradients of each dtype that native code reads.
_STATE = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}


@torch.library.custom_op(
    "minbert::combine_adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "averages"), device_types="cpu"
)
def _combine_adamw_(
    grads: Sequence[Tensor | None],
    weights: Tensor,
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    keep: float,
    beta1: float,
    beta2: float,
    eps: float,
    step_size: float,
    momentum: float,
) -> None:
    tasks = weights.shape[0]
    addresses, sizes, dtypes = native_arguments(grads, tasks)
    library().combine_adamw(
        addresses,
        sizes,
        dtypes,
        tasks,
        weights.data_ptr(),
        *([tensor.data_ptr() for tensor in tensors] for tensors in (params, exp_avgs, exp_avg_sqs, averages)),
        keep,
        beta1,
        beta2,
        eps,
        step_size,
        momentum,
        torch.get_num_threads(),
    )


@_combine_adamw_.register_fake
def _(
    grads: Sequence[Tensor | None],
    weights: Tensor,
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    keep: float,
    beta1: float,
    beta2: float,
    eps: float,
    step_size: float,
    momentum: float,
) -> None:
    return None


def _scalars(
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[float, float, float, float, float]:
    """csrc/launch.h's AdamWStep: the bias corrections folded into eps and the step size, as `reference.adamw_` does."""
    beta1, beta2 = betas
    correction = (1 - beta2**step) ** 0.5
    return 1 - lr * weight_decay, beta1, beta2, eps * correction, lr * correction / (1 - beta1**step)


def _check_lists(op: str, step: int, momentum: float, **lists: Sequence[object]) -> None:
    if len({len(tensors) for tensors in lists.values()}) > 1:
        lengths = ", ".join(f"{name} {len(tensors)}" for name, tensors in lists.items())
        raise ValueError(f"{op}: the lists must be as long as each other, got {lengths}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"{op}: momentum must be between 0 and 1, got {momentum}")
    if step < 1:
        raise ValueError(f"{op}: step is counted from 1, got {step}")


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
    averages: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
) -> None:
    """One AdamW step on every parameter, in place (Loshchilov and Hutter 2019, algorithm 2).

    Args:
        params, exp_avgs, exp_avg_sqs: float32 or float64 tensors, updated in place.
        grads: their gradients, in any float dtype. Native code takes float32 and bfloat16 for float32 parameters and
            float64 for float64; a call with any other pair runs the reference.
        step: counted from 1, for the bias corrections.
        lr, betas, eps, weight_decay: as in the paper; the decay is multiplied by lr.
        averages: of each parameter over the steps, in its dtype: updated in place, in the same pass over memory, to
            momentum average + (1 - momentum) param (Jiang et al. 2019, section 3.2). None keeps none.
        momentum: from 0, which copies the parameters, to 1, which leaves the averages.

    Raises:
        ValueError, TypeError: an argument is not as described; nothing has been changed.
    """
    lists = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if averages is not None:
        lists["averages"] = averages
    _check_lists("adamw_", step, momentum, grads=grads, **lists)
    for i, param in enumerate(params):
        checks.tensor("adamw_", f"params[{i}]", param, param.shape, (torch.float32, torch.float64))
        for name, tensors in lists.items():
            checks.tensor("adamw_", f"{name}[{i}]", tensors[i], param.shape, [param.dtype], like=param)
        checks.tensor("adamw_", f"grads[{i}]", grads[i], param.shape, checks.FLOATS, like=param)
    if not params:
        return
    fits = all(_STATE.get(grad.dtype) == param.dtype for param, grad in zip(params, grads, strict=True))
    if fits and compiled("adamw_", params[0].device):
        scalars = _scalars(step, lr, betas, eps, weight_decay)
        weights = torch.ones(1, dtype=torch.float64)
        _combine_adamw_(grads, weights, params, exp_avgs, exp_avg_sqs, averages or [], *scalars, momentum)
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
            averages=averages,
            momentum=momentum,
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
    averages: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
) -> None:
    """One AdamW step with the weighted sum of the task gradients, in one pass over memory: the sum is never stored.

    With `gram`, a surgery on its weights and `clip_weights`, a whole update reads every gradient twice.

    Args:
        params, exp_avgs, exp_avg_sqs: one tensor per position, updated in place: float64 for float64 gradients, float32
            for others, shaped and laid out like the gradients there. A parameter without any gradient stays as it is.
        grads: for each of T tasks one list of tensors, as for `gram`.
        weights: float64 [T].
        step, lr, betas, eps, weight_decay, averages, momentum: as for `adamw_`. Where no task has a gradient, the
            average stays as it is too.

    Raises:
        ValueError, TypeError: an argument is not as described; nothing has been changed.
    """
    op = "combine_adamw_"
    columns = checks.task_gradients(op, grads)
    lists = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if averages is not None:
        lists["averages"] = averages
    _check_lists(op, step, momentum, grads=columns, **lists)
    checks.tensor(op, "weights", weights, [len(grads)], [torch.float64])
    present = [k for k, column in enumerate(columns) if column is not None]
    for k in present:
        column: Tensor = columns[k]  # type: ignore[assignment]
        for name, tensors in lists.items():
            checks.tensor(op, f"{name}[{k}]", tensors[k], column.shape, [_STATE[column.dtype]], contiguous=False)
            checks.alike(op, f"{name}[{k}]", tensors[k], column, "the gradients there")
    if not present:
        return
    device = columns[present[0]].device  # type: ignore[union-attr]
    if weights.device not in (device, torch.device("cpu")):
        raise ValueError(f"{op}: weights must be on {device} like the gradients, got {weights.device}")
    if compiled(op, device):
        _combine_adamw_(
            [row[k] for row in grads for k in present],
            weights,
            *([tensors[k] for k in present] for tensors in (params, exp_avgs, exp_avg_sqs)),
            [averages[k] for k in present] if averages is not None else [],
            *_scalars(step, lr, betas, eps, weight_decay),
            momentum,
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
            averages=averages,
            momentum=momentum,
        )
