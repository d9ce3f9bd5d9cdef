"""A machine with GPUs, as far as torch tells of them, where there is none."""

from __future__ import annotations

import pytest
import torch

from minbert import device
from minbert.kernels import dispatch

NAME = "Tesla T4"


def pretend(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """GPUs of these compute capabilities, and no torchrun."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index or 0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    forget()


def forget() -> None:
    """What is kept of the devices that were asked for."""
    for cached in (dispatch.too_old, device._warn_once):
        cached.cache_clear()
