"""PCGrad around any torch optimizer, in the call shape of WeiChengTseng/Pytorch-PCGrad."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial, wraps
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minbert.integrations.gradients_per_loss import (
    accumulate_grad,
    check_losses,
    check_parameters,
    loss_gradients,
    preserved_grad,
    python_functions,
)
from minbert.kernels import checks, combine, gram, surgery_weights
from minbert.methods.surgery import Conflicts, mean_weights, pcgrad_weights, sum_weights
from minbert.methods.user_weighting import Weighting

_PLAIN: dict[str, Weighting] = {"sum": sum_weights, "mean": mean_weights}


class PCGrad(torch.optim.Optimizer):
    """An optimizer with gradient surgery (Yu et al. 2020, algorithm 1).

        optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=1e-5))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
        optimizer.zero_grad()
        optimizer.pc_backward([first_loss, second_loss])  # in place of (first_loss + second_loss).backward()
        optimizer.step()
        schedule.step()

    It is a torch.optim.Optimizer with the parameter groups, state and hooks of the inner optimizer, `.optimizer`:
    learning-rate schedules, GradScaler, accelerate and transformers' schedulers take either. A GradScaler may scale the
    losses: surgery does not depend on the scale.

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

    Gradients are torch.autograd.grad's. A graph with a checkpoint of torch.utils.checkpoint(..., use_reentrant=True),
    whose parameters it does not show, is refused. DistributedDataParallel does not see these gradients: average `.grad`
    over the processes before `step`.

    Args:
        optimizer: its parameters are float32, bfloat16 or float64, on one device.
        reduction: "sum" of the projected gradients, or their "mean".
        shared: the parameters that surgery applies to; when left out, those that at least two of the losses of a call
            reach. Every other parameter gets the sum of its gradients: a head gets its task's gradient.
        generator: a CPU generator for the orders of projection; torch's default generator when left out.
        weighting: another surgery in place of PCGrad, gram float64 [T, T] -> weights [T], like TorchJD's weightings.
            `reduction` then defines the unprojected combination.

    Attributes:
        conflicts: the `minbert.methods.surgery.Conflicts` between the gradients of the last `pc_backward`, NaN without
            shared parameters; None before the first.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        reduction: str = "sum",
        *,
        shared: Iterable[Tensor] | None = None,
        generator: torch.Generator | None = None,
        weighting: Weighting | None = None,
    ) -> None:
        # Optimizer.__init__ is not called: groups, state and hooks are the inner optimizer's.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"PCGrad: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        checks.choice("PCGrad", "reduction", reduction, tuple(_PLAIN))
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"PCGrad: generator must be a torch.Generator or None, got {type(generator).__name__}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"PCGrad: generator must be a CPU generator, got one of {generator.device}")
        if weighting is not None and generator is not None:
            raise ValueError("PCGrad: generator is for PCGrad's own weighting; leave it out when giving a weighting")
        self.optimizer = optimizer
        self.conflicts: Conflicts | None = None
        self._plain, self._reduction = _PLAIN[reduction], reduction
        if weighting is None:
            weighting = partial(pcgrad_weights, generator=generator, reduction=reduction)
        self._weighting = weighting
        self._shared = None if shared is None else self._known(shared)
        self._warned = False

    def pc_backward(self, losses: Iterable[Tensor]) -> None:
        """Add the losses' gradients after surgery to the parameters' `.grad`.

        The losses may share a graph, which the backward of the last one frees. If a shared parameter's gradient is not
        finite, nothing is projected, and `.grad` gets the plain sum or mean, which is not finite either.

        Args:
            losses: T scalars, one per task; each of them reaches a parameter of the optimizer.

        Raises:
            ValueError, TypeError: `losses`, a gradient, or what the weighting returned is not as described, or the
                graph hides parameters; `.grad` is as before.
        """
        parameters = [parameter for parameter in dict.fromkeys(self._parameters()) if parameter.requires_grad]
        check_parameters(parameters)
        losses = check_losses(losses)
        functions = python_functions(losses)
        with preserved_grad(parameters):
            grads = loss_gradients(losses, parameters)
        reached = [sum(grad is not None for grad in column) for column in zip(*grads, strict=True)]
        for task, row in enumerate(grads):
            if not any(grad is not None for grad in row):
                raise ValueError(
                    f"PCGrad.pc_backward: losses[{task}] reaches no parameter of the optimizer; leave it out, or give"
                    " the optimizer the parameters that it depends on"
                )
        self._warn_once(functions, reached)
        if self._shared is None:
            shared = [count > 1 for count in reached]
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
        accumulate_grad(compress(parameters, shared), projected)
        accumulate_grad(compress(parameters, others), summed)

    def _warn_once(self, functions: list[str], reached: list[int]) -> None:
        """Warn of gradients that may be missing."""
        problems = []
        if functions and 0 in reached:
            problems.append(
                f"no loss reaches {reached.count(0)} of {len(reached)} parameters, and the losses' graph has"
                f" {', '.join(functions)}, written in Python: parameters that such a function uses without taking them"
                " as arguments get no gradient"
            )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            problems.append(
                "DistributedDataParallel does not average these gradients; average .grad over the processes before"
                " step()"
            )
        if problems and not self._warned:
            self._warned = True
            warnings.warn(f"PCGrad: {'; '.join(problems)}", stacklevel=3)

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """The inner optimizer's `step`. A closure calls `zero_grad` and `pc_backward`, and returns a loss."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _known(self, shared: Iterable[Tensor]) -> set[Tensor]:
        """`shared` as a set, all of it parameters of the optimizer."""
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


def _inner_method(name: str) -> Any:
    @wraps(getattr(torch.optim.Optimizer, name))
    def method(self: PCGrad, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.optimizer, name)(*args, **kwargs)

    return method


# Parameter groups, state and hooks are the inner optimizer's.
for _name in ("param_groups", "state", "defaults"):
    setattr(PCGrad, _name, property(attrgetter(f"optimizer.{_name}")))
for _name in vars(torch.optim.Optimizer):
    if _name.startswith("register_") or _name in ("zero_grad", "add_param_group", "state_dict", "load_state_dict"):
        setattr(PCGrad, _name, _inner_method(_name))
