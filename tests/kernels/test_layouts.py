"""However their arguments lie in memory, ops give the reference's results or name the argument, and write nowhere else.

Each test moves the arguments of one op about: off aligned addresses, into every other column, transposed, expanded
from one row, emptied, into another dtype, or with a NaN or Inf inside. All memory that the op may touch lies between
guards: its arguments, and what it allocates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert import kernels
from minbert.kernels import use_backend

SEED, TOKENS = torch.tensor([3, 70]), 12
GUARD, PATTERN = 256, 0xA5  # bytes before and after each block; a multiple of the alignment that native code asks for
FLOATS = (torch.float32, torch.bfloat16)
REFUSED = (torch.int32, torch.float16, torch.float32, torch.float64)  # each is the wrong dtype for some argument
STEP = {"step": 3, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
Arguments = dict[str, Tensor]


class Memory:
    """Blocks of memory between guards."""

    def __init__(self) -> None:
        self.blocks: list[tuple[Tensor, int]] = []
        self.empty_strided = torch.empty_strided

    def block(self, elements: int, dtype: torch.dtype) -> Tensor:
        size = elements * dtype.itemsize
        buffer = self.empty_strided((size + 2 * GUARD,), (1,), dtype=torch.uint8).fill_(PATTERN)
        self.blocks.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(dtype)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
        """What torch.empty gives, or torch.empty_like."""
        strides = (
            torch.empty(shape, device="meta").stride() if like is None else torch.empty_like(like.to("meta")).stride()
        )
        return self.block(math.prod(shape), dtype).as_strided(shape, strides)

    def check(self) -> None:
        for buffer, size in self.blocks:
            assert (buffer[:GUARD] == PATTERN).all(), "written before a block"
            assert (buffer[GUARD + size :] == PATTERN).all(), "written behind a block"

    def bytes(self) -> list[Tensor]:
        return [buffer.clone() for buffer, _ in self.blocks]


# Layouts ---------------------------------------------------------------------------------------------------------


def plain(value: Tensor, memory: Memory) -> Tensor:
    return memory.block(value.numel(), value.dtype).view(value.shape).copy_(value)


def unaligned(value: Tensor, memory: Memory) -> Tensor:
    return memory.block(value.numel() + 3, value.dtype)[3:].view(value.shape).copy_(value)


def strided(value: Tensor, memory: Memory) -> Tensor:
    if value.dim() == 0:
        return plain(value, memory)
    *rows, columns = value.shape
    return memory.block(2 * value.numel(), value.dtype).view(*rows, 2 * columns)[..., ::2].copy_(value)


def gapped(value: Tensor, memory: Memory) -> Tensor:
    """Elements next to each other, rows not."""
    if value.dim() == 0:
        return plain(value, memory)
    *rows, columns = value.shape
    wide = memory.block(math.prod(rows) * (columns + 5), value.dtype).view(*rows, columns + 5)
    return wide[..., :columns].copy_(value)


def transposed(value: Tensor, memory: Memory) -> Tensor:
    return plain(value.mT, memory).mT if value.dim() > 1 else plain(value, memory)


def expanded(value: Tensor, memory: Memory) -> Tensor:
    return plain(value[:1], memory).expand(value.shape) if value.dim() else plain(value, memory)


def emptied(value: Tensor, memory: Memory) -> Tensor:
    return plain(value[:0], memory) if value.dim() else plain(value, memory)


def as_dtype(dtype: torch.dtype) -> Callable[[Tensor, Memory], Tensor]:
    return lambda value, memory: plain(value.to(dtype), memory)


def holding(poison: float) -> Callable[[Tensor, Memory], Tensor]:
    def poisoned(value: Tensor, memory: Memory) -> Tensor:
        value = plain(value, memory)
        if value.is_floating_point():
            value.view(-1)[value.numel() // 2] = poison
        return value

    return poisoned


LAYOUTS = [plain, unaligned, strided, gapped, transposed, expanded, emptied]
POISONED = [holding(poison) for poison in (math.nan, math.inf, -math.inf)]
LAYOUTS += [as_dtype(dtype) for dtype in REFUSED] + POISONED
TAKEN = [plain, unaligned, *POISONED]  # by every op


# Ops -------------------------------------------------------------------------------------------------------------


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lists(arguments: Arguments, name: str) -> list[Tensor]:
    return [arguments[f"{name}[{k}]"] for k in range(2)]


def task_lists(arguments: Arguments) -> list[list[Tensor]]:
    return [lists(arguments, f"grads[{task}]") for task in range(2)]


def updated(op: Callable[..., None], arguments: Arguments, *grads: Any) -> list[Tensor]:
    params, *moments = (lists(arguments, name) for name in ("params", "exp_avgs", "exp_avg_sqs"))
    op(params, *grads, *moments, **STEP)
    return [*params, *moments[0], *moments[1]]


def arguments_of(op: str, columns: int, dtype: torch.dtype) -> Arguments:
    x, residual, grad = (randn(TOKENS, columns, seed=i, dtype=dtype) for i in range(3))
    weight, bias = randn(columns, seed=3), randn(columns, seed=4)
    cu_seqlens, seed = torch.tensor([0, 5, TOKENS], dtype=torch.int32), SEED
    shapes = [(5, 7), (130,)]
    grads = {f"grads[{t}][{k}]": randn(*shapes[k], seed=5 + 2 * t + k, dtype=dtype) for t in range(2) for k in range(2)}
    parts = ("params", "exp_avgs", "exp_avg_sqs")
    state = {f"{part}[{k}]": randn(*shapes[k], seed=9 + k).abs() + 0.1 for part in parts for k in range(2)}
    weights = torch.tensor([0.5, -2.0], dtype=torch.float64)
    sizes = {"token": 20, "token_type": 2, "position": TOKENS}
    ids = {f"{name}_ids": torch.arange(TOKENS) % size for name, size in sizes.items()}
    tables = [randn(size, columns, seed=20 + size, dtype=dtype) for size in sizes.values()]
    return {
        "attention": {"qkv": randn(TOKENS, 3, 2, 16, seed=0, dtype=dtype), "cu_seqlens": cu_seqlens, "seed": seed},
        "dropout_add_layer_norm": {"x": x, "residual": residual, "weight": weight, "bias": bias, "seed": seed},
        "bias_gelu": {"x": x, "bias": bias},
        "embedding": {
            **ids,
            **dict(zip(("word", "token_type", "position"), tables, strict=True)),
            **{"weight": weight, "bias": bias, "seed": seed},
        },
        "linear": {"x": x, "weight": randn(7, columns, seed=1, dtype=dtype), "bias": randn(7, seed=2, dtype=dtype)},
        "dropout": {"x": x, "seed": seed},
        "gram": grads,
        "combine": {**grads, "weights": weights, **{f"out[{k}]": grads[f"grads[0][{k}]"] * 0 for k in range(2)}},
        "adamw_": {**state, **{f"grads[{k}]": grads[f"grads[0][{k}]"] for k in range(2)}},
        "combine_adamw_": {**state, **grads, "weights": weights},
        "smart_init": {"x": x, "seed": seed},
        "smart_ascend": {"perturbed": x + 0.1 * residual, "x": x, "grad": grad, "cu_seqlens": cu_seqlens},
    }[op]


DROP = {"dropout_p": 0.3, "stream_id": 2}
CALLS: dict[str, Callable[[Arguments], Any]] = {
    "attention": lambda a: kernels.attention(a["qkv"], a["cu_seqlens"], 7, seed=a["seed"], **DROP),
    "dropout_add_layer_norm": lambda a: kernels.dropout_add_layer_norm(**a, eps=0.1, **DROP),
    "bias_gelu": lambda a: kernels.bias_gelu(**a),
    "embedding": lambda a: kernels.embedding(**a, eps=0.1, **DROP),
    "linear": lambda a: kernels.linear(**a),
    "dropout": lambda a: kernels.dropout(**a, p=0.3, stream_id=2),
    "gram": lambda a: kernels.gram(task_lists(a)),
    "combine": lambda a: kernels.combine(task_lists(a), a["weights"], lists(a, "out")),
    "adamw_": lambda a: updated(kernels.adamw_, a, lists(a, "grads")),
    "combine_adamw_": lambda a: updated(kernels.combine_adamw_, a, task_lists(a), a["weights"]),
    "smart_init": lambda a: kernels.smart_init(**a, sigma=0.5, stream_id=2),
    "smart_ascend": lambda a: kernels.smart_ascend(**a, eta=0.1, epsilon=0.2, norm="2", per="sequence"),
}
DIFFERENTIABLE = ("attention", "dropout_add_layer_norm", "bias_gelu", "embedding", "linear", "dropout")
IN_PLACE = {"combine": "out", "adamw_": ("params", "exp_avg"), "combine_adamw_": ("params", "exp_avg")}


def results_of(op: str, arguments: Arguments, upstream: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What the op returns, and where it has them the gradients of its arguments."""
    if op not in DIFFERENTIABLE:
        results = CALLS[op](arguments)
        return results if isinstance(results, list) else [results]
    leaves = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in arguments.items()}
    output = CALLS[op](leaves)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, upstream(output))]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Guards around everything that Python code allocates."""
    memory, empty, empty_like, new_empty = Memory(), torch.empty, torch.empty_like, Tensor.new_empty

    def guarded_empty(*shape: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
        if options:
            return empty(*shape, dtype=dtype, **options)
        return memory.empty(tuple(empty(*shape, device="meta").shape), dtype)

    def guarded_like(like: Tensor, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if options or like.device.type != "cpu":
            return empty_like(like, dtype=dtype, **options)
        return memory.empty(tuple(like.shape), dtype or like.dtype, like)

    def guarded_zeros(*shape: Any, **options: Any) -> Tensor:
        return guarded_empty(*shape, **options).zero_()

    def guarded_new(self: Tensor, *shape: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if options or self.device.type != "cpu":
            return new_empty(self, *shape, dtype=dtype, **options)
        return guarded_empty(*shape, dtype=dtype or self.dtype)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    monkeypatch.setattr(torch, "empty_like", guarded_like)
    monkeypatch.setattr(torch, "zeros", guarded_zeros)
    monkeypatch.setattr(Tensor, "new_empty", guarded_new)
    return memory


@pytest.mark.parametrize("op", CALLS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_result_like_the_references_or_an_error_that_names_the_argument(isa, op, memory, data) -> None:
    columns, dtype = data.draw(st.sampled_from([48, 53])), data.draw(st.sampled_from(FLOATS))
    values = arguments_of(op, columns, dtype)
    moved = data.draw(st.sets(st.sampled_from(sorted(values)), max_size=2))
    layouts = {name: data.draw(st.sampled_from(LAYOUTS)) if name in moved else plain for name in values}
    upstream_layout = data.draw(st.sampled_from(LAYOUTS[:6]))
    memory.blocks.clear()
    arguments = {name: layouts[name](value, memory) for name, value in values.items()}
    copies = {name: argument.clone(memory_format=torch.contiguous_format) for name, argument in arguments.items()}
    before = memory.bytes()

    def upstream(output: Tensor, where: Memory | None = None) -> Tensor:
        return upstream_layout(randn(*output.shape, seed=99, dtype=torch.bfloat16).to(output.dtype), where or Memory())

    try:
        results = results_of(op, arguments, lambda output: upstream(output, memory))
    except (ValueError, TypeError) as error:
        message = str(error)
        assert message.startswith(f"{op}: ")
        assert "\n" not in message
        assert any(re.search(rf"(?<![\w\[]){re.escape(name)}(?![\w\[])", message[len(op) :]) for name in values)
        assert any(layouts[name] not in TAKEN for name in moved)
        for (buffer, _), bytes_before in zip(memory.blocks, before, strict=False):
            assert torch.equal(buffer, bytes_before)
        return
    memory.check()
    results = [result.clone() for result in results]
    for name, bytes_before, (buffer, _) in zip(values, before, memory.blocks, strict=False):
        if name.startswith(IN_PLACE.get(op, ())):
            arguments[name].copy_(copies[name])  # its own elements may have changed, what lies between them may not
        assert torch.equal(buffer, bytes_before), f"{name} has changed"
    with use_backend("reference"):
        expected = results_of(op, copies, upstream)
    tolerance = 2e-2 if any(result.dtype in (torch.bfloat16, torch.float16) for result in expected) else 2e-5
    for result, wanted in zip(results, expected, strict=True):
        finite = wanted.isfinite()
        assert torch.equal(result.isfinite(), finite)  # sums of Infs may be NaN in one order and Inf in another
        torch.testing.assert_close(result[finite], wanted[finite], rtol=tolerance, atol=tolerance)
