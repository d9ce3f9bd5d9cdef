"""The batches of a training step: its examples in packed streams, with labels, seeds and regularisers' weights.

All of it happens on the host; a batch is copied to the device as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minbert.data import Encoded, Plan, TaskSampler, pack_batches
from minbert.data.buckets import Buckets
from minbert.data.packing import Packed
from minbert.distributed.batch_shards import BatchShard, shard_examples
from minbert.distributed.process_group import ProcessGroup
from minbert.methods.rdrop import RDropConfig
from minbert.methods.smart import SmartConfig
from minbert.seeds import derive_seed
from minbert.tasks import Task
from minbert.training.host_device_copy import copy_to_device

Examples = Sequence[tuple[Task, np.ndarray]]  # tasks, and the indices of their examples


@dataclass(frozen=True)
class StepSampler:
    """Samples the examples of a step, as a function of its number.

    Args:
        plan: the tasks that take each step.
        samplers: the batches of each task.
        tasks: in the order of the stream.
        accumulate: batches of a task in one step.
    """

    plan: Plan
    samplers: Mapping[str, TaskSampler]
    tasks: Sequence[Task]
    accumulate: int

    def __call__(self, step: int) -> list[Examples]:
        """The examples of each batch of step `step` (from 0): of the tasks that take it."""
        turns = self.plan.at(step)
        return [
            [
                (task, self.samplers[task.name].batch(turns[task.name] * self.accumulate + number))
                for task in self.tasks
                if task.name in turns
            ]
            for number in range(self.accumulate)
        ]


@dataclass(frozen=True)
class SmartPart:
    """Consecutive tasks of a batch that have a regulariser, SMART's or R-Drop's: what goes through its passes."""

    packed: Packed  # their sequences
    tasks: tuple[str, ...]
    first_token: int  # of theirs in the batch

    def rows_of(self, x: Tensor) -> Tensor:
        """The part's rows of an activation [N, D] of the batch."""
        return x[self.first_token : self.first_token + len(self.packed.token_ids)]

    def seed_of(self, seed: Tensor) -> Tensor:
        """A seed of the batch, int64 [2], at the part's first row: its rows draw what they draw in the batch."""
        return torch.cat((seed[:1], seed[1:] + self.first_token)) if self.first_token else seed


@dataclass(frozen=True)
class Batch:
    """Sequences of one or several tasks, task after task in one stream, and what else differs from step to step."""

    packed: Packed  # of several ranks, this one's shard of the stream
    labels: Mapping[str, Tensor]  # by task, in the stream's order, all ranks' of them
    # The seeds of dropout, of dropout in further passes with masks of their own and of the noise, each with the
    # stream's index of the first row here. int64 [3, 2].
    seeds: Tensor
    smart_weights: Tensor  # float32 [tasks]: lambda_s of each
    shard: BatchShard | None = None
    smart_parts: tuple[SmartPart, ...] = ()
    rdrop_parts: tuple[SmartPart, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Each task's number of examples."""
        return {name: len(labels) for name, labels in self.labels.items()}

    @property
    def sequence_bounds(self) -> tuple[int, ...] | None:
        """`Packed.sequence_bounds` of the stream of all ranks."""
        return self.shard.bounds if self.shard else self.packed.sequence_bounds

    @property
    def of_all_ranks(self) -> dict[str, Any]:
        """The arguments of `MultitaskModel.from_embedded` for a shard: how all ranks' pooled vectors are gathered."""
        return {"all_gather": self.shard.all_gather, "bounds": self.shard.bounds} if self.shard else {}

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of `with_tensors`."""
        parts = [
            tensor
            for part in (*self.smart_parts, *self.rdrop_parts)
            if part.packed is not self.packed
            for tensor in part.packed.tensors
        ]
        return [*self.packed.tensors, *parts, *self.labels.values(), self.seeds, self.smart_weights]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Batch:
        """The same batch in other memory, such as another device's."""
        *rest, seeds, smart_weights = tensors
        cut, at = len(rest) - len(self.labels), len(self.packed.tensors)
        labels, packed, parts = dict(zip(self.labels, rest[cut:], strict=True)), self.packed.with_tensors(rest[:at]), []
        for part in (*self.smart_parts, *self.rdrop_parts):
            of_part = packed
            if part.packed is not self.packed:
                end = at + len(part.packed.tensors)
                of_part, at = part.packed.with_tensors(rest[at:end]), end
            parts.append(replace(part, packed=of_part))
        of_smart = len(self.smart_parts)
        smart_parts, rdrop_parts = tuple(parts[:of_smart]), tuple(parts[of_smart:])
        return Batch(packed, labels, seeds, smart_weights, self.shard, smart_parts, rdrop_parts)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, copied without waiting for the copy to end."""
        return self.with_tensors(copy_to_device(self.tensors, device))


@dataclass(frozen=True)
class Stream:
    """Examples that go through the model together.

    Args:
        row: the only row of task gradients that they add to; None where they add to all.
    """

    row: int | None
    examples: Examples
    seed: int


@dataclass(frozen=True)
class Batches:
    """Makes batches of the examples that were sampled for a step.

    Args:
        data: by task, its training examples.
        task_groups: the tasks that share a gradient, in the order of the gradients' rows.
        per_task: whether each group has a row of gradients; else one row is of all tasks.
        smart: decides the weights of SMART's regularisers.
        seed: of the run; dropout and noise follow it.
        low_memory: whether each group goes through the model alone, rather than all in one stream.
        buckets: pad streams to few shapes, for CUDA graphs.
        group: the ranks, each of which computes a shard of every stream, of about as many tokens.
        rdrop: decides which tasks have R-Drop.
    """

    data: Mapping[str, Encoded]
    task_groups: Sequence[Sequence[Task]]
    per_task: bool
    smart: SmartConfig
    seed: int
    low_memory: bool = False
    buckets: Buckets | None = None
    group: ProcessGroup = field(default_factory=ProcessGroup)
    rdrop: RDropConfig = field(default_factory=RDropConfig)

    @property
    def names(self) -> list[str]:
        """The names of the rows of task gradients; none where one row is of all tasks."""
        return ["+".join(task.name for task in tasks) for tasks in self.task_groups] if self.per_task else []

    def streams(self, sampled: Sequence[Examples], step: int, update: int) -> list[Stream]:
        """The streams of an update: one for each of the accumulated batches; with low memory, one for each group."""
        return [
            Stream(row, examples, derive_seed(self.seed, "step", step, update, number, stream))
            for number, batch in enumerate(sampled)
            for stream, (row, examples) in enumerate(self._divide(batch))
        ]

    def _divide(self, batch: Examples) -> Iterator[tuple[int | None, Examples]]:
        if not self.low_memory:
            yield None, batch
            return
        for row, tasks in enumerate(self.task_groups):
            if examples := [of_task for of_task in batch if of_task[0] in tasks]:
                yield row if self.per_task else 0, examples

    def pack(self, stream: Stream, progress: float = 1.0) -> Batch:
        """Pack a stream, or this rank's shard of it, on the CPU.

        Args:
            progress: share of the run's steps that are done, from 0 to 1.

        Raises:
            UserError: there are fewer examples than ranks.
        """
        own, shard = stream.examples, None
        if self.group.world_size > 1:
            own, shard = self._shard(own)
        by_row, pad = self.per_task and stream.row is None, None
        if self.buckets is not None:
            tasks, segments = [task.name for task, _ in own], self._segments(own, by_row)
            pad = partial(self.buckets.pad, tasks=tasks, segments=segments)
        packed = pack_batches([(self.data[task.name], indices) for task, indices in own], pad)
        if by_row:
            packed = packed.by_task(self._sequences(own, packed.padding))
            if shard is not None:
                shard = replace(shard, bounds=(0, *accumulate(self._sequences(stream.examples))))
        labels = {name: torch.from_numpy(values) for name, values in self._labels(stream.examples)}
        batch = make_batch(packed, labels, self.smart, self.rdrop, seed=stream.seed, progress=progress, shard=shard)
        divisible = self.group.world_size == 1
        if divisible and len(set(map(self.smart.applies_to, labels))) > 1:
            batch = replace(batch, smart_parts=tuple(self._parts(batch, own, self.smart.applies_to)))
        if divisible and len(set(map(self.rdrop.applies_to, labels))) > 1:
            batch = replace(batch, rdrop_parts=tuple(self._parts(batch, own, self.rdrop.applies_to)))
        return batch

    def _parts(self, batch: Batch, examples: Examples, applies_to: Callable[[str], bool]) -> Iterator[SmartPart]:
        """The runs of tasks with a regulariser."""
        packed = batch.packed
        sizes = [len(indices) * self.data[task.name].width + packed.padding for task, indices in examples]
        starts = dict(zip(batch.counts, pairwise(accumulate(sizes, initial=0)), strict=True))
        for applies, run in groupby(batch.counts, applies_to):
            if applies:
                tasks = tuple(run)
                start, end = starts[tasks[0]][0], starts[tasks[-1]][1]
                yield SmartPart(packed.part(start, end), tasks, int(packed.cu_seqlens[start]))

    def _segments(self, examples: Examples, by_row: bool) -> list[int]:
        """The numbers of tasks in runs that have the same row of gradients and the same regularisers."""
        rows = {task.name: row for row, tasks in enumerate(self.task_groups) for task in tasks}
        kinds = [
            (by_row and rows[task.name], self.smart.applies_to(task.name), self.rdrop.applies_to(task.name))
            for task, _ in examples
        ]
        return [len(list(run)) for _, run in groupby(kinds)]

    def _labels(self, examples: Examples) -> Iterator[tuple[str, np.ndarray]]:
        for task, indices in examples:
            labels = self.data[task.name].labels
            assert labels is not None  # training data has labels
            yield task.name, labels[indices]

    def _sequences(self, examples: Examples, padding: int = 0) -> list[int]:
        """The number of sequences of each group of tasks in a stream."""
        sizes = {task.name: len(indices) * self.data[task.name].width + padding for task, indices in examples}
        return [sum(sizes.get(task.name, 0) for task in tasks) for tasks in self.task_groups]

    def _shard(self, examples: Examples) -> tuple[Examples, BatchShard]:
        data = [self.data[task.name] for task, _ in examples]
        lengths = [of.lengths[indices] for of, (_, indices) in zip(data, examples, strict=True)]
        slices, shard = shard_examples(lengths, [of.width for of in data], self.group)
        own = [(task, indices[part]) for (task, indices), part in zip(examples, slices, strict=True)]
        return [(task, indices) for task, indices in own if len(indices)], shard


def make_batch(
    packed: Packed,
    labels: Mapping[str, Tensor],
    smart: SmartConfig,
    rdrop: RDropConfig | None = None,
    *,
    seed: int,
    progress: float = 1.0,
    shard: BatchShard | None = None,
) -> Batch:
    """A batch of CPU tensors, whose dropout and noise follow `seed`."""
    first_row = shard.first_token if shard else 0
    seeds = [(derive_seed(seed, name), first_row) for name in ("dropout", "smart dropout", "smart noise")]
    weights = [smart.weight(name, progress) for name in labels]
    whole = (SmartPart(packed, tuple(labels), 0),)
    smart_parts, rdrop_parts = (
        whole if config is not None and any(map(config.applies_to, labels)) else () for config in (smart, rdrop)
    )
    smart_weights = torch.tensor(weights, dtype=torch.float32)
    return Batch(packed, labels, torch.tensor(seeds), smart_weights, shard, smart_parts, rdrop_parts)
