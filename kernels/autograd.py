"""What the ops' autograd formulas share."""

from __future__ import annotations

from typing import Any, NoReturn

from torch.library import CustomOpDef


def first_order_only(backward: CustomOpDef, op: str) -> None:
    """Make a derivative of `backward`, the op that computes the gradients of `op`, a clear error."""

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"{op}: its native gradient cannot be differentiated again; for second derivatives, compute under "
            'use_backend("reference")'
        )

    backward.register_autograd(refuse)
