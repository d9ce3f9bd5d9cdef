"""Attention over packed sequences, forward and backward, against torch's over the padded batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import DECILES, lengths
from torch import Tensor

from minbert.kernels import attention, use_backend

HEADS, SEED = 12, torch.tensor(1)


def batch(kind: str, smoke: bool) -> list[int]:
    """Sequence lengths of one batch."""
    real = np.concatenate([lengths(task, 4 if smoke else 32, i) for i, task in enumerate(DECILES)]).tolist()
    return {"real": real, "real and 3 long": [*real[3:], 200, 350, 500], "16 x 128": [128] * 16, "4 x 512": [512] * 4}[
        kind
    ]


class Peer:
    """torch's scaled_dot_product_attention over the padded batch, with a mask."""

    def __init__(self, qkv: Tensor, grad_out: Tensor, sizes: list[int], dropout_p: float) -> None:
        self.sizes, self.dropout_p = sizes, dropout_p
        self.qkv, self.grad_out = self.pad(qkv.detach()), self.pad(grad_out)
        self.qkv = [part.contiguous().requires_grad_() for part in self.qkv.permute(2, 0, 3, 1, 4)]  # each [S, H, L, d]
        self.grad_out = self.grad_out.transpose(1, 2).contiguous()
        self.mask = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None])[:, None, None, :]

    def pad(self, x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(x.split(self.sizes), batch_first=True)

    def unpad(self, x: Tensor) -> Tensor:
        return torch.cat([row[:n] for row, n in zip(x, self.sizes, strict=True)])

    def forward(self) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv, attn_mask=self.mask, dropout_p=self.dropout_p)

    def both(self) -> None:
        torch.autograd.grad(self.forward(), self.qkv, self.grad_out)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("kind", ["real", "real and 3 long", "16 x 128", "4 x 512"])
def test_attention(race, smoke: bool, kind: str, head_dim: int, dtype: torch.dtype, dropout_p: float) -> None:
    sizes = batch(kind, smoke)
    tokens, cu_seqlens = sum(sizes), torch.tensor([0, *sizes]).cumsum(0).int()
    qkv = torch.randn(tokens, 3, HEADS, head_dim).to(dtype).requires_grad_()
    grad_out = torch.randn(tokens, HEADS, head_dim).to(dtype)
    source, target = torch.zeros(11, tokens * HEADS * head_dim, dtype=dtype).split([6, 5])

    def forward() -> Tensor:
        return attention(qkv, cu_seqlens, max(sizes), dropout_p=dropout_p, seed=SEED)

    def both() -> Tensor:
        return torch.autograd.grad(forward(), qkv, grad_out)[0]

    def by_reference() -> Tensor:
        with use_backend("reference"):
            return both()

    peer = Peer(qkv, grad_out, sizes, dropout_p)
    torch.testing.assert_close(both(), by_reference(), rtol=2e-2, atol=2e-2)
    functions: dict[str, Callable[[], object]] = {
        "minbert forward + backward": both,
        "minbert forward": forward,
        "torch SDPA forward + backward": peer.both,
        "torch SDPA forward": peer.forward,
        "pad q, k, v, unpad the result": lambda: peer.unpad(peer.pad(qkv.detach())[:, :, 0]),
        "reference": by_reference,
        "copy": lambda: target.copy_(source[:5]),
    }
    element = HEADS * head_dim * dtype.itemsize
    product = 2 * sum(n * n for n in sizes) * HEADS * head_dim  # scores, or probabilities times values
    race(
        f"attention {kind}, {HEADS} x {head_dim} {str(dtype).removeprefix('torch.')}, p {dropout_p}",
        functions,
        # qkv in, the result out; qkv and the result's gradient in, qkv's gradient out
        {
            "minbert forward + backward": 11 * tokens * element,
            "minbert forward": 4 * tokens * element,
            "copy": 10 * tokens * element,
        },
        {"minbert forward + backward": 7 * product, "minbert forward": 2 * product},
    )
