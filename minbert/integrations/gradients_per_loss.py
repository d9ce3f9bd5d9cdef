"""The gradient of each of several losses, for `GradientSurgery.backward`: checks, autograd, accumulation in `.grad`.

`where` is the method that messages name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from minbert.kernels import checks

# Prefixes of the names of graph nodes that are written in Python and hide no parameter: those of hooks, torch.compile,
# DistributedDataParallel, and custom ops.
_TRANSPARENT = ("BackwardHookFunction", "CompiledFunction", "_DDPSink", "GeneratedBackwardFor_")


def check_losses(where: str, losses: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The losses as a list, if they are None or real scalar tensors that require gradients."""
    if not isinstance(losses, Iterable) or (isinstance(losses, Tensor) and losses.ndim == 0):
        got = type(losses).__name__
        raise TypeError(f"{where}: losses must be a list of scalar tensors, got one {got}; write [loss]")
    losses = list(losses)
    if not losses:
        raise ValueError(f"{where}: losses must hold one scalar tensor per task, got none")
    for task, loss in enumerate(losses):
        name = f"{where}: losses[{task}]"
        if loss is None:
            continue
        if not isinstance(loss, Tensor):
            raise TypeError(f"{name} must be a scalar tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"{name} must be a scalar, got shape {list(loss.shape)}; take its mean")
        if loss.is_complex():
            raise TypeError(f"{name} must be real, got {loss.dtype}; take its .real or .abs()")
        if not loss.requires_grad:
            raise ValueError(
                f"{name} depends on nothing that requires gradients; compute it outside torch.no_grad() and without"
                " .detach() or .item()"
            )
    return losses


def check_parameters(where: str, parameters: list[Tensor]) -> None:
    if not parameters:
        raise ValueError(f"{where}: the optimizer needs a parameter that requires gradients, got none")
    devices = list(dict.fromkeys(str(parameter.device) for parameter in parameters))
    if len(devices) > 1:
        raise ValueError(
            f"{where}: the parameters must lie on one device, got {' and '.join(devices)}; the inner"
            " products are over all of them"
        )
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise ValueError(
                f"{where}: .grad of parameter {index}, of shape {list(parameter.shape)}, must be dense to be"
                f" added to, got {parameter.grad.layout}; call zero_grad() first"
            )


def python_functions(where: str, losses: Iterable[Tensor]) -> list[str]:
    """Names of the graph's nodes that are written in Python and may use parameters that the graph does not show.

    Raises:
        ValueError: one of them is a reentrant checkpoint, which uses such parameters.
    """
    names: dict[str, None] = {}
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
                    f"{where}: the losses' graph has a reentrant checkpoint, which hides the parameters"
                    " inside from torch.autograd.grad, so that they would get no gradient; give checkpoint(...,"
                    " use_reentrant=False), or gradient_checkpointing_enable({'use_reentrant': False})"
                )
            if not name.startswith(_TRANSPARENT):
                names[name] = None
        new = [other for other, _ in node.next_functions if other not in seen]
        seen.update(new)
        pending += new
    return list(names)


@contextmanager
def preserved_grad(where: str, parameters: list[Tensor]) -> Iterator[None]:
    """Restore every `.grad` afterwards, and raise a ValueError if a gradient was accumulated in one."""
    before = [parameter.grad for parameter in parameters]
    written: list[int] = []
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
        written += [index for index, parameter in enumerate(parameters) if parameter.grad is not None]
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
    if written:
        raise ValueError(
            f"{where}: a function in the losses' graph ran another backward, which accumulated in .grad of"
            f" parameter {written[0]} without surgery; give the parameters to the function as arguments, or use"
            " torch.utils.checkpoint(..., use_reentrant=False) in its place"
        )


def loss_gradients(losses: list[Tensor | None], parameters: list[Tensor]) -> list[list[Tensor | None]]:
    """Each loss's gradients, None of parameters it does not reach, by a backward per loss; the last frees the graph."""
    last = max((task for task, loss in enumerate(losses) if loss is not None), default=0)
    rows: list[list[Tensor | None]] = []
    for task, loss in enumerate(losses):
        if loss is None:
            rows.append([None] * len(parameters))
            continue
        rows.append([*torch.autograd.grad(loss, parameters, retain_graph=task < last, allow_unused=True)])
    return rows


def contiguous_as(where: str, grad: Tensor | None, parameter: Tensor, task: int, index: int) -> Tensor | None:
    """A gradient with its parameter's strides, as `backward` would store it; autograd may return an expanded one."""
    if grad is None:
        return None
    name = f"{where}: losses[{task}]'s gradient of parameter {index}, of shape {list(parameter.shape)},"
    if grad.layout != torch.strided:
        raise ValueError(f"{name} must be dense, got {grad.layout}; build the layer with sparse=False")
    if grad.dtype not in checks.GRADIENTS:
        raise TypeError(f"{name} must be float32, bfloat16 or float64, got {grad.dtype}; keep parameters in float32")
    if grad.stride() == parameter.stride() and checks.is_dense(grad):
        return grad
    return torch.empty_like(parameter).copy_(grad)


@torch.no_grad()
def accumulate_grad(parameters: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
    """Add to `.grad` and call post-accumulate hooks, as `backward` does; None leaves `.grad` unchanged."""
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is None:
            continue
        parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
            hook(parameter)
