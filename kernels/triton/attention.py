"""Attention's launches: which kernel takes a batch, and in which shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import reference
from ..attention_plan import AttentionProblem, tile_rows
from .attention_kernels import backward_keys, backward_queries, backward_whole, forward_blocks, forward_whole


class Shape(NamedTuple):
    """Of a launch: rows in its blocks of queries and of keys, and Triton's options."""

    queries: int
    keys: int
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int | None = None  # of a thread; left alone, ptxas may spill registers to get by with 128 or 168

    @property
    def options(self) -> dict[str, Any]:
        return {"enable_fp_fusion": True, **({"maxnreg": self.maxnreg} if self.maxnreg else {})}


class Shapes(NamedTuple):
    """Of all kernels. A tile's rows give `forward` and `backward`, if they have it: else blocks do its work."""

    forward: Mapping[int, Shape]
    backward: Mapping[int, Shape]
    blocks: Shape  # of the forward, for tiles
    long_blocks: Shape  # the same for sequences beyond them
    query_blocks: Shape  # of the backward
    key_blocks: Shape


# Chosen so that no register spills. First heads of 32 and 64 elements in half precision, then others, which need masks
# or more registers.
_HALF = Shapes(
    forward={32: Shape(32, 32, num_stages=2)},
    backward={32: Shape(16, 32, maxnreg=168)},
    blocks=Shape(64, 32, maxnreg=255),
    long_blocks=Shape(64, 32, num_stages=2, maxnreg=255),
    query_blocks=Shape(64, 32),
    key_blocks=Shape(32, 64, maxnreg=255),
)
_HOPPER = Shapes(  # has matrix instructions for 64 rows, and takes them from shared memory
    forward={32: Shape(32, 32, num_stages=3), 64: Shape(64, 64, num_stages=2)},
    backward={32: Shape(32, 32), 64: Shape(32, 64), 128: Shape(32, 128, num_warps=8)},
    blocks=Shape(64, 64, num_stages=2),
    long_blocks=Shape(128, 64, num_warps=8, num_stages=2),
    query_blocks=Shape(128, 64, num_warps=8, num_stages=2),
    key_blocks=Shape(64, 128, num_warps=8),
)
_OTHER_HEADS = Shapes(
    forward={32: Shape(32, 32, num_stages=2, maxnreg=255)},
    backward={32: Shape(32, 32, num_warps=8, maxnreg=255)},
    blocks=Shape(32, 32, num_stages=2, maxnreg=255),
    long_blocks=Shape(32, 32, num_stages=2, maxnreg=255),
    query_blocks=Shape(32, 32, num_stages=2, maxnreg=255),
    key_blocks=Shape(32, 32, maxnreg=255),
)
_FLOAT32 = Shapes(
    forward={32: Shape(32, 32)},
    backward={32: Shape(16, 32, num_warps=8, maxnreg=224), 64: Shape(16, 64, num_warps=16, maxnreg=128)},
    blocks=Shape(32, 16, maxnreg=255),
    long_blocks=Shape(32, 16, maxnreg=255),
    query_blocks=Shape(16, 32, maxnreg=255),
    key_blocks=Shape(16, 32, maxnreg=255),
)
_FLOAT32_LARGE_HEADS = Shapes(
    forward={},
    backward={},
    blocks=Shape(32, 16, num_warps=8, maxnreg=255),
    long_blocks=Shape(32, 16, num_warps=8, maxnreg=255),
    query_blocks=Shape(16, 16, num_warps=8, maxnreg=255),
    key_blocks=Shape(16, 32, num_warps=8, maxnreg=255),
)


def padded(head_dim: int) -> int:
    return max(32, triton.next_power_of_2(head_dim))


def shapes_for(head_dim: int, dtype: torch.dtype, max_seqlen: int, capability: tuple[int, int]) -> Shapes:
    if dtype == torch.float32:
        return _FLOAT32 if head_dim <= 64 else _FLOAT32_LARGE_HEADS
    if head_dim not in (32, 64):
        return _OTHER_HEADS
    return _HOPPER if capability[0] == 9 and max_seqlen <= 512 else _HALF


def _arguments(problem: AttentionProblem, *, planned: bool) -> dict[str, Any]:
    """The arguments of all kernels; numbers of 32 bits as int32, so that they share one compilation.

    Args:
        planned: whether the kernels take the plan's tiles, if there is a plan; else they take sequences.
    """
    qkv = problem.qkv
    tokens, _, heads, head_dim = qkv.shape
    threshold = reference.drop_threshold(problem.dropout_p)
    return {
        "qkv": qkv,
        "cu_seqlens": problem.cu_seqlens,
        "tiles": problem.tile_bounds if planned else None,
        "starts": problem.starts if planned else None,
        "seed": problem.seed,
        "threshold": threshold - (threshold >> 31 << 32),
        "stream_id": problem.stream_id - (problem.stream_id >> 31 << 32),
        "keep_scale": 1 / (1 - problem.dropout_p),
        "scale": problem.scale,
        "tokens": tokens,
        "heads": heads,
        "token_stride": qkv.stride(0),
        "part_stride": qkv.stride(1),
        "head_stride": qkv.stride(2),
        "D": head_dim,
        "PAD": padded(head_dim),
        "DROPOUT": problem.seed is not None,
    }


class Launch(NamedTuple):
    kernel: Any
    shape: Shape
    programs: int  # of a tile, for each group of heads
    blocks: int  # that a program goes through

    def together(self, dropout: bool) -> int:
        """Heads of a program: as many as share random words, if 32 bits hold what dropout keeps in all the blocks."""
        return next((heads for heads in (4, 2) if heads * self.blocks <= 32), 1) if dropout else 1

    def __call__(self, arguments: dict[str, Any]) -> None:
        table = arguments["tiles"]
        tiles = arguments["cu_seqlens"].shape[0] - 1 if table is None else table.shape[0]
        together = self.together(arguments["DROPOUT"])
        blocks = {"blocks": self.programs, "QUERIES": self.shape.queries, "KEYS": self.shape.keys, "HEADS": together}
        given = arguments | blocks
        self.kernel[(tiles * self.programs, triton.cdiv(arguments["heads"], together))](
            **{name: given[name] for name in self.kernel.arg_names},
            num_warps=self.shape.num_warps,
            num_stages=self.shape.num_stages,
            **self.shape.options,
        )


def forward_launch(shapes: Shapes, max_seqlen: int) -> Launch:
    rows = tile_rows(max_seqlen)
    if rows is not None and rows in shapes.forward:
        return Launch(forward_whole, shapes.forward[rows], 1, 1)
    shape, longest = (shapes.long_blocks, max_seqlen) if rows is None else (shapes.blocks, rows)
    return Launch(forward_blocks, shape, triton.cdiv(longest, shape.queries), triton.cdiv(longest, shape.keys))


def backward_launches(shapes: Shapes, max_seqlen: int) -> list[Launch]:
    """One launch if it takes whole tiles. Else two, in this order, that take sequences."""
    rows = tile_rows(max_seqlen)
    if rows is not None and rows in shapes.backward:
        shape = shapes.backward[rows]
        return [Launch(backward_whole, shape, 1, shape.keys // shape.queries)]
    first, then = shapes.query_blocks, shapes.key_blocks
    return [
        Launch(backward_queries, first, triton.cdiv(max_seqlen, first.queries), triton.cdiv(max_seqlen, first.keys)),
        Launch(backward_keys, then, triton.cdiv(max_seqlen, then.keys), triton.cdiv(max_seqlen, then.queries)),
    ]


def compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)  # else it is interpreted


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """The result [N, H, d], and lse [H, N], which is written where the backward goes over blocks."""
    qkv, max_seqlen = problem.qkv, problem.max_seqlen
    tokens, _, heads, head_dim = qkv.shape
    out, lse = qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(heads, tokens, dtype=torch.float32)
    shapes = shapes_for(head_dim, qkv.dtype, max_seqlen, compute_capability(qkv.device))
    arguments = _arguments(problem, planned=tile_rows(max_seqlen) is not None) | {"out": out, "lse": lse}
    with torch.cuda.device_of(qkv):
        forward_launch(shapes, max_seqlen)(arguments)
    return out, lse


def attention_backward(grad_out: Tensor, problem: AttentionProblem, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient of qkv, contiguous. The elements of grad_out's heads lie next to each other."""
    qkv, max_seqlen = problem.qkv, problem.max_seqlen
    shapes = shapes_for(qkv.shape[3], qkv.dtype, max_seqlen, compute_capability(qkv.device))
    launches = backward_launches(shapes, max_seqlen)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    arguments = _arguments(problem, planned=len(launches) == 1) | {
        "out": out,
        "lse": lse,
        "delta": torch.empty_like(lse),
        "grad_out": grad_out,
        "grad_token_stride": grad_out.stride(0),
        "grad_head_stride": grad_out.stride(1),
        "grad_qkv": grad_qkv,
    }
    with torch.cuda.device_of(qkv):
        for launch in launches:
            launch(arguments)
    return grad_qkv
