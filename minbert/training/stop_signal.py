"""SIGINT and SIGTERM while a run goes on: stop at once, or after the step at hand where something is to be saved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ONE_STOP_SECONDS = 1.0  # signals this close together are one: the terminal and the process that began this one send it


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM stopped the run. What it has saved is whole."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignal:
    """Raises `Stopped` when SIGINT or SIGTERM comes; within `deferred` it notes the first one instead.

    What follows the first one within a second is the same stop.

    Only Python's main thread can handle signals: in another one this does nothing, and the program's own handlers stay.

    Attributes:
        number: of the signal that came; 0 while none did.
    """

    def __init__(self) -> None:
        self.number = 0
        self._deferred = False
        self._came = 0.0  # when the first one did
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # None: not Python's, so it cannot be put back
                signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def deferred(self, wait: bool = True) -> Iterator[None]:
        """Whether the first signal waits in this block until someone looks at `number`; a second one never does.

        Raises:
            Stopped: a signal came before, and is not to wait here.
        """
        before, self._deferred = self._deferred, wait
        try:
            if self.number and not wait:
                raise Stopped(self.number)
            yield
        finally:
            self._deferred = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self._came = now
        elif now - self._came < ONE_STOP_SECONDS:
            return
        waits = self._deferred and not self.number
        self.number = number
        if not waits:
            raise Stopped(number)
