"""What `GradientSurgery` keeps from call to call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from minbert.methods.surgery import Conflicts


@dataclass
class SurgeryMemory:
    """Of one optimizer. Lightning's wrapper of an optimizer shares it with the optimizer."""

    conflicts: Conflicts | None = None
    weights: Tensor | None = None
    state: Tensor | None = None  # of the rule
    rows: list[dict[Tensor, Tensor]] = field(default_factory=list)  # for each task the gradients that are held
    losses: list[list[Tensor]] = field(default_factory=list)  # for each task, float64 scalars
    warned: bool = False

    def drop(self) -> None:
        """Hold nothing."""
        self.rows, self.losses = [], []

    def plus(
        self,
        where: str,
        parameters: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor | None]],
        losses: Sequence[Tensor | None],
    ) -> tuple[list[dict[Tensor, Tensor]], list[list[Tensor]]]:
        """What is held with the gradients and losses of one more batch; what is held does not change.

        Args:
            where: the method that messages name.
            grads: for each task one for each of `parameters`.
        """
        held, values = self.rows or [{} for _ in losses], self.losses or [[] for _ in losses]
        if len(held) != len(losses):
            raise ValueError(
                f"{where}: losses must be {len(held)}, as many as those whose gradients are held, got {len(losses)};"
                " give None for a task without examples"
            )
        rows = []
        for before, row in zip(held, grads, strict=True):
            new = {parameter: grad for parameter, grad in zip(parameters, row, strict=True) if grad is not None}
            rows.append(before | {p: grad if p not in before else before[p] + grad for p, grad in new.items()})
        now = [[] if loss is None else [loss.detach().double().reshape(())] for loss in losses]
        return rows, [before + after for before, after in zip(values, now, strict=True)]
