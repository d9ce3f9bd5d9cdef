"""A whole update of T tasks: Gram matrix, PCGrad's weights, clipping, sum and AdamW, against what people use today."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from bench_surgery import TASKS, bert_shapes, conflicting_gradients
from peers import flattened_pcgrad, seeded
from torch import Tensor

from minbert.kernels import adamw_, clip_weights, combine_adamw_, gram, join_float32, reference, split_float32
from minbert.methods.surgery import pcgrad_weights

OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MAX_NORM = 1.0
SHAPES = {
    "smoke": (64, 2, 1000),
    "small": (384, 6, 30522),  # 22.7M
    "base": (768, 12, 30522),  # 110M: 15 GB, most of them the peers'
}


@pytest.fixture
def shapes(smoke: bool) -> list[tuple[int, ...]]:
    """Those of a BERT encoder; MINBERT_BENCH_UPDATE=base for the 110M."""
    return bert_shapes(*SHAPES["smoke" if smoke else os.environ.get("MINBERT_BENCH_UPDATE", "small")])


class Ours:
    """Parameters and moments, and minbert's ways to update them."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.params = [torch.randn(shape, generator=generator) for shape in shapes]
        self.moments = [[torch.zeros(shape) for shape in shapes] for _ in range(2)]

    def update(self, grads: list[list[Tensor]], ops=(gram, combine_adamw_)) -> None:
        matrix, step = ops[0](grads), ops[1]
        weights, _ = clip_weights(matrix, pcgrad_weights(matrix, seeded()), MAX_NORM)
        step(self.params, grads, weights, *self.moments, step=1, **OPTIONS)

    def adamw(self, grads: list[Tensor]) -> None:
        adamw_(self.params, grads, *self.moments, step=1, **OPTIONS)


class Peer:
    """Pytorch-PCGrad's algorithm, torch's clipping and its fused AdamW, on copies of the parameters."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = [param.clone().requires_grad_() for param in params]
        self.optimizer = torch.optim.AdamW(self.params, fused=True, **OPTIONS)

    def update(self, grads: list[list[Tensor]]) -> None:
        for param, grad in zip(self.params, flattened_pcgrad(grads, seeded()), strict=True):
            param.grad = grad.to(param.dtype)
        torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()

    def adamw(self) -> None:
        self.optimizer.step()


def check_that_both_agree() -> None:
    shapes = bert_shapes(64, 2, 1000)
    grads, ours = conflicting_gradients(shapes, torch.float32), Ours(shapes)
    theirs = Peer(ours.params)
    ours.update(grads)
    theirs.update(grads)
    # the first step of AdamW divides a gradient by its own size: where it is near 0, rounding decides its sign
    torch.testing.assert_close(ours.params, [p.detach() for p in theirs.params], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_pcgrad_update(race, shapes, dtype: torch.dtype) -> None:
    check_that_both_agree()
    grads, ours = conflicting_gradients(shapes, dtype), Ours(shapes)
    elements = sum(tensor.numel() for tensor in ours.params)
    weights = pcgrad_weights(gram(grads))
    theirs = Peer(ours.params)
    source, target = torch.zeros(elements), torch.zeros(elements)
    functions = {
        "minbert gram + clip + combine_adamw_": lambda: ours.update(grads),
        "minbert combine_adamw_": lambda: combine_adamw_(ours.params, grads, weights, *ours.moments, step=1, **OPTIONS),
        "copy": lambda: target.copy_(source),
        "Pytorch-PCGrad + clip + fused AdamW": lambda: theirs.update(grads),
        "reference": lambda: ours.update(grads, (reference.gram, reference.combine_adamw_)),
    }
    state, row = 6 * 4 * elements, TASKS * dtype.itemsize * elements
    moved = {
        "minbert gram + clip + combine_adamw_": 2 * row + state,
        "minbert combine_adamw_": row + state,
        "copy": 8 * elements,
    }
    race(f"update, {TASKS} x {elements / 1e6:.1f}M {str(dtype).removeprefix('torch.')}", functions, moved)


def in_rows(grads: list[list[Tensor]], words: int) -> list[list[Tensor]]:
    """The same with sparse gradients of the first tensor, the word table: of `words` rows for each task."""
    sparse = []
    for task, (table, *others) in enumerate(grads):
        rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(task))[:words].sort().values
        values = table[rows]
        of_task = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=False, is_coalesced=True)
        sparse.append([of_task, *others])
    return sparse


def test_sparse_update(race, shapes) -> None:
    """The word table's gradients as rows of 1,000 words for each task, as of 32 sentences, and as dense tensors."""
    sparse = in_rows(conflicting_gradients(shapes, torch.float32), min(1000, shapes[0][0] // 2))
    dense = [[grad.to_dense() for grad in row] for row in sparse]
    ours, other = Ours(shapes), Ours(shapes)
    ours.update(sparse)
    other.update(dense)
    torch.testing.assert_close(ours.params, other.params)
    elements = sum(tensor.numel() for tensor in ours.params)
    read = sum(grad.values().numel() if grad.is_sparse else grad.numel() for row in sparse for grad in row)
    source, target = torch.zeros(elements), torch.zeros(elements)
    functions = {
        "minbert, sparse": lambda: ours.update(sparse),
        "minbert, dense": lambda: other.update(dense),
        "copy": lambda: target.copy_(source),
    }
    state = 6 * 4 * elements
    moved = {
        "minbert, sparse": 2 * 4 * read + state,
        "minbert, dense": 2 * 4 * TASKS * elements + state,
        "copy": 8 * elements,
    }
    race(f"update with sparse gradients, {TASKS} x {elements / 1e6:.1f}M float32", functions, moved)


def test_split_update(race, shapes) -> None:
    """Matrices that products read in bfloat16: as split parameters, and as float32 parameters with copies."""
    matrices = [shape for shape in shapes[3:] if len(shape) == 2]  # of the layers
    grads, whole = conflicting_gradients(matrices, torch.bfloat16), Ours(matrices)
    weights, split = pcgrad_weights(gram(grads)), copy.deepcopy(whole)
    copies = [param.bfloat16() for param in whole.params]
    split.params, low_bits = map(list, zip(*map(split_float32, split.params), strict=True))

    def update(of: Ours, **options: list[Tensor]) -> None:
        combine_adamw_(of.params, grads, weights, *of.moments, step=1, **OPTIONS, **options)

    update(whole, copies=copies)
    update(split, low_bits=low_bits)
    for param, high, low in zip(whole.params, split.params, low_bits, strict=True):
        assert torch.equal(join_float32(high, low), param)
    elements = sum(param.numel() for param in whole.params)
    source, target = torch.zeros(elements), torch.zeros(elements)
    functions = {
        "minbert, split": lambda: update(split, low_bits=low_bits),
        "minbert, with copies": lambda: update(whole, copies=copies),
        "copy": lambda: target.copy_(source),
    }
    row = 2 * TASKS * elements
    moved = {
        "minbert, split": row + 24 * elements,
        "minbert, with copies": row + 26 * elements,
        "copy": 8 * elements,
    }
    race(f"update of split parameters, {TASKS} x {elements / 1e6:.1f}M bfloat16", functions, moved)


def test_adamw(race, shapes) -> None:
    ours = Ours(shapes)
    grads = [torch.randn_like(param) for param in ours.params]
    theirs = Peer(ours.params)
    for param, grad in zip(theirs.params, grads, strict=True):
        param.grad = grad
    elements = sum(grad.numel() for grad in grads)
    source, target = torch.zeros(elements), torch.zeros(elements)
    other = copy.deepcopy(ours)
    functions = {
        "minbert adamw_": lambda: ours.adamw(grads),
        "copy": lambda: target.copy_(source),
        "torch fused AdamW": theirs.adamw,
        "reference": lambda: reference.adamw_(other.params, grads, *other.moments, step=1, **OPTIONS),
    }
    moved = {"minbert adamw_": 28 * elements, "torch fused AdamW": 28 * elements, "copy": 8 * elements}
    race(f"AdamW, {elements / 1e6:.1f}M float32", functions, moved)
