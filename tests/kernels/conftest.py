"""What the tests of the ops share: the instruction sets of this machine, and a record of the ops that ran."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minbert.kernels import native, set_backend


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """Give every test the usual backend, instruction set and thread count, and restore them."""
    threads, isa = torch.get_num_threads(), native.isa()
    yield
    torch.set_num_threads(threads)
    set_backend("auto")
    if isa is not None:
        native.library().set_isa(isa)


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set in turn; those this processor lacks, or MINBERT_ISA rules out, are skipped."""
    if not native.available():
        pytest.skip(native.missing_reason())
    library = native.library()
    if request.param not in library.isas():
        pytest.skip(f"this processor has no {request.param}")
    if os.environ.get("MINBERT_ISA", request.param) not in ("", request.param):
        pytest.skip(f"MINBERT_ISA is {os.environ['MINBERT_ISA']}")
    library.set_isa(request.param)
    assert native.isa() == request.param
    return request.param


@pytest.fixture
def needs_native() -> None:
    if not native.available():
        pytest.skip(native.missing_reason())


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def record() -> Callable[[], AbstractContextManager[list[str]]]:
    """`with record() as ops`: the names of all torch ops called inside, minbert's native ones among them."""

    @contextmanager
    def recording() -> Iterator[list[str]]:
        with _Record() as mode:
            yield mode.ops

    return recording
