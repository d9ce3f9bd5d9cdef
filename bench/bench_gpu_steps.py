"""Whole training steps of BERT-base on a GPU, on 96 sequences of real lengths, against transformers and the peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import roofline
import torch
from batches import DECILES, lengths
from bench_methods import METHODS, ours
from peers import Padded

GOALS = {"plain": 6e-3, "PCGrad": 7e-3, "SMART": None, "SMART + PCGrad": 13e-3}  # seconds on an H100
PEER_METHODS = {"plain": "plain", "PCGrad": "pcgrad", "SMART": "smart", "SMART + PCGrad": "smart_pcgrad"}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
Step = Callable[[], object]


def contenders(
    method: str, sizes: dict[str, int], batch_size: int, device: torch.device
) -> dict[str, Callable[[], Step]]:
    """By name, what builds a step: ours first; transformers' are padded, in bf16 autocast, and compiled too."""
    found: dict[str, Callable[[], Step]] = {
        "minbert": lambda: ours(method, sizes, batch_size, torch.bfloat16, str(device)),
    }
    kinds = [("eager", False), ("sdpa", False)] if importlib.util.find_spec("transformers") else []
    if kinds and method == "plain" and device.type == "cuda":
        kinds.append(("sdpa", True))
        if importlib.util.find_spec("flash_attn"):
            kinds.append(("flash_attention_2", False))
    for attention, compiled in kinds:
        name = f"transformers {attention}{' compiled' if compiled else ''}"
        found[name] = lambda attention=attention, compiled=compiled: getattr(
            Padded(sizes, batch_size, torch.bfloat16, attention, compiled, device), PEER_METHODS[method]
        )
    return found


@pytest.mark.parametrize("method", ["plain", "SMART + PCGrad", "PCGrad", "SMART"])
def test_step(gpu_race, device: torch.device, memory, reach, smoke: bool, method: str) -> None:
    sizes, batch_size = {**(TINY if smoke else BASE), "vocab_size": 200 if smoke else 30522}, 2 if smoke else 32
    case = f"{method} step, {3 * batch_size} sequences, bf16"
    steps = {}
    for name, build in contenders(method, sizes, batch_size, device).items():
        with peak_memory(device, memory.setdefault(case, {}), name):
            steps[name] = build()
            for _ in range(3):
                steps[name]()
    encoder = roofline.Encoder(*sizes.values())
    real = [int(n) for i, task in enumerate(DECILES) for n in lengths(task, batch_size, 100 * i)]
    surgery, weight = METHODS[method]
    parts = roofline.step(encoder, real, rows=len(DECILES) if surgery == "pcgrad" else 1, smart=weight > 0)
    floor = sum(roofline.floor(each, reach) for each in parts.values())
    gpu_race(case, steps, floor=floor, goal=GOALS[method], steps=1 if smoke else 10)


@contextmanager
def peak_memory(device: torch.device, peaks: dict[str, int], name: str) -> Iterator[None]:
    """Bytes of GPU memory that the block took at its peak, and kept alive or not."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    peaks[name] = torch.cuda.max_memory_allocated() - before
