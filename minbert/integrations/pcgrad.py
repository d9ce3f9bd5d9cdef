"""PCGrad around any torch optimizer, in the call shape of WeiChengTseng/Pytorch-PCGrad."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from minbert.kernels import checks, combine, gram, surgery_weights
from minbert.surgery import Conflicts, Weighting, mean_weights, pcgrad_weights, sum_weights

Gradients = list[list[Tensor | None]]  # one row per task, one column per parameter; None where a loss does not reach

_PLAIN: dict[str, Weighting] = {"sum": sum_weights, "mean": mean_weights}


class PCGrad:
    """An optimizer whose gradients go through gradient surgery first (Yu et al. 2020, algorithm 1).

        optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=1e-5))
        optimizer.zero_grad()
        optimizer.pc_backward([first_loss, second_loss])  # in place of (first_loss + second_loss).backward()
        optimizer.step()

    Learning-rate schedulers and GradScaler take `.optimizer`, the optimizer inside. Losses that a GradScaler scaled
    are fine: surgery does not depend on the scale.

    Unlike Pytorch-PCGrad, it projects shared parameters only, so no head's gradient enters an inner product or a norm;
    "sum" sums; gradients add to what `.grad` holds, as with `backward`; parameters that no loss reaches keep a `.grad`
    of None; and the orders of projection come from a generator.

    Args:
        optimizer: its parameters are float32, bfloat16 or float64, on one device.
        reduction: "sum" of the projected gradients, as in the paper, or their "mean".
        shared: the parameters that surgery is about; when left out, those that at least two of the losses reach, found
            anew in each call. Every other parameter gets the plain sum of its gradients: a head's is its task's own.
        generator: a CPU generator for the orders of projection; torch's default generator when left out.
        weighting: another surgery in PCGrad's place, gram float64 [T, T] -> weights [T], as TorchJD's weightings are.
            `reduction` is then the plain combination that it departs from.

    Attributes:
        conflicts: how the gradients of the last `pc_backward` disagreed, a `minbert.surgery.Conflicts`; None before.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        reduction: str = "sum",
        shared: Iterable[Tensor] | None = None,
        generator: torch.Generator | None = None,
        weighting: Weighting | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"PCGrad: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        checks.choice("PCGrad", "reduction", reduction, tuple(_PLAIN))
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"PCGrad: generator must be a torch.Generator or None, got {type(generator).__name__}")
        if weighting is not None and generator is not None:
            raise ValueError("PCGrad: generator is for PCGrad's own weighting; leave it out when giving a weighting")
        self.optimizer = optimizer
        self.conflicts: Conflicts | None = None
        self._plain, self._reduction = _PLAIN[reduction], reduction
        if weighting is None:
            weighting = partial(pcgrad_weights, generator=generator, reduction=reduction)
        self._weighting = weighting
        self._shared = None if shared is None else self._known(shared)

    def pc_backward(self, losses: Iterable[Tensor]) -> None:
        """Add to the parameters' `.grad` what surgery makes of the losses' gradients.

        The losses may share a graph: it is kept until the last of them is differentiated. If a shared parameter's
        gradient is not finite, nothing is projected, and the plain combination shows it to whoever looks for it.
        DistributedDataParallel does not see these gradients: all-reduce `.grad` yourself.

        Args:
            losses: T scalars, one per task.

        Raises:
            ValueError, TypeError: `losses`, a gradient, or what the weighting returned is not as described; `.grad` is
                as before.
        """
        parameters = [parameter for parameter in self._parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("PCGrad.pc_backward: the optimizer needs a parameter that requires gradients, got none")
        grads = _gradients(_scalars(losses), parameters)
        if self._shared is None:
            shared = [sum(grad is not None for grad in column) > 1 for column in zip(*grads, strict=True)]
        else:
            shared = [parameter in self._shared for parameter in parameters]
        others = [not is_shared for is_shared in shared]

        rows = [list(compress(row, shared)) for row in grads]
        products = gram(rows)
        weights = self._weights(products) if products.isfinite().all() else self._plain(products)
        _, stats = surgery_weights(products, weights=weights, reduction=self._reduction)
        self.conflicts = Conflicts.of(products, stats[3].item())

        projected = combine(rows, weights)
        summed = combine([list(compress(row, others)) for row in grads], sum_weights(products))
        _accumulate(compress(parameters, shared), projected)
        _accumulate(compress(parameters, others), summed)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """The inner optimizer's `step`."""
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The inner optimizer's `zero_grad`."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state; surgery has none of its own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        self.optimizer.load_state_dict(state_dict)

    def _parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _known(self, shared: Iterable[Tensor]) -> set[Tensor]:
        """`shared` as a set (tensors hash by identity), all of it the optimizer's."""
        if isinstance(shared, Tensor):
            raise TypeError("PCGrad: shared must be a list of parameters, got one tensor; write [parameter]")
        chosen, known = list(shared), set(self._parameters())
        for index, parameter in enumerate(chosen):
            if not isinstance(parameter, Tensor):
                raise TypeError(f"PCGrad: shared[{index}] must be a parameter, got {type(parameter).__name__}")
            if parameter not in known:
                raise ValueError(
                    f"PCGrad: shared[{index}], of shape {list(parameter.shape)}, is no parameter of the optimizer; "
                    "give the optimizer every parameter of shared"
                )
        return set(chosen)

    def _weights(self, products: Tensor) -> Tensor:
        weights = self._weighting(products)
        if not isinstance(weights, Tensor) or weights.shape != products.shape[:1]:
            got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"PCGrad: weighting must return one weight for each of {len(products)} losses, got {got}")
        return weights.detach().to(products)


def _scalars(losses: Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(losses, Iterable) or (isinstance(losses, Tensor) and losses.ndim == 0):
        got = type(losses).__name__
        raise TypeError(f"PCGrad.pc_backward: losses must be a list of scalar tensors, got one {got}; write [loss]")
    listed = list(losses)
    if not listed:
        raise ValueError("PCGrad.pc_backward: losses must hold one scalar tensor per task, got none")
    for task, loss in enumerate(listed):
        if not isinstance(loss, Tensor):
            raise TypeError(f"PCGrad.pc_backward: losses[{task}] must be a scalar tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(
                f"PCGrad.pc_backward: losses[{task}] must be a scalar, got shape {list(loss.shape)}; take its mean"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"PCGrad.pc_backward: losses[{task}] depends on nothing that requires gradients; compute it outside "
                "torch.no_grad() and without .detach() or .item()"
            )
    return listed


def _gradients(losses: list[Tensor], parameters: list[Tensor]) -> Gradients:
    """The losses' gradients, one loss after the other; the graph they may share goes with the last one."""
    rows: Gradients = []
    last = len(losses) - 1
    for i, loss in enumerate(losses):
        row = torch.autograd.grad(loss, parameters, retain_graph=i < last, allow_unused=True)
        rows.append(
            [_laid_out(grad, parameter, i, k) for k, (grad, parameter) in enumerate(zip(row, parameters, strict=True))]
        )
    return rows


def _laid_out(grad: Tensor | None, parameter: Tensor, task: int, index: int) -> Tensor | None:
    """A gradient laid out as its parameter, as `backward` would store it; autograd also gives expanded ones."""
    if grad is None:
        return None
    where = f"PCGrad.pc_backward: losses[{task}]'s gradient of parameter {index}, of shape {list(parameter.shape)},"
    if grad.layout != torch.strided:
        raise ValueError(f"{where} must be dense, got {grad.layout}; build the layer with sparse=False")
    if grad.dtype not in checks.GRADIENTS:
        raise TypeError(f"{where} must be float32, bfloat16 or float64, got {grad.dtype}; keep parameters in float32")
    if grad.stride() == parameter.stride() and checks.is_dense(grad):
        return grad
    return torch.empty_like(parameter).copy_(grad)


@torch.no_grad()
def _accumulate(parameters: Iterable[Tensor], updates: Iterable[Tensor | None]) -> None:
    for parameter, update in zip(parameters, updates, strict=True):
        if parameter.grad is None:
            parameter.grad = update
        elif update is not None:
            parameter.grad.add_(update)
