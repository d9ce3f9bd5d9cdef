"""ZeRO stage 2 (Rajbhandari et al. 2020) for parameters with one gradient per task.

Every rank has all parameters, in buckets: flat tensors in the order in which a backward completes their gradients. It
owns one of world_size equal shards of each bucket. It gets the sum of all ranks' gradients of its shard (one
reduce-scatter per task, as soon as the bucket's gradient is complete), updates the parameters there and alone keeps
their optimizer state. Then an all-gather gives all ranks the updated parameters, in the precision in which forwards
read them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minbert.distributed.process_group import PendingCollective, ProcessGroup
from minbert.kernels.gradient_table import GradientColumns, GradientTable
from minbert.methods.task_gradients import TaskGradients, coalesced

BUCKET_ELEMENTS = 8 << 20  # 32 MiB of float32
ALIGNMENT = 16  # elements; kernels read fast from parameters that begin at multiples of it
MAX_IN_FLIGHT = 4  # reduce-scatters at once, each with its own memory

OptimizerState = Mapping[Tensor, Mapping[str, Tensor]]  # by parameter


class ParameterShard(NamedTuple):
    """The part of a parameter that lies in this rank's shard of a bucket."""

    param: Tensor
    values: Tensor  # flat; what the optimizer updates
    indices: slice  # in the bucket's shard
    elements: slice  # in the flattened parameter


class Bucket:
    """Parameters in one flat tensor, with `tasks` gradients each.

    Args:
        dtype: of what forwards read, and so of the gradients.

    Attributes:
        flat: the parameters.
        read: what forwards read: `flat` itself, or a copy in `dtype`.
        gradient_dtype: in which gradients are sent.
    """

    def __init__(self, params: Sequence[Tensor], tasks: int, group: ProcessGroup, dtype: torch.dtype) -> None:
        self.params, self.tasks = params, tasks
        self._sizes: list[int] = []  # of each parameter, and of what is free after it
        for param in params:
            self._sizes += [param.numel(), -param.numel() % ALIGNMENT]
        end = sum(self._sizes)
        size = -(-end // (group.world_size * ALIGNMENT)) * ALIGNMENT  # of a shard
        self._sizes[-1] += group.world_size * size - end
        self.flat = params[0].new_zeros(group.world_size * size)
        self.shards = []
        own, first = group.shard(self.flat), group.rank * size
        starts = list(accumulate(self._sizes, initial=0))[:-1:2]
        for param, start, view in zip(params, starts, self.views(self.flat), strict=True):
            view.copy_(param.detach())
            param.data = view
            low, high = max(0, start - first), min(size, start + param.numel() - first)
            if low < high:
                elements = slice(first + low - start, first + high - start)
                self.shards.append(ParameterShard(param, own[low:high].detach(), slice(low, high), elements))
        self.read = self.flat.to(dtype)
        self.gradient_dtype = dtype if group.sends_half_precision else self.flat.dtype

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a tensor like `flat` that belong to each parameter, in its shape."""
        parts = zip(flat.split(self._sizes)[::2], self.params, strict=True)
        return [part.view(param.shape) for part, param in parts]


class ShardedParameters:
    """The trainable parameters of a model, their gradients and optimizer state, sharded over the ranks.

    FSDP with `reshard_after_forward=False` does the same for one gradient per parameter. All ranks call the methods in
    the same order:

        sharded = ShardedParameters(heads, trunk, tasks, group)
        sharded.all_gather_masters()  # all ranks start from the same weights
        sharded.all_gather()
        optimizer = AdamW(sharded.param_groups(groups), copies=sharded.optimizer_copies)
        sharded.register_hooks(gradients)
        while training:
            sharded.reduce_next_backward()  # as DDP does for a backward outside of `no_sync()`
            loss.backward()
            shared, own = sharded.wait_for_gradients()
            ...  # compute weights from `shared`, step the optimizer
            sharded.all_gather()

    Args:
        own: parameters with one gradient, in `.grad`: those of the heads.
        shared: parameters with one gradient per task, in the leaves of the `TaskGradients` of `register_hooks`.
        tasks: number of gradients of a shared parameter.
        copies: by parameter, its half-precision copy, which forwards read.
        table: a shared parameter whose gradients may be sparse: then only their rows are sent. It has its own bucket.

    Attributes:
        copies: those given, which have moved into buckets; an all-gather after each update gives all ranks these, and
            the parameters themselves only when `all_gather_masters` is called.
        optimizer_copies: the copies of this rank's shards, which the optimizer writes.
        gradients: those of `register_hooks`.
        ema: by parameter, its exponential moving average, all-gathered too; empty without `keep_ema`.
    """

    def __init__(
        self,
        own: Sequence[Tensor],
        shared: Sequence[Tensor],
        tasks: int,
        group: ProcessGroup,
        copies: Mapping[Tensor, Tensor] | None = None,
        table: Tensor | None = None,
    ) -> None:
        self.group, self._tasks = group, tasks
        self.gradients: TaskGradients
        dtypes = {param: copy.dtype for param, copy in (copies or {}).items()}
        dense, tables = (
            [param for param in reversed(shared) if (param is table) == wanted] for wanted in (False, True)
        )
        self.buckets = [
            Bucket(bucket, rows, group, dtypes.get(bucket[0], bucket[0].dtype))
            for params, rows in ((own, 1), (dense, tasks), (tables, tasks))
            for bucket in _bucketed(params, dtypes)
        ]
        self.shards = [shard for bucket in self.buckets for shard in bucket.shards]
        self.copies: dict[Tensor, Tensor] = {}
        self.optimizer_copies: dict[Tensor, Tensor] = {}
        self._copied = [bucket for bucket in self.buckets if bucket.read is not bucket.flat]
        for bucket in self._copied:
            self.copies |= dict(zip(bucket.params, bucket.views(bucket.read), strict=True))
            own_copies = group.shard(bucket.read)
            self.optimizer_copies |= {shard.values: own_copies[shard.indices] for shard in bucket.shards}
        self.ema: dict[Tensor, Tensor] = {}
        self._all_gathered = [bucket.read for bucket in self.buckets]
        self._masters_gathered = False
        self._shared = set(shared)
        self._bucket_gradients: list[_BucketGradient] = []
        self._reducing = False

    def param_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """An optimizer's parameter groups, with this rank's shards as parameters; a group may become empty."""
        shards: dict[Tensor, list[Tensor]] = defaultdict(list)
        for shard in self.shards:
            shards[shard.param].append(shard.values)
        return [
            {**group, "params": [values for param in group["params"] for values in shards[param]]} for group in groups
        ]

    def by_shard(self, numbers: Mapping[Tensor, int]) -> Mapping[Tensor, int]:
        """The parameters' numbers, by this rank's part of each (`ParameterShard.values`)."""
        return {shard.values: numbers[shard.param] for shard in self.shards if shard.param in numbers}

    # Gradients ---------------------------------------------------------------------------------------------------

    def register_hooks(self, gradients: TaskGradients) -> None:
        """Register hooks that reduce-scatter a bucket once a backward has accumulated all of its gradients.

        Args:
            gradients: those of the shared parameters; other parameters have theirs in `.grad`.
        """
        self.gradients = gradients
        numbers: dict[Tensor, int] = {param: i for i, param in enumerate(gradients.params)}
        for bucket in self.buckets:
            for task in range(bucket.tasks):
                of_task = gradients.leaves[task * len(numbers) :]
                leaves = [of_task[numbers[param]] if param in numbers else param for param in bucket.params]
                gradient = _BucketGradient(bucket, leaves, task)
                for leaf in leaves:
                    leaf.register_post_accumulate_grad_hook(partial(self._accumulated, gradient))
                self._bucket_gradients.append(gradient)

    def reduce_next_backward(self) -> None:
        """Reduce-scatter gradients during the next backward; those before it only accumulate them."""
        self._reducing = True
        for gradient in self._bucket_gradients:
            gradient.missing = len(gradient.leaves)
        self._incomplete, self._in_flight = deque(self._bucket_gradients), deque[PendingCollective]()

    def wait_for_gradients(self) -> tuple[GradientTable, GradientTable]:
        """Wait until this rank has its shards of the sum of all ranks' gradients.

        A loss reaches a parameter on all ranks or on none, since all compute the same losses.

        Returns:
            the gradients of this rank's parts of the shared parameters (`ParameterShard.values`), None where the task's
            loss does not reach one; and those of all other parts, which are their `.grad` too.
        """
        while self._incomplete:
            self._reduce_scatter(self._incomplete.popleft())
        while self._in_flight:
            self._in_flight.popleft().wait()
        self._reducing = False
        of_shared, of_own = self._columns
        rows: list[list[Tensor | None]] = [[] for _ in range(of_shared.tasks)]
        own: list[Tensor | None] = []
        for gradient in self._bucket_gradients:
            for shard in gradient.bucket.shards:
                grad = gradient.shard[shard.indices] if shard.param in gradient.reached else None
                if shard.param in self._shared:
                    rows[gradient.task].append(grad)
                else:
                    shard.values.grad = grad
                    own.append(grad)
        return GradientTable(of_shared, [grad for row in rows for grad in row]), GradientTable(of_own, own)

    @cached_property
    def _columns(self) -> tuple[GradientColumns, GradientColumns]:
        """This rank's parts of the shared parameters, and all others."""
        shared, own = (
            [shard.values for shard in self.shards if (shard.param in self._shared) == wanted]
            for wanted in (True, False)
        )
        return GradientColumns(shared, self._tasks), GradientColumns(own, 1)

    def _accumulated(self, gradient: _BucketGradient, leaf: Tensor) -> None:
        if self._reducing:
            gradient.missing -= 1
            while self._incomplete and self._incomplete[0].missing == 0:  # in the same order on all ranks
                self._reduce_scatter(self._incomplete.popleft())

    @torch.no_grad()
    def _reduce_scatter(self, gradient: _BucketGradient) -> None:
        if len(self._in_flight) == MAX_IN_FLIGHT:
            self._in_flight.popleft().wait()
        bucket = gradient.bucket
        if (grad := gradient.leaves[0].grad) is not None and grad.is_sparse and len(bucket.params) == 1:
            gradient.leaves[0].grad, gradient.reached = None, {bucket.params[0]}
            size = self.group.shard(bucket.flat).numel()
            gradient.shard, pending = self.group.reduce_scatter_rows(coalesced(grad), size)
            self._in_flight.append(pending)
            return
        grads = {
            param: leaf.grad.to_dense()
            for param, leaf in zip(bucket.params, gradient.leaves, strict=True)
            if leaf.grad is not None
        }
        gradient.reached = set(grads)
        for leaf in gradient.leaves:
            leaf.grad = None
        new = bucket.flat.new_empty if len(grads) == len(bucket.params) else bucket.flat.new_zeros
        flat = new(bucket.flat.shape, dtype=bucket.gradient_dtype)
        if grads:
            views = zip(bucket.params, bucket.views(flat), strict=True)
            torch._foreach_copy_([view for param, view in views if param in grads], list(grads.values()))
        gradient.shard = torch.empty_like(self.group.shard(bucket.flat))
        self._in_flight.append(self.group.reduce_scatter(gradient.shard, flat))

    # Parameters --------------------------------------------------------------------------------------------------

    def all_gather(self) -> None:
        """Give all ranks each rank's shards of what forwards read, and of the EMA if the optimizer keeps it."""
        self._all_gather(self._all_gathered)
        self._masters_gathered = False

    def all_gather_masters(self) -> None:
        """Give all ranks each rank's shards of the parameters that forwards read copies of."""
        if not self._masters_gathered:
            self._all_gather([bucket.flat for bucket in self._copied])
        self._masters_gathered = True

    @torch.no_grad()
    def _all_gather(self, flats: Sequence[Tensor]) -> None:
        for pending in [self.group.all_gather(flat) for flat in flats]:
            pending.wait()

    def keep_ema(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the EMA of all parameters on all ranks, in `ema`; this rank's optimizer updates its shards of it."""
        for bucket in self.buckets:
            flat = bucket.flat.clone()
            self._all_gathered.append(flat)
            self.ema |= dict(zip(bucket.params, bucket.views(flat), strict=True))
            for shard in bucket.shards:
                optimizer.state[shard.values]["average"] = self.group.shard(flat)[shard.indices]

    def bytes_per_update(self, *, ema: bool) -> int:
        """Bytes that this rank sends in reduce-scatters and all-gathers of an update.

        With P shared parameters, H others and T tasks: 4 (T P + P + 2 H) (world_size - 1) / world_size, and
        4 (P + H) (world_size - 1) / world_size more for the EMA; P and H are rounded up to whole shards. Half of it for
        parameters that forwards read in half precision, but for the EMA. Less where gradients are sparse: of those,
        what their rows have.
        """
        total = sum(
            bucket.tasks * bucket.flat.numel() * bucket.gradient_dtype.itemsize + bucket.read.nbytes
            for bucket in self.buckets
        )
        total += sum(bucket.flat.nbytes for bucket in self.buckets) if ema else 0
        return total * (self.group.world_size - 1) // self.group.world_size

    # Optimizer state ---------------------------------------------------------------------------------------------

    def gather_full_state(self, state: OptimizerState) -> dict[Tensor, dict[str, Tensor]]:
        """The full optimizer state, by parameter, from the state of all ranks' shards."""
        full: dict[Tensor, dict[str, Tensor]] = {}
        for bucket in self.buckets:
            numbers = {param: i for i, param in enumerate(bucket.params)}
            own = {
                (numbers[shard.param], name): None if value.ndim else float(value)
                for shard in bucket.shards
                for name, value in state.get(shard.values, {}).items()
            }
            entries: dict[tuple[int, str], float | None] = {}  # by parameter and name; None for tensors
            for of_rank in self.group.all_gather_object(own):
                entries |= of_rank
            for name in sorted({name for _, name in entries}):
                scalars = {i: scalar for (i, other), scalar in entries.items() if other == name}
                flat = torch.zeros_like(bucket.flat) if None in scalars.values() else None
                if flat is not None:
                    for shard in bucket.shards:
                        if name in state.get(shard.values, {}):
                            self.group.shard(flat)[shard.indices] = state[shard.values][name]
                    self.group.all_gather(flat).wait()
                views = [] if flat is None else bucket.views(flat)
                for i, scalar in scalars.items():
                    value = views[i] if scalar is None else torch.tensor(scalar)
                    full.setdefault(bucket.params[i], {})[name] = value
        return full

    def shard_state(self, full: OptimizerState) -> dict[Tensor, dict[str, Tensor]]:
        """This rank's shards of the full optimizer state, by `ParameterShard.values`."""

        return {
            shard.values: {
                name: value.reshape(-1)[shard.elements] if value.ndim else value
                for name, value in full.get(shard.param, {}).items()
            }
            for shard in self.shards
        }


class _BucketGradient:
    """The gradient of a bucket's parameters for one task."""

    def __init__(self, bucket: Bucket, leaves: Sequence[Tensor], task: int) -> None:
        self.bucket, self.task = bucket, task
        self.leaves = leaves  # a backward accumulates into their `.grad`
        self.missing = 0  # leaves whose gradient is not complete
        self.reached: set[Tensor] = set()  # parameters that have a gradient
        self.shard: Tensor  # this rank's, of the sum over the ranks


def _bucketed(params: Sequence[Tensor], dtypes: Mapping[Tensor, torch.dtype]) -> list[list[Tensor]]:
    """Split parameters into buckets of at most `BUCKET_ELEMENTS`, or of one parameter.

    Args:
        params: in the order in which a backward completes their gradients.
        dtypes: of the gradients, where they are not the parameters' own. A bucket has gradients of one dtype.

    Returns:
        the buckets, in the order in which a backward completes them.
    """
    buckets: list[list[Tensor]] = []
    of_dtype: dict[torch.dtype, list[Tensor]] = {}  # the last bucket of each
    room = dict.fromkeys((dtypes.get(param, param.dtype) for param in params), 0)
    for param in params:
        dtype = dtypes.get(param, param.dtype)
        if param.numel() > room[dtype]:
            of_dtype[dtype], room[dtype] = [], BUCKET_ELEMENTS
            buckets.append(of_dtype[dtype])
        of_dtype[dtype].append(param)
        room[dtype] -= param.numel()
    completed = {param: number for number, param in enumerate(params)}
    return sorted(buckets, key=lambda bucket: completed[bucket[-1]])
