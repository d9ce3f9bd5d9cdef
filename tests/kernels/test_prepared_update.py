"""The update of prepared parameters has the bits of the public ops, and tells autograd what it changed."""

from __future__ import annotations

from array import array

import pytest
import torch
from torch import Tensor

from minbert import kernels
from minbert.kernels import native
from minbert.kernels.gradient_table import GradientColumns, GradientTable
from minbert.kernels.prepared_adamw import AdamWTensors, combine_adamw_of_
from minbert.kernels.surgery import gram_of

SHAPES = [(40, 6), (7,), (3, 5), (70001,), ()]
OPTIONS = {"step": 3, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])


def gradients(tasks: int, dtype: torch.dtype = torch.float32, missing=(), sparse: bool = False) -> list[list]:
    """For each task one of each shape, without those of (task, number) in `missing`."""
    generator = torch.Generator().manual_seed(0)
    rows: list[list] = [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(tasks)]
    if sparse:
        for task, row in enumerate(rows):
            ids = torch.arange(task, 40, 3)
            row[0] = torch.sparse_coo_tensor(ids[None], row[0][ids], (40, 6)).coalesce()
    for task, number in missing:
        rows[task][number] = None
    return rows


def flat(rows: list[list]) -> list:
    return [grad for row in rows for grad in row]


def table_of(rows: list[list], params: list[Tensor]) -> GradientTable:
    leaves = [torch.empty(shape, dtype=rows[0][-1].dtype) for shape in SHAPES]
    return GradientTable(GradientColumns(params, len(rows), leaves), flat(rows))


CASES = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "one task": {"tasks": 1},
    "missing": {"missing": [(0, 1), (1, 1), (2, 1), (1, 3)]},
    "sparse": {"sparse": True},
    "sparse, missing": {"sparse": True, "missing": [(1, 0), (0, 2)]},
}


@BACKENDS
@pytest.mark.parametrize("parts", [None, [2, 0, 2, 0, 1]], ids=["whole", "by parts"])
@pytest.mark.parametrize("case", CASES)
def test_an_update_has_the_bits_of_the_public_ops(case: str, parts: list[int] | None, backend: str) -> None:
    rows = gradients(**{"tasks": 3, **CASES[case]})
    wide = torch.float64 if case == "float64" else torch.float32
    state = [[torch.rand(shape, dtype=wide) for shape in SHAPES] for _ in range(4)]
    mine, theirs = ([[tensor.clone() for tensor in tensors] for tensors in state] for _ in range(2))
    table = table_of(rows, mine[0])
    count = None if parts is None else 4  # one of which has no tensors
    weights = torch.randn([len(rows)] if parts is None else [4, len(rows)], dtype=torch.float64)
    with kernels.use_backend(backend):
        assert torch.equal(gram_of(table, parts, count), kernels.gram(rows, parts, count))
        params, *moments, ema = theirs
        kernels.combine_adamw_(params, rows, weights, *moments, ema=ema, ema_decay=0.5, parts=parts, **OPTIONS)
        _, *moments, ema = ([tensors[k] for k in table.present] for tensors in mine)
        numbers = None if parts is None else [parts[k] for k in table.present]
        tensors = AdamWTensors(table.columns, table.present, *moments, ema=ema, parts=numbers, part_count=count or 1)
        combine_adamw_of_(table, tensors, weights, ema_decay=0.5, **OPTIONS)
    for got, wanted in zip(mine, theirs, strict=True):
        assert all(map(torch.equal, got, wanted))
    assert len(table.present) == (4 if case == "missing" else 5)


@BACKENDS
def test_some_columns_are_updated_with_copies_and_low_bits(backend: str) -> None:
    rows = gradients(2, torch.bfloat16)
    whole = [torch.randn(shape) for shape in SHAPES]
    split, low = zip(*map(kernels.split_float32, whole), strict=True)
    chosen = [3, 1, 2]

    def updated(prepared: bool) -> list[Tensor]:
        params = [split[0].clone(), split[1].clone(), whole[2].clone(), split[3].clone(), whole[4].clone()]
        low_bits = [None if k == 2 else low[k].clone() for k in chosen]
        copies = [torch.zeros(3, 5, dtype=torch.bfloat16) if k == 2 else None for k in chosen]
        moments = [[torch.ones(SHAPES[k]) for k in chosen] for _ in range(2)]
        written = {"copies": copies, "low_bits": low_bits}
        weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
        if prepared:
            table = table_of(rows, params)
            tensors = AdamWTensors(table.columns, chosen, *moments, **written)
            combine_adamw_of_(table, tensors, weights, **OPTIONS)
        else:
            some = [[row[k] for k in chosen] for row in rows]
            kernels.combine_adamw_([params[k] for k in chosen], some, weights, *moments, **written, **OPTIONS)
        return [*params, *(each for each in (*low_bits, *copies) if each is not None), *moments[0], *moments[1]]

    with kernels.use_backend(backend):
        assert all(map(torch.equal, updated(True), updated(False)))


def test_a_table_of_the_same_gradients_serves_several_times() -> None:
    """As of a CUDA graph, whose replays write the same memory."""
    rows = gradients(2)
    table = table_of(rows, [torch.zeros(shape) for shape in SHAPES])
    before = gram_of(table)
    for grad in flat(rows):
        grad *= 2
    assert torch.equal(gram_of(table), 4 * before)


def test_a_backward_of_a_forward_before_the_update_is_refused() -> None:
    param = torch.ones(3, requires_grad=True)
    loss = (param**2).sum()
    columns = GradientColumns([param], 1)
    tensors = AdamWTensors(columns, [0], [torch.zeros(3)], [torch.zeros(3)])
    combine_adamw_of_(GradientTable(columns, [torch.ones(3)]), tensors, torch.ones(1).double(), **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_not_as_described_is_refused() -> None:
    with pytest.raises(TypeError, match=r"grads\[0\]\[1\] must be float32 or bfloat16 or float64, got float16"):
        GradientColumns([torch.ones(3), torch.ones(3, dtype=torch.float16)], 1)
    with pytest.raises(ValueError, match=r"grads\[0\]\[0\] must be dense"):
        GradientColumns([torch.ones(3, 4)[:, ::2]], 1)
    columns = GradientColumns([torch.ones(4, 2)], 2)
    loose = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.ones(2, 2), (4, 2))
    with pytest.raises(ValueError, match=r"grads\[1\]\[0\] must be coalesced"):
        GradientTable(columns, [None, loose])
    with pytest.raises(TypeError, match=r"exp_avgs\[0\] must be float32"):
        AdamWTensors(columns, [0], [torch.ones(4, 2).double()], [torch.ones(4, 2)])
    with pytest.raises(ValueError, match=r"ema\[0\] must have shape \[4, 2\]"):
        AdamWTensors(columns, [0], [torch.ones(4, 2)], [torch.ones(4, 2)], ema=[torch.ones(2, 4)])


def test_native_code_reads_numbers_from_lists_and_from_buffers(needs_native: None) -> None:
    grad, found = torch.randn(100), torch.empty(1, dtype=torch.float64)
    partials = torch.empty(1, dtype=torch.float64)

    def gram(numbers) -> float:
        arguments = numbers([grad.data_ptr()]), numbers([100]), numbers([0]), 1, [], [], [], []
        native.library().gram(arguments, partials.data_ptr(), found.data_ptr(), 1)
        return found.item()

    assert (
        gram(list) == gram(lambda numbers: array("q", numbers)) == pytest.approx(float(grad.double() @ grad.double()))
    )
    for wrong in (lambda numbers: array("d", numbers), lambda numbers: memoryview(array("q", numbers * 2))[::2]):
        with pytest.raises(TypeError):
            gram(wrong)
