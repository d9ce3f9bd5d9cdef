"""A call of every op that a device runs, forward and backward, on fixed inputs: for tests and `minbert doctor`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adamw import adamw_, combine_adamw_
from .attention import attention
from .dropout import attention_dropout_mask, dropout, dropout_mask
from .embedding import embedding
from .encoder_layers import LayerParameters, PackedLayers, encoder_layers
from .first_token_attention import first_token_attention
from .gelu import bias_gelu
from .layer_norm import dropout_add_layer_norm
from .linear import linear
from .smart import smart_ascend, smart_init
from .split_float32 import split_float32
from .surgery import combine, gram, surgery_weights
from .weightings import WEIGHTING_RULES, task_weights, weighting_state_size

Call = Callable[[], list[Tensor]]

STREAM_ID, P, EPS, TASKS = 3, 0.1, 1e-12, 3
PARTS = (1, 0, 1, 1, 0)  # of the model, for the tensors of the update's ops
ADAMW: dict[str, Any] = {"step": 3, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SHORT = (27, 5, 31, 1, 30, 12)  # tokens of the sequences; row-wise ops have those of these


class Sizes(NamedTuple):
    """Sizes of an encoder, and lists of sequences for attention."""

    heads: int
    hidden: int
    inner: int
    vocabulary: int
    longer: dict[str, tuple[int, ...]]


USUAL = Sizes(12, 768, 3072, 900, {"medium": (100, 64, 33, 128, 1), "long": (200, 513, 40)})
SMALL = Sizes(2, 64, 160, 90, {"medium": (70, 33, 1)})


def calls(
    device: torch.device | str, dtypes: Sequence[torch.dtype] | None = None, *, sizes: Sizes = USUAL, copies: int = 1
) -> dict[str, Call]:
    """By the op's name and the kind of call, calls that return all that the op computes, in memory of its own.

    Args:
        dtypes: of activations; float32 when left out, on GPUs the half precisions too.
        copies: how many times over each list of sequences is taken.
    """
    on_cpu = torch.device(device).type == "cpu"
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    def integers(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator).to(device)

    heads, hidden, inner, vocabulary, longer = sizes
    seed = torch.tensor([-(2**40) + 77, 70]).to(device)
    drop: dict[str, Any] = {"seed": seed, "stream_id": STREAM_ID}
    lengths = SHORT * copies
    rows = sum(lengths)
    bounds = [0, rows // 3, rows // 3, rows]  # the second task has no rows

    def stream(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).int().to(device)

    def views(*shape: int) -> list[Tensor]:
        return [randn(*shape)] * TASKS

    found: dict[str, Call] = {}
    for dtype in dtypes or ((torch.float32,) if on_cpu else (torch.float32, torch.float16, torch.bfloat16)):
        name = str(dtype).removeprefix("torch.")
        for kind, sequences in {"short": SHORT, **longer}.items():
            sequences *= copies
            problem: dict[str, Any] = {
                "cu_seqlens": stream(sequences),
                "max_seqlen": max(sequences),
                "dropout_p": P,
                **drop,
            }
            qkv = randn(sum(sequences), 3, heads, hidden // heads, dtype=dtype)
            attend = functools.partial(attention, **problem)
            found[f"attention, {kind}, {name}"] = _both_ways(attend, [], qkv)
            first = functools.partial(first_token_attention, **problem)
            queries = qkv[: len(sequences), 0].contiguous()
            found[f"first_token_attention, {kind}, {name}"] = _both_ways(first, [], queries, qkv[:, 1:].contiguous())
        if on_cpu:  # it has no kernels on GPUs
            shapes: Sequence[tuple[int, ...]] = (
                (3 * hidden, hidden),
                (hidden, hidden),
                (hidden,),
                (2 * hidden, hidden),
                (hidden, 2 * hidden),
                (hidden,),
            )
            of_layer = (randn(*size) for shape in shapes for size in (shape, shape[:1]))
            layers = PackedLayers([LayerParameters(*of_layer)], heads=heads, eps=EPS, dtype=dtype)
            encode = functools.partial(
                encoder_layers, randn(rows, hidden, dtype=dtype), layers, stream(lengths), max(lengths)
            )
            found[f"encoder_layers, {name}"] = functools.partial(_alone, encode)
        activation = functools.partial(randn, rows, dtype=dtype)
        add_norm = functools.partial(dropout_add_layer_norm, eps=EPS, dropout_p=P, bounds=bounds, **drop)
        params = [views(hidden), views(hidden)]
        found[f"dropout_add_layer_norm, {name}"] = _both_ways(add_norm, params, activation(hidden), activation(hidden))
        gelu = functools.partial(bias_gelu, bounds=bounds)
        found[f"bias_gelu, {name}"] = _both_ways(gelu, [views(inner)], activation(inner))
        found[f"dropout, {name}"] = _both_ways(functools.partial(dropout, p=P, **drop), [], activation(hidden))
        multiply = functools.partial(linear, bounds=bounds)
        found[f"linear, {name}"] = _both_ways(multiply, [views(inner, hidden), views(inner)], activation(hidden))
        embed = functools.partial(embedding, eps=EPS, dropout_p=P, dtype=dtype, bounds=bounds, **drop)
        tables = [views(size, hidden) for size in (vocabulary, 2, 64)]
        ids = [integers(size, rows) for size in (vocabulary, 2, 64)]
        found[f"embedding, {name}"] = _both_ways(embed, [*tables, *params], *ids)
        x, perturbed, gradient = activation(hidden), activation(hidden), activation(hidden)
        found[f"smart_init, {name}"] = functools.partial(_alone, functools.partial(smart_init, x, sigma=0.3, **drop))
        ascend = functools.partial(smart_ascend, perturbed, x, gradient, stream(lengths), eta=0.1, epsilon=0.2)
        for norm, per in itertools.product(("inf", "2"), ("token", "sequence")):
            found[f"smart_ascend {norm} per {per}, {name}"] = functools.partial(_ascend, ascend, norm, per)

    found["dropout_mask"] = lambda: [dropout_mask(rows, 77, P, seed, STREAM_ID)]
    if on_cpu:
        found["attention_dropout_mask"] = lambda: [attention_dropout_mask(stream(lengths), heads, P, seed, STREAM_ID)]
    shapes = [(vocabulary, hidden), (hidden,), (hidden, 33), (1,), (70001,)]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        grads = [[randn(*shape, dtype=dtype) for shape in shapes] for _ in range(TASKS)]
        weights, by_part = randn(TASKS).double(), randn(2, TASKS).double()
        state = [[randn(*shape).abs() for shape in shapes] for _ in range(3)]
        found[f"gram, {name}"] = functools.partial(_alone, functools.partial(gram, grads))
        found[f"combine, {name}"] = functools.partial(_combined, grads, weights)
        found[f"combine_adamw_, {name}"] = functools.partial(_update, combine_adamw_, state, grads, weights)
        found[f"combine_adamw_, split, {name}"] = functools.partial(_split_update, state, grads, weights)
        found[f"gram by parts, {name}"] = functools.partial(_alone, functools.partial(gram, grads, PARTS))
        found[f"combine by parts, {name}"] = functools.partial(_combined, grads, by_part, PARTS)
        update = functools.partial(combine_adamw_, parts=PARTS)
        found[f"combine_adamw_ by parts, {name}"] = functools.partial(_update, update, state, grads, by_part)
        found[f"adamw_, {name}"] = functools.partial(_update, adamw_, state, grads[0])
    matrix = gram(grads)
    orders = torch.stack([torch.randperm(TASKS, generator=generator) for _ in range(TASKS)]).to(device)
    found["surgery_weights, PCGrad"] = lambda: list(surgery_weights(matrix, orders=orders, max_norm=1.0))
    of_parts, their_orders = gram(grads, PARTS), orders.repeat(2, 1, 1)
    found["surgery_weights, by parts"] = lambda: list(surgery_weights(of_parts, orders=their_orders, max_norm=1.0))
    found["surgery_weights, given"] = lambda: list(surgery_weights(matrix, weights=weights, max_norm=1.0))
    inputs = {"losses": randn(TASKS).double().exp(), "noise": randn(TASKS).double(), "orders": orders}
    for rule in WEIGHTING_RULES:
        found[f"task_weights, {rule}"] = functools.partial(_two_weightings, matrix, rule, inputs)
    return found


def _both_ways(op: Callable[..., Tensor], params: Sequence[Sequence[Tensor]], *inputs: Tensor) -> Call:
    """The op of `inputs` and of one view per task of each parameter; its result and all gradients."""

    def call() -> list[Tensor]:
        own = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        views = [[view.detach().requires_grad_() for view in row] for row in params]
        out = op(*own, *views)
        wanted = [x for x in (*own, *(view for row in views for view in row)) if x.requires_grad]
        grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)]

    return call


def _alone(op: Callable[[], Tensor]) -> list[Tensor]:
    return [op()]


def _combined(grads: Sequence[Sequence[Tensor]], weights: Tensor, parts: Sequence[int] | None = None) -> list[Tensor]:
    return [tensor for tensor in combine(grads, weights, parts=parts) if tensor is not None]


def _ascend(ascend: Callable[..., Tensor], norm: str, per: str) -> list[Tensor]:
    return [ascend(norm=norm, per=per, projection=projection) for projection in ("ball", "unit")]


def _two_weightings(matrix: Tensor, rule: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The weights of two calls, and the state after them."""
    known, size = WEIGHTING_RULES[rule], weighting_state_size(rule, TASKS)
    own: dict[str, Tensor] = {name: inputs[name] for name in known.needs}
    if size:
        own["state"] = matrix.new_zeros(size)
    options = [option.default for option in known.options]
    weights = [task_weights(matrix, rule, options, **own) for _ in range(2)]
    return [*weights, own["state"]] if size else weights


def _update(op: Callable[..., None], state: Sequence[Sequence[Tensor]], *grads: Any) -> list[Tensor]:
    """Parameters and moments after a step, from copies of them."""
    params, first, second = ([tensor.clone() for tensor in tensors] for tensors in state)
    op(params, *grads, first, second, **ADAMW)
    return [*params, *first, *second]


def _split_update(
    state: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor]], weights: Tensor
) -> list[Tensor]:
    """The same of split parameters, with a moving average."""
    params, low_bits = zip(*map(split_float32, state[0]), strict=True)
    first, second, ema = ([tensor.clone() for tensor in state[i]] for i in (1, 2, 0))
    combine_adamw_(params, grads, weights, first, second, low_bits=low_bits, ema=ema, ema_decay=0.9, **ADAMW)
    return [*params, *low_bits, *first, *second, *ema]
