"""The specification against independent float64 formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minbert import kernels
from minbert.kernels import reference

SEED, P = torch.tensor([123456789012345, 2**32 - 3]), 0.3
CU_SEQLENS = torch.tensor([0, 1, 6, 19, 24], dtype=torch.int32)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + eps).sqrt() * weight + bias


def test_attention_is_scaled_dot_product_attention_of_each_sequence() -> None:
    qkv = randn(24, 3, 5, 8)
    expected = []
    for start, end in zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), strict=True):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)
        expected.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    torch.testing.assert_close(kernels.attention(qkv, CU_SEQLENS, 13), torch.cat(expected), rtol=1e-12, atol=1e-13)


def test_attention_scale_can_be_given() -> None:
    qkv, halved = randn(24, 3, 5, 8), randn(24, 3, 5, 8)
    halved[:, 0] *= 0.5
    torch.testing.assert_close(
        kernels.attention(qkv, CU_SEQLENS, 13, softmax_scale=0.5 / math.sqrt(8)),
        kernels.attention(halved, CU_SEQLENS, 13),
    )


def test_attention_drops_probabilities_after_the_softmax() -> None:
    qkv, heads = randn(24, 3, 5, 8), 5
    keep = reference.attention_dropout_mask(CU_SEQLENS, heads, P, SEED, 2)
    result = kernels.attention(qkv, CU_SEQLENS, 13, dropout_p=P, seed=SEED, stream_id=2)
    at = 0
    for start, end in zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), strict=True):
        for head in range(heads):
            q, k, v = qkv[start:end, :, head].unbind(1)
            weights = np.exp((q @ k.T / math.sqrt(8)).numpy())
            weights /= weights.sum(1, keepdims=True)
            kept = keep[at : at + weights.size].view(weights.shape).numpy()
            at += weights.size
            torch.testing.assert_close(result[start:end, head], torch.from_numpy(weights * kept / (1 - P)) @ v)
    assert at == len(keep)


def test_masks_read_the_words_that_their_description_names() -> None:
    def kept(counter: tuple[int, ...], word: int) -> bool:
        words = reference.philox(tuple(map(torch.tensor, counter)), SEED[0])
        return int(words[word]) >= int(P * 2**32)

    numbers = [2**32 - 3, 2**32 - 2, 2**32 - 1, 0, 1]  # of rows

    keep = reference.dropout_mask(3, 10, P, SEED, 7)
    assert all(keep[row, c] == kept((c // 4, numbers[row], 0, 7), c % 4) for row in range(3) for c in range(10))
    blocks = reference.attention_dropout_mask(torch.tensor([0, 2, 5]), 6, P, SEED, 7)[6 * 4 :].view(6, 3, 3)
    for head, query, key in np.ndindex(6, 3, 3):
        assert blocks[head, query, key] == kept((key, numbers[2 + query], head // 4, 7), head % 4)


def test_dropout_add_layer_norm_is_its_formula() -> None:
    x, residual, weight, bias = randn(9, 6), randn(9, 6, seed=1), randn(6, seed=2), randn(6, seed=3)
    result = kernels.dropout_add_layer_norm(x, residual, weight, bias, eps=1e-3, dropout_p=P, seed=SEED, stream_id=1)
    keep = reference.dropout_mask(9, 6, P, SEED, 1)
    torch.testing.assert_close(result, normalise(residual + torch.where(keep, x / (1 - P), 0.0), weight, bias, 1e-3))


def test_bias_gelu_is_its_formula() -> None:
    x, bias = randn(9, 6) * 3, randn(6, seed=1)
    expected = [[z * 0.5 * math.erfc(-z / math.sqrt(2)) for z in row] for row in (x + bias).tolist()]
    torch.testing.assert_close(
        kernels.bias_gelu(x, bias), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("repeats", [1, 40], ids=["one by one", "in vectors"])
def test_bias_gelu_of_any_number_is_its_formula_in_low_precision(dtype: torch.dtype, repeats: int) -> None:
    kernels.set_backend("reference")
    largest = torch.finfo(dtype).max
    numbers = [math.inf, -math.inf, math.nan, largest, -largest, 1.7e38, 1e20, -1e20, 30.0, -30.0, 3.0, -3.0, 0.0]
    x = torch.tensor(numbers * repeats, dtype=dtype)[None].requires_grad_()
    y = kernels.bias_gelu(x, torch.zeros(x.shape[1]))
    y.sum().backward()
    exact = x.detach().double()
    distribution = torch.tensor([0.5 * math.erfc(-z / math.sqrt(2)) for z in exact[0].tolist()], dtype=torch.float64)
    density = (-0.5 * exact**2).exp() / math.sqrt(2 * math.pi)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(y.detach().double(), exact * distribution, **tolerance)
    torch.testing.assert_close(x.grad.double(), distribution + exact * density, **tolerance)


def test_embedding_is_its_formula() -> None:
    word, token_type, position = randn(7, 6), randn(2, 6, seed=1), randn(5, 6, seed=2)
    weight, bias = randn(6, seed=3), randn(6, seed=4)
    tokens, types, positions = torch.tensor([6, 0, 3, 3]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 4])
    result = kernels.embedding(
        tokens,
        types,
        positions,
        word,
        token_type,
        position,
        weight,
        bias,
        eps=1e-3,
        dropout_p=P,
        seed=SEED,
        stream_id=0,
    )
    normed = normalise(word[tokens] + token_type[types] + position[positions], weight, bias, 1e-3)
    keep = reference.dropout_mask(4, 6, P, SEED, 0)
    torch.testing.assert_close(result, torch.where(keep, normed / (1 - P), 0.0))


@pytest.mark.parametrize("op", ["attention", "dropout_add_layer_norm", "bias_gelu", "embedding", "dropout"])
def test_gradients_agree_with_differences(op: str) -> None:
    drop = {"dropout_p": P, "seed": SEED, "stream_id": 3}
    ids = torch.tensor([2, 0, 1, 2])
    calls = {
        "attention": (
            lambda qkv: kernels.attention(qkv, torch.tensor([0, 3, 4], dtype=torch.int32), 3, **drop),
            [(4, 3, 2, 3)],
        ),
        "dropout_add_layer_norm": (
            lambda *tensors: kernels.dropout_add_layer_norm(*tensors, eps=1e-3, **drop),
            [(3, 5), (3, 5), (5,), (5,)],
        ),
        "bias_gelu": (kernels.bias_gelu, [(3, 5), (5,)]),
        "embedding": (
            lambda *tensors: kernels.embedding(ids, ids, ids, *tensors, eps=1e-3, **drop),
            [(3, 5), (3, 5), (3, 5), (5,), (5,)],
        ),
        "dropout": (lambda x: kernels.dropout(x, p=P, seed=SEED, stream_id=3), [(3, 5)]),
    }
    function, shapes = calls[op]
    assert torch.autograd.gradcheck(
        function, [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    kernels.set_backend("reference")
    qkv, x, vector = randn(24, 3, 5, 8).to(dtype), randn(24, 40).to(dtype), randn(40, seed=1).to(dtype)
    for half, single in [
        (kernels.attention(qkv, CU_SEQLENS, 13), kernels.attention(qkv.float(), CU_SEQLENS, 13)),
        (kernels.bias_gelu(x, vector), kernels.bias_gelu(x.float(), vector.float())),
        (
            kernels.dropout_add_layer_norm(x, x, vector, vector, eps=1e-5),
            kernels.dropout_add_layer_norm(x.float(), x.float(), vector.float(), vector.float(), eps=1e-5),
        ),
    ]:
        assert half.dtype == dtype
        assert torch.equal(half, single.to(dtype))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_follows_torch_over_many_steps(weight_decay: float) -> None:
    ours = [randn(4, 3), randn(5, seed=1)]
    theirs = [param.clone().requires_grad_() for param in ours]
    states = [[torch.zeros_like(p) for p in ours] for _ in range(2)]
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW(theirs, **options)
    for step in range(1, 101):
        for i, param in enumerate(theirs):
            param.grad = randn(*param.shape, seed=100 * step + i)
        kernels.adamw_(ours, [p.grad for p in theirs], *states, step=step, **options)
        optimizer.step()
    torch.testing.assert_close(ours, [p.detach() for p in theirs], rtol=1e-11, atol=1e-13)


def test_gram_and_combine_are_their_formulas() -> None:
    rows = randn(4, 50)
    grads = [[row[:20].view(4, 5), row[20:]] for row in rows]
    weights = randn(4, seed=1)
    torch.testing.assert_close(reference.gram(grads), torch.from_numpy(np.einsum("ip,jp->ij", rows, rows)))
    combined = reference.combine(grads, weights)
    torch.testing.assert_close(
        torch.cat([t.flatten() for t in combined]), torch.from_numpy(np.einsum("t,tp", weights, rows))
    )
