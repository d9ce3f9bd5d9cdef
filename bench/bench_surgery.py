"""Gradient surgery on the gradients of T tasks: Gram matrix and weighted sum, against what people use today."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from peers import flattened_pcgrad, seeded
from torch import Tensor

from minbert.kernels import combine, combine_adamw_, gram, reference, surgery_weights
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


def by_layer(shapes: list[tuple[int, ...]], layers: int) -> list[int]:
    """The parts of `bert_shapes` by layer: embeddings, each layer, pooler."""
    each = (len(shapes) - 7) // layers
    return [0] * 5 + [1 + k // each for k in range(each * layers)] + [1 + layers] * 2


def by_module(shapes: list[tuple[int, ...]]) -> list[int]:
    """The parts of `bert_shapes` by module: a matrix and its bias, or a norm's two vectors, but for the tables."""
    return [0] * 3 + [1 + k // 2 for k in range(len(shapes) - 3)]


def part_of(tensors: list[Tensor], parts: list[int], part: int) -> list[Tensor]:
    return [tensor for tensor, number in zip(tensors, parts, strict=True) if number == part]


@pytest.mark.parametrize("with_update", [False, True], ids=["surgery", "update"])
@pytest.mark.parametrize(("hidden", "layers"), [(384, 6), (768, 12)], ids=["22.7M", "110M"])
def test_parts_of_the_model(race, smoke: bool, hidden: int, layers: int, with_update: bool) -> None:
    """Gram matrices and weights, or these and the fused update: of the whole model, and by layer and module."""
    shapes = bert_shapes(64, 2, 1000) if smoke else bert_shapes(hidden, layers, 30522)
    grads = conflicting_gradients(shapes, torch.float32)
    state = [[torch.zeros_like(tensor) for tensor in grads[0]] for _ in range(3)]
    options = {"step": 1, "lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

    def run(parts: list[int] | None, orders: Tensor) -> None:
        weights, stats = surgery_weights(gram(grads, parts), orders=orders, max_norm=1.0)
        if with_update:
            more = {"skip_unless": stats[2], "parts": parts, **options}
            combine_adamw_(state[0], grads, weights, *state[1:], **more)

    layered = by_layer(shapes, 2 if smoke else layers)
    functions: dict[str, Callable[[], object]] = {}
    for name, parts in (("the whole model", None), ("by layer", layered), ("by module", by_module(shapes))):
        count = 1 if parts is None else max(parts) + 1
        orders = torch.stack([torch.randperm(TASKS) for _ in range(count * TASKS)])
        shaped = orders if parts is None else orders.view(count, TASKS, TASKS)
        functions[name if parts is None else f"{name}, {count} parts"] = partial(run, parts, shaped)
    for part, matrix in enumerate(gram(grads, layered)):
        assert torch.equal(matrix, gram([part_of(row, layered, part) for row in grads]))
    elements = sum(tensor.numel() for tensor in grads[0])
    what = "with the update" if with_update else "Gram matrices and weights"
    race(f"PCGrad by parts of the model, {what}, {TASKS} x {elements / 1e6:.1f}M float32", functions)
