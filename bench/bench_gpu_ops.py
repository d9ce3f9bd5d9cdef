"""The encoder's ops on a GPU, forward and backward apart, against torch's and others' kernels and the floor."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import roofline
import torch
import torch.nn.functional as F
from batches import DECILES, lengths
from session import FOUND, Found
from timing import Numbered, input_sets
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minbert import kernels
from minbert.data.packing import pack

HEADS, HEAD_DIM, HIDDEN, INNER = 12, 64, 768, 3072
P, EPS = 0.1, 1e-12
MICROSECOND = 1e-6
BATCHES = {  # sequence lengths; the goals on an H100, forward and backward, in microseconds
    "96 x 28": ([28] * 96, 9, 22),
    "64 x 128": ([128] * 64, 25, 55),
    "16 x 512": ([512] * 16, 40, 150),
    "96 of real lengths": (
        np.concatenate([lengths(task, 32, i) for i, task in enumerate(DECILES)]).tolist(),
        None,
        None,
    ),
}
# Attention of packed sequences without dropout: the module, its function of q, k, v, cu_seqlens of queries and of keys,
# max_seqlen of both, and how many of the last four it takes by position.
WITHOUT_DROPOUT = {
    "torch varlen_attn": ("torch.nn.attention.varlen", "varlen_attn", 4),  # FlashAttention 2, from torch 2.10 on
    "FlashAttention 3": ("flash_attn_interface", "flash_attn_varlen_func", 4),
    "FlashAttention 4": ("flash_attn.cute", "flash_attn_varlen_func", 2),
}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def randn(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).bfloat16()


class Contest:
    """Contenders of an op's forward or backward, on sets of inputs; those that cannot run here are left out."""

    def __init__(self, case: str, way: str, found: Found) -> None:
        self.case, self.way, self.found = case, way, found
        self.contenders: dict[str, Numbered] = {}

    def add(
        self, name: str, make: Callable[[], Numbered], inputs: Sequence[Sequence[Tensor]], grads: Sequence[Tensor]
    ) -> None:
        """`make` gives the forward; the backward is that of its results, from `grads` to `inputs`."""
        try:
            forward = make()
            results = [forward(i) for i in range(len(inputs))]
            backward = lambda i: torch.autograd.grad(results[i], inputs[i], grads[i], retain_graph=True)  # noqa: E731
            backward(0)
        except Exception as error:  # whatever a library that is not ours finds to say
            if name == "minbert":
                raise
            self.found.leave_out(self.case, name, error)
        else:
            self.contenders[name] = forward if self.way == "forward" else backward


def result(returned: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What FlashAttention returns, in some versions beside the log-sum-exp."""
    return returned[0] if isinstance(returned, tuple) else returned


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dropout_p", [P, 0.0])
def test_attention(
    gpu_race,
    device: torch.device,
    request: pytest.FixtureRequest,
    smoke: bool,
    batch: str,
    way: str,
    dropout_p: float,
) -> None:
    sizes, *goals = BATCHES[batch]
    sizes = [min(n, 40) for n in sizes[:2]] if smoke else sizes
    tokens, longest = sum(sizes), max(sizes)
    stream = pack([[0] * n for n in sizes]).to(device)
    cu_seqlens = stream.cu_seqlens
    seed = torch.tensor(1, device=device)
    sets = input_sets(11 * tokens * HIDDEN * 2, device)
    packed = [randn(tokens, 3, HEADS, HEAD_DIM, device=device).requires_grad_() for _ in range(sets)]
    grads = [randn(tokens, HEADS, HEAD_DIM, device=device) for _ in range(sets)]

    def pad(x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(x.split(sizes), batch_first=True)

    mask = (torch.arange(longest) < torch.tensor(sizes)[:, None])[:, None, None, :].to(device)
    padded = [[p.contiguous().requires_grad_() for p in pad(x.detach()).permute(2, 0, 3, 1, 4)] for x in packed]
    padded_grads = [pad(grad).transpose(1, 2).contiguous() for grad in grads]

    def ours(i: int) -> Tensor:
        plan = stream.attention_plan
        return kernels.attention(packed[i], cu_seqlens, longest, dropout_p=dropout_p, seed=seed, plan=plan)

    def sdpa(backend: SDPBackend) -> Numbered:
        attn_mask = None if min(sizes) == longest else mask

        def forward(i: int) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*padded[i], attn_mask=attn_mask, dropout_p=dropout_p)

        return forward

    bounds = (cu_seqlens, cu_seqlens, longest, longest)  # of queries and keys

    def varlen(module: str, function: str, taken: int, *more: object) -> Callable[[], Numbered]:
        def make() -> Numbered:
            attend = getattr(importlib.import_module(module), function)
            return lambda i: result(attend(*packed[i].unbind(1), *bounds[:taken], *more))

        return make

    case = f"attention {way}, {batch}, p {dropout_p}"
    contest, inputs = Contest(case, way, request.config.stash[FOUND]), [[x] for x in packed]
    contest.add("minbert", lambda: ours, inputs, grads)
    for name, backend in BACKENDS.items():
        contest.add(f"SDPA {name}, padded", lambda backend=backend: sdpa(backend), padded, padded_grads)
    contest.add("FlashAttention 2", varlen("flash_attn", "flash_attn_varlen_func", 4, dropout_p), inputs, grads)
    for name, where in WITHOUT_DROPOUT.items():
        if dropout_p == 0:
            contest.add(name, varlen(*where), inputs, grads)
        else:
            contest.found.leave_out(case, name, "knows no dropout")
    goal = goals[way == "backward"]
    gpu_race(
        case,
        contest.contenders,
        roofline.attention(sizes, HEADS, HEAD_DIM, backward=way == "backward"),
        sets=sets,
        goal=goal and goal * MICROSECOND,
    )


@pytest.mark.parametrize("op", ["dropout_add_layer_norm", "bias_gelu"])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_rows(gpu_race, device: torch.device, request: pytest.FixtureRequest, smoke: bool, op: str, way: str) -> None:
    rows, columns = (16, 64) if smoke else (8192, HIDDEN if op == "dropout_add_layer_norm" else INNER)
    normalises = op == "dropout_add_layer_norm"
    sets = input_sets(5 * rows * columns * 2, device)
    activations = [[randn(rows, columns, device=device).requires_grad_() for _ in range(2)] for _ in range(sets)]
    grads = [randn(rows, columns, device=device) for _ in range(sets)]
    weight, bias = (torch.ones(columns, device=device, requires_grad=True) for _ in range(2))
    half = [param.detach().bfloat16().requires_grad_() for param in (weight, bias)]
    seed = torch.tensor(1, device=device)

    def ours(i: int) -> Tensor:
        x, residual = activations[i]
        if not normalises:
            return kernels.bias_gelu(x, bias)
        return kernels.dropout_add_layer_norm(x, residual, weight, bias, eps=EPS, dropout_p=P, seed=seed, stream_id=1)

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not normalises:
            return F.gelu(x + bias)
        return F.layer_norm(residual + F.dropout(x, P), (columns,), weight, bias, EPS)

    def liger() -> Numbered:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return lambda i: LigerLayerNormFunction.apply(activations[i][1] + F.dropout(activations[i][0], P), *half, EPS)

    def compiled() -> Numbered:
        from torch._functorch import config

        config.donated_buffer = False  # a backward that is timed keeps its graph
        function = torch.compile(eager)
        return lambda i: function(*activations[i], *half)

    def inputs(params: Sequence[Tensor]) -> list[list[Tensor]]:
        return [[*x, *params] if normalises else [x[0], params[-1]] for x in activations]

    case = f"{op} {way}, {rows} x {columns}"
    contest = Contest(case, way, request.config.stash[FOUND])
    contest.add("minbert", lambda: ours, inputs([weight, bias]), grads)
    contest.add("torch eager", lambda: lambda i: eager(*activations[i], *half), inputs(half), grads)
    if device.type == "cuda":
        contest.add("torch.compile", compiled, inputs(half), grads)
    if normalises:
        contest.add("eager dropout + Liger LayerNorm", liger, inputs(half), grads)
    goal = {"dropout_add_layer_norm": (20, 24), "bias_gelu": (40, 60)}[op][way == "backward"] * MICROSECOND
    floor = roofline.layer_norm if normalises else roofline.gelu
    work = floor(rows, columns, backward=way == "backward")
    gpu_race(case, contest.contenders, work, sets=sets, goal=goal)
