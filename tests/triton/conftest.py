"""Where no GPU is, Triton's interpreter runs the kernels on CPU tensors. It is chosen before triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="the Triton kernels need triton: pip install -e '.[test]'")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
