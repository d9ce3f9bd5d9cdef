"""Where no GPU is, Triton's interpreter runs the kernels on CPU tensors: tests/conftest.py chooses it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install -e '.[test]'")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
