"""A rule of `minbert.methods.weightings` in a run: its state on the device, and in checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from minbert.errors import UserError
from minbert.files.atomic import write_tensors
from minbert.kernels.weightings import MOST_TASKS
from minbert.methods.user_weighting import STATE
from minbert.methods.weightings import Weighting
from minbert.model.weights import open_safetensors


class BuiltInWeighting:
    """A rule and its state from step to step, if it has one; called as a `UserWeighting` is.

    Every process calls it in every step, with the same Gram matrix and the same losses, so that all have one state.

    Attributes:
        needs_losses: whether the rule reads the losses.
    """

    def __init__(self, rule: Weighting) -> None:
        self.rule, self.needs_losses = rule, rule.needs_losses
        self.tasks = self.parts = 0
        self.state: Tensor | None = None

    def prepare(self, tasks: int, device: torch.device, parts: int | None = None) -> None:
        """Make the state for so many task gradients, of each of so many parts of the model if there are several.

        Raises:
            UserError: they are too many for the rule.
        """
        if tasks > MOST_TASKS:
            raise UserError(
                f"--surgery {self.rule} takes at most {MOST_TASKS} gradients, and {tasks} tasks have one each;"
                " join some by --surgery-groups, or give --surgery pcgrad, mean or sum"
            )
        self.tasks, self.parts, self.state = tasks, parts or 1, self.rule.state(tasks, parts, device)

    def __call__(self, gram: Tensor, generator: torch.Generator, losses: Tensor | None = None) -> Tensor:
        """The weights [T] for a Gram matrix [T, T]; the state changes, unless a number of the matrix is not finite."""
        return self.rule.weights(gram, losses=losses, state=self.state, generator=generator)

    def save(self, directory: Path) -> None:
        """Write the state, if any, to a checkpoint."""
        if self.state is not None:
            write_tensors(directory / STATE, {"state": self.state}, self._metadata())

    def load(self, directory: Path, device: torch.device) -> None:
        """Load the state from a checkpoint.

        Raises:
            UserError: the checkpoint has none, a damaged one, or that of another surgery or number of tasks or parts.
        """
        if self.state is None:
            return
        path = directory / STATE
        if not path.exists():
            raise UserError(
                f"{path} is missing: the checkpoint holds no state of --surgery {self.rule}; start a new run"
            )
        with open_safetensors(path) as file:
            written, expected = file.metadata() or {}, self._metadata()
            state = file.get_tensor("state") if "state" in file.keys() else torch.empty(0)  # noqa: SIM118
        if written != expected or state.shape != self.state.shape:
            was, now = (
                f"{each.get('rule', 'another kind')} ({each.get('tasks', '?')} tasks, {each.get('parts', '?')} parts)"
                for each in (written, expected)
            )
            raise UserError(
                f"{path} holds the state of --surgery {was}, and this run has {now}; resume with those that wrote it"
            )
        if state.dtype != self.state.dtype or not state.isfinite().all():
            raise UserError(f"{path} is damaged; restore it from a copy, or use another checkpoint")
        self.state.copy_(state)

    def _metadata(self) -> dict[str, str]:
        return {"rule": str(self.rule), "tasks": str(self.tasks), "parts": str(self.parts)}
