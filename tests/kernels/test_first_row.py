"""A stream whose rows several processes hold: each of them draws for its own what one draws that holds all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minbert import kernels
from minbert.kernels import use_backend

MASKS = ("dropout_mask", "attention_dropout_mask")
OPS = (*MASKS, "smart_init", "dropout", "dropout_add_layer_norm", "embedding", "attention", "first_token_attention")
DTYPES = (torch.float32, torch.bfloat16)
SEED, STREAM_ID, P, EPS = -(2**41) + 5, 9, 0.3, 1e-12
BOUNDS = [0, 23, 63, 74, 131]  # of the sequences of the whole stream
HELD = slice(1, 3)  # sequences that a process holds
FIRST_ROWS = [0, 1000003, 2**32 - 41, -41, 2**62 - 41]  # of the whole stream; rows are numbered modulo 2**32
HEADS, COLUMNS, TABLES = 3, 48, (50, 2, 40)  # rows of the embedding tables

Result = tuple[Tensor, ...]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(op: str, dtype: torch.dtype, seed: Tensor, sequences: slice) -> list[Result]:
    """All that the op gives for each of these sequences: its rows of the result and of the gradients of what has rows,
    and its share of the gradients of parameters."""
    ends = BOUNDS[1:][sequences]
    rows = slice(BOUNDS[sequences.start or 0], ends[-1])
    bounds = [0, *(end - rows.start for end in ends)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=seed.device)
    lengths = cu_seqlens.diff().tolist()

    def inputs(*shape: int) -> list[Tensor]:
        """Two inputs and a gradient."""
        whole = [randn(BOUNDS[-1], *shape, seed=i, dtype=dtype) for i in range(3)]
        return [tensor[rows].to(seed.device).requires_grad_() for tensor in whole]

    def params(*shapes: tuple[int, ...]) -> list[list[Tensor]]:
        """A view of each for every sequence."""
        made = [randn(*shape, seed=3 + i).to(seed.device) for i, shape in enumerate(shapes)]
        return [[param.detach().requires_grad_() for _ in lengths] for param in made]

    x, other, grad = inputs(COLUMNS)
    drop = {"seed": seed, "stream_id": STREAM_ID}
    own, views = [x], []
    if op == "dropout_mask":
        return list(zip(kernels.dropout_mask(bounds[-1], COLUMNS, P, **drop).split(lengths)))
    if op == "attention_dropout_mask":
        mask = kernels.attention_dropout_mask(cu_seqlens, HEADS, P, **drop)
        return list(zip(mask.split([HEADS * n * n for n in lengths])))
    if op == "smart_init":
        return list(zip(kernels.smart_init(x, sigma=0.5, **drop).split(lengths)))
    if op == "dropout":
        y = kernels.dropout(x, p=P, **drop)
    elif op == "attention":
        own, grad = inputs(3, HEADS, 16)[:1], inputs(HEADS, 16)[2]
        y = kernels.attention(*own, cu_seqlens, max(lengths), dropout_p=P, **drop)
    elif op == "first_token_attention":
        tokens, grad = inputs(3, HEADS, 16)[0], inputs(HEADS, 16)[2][cu_seqlens[:-1].long()]
        of_firsts, keys_values = tokens[cu_seqlens[:-1].long(), 0], tokens[:, 1:]
        y = kernels.first_token_attention(of_firsts, keys_values, cu_seqlens, max(lengths), dropout_p=P, **drop)
        gradients = torch.autograd.grad(y, [of_firsts, keys_values], grad)
        return list(zip(y.detach(), gradients[0], gradients[1].split(lengths), strict=True))
    elif op == "dropout_add_layer_norm":
        own, views = [x, other], params((COLUMNS,), (COLUMNS,))
        y = kernels.dropout_add_layer_norm(*own, *views, eps=EPS, dropout_p=P, bounds=bounds, **drop)
    else:
        ids = [torch.arange(BOUNDS[-1])[rows].to(seed.device) * 7 % size for size in TABLES]
        own, views = [], params(*((size, COLUMNS) for size in TABLES), (COLUMNS,), (COLUMNS,))
        y = kernels.embedding(*ids, *views, eps=EPS, dropout_p=P, bounds=bounds, dtype=dtype, **drop)
    gradients = torch.autograd.grad(y, [*own, *(view for each in views for view in each)], grad)
    of_rows, of_views = gradients[: len(own)], gradients[len(own) :]
    of_params = [of_views[i : i + len(lengths)] for i in range(0, len(of_views), len(lengths))]
    return list(zip(*(tensor.split(lengths) for tensor in (y.detach(), *of_rows)), *of_params, strict=True))


def same(some: list[Result], others: list[Result]) -> bool:
    return all(
        torch.equal(one, other)
        for of_one, of_other in zip(some, others, strict=True)
        for one, other in zip(of_one, of_other, strict=True)
    )


def assert_rows_draw_what_they_draw_in_the_whole_stream(op: str, dtype: torch.dtype, device: str) -> None:
    for first_row in FIRST_ROWS:
        of_all, of_held = (torch.tensor([SEED, first_row + row], device=device) for row in (0, BOUNDS[HELD.start]))
        assert same(results(op, dtype, of_held, HELD), results(op, dtype, of_all, slice(None))[HELD])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_held_rows_draw_what_they_draw_in_the_whole_stream(isa: str, op: str, dtype: torch.dtype) -> None:
    assert_rows_draw_what_they_draw_in_the_whole_stream(op, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_held_rows_draw_the_same_in_the_reference(op: str, dtype: torch.dtype) -> None:
    with use_backend("reference"):
        assert_rows_draw_what_they_draw_in_the_whole_stream(op, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_held_rows_draw_the_same_on_a_gpu(op: str, dtype: torch.dtype) -> None:
    assert_rows_draw_what_they_draw_in_the_whole_stream(op, dtype, "cuda")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_a_seed_by_itself_numbers_rows_from_0(op: str, backend: str) -> None:
    with use_backend(backend):
        alone, pair, other = (
            results(op, torch.float32, torch.tensor(seed), slice(None)) for seed in (SEED, [SEED, 0], [SEED, 1])
        )
    assert same(alone, pair)
    assert not same(alone, other)
