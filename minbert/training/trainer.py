"""What a training step works with, and the numbers it computes from all gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minbert import kernels
from minbert.distributed.process_group import ProcessGroup
from minbert.distributed.sharded_parameters import ShardedParameters
from minbert.distributed.unsharded_parameters import UnshardedParameters
from minbert.kernels.gradient_table import GradientTable
from minbert.kernels.surgery import gram_of
from minbert.methods.surgery import Surgery
from minbert.methods.task_gradients import TaskGradients
from minbert.model import MultitaskModel
from minbert.model.parts import ModelParts
from minbert.training.batches import Batch, Batches, Examples
from minbert.training.cuda_graphs import CudaGraphs
from minbert.training.objective import Losses, Objective
from minbert.training.optimizer import AdamW
from minbert.training.step_result import PendingUpdate


@dataclass
class Trainer:
    """What a training step works with.

    Args:
        sample: gives the examples of a step (from 0): a batch for each accumulated backward.
        batches: packs them into streams.
        objective: the losses of a stream.
        parameters: where the gradients of the parameters are, of one process or sharded among several.
        optimizer: AdamW for these parameters.
        surgeries: the updates of a step.
        clip_norm: gradients are scaled down to this norm; 0 leaves them.
        graphs: run forward and backward as CUDA graphs, where a step is one stream and one batch.
        parts: of the model, whose numbers are by the parameters that the optimizer updates; None for one.
    """

    sample: Callable[[int], Sequence[Examples]]
    batches: Batches
    objective: Objective
    parameters: UnshardedParameters | ShardedParameters
    optimizer: AdamW
    surgeries: Sequence[Surgery]
    clip_norm: float
    graphs: CudaGraphs | None = None
    parts: ModelParts | None = None
    last_update: PendingUpdate | None = field(default=None, init=False)

    @property
    def model(self) -> MultitaskModel:
        return self.objective.model

    @property
    def gradients(self) -> TaskGradients:
        return self.parameters.gradients

    @contextmanager
    def products(self) -> Iterator[None]:
        """How the products of an update run, on CPUs.

        Weights are packed once where regularisers read them again. One process adds weight gradients in the product;
        several have hooks on them, which send them.
        """
        with ExitStack() as stack:
            if self.group.device.type == "cpu" and isinstance(self.parameters, UnshardedParameters):
                stack.enter_context(kernels.weight_gradients_added())
            several = self.objective.smart.on or self.objective.rdrop.on
            if self.group.device.type == "cpu" and several and not self.batches.low_memory:
                stack.enter_context(kernels.weights_packed_once())
            yield

    @property
    def group(self) -> ProcessGroup:
        return self.batches.group

    def wait_for_gradients(self) -> tuple[GradientTable, GradientTable]:
        """The gradients of the parameters that the tasks share, and all others, once the ranks have summed them."""
        replayed = None if self.graphs is None else self.graphs.replayed
        if replayed is None:
            return self.parameters.wait_for_gradients()
        assert isinstance(self.parameters, UnshardedParameters)  # graphs are for one process
        return self.parameters.replayed_gradients(replayed)

    def losses_by_group(self, losses: Sequence[Losses], batches: int) -> Tensor:
        """The loss of each group of tasks, float64 [T]: the sum of its task losses, weighted, without regularisers.

        Args:
            losses: of each stream.
            batches: of each task in these streams, over which the mean is taken.
        """
        weights = self.objective.weights
        sums = []
        for tasks in self.batches.task_groups:
            names = [task.name for task in tasks]
            of_tasks = [
                weights.get(name, 1.0) * stream.task[name].detach().double()
                for stream in losses
                for name in names
                if name in stream.task
            ]
            sums.append(torch.stack(of_tasks).sum())
        return torch.stack(sums) / batches


def cuda_graphs(objective: Objective, gradients: TaskGradients, device: torch.device, **options: Any) -> CudaGraphs:
    """CUDA graphs of the forward and backward of a step that is one stream in one process."""

    def forward_backward(batch: Batch) -> Losses:
        losses = objective(batch, gradients.attached)
        losses.total.backward()
        return losses

    return CudaGraphs(forward_backward, [*gradients.leaves, *objective.model.heads.parameters()], device, **options)


class GradientProducts(NamedTuple):
    """Inner products of the gradients of all ranks, on the device."""

    gram: Tensor  # float64 [T, T]: of the task gradients of the shared parameters; of parts of the model [G, T, T]
    own_square: Tensor  # float64 []: squared norm of all other gradients; not finite where a loss is not
    perturbations: Tensor  # float64 [streams]: mean norm of SMART's perturbation; empty without SMART
    losses: Tensor | None  # float64 [T]: those given; the same bits on all ranks


def gradient_products(
    shared: GradientTable,
    own: GradientTable,
    losses: Sequence[Losses],
    group: ProcessGroup,
    by_group: Tensor | None = None,
    parts: ModelParts | None = None,
) -> GradientProducts:
    """Compute the Gram matrix of the task gradients and the other gradients' norm, summed over the ranks at once.

    Args:
        shared: T gradients of each parameter that the tasks share.
        own: the gradients of all other parameters.
        losses: of each stream.
        by_group: `Trainer.losses_by_group`, where a surgery needs it; all ranks get rank 0's.
        parts: of the model, which have Gram matrices of their own; their numbers are by those parameters.
    """
    sizes = [stream.perturbation.view(1) for stream in losses if stream.perturbation is not None]
    own_gram, of_tasks = _gram(own, group.device), _gram(shared, group.device, parts)
    products = [of_tasks.flatten(), own_gram.flatten()]
    seen = [] if by_group is None else [by_group if group.is_main else torch.zeros_like(by_group)]
    gram, own_square, perturbations, agreed = group.all_reduce_sum(torch.cat([*products, *sizes, *seen])).split(
        [of_tasks.numel(), 1, len(sizes), sum(map(len, seen))]
    )
    totals = torch.stack([stream.total.detach() for stream in losses])
    own_square = own_square[0] + (totals - totals).sum()
    if parts is not None:  # what is not finite in one part marks all: a weighting's state stays in each
        own_square = own_square + (gram - gram).sum()
    return GradientProducts(gram.view_as(of_tasks), own_square, perturbations, agreed if seen else None)


def _gram(table: GradientTable, device: torch.device, parts: ModelParts | None = None) -> Tensor:
    """The Gram matrix; zeros on the device where there is no gradient, as of a frozen encoder."""
    count, numbers = None, None
    if parts is not None:
        count, numbers = len(parts.names), [parts.numbers[param] for param in table.columns.params]
    if table.present:
        return gram_of(table, numbers, count)
    of_parts = [] if count is None else [count]
    return torch.zeros(*of_parts, table.columns.tasks, table.columns.tasks, dtype=torch.float64, device=device)


def step_numbers(
    losses: Sequence[Losses], products: GradientProducts, weights: Tensor, stats: Tensor, updated: Tensor
) -> dict[Hashable, list[Tensor]]:
    """The numbers of an update that `PendingUpdate` reads back."""
    numbers: dict[Hashable, list[Tensor]] = defaultdict(list)
    for stream in losses:
        by_kind = {"loss": stream.task, "smart": stream.smart, "rdrop": stream.rdrop, "bregman": stream.bregman}
        for kind, by_task in by_kind.items():
            for name, value in by_task.items():
                numbers[kind, name].append(value)
        numbers["smart"].append(stream.smart_term)
        numbers["total"].append(stream.total)
    if len(products.perturbations):
        numbers["perturbation"] = [products.perturbations]
    gram = products.gram if products.gram.dim() == 2 else products.gram.sum(0)  # of the whole model
    return {**numbers, "gram": [gram], "weights": [weights], "stats": [stats], "updated": [updated]}
