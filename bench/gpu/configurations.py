"""Every configuration of the Triton kernels that is shipped, with its limits on registers and shared memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from minbert.kernels.attention_plan import tile_rows
from minbert.kernels.reference import drop_threshold
from minbert.kernels.triton import (
    attention,
    dropout,
    embedding,
    first_token_attention,
    gelu,
    layer_norm,
    row_tiles,
    segment_sums,
)

ARCHITECTURES = (80, 90, 100)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Compilation:
    """A kernel as one of its launches compiles it.

    Args:
        name: unique, such as "attention forward, bf16, head dim 64, 32 rows".
        kernel: the function that `triton.jit` made.
        signature: argument -> type ("*bf16", "i32", "fp32"), without the constants.
        constants: argument -> value of those that are tl.constexpr.
        divisible: the arguments that are divisible by 16 in every launch: aligned pointers, strides of whole rows.
        num_warps, num_stages: as launched.
        registers, shared_memory: the limits for a thread and a program, in 4-byte registers and bytes.
        architectures: on which it is launched.
        options: other launch options. Every launch asks for fused multiply-adds, whatever Triton's default is.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    registers: int = 255
    shared_memory: int = 99 * 1024  # of sm_86 and sm_89, the least of those we ship for
    architectures: tuple[int, ...] = ARCHITECTURES
    options: Mapping[str, Any] = field(default_factory=lambda: row_tiles.OPTIONS)


def compilations() -> list[Compilation]:
    """All of them; a compilation that several launches share is listed once."""
    found: list[Compilation] = []
    attention_kernels = (*_attention(), *_first_token_attention())
    row_wise = (*_dropout(), *_embedding(), *_gelu(), *_layer_norm(), *_segment_sums())
    for each in (*attention_kernels, *row_wise):
        if each not in found:
            found.append(each)
    return found


# Attention -------------------------------------------------------------------------------------------------------


def _attention() -> Iterator[Compilation]:
    """bf16 with heads of 64 elements in full; of the rest, what dropout and tiles make largest."""
    found: dict[tuple[Any, torch.dtype, int, attention.Shape, int, bool, bool], tuple[int, ...]] = {}
    for dtype, head_dim in [
        *((torch.bfloat16, head_dim) for head_dim in (64, 32, 40, 128)),
        *((torch.float16, 64), (torch.float32, 32), (torch.float32, 64), (torch.float32, 128)),
    ]:
        full = (dtype, head_dim) == (torch.bfloat16, 64)
        for architecture, drops in itertools.product(ARCHITECTURES, (True, False) if full else (True,)):
            for max_seqlen in (32, 64, 128, 256, 512, 1024):
                shapes = attention.shapes_for(head_dim, dtype, max_seqlen, divmod(architecture, 10))
                launches = (
                    attention.forward_launch(shapes, max_seqlen),
                    *attention.backward_launches(shapes, max_seqlen),
                )
                for launch in launches:
                    tiled = tile_rows(max_seqlen) is not None and "tiles" in launch.kernel.arg_names
                    for planned in (True, False) if tiled and full else (tiled,):
                        heads = launch.together(drops)
                        key = (launch.kernel, dtype, head_dim, launch.shape, heads, drops, planned)
                        if architecture not in found.get(key, ()):
                            found[key] = (*found.get(key, ()), architecture)
    for key, architectures in found.items():
        yield _attention_launch(*key, architectures)


def _attention_launch(
    kernel: Any,
    dtype: torch.dtype,
    head_dim: int,
    shape: attention.Shape,
    heads: int,
    drops: bool,
    planned: bool,
    architectures: tuple[int, ...],
) -> Compilation:
    types = {
        **dict.fromkeys(("qkv", "out", "grad_out", "grad_qkv"), POINTERS[dtype]),
        **dict.fromkeys(("lse", "delta"), "*fp32"),
        **dict.fromkeys(("cu_seqlens", *(("tiles", "starts") if planned else ())), "*i32"),
        **dict.fromkeys(("keep_scale", "scale"), "fp32"),
        **({"seed": "*i64"} if drops else {}),
    }
    constants: dict[str, Any] = {"D": head_dim, "PAD": attention.padded(head_dim), "HEADS": heads, "DROPOUT": drops}
    constants |= {"QUERIES": shape.queries, "KEYS": shape.keys, "tiles": None, "starts": None, "seed": None}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name in types or name not in constants}
    strides = [name for name in signature if name.endswith("stride") and head_dim % 16 == 0]
    return Compilation(
        f"attention {kernel.fn.__name__.replace('_', ' ')}, {POINTERS[dtype][1:]}, head dim {head_dim}, "
        f"{shape.queries} queries, {shape.keys} keys, {heads} heads, {shape.num_warps} warps, {shape.num_stages} stages"
        f"{f', {shape.maxnreg} registers' if shape.maxnreg else ''}"
        f"{', dropout' if drops else ''}{', tiles' if planned else ''}",
        kernel,
        signature,
        {name: constants[name] for name in kernel.arg_names if name not in signature},
        (*(name for name, kind in signature.items() if kind.startswith("*")), *strides),
        shape.num_warps,
        shape.num_stages,
        architectures=architectures,
        options=shape.options,
    )


def _first_token_attention() -> Iterator[Compilation]:
    for dtype, head_dim, drops in [
        *((torch.bfloat16, head_dim, True) for head_dim in (32, 40, 64, 128)),
        *((dtype, 64, drops) for dtype in (torch.float16, torch.float32) for drops in (True, False)),
    ]:
        for kernel in (first_token_attention.forward_kernel, first_token_attention.backward_kernel):
            names = [name for name in kernel.arg_names if name.islower() and (drops or name != "seed")]
            types = {"cu_seqlens": "*i32", "seed": "*i64", "keep_scale": "fp32", "scale": "fp32"}
            types |= dict.fromkeys(("stream_id", "threshold", "heads"), "i32")
            constants: dict[str, Any] = {"D": head_dim, "PAD": first_token_attention.padded(head_dim)}
            constants |= {"KEYS": first_token_attention.KEYS, "DROPOUT": drops} | ({} if drops else {"seed": None})
            signature = {name: types.get(name, POINTERS[dtype]) for name in names}
            way = kernel.fn.__name__.removesuffix("_kernel")
            options = dict(first_token_attention.OPTIONS)
            yield Compilation(
                f"first token attention {way}, {POINTERS[dtype][1:]}, head dim {head_dim}"
                f"{', dropout' if drops else ''}",
                kernel,
                signature,
                constants,
                tuple(name for name, kind in signature.items() if kind.startswith("*")),
                options.pop("num_warps"),
                options.pop("num_stages"),
                options=options,
            )


# Row-wise ops ----------------------------------------------------------------------------------------------------


def _cases() -> Iterator[tuple[int, torch.dtype, float]]:
    """Columns, dtypes and dropout probabilities: each branch of the kernels."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from ((columns, dtype, 0.1) for columns in (64, 130, 384, 768, 1024, row_tiles.LARGEST))
        yield 768, dtype, 0.0
    yield 768, torch.float16, 0.1


def _row_wise(
    name: str,
    kernel: Any,
    shape: row_tiles.Shape,
    dtype: torch.dtype,
    activations: Sequence[str],
    others: Mapping[str, Any],
    *,
    p: float | None = None,
    options: Mapping[str, Any] = row_tiles.OPTIONS,
    constants: Mapping[str, Any] | None = None,
) -> Compilation:
    """A kernel with tiles of that shape.

    Args:
        activations: the arguments that are tensors of `dtype`.
        others: argument -> type.
        p: of dropout, for kernels with dropout.
        constants: further ones of the kernel.
    """
    types = {**dict.fromkeys(activations, POINTERS[dtype]), **others}
    constants = {**(constants or {}), "SHAPE": shape}
    if "numbers" in kernel.arg_names and "numbers" not in types:
        constants["numbers"] = None
    title = f"{name}, {POINTERS[dtype][1:]}, {shape.columns} columns"
    if p is not None:
        title += ", dropout" if p else ""
        types |= {"scale": "fp32", "stream_id": "i32"} | ({"seed": "*i64"} if p else {})
        constants |= {"THRESHOLD": drop_threshold(p)} | ({} if p else {"seed": None})
    aligned = [name for name, kind in types.items() if kind[0] == "*" and (shape.columns % 8 == 0 or name == "seed")]
    return Compilation(
        title, kernel, types, constants, tuple(aligned), shape.warps, 3, shared_memory=16384, options=options
    )


CHUNKS = {"bounds": segment_sums.signature(3), "chunk": "i32"}


def _dropout() -> Iterator[Compilation]:
    for columns, dtype, p in _cases():
        if p:
            shape = row_tiles.whole(columns)
            yield _row_wise("dropout", dropout.dropout_kernel, shape, dtype, ("x", "y"), {"end": "i32"}, p=p)


def _layer_norm() -> Iterator[Compilation]:
    name, forward, backward = "layer norm", layer_norm.forward_kernel, layer_norm.backward_kernel
    vectors = dict.fromkeys(("weight", "bias", "mean_rstd"), "*fp32") | {"end": "i32", "eps": "fp32"}
    sums = dict.fromkeys(("weight", "mean_rstd", "partials"), "*fp32") | CHUNKS
    for columns, dtype, p in _cases():
        case = row_tiles.whole(columns), dtype
        for numbers in (None, "*i32") if p else (None,):
            title = f"{name}{' of numbered rows' if numbers else ''}"
            given = {"numbers": numbers} if numbers else {}
            yield _row_wise(f"{title} forward", forward, *case, ("x", "residual", "y"), vectors | given, p=p)
            activations = ("d_y", "d_x", "x", "residual", "d_residual")
            roomy = row_tiles.ROOMY
            yield _row_wise(f"{title} backward", backward, *case, activations, sums | given, p=p, options=roomy)


def _gelu() -> Iterator[Compilation]:
    cases = [(columns, dtype) for columns in (1536, 3072, 70) for dtype in (torch.float32, torch.bfloat16)]
    vectors = {"bias": "*fp32", "partials": "*fp32"} | CHUNKS
    for columns, dtype in [*cases, (3072, torch.float16)]:
        case = row_tiles.band(columns, gelu.ROWS), dtype
        yield _row_wise("GELU forward", gelu.forward_kernel, *case, ("x", "y"), {"bias": "*fp32", "end": "i32"})
        yield _row_wise("GELU backward", gelu.backward_kernel, *case, ("d_y", "x", "d_x"), vectors)


def _embedding() -> Iterator[Compilation]:
    ids = dict.fromkeys(("token_ids", "token_type_ids", "position_ids"), "*i64")
    tables = dict.fromkeys(("word_table", "token_type_table", "position_table"), "*fp32")
    tables |= ids | dict.fromkeys(("weight", "mean_rstd"), "*fp32")
    forward: dict[str, Any] = {**tables, "bias": "*fp32", "end": "i32", "eps": "fp32"}
    backward = {**tables, **dict.fromkeys(("d_total", "partials"), "*fp32"), **CHUNKS}
    sizes = {"SIZES": (30522, 2, 512)}
    for columns, dtype, p in _cases():
        case = row_tiles.whole(columns), dtype
        yield _row_wise("embedding forward", embedding.forward_kernel, *case, ("y",), forward, p=p, constants=sizes)
        kernel, roomy = embedding.backward_kernel, row_tiles.ROOMY
        yield _row_wise("embedding backward", kernel, *case, ("d_y",), backward, p=p, options=roomy, constants=sizes)
    numbers: dict[str, Any] = {**ids, "keys": "*i32", "bounds": segment_sums.signature(3), "count": "i32"}
    constants: dict[str, Any] = {**sizes, "TOKENS": embedding.TOKENS}
    aligned: tuple[str, ...] = (*ids, "keys")
    yield Compilation("numbers of the tables' rows", embedding.number_rows_kernel, numbers, constants, aligned, 4, 3)
    joined = {"keys": "*i32", "out": "*fp32", "parts": "*fp32", "entries": "i32"}
    summed = {**joined, "order": "*i64", "d_total": "*fp32", "tokens": "i32"}
    for columns in (384, 768, 130):
        constants = {"COLUMNS": columns, "PIECE": embedding.PIECE, "SPAN": embedding.SPAN}
        aligned = ("keys", "out", "parts") if columns % 4 == 0 else ("keys",)
        more = ("order", "d_total") if columns % 4 == 0 else ("order",)
        title, options = f"pieces, {columns} columns", (embedding.SPAN_WARPS, 3)
        kernel = embedding.sum_pieces_kernel
        yield Compilation(f"sums of {title}", kernel, summed, constants, aligned + more, *options)
        constants = {**constants, "PIECES": embedding.PIECES}
        yield Compilation(f"sums over {title}", embedding.join_pieces_kernel, joined, constants, aligned, *options)


def _segment_sums() -> Iterator[Compilation]:
    sizes = {"CHUNKS": segment_sums.CHUNKS, "BLOCK": segment_sums.BLOCK}
    for tasks, columns in ((1, 3072), (3, 2 * 768), (3, 2 * 130)):
        bounds = segment_sums.signature(tasks)
        yield Compilation(
            f"sums over rows, {tasks} tasks, {columns} columns",
            segment_sums.sum_chunks_kernel,
            {"partials": "*fp32", "out": "*fp32", "bounds": bounds, "rows": "i32"},
            {"COLUMNS": columns, **sizes},
            ("partials", "out"),
            segment_sums.WARPS,
            3,
            registers=96,
            shared_memory=4096,
        )
