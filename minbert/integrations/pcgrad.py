"""PCGrad around any torch optimizer, in the call shape of WeiChengTseng/Pytorch-PCGrad."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from minbert.integrations.gradient_surgery import GradientSurgery
from minbert.methods.user_weighting import Weighting


class PCGrad(GradientSurgery):
    """An optimizer with gradient surgery by PCGrad (Yu et al. 2020, algorithm 1): `GradientSurgery` by this rule.

        optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=1e-5))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
        optimizer.zero_grad()
        optimizer.pc_backward([first_loss, second_loss])  # in place of (first_loss + second_loss).backward()
        optimizer.step()
        schedule.step()

    `pc_backward` is `GradientSurgery.backward`, and takes its arguments. A GradScaler may scale the losses: surgery
    does not depend on the scale.

    Unlike Pytorch-PCGrad:
    - The default reduction is "sum", as in the paper. There, it is "mean", and "sum" computes the mean too:
      the shared parameters' gradients are T times smaller for T losses. `PCGrad(optimizer, "mean")` has that size.
    - Only shared parameters are projected, and only their gradients enter inner products and norms. There, all
      parameters are projected, heads too.
    - Parameters that at least two losses reach are shared. There, a parameter that one of the losses does not reach
      gets the sum of the projected gradients, whatever the reduction.
    - Gradients add to what `.grad` holds, as with `backward`. There, they replace it.
    - Parameters that no loss reaches keep their `.grad`. There, it becomes zeros, and weight decay and momentum act.
    - The orders of projection follow a generator of torch. There, they follow Python's `random`.
    - The backward of the last loss frees the graph. There, it stays.
    - Several processes average the gradients. There, each has its own.

    Args:
        optimizer: its parameters are float32, bfloat16 or float64, on one device.
        reduction: "sum" of the projected gradients, or their "mean".
        shared: the parameters that surgery applies to; when left out, those that at least two of the losses of a call
            reach. Every other parameter gets the sum of its gradients: a head gets its task's gradient.
        generator: a CPU generator for the orders of projection; torch's default generator when left out.
        weighting: another surgery in place of PCGrad, gram float64 [T, T] -> weights [T], like TorchJD's weightings.
            `reduction` then defines the unprojected combination.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    _name = "PCGrad"
    _method = "PCGrad.pc_backward"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        reduction: str = "sum",
        *,
        shared: Iterable[Tensor] | None = None,
        generator: torch.Generator | None = None,
        weighting: Weighting | None = None,
    ) -> None:
        if weighting is not None and generator is not None:
            raise ValueError("PCGrad: generator is for PCGrad's own weighting; leave it out when giving a weighting")
        rule = "pcgrad" if weighting is None else weighting
        super().__init__(optimizer, rule, reduction=reduction, shared=shared, generator=generator)

    pc_backward = GradientSurgery.backward
