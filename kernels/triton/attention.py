"""Attention's launches: which kernel takes a batch, in which shape, and all of them for compiling ahead."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import reference
from ..attention_plan import tile_rows
from .ahead import ARCHITECTURES, Compilation
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


def _padded(head_dim: int) -> int:
    return max(32, triton.next_power_of_2(head_dim))


def _shapes(head_dim: int, dtype: torch.dtype, max_seqlen: int, capability: tuple[int, int]) -> Shapes:
    if dtype == torch.float32:
        return _FLOAT32 if head_dim <= 64 else _FLOAT32_LARGE_HEADS
    if head_dim not in (32, 64):
        return _OTHER_HEADS
    return _HOPPER if capability[0] == 9 and max_seqlen <= 512 else _HALF


def _arguments(
    qkv: Tensor, cu_seqlens: Tensor, dropout_p: float, seed: Tensor | None, stream_id: int, scale: float
) -> dict[str, Any]:
    """What all kernels take; numbers of 32 bits as int32, so that they share one compilation."""
    tokens, _, heads, head_dim = qkv.shape
    threshold = reference.drop_threshold(dropout_p)
    return {
        "qkv": qkv,
        "cu_seqlens": cu_seqlens,
        "seed": seed,
        "threshold": threshold - (threshold >> 31 << 32),
        "stream_id": stream_id - (stream_id >> 31 << 32),
        "keep_scale": 1 / (1 - dropout_p),
        "scale": scale,
        "tokens": tokens,
        "heads": heads,
        "token_stride": qkv.stride(0),
        "part_stride": qkv.stride(1),
        "head_stride": qkv.stride(2),
        "D": head_dim,
        "PAD": _padded(head_dim),
        "DROPOUT": seed is not None,
    }


class Launch(NamedTuple):
    kernel: Any
    shape: Shape
    programs: int  # of a tile, for each group of heads
    blocks: int  # that a program goes through

    def together(self, dropout: bool) -> int:
        """Heads of a program: as many as share random words, if 32 bits hold what dropout keeps in all the blocks."""
        return next((heads for heads in (4, 2) if heads * self.blocks <= 32), 1) if dropout else 1

    def __call__(self, tiles: int, arguments: dict[str, Any]) -> None:
        together = self.together(arguments["DROPOUT"])
        blocks = {"blocks": self.programs, "QUERIES": self.shape.queries, "KEYS": self.shape.keys, "HEADS": together}
        given = arguments | blocks
        self.kernel[(tiles * self.programs, triton.cdiv(arguments["heads"], together))](
            **{name: given[name] for name in self.kernel.arg_names},
            num_warps=self.shape.num_warps,
            num_stages=self.shape.num_stages,
            **self.shape.options,
        )


def _forward(shapes: Shapes, max_seqlen: int) -> Launch:
    rows = tile_rows(max_seqlen)
    if rows is not None and rows in shapes.forward:
        return Launch(forward_whole, shapes.forward[rows], 1, 1)
    shape, longest = (shapes.long_blocks, max_seqlen) if rows is None else (shapes.blocks, rows)
    return Launch(forward_blocks, shape, triton.cdiv(longest, shape.queries), triton.cdiv(longest, shape.keys))


def _backward(shapes: Shapes, max_seqlen: int) -> list[Launch]:
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


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)  # else it is interpreted


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor | None,
    stream_id: int,
    scale: float,
    tiles: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result [N, H, d], and lse [H, N], which holds something where the backward goes over blocks."""
    tokens, _, heads, head_dim = qkv.shape
    out, lse = qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(heads, tokens, dtype=torch.float32)
    if tile_rows(max_seqlen) is None:
        tiles = starts = None
    arguments = _arguments(qkv, cu_seqlens, dropout_p, seed, stream_id, scale)
    arguments |= {"tiles": tiles, "starts": starts, "out": out, "lse": lse}
    shapes = _shapes(head_dim, qkv.dtype, max_seqlen, _capability(qkv.device))
    with torch.cuda.device_of(qkv):
        _forward(shapes, max_seqlen)(cu_seqlens.shape[0] - 1 if tiles is None else tiles.shape[0], arguments)
    return out, lse


def attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor | None,
    stream_id: int,
    scale: float,
    tiles: Tensor | None,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    """The gradient of qkv, contiguous. The elements of grad_out's heads lie next to each other."""
    launches = _backward(_shapes(qkv.shape[3], qkv.dtype, max_seqlen, _capability(qkv.device)), max_seqlen)
    if len(launches) > 1:
        tiles = starts = None
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    arguments = _arguments(qkv, cu_seqlens, dropout_p, seed, stream_id, scale)
    arguments |= {"tiles": tiles, "starts": starts, "out": out, "lse": lse, "delta": torch.empty_like(lse)}
    arguments |= {"grad_out": grad_out, "grad_token_stride": grad_out.stride(0), "grad_head_stride": grad_out.stride(1)}
    arguments |= {"grad_qkv": grad_qkv}
    with torch.cuda.device_of(qkv):
        for launch in launches:
            launch(cu_seqlens.shape[0] - 1 if tiles is None else tiles.shape[0], arguments)
    return grad_qkv


def compilations() -> Iterator[Compilation]:
    """bf16 with heads of 64 elements in full; of the rest, what dropout and tiles make largest."""
    found: dict[tuple[Any, torch.dtype, int, Shape, int, bool, bool], tuple[int, ...]] = {}
    for dtype, head_dim in [
        *((torch.bfloat16, head_dim) for head_dim in (64, 32, 40, 128)),
        *((torch.float16, 64), (torch.float32, 32), (torch.float32, 64), (torch.float32, 128)),
    ]:
        full = (dtype, head_dim) == (torch.bfloat16, 64)
        for architecture, dropout in itertools.product(ARCHITECTURES, (True, False) if full else (True,)):
            for max_seqlen in (32, 64, 128, 256, 512, 1024):
                shapes = _shapes(head_dim, dtype, max_seqlen, divmod(architecture, 10))
                for launch in (_forward(shapes, max_seqlen), *_backward(shapes, max_seqlen)):
                    tiled = tile_rows(max_seqlen) is not None and "tiles" in launch.kernel.arg_names
                    for table in (True, False) if tiled and full else (tiled,):
                        heads = launch.together(dropout)
                        key = (launch.kernel, dtype, head_dim, launch.shape, heads, dropout, table)
                        if architecture not in found.get(key, ()):
                            found[key] = (*found.get(key, ()), architecture)
    for key, architectures in found.items():
        yield _compilation(*key, architectures)


def _compilation(
    kernel: Any,
    dtype: torch.dtype,
    head_dim: int,
    shape: Shape,
    heads: int,
    dropout: bool,
    table: bool,
    architectures: tuple[int, ...],
) -> Compilation:
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {
        **dict.fromkeys(("qkv", "out", "grad_out", "grad_qkv"), element),
        **dict.fromkeys(("lse", "delta"), "*fp32"),
        **dict.fromkeys(("cu_seqlens", *(("tiles", "starts") if table else ())), "*i32"),
        **dict.fromkeys(("keep_scale", "scale"), "fp32"),
        **({"seed": "*i64"} if dropout else {}),
    }
    constants: dict[str, Any] = {"D": head_dim, "PAD": _padded(head_dim), "HEADS": heads, "DROPOUT": dropout}
    constants |= {"QUERIES": shape.queries, "KEYS": shape.keys, "tiles": None, "starts": None, "seed": None}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name in types or name not in constants}
    strides = [name for name in signature if name.endswith("stride") and head_dim % 16 == 0]
    return Compilation(
        f"attention {kernel.fn.__name__.replace('_', ' ')}, {element[1:]}, head dim {head_dim}, "
        f"{shape.queries} queries, {shape.keys} keys, {heads} heads, {shape.num_warps} warps, {shape.num_stages} stages"
        f"{f', {shape.maxnreg} registers' if shape.maxnreg else ''}"
        f"{', dropout' if dropout else ''}{', tiles' if table else ''}",
        kernel,
        signature,
        {name: constants[name] for name in kernel.arg_names if name not in signature},
        (*(name for name, kind in signature.items() if kind.startswith("*")), *strides),
        shape.num_warps,
        shape.num_stages,
        architectures=architectures,
        options=shape.options,
    )
