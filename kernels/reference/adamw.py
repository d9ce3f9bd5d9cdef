"""AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..split_float32 import join_float32, split_float32
from .precision import widened
from .surgery import combine


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
    """One AdamW step in place (Loshchilov and Hutter 2019, algorithm 2), `step` counted from 1.

    The bias corrections are folded into two scalars (Kingma and Ba 2015, section 2, last paragraph); eps is
    scaled with them, so that the result is that of the written-out form. The moving averages of the parameters, where
    they are kept, become ema_decay ema + (1 - ema_decay) param; copies are the parameters rounded to bfloat16. A split
    parameter is joined before and split after. Nothing changes where `skip_unless` is 0.
    """
    if skip_unless is not None and not skip_unless:
        return
    pairs = list(zip(params, low_bits or [None] * len(params), strict=True))
    params = [param if low is None else join_float32(param, low) for param, low in pairs]
    beta1, beta2 = betas
    correction = (1 - beta2**step) ** 0.5
    step_size = lr * correction / (1 - beta1**step)
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        grad = grad.to(exp_avg.dtype)
        param.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        param.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(eps * correction), value=-step_size)
    for param, average in zip(params, ema or (), strict=ema is not None):
        average.lerp_(param, 1 - ema_decay)
    for param, copy in zip(params, copies or (), strict=copies is not None):
        if copy is not None:
            copy.copy_(param)
    for (param, low), joined in zip(pairs, params, strict=True):
        if low is not None:
            for part, value in zip((param, low), split_float32(joined), strict=True):
                part.copy_(value)


def combine_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor | None]],
    weights: Tensor,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    ema: Sequence[Tensor] | None = None,
    copies: Sequence[Tensor | None] | None = None,
    low_bits: Sequence[Tensor | None] | None = None,
    parts: Sequence[int] | None = None,
    **options: Any,
) -> None:
    """`adamw_` with the gradients that `combine` gives, not rounded to a half precision in between.

    Parameters whose gradient is missing in every task stay as they are.
    """
    wide = [[None if grad is None else widened(grad.to_dense()) for grad in row] for row in grads]
    summed = {k: grad for k, grad in enumerate(combine(wide, weights, parts)) if grad is not None}
    state = ([tensors[k] for k in summed] for tensors in (exp_avgs, exp_avg_sqs))
    more = {"ema": ema, "copies": copies, "low_bits": low_bits}
    options |= {name: None if tensors is None else [tensors[k] for k in summed] for name, tensors in more.items()}
    adamw_([params[k] for k in summed], list(summed.values()), *state, **options)
