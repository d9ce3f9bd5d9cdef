"""The gradients of several losses, one row for each, as `PCGrad.pc_backward` needs them; and what they cannot show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from minbert.kernels import checks

Gradients = list[list[Tensor | None]]  # one row per task, one column per parameter; None where a loss does not reach

# How the names of graph nodes start that are written in Python and hide no parameter: hooks', torch.compile's,
# DistributedDataParallel's, and custom ops'.
_TRANSPARENT = ("BackwardHookFunction", "CompiledFunction", "_DDPSink", "GeneratedBackwardFor_")


def scalars(losses: Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(losses, Iterable) or (isinstance(losses, Tensor) and losses.ndim == 0):
        got = type(losses).__name__
        raise TypeError(f"PCGrad.pc_backward: losses must be a list of scalar tensors, got one {got}; write [loss]")
    listed = list(losses)
    if not listed:
        raise ValueError("PCGrad.pc_backward: losses must hold one scalar tensor per task, got none")
    for task, loss in enumerate(listed):
        if not isinstance(loss, Tensor):
            raise TypeError(f"PCGrad.pc_backward: losses[{task}] must be a scalar tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(
                f"PCGrad.pc_backward: losses[{task}] must be a scalar, got shape {list(loss.shape)}; take its mean"
            )
        if loss.is_complex():
            raise TypeError(
                f"PCGrad.pc_backward: losses[{task}] must be real, got {loss.dtype}; take its .real or .abs()"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"PCGrad.pc_backward: losses[{task}] depends on nothing that requires gradients; compute it outside "
                "torch.no_grad() and without .detach() or .item()"
            )
    return listed


def check_parameters(parameters: list[Tensor]) -> None:
    if not parameters:
        raise ValueError("PCGrad.pc_backward: the optimizer needs a parameter that requires gradients, got none")
    devices = list(dict.fromkeys(str(parameter.device) for parameter in parameters))
    if len(devices) > 1:
        raise ValueError(
            f"PCGrad.pc_backward: the parameters must lie on one device, got {' and '.join(devices)}; the inner"
            " products are over all of them"
        )
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise ValueError(
                f"PCGrad.pc_backward: .grad of parameter {index}, of shape {list(parameter.shape)}, must be dense to be"
                f" added to, got {parameter.grad.layout}; call zero_grad() first"
            )


def python_functions(losses: list[Tensor]) -> list[str]:
    """The names of the graph's nodes that are written in Python, and may use parameters that the graph does not show.

    Raises:
        ValueError: one of them is a reentrant checkpoint's, which does.
    """
    found: dict[str, None] = {}
    pending: list[Node | None] = [loss.grad_fn for loss in losses]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node is None:
            continue
        if isinstance(node, BackwardCFunction):
            name = node.name()
            if name == "CheckpointFunctionBackward":
                raise ValueError(
                    "PCGrad.pc_backward: the losses' graph has a reentrant checkpoint, which hides the parameters"
                    " inside from torch.autograd.grad, so that they would get no gradient; give checkpoint(...,"
                    " use_reentrant=False), or gradient_checkpointing_enable({'use_reentrant': False})"
                )
            if not name.startswith(_TRANSPARENT):
                found[name] = None
        new = [other for other, _ in node.next_functions if other not in seen]
        seen.update(new)
        pending += new
    return list(found)


@contextmanager
def grad_set_aside(parameters: list[Tensor]) -> Iterator[None]:
    """Leave `.grad` as it was, and raise a ValueError if anything inside accumulated a gradient there."""
    kept = [parameter.grad for parameter in parameters]
    written: list[int] = []
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
        written += [index for index, parameter in enumerate(parameters) if parameter.grad is not None]
    finally:
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad
    if written:
        raise ValueError(
            f"PCGrad.pc_backward: a function in the losses' graph ran a backward of its own, which wrote .grad of"
            f" parameter {written[0]}, past surgery; give the parameters to the function as arguments, or use"
            " torch.utils.checkpoint(..., use_reentrant=False) in its place"
        )


def gradients(losses: list[Tensor], parameters: list[Tensor]) -> Gradients:
    """The losses' gradients, one loss after the other; the graph they may share goes with the last one."""
    rows: Gradients = []
    last = len(losses) - 1
    for i, loss in enumerate(losses):
        row = torch.autograd.grad(loss, parameters, retain_graph=i < last, allow_unused=True)
        rows.append(
            [_laid_out(grad, parameter, i, k) for k, (grad, parameter) in enumerate(zip(row, parameters, strict=True))]
        )
    return rows


def _laid_out(grad: Tensor | None, parameter: Tensor, task: int, index: int) -> Tensor | None:
    """A gradient laid out as its parameter, as `backward` would store it; autograd also gives expanded ones."""
    if grad is None:
        return None
    where = f"PCGrad.pc_backward: losses[{task}]'s gradient of parameter {index}, of shape {list(parameter.shape)},"
    if grad.layout != torch.strided:
        raise ValueError(f"{where} must be dense, got {grad.layout}; build the layer with sparse=False")
    if grad.dtype not in checks.GRADIENTS:
        raise TypeError(f"{where} must be float32, bfloat16 or float64, got {grad.dtype}; keep parameters in float32")
    if grad.stride() == parameter.stride() and checks.is_dense(grad):
        return grad
    return torch.empty_like(parameter).copy_(grad)


@torch.no_grad()
def accumulate(parameters: Iterable[Tensor], updates: Iterable[Tensor | None]) -> None:
    """Add to `.grad`, and run the hooks that wait for it, as `backward` does."""
    for parameter, update in zip(parameters, updates, strict=True):
        if update is None:
            continue
        if parameter.grad is None:
            parameter.grad = update
        else:
            parameter.grad.add_(update)
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
            hook(parameter)
