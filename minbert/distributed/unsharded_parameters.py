"""The parameters and gradients of a run with one process, with the interface of `ShardedParameters`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from minbert.distributed.sharded_parameters import OptimizerState
from minbert.methods.task_gradients import TaskGradients


class UnshardedParameters:
    """Parameters of a single process: nothing is sent.

    Args:
        heads: the module whose parameters have one gradient, their `.grad`.
        copies: by parameter, the half-precision copy that the optimizer writes.

    Attributes:
        gradients: of the parameters that the tasks share, one for each task or group of tasks (`register_hooks`).
        ema: by parameter, its exponential moving average; empty without `keep_ema`.
    """

    def __init__(self, heads: nn.Module, copies: Mapping[Tensor, Tensor] | None = None) -> None:
        self.heads, self.copies = heads, copies or {}
        self.optimizer_copies = self.copies  # the optimizer writes all
        self.ema: Mapping[Tensor, Tensor] = {}
        self.gradients: TaskGradients

    def param_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return [dict(group) for group in groups]

    def by_shard(self, numbers: Mapping[Tensor, int]) -> Mapping[Tensor, int]:
        """The parameters' numbers, by the parameters that the optimizer updates."""
        return numbers

    def register_hooks(self, gradients: TaskGradients) -> None:
        self.gradients = gradients

    def reduce_next_backward(self) -> None:
        pass

    def wait_for_gradients(self) -> tuple[Mapping[Tensor, Sequence[Tensor | None]], list[Tensor]]:
        """By shared parameter its gradient for each task, None where no loss reaches it; and all other gradients."""
        own = [param.grad for param in self.heads.parameters() if param.grad is not None]
        of_params = zip(*self.gradients.rows, strict=True)
        return dict(zip(self.gradients.params, of_params, strict=True)), own

    def all_gather(self) -> None:
        pass

    def all_gather_masters(self) -> None:
        pass

    def keep_ema(self, optimizer: Any) -> None:
        """Take the EMA from the optimizer, which keeps and updates it."""
        self.ema = optimizer.ema

    def bytes_per_update(self, *, ema: bool) -> int:
        return 0

    def gather_full_state(self, state: OptimizerState) -> OptimizerState:
        return state

    def shard_state(self, full: OptimizerState) -> OptimizerState:
        return full
