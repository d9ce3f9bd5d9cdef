"""Where no GPU is, its tests skip."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _gpu_tests_need_one(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        request.getfixturevalue("cuda")
