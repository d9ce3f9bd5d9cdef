"""SMART and PCGrad against the same with transformers, Pytorch-PCGrad, smart-pytorch and TorchJD: a step's time and
memory. And the time of every regulariser against a plain step's."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from batches import BATCHES
from peers import shape
from steps import METHODS, TORCHJD, WHO, ours, peak_memory, theirs

from minbert.device import resolve_precision

REGULARISERS = ("plain", "r3f", "rdrop", "sift", "vat", "freelb", "smart")  # recipes, all without surgery


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_methods(race, smoke: bool, quick: bool, dtype: torch.dtype) -> None:
    """Each method by minbert and by the peers' algorithms in transformers' eager and SDPA encoders (bf16: autocast)."""
    if not smoke and dtype == torch.bfloat16 and resolve_precision("auto", torch.device("cpu")) != "bf16":
        pytest.skip("this processor multiplies no bf16 matrices: torch would take half a minute for a step")
    sizes, batch_size = shape(smoke), 2 if smoke else 32
    methods = ["plain", "SMART + PCGrad"] if quick and not smoke else list(METHODS)
    own = {f"minbert {method}": ours(method, sizes, batch_size, dtype, batches=BATCHES) for method in methods}
    first = f"minbert {methods[-1]}"
    contenders = {first: own[first], **own}
    name = str(dtype).removeprefix("torch.")
    if importlib.util.find_spec("transformers") is not None:
        attentions = ["eager"] if quick and not smoke else ["eager", "sdpa"]
        if importlib.util.find_spec("torchjd") is not None:
            methods = [*methods, TORCHJD] if smoke or not quick else methods
        for attention in attentions:
            for method in methods:
                step = theirs(method, sizes, batch_size, dtype, attention, BATCHES)
                contenders[f"transformers {attention} {method}"] = step
    race(f"step, 3 x {batch_size} sequences, {name}", contenders)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_regularisers(race, smoke: bool, dtype: torch.dtype) -> None:
    """A step with each regulariser; the ratio is that to the plain step."""
    if not smoke and dtype == torch.bfloat16 and resolve_precision("auto", torch.device("cpu")) != "bf16":
        pytest.skip("this processor multiplies no bf16 matrices")
    sizes, batch_size = shape(smoke), 2 if smoke else 32
    name = str(dtype).removeprefix("torch.")
    race(
        f"regularisers, 3 x {batch_size} sequences, {name}",
        {method: ours(method, sizes, batch_size, dtype, batches=BATCHES) for method in REGULARISERS},
    )


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers, of the extra [bench]")
def test_memory(benchmark, memory: dict[str, dict[str, int]], smoke: bool, quick: bool) -> None:
    sizes, batch_size, steps = shape(smoke), 2 if smoke else 32, 2 if quick else 3
    methods = ["SMART + PCGrad"] if quick else list(METHODS)

    def measure() -> dict[str, int]:
        return {
            f"{who} {method}": peak_memory(make, method, sizes, batch_size, steps=steps)
            for who, make in WHO.items()
            for method in methods
        }

    memory[f"step, 3 x {batch_size} sequences, float32"] = benchmark.pedantic(measure, rounds=1)
