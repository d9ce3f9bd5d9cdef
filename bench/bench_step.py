"""One training step on three tasks (forward, backward, clipping, AdamW) against transformers' padded step."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from batches import joint_batch
from peers import Padded, shape
from steps import ours

from minbert.device import resolve_precision
from minbert.kernels import use_backend

ALONE = "its matrix products alone"

# Whose time an op is, in the profile: the first group that a part of its name belongs to.
GROUPS = {
    "matrix products": ("minbert::linear", "aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn"),
    "attention": ("minbert::attention", "softmax"),
    "dropout + residual + LayerNorm": ("minbert::dropout", "layer_norm"),
    "bias + GELU": ("minbert::bias_gelu", "gelu"),
    "embedding": ("minbert::embedding", "embedding"),
    "optimizer and clipping": ("minbert::adamw", "minbert::combine", "_foreach", "addcdiv", "addcmul", "lerp", "sqrt"),
}


def product_sizes(sizes: dict[str, int], batch_size: int) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of the forward's products: of the last layer, most are of the first tokens alone."""
    bounds = joint_batch(batch_size, sizes["vocab_size"]).cu_seqlens
    tokens, first = int(bounds[-1]), len(bounds) - 1
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    shapes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden))
    layers = [(tokens, *shape) for shape in shapes] * (sizes["num_hidden_layers"] - 1)
    last = [(tokens, hidden, 2 * hidden), (first, hidden, hidden)]
    return [*layers, *last, *((first, *shape) for shape in shapes[1:])]


def product_seconds(sizes: dict[str, int], batch_size: int, dtype: torch.dtype) -> Callable[[], object]:
    """The step's matrix products and nothing else: forward, and backward for inputs and weights."""
    from minbert.kernels import linear

    order = product_sizes(sizes, batch_size)
    made = {
        each: [torch.ones(s, dtype=dtype) for s in ((each[0], each[1]), (each[2], each[1]), (each[0], each[2]))]
        for each in order
    }

    def products() -> None:
        for each in order:
            x, weight, grad = made[each]
            linear(x, weight)
            linear(grad, weight.t())
            F.linear(grad.t(), x.t())  # by BLAS, as in the step

    return products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_step(race, record, smoke: bool, quick: bool, dtype: torch.dtype, profiles) -> None:
    if not smoke and dtype == torch.bfloat16 and resolve_precision("auto", torch.device("cpu")) != "bf16":
        pytest.skip("this processor multiplies no bf16 matrices: torch would take half a minute for a step")
    sizes, batch_size = shape(smoke), 2 if smoke else 32
    step = ours("plain", sizes, batch_size, dtype)
    functions: dict[str, Callable[[], object]] = {
        "minbert": step,
        ALONE: product_seconds(sizes, batch_size, dtype),
    }
    plain = ours("plain", sizes, batch_size, dtype)

    def reference() -> None:
        with use_backend("reference"):
            plain()

    if smoke or not quick:
        functions["minbert, reference backend"] = reference
    if importlib.util.find_spec("transformers") is not None:
        precisions = dict.fromkeys((dtype,) if quick and not smoke else (torch.float32, dtype))
        for precision in precisions:
            name = str(precision).removeprefix("torch.")
            for attention in ("eager", "sdpa"):
                functions[f"transformers {attention} {name}"] = Padded(sizes, batch_size, precision, attention).plain
        if not quick:
            functions[f"transformers sdpa {dtype} compiled"] = Padded(
                sizes, batch_size, dtype, "sdpa", compiled=True
            ).plain
    case = f"plain step, 3 x {batch_size} sequences, {str(dtype).removeprefix('torch.')}"
    operations = 3 * 2 * sum(rows * inputs * outputs for rows, inputs, outputs in product_sizes(sizes, batch_size))
    medians = race(case, functions, operations={ALONE: operations})
    profiles[case] = profile(step)
    inside = profiles[case]["matrix products"]
    name = "its matrix products, in the step"
    record(case, name, inside, inside / medians["minbert"], operations_per_second=operations / inside)


def profile(step: Callable[[], object]) -> dict[str, float]:
    """A step's seconds by component, from torch's profiler (each op's own time, its parts not counted twice)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        step()
    seconds: dict[str, float] = defaultdict(float)
    for event in record.key_averages():
        group = next((g for g, parts in GROUPS.items() if any(part in event.key for part in parts)), "the rest")
        seconds[group] += event.self_cpu_time_total / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
