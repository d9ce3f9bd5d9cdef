"""The prediction for several GPUs counts the bytes of docs/scaling.md's formula, and no step beats one GPU's floor."""

from __future__ import annotations

import pytest
import torch
from several_gpus import GPUS_OF_MACHINE, RING, TASKS, seconds, sent

from minbert.model import Encoder, EncoderConfig


def test_bytes_and_times() -> None:
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig())
    encoder.compute_dtype = torch.bfloat16
    matrices = sum(weight.numel() for weight in encoder.cast_weights())
    others = sum(param.numel() for param in encoder.parameters()) - matrices
    for gpus in RING:
        of_gradient = 2 if gpus <= GPUS_OF_MACHINE else 4  # bytes
        expected = (TASKS * of_gradient + 2) * matrices + 4 * (TASKS + 1) * others
        assert sent(gpus).bytes == pytest.approx(expected * (gpus - 1) / gpus, rel=2e-3)
        sending, rings, plain, overlapped = seconds(gpus)
        assert 0 < plain - sending - rings < overlapped < plain
