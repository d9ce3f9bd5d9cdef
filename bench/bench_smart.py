"""SMART's perturbations, against the same in eager PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minbert.kernels import reference, smart_ascend, smart_init

SIGMA, ETA, EPSILON = 0.01, 0.01, 0.01
SEED = torch.tensor([1, 0])
SIZES = {
    "26 x 100 x 384": (26, 100, 384),
    "32 x 256 x 768": (32, 256, 768),
}  # tokens a sequence, sequences, hidden size
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest, smoke: bool) -> tuple[int, int, int]:
    return (7, 3, 32) if smoke else SIZES[request.param]


def eager_start(x: Tensor) -> Tensor:
    return x + SIGMA * torch.randn_like(x)


def eager_ascent(perturbed: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    moved = perturbed + ETA * grad / grad.abs().amax(dim=1, keepdim=True)
    return x + (moved - x).clamp(-EPSILON, EPSILON)


def eager_l2_ascent(perturbed: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    offset = perturbed + ETA * grad / grad.norm(dim=1, keepdim=True) - x
    return x + offset * (EPSILON / offset.norm(dim=1, keepdim=True)).clamp(max=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_start(race, size: tuple[int, int, int], dtype: str) -> None:
    length, sequences, columns = size
    x = torch.randn(length * sequences, columns).to(DTYPES[dtype])
    target = torch.empty_like(x)
    functions = {
        "minbert smart_init": lambda: smart_init(x, sigma=SIGMA, seed=SEED, stream_id=0),
        "copy": lambda: target.copy_(x),
        "eager": lambda: eager_start(x),
        "reference": lambda: reference.smart_init(x, SIGMA, SEED, 0),
    }
    moved = dict.fromkeys(("minbert smart_init", "copy"), 2 * x.nbytes)
    race(f"smart_init, {list(x.shape)} {dtype}", functions, moved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["inf", "2"])
def test_ascent(race, size: tuple[int, int, int], dtype: str, norm: str) -> None:
    length, sequences, columns = size
    x = torch.randn(length * sequences, columns).to(DTYPES[dtype])
    perturbed, grad, target = (
        smart_init(x, sigma=SIGMA, seed=SEED, stream_id=0),
        torch.randn_like(x),
        torch.empty_like(x),
    )
    cu_seqlens = torch.arange(sequences + 1, dtype=torch.int32) * length
    eager = eager_ascent if norm == "inf" else eager_l2_ascent

    def ascend(per: str) -> Tensor:
        return smart_ascend(perturbed, x, grad, cu_seqlens, eta=ETA, epsilon=EPSILON, norm=norm, per=per)

    torch.testing.assert_close(
        ascend("token").float(), eager(perturbed.float(), x.float(), grad.float()), rtol=0.01, atol=1e-6
    )
    functions = {
        "minbert smart_ascend": lambda: ascend("token"),
        "minbert smart_ascend, per sequence": lambda: ascend("sequence"),
        "copy": lambda: target.copy_(x),
        "eager": lambda: eager(perturbed, x, grad),
        "reference": lambda: reference.smart_ascend(
            perturbed, x, grad, cu_seqlens, ETA, EPSILON, norm, "token", "ball"
        ),
    }
    moved = dict.fromkeys(("minbert smart_ascend", "minbert smart_ascend, per sequence"), 4 * x.nbytes)
    race(f"smart_ascend {norm}, {list(x.shape)} {dtype}", functions, {**moved, "copy": 2 * x.nbytes})
