"""Attention on a GPU: as near to float64 as the reference, its masks to the bit, the same for tiles and sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from minbert import kernels
from minbert.kernels import reference, use_backend
from minbert.kernels.attention_plan import AttentionProblem
from minbert.kernels.triton import attention

SEED, STREAM_ID = (-(2**40) + 77, 2**32 - 30), 2**32 - 6  # with the first row's number
ALL_LENGTHS = {  # each way through the kernels: up to 32, 64 and 128 tokens in tiles, and more
    "32": [27, 5, 3, 9],
    "64": [50, 9, 33],
    "128": [90, 38, 20],
    "long": [129, 3],
}


@pytest.fixture(autouse=True)
def hopper(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the interpreter runs, launches are those of sm_90 unless a test says otherwise."""
    if device.type == "cpu":
        monkeypatch.setattr(attention, "compute_capability", lambda _: (9, 0))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched."""
    names, call = [], attention.Launch.__call__

    def record(launch: attention.Launch, *arguments: Any) -> None:
        names.append(launch.kernel.fn.__name__)
        call(launch, *arguments)

    monkeypatch.setattr(attention.Launch, "__call__", record)
    return names


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stream(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.fixture
def run(device: torch.device) -> Iterator[Callable[..., tuple[Tensor, Tensor]]]:
    """Result and gradient of qkv from the kernels, whose memory held NaN before; on the CPU again."""

    def call(
        qkv: Tensor,
        lengths: list[int],
        grad_out: Tensor,
        p: float = 0.0,
        plan: tuple[Any, Any] | None = None,
        scale: float | None = None,
        seed: tuple[int, int] = SEED,
    ) -> tuple[Tensor, Tensor]:
        plan = plan or kernels.attention_plan(stream(lengths), max(lengths)) or (None, None)
        table = [None if t is None else t.to(device) for t in plan]
        problem = (
            qkv.to(device),
            stream(lengths).to(device),
            max(lengths),
            p,
            torch.tensor(seed, device=device) if p else None,
            STREAM_ID,
            qkv.shape[3] ** -0.5 if scale is None else scale,
        )
        problem = AttentionProblem(*problem, *table)
        out, lse = attention.attention(problem)
        grad_qkv = attention.attention_backward(grad_out.to(device), problem, out, lse)
        return out.cpu(), grad_qkv.cpu()

    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    yield call
    torch.use_deterministic_algorithms(False)


def specified(qkv: Tensor, lengths: list[int], grad_out: Tensor, p: float, scale: float) -> tuple[Tensor, Tensor]:
    """Result and gradient of the reference."""
    keep = (
        reference.attention_dropout_mask(stream(lengths), qkv.shape[2], p, torch.tensor(SEED), STREAM_ID) if p else None
    )
    qkv = qkv.detach().requires_grad_()
    out = reference.attention(qkv, stream(lengths), keep, p, scale)
    return out.detach(), torch.autograd.grad(out, qkv, grad_out)[0]


def assert_as_near_to_float64_as_the_reference(
    ours: tuple[Tensor, Tensor], qkv: Tensor, lengths: list[int], grad_out: Tensor, p: float, scale: float
) -> None:
    theirs = specified(qkv, lengths, grad_out, p, scale)
    exact = specified(qkv.double(), lengths, grad_out.double(), p, scale)
    parts = [(ours[0], theirs[0], exact[0]), *zip(*(t[1].unbind(1) for t in (ours, theirs, exact)), strict=True)]
    for got, reference_got, wanted in parts:
        assert got.dtype == qkv.dtype
        noise = 1e-7 * wanted.norm().item() + 1e-9 * math.sqrt(wanted.numel())  # where the reference is exact by luck
        assert (got.double() - wanted).norm() <= 2 * (reference_got.double() - wanted).norm() + noise


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lengths", ALL_LENGTHS.values(), ids=ALL_LENGTHS)
def test_is_as_near_to_float64_as_the_reference(run, lengths: list[int], dtype: torch.dtype, p: float) -> None:
    tokens, heads = sum(lengths), 3
    qkv, grad_out = randn(tokens, 3, heads, 32, dtype=dtype), randn(tokens, heads, 32, seed=1, dtype=dtype)
    ours = run(qkv, lengths, grad_out, p)
    assert_as_near_to_float64_as_the_reference(ours, qkv, lengths, grad_out, p, 32**-0.5)


@pytest.mark.parametrize("lengths", [[50, 14], [129, 3]], ids=["64", "long"])
def test_launches_of_other_architectures(run, monkeypatch, device: torch.device, lengths: list[int]) -> None:
    if device.type == "cuda":
        pytest.skip("launches of the architecture at hand are in the other tests")
    monkeypatch.setattr(attention, "compute_capability", lambda _: (8, 0))
    tokens = sum(lengths)
    qkv, grad_out = randn(tokens, 3, 2, 32, dtype=torch.float16), randn(tokens, 2, 32, seed=1, dtype=torch.float16)
    ours = run(qkv, lengths, grad_out, 0.1)
    assert_as_near_to_float64_as_the_reference(ours, qkv, lengths, grad_out, 0.1, 32**-0.5)


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "scale", "lengths"),
    [
        (torch.float16, 5, 8, 1.0, [13, 9]),
        (torch.float16, 2, 40, -0.3, [40]),
        (torch.float16, 9, 64, 0.0, [20]),
        (torch.float16, 2, 72, 0.1, [5, 6]),
        (torch.float16, 2, 128, 0.1, [40, 3, 70]),
        (torch.float16, 5, 16, 0.3, [140]),
        (torch.float16, 2, 96, 0.1, [130]),
        (torch.float32, 2, 72, 0.1, [20, 9]),
        (torch.float32, 5, 128, 0.1, [130]),
    ],
)
def test_any_heads_and_scale(
    run, dtype: torch.dtype, heads: int, head_dim: int, scale: float, lengths: list[int]
) -> None:
    tokens = sum(lengths)
    qkv, grad_out = randn(tokens, 3, heads, head_dim, dtype=dtype), randn(tokens, heads, head_dim, seed=1, dtype=dtype)
    ours = run(qkv, lengths, grad_out, 0.2, scale=scale)
    assert_as_near_to_float64_as_the_reference(ours, qkv, lengths, grad_out, 0.2, scale)


@pytest.mark.parametrize("lengths", [[20, 9], [129, 3]], ids=["32", "long"])
def test_any_layout(run, lengths: list[int]) -> None:
    """Heads before tokens, gaps between tokens, addresses that are not aligned."""
    tokens, heads, head_dim = sum(lengths), 3, 16
    memory = randn(1 + tokens * (3 * heads * head_dim + 1))
    qkv = memory[1:].view(tokens, -1)[:, : 3 * heads * head_dim].unflatten(1, (heads, 3, head_dim)).transpose(1, 2)
    grad_out = randn(heads, tokens, head_dim, seed=1).transpose(0, 1)
    got = run(qkv, lengths, grad_out, 0.2)
    expected = run(qkv.contiguous(), lengths, grad_out.contiguous(), 0.2)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([23, 1, 8], id="32"),
        pytest.param([40, 7, 17], id="64"),
        pytest.param([100, 28], id="128", marks=pytest.mark.slow),
        pytest.param([150], id="long", marks=pytest.mark.slow),
    ],
)
def test_masks_are_the_references_to_the_bit(run, lengths: list[int]) -> None:
    """With equal scores and the identity as values, attention shows its probabilities: n or 0 times the same number."""
    heads, p, longest = 5, 0.6, 128
    keep = reference.attention_dropout_mask(stream(lengths), heads, p, torch.tensor(SEED), STREAM_ID)
    for first in range(0, max(lengths), longest):  # so many keys are shown at a time
        qkv, at, row = torch.zeros(sum(lengths), 3, heads, longest, dtype=torch.float16), 0, 0
        for n in lengths:
            qkv[row : row + n, 2] = torch.eye(n, 2 * longest)[:, None, first : first + longest]
            row += n
        shown, gradient = run(qkv, lengths, torch.ones(sum(lengths), heads, longest, dtype=torch.float16), p)
        row = 0
        for n in lengths:
            mask = keep[at : at + heads * n * n].view(heads, n, n)
            columns = mask[:, :, first : first + longest]
            width = columns.shape[2]
            assert torch.equal(shown[row : row + n, :, :width].transpose(0, 1) > 0, columns)
            torch.testing.assert_close(  # of the values: how often each key was kept
                gradient[row : row + n, 2, :, 0].float(), mask.sum(1).T / n / (1 - p), rtol=2e-3, atol=1e-4
            )
            at, row = at + heads * n * n, row + n


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", ["32", "64", "128"])
def test_a_tile_of_its_own_changes_no_bit_of_a_sequence(run, name: str, p: float) -> None:
    """Nor do tiles without rows."""
    lengths = ALL_LENGTHS[name]
    tokens, bounds = sum(lengths), stream(lengths)
    qkv, grad_out = randn(tokens, 3, 2, 32, dtype=torch.float16), randn(tokens, 2, 32, seed=1, dtype=torch.float16)
    expected = run(qkv, lengths, grad_out, p, (None, None))
    alone = torch.cat([torch.stack([bounds[:-1], bounds[1:]], dim=1), torch.zeros(2, 2, dtype=torch.int32)])
    starts = bounds[:-1].repeat_interleave(torch.tensor(lengths))
    got = run(qkv, lengths, grad_out, p, (alone, starts))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("lengths", [[5, 27, 3], [9, 50, 33], [20, 90, 38], [3, 129]], ids=ALL_LENGTHS)
def test_held_rows_draw_what_they_draw_in_the_whole_stream(run, lengths: list[int]) -> None:
    """All sequences but the first, among whose rows numbers begin again at 0."""
    tokens, first = sum(lengths), lengths[0]
    qkv, grad_out = randn(tokens, 3, 2, 16, dtype=torch.float16), randn(tokens, 2, 16, seed=1, dtype=torch.float16)
    among_all = run(qkv, lengths, grad_out, 0.3, (None, None))
    seed = SEED[0], SEED[1] + first
    alone = run(qkv[first:], lengths[1:], grad_out[first:], 0.3, (None, None), seed=seed)
    assert all(torch.equal(a[first:], b) for a, b in zip(among_all, alone, strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("-inf")])
@pytest.mark.parametrize("part", [0, 1, 2, 3])
@pytest.mark.parametrize("lengths", [[12, 13, 7], [12, 70, 40], [12, 140]], ids=["32", "128", "long"])
def test_what_is_not_finite_spreads_as_in_the_reference(run, lengths: list[int], part: int, poison: float) -> None:
    """Within its own sequence: the others of a tile stay as they are."""
    tokens, heads, p = sum(lengths), 2, 0.3
    qkv, grad_out = randn(tokens, 3, heads, 32), randn(tokens, heads, 32, seed=1)
    (qkv[20, part] if part < 3 else grad_out[20])[1, 7] = poison
    ours = run(qkv.half(), lengths, grad_out.half(), p)
    theirs = specified(qkv.half(), lengths, grad_out.half(), p, 32**-0.5)
    inside = slice(12, 12 + lengths[1])
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite())
        assert got[:12].isfinite().all()
        assert got[inside.stop :].isfinite().all()
        finite = expected.isfinite()
        torch.testing.assert_close(got[finite], expected[finite], rtol=5e-3, atol=5e-3)
    assert torch.equal(ours[0].isposinf(), theirs[0].isposinf())


@pytest.mark.parametrize("size", [30.0, 300.0])
@pytest.mark.parametrize("lengths", [[20, 10], [40, 25]])
def test_large_scores_do_not_overflow(run, lengths: list[int], size: float) -> None:
    """Where tiles are whole: over blocks, probabilities of one row add up to 1 but for lse's own rounding."""
    qkv, grad_out = randn(sum(lengths), 3, 2, 16) * size, randn(sum(lengths), 2, 16, seed=1)
    ours = run(qkv, lengths, grad_out)
    assert_as_near_to_float64_as_the_reference(ours, qkv, lengths, grad_out, 0.0, 0.25)


@pytest.mark.parametrize(
    ("tokens", "capability", "dtype", "head_dim", "expected"),
    [
        (32, 9, torch.float16, 32, "forward_whole backward_whole"),
        (64, 9, torch.float16, 32, "forward_whole backward_whole"),
        (128, 9, torch.float16, 32, "forward_blocks backward_whole"),
        (129, 9, torch.float16, 32, "forward_blocks backward_queries backward_keys"),
        (64, 9, torch.float16, 40, "forward_blocks backward_queries backward_keys"),
        (32, 8, torch.float16, 32, "forward_whole backward_whole"),
        (64, 8, torch.float16, 32, "forward_blocks backward_queries backward_keys"),
        (32, 9, torch.float32, 32, "forward_whole backward_whole"),
        (64, 9, torch.float32, 32, "forward_blocks backward_whole"),
        (129, 9, torch.float32, 32, "forward_blocks backward_queries backward_keys"),
        (32, 9, torch.float32, 72, "forward_blocks backward_queries backward_keys"),
    ],
)
def test_the_kernels_that_run(
    run,
    launched: list[str],
    monkeypatch,
    tokens: int,
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    expected: str,
) -> None:
    monkeypatch.setattr(attention, "compute_capability", lambda _: (capability, 0))
    run(randn(tokens, 3, 1, head_dim, dtype=dtype), [tokens], randn(tokens, 1, head_dim, dtype=dtype))
    assert launched == expected.split()


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "heads"), [(9, 3), (17, 2)])
def test_blocks_beyond_the_bits_of_an_integer(run, monkeypatch, blocks: int, heads: int) -> None:
    """Two heads share random words, and then each computes its own."""
    shape, n, p = attention.Shape(16, 16), 16 * blocks - 5, 0.1
    many = attention._FLOAT32._replace(long_blocks=shape, query_blocks=shape, key_blocks=shape)
    monkeypatch.setattr(attention, "_FLOAT32", many)
    qkv, grad_out = randn(n, 3, heads, 16), randn(n, heads, 16, seed=1)
    assert_as_near_to_float64_as_the_reference(run(qkv, [n], grad_out, p), qkv, [n], grad_out, p, 0.25)


def test_heads_that_share_random_words() -> None:
    launches = [attention.Launch(None, attention.Shape(32, 32), 1, blocks) for blocks in (1, 8, 9, 16, 17, 100)]
    assert [launch.together(True) for launch in launches] == [4, 4, 2, 2, 1, 1]
    assert launches[0].together(False) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [*ALL_LENGTHS.values(), [512, 300], [1100]])
def test_the_op_on_a_gpu(lengths: list[int], dtype: torch.dtype, p: float) -> None:
    tokens, seed = sum(lengths), torch.tensor(SEED, device="cuda")
    plan = kernels.attention_plan(stream(lengths), max(lengths))
    plans = (None, plan and kernels.AttentionPlan(*(t.cuda() for t in plan)))

    def both(qkv: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
        qkv = qkv.cuda().requires_grad_()
        out = kernels.attention(
            qkv, stream(lengths).cuda(), max(lengths), dropout_p=p, seed=seed, stream_id=STREAM_ID, plan=plan
        )
        return out.detach().cpu(), torch.autograd.grad(out, qkv, grad_out.to(qkv))[0].cpu()

    qkv, grad_out = randn(tokens, 3, 12, 64, dtype=dtype), randn(tokens, 12, 64, seed=1, dtype=dtype)
    for plan in plans:
        ours = both(qkv, plan)
        again = both(qkv, plan)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        with use_backend("reference"):
            theirs, exact = both(qkv, plan), both(qkv.double(), plan)
        for got, reference_got, wanted in zip(ours, theirs, exact, strict=True):
            assert (got - wanted).norm() <= 2 * (reference_got - wanted).norm() + 1e-7 * wanted.norm()
