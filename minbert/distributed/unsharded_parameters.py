"""The parameters and gradients of a run with one process, with the interface of `ShardedParameters`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from minbert.distributed.sharded_parameters import OptimizerState
from minbert.kernels.gradient_table import GradientColumns, GradientTable
from minbert.methods.task_gradients import TaskGradients

MOST_TABLES = 64  # of replayed gradients


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
        # By the id of a list of gradients, the list itself, so that no other gets its id, and tables of it.
        self._replayed: dict[int, tuple[Sequence[Tensor | None], GradientTable, GradientTable]] = {}

    @cached_property
    def _own(self) -> GradientColumns:
        return GradientColumns(list(self.heads.parameters()), 1)

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

    def wait_for_gradients(self) -> tuple[GradientTable, GradientTable]:
        """The gradients of the shared parameters, and all others: the `.grad` of their leaves."""
        own = [param.grad for param in self._own.params]
        return GradientTable(self.gradients.columns, self.gradients.read()), GradientTable(self._own, own)

    def replayed_gradients(self, grads: Sequence[Tensor | None]) -> tuple[GradientTable, GradientTable]:
        """The same of gradients that a CUDA graph has written; addresses are looked up once for each graph.

        Args:
            grads: those of `TaskGradients.leaves` and of the heads' parameters. The same list object stands for the
                same tensors in every call.
        """
        if id(grads) not in self._replayed:
            if len(self._replayed) == MOST_TABLES:
                self._replayed.clear()
            count = len(self.gradients.leaves)
            shared = GradientTable(self.gradients.columns, grads[:count])
            self._replayed[id(grads)] = grads, shared, GradientTable(self._own, grads[count:])
        return self._replayed[id(grads)][1:]

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
