"""The AdamW step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, reference


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
) -> None:
    """One AdamW step on every parameter, in place (Loshchilov and Hutter 2019, algorithm 2).

    Args:
        params, exp_avgs, exp_avg_sqs: float32 or float64 tensors, updated in place.
        grads: their gradients, in any float dtype.
        step: counted from 1, for the bias corrections.
        lr, betas, eps, weight_decay: as in the paper; the decay is multiplied by lr.

    Raises:
        ValueError, TypeError: an argument is not as described; nothing has been changed.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if len({len(tensors) for tensors in lists.values()}) > 1:
        lengths = ", ".join(f"{name} {len(tensors)}" for name, tensors in lists.items())
        raise ValueError(f"adamw_: the four lists must be as long as each other, got {lengths}")
    if step < 1:
        raise ValueError(f"adamw_: step is counted from 1, got {step}")
    for i, param in enumerate(params):
        checks.tensor("adamw_", f"params[{i}]", param, param.shape, (torch.float32, torch.float64))
        for name in ("exp_avgs", "exp_avg_sqs"):
            checks.tensor("adamw_", f"{name}[{i}]", lists[name][i], param.shape, [param.dtype], like=param)
        checks.tensor("adamw_", f"grads[{i}]", grads[i], param.shape, checks.FLOATS, like=param)
    reference.adamw_(
        params, grads, exp_avgs, exp_avg_sqs, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )
