"""Calls of custom ops run again and compared with the reference: for `minbert doctor --check` and `minbert replay`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import native
from .dispatch import backends, use_backend
from .encoder_layers import PackedLayers, layers_of, with_parameters
from .flight_recorder import Call, settings
from .matmul_library import use_matmul
from .op_references import REFERENCES
from .split_float32 import join_float32

SLACK = 2.0**-23  # what a result may be off beyond twice the reference's error, which may be small by luck: a rounding
SLACK_OF_GELU = 2.0**-17  # csrc/cpu/gelu.cpp keeps so much of the terms of a bias' gradient in half precision
SLACK_OF_ITERATIONS = 1e-10  # of task_weights, whose two implementations solve the same problem in different ways
NEARBY = 32  # calls
_HALF = (torch.bfloat16, torch.float16)


class Comparison(NamedTuple):
    """How far a call's results are from those of the reference in float64."""

    op: str
    dtype: str  # the narrowest of the inputs; empty where none is a float
    backend: str
    error: float  # |result - exact| / |exact|, L2 norms, of the result nearest to its bound
    bound: float  # twice the error of the reference in the op's own precision, and the slack

    @property
    def share(self) -> float:
        """The share of the bound that the error takes."""
        return self.error / self.bound

    @property
    def ok(self) -> bool:
        return self.share <= 1

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        columns = f"{self.op:<32}{self.dtype:<9} {self.backend:<7}"
        return f"{columns} error {self.error:.1e}, at most {self.bound:.1e}  {verdict}"


class _Calls(TorchDispatchMode):
    """Keeps the calls of minbert's custom ops, with copies of their inputs."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "minbert":
            op = func.name().partition("::")[2]
            inputs = with_parameters(*args) if op == "encoder_layers" else args
            self._calls.append(Call(op, _mapped(inputs, _copied), settings()))
        return func(*args, **(kwargs or {}))


@contextmanager
def captured_calls() -> Iterator[list[Call]]:
    """A list to which the calls of custom ops in this block are added, those of backwards among them."""
    calls: list[Call] = []
    with torch.autograd.set_multithreading_enabled(False), _Calls(calls):  # a backward on this thread is seen
        yield calls


@contextmanager
def settings_of(call: Call) -> Iterator[None]:
    """The library of matrix products, the CPU threads and the instruction set that a call was recorded with."""
    threads, isa = torch.get_num_threads(), native.isa()
    with use_matmul(call.settings["matmul"]):
        try:
            torch.set_num_threads(call.settings["threads"])
            if call.settings["isa"] in native.library().isas():
                native.library().set_isa(call.settings["isa"])
            yield
        finally:
            torch.set_num_threads(threads)
            native.library().set_isa(isa)


def compare(call: Call) -> Comparison:
    """Run a call's op and the reference, in the op's precision and in float64, under the settings that hold now.

    The error of few numbers is luck: the same few roundings add up in one order of a sum and cancel out in another.
    Where a result is beyond its bound, root mean squares over calls with inputs nearby count.

    Raises:
        KeyError: no such op.
    """
    errors = _errors(call)
    if any(mine > 2 * theirs + slack for mine, theirs, slack in errors):
        near = [_errors(_nearby(call, seed)) for seed in range(NEARBY)]
        errors = [
            (_root_mean_square(mine), _root_mean_square(theirs), slack[0])
            for mine, theirs, slack in (zip(*of_result, strict=True) for of_result in zip(*near, strict=True))
        ]
    bounds = [(mine, 2 * theirs + slack) for mine, theirs, slack in errors]
    worst = max([(0.0, SLACK), *bounds], key=lambda pair: pair[0] / pair[1])
    tensors, dtypes = _tensors(call.arguments), _dtypes(call.arguments)
    dtype = str(dtypes[0]).removeprefix("torch.") if dtypes else ""
    return Comparison(call.op, dtype, _backend(call.op, tensors[0].device, dtypes), *worst)


def _errors(call: Call) -> list[tuple[float, float, float]]:
    """For each result its error, that of the reference in the op's own precision, and the slack."""
    reference, inputs = REFERENCES[call.op], _comparable(call)
    with torch.no_grad():
        results = run(call)
        with use_backend("reference"):
            own, exact = reference(*inputs), reference(*_mapped(inputs, _doubled))
    dtypes = _dtypes(call.arguments)
    slack = SLACK_OF_GELU if call.op == "bias_gelu_backward" and dtypes[0] in _HALF else SLACK
    longest = max((tensor.numel() for tensor in _tensors(inputs)), default=1)
    results = results[: len(own)]  # what a backward reads comes after them
    wide = SLACK_OF_ITERATIONS if call.op == "task_weights" else 2.0**-53 * longest  # orders of sums
    slacks = [wide if result.dtype == torch.float64 else slack for result in results]
    return [
        (_error(mine, theirs, wanted), _error(theirs, theirs, wanted), its_slack)
        for mine, theirs, wanted, its_slack in zip(results, own, exact, slacks, strict=True)
    ]


def _nearby(call: Call, seed: int) -> Call:
    """The call with each number of its float32 and half-precision inputs off by about 2^-6 of it."""
    generator = torch.Generator().manual_seed(seed)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_sparse or value.dtype not in (torch.float32, *_HALF):
            return value
        factor = 1 + torch.randn(value.shape, generator=generator) / 64
        return value.detach().clone().copy_(value * factor.to(value.device))  # with its strides

    return call._replace(arguments=_mapped(call.arguments, moved))


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def run(call: Call) -> list[Tensor]:
    """Run a call's op on copies of its inputs.

    Returns:
        the op's results, or what it changes: the parameters, joined where they are split, moments, averages, copies;
        or both: the weights and the state of a rule.
    """
    arguments = _mapped(call.arguments, _copied)
    if call.op == "encoder_layers":
        x, parameters, _, _, heads, _, eps, *_ = arguments
        arguments[1] = PackedLayers(layers_of(parameters), heads=heads, eps=eps, dtype=x.dtype).packed
    returned = getattr(torch.ops.minbert, call.op)(*arguments)
    if call.op == "combine_":
        return list(arguments[2])
    if call.op == "combine_adamw_":
        return [*_joined(arguments), *(tensor for part in arguments[5:9] for tensor in part if tensor.numel())]
    return _tensors([returned, arguments[-1] if call.op == "task_weights" else None])


def _comparable(call: Call) -> list[Any]:
    """The arguments as the reference takes them."""
    if call.op != "combine_adamw_":
        return call.arguments
    return [*call.arguments[:4], _joined(call.arguments), *call.arguments[5:9], [], *call.arguments[10:]]


def _joined(arguments: Sequence[Any]) -> list[Tensor]:
    """The parameters of `combine_adamw_`, joined where they are split."""
    params, low_bits = arguments[4], arguments[9] or [None] * len(arguments[4])
    return [
        param if low is None or not low.numel() else join_float32(param, low)
        for param, low in zip(params, low_bits, strict=True)
    ]


def _error(result: Tensor, own: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact| where the reference is finite; infinite for a result that is not finite there."""
    if result.shape != exact.shape:
        return math.inf
    finite = own.isfinite() & exact.isfinite()
    result, exact = result[finite].double(), exact[finite].double()
    if not result.isfinite().all():
        return math.inf
    return (result - exact).norm().item() / (exact.norm().item() or 1.0)


def _backend(op: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    name = op.removesuffix("_backward")
    runs = backends(device, dtype=dtypes[0] if dtypes else None)
    return {**runs, "combine_": runs["combine"], "linear": runs["linear"].replace("reference", "torch")}[name]


def _dtypes(arguments: Any) -> list[torch.dtype]:
    """The float dtypes among the arguments, the narrowest first."""
    found = {tensor.dtype for tensor in _tensors(arguments)} | {each for each in arguments if type(each) is torch.dtype}
    return sorted((dtype for dtype in found if dtype.is_floating_point), key=lambda dtype: (dtype.itemsize, str(dtype)))


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if isinstance(value, torch.dtype) else value


def _mapped(values: Any, function: Callable[[Any], Any]) -> Any:
    """Nested lists of arguments, each replaced by what `function` gives for it."""
    return [_mapped(each, function) for each in values] if isinstance(values, list | tuple) else function(values)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, list | tuple):
        return [tensor for each in values for tensor in _tensors(each)]
    return [values] if isinstance(values, Tensor) else []
