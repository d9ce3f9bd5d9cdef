"""Gradient surgery on the gradients of T tasks: Gram matrix and weighted sum, against what people use today."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from peers import flattened_pcgrad, seeded
from torch import Tensor

from minbert.kernels import combine, gram, reference
from minbert.methods.surgery import pcgrad_weights

TASKS = 3


def bert_shapes(hidden: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Shapes of a BERT encoder's parameters (Devlin et al. 2019); 110M elements for (768, 12, 30522)."""
    norm = [(hidden,), (hidden,)]
    embeddings = [(vocabulary, hidden), (512, hidden), (2, hidden), *norm]
    attention = [*[(hidden, hidden), (hidden,)] * 4, *norm]
    feed_forward = [(4 * hidden, hidden), (4 * hidden,), (hidden, 4 * hidden), (hidden,), *norm]
    return [*embeddings, *(attention + feed_forward) * layers, (hidden, hidden), (hidden,)]


def conflicting_gradients(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[list[Tensor]]:
    """Random gradients, each opposed to the one before: every projection of PCGrad has work to do."""
    generator = torch.Generator().manual_seed(0)
    grads: list[list[Tensor]] = []
    for task in range(TASKS):
        row = [torch.randn(shape, generator=generator) for shape in shapes]
        if task:
            row = [new - 0.5 * old for new, old in zip(row, grads[-1], strict=True)]
        grads.append(row)
    return [[tensor.to(dtype) for tensor in row] for row in grads]


def torchjd_pcgrad(grads: list[list[Tensor]]) -> Callable[[], object] | None:
    """TorchJD's PCGrad on its own data structure, the Jacobian, which is not timed; None where it is not installed."""
    if importlib.util.find_spec("torchjd") is None:
        return None
    from torchjd.aggregation import PCGrad

    jacobian, aggregate = torch.stack([torch.cat([tensor.flatten() for tensor in row]) for row in grads]), PCGrad()
    return lambda: aggregate(jacobian)


def check_that_all_agree() -> None:
    """On small data: over 110M elements, Pytorch-PCGrad's float32 products are themselves off in the first digits."""
    grads = conflicting_gradients(bert_shapes(64, 2, 1000), torch.float32)
    mine = combine(grads, pcgrad_weights(gram(grads), seeded()))
    torch.testing.assert_close(mine, flattened_pcgrad(grads, seeded()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_pcgrad(race, smoke: bool, dtype: torch.dtype) -> None:
    shapes = bert_shapes(64, 2, 1000) if smoke else bert_shapes(768, 12, 30522)
    grads = conflicting_gradients(shapes, dtype)
    out = [torch.zeros_like(tensor) for tensor in grads[0]]
    elements = sum(tensor.numel() for tensor in out)
    source, target = (torch.zeros(elements, dtype=dtype) for _ in range(2))
    weights = pcgrad_weights(gram(grads))

    def ours() -> list[Tensor | None]:
        return combine(grads, pcgrad_weights(gram(grads)), out)

    check_that_all_agree()
    functions: dict[str, Callable[[], object]] = {
        "minbert gram + combine": ours,
        "minbert gram": lambda: gram(grads),
        "minbert combine": lambda: combine(grads, weights, out),
        "copy": lambda: target.copy_(source),
        "Pytorch-PCGrad's algorithm": lambda: flattened_pcgrad(grads),
        "reference": lambda: reference.combine(grads, pcgrad_weights(reference.gram(grads))),
    }
    peer = torchjd_pcgrad(grads)
    if peer is not None:
        functions["TorchJD PCGrad"] = peer
    size = elements * dtype.itemsize
    moved = {
        "minbert gram + combine": (2 * TASKS + 1) * size,
        "minbert gram": TASKS * size,
        "minbert combine": (TASKS + 1) * size,
        "copy": 2 * size,
    }
    race(f"PCGrad, {TASKS} x {elements / 1e6:.1f}M {str(dtype).removeprefix('torch.')}", functions, moved)
