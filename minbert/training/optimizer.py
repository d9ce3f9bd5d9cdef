"""AdamW on minbert's kernels, with torch's interface."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minbert import kernels
from minbert.distributed.sharded_parameters import OptimizerState


def split_(params: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Make float32 parameters bfloat16 and return by parameter the low bits that this leaves out, for `AdamW`."""
    low_bits = {}
    for param in params:
        param.data, low_bits[param] = kernels.split_float32(param.detach())
    return low_bits


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2).

    Equal to `torch.optim.AdamW` up to float32 rounding; the state has its names and shapes.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the two moment estimates.
        eps: added to the square root of the second moment.
        weight_decay: decay per step, in units of the learning rate.
        ema_decay: keep an exponential moving average of every parameter over the steps, in the same pass over memory,
            with this decay (Jiang et al. 2019, section 3.2). It starts as the parameter itself; `ema` gives it.
        copies: by parameter, a bfloat16 copy, shaped like it, that is written anew in the same pass.
        low_bits: by parameter that is split (`split_`), its low bits, which are updated with it; `master` joins them.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        ema_decay: float | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
        low_bits: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {betas}")
        if ema_decay is not None and not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay must be between 0 and 1, got {ema_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.ema_decay, self.copies, self.low_bits, self._set = ema_decay, copies or {}, low_bits or {}, ""
        if ema_decay is not None:
            for group in self.param_groups:
                for param in group["params"]:
                    self.state[param]["average"] = self.master(param).detach().clone()

    @property
    def ema(self) -> dict[Tensor, Tensor]:
        """By parameter, its exponential moving average; empty without `ema_decay`."""
        return {param: state["average"] for param, state in self.state.items() if "average" in state}

    def master(self, param: Tensor) -> Tensor:
        """A parameter in the precision in which it is updated: float32 where it is split, else the parameter itself."""
        low_bits = self.low_bits.get(param)
        return param if low_bits is None else kernels.join_float32(param.detach(), low_bits)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; the loss that `closure` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.combined_step({}, torch.ones(0, dtype=torch.float64))
        return loss

    @torch.no_grad()
    def combined_step(
        self,
        shared: Mapping[Tensor, Sequence[Tensor | None]],
        weights: Tensor,
        scale: Tensor | None = None,
        *,
        skip_unless: Tensor | None = None,
        parts: Mapping[Tensor, int] | None = None,
    ) -> list[Tensor]:
        """Update with a weighted sum of task gradients, which is never stored.

        Args:
            shared: by parameter, its gradient for each of T tasks; one without any stays as it is.
            weights: float64 [T]; with `parts` [G, T].
            scale: what the gradients of all other parameters, their `.grad`, are multiplied by: float64 [1].
            skip_unless: a float64 scalar: where it is 0, no parameter and no moment changes. The steps are counted
                nevertheless; `uncount` corrects that once the host has read the 0.
            parts: by shared parameter, the number of its part of the model, whose row of the weights it has.

        Returns:
            the step counts that were increased, for `uncount`.
        """
        own = torch.ones(1, dtype=torch.float64) if scale is None else scale
        counted: list[Tensor] = []
        for group in self.param_groups:
            by_step: dict[tuple[int, bool], list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                grads = shared.get(param, [param.grad])
                if any(grad is not None for grad in grads):
                    by_step[self._count(param), param in shared].append(param)
            for (count, is_shared), params in by_step.items():
                counted += self._states(params, self._entry("step"))
                rows = [shared[param] if is_shared else [param.grad] for param in params]
                kernels.combine_adamw_(
                    params,
                    list(zip(*rows, strict=True)),
                    weights if is_shared else own,
                    self._states(params, self._entry("exp_avg")),
                    self._states(params, self._entry("exp_avg_sq")),
                    step=count,
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    **self._ema(params),
                    copies=[self.copies.get(param) for param in params] if self.copies else None,
                    low_bits=[self.low_bits.get(param) for param in params] if self.low_bits else None,
                    skip_unless=skip_unless,
                    parts=[parts[param] for param in params] if is_shared and parts is not None else None,
                )
        return counted

    def uncount(self, counts: Iterable[Tensor]) -> None:
        """Decrease step counts by one."""
        for count in counts:
            count -= 1

    @torch.no_grad()
    def load(self, state: OptimizerState) -> None:
        """Load moments, averages and step counts, which may be on another device."""
        for param, entries in state.items():
            own = self.state[param]
            for name, value in entries.items():
                if name in own:  # the average, which `ema` has given out
                    own[name].copy_(value)
                else:
                    own[name] = value.to(param.device) if value.ndim else value.clone()

    def select(self, name: str) -> None:
        """Use other moments and step counts in the next steps, those of this name, as a separate optimizer would.

        They start at zero; the state has them as `exp_avg@name` and so on. All names share one average.
        """
        self._set = f"@{name}"

    def _entry(self, name: str) -> str:
        return name + self._set

    def _count(self, param: Tensor) -> int:
        """The number of this step of the parameter's, counted from 1."""
        state, step = self.state[param], self._entry("step")
        if step not in state:
            state[step] = torch.zeros((), dtype=torch.float32)
            dtype = torch.float32 if param in self.low_bits else param.dtype
            state[self._entry("exp_avg")] = torch.zeros_like(param, dtype=dtype)
            state[self._entry("exp_avg_sq")] = torch.zeros_like(param, dtype=dtype)
        state[step] += 1
        return int(state[step])

    def _states(self, params: Sequence[Tensor], entry: str) -> list[Tensor]:
        return [self.state[param][entry] for param in params]

    def _ema(self, params: Sequence[Tensor]) -> dict[str, Any]:
        return {} if self.ema_decay is None else {"ema": self._states(params, "average"), "ema_decay": self.ema_decay}
