"""A process that trains nothing, for the tests of what starts processes."""

from __future__ import annotations


class FakeProcess:
    """A process of one run: its code, and what it prints to standard error."""

    stdout = None

    def __init__(self, end, stderr, send_signal=None):
        self.wait, self.stderr, self.send_signal = end, stderr, send_signal
