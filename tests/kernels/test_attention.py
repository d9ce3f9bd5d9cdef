"""Attention: as near to float64 as the reference, the same masks, the same bits for any thread count and any layout."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert.kernels import attention, native, reference, use_backend
from minbert.kernels.dispatch import choice

SEED, STREAM_ID = torch.tensor([-(2**40) + 77, 2**32 - 30]), 5
DTYPES = (torch.float32, torch.bfloat16)
ATTENTION_OPS = ["minbert::attention", "minbert::attention_backward"]
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stream(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def run(qkv: Tensor, lengths: list[int], grad_out: Tensor, p: float = 0.0, **options: float) -> tuple[Tensor, Tensor]:
    """The result and the gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    out = attention(qkv, stream(lengths), max(lengths), dropout_p=p, seed=SEED, stream_id=STREAM_ID, **options)
    return out.detach(), torch.autograd.grad(out, qkv, grad_out)[0]


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).norm().item()


def assert_as_near_to_float64_as_the_reference(
    qkv: Tensor, lengths: list[int], grad_out: Tensor, p: float = 0.0, **options: float
) -> None:
    def at(qkv: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The errors of compiled code and of the reference, and what both may be off by, each [4]."""
        ours = run(qkv, lengths, grad_out, p, **options)
        with use_backend("reference"):
            exact = run(qkv.double(), lengths, grad_out.double(), p, **options)
            theirs = run(qkv, lengths, grad_out, p, **options)
        assert ours[0].dtype == ours[1].dtype == qkv.dtype
        noise = [1e-7 * wanted.norm().item() + 1e-9 * math.sqrt(wanted.numel()) for wanted in parts(exact)]
        return torch.tensor(errors(ours, exact)), torch.tensor(errors(theirs, exact)), torch.tensor(noise)

    mine, allowed, noise = at(qkv, grad_out)
    if (mine > 2 * allowed + noise).any():
        # The errors of few scores are luck: the same few roundings go one way in one code and cancel out in another.
        # Then those at many points nearby count, where each rounding goes its own way, as root mean squares.
        near = [at(nearby(qkv, seed), nearby(grad_out, -1 - seed)) for seed in range(64)]
        mine, allowed, noise = (torch.stack(of_all).square().mean(0).sqrt() for of_all in zip(*near, strict=True))
    assert (mine <= 2 * allowed + noise).all()


def nearby(x: Tensor, seed: int) -> Tensor:
    """Each number off by about 2^-6 of it, in memory of the same layout."""
    memory = torch.full((x.untyped_storage().nbytes() // x.element_size(),), math.nan, dtype=x.dtype)
    factor = 1 + randn(*x.shape, seed=seed + 2**20, dtype=torch.float64) / 64
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x * factor)


def parts(results: tuple[Tensor, ...]) -> list[Tensor]:
    """The result, and the gradients of queries, keys and values."""
    return [results[0], *results[1].unbind(1)]


def errors(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    return [error(got, wanted) for got, wanted in zip(parts(results), parts(exact), strict=True)]


def test_a_reference_that_is_exact_by_luck_is_no_bound(isa: str) -> None:
    """Of two tokens, with eight scores in all."""
    qkv, grad_out = randn(2, 3, 2, 128, seed=1), randn(2, 2, 128, seed=2).transpose(0, 1)
    assert_as_near_to_float64_as_the_reference(qkv, [2], grad_out.contiguous(), softmax_scale=-0.3)


def test_an_error_beyond_the_references_is_found_on_few_scores(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that are off by a few units of float32, in compiled code alone."""
    right = attention

    def worse(qkv: Tensor, *arguments: object, softmax_scale: float, **options: object) -> Tensor:
        scale = softmax_scale * (1 + 4e-6 if choice() == "auto" else 1)
        return right(qkv, *arguments, softmax_scale=scale, **options)

    monkeypatch.setattr(sys.modules[__name__], "attention", worse)
    qkv, grad_out = randn(2, 3, 2, 128, seed=1), randn(2, 2, 128, seed=2).transpose(0, 1)
    with pytest.raises(AssertionError):
        assert_as_near_to_float64_as_the_reference(qkv, [2], grad_out.contiguous(), softmax_scale=-0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim"),
    [
        ([27, 5, 90, 1, 33, 64, 65], 12, 32),
        ([40, 129], 12, 64),
        ([513, 2], 3, 64),
        ([200], 2, 128),
        ([1, 1, 1], 5, 8),
    ],
)
def test_is_as_near_to_float64_as_the_reference(
    isa: str, lengths: list[int], heads: int, head_dim: int, p: float, dtype: torch.dtype
) -> None:
    tokens = sum(lengths)
    qkv, grad_out = randn(tokens, 3, heads, head_dim, dtype=dtype), randn(tokens, heads, head_dim, seed=1, dtype=dtype)
    assert_as_near_to_float64_as_the_reference(qkv, lengths, grad_out, p)


@quick
@given(
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(60, 140)), min_size=1, max_size=5),
    heads=st.integers(1, 9),
    head_dim=st.sampled_from([8, 16, 24, 32, 40, 64, 72, 128]),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.1, 0.7]),
    scale=st.sampled_from([None, 0.0, -0.3, 1.0]),
    shift=st.integers(0, 3),
    gap=st.sampled_from([0, 1, 8]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(
    isa: str,
    lengths: list[int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    p: float,
    scale: float | None,
    shift: int,
    gap: int,
    seed: int,
) -> None:
    """`shift`: elements past an aligned address; `gap`: elements between one token and the next."""
    tokens, row = sum(lengths), 3 * heads * head_dim
    memory = randn(shift + tokens * (row + gap), seed=seed, dtype=dtype)
    qkv = memory[shift:].view(tokens, row + gap)[:, :row].unflatten(1, (3, heads, head_dim))
    grad_out = randn(heads, tokens, head_dim, seed=seed + 1, dtype=dtype).transpose(0, 1)
    assert_as_near_to_float64_as_the_reference(qkv, lengths, grad_out, p, softmax_scale=scale)


@pytest.mark.parametrize("lengths", [[23, 1, 40], [100, 7]])
def test_masks_are_the_references_to_the_bit(isa: str, lengths: list[int]) -> None:
    """With equal scores and the identity as values, attention shows its probabilities: n or 0 times the same number."""
    heads, p, longest = 6, 0.4, max(lengths)
    head_dim = -(-longest // 8) * 8
    qkv = torch.zeros(sum(lengths), 3, heads, head_dim)
    keep = reference.attention_dropout_mask(stream(lengths), heads, p, SEED, STREAM_ID)
    at = row = 0
    for n in lengths:
        qkv[row : row + n, 2] = torch.eye(n, head_dim)[:, None]
        row += n
    probabilities, gradient = run(qkv, lengths, torch.ones(sum(lengths), heads, head_dim), p)
    row = 0
    for n in lengths:
        mask = keep[at : at + heads * n * n].view(heads, n, n)
        shown = probabilities[row : row + n, :, :n].transpose(0, 1)
        assert torch.equal(shown > 0, mask)
        torch.testing.assert_close(shown, mask / n / (1 - p))
        torch.testing.assert_close(  # of the values: how often each key was kept
            gradient[row : row + n, 2, :, 0], mask.sum(1).T / n / (1 - p)
        )
        at, row = at + heads * n * n, row + n


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("lengths", [[9] * 20, [150, 3, 3, 20], [70]])
def test_the_thread_count_changes_no_bit(isa: str, lengths: list[int], threads: int) -> None:
    qkv, grad_out = randn(sum(lengths), 3, 6, 16), randn(sum(lengths), 6, 16, seed=1)
    torch.set_num_threads(1)
    expected = run(qkv, lengths, grad_out, 0.2)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(run(qkv, lengths, grad_out, 0.2), expected, strict=True))


def test_sequences_do_not_touch_each_other(isa: str) -> None:
    lengths = [30, 11, 70]
    qkv, grad_out = randn(111, 3, 4, 32), randn(111, 4, 32, seed=1)
    together = run(qkv, lengths, grad_out)
    for start, n in ((0, 30), (30, 11), (41, 70)):
        alone = run(qkv[start : start + n], [n], grad_out[start : start + n])
        assert all(torch.equal(a[start : start + n], b) for a, b in zip(together, alone, strict=True))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, and bytes of 255."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[27, 1, 90], [600]])
def test_every_element_is_written(isa: str, lengths: list[int], dtype: torch.dtype, poisoned_memory: None) -> None:
    tokens = sum(lengths)
    qkv, grad_out = randn(tokens, 3, 3, 32, dtype=dtype), randn(tokens, 3, 32, seed=1, dtype=dtype)
    assert all(result.isfinite().all() for result in run(qkv, lengths, grad_out, 0.1))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_is_not_finite_spreads_as_in_the_reference(isa: str, poison: float, part: int, p: float) -> None:
    lengths = [12, 30, 9]
    qkv, grad_out = randn(51, 3, 5, 16), randn(51, 5, 16, seed=1)
    qkv[20, part, 2, 7] = poison
    ours = run(qkv, lengths, grad_out, p)
    with use_backend("reference"):
        theirs = run(qkv, lengths, grad_out, p)
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isposinf(), expected.isposinf())
        finite = expected.isfinite()
        torch.testing.assert_close(got[finite], expected[finite], rtol=1e-5, atol=1e-6)
        assert got[:12].isfinite().all()
        assert got[42:].isfinite().all()


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_scores_do_not_overflow(isa: str, size: float) -> None:
    qkv, grad_out = randn(60, 3, 2, 16) * size, randn(60, 2, 16, seed=1)
    assert_as_near_to_float64_as_the_reference(qkv, [20, 40], grad_out)


def test_gradients_may_be_expanded_views(isa: str) -> None:
    qkv = randn(20, 3, 2, 16).requires_grad_()
    (ours,) = torch.autograd.grad(attention(qkv, stream([20]), 20).sum(), qkv)
    with use_backend("reference"):
        (theirs,) = torch.autograd.grad(attention(qkv, stream([20]), 20).sum(), qkv)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_max_seqlen_may_be_larger_than_the_longest(isa: str) -> None:
    qkv, cu_seqlens = randn(30, 3, 2, 16).requires_grad_(), stream([20, 10])
    outs = [attention(qkv, cu_seqlens, longest, dropout_p=0.2, seed=SEED) for longest in (1000, 25, 20)]
    grads = [torch.autograd.grad(out.square().sum(), qkv)[0] for out in outs]
    assert all(torch.equal(out, outs[-1]) for out in outs)
    assert all(torch.equal(grad, grads[-1]) for grad in grads)


@pytest.mark.parametrize("lengths", [[27, 1, 9], [70, 16, 200, 33]])
def test_the_backward_drops_what_the_forward_kept_for_it(isa: str, lengths: list[int]) -> None:
    """Drawing the bits again gives the same result to the bit; with all bits 0, nothing has a gradient."""
    qkv, grad_out = randn(sum(lengths), 3, 6, 16), randn(sum(lengths), 6, 16, seed=1)
    problem = (qkv, stream(lengths), max(lengths), 0.3, SEED, STREAM_ID, 0.25, None, None)
    out, kept = torch.ops.minbert.attention(*problem)
    grads = [torch.ops.minbert.attention_backward(grad_out, *problem, out, bits) for bits in (kept, None, 0 * kept)]
    assert torch.equal(grads[0], grads[1])
    assert grads[0].any()
    assert not grads[2].any()


def test_nothing_is_kept_where_nothing_is_dropped(needs_native: None) -> None:
    qkv = randn(20, 3, 2, 16)
    assert torch.ops.minbert.attention(qkv, stream([20]), 20, 0.0, None, 0, 0.25, None, None)[1].numel() == 0


@pytest.mark.parametrize(
    ("dtype", "head_dim", "ops"),
    [
        (torch.float32, 32, ATTENTION_OPS),
        (torch.bfloat16, 128, ATTENTION_OPS),
        (torch.float64, 32, []),
        (torch.float16, 32, []),
        (torch.float32, 12, []),
        (torch.float32, 136, []),
    ],
)
def test_native_code_runs_where_the_docstring_says(
    dtype: torch.dtype, head_dim: int, ops: list[str], record, needs_native: None
) -> None:
    qkv = randn(7, 3, 2, head_dim, dtype=dtype).requires_grad_()

    def used() -> list[str]:
        with record() as called:
            attention(qkv, stream([3, 4]), 4).sum().backward()
        return [op for op in called if op.startswith("minbert::attention")]

    assert used() == ops
    with use_backend("reference"):
        assert used() == []


def test_the_gradient_cannot_be_differentiated(needs_native: None) -> None:
    qkv = randn(7, 3, 2, 8).requires_grad_()
    (grad,) = torch.autograd.grad(attention(qkv, stream([7]), 7).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="attention: its native gradient cannot be differentiated again"):
        grad.sum().backward()


def test_second_derivatives_by_the_reference() -> None:
    qkv = randn(7, 3, 2, 8).requires_grad_()
    with use_backend("reference"):
        (grad,) = torch.autograd.grad(attention(qkv, stream([7]), 7).square().sum(), qkv, create_graph=True)
    grad.sum().backward()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph_for_any_lengths(backend: str, needs_native: None) -> None:
    def layer(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        qkv = torch.cat([x, 2 * x, x + 1], dim=1).unflatten(1, (3, 2, 16))
        return attention(qkv, cu_seqlens, max_seqlen, dropout_p=0.2, seed=SEED, stream_id=3).flatten(1)

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for lengths in ([5, 9], [3, 3, 17], [40]):
        x = randn(sum(lengths), 32).requires_grad_()
        results = [f(x, stream(lengths), max(lengths)) for f in (layer, compiled)]
        grads = [torch.autograd.grad(result.square().sum(), x)[0] for result in results]
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(grads[1], grads[0])


def test_compiled_code_refuses_wrong_lengths(needs_native: None) -> None:
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"attention: cu_seqlens must end at the number of tokens, 20, got 21"):
        compiled(randn(20, 3, 2, 16), stream([10, 11]), 11)


@pytest.mark.parametrize("op", ["attention", "attention_backward"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck(op: str, p: float, needs_native: None) -> None:
    qkv = randn(9, 3, 2, 8).requires_grad_()
    arguments = (qkv, stream([4, 5]), 5, p, SEED if p else None, 1, 0.3, None, None)
    if op == "attention_backward":
        arguments = (randn(9, 2, 8, seed=1), qkv.detach(), *arguments[1:], None, None)
    torch.library.opcheck(getattr(torch.ops.minbert, op).default, arguments)


def test_isas_agree(needs_native: None) -> None:
    qkv, grad_out, results = randn(90, 3, 4, 32), randn(90, 4, 32, seed=1), {}
    for name in native.library().isas():
        native.library().set_isa(name)
        results[name] = run(qkv, [27, 63], grad_out, 0.2)
    for result in results.values():
        torch.testing.assert_close(result, results["portable"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "lengths", "head_dim", "scale", "pairs"),
    [
        (torch.bfloat16, [17, 3], 32, None, True),
        (torch.bfloat16, [80], 64, -0.3, True),
        (torch.bfloat16, [16, 3], 32, None, False),
        (torch.bfloat16, [40], 40, None, False),
        (torch.bfloat16, [40], 32, 0.0, False),
        (torch.float32, [40], 32, None, False),
    ],
)
def test_bfloat16_is_multiplied_in_pairs_where_the_docstring_says(
    dtype: torch.dtype, lengths: list[int], head_dim: int, scale: float | None, pairs: bool, needs_native: None
) -> None:
    """Rounded probabilities tell: elsewhere the products are those of avx512, to the bit."""
    if "avx512bf16" not in native.library().isas():
        pytest.skip("this processor has no avx512bf16")
    qkv, grad_out = randn(sum(lengths), 3, 4, head_dim, dtype=dtype), randn(sum(lengths), 4, head_dim, dtype=dtype)
    results = []
    for name in ("avx512", "avx512bf16"):
        native.library().set_isa(name)
        results.append(run(qkv, lengths, grad_out, 0.1, softmax_scale=scale))
    assert [torch.equal(a, b) for a, b in zip(*results, strict=True)] == [not pairs] * 2
