"""A record of the native ops that ran."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from minbert.kernels import native


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "minbert":
            self.ops.append(func.name().removeprefix("minbert::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def native_ops() -> Iterator[list[str]]:
    """The names of minbert's native ops that the test has run so far; the test is skipped where there are none."""
    if not native.available():
        pytest.skip(native.missing_reason())
    with _Record() as mode:
        yield mode.ops
