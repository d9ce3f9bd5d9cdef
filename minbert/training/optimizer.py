"""AdamW on minbert's kernels, with torch's interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minbert import kernels
from minbert.distributed.sharded_parameters import OptimizerState
from minbert.kernels.gradient_table import GradientColumns, GradientTable
from minbert.kernels.prepared_adamw import AdamWTensors, combine_adamw_of_
from minbert.training.parameter_sets import ParameterSet, ParameterSets


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
        params: parameters or parameter groups, float32 or float64; bfloat16 where `low_bits` has them.
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
        TypeError: in `step`, a parameter of another dtype.
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
        self._parameter_sets: dict[str, ParameterSets] = {}  # by the name that is selected
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
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for each in self._sets().of(tuple(map(id, params)), lambda: params):
            kernels.combine_adamw_(
                each.params,
                [[param.grad for param in each.params]],
                torch.ones(1, dtype=torch.float64),
                self._states(each.params, self._entry("exp_avg")),
                self._states(each.params, self._entry("exp_avg_sq")),
                **self._options(each),
                **self._written(each.params),
            )
        return loss

    @torch.no_grad()
    def combined_step(
        self,
        shared: GradientTable,
        own: GradientTable,
        weights: Tensor,
        scale: Tensor,
        *,
        skip_unless: Tensor | None = None,
        parts: Mapping[Tensor, int] | None = None,
    ) -> list[ParameterSet]:
        """Update with a weighted sum of task gradients, which is never stored; parameters without any stay as they are.

        Args:
            shared: T gradients of each of some parameters.
            own: one gradient of each of others.
            weights: of the T gradients, float64 [T]; with `parts` [G, T].
            scale: what the other parameters' gradients are multiplied by: float64 [1].
            skip_unless: a float64 scalar: where it is 0, no parameter and no moment changes. The steps are counted
                nevertheless; `uncount` corrects that once the host has read the 0.
            parts: by shared parameter, the number of its part of the model, whose row of the weights it has.

        Returns:
            the parameters whose steps were counted, for `uncount`.
        """
        counted: list[ParameterSet] = []
        for table, its_weights, numbers in ((shared, weights, parts), (own, scale, None)):
            columns = table.columns
            for each in self._sets().of((columns, table.present), table.present_params):
                tensors = each.prepared(columns, numbers) or self._prepare(each, columns, numbers, len(weights))
                combine_adamw_of_(table, tensors, its_weights, **self._options(each), skip_unless=skip_unless)
                counted.append(each)
        return counted

    @torch.no_grad()
    def uncount(self, counted: Iterable[ParameterSet]) -> None:
        """Take back the count of one step of some parameters."""
        for each in counted:
            counts = {id(count): count for count in self._states(each.params, each.entry)}
            for count in counts.values():
                count -= 1

    @torch.no_grad()
    def load(self, state: OptimizerState) -> None:
        """Load moments, averages and step counts, which may be on another device."""
        for param, entries in state.items():
            own = self.state[param]
            for name, value in entries.items():
                if _is_count(name):
                    own[name] = value.clone()
                elif name in own:  # the average, which `ema` has given out
                    own[name].copy_(value)
                else:
                    own[name] = value.to(param.device)
        self._parameter_sets.clear()

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; each parameter has a step count of its own there."""
        found = super().state_dict()
        found["state"] = {
            number: {name: value.clone() if _is_count(name) else value for name, value in entries.items()}
            for number, entries in found["state"].items()
        }
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parameter_sets = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer."""
        super().add_param_group(param_group)
        self._parameter_sets = {}

    def select(self, name: str) -> None:
        """Use other moments and step counts in the next steps, those of this name, as a separate optimizer would.

        They start at zero; the state has them as `exp_avg@name` and so on. All names share one average.
        """
        self._set = f"@{name}"

    def _entry(self, name: str) -> str:
        return name + self._set

    def _sets(self) -> ParameterSets:
        """The sets of parameters that step together, under the name that is selected."""
        if self._set not in self._parameter_sets:
            groups, entry = self.param_groups, self._entry("step")
            self._parameter_sets[self._set] = ParameterSets(groups, self.state, entry, self._start)
        return self._parameter_sets[self._set]

    def _start(self, param: Tensor) -> None:
        dtype = torch.float32 if param in self.low_bits else param.dtype
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][self._entry(name)] = torch.zeros_like(param, dtype=dtype)

    def _prepare(
        self, each: ParameterSet, columns: GradientColumns, numbers: Mapping[Tensor, int] | None, part_count: int
    ) -> AdamWTensors:
        places = {param: k for k, param in enumerate(columns.params)}
        tensors = AdamWTensors(
            columns,
            [places[param] for param in each.params],
            self._states(each.params, self._entry("exp_avg")),
            self._states(each.params, self._entry("exp_avg_sq")),
            **self._written(each.params),
            parts=None if numbers is None else [numbers[param] for param in each.params],
            part_count=part_count,
        )
        each.prepare(tensors, columns, numbers)
        return tensors

    def _states(self, params: Sequence[Tensor], entry: str) -> list[Tensor]:
        return [self.state[param][entry] for param in params]

    def _written(self, params: Sequence[Tensor]) -> dict[str, Any]:
        """What is written besides parameters and moments."""
        return {
            "ema": None if self.ema_decay is None else self._states(params, "average"),
            "copies": [self.copies.get(param) for param in params] if self.copies else None,
            "low_bits": [self.low_bits.get(param) for param in params] if self.low_bits else None,
        }

    def _options(self, each: ParameterSet) -> dict[str, Any]:
        """The numbers of the next step of some parameters, which is counted."""
        options = {name: each.group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        return {**options, "step": each.count(), "ema_decay": self.ema_decay or 0.0}


def _is_count(name: str) -> bool:
    return name.partition("@")[0] == "step"
