"""The processes that train together, and what they say to one another (`torchrun`, torch.distributed).

A single process is a group of one, in which every word here costs nothing.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn  # which binds the group that it finds when imported, and would keep its threads
from torch import Tensor

from minbert.errors import UserError

ROLL_CALL = 2.0  # seconds in which the ranks that are left answer, once one is lost
BEAT = 1.0  # seconds between a rank's signs of life
SILENCE = 10.0  # seconds without one, after which a rank is lost
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # until torch 2.12
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class RankLost(Exception):
    """A rank ended, or was silent for longer than the timeout."""

    def __init__(self, message: str, *, tells: bool) -> None:
        """`tells` says whether this process is the one to say so: that of the first rank that is left."""
        super().__init__(message)
        self.tells = tells

    def saying(self, more: str) -> RankLost:
        """The same, and more words about it."""
        return RankLost(f"{self} {more}", tells=self.tells)


@dataclass
class ProcessGroup:
    """`size` processes, of which this is number `rank`.

    Attributes:
        device: where tensors to be sent are.
        sent: bytes that this rank has sent in collectives of tensors on the device, as ring algorithms send them: of B
            bytes a gather or a reduce-scatter sends B (size - 1) / size, an all-reduce twice that.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sent: int = 0
    _exchanges: int = 0
    _host: Any = None  # a group of the CPUs, for words about the run
    _store: Any = None  # what torchrun keeps for all ranks, whoever is lost

    @classmethod
    @contextmanager
    def joined(cls, device: torch.device, timeout: float) -> Iterator[ProcessGroup]:
        """Join the processes that torchrun started; a process that it did not start is alone.

        A `UserError` within leaves through the first rank that has one; the others exit with code 2 and say nothing.
        After a `RankLost` all exit with code 1, and the first rank that is left says so.

        Args:
            timeout: seconds for which a rank may be silent.

        Raises:
            UserError: the other processes cannot be found.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            yield cls(device=device)
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        group, patience = cls(device=device), timedelta(seconds=timeout)
        try:
            store, group.rank, group.world_size = next(dist.rendezvous("env://", timeout=patience))
            # A restart may meet the same store, with what the processes before it left there.
            group._store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            dist.init_process_group(
                group.backend, store=group._store, rank=group.rank, world_size=group.world_size, timeout=patience
            )
            group._host = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo", timeout=patience)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the {os.environ['WORLD_SIZE']} processes cannot join: {_first_line(error)}") from None
        try:
            with group.beating() if group.backend == "nccl" else nullcontext():
                yield group
        except UserError:
            if group._refused(1) > 1:
                raise SystemExit(2) from None
            raise
        except RankLost as lost:
            code = 2 if group._refused(0) else 1
            if code == 1 and lost.tells:
                sys.stderr.write(f"error: {lost}\n")  # at once: others may be writing too
            if group.backend == "nccl":  # a GPU that waits for the lost rank keeps any farewell waiting too
                sys.stdout.flush()
                os._exit(code)
            raise SystemExit(code) from None
        except KeyboardInterrupt as stopped:
            if group.backend == "nccl":  # likewise: the ranks may not have stopped at the same place
                sys.stdout.flush()
                os._exit(128 + getattr(stopped, "number", signal.SIGINT))
            raise
        finally:
            # gloo's threads end with the last reference to their group; one that outlives the interpreter aborts it
            group._host = None
            dist.destroy_process_group()

    @property
    def backend(self) -> str:
        """What carries tensors on the device."""
        return "gloo" if self.device.type == "cpu" else "nccl"

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    # Tensors on the device ---------------------------------------------------------------------------------------

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in this one's place."""
        if self.world_size > 1:
            self._count(2 * tensor.nbytes)
            with self.watched():
                dist.all_reduce(tensor)
        return tensor

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> Sent:
        """Start to write this rank's part of the sum of all ranks' `whole` [size * n] to `part` [n]."""
        self._count(whole.nbytes)
        if self.backend == "nccl":
            with self.watched():
                return Sent(self, _reduce_scatter(part, whole, async_op=True).wait, whole)
        own, others = self.part(whole), torch.empty_like(whole).chunk(self.world_size)

        def added() -> None:
            so_far = own
            for rank in exchanged:
                so_far = torch.add(so_far, others[rank], out=part)

        exchanged = self._exchanged(whole.chunk(self.world_size), others)
        return Sent(self, added)

    def all_gather(self, whole: Tensor) -> Sent:
        """Start to fill `whole` [size * n] with what each rank has in its own part of it."""
        self._count(whole.nbytes)
        if self.backend == "nccl":
            with self.watched():
                return Sent(self, _all_gather(whole, self.part(whole), async_op=True).wait, whole)
        exchanged = self._exchanged([self.part(whole)] * self.world_size, whole.chunk(self.world_size))
        return Sent(self, lambda: deque(exchanged, maxlen=0))

    def _exchanged(self, to: Sequence[Tensor], source: Sequence[Tensor]) -> Iterator[int]:
        """Start to send each rank its tensor and to receive one from each, and yield the ranks whose tensor is there.

        In place, and quicker than gloo's own collectives.
        """
        self._exchanges += 1
        received: dict[int, Any] = {}
        sent: list[Any] = []
        with self.watched():
            for distance in range(1, self.world_size):
                there, here = (self.rank + distance) % self.world_size, (self.rank - distance) % self.world_size
                received[here] = dist.irecv(source[here], here, tag=self._exchanges)
                sent.append(dist.isend(to[there], there, tag=self._exchanges))

        def arrivals() -> Iterator[int]:
            for rank, work in received.items():
                work.wait()
                yield rank
            for work in sent:
                work.wait()

        return arrivals()

    def part(self, whole: Tensor) -> Tensor:
        """This rank's of `size` equal parts."""
        return whole.chunk(self.world_size)[self.rank]

    def gathered(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """All ranks' rows [n, D], one rank after the other: [sum of counts, D].

        A loss of them is computed by every rank, alike; a sum over the ranks of the gradients of its share of
        1 / size is then the gradient of the loss, in this function's own backward as elsewhere.

        Args:
            counts: rows of each rank.
        """
        return _Gathered.apply(rows, counts, self)  # type: ignore[no-any-return]

    def _count(self, nbytes: int) -> None:
        self.sent += nbytes * (self.world_size - 1) // self.world_size

    # Words about the run -----------------------------------------------------------------------------------------

    def broadcast_object(self, word: Any) -> Any:
        """What the first rank says."""
        words = [word]
        if self.world_size > 1:
            with self.watched():
                dist.broadcast_object_list(words, src=0, group=self._host)
        return words[0]

    def all_gather_object(self, word: Any) -> list[Any]:
        """What every rank says, by rank."""
        words = [word] * self.world_size
        if self.world_size > 1:
            with self.watched():
                dist.all_gather_object(words, word, group=self._host)
        return words

    def all_reduce_max(self, number: int) -> int:
        """The highest of all ranks' numbers."""
        if self.world_size > 1:
            shared = torch.tensor(number)
            with self.watched():
                dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._host)
            number = int(shared)
        return number

    def wait_for(self, event: Any) -> None:
        """Wait for a CUDA event, which NCCL may never let come once a rank is lost.

        Raises:
            RankLost: one gave no sign of life (`beating`) meanwhile, which the rank before it notices and tells all.
        """
        if self.world_size == 1:
            event.synchronize()
            return
        after = (self.rank + 1) % self.world_size
        beat, looked = b"", time.monotonic()
        heard = looked
        while not event.query():
            time.sleep(1e-4)
            if time.monotonic() < looked + BEAT:
                continue
            last, looked = beat, time.monotonic()
            try:
                beat = self._store.get(f"beat/{after}")
                heard = heard if beat == last else looked
                if looked > heard + SILENCE:
                    self._store.set("lost", str(after))
                if not self._store.check(["lost"]):
                    continue
                lost = int(self._store.get("lost"))
            except RuntimeError:
                raise self._loss(None) from None
            raise RankLost(f"rank {lost} was lost", tells=lost == after)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Give signs of life."""
        done = threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # the store is gone with the process that kept it
                while not done.wait(BEAT):
                    self._store.set(f"beat/{self.rank}", str(time.monotonic()))

        self._store.set(f"beat/{self.rank}", "")
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Say which rank was lost, where what is said to them fails.

        Raises:
            RankLost: one was.
        """
        try:
            yield
        except RuntimeError as error:
            raise self._loss(self._absent(), f" ({_first_line(error)})") from error

    def _loss(self, lost: Sequence[int] | None, why: str = "") -> RankLost:
        """What to raise when these ranks were lost; or torchrun, when nobody can say which (None)."""
        if lost is None:  # nor can it be settled who says so
            return RankLost(f"the ranks lost torchrun and one another{why}", tells=True)
        named = " and ".join(f"rank {rank}" for rank in lost)
        message = f"{named} {'was' if len(lost) == 1 else 'were'} lost" if lost else f"the ranks lost one another{why}"
        return RankLost(message, tells=self.rank == min({*range(self.world_size)} - {*lost}))

    def _refused(self, more: int) -> int:
        """How many ranks have refused their input, of which `more` do so now."""
        try:
            return self._store.add("refused", more)  # type: ignore[no-any-return]
        except RuntimeError:  # the store is gone with the process that kept it
            return more

    def _absent(self) -> list[int] | None:
        """The ranks that do not answer a roll-call over torchrun's store, which outlives them; None if it does not."""
        try:
            self._store.set(f"alive/{self.rank}", "1")
            until = time.monotonic() + ROLL_CALL
            silent = [rank for rank in range(self.world_size) if rank != self.rank]
            while silent and time.monotonic() < until:
                time.sleep(0.05)
                silent = [rank for rank in silent if not self._store.check([f"alive/{rank}"])]
        except RuntimeError:  # the store is gone with the process that kept it
            return None
        return silent


@dataclass(frozen=True)
class Share:
    """Which part of a packed stream a rank has.

    Args:
        sequences: how many each rank has.
        first_token, tokens: where this rank's part begins, and tokens of the whole stream.
        bounds: first sequences of each task in the whole stream, and the end of the last (`Packed.sequence_bounds`).
    """

    group: ProcessGroup
    sequences: tuple[int, ...]
    first_token: int
    tokens: int
    bounds: tuple[int, ...] | None = None

    def gathered(self, rows: Tensor) -> Tensor:
        """Vectors of all the stream's sequences, from those of this rank's (`ProcessGroup.gathered`)."""
        return self.group.gathered(rows, self.sequences)


class Sent(NamedTuple):
    """What is on its way between ranks."""

    group: ProcessGroup
    arrive: Callable[[], object]
    kept: Tensor | None = None  # until it is there

    def wait(self) -> None:
        with self.group.watched():
            self.arrive()


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
        most = max(counts)
        ctx.start, ctx.size = sum(counts[: group.rank]), group.world_size
        ctx.end = ctx.start + len(rows)
        whole = rows.new_empty(group.world_size * most, rows.shape[1])
        group.part(whole)[: len(rows)] = rows
        group.all_gather(whole).wait()
        return torch.cat([part[:count] for part, count in zip(whole.split(most), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return d_whole[ctx.start : ctx.end] * ctx.size, None, None


def _first_line(error: Exception) -> str:
    """The first sentence of an error's message, without the line of gloo's source that it begins with."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0]
