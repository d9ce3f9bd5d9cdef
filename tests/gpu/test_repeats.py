"""No result depends on timing: every op gives the same bits each time, whatever else the device does meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minbert.kernels import dispatch
from minbert.kernels.example_calls import calls

REPEATS = 250
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(INTEGERS[x.dtype.itemsize])


def differing(results: list[Tensor], others: list[Tensor]) -> Tensor:
    """In how many elements; a tensor, so that nothing waits for it."""
    pairs = zip(results, others, strict=True)
    return torch.stack([(bits(one) != bits(other)).sum() for one, other in pairs]).sum()


def poison(results: list[Tensor]) -> None:
    """Leave NaN, or bytes of 255, in the memory that the next results are likely to get."""
    junk = [torch.empty_like(result) for result in results]
    for tensor in junk:
        bits(tensor).fill_(-1 if tensor.dtype.itemsize > 1 else 255)


def test_every_op_has_a_call():
    called = {name.split(",")[0].split(" ")[0] for name in calls("cpu")}
    assert set(dispatch.OPS) == called


def test_ops_repeat_themselves_to_the_bit_on_the_cpu():
    for name, call in calls("cpu").items():
        first = call()
        poison(first)
        assert differing(first, call()) == 0, name


@pytest.mark.gpu
def test_ops_repeat_themselves_to_the_bit_while_other_streams_are_busy(cuda):
    streams = [torch.cuda.Stream() for _ in range(2)]
    noise = [torch.randn(1024, 1024, device=cuda) for _ in streams]
    torch.cuda.synchronize()
    wrong = {}
    for name, call in calls(cuda, copies=8).items():
        first, changes = call(), torch.zeros((), dtype=torch.int64, device=cuda)
        for repeat in range(REPEATS):
            with torch.cuda.stream(streams[repeat % 2]):  # it ends at some time during the next calls
                for _ in range(repeat % 7):
                    noise[repeat % 2] = torch.tanh(noise[repeat % 2] @ noise[repeat % 2])
            poison(first)
            changes += differing(first, call())
        wrong[name] = changes
    assert {name: count.item() for name, count in wrong.items() if count.item()} == {}
