"""The row-wise Triton kernels: as near to float64 as the reference, the same masks, tasks that know nothing of others.

Memory that torch hands out is filled with NaN here, so that whatever a kernel leaves unwritten shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from minbert import kernels
from minbert.kernels import dispatch, reference, use_backend
from minbert.kernels.triton import dropout, embedding, gelu, layer_norm, row_tiles, segment_sums

SEED, STREAM_ID, EPS = (-(2**41) + 5, 2**32 - 10), 9, 1e-12  # with the first row's number
UNIT = torch.finfo(torch.float32).eps
OPS = ("dropout", "bias_gelu", "dropout_add_layer_norm", "embedding")
WITH_AND_WITHOUT_DROPOUT = [
    ("dropout", 0.3),
    ("bias_gelu", 0.0),
    *((op, p) for op in ("dropout_add_layer_norm", "embedding") for p in (0.0, 0.3)),
]
TABLES = (50, 2, 40)  # rows of the embedding tables
# Rows and columns: one part and several, whole ones and not, with a warp for a row and with two.
SHAPES = [(13, 64), (5, 130), (3, 512), (2, 770)]
GPU = torch.cuda.is_available()
HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter does not round to bfloat16
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(op: str, rows: int, columns: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Ids, inputs with a row for each token, and parameters."""
    x, residual = (randn(rows, columns, seed=i, dtype=dtype) for i in range(2))
    weight, bias = (randn(columns, seed=i) for i in (2, 3))
    if op == "dropout":
        return [], [x], []
    if op == "bias_gelu":
        return [], [x], [bias]
    if op == "dropout_add_layer_norm":
        return [], [x, residual], [weight, bias]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(size, (rows,), generator=generator) for size in TABLES]
    return ids, [], [*(randn(size, columns, seed=5 + i) for i, size in enumerate(TABLES)), weight, bias]


def by_kernels(op: str, case, grad: Tensor, bounds: list[int], p: float, device, seed=SEED) -> list[Tensor]:
    """The output, the inputs' gradients, and each parameter's for every task [T, ...]."""
    ids, inputs, params = ([tensor.to(device) for tensor in tensors] for tensors in case)
    grad, drop = grad.to(device), (p, torch.tensor(seed, device=device), STREAM_ID)
    if op == "dropout":
        found = [dropout.dropout(inputs[0], *drop), dropout.dropout(grad, *drop)]
    elif op == "bias_gelu":
        found = [gelu.forward(*inputs, *params), *gelu.backward(grad, *inputs, *params, bounds)]
    elif op == "dropout_add_layer_norm":
        y, mean_rstd = layer_norm.forward(*inputs, *params, EPS, *drop, None)
        d_x, d_residual, d_params = layer_norm.backward(grad, *inputs, params[0], mean_rstd, bounds, *drop, None)
        found = [y, d_x if p else d_residual, d_residual, *d_params.unbind(1)]
    else:
        *tables, weight, bias = params
        y, mean_rstd = embedding.forward(ids, tables, weight, bias, EPS, *drop, grad.dtype)
        d_tables, d_params = embedding.backward(grad, ids, tables, weight, mean_rstd, bounds, *drop)
        of_tables = d_tables.split([(len(bounds) - 1) * len(table) for table in tables])
        of_tables = [part.view(len(bounds) - 1, -1, y.shape[1]) for part in of_tables]
        found = [y, *of_tables, *d_params.unbind(1)]
    return [tensor.cpu() for tensor in found]


def by_reference(op: str, case, grad: Tensor, bounds: list[int], p: float) -> list[Tensor]:
    """The same by autograd, with one view of each parameter for every task."""
    ids, inputs, params = case
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    views = [[param.detach().requires_grad_() for _ in pairwise(bounds)] for param in params]
    drop = {"dropout_p": p, "seed": torch.tensor(SEED), "stream_id": STREAM_ID}
    with use_backend("reference"):
        if op == "dropout":
            y = kernels.dropout(*inputs, p=p, seed=drop["seed"], stream_id=STREAM_ID)
        elif op == "bias_gelu":
            y = kernels.bias_gelu(*inputs, *views, bounds=bounds)
        elif op == "dropout_add_layer_norm":
            y = kernels.dropout_add_layer_norm(*inputs, *views, eps=EPS, **drop, bounds=bounds)
        else:
            y = kernels.embedding(*ids, *views, eps=EPS, **drop, dtype=grad.dtype, bounds=bounds)
        y.backward(grad)
    of_views = [
        torch.stack([torch.zeros_like(v) if v.grad is None else v.grad for v in each]).detach() for each in views
    ]
    return [y.detach(), *(tensor.grad for tensor in inputs), *of_views]


@pytest.mark.parametrize("columns", [64, 770])
def test_numbered_rows_drop_what_they_drop_in_the_whole(columns, device):
    rows = torch.tensor([9, 3, 4, 0, 12], dtype=torch.int32, device=device)
    _, (x, residual), (weight, bias) = ([t.to(device) for t in part] for part in case(OPS[2], 13, columns, HALF))
    grad = randn(13, columns, seed=99, dtype=HALF).to(device)
    found = []
    for of_rows, numbers, bounds in ((slice(None), None, [0, 13]), (rows.long(), rows, [0, 2, 5])):
        drop = (0.4, torch.tensor(SEED, device=device), STREAM_ID, numbers)
        y, mean_rstd = layer_norm.forward(x[of_rows], residual[of_rows], weight, bias, EPS, *drop)
        tensors = grad[of_rows], x[of_rows], residual[of_rows], weight, mean_rstd
        found.append([y, *layer_norm.backward(*tensors, bounds, *drop)[:2]])
    for of_all, of_some in zip(*found, strict=True):
        assert torch.equal(of_all[rows.long()], of_some)


def wide(case):
    return [[t.double() if t.is_floating_point() else t for t in tensors] for tensors in case]


def assert_as_near_to_float64_as_the_reference(op, case, grad, bounds, p, device):
    ours, theirs = by_kernels(op, case, grad, bounds, p, device), by_reference(op, case, grad, bounds, p)
    exact = by_reference(op, wide(case), grad.double(), bounds, p)
    for got, reference_got, wanted in zip(ours, theirs, exact, strict=True):
        assert got.dtype == reference_got.dtype
        assert got.shape == wanted.shape
        slack = UNIT * (wanted.norm() + wanted.numel() ** 0.5)
        if op == "bias_gelu" and grad.dtype != torch.float32:
            slack *= 2**6  # of the terms of the bias' gradient gelu.py keeps 2^-17
        assert (got.double() - wanted).norm() <= 2 * (reference_got.double() - wanted).norm() + slack


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(*shape, torch.float32) for shape in SHAPES] + [(*shape, HALF) for shape in SHAPES[:2]],
)
@pytest.mark.parametrize(("op", "p"), WITH_AND_WITHOUT_DROPOUT)
def test_is_as_near_to_float64_as_the_reference(op, rows, columns, p, dtype, device):
    bounds = [0, 1, 1, rows]  # the second of three tasks has no rows
    grad = randn(rows, columns, seed=99, dtype=dtype)
    assert_as_near_to_float64_as_the_reference(op, case(op, rows, columns, dtype), grad, bounds, p, device)


@pytest.mark.parametrize("op", OPS[1:])
def test_more_rows_than_programs_take_at_once(op, device, monkeypatch):
    """Several tiles in a chunk, and several chunks in a task."""
    monkeypatch.setattr(layer_norm, "PROGRAMS", 3)
    monkeypatch.setattr(gelu, "PROGRAMS", 3)
    bounds = [0, 40, 41, 100, 100]
    assert segment_sums.chunk_rows(bounds, 4, 3) == 36
    grad = randn(100, 20, seed=99)
    assert_as_near_to_float64_as_the_reference(op, case(op, 100, 20, torch.float32), grad, bounds, 0.1, device)


@pytest.mark.parametrize("op", OPS[1:])
def test_each_task_gets_what_it_would_alone(op, device):
    """To the bit, but for the tables: their sums are cut into pieces at other places."""
    bounds, (ids, inputs, params), grad = [0, 6, 6, 7, 20], case(op, 20, 36, torch.float32), randn(20, 36, seed=99)
    together = by_kernels(op, (ids, inputs, params), grad, bounds, 0.0, device)[-len(params) :]
    for task, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            assert not any(gradient[task].any() for gradient in together)
            continue
        part = [tensor[start:end] for tensor in ids], [tensor[start:end] for tensor in inputs], params
        alone = by_kernels(op, part, grad[start:end], [0, end - start], 0.0, device)[-len(params) :]
        for got, wanted in zip(together, alone, strict=True):
            table = op == "embedding" and got.dim() == 3
            torch.testing.assert_close(got[task], wanted[0], rtol=1e-5 * table, atol=1e-5 * table)


@pytest.mark.parametrize("op", [op for op, p in WITH_AND_WITHOUT_DROPOUT if p])
def test_held_rows_draw_what_they_draw_in_the_whole_stream(op, device):
    """To the bit, but for the tables, as above; 7 of 20 rows, between which rows' numbers begin again at 0."""
    bounds, (ids, inputs, params), grad = [0, 6, 13, 20], case(op, 20, 36, torch.float32), randn(20, 36, seed=99)
    part = [tensor[6:13] for tensor in ids], [tensor[6:13] for tensor in inputs], params
    among_all = by_kernels(op, (ids, inputs, params), grad, bounds, 0.3, device)
    alone = by_kernels(op, part, grad[6:13], [0, 7], 0.3, device, seed=(SEED[0], SEED[1] + 6))
    of_rows = len(alone) - len(params)
    assert all(torch.equal(a[6:13], b) for a, b in zip(among_all[:of_rows], alone[:of_rows], strict=True))
    assert all(torch.equal(a[1], b[0]) for a, b in zip(among_all[-2:], alone[-2:], strict=True) if params)


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.9])
@pytest.mark.parametrize("columns", [1, 3, 64, 385])
@pytest.mark.parametrize(("seed", "stream_id"), [(SEED, STREAM_ID), ((2**63 - 1, 70), 2**32 - 1)])
def test_masks_are_the_references_to_the_bit(seed, stream_id, columns, p, device):
    keep = reference.dropout_mask(19, columns, p, torch.tensor(seed), stream_id)
    y = dropout.dropout(torch.ones(19, columns, device=device), p, torch.tensor(seed, device=device), stream_id)
    assert torch.equal(y.cpu(), torch.where(keep, torch.tensor(1 / (1 - p)), 0.0))


def test_layer_norm_drops_the_same_elements_in_both_directions(device):
    x, grad = torch.ones(19, 130), randn(19, 130, seed=1)
    arguments = (x, randn(19, 130, seed=2)), [torch.ones(130), torch.zeros(130)]
    _, d_x, d_residual, *_ = by_kernels("dropout_add_layer_norm", ([], *arguments), grad, [0, 19], 0.3, device)
    keep = reference.dropout_mask(19, 130, 0.3, torch.tensor(SEED), STREAM_ID)
    assert torch.equal(d_x != 0, keep & (d_residual != 0))


@pytest.mark.parametrize("bias", [0.0, 0.375])
def test_gelu_of_every_half_precision_number_is_as_near_as_the_reference(bias, device):
    """For each whole part of the argument on its own: the norm of all would hide the tail."""
    every = torch.arange(2**16).to(torch.int16).view(HALF)
    every = every[(every.abs() < 12) & (every.abs() > 2**-20)]
    every = every[: len(every) // 256 * 256].view(-1, 256)
    biases, ones, bounds = torch.full((256,), bias), torch.ones_like(every), [0, len(every)]

    ours = by_kernels("bias_gelu", ([], [every], [biases]), ones, bounds, 0.0, device)
    theirs = by_reference("bias_gelu", ([], [every], [biases]), ones, bounds, 0.0)
    exact = by_reference("bias_gelu", wide(([], [every], [biases])), ones.double(), bounds, 0.0)
    for got, reference_got, wanted in list(zip(ours, theirs, exact, strict=True))[:2]:
        for whole in range(-9, 9):
            here = (every.double() + bias).floor() == whole
            found, allowed = ((of.double() - wanted)[here].norm() for of in (got, reference_got))
            lost = wanted[here].norm() if whole < -7 else 0.0  # the kernels' polynomials end there
            assert found <= max(2 * allowed, lost), whole


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("op", ["bias_gelu", "dropout_add_layer_norm"])
def test_what_is_not_finite_stays_in_its_row(op, value, dtype, device):
    given, grad = case(op, 20, 96, dtype), randn(20, 96, seed=99, dtype=dtype)
    clean = by_kernels(op, given, grad, [0, 20], 0.1, device)
    given[1][0][7, 3] = value
    got = by_kernels(op, given, grad, [0, 20], 0.1, device)
    wanted = by_reference(op, wide(given), grad.double(), [0, 20], 0.1)
    inputs = len(given[1])
    for mine, theirs, before in zip(got[: 1 + inputs], wanted[: 1 + inputs], clean[: 1 + inputs], strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        others = torch.arange(20) != 7
        assert torch.equal(mine[others], before[others])


@pytest.mark.parametrize(
    "ids",
    [
        [3],
        [0] * 16,
        [1] * 17,
        [0] * 15 + [1] * 17 + [2],
        [2] * 520,
        [5, 0] * 40,
        list(range(30)),
        [7] + [1] * 100 + [0],
    ],
    ids=lambda ids: f"{len(set(ids))} of {len(ids)}",
)
def test_rows_are_added_wherever_their_runs_begin_and_end(ids, device):
    """Whole numbers, so that sums are exact; three tables' entries to one matrix."""
    columns = 300 if len(ids) < 100 else 5  # more than one program has, and quick
    values = randn(len(ids), columns, seed=0).mul(8).round()
    of_tables = torch.tensor([ids, [31] * len(ids), [40 + i % 9 for i in range(len(ids))]])
    out = torch.zeros(50, columns, device=device)
    embedding._add_rows(values.to(device), of_tables.flatten().int().to(device), out)
    assert torch.equal(out.cpu(), torch.zeros(50, columns).index_add_(0, of_tables.flatten(), values.repeat(3, 1)))


def test_tokens_with_ids_outside_their_tables_get_nan_and_change_nothing_else(device):
    """Each table is the middle of a larger one, as other tensors' memory lies around it."""
    ids, _, (*tables, weight, bias) = case("embedding", 12, 64, torch.float32)
    around = [torch.cat([torch.ones(2, 64), table, torch.ones(2, 64)]).to(device) for table in tables]
    inside = [table[2:-2] for table in around]
    wrong = [index.clone() for index in ids]
    for number, (index, size) in enumerate(zip(wrong, TABLES, strict=True)):
        index[2 * number], index[2 * number + 1] = -1, size
    bounds, grad = [0, 7, 12], randn(12, 64, seed=99).to(device)
    drop = 0.3, torch.tensor(SEED, device=device), STREAM_ID
    found = []
    for given in (ids, wrong):
        given, params = [index.to(device) for index in given], (weight.to(device), bias.to(device))
        y, mean_rstd = embedding.forward(given, inside, *params, EPS, *drop, torch.float32)
        d_tables, _ = embedding.backward(grad, given, inside, params[0], mean_rstd, bounds, *drop)
        found.append((y.cpu(), d_tables.cpu()))
    (y, d_tables), (y_wrong, d_wrong) = found
    assert torch.equal(y_wrong[6:], y[6:])
    assert y_wrong[:6].isnan().all()
    rows = torch.stack([index[:6] for index in ids]) + torch.tensor([0, 2 * TABLES[0], 2 * sum(TABLES[:2])])[:, None]
    others = torch.ones(len(d_tables), dtype=torch.bool)
    others[rows.flatten()] = False
    assert torch.equal(d_wrong[others], d_tables[others])


def test_integers_never_make_triton_compile_anew():
    assert all(value % 2 == 1 and value > 1 for value in segment_sums.arguments(range(100)))


def test_the_dispatcher_knows_the_widest_row():
    assert dispatch.WIDEST_ROW == row_tiles.LARGEST


# The public ops on a GPU -----------------------------------------------------------------------------------------


def publicly(op: str, case, grad: Tensor, bounds: list[int], p: float = 0.1) -> list[Tensor]:
    """The output and all gradients of the op on a GPU, by the backend that is chosen."""
    ids, inputs, params = ([tensor.cuda() for tensor in tensors] for tensors in case)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    views = [[param.detach().requires_grad_() for _ in pairwise(bounds)] for param in params]
    drop = {"seed": torch.tensor(SEED, device="cuda"), "stream_id": STREAM_ID}
    if op == "dropout":
        y = kernels.dropout(*inputs, p=p, **drop)
    elif op == "bias_gelu":
        y = kernels.bias_gelu(*inputs, *views, bounds=bounds)
    elif op == "dropout_add_layer_norm":
        y = kernels.dropout_add_layer_norm(*inputs, *views, eps=EPS, dropout_p=p, **drop, bounds=bounds)
    else:
        y = kernels.embedding(*ids, *views, eps=EPS, dropout_p=p, **drop, dtype=grad.dtype, bounds=bounds)
    leaves = [*inputs, *(view for each in views for view in each)]
    gradients = torch.autograd.grad(y, leaves, grad.cuda(), allow_unused=True)
    found = zip(leaves, gradients, strict=True)
    return [y.detach(), *(torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in found)]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [384, 768, 3072])
@pytest.mark.parametrize("op", OPS)
def test_public_ops_are_as_near_to_float64_as_the_reference(op, columns, dtype):
    bounds, given = [0, 100, 100, 1000], case(op, 1000, columns, dtype)
    grad = randn(1000, columns, seed=99, dtype=dtype)
    assert kernels.backends("cuda")[op] == "triton"
    ours = publicly(op, given, grad, bounds)
    with use_backend("reference"):
        theirs, exact = publicly(op, given, grad, bounds), publicly(op, wide(given), grad.double(), bounds)
    for got, reference_got, wanted in zip(ours, theirs, exact, strict=True):
        assert got.dtype == reference_got.dtype
        slack = UNIT * (wanted.norm() + wanted.numel() ** 0.5)
        if op == "bias_gelu" and dtype != torch.float32:
            slack *= 2**6
        assert (got.double() - wanted).norm() <= 2 * (reference_got.double() - wanted).norm() + slack


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_on_every_run(op):
    given, grad, bounds = case(op, 3000, 768, torch.bfloat16), randn(3000, 768, seed=99).bfloat16(), [0, 900, 3000]
    first = publicly(op, given, grad, bounds)
    for _ in range(250):
        for got, wanted in zip(publicly(op, given, grad, bounds), first, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_runs_inside_a_cuda_graph(op):
    ids, inputs, params = ([tensor.cuda() for tensor in tensors] for tensors in case(op, 500, 768, torch.bfloat16))
    grad, seed = randn(500, 768, seed=99).bfloat16().cuda(), torch.tensor(SEED, device="cuda")
    inputs, params = ([tensor.requires_grad_() for tensor in tensors] for tensors in (inputs, params))

    def step() -> list[Tensor]:
        drop = {"seed": seed, "stream_id": STREAM_ID}
        if op == "dropout":
            y = kernels.dropout(*inputs, p=0.1, **drop)
        elif op == "bias_gelu":
            y = kernels.bias_gelu(*inputs, *params)
        elif op == "dropout_add_layer_norm":
            y = kernels.dropout_add_layer_norm(*inputs, *params, eps=EPS, dropout_p=0.1, **drop)
        else:
            y = kernels.embedding(*ids, *params, eps=EPS, dropout_p=0.1, **drop, dtype=torch.bfloat16)
        return [y, *torch.autograd.grad(y, [*inputs, *params], grad)]

    torch.use_deterministic_algorithms(False)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seed += 1  # and the first row's number: read on the device, so that the captured graph follows
    graph.replay()
    for got, wanted in zip(captured, step(), strict=True):
        assert torch.equal(got, wanted)
