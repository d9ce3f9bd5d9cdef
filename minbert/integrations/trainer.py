"""transformers' Trainer with gradient surgery over the losses of several tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from minbert.integrations.gradient_surgery import GradientSurgery
from minbert.integrations.task_batch import TaskBatch
from minbert.methods.weightings import Weighting


class SurgeryTrainer(Trainer):
    """A Trainer whose model returns a loss for each task, and whose optimizer is a `GradientSurgery`.

        trainer = SurgeryTrainer(model, arguments, train_dataset=examples, data_collator=collate, rule="cagrad(c=0.4)")
        trainer.train()

    The model's output is a dictionary or a transformers.utils.ModelOutput. Its "losses" are T scalars, means over the
    batch's examples of each task, None for a task without examples; its "batch", if any, is the `TaskBatch` in which
    they were computed, for one backward instead of T. The number of tasks is the same in each batch. A model of another
    form needs a subclass with its own `task_losses`.

    Accumulation over `gradient_accumulation_steps` batches applies surgery to the gradients of them all
    (`GradientSurgery.backward(hold=True)`). Clipping, schedules, mixed precision and DistributedDataParallel are the
    Trainer's. Its checkpoints hold the rule's state in optimizer.pt, so that a resumed run goes on to the bit. The
    losses that it logs and evaluates are the sum over the tasks.

    Args:
        rule: as for `GradientSurgery`.
        surgery: further arguments of `GradientSurgery` by name, such as `reduction` and `generator`.
        args, kwargs: Trainer's. An optimizer among them is wrapped as the Trainer's own is.

    Raises:
        ValueError: DeepSpeed, FSDP, or several GPUs in one process, whose gradients surgery cannot see.
        TypeError: `surgery` is no dictionary.
    """

    def __init__(
        self,
        *args: Any,
        rule: str | Weighting | Callable[..., Tensor] = "upgrad",
        surgery: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if surgery is not None and not isinstance(surgery, Mapping):
            raise TypeError(
                f"SurgeryTrainer: surgery must be a dictionary of GradientSurgery's arguments, got {surgery!r:.60}; the"
                " rule is rule="
            )
        super().__init__(*args, **kwargs)
        self._rule, self._options = rule, dict(surgery or {})
        for used, name in (
            (self.is_deepspeed_enabled, "DeepSpeed"),
            (self.is_fsdp_enabled, "FSDP"),
            (self.args.n_gpu > 1, "torch.nn.DataParallel"),
        ):
            if used:
                raise ValueError(f"SurgeryTrainer: {name} is not supported; run one process for each GPU by torchrun")

    @property
    def surgery(self) -> GradientSurgery | None:
        """The optimizer that applies surgery, with its `conflicts` and `weights`; None before `train`."""
        optimizer = self.optimizer
        while optimizer is not None and not isinstance(optimizer, GradientSurgery):
            optimizer = getattr(optimizer, "optimizer", None)
        return optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.surgery is None:
            optimizer = self.optimizer = GradientSurgery(optimizer, self._rule, **self._options)
        return optimizer

    def task_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Sequence[Tensor | None], Any]:
        """The loss of each task, None without examples, and the model's output."""
        output = model(**inputs)
        return output["losses"], output

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the tasks' losses, for evaluation."""
        losses, output = self.task_losses(model, inputs)
        loss = torch.stack([loss for loss in losses if loss is not None]).sum()
        return (loss, output) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward, and the backward with surgery; returns the sum of the losses."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses, output = self.task_losses(model, inputs)
        steps = self.current_gradient_accumulation_steps
        losses = [None if loss is None else loss / steps for loss in losses]
        batch: TaskBatch | None = output.get("batch") if isinstance(output, Mapping) else None
        surgery = self.surgery
        assert surgery is not None  # after create_optimizer
        hold = not self.accelerator.sync_gradients
        surgery.backward(losses, hold=hold, batch=batch, scaler=self.accelerator.scaler)
        return torch.stack([loss.detach() for loss in losses if loss is not None]).sum()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """The Trainer's, without "losses" and "batch" among the predictions."""
        if ignore_keys is None:
            ignore_keys = getattr(getattr(self.model, "config", None), "keys_to_ignore_at_inference", [])
        return super().prediction_step(model, inputs, prediction_loss_only, [*ignore_keys, "losses", "batch"])
