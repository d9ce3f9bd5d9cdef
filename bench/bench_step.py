"""One training step on three tasks (forward, backward, clipping, AdamW) against transformers' padded step."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from batches import joint_batch
from peers import TASKS, Padded, labels, shape

from minbert.device import resolve_precision
from minbert.kernels import use_backend
from minbert.methods.losses import LOSSES
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.training.optimizer import AdamW

# Whose time an op is, in the profile: the first group that a part of its name belongs to.
GROUPS = {
    "matrix products": ("minbert::linear", "aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn"),
    "attention": ("minbert::attention", "softmax"),
    "dropout + residual + LayerNorm": ("minbert::dropout", "layer_norm"),
    "bias + GELU": ("minbert::bias_gelu", "gelu"),
    "embedding": ("minbert::embedding", "embedding"),
    "optimizer and clipping": ("minbert::adamw", "_foreach", "addcdiv", "addcmul", "lerp", "sqrt"),
}


def our_step(sizes: dict[str, int], batch_size: int, dtype: torch.dtype) -> Callable[[], object]:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(**sizes))
    encoder.compute_dtype = dtype
    model = MultitaskModel(encoder, TASKS)
    optimizer = AdamW(model.parameter_groups(0.01), lr=1e-5)
    packed, targets = joint_batch(batch_size, sizes["vocab_size"]), labels(batch_size)
    counts = {task.name: batch_size for task in TASKS}

    def step() -> None:
        outputs = model(packed, counts)
        torch.stack([LOSSES[task.loss](outputs[task.name], targets[task.name]) for task in TASKS]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def product_seconds(sizes: dict[str, int], batch_size: int, dtype: torch.dtype) -> Callable[[], object]:
    """The step's matrix products and nothing else: forward, and backward for inputs and weights."""
    from minbert.kernels import linear

    rows = int(joint_batch(batch_size, sizes["vocab_size"]).cu_seqlens[-1])
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    layers = []
    for inputs, outputs in ((hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)):
        layers.append([torch.ones(s, dtype=dtype) for s in ((rows, inputs), (outputs, inputs), (rows, outputs))])

    def products() -> None:
        for _ in range(sizes["num_hidden_layers"]):
            for x, weight, grad in layers:
                linear(x, weight)
                linear(grad, weight.t())
                F.linear(grad.t(), x.t())  # by BLAS, as in the step

    return products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_step(race, smoke: bool, dtype: torch.dtype, profiles) -> None:
    if not smoke and dtype == torch.bfloat16 and resolve_precision("auto", torch.device("cpu")) != "bf16":
        pytest.skip("this processor multiplies no bf16 matrices: torch would take half a minute for a step")
    sizes, batch_size = shape(smoke), 2 if smoke else 32
    ours = our_step(sizes, batch_size, dtype)
    functions: dict[str, Callable[[], object]] = {
        "minbert": ours,
        "its matrix products alone": product_seconds(sizes, batch_size, dtype),
    }
    plain = our_step(sizes, batch_size, dtype)

    def reference() -> None:
        with use_backend("reference"):
            plain()

    functions["minbert, reference backend"] = reference
    if importlib.util.find_spec("transformers") is not None:
        precisions = dict.fromkeys((torch.float32, dtype))
        for precision in precisions:
            name = str(precision).removeprefix("torch.")
            for attention in ("eager", "sdpa"):
                functions[f"transformers {attention} {name}"] = Padded(sizes, batch_size, precision, attention).plain
        if not smoke:
            functions[f"transformers sdpa {dtype} compiled"] = Padded(
                sizes, batch_size, dtype, "sdpa", compiled=True
            ).plain
    case = f"plain step, 3 x {batch_size} sequences, {str(dtype).removeprefix('torch.')}"
    race(case, functions)
    profiles[case] = profile(ours)


def profile(step: Callable[[], object]) -> dict[str, float]:
    """A step's seconds by component, from torch's profiler (each op's own time, its parts not counted twice)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        step()
    seconds: dict[str, float] = defaultdict(float)
    for event in record.key_averages():
        group = next((g for g, parts in GROUPS.items() if any(part in event.key for part in parts)), "the rest")
        seconds[group] += event.self_cpu_time_total / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
