"""`combine_adamw_` for the same parameters step after step: what it changes is checked once, and addresses are kept."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import adamw, dispatch, native_calls, reference
from .flight_recorder import recorded
from .gradient_table import GradientColumns, GradientTable

_OP = "combine_adamw_"


class AdamWTensors:
    """What a step changes of some parameters, each of which has a gradient in that step.

    Args:
        columns: where their gradients are.
        numbers: of their columns [n].
        exp_avgs, exp_avg_sqs, ema, copies, low_bits: as for `combine_adamw_` [n].
        parts: for each parameter the number of its part of the model; None for one.
        part_count: of the parts; needed with `parts`.

    Raises:
        ValueError, TypeError: a tensor is not as described.
    """

    def __init__(
        self,
        columns: GradientColumns,
        numbers: Sequence[int],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        *,
        ema: Sequence[Tensor] | None = None,
        copies: Sequence[Tensor | None] | None = None,
        low_bits: Sequence[Tensor | None] | None = None,
        parts: Sequence[int] | None = None,
        part_count: int = 1,
    ) -> None:
        device = columns.device
        lists = {"params": [columns.params[k] for k in numbers], "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
        if ema is not None:
            lists["ema"] = ema
        adamw.check_state(_OP, [columns.leaves[k] for k in numbers], lists, copies, low_bits)
        order, self.first_columns = native_calls.by_part(range(len(numbers)), parts, part_count)
        self.parts = None if parts is None else [parts[i] for i in order]
        self.selected = columns.select([numbers[i] for i in order])
        given = *lists.values(), *(() if ema is not None else ([],))
        filled = adamw.filled(copies, device), adamw.filled(low_bits, device)
        self.tensors = [[tensors[i] for i in order] if tensors else [] for tensors in (*given, *filled)]
        places = [list(map(Tensor.data_ptr, tensors)) for tensors in self.tensors]
        self.addresses, self._places = [array("q", of) for of in places], places[0]
        params, _, _, averages, written, _ = self.tensors
        self._read = [*params, *averages, *(copy for copy in written if copy.numel())]  # by forwards

    def are_in_place(self) -> bool:
        """Whether the parameters are where they were: `param.data = ...` moves one."""
        return list(map(Tensor.data_ptr, self.tensors[0])) == self._places

    def mark_changed(self) -> None:
        """Tell autograd of the changes, so that a backward of an earlier forward is refused."""
        torch.autograd.graph.increment_version(self._read)


def _op_arguments(
    table: GradientTable, tensors: AdamWTensors, weights: Tensor, skip_unless: Tensor | None, scalars: Sequence[float]
) -> Sequence[Any]:
    grads = table.op_arguments(tensors.selected)
    return *grads, weights, *tensors.tensors, skip_unless, scalars, tensors.first_columns


@recorded(_OP, _op_arguments)
def _launch(
    table: GradientTable, tensors: AdamWTensors, weights: Tensor, skip_unless: Tensor | None, scalars: Sequence[float]
) -> None:
    arguments = table.arguments(tensors.selected, tensors.first_columns)
    with native_calls.shown_as(_OP):
        adamw.launch_combine_adamw(arguments, weights, tensors.addresses, skip_unless, scalars)


def combine_adamw_of_(
    table: GradientTable,
    tensors: AdamWTensors,
    weights: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float = 0.0,
    skip_unless: Tensor | None = None,
) -> None:
    """`combine_adamw_` of an update's gradients, to the same bits. It is called without gradients (`torch.no_grad`).

    Args:
        table: each of the parameters has a gradient there.
        weights: float64 [T], or where the tensors have parts [G, T], there or on the CPU.
        step, lr, betas, eps, weight_decay, ema_decay, skip_unless: as for `combine_adamw_`.
    """
    if dispatch.is_compiled(_OP, table.columns.device):
        scalars = adamw.step_scalars(step, lr, betas, eps, weight_decay, ema_decay)
        _launch(table, tensors, weights.to(table.columns.device), skip_unless, scalars)
        tensors.mark_changed()
        return
    params, exp_avgs, exp_avg_sqs, ema, copies, low_bits = tensors.tensors
    rows, count = tensors.selected.of(table.grads), len(params)
    reference.combine_adamw_(
        params,
        [rows[task * count : (task + 1) * count] for task in range(table.columns.tasks)],
        weights,
        exp_avgs,
        exp_avg_sqs,
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        ema=ema or None,
        ema_decay=ema_decay,
        copies=[copy if copy.numel() else None for copy in copies] or None,
        low_bits=[low if low.numel() else None for low in low_bits] or None,
        skip_unless=skip_unless,
        parts=tensors.parts,
    )
