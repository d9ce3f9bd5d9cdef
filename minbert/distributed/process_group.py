"""The processes of a run (`torchrun`, torch.distributed). A single process is a group of one, without communication."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn  # which binds the group that it finds when imported, and would keep its threads
from torch import Tensor

from minbert.distributed import collectives
from minbert.distributed.liveness import Liveness, RankLost, first_sentence
from minbert.errors import UserError

_groups = itertools.count()  # those that this process joined


@dataclass
class ProcessGroup:
    """`world_size` processes, of which this is number `rank`.

    All ranks call its methods, in the same order. If one ends or does not respond, they raise a RankLost on the others.

    Attributes:
        device: where the tensors of collectives are.
        one_machine: whether all ranks are on one.
        bytes_sent: by this rank, in collectives of tensors on the device, as ring algorithms send them: of B bytes an
            all-gather or a reduce-scatter sends B (world_size - 1) / world_size, an all-reduce twice that.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bytes_sent: int = 0
    liveness: Liveness = field(default_factory=Liveness)
    one_machine: bool = True
    _collectives: int = 0  # those started so far
    _host: Any = None  # a gloo group, for objects and numbers

    @classmethod
    @contextmanager
    def join(cls, device: torch.device, timeout: float) -> Iterator[ProcessGroup]:
        """Join the processes that torchrun started; a process that it did not start is a group of one.

        A `UserError` within is raised on the first rank that has one; the others exit with code 2 and print nothing.
        After a `RankLost` all exit with code 1, and one of the remaining ranks prints it.

        Args:
            timeout: seconds within which a rank has to respond.

        Raises:
            UserError: the other processes cannot be found.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            yield cls(device=device)
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        group = cls(device=device)
        group._initialize(timedelta(seconds=timeout))
        try:
            with group.liveness.heartbeat() if group.backend == "nccl" else nullcontext():
                yield group
        except UserError:
            if group.liveness.count_input_errors(1) > 1:
                raise SystemExit(2) from None
            raise
        except RankLost as lost:
            code = 2 if group.liveness.count_input_errors() else 1
            if code == 1 and lost.prints:
                sys.stderr.write(f"error: {lost}\n")  # in one write: other processes may write too
            group._exit_with_nccl(code)
            raise SystemExit(code) from None
        except KeyboardInterrupt as interrupt:  # the ranks may have stopped at different steps
            group._exit_with_nccl(128 + getattr(interrupt, "number", signal.SIGINT))
            raise
        finally:
            # gloo's threads end with the last reference to their group; one that outlives the interpreter aborts it
            group._host = None
            dist.destroy_process_group()

    def _initialize(self, timeout: timedelta) -> None:
        try:
            store, self.rank, self.world_size = next(dist.rendezvous("env://", timeout=timeout))
            self.one_machine = os.environ.get("LOCAL_WORLD_SIZE", str(self.world_size)) == str(self.world_size)
            # After a restart, and for a further group, the store may be the same, with the keys of those before.
            start = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}, group {next(_groups)}"
            store = dist.PrefixStore(start, store)
            self.liveness = Liveness(store, self.rank, self.world_size)
            dist.init_process_group(
                self.backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout
            )
            self._host = dist.group.WORLD if self.backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        except (RuntimeError, ValueError) as error:
            message = f"the {os.environ['WORLD_SIZE']} processes cannot join: {first_sentence(error)}"
            raise UserError(message) from None

    def _exit_with_nccl(self, code: int) -> None:
        """Exit at once over NCCL, which cannot be shut down while a GPU waits for a rank that does not respond."""
        if self.backend == "nccl":
            sys.stdout.flush()
            os._exit(code)

    @property
    def backend(self) -> str:
        """torch.distributed's, for tensors on the device."""
        return "gloo" if self.device.type == "cpu" else "nccl"

    @property
    def sends_half_precision(self) -> bool:
        """Whether gradients in half precision are sent as they are, and summed in float32 by the rank that gets them.

        Not over NCCL on several machines. A sum on the way crosses the network between two machines once, and the
        shards of every rank cross it by themselves.
        """
        return self.backend == "gloo" or self.one_machine

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    # Tensors on the device ---------------------------------------------------------------------------------------

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by the sum of all ranks' tensors."""
        self._count(2 * tensor.nbytes)
        self._call(dist.all_reduce, tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on all ranks."""
        return self.all_reduce_sum(tensor if self.is_main else torch.zeros_like(tensor))

    def reduce_scatter(self, output: Tensor, input: Tensor) -> PendingCollective:
        """Start to write this rank's shard of the sum of all ranks' `input` [world_size * n] to `output` [n].

        The sum has `output`'s precision: float32 sums of bfloat16 inputs are not rounded on the way.
        """
        return self._start(collectives.reduce_scatter, output, input, full=input)

    def reduce_scatter_rows(self, matrix: Tensor, size: int) -> tuple[Tensor, PendingCollective]:
        """Start to write this rank's shard [size] of the sum of all ranks' sparse matrices; over gloo.

        Args:
            matrix: coalesced, with one sparse dimension and one dense.

        Returns:
            the shard of the flattened sum, a dense tensor.
        """
        self._collectives += 3
        tags = range(self._collectives - 2, self._collectives + 1)
        with self.liveness.detect_lost_ranks():
            shard, wait, nbytes = collectives.reduce_scatter_rows(matrix, size, tags)
        self.bytes_sent += nbytes
        return shard, PendingCollective(self.liveness, wait, matrix)

    def all_gather(self, full: Tensor) -> PendingCollective:
        """Start to fill `full` [world_size * n], which has this rank's shard, with the other ranks' shards."""
        return self._start(collectives.all_gather, full, self.shard(full), full=full)

    def shard(self, full: Tensor) -> Tensor:
        """This rank's shard [n] of a tensor [world_size * n]."""
        return full.chunk(self.world_size)[self.rank]

    def _start(self, collective: Callable[..., collectives.Wait], *tensors: Tensor, full: Tensor) -> PendingCollective:
        self._count(full.nbytes)
        self._collectives += 1
        with self.liveness.detect_lost_ranks():
            return PendingCollective(self.liveness, collective(*tensors, self.backend, self._collectives), full)

    def _count(self, nbytes: int) -> None:
        self.bytes_sent += nbytes * (self.world_size - 1) // self.world_size

    # Objects and numbers -----------------------------------------------------------------------------------------

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value."""
        values = [value]
        self._call(dist.broadcast_object_list, values, src=0, group=self._host)
        return values[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values = [value] * self.world_size
        self._call(dist.all_gather_object, values, value, group=self._host)
        return values

    def all_reduce_max(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return self.start_all_reduce_max(number)()

    def start_all_reduce_max(self, number: int) -> Callable[[], int]:
        """Start to find the largest of all ranks' numbers; what is returned waits for it."""
        if self.world_size == 1:
            return lambda: number
        largest = torch.tensor(number)
        with self.liveness.detect_lost_ranks():
            started = dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._host, async_op=True)

        def wait() -> int:
            with self.liveness.detect_lost_ranks():
                started.wait()
            return int(largest)

        return wait

    def _call(self, collective: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        if self.world_size > 1:
            with self.liveness.detect_lost_ranks():
                collective(*args, **kwargs)


class PendingCollective(NamedTuple):
    """A collective that has been started."""

    liveness: Liveness
    finish: collectives.Wait
    tensor: Tensor  # keeps its memory until then

    def wait(self) -> None:
        with self.liveness.detect_lost_ranks():
            self.finish()
