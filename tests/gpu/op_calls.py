"""A call of every op that a GPU runs, forward and backward, on fixed inputs: for repeats, graphs and sanitizers.

python tests/gpu/op_calls.py     each of them once, on small inputs that were made on the host
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minbert import kernels

Call = Callable[[], list[Tensor]]

STREAM_ID, P, EPS = 3, 0.1, 1e-12
HEADS, HIDDEN, INNER, VOCABULARY, TASKS = 12, 768, 3072, 900, 3
SHORT, MEDIUM, LONG = [27, 5, 31, 1, 30, 12], [100, 64, 33, 128, 1], [200, 513, 40]
ADAMW = {"step": 3, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def calls(device: torch.device | str, copies: int = 1) -> dict[str, Call]:
    """By name, calls that return all that the op computes, in memory of its own.

    Args:
        copies: how many times over each list of sequences is taken.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    def integers(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator).to(device)

    seed = torch.tensor([-(2**40) + 77, 70]).to(device)
    lengths = SHORT * copies
    rows = sum(lengths)
    bounds = [0, rows // 3, rows // 3, rows]  # the second task has no rows

    def stream(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).int().to(device)

    def both_ways(op: Callable[..., Tensor], params: Sequence[Sequence[Tensor]], *inputs: Tensor) -> Call:
        """The op of `inputs` and of one view per task of each parameter; its result and all gradients."""

        def call() -> list[Tensor]:
            own = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
            views = [[view.detach().requires_grad_() for view in row] for row in params]
            out = op(*own, *views)
            wanted = [x for x in (*own, *(view for row in views for view in row)) if x.requires_grad]
            grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
            return [out.detach(), *torch.autograd.grad(out, wanted, grad)]

        return call

    def views(*shape: int) -> list[Tensor]:
        return [randn(*shape)] * TASKS

    found: dict[str, Call] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if str(device) != "cpu" else (torch.float32,):
        name = str(dtype).removeprefix("torch.")
        for kind, sequences in (("short", lengths), ("medium", MEDIUM * copies), ("long", LONG * copies)):
            attention = functools.partial(
                lambda qkv, cu_seqlens, longest: kernels.attention(
                    qkv, cu_seqlens, longest, dropout_p=P, seed=seed, stream_id=STREAM_ID
                ),
                cu_seqlens=stream(sequences),
                longest=max(sequences),
            )
            qkv = randn(sum(sequences), 3, HEADS, HIDDEN // HEADS, dtype=dtype)
            found[f"attention, {kind}, {name}"] = both_ways(attention, [], qkv)
            first = functools.partial(
                lambda queries, keys_values, cu_seqlens, longest: kernels.first_token_attention(
                    queries, keys_values, cu_seqlens, longest, dropout_p=P, seed=seed, stream_id=STREAM_ID
                ),
                cu_seqlens=stream(sequences),
                longest=max(sequences),
            )
            queries = qkv[: len(sequences), 0].contiguous()
            found[f"first_token_attention, {kind}, {name}"] = both_ways(first, [], queries, qkv[:, 1:].contiguous())
        if str(device) == "cpu":  # it has no kernels on GPUs
            shapes = (
                (3 * HIDDEN, HIDDEN),
                (HIDDEN, HIDDEN),
                (HIDDEN,),
                (2 * HIDDEN, HIDDEN),
                (HIDDEN, 2 * HIDDEN),
                (HIDDEN,),
            )
            params = (randn(*size) for shape in shapes for size in (shape, shape[:1]))
            layers = kernels.PackedLayers([kernels.LayerParameters(*params)], heads=HEADS, eps=1e-12, dtype=dtype)
            encode = functools.partial(
                kernels.encoder_layers, randn(rows, HIDDEN, dtype=dtype), layers, stream(lengths), max(lengths)
            )
            found[f"encoder_layers, {name}"] = lambda encode=encode: [encode()]
        activation = functools.partial(randn, rows, dtype=dtype)
        add_norm = functools.partial(
            kernels.dropout_add_layer_norm, eps=EPS, dropout_p=P, seed=seed, stream_id=STREAM_ID, bounds=bounds
        )
        params = [views(HIDDEN), views(HIDDEN)]
        found[f"dropout_add_layer_norm, {name}"] = both_ways(add_norm, params, activation(HIDDEN), activation(HIDDEN))
        gelu = functools.partial(kernels.bias_gelu, bounds=bounds)
        found[f"bias_gelu, {name}"] = both_ways(gelu, [views(INNER)], activation(INNER))
        drop = functools.partial(kernels.dropout, p=P, seed=seed, stream_id=STREAM_ID)
        found[f"dropout, {name}"] = both_ways(drop, [], activation(HIDDEN))
        linear = functools.partial(kernels.linear, bounds=bounds)
        found[f"linear, {name}"] = both_ways(linear, [views(INNER, HIDDEN), views(INNER)], activation(HIDDEN))
        embed = functools.partial(
            kernels.embedding, eps=EPS, dropout_p=P, seed=seed, stream_id=STREAM_ID, dtype=dtype, bounds=bounds
        )
        tables = [views(size, HIDDEN) for size in (VOCABULARY, 2, 64)]
        ids = [integers(size, rows) for size in (VOCABULARY, 2, 64)]
        found[f"embedding, {name}"] = both_ways(embed, [*tables, *params], *ids)
        x, perturbed, gradient = activation(HIDDEN), activation(HIDDEN), activation(HIDDEN)
        found[f"smart_init, {name}"] = functools.partial(_start, x, seed)
        ascend = functools.partial(kernels.smart_ascend, perturbed, x, gradient, stream(lengths), eta=0.1, epsilon=0.2)
        for norm, per in itertools.product(("inf", "2"), ("token", "sequence")):
            found[f"smart_ascend {norm} per {per}, {name}"] = functools.partial(_ascend, ascend, norm, per)

    found["dropout_mask"] = lambda: [kernels.dropout_mask(rows, 77, P, seed, STREAM_ID)]
    shapes = [(VOCABULARY, HIDDEN), (HIDDEN,), (HIDDEN, 33), (1,), (70001,)]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        grads = [[randn(*shape, dtype=dtype) for shape in shapes] for _ in range(TASKS)]
        weights = randn(TASKS).double()
        state = [[randn(*shape).abs() for shape in shapes] for _ in range(3)]
        found[f"gram, {name}"] = lambda grads=grads: [kernels.gram(grads)]
        found[f"combine, {name}"] = lambda grads=grads, weights=weights: list(kernels.combine(grads, weights))
        found[f"combine_adamw_, {name}"] = functools.partial(_update, kernels.combine_adamw_, state, grads, weights)
        found[f"adamw_, {name}"] = functools.partial(_update, kernels.adamw_, state, grads[0])
    matrix = kernels.gram(grads)
    orders = torch.stack([torch.randperm(TASKS, generator=generator) for _ in range(TASKS)]).to(device)
    found["surgery_weights, PCGrad"] = lambda: list(kernels.surgery_weights(matrix, orders=orders, max_norm=1.0))
    found["surgery_weights, given"] = lambda: list(kernels.surgery_weights(matrix, weights=weights, max_norm=1.0))
    return found


def _start(x: Tensor, seed: Tensor) -> list[Tensor]:
    return [kernels.smart_init(x, sigma=0.3, seed=seed, stream_id=STREAM_ID)]


def _ascend(ascend: Callable[..., Tensor], norm: str, per: str) -> list[Tensor]:
    return [ascend(norm=norm, per=per, projection=projection) for projection in ("ball", "unit")]


def _update(op: Callable[..., None], state: Sequence[Sequence[Tensor]], *grads) -> list[Tensor]:
    """Parameters and moments after a step, from copies of them."""
    params, first, second = ([tensor.clone() for tensor in tensors] for tensors in state)
    op(params, *grads, first, second, **ADAMW)
    return [*params, *first, *second]


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: torch.cuda.is_available() is false")
    for name, call in calls("cuda").items():
        if name.startswith("linear"):  # not a kernel of ours
            continue
        sums = [result.double().sum() for result in call()]
        print(f"{name}: {sum(value.item() for value in sums):.6g}", flush=True)
