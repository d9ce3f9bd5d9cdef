"""Detection of lost ranks, over torchrun's key-value store, which outlives all of them.

Over gloo, torch.distributed detects a lost rank: connections break and collectives time out. It does not name the rank:
`monitored_barrier` uses the same connections, and reports only to rank 0. So the ranks report to the store after a
failure, and those that do not are lost. Over NCCL, torch's watchdog aborts the process once a collective has timed out,
without naming a rank or unwinding Python. So a rank that waits for its GPU checks heartbeats.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

HEARTBEAT_INTERVAL = 1.0  # seconds
LIVENESS_TIMEOUT = 10.0  # seconds without a heartbeat after which a rank is lost
REPORT_TIMEOUT = 2.0  # seconds in which the remaining ranks report to the store after a failure


class RankLost(Exception):
    """A rank ended, or did not respond within the timeout."""

    def __init__(self, message: str, *, prints: bool) -> None:
        """`prints` is true on one of the remaining ranks: the one that prints the message."""
        super().__init__(message)
        self.prints = prints


@dataclass(frozen=True)
class Liveness:
    """The liveness checks of one rank."""

    store: Any = None  # a torch.distributed.Store
    rank: int = 0
    world_size: int = 1

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Send a heartbeat to the store in every `HEARTBEAT_INTERVAL`, from a thread."""
        done = threading.Event()

        def send() -> None:
            with suppress(RuntimeError):  # the process with the store has ended
                while not done.wait(HEARTBEAT_INTERVAL):
                    self.store.set(f"heartbeat/{self.rank}", str(time.monotonic()))

        self.store.set(f"heartbeat/{self.rank}", "")
        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def wait_for(self, event: Any) -> None:
        """Wait for a CUDA event, which may never be reached once a rank is lost. Needs all ranks' `heartbeat`.

        Raises:
            RankLost: a rank's heartbeat stopped. Each rank checks the next one's, and the others read it in the store.
        """
        if self.world_size == 1:
            event.synchronize()
            return
        neighbour = (self.rank + 1) % self.world_size
        heartbeat, checked, changed = b"", time.monotonic(), time.monotonic()
        while not event.query():
            time.sleep(1e-4)
            if time.monotonic() < checked + HEARTBEAT_INTERVAL:
                continue
            previous, checked = heartbeat, time.monotonic()
            try:
                heartbeat = self.store.get(f"heartbeat/{neighbour}")
                changed = changed if heartbeat == previous else checked
                if checked > changed + LIVENESS_TIMEOUT:
                    self.store.set("lost", str(neighbour))
                if not self.store.check(["lost"]):
                    continue
                lost = int(self.store.get("lost"))
            except RuntimeError:
                raise self._rank_lost(None) from None
            raise RankLost(f"rank {lost} was lost", prints=lost == neighbour)

    @contextmanager
    def detect_lost_ranks(self) -> Iterator[None]:
        """Turn the RuntimeError of a failed collective into one that names the lost ranks.

        Raises:
            RankLost: the collective failed.
        """
        try:
            yield
        except RuntimeError as error:
            raise self._rank_lost(self._missing(), f" ({first_sentence(error)})") from error

    def count_input_errors(self, more: int = 0) -> int:
        """Add to the number of ranks that ended with a UserError, and return it."""
        try:
            return self.store.add("refused", more)  # type: ignore[no-any-return]
        except RuntimeError:  # the process with the store has ended
            return more

    def _missing(self) -> list[int] | None:
        """Report to the store, and return the ranks that do not; None if the process with the store has ended too."""
        with suppress(RuntimeError):
            self.store.set(f"alive/{self.rank}", "1")
            deadline, missing = time.monotonic() + REPORT_TIMEOUT, [*range(self.world_size)]
            while missing and time.monotonic() < deadline:
                time.sleep(0.05)
                missing = [rank for rank in missing if not self.store.check([f"alive/{rank}"])]
            return missing
        return None

    def _rank_lost(self, lost: Sequence[int] | None, reason: str = "") -> RankLost:
        """The error for these ranks; None: also torchrun's store was lost, so every rank prints it."""
        if lost is None:
            return RankLost(f"the ranks lost torchrun and one another{reason}", prints=True)
        names = " and ".join(f"rank {rank}" for rank in lost)
        message = (
            f"{names} {'was' if len(lost) == 1 else 'were'} lost" if lost else f"the ranks lost one another{reason}"
        )
        return RankLost(message, prints=self.rank == min({*range(self.world_size)} - {*lost}))


def first_sentence(error: Exception) -> str:
    """The first sentence of an error's message, without gloo's prefix of source file and line."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0]
