"""Weights of the tasks by a rule of the literature, from the Gram matrix of their gradients and their losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, native_calls, reference
from .dispatch import is_compiled
from .flight_recorder import recorded
from .native import library

MOST_TASKS = 16  # csrc/kernels.h's task_weights


class Option(NamedTuple):
    """A number that a rule takes."""

    name: str
    default: float
    expected: str  # what `allows` allows, for messages
    allows: Callable[[float], bool]


class WeightingRule(NamedTuple):
    """What a rule takes besides the Gram matrix."""

    options: tuple[Option, ...] = ()
    needs: tuple[str, ...] = ()  # of "losses", "noise" and "orders"
    state_size: Callable[[int], int] = lambda tasks: 0  # float64 numbers that it keeps from call to call, for T tasks


def _at_least_0(name: str, default: float) -> Option:
    return Option(name, default, "finite and at least 0", lambda x: 0 <= x < math.inf)


def _positive(name: str, default: float) -> Option:
    return Option(name, default, "finite and above 0", lambda x: 0 < x < math.inf)


def _count(name: str, default: float) -> Option:
    return Option(name, default, "a whole number of at least 1", lambda x: 1 <= x < 2**53 and x == int(x))


_SHARE = ("from 0 to 1", lambda x: 0 <= x <= 1)
_MODE = ("0 (min), 1 (median) or 2 (rmse)", lambda x: x in (0, 1, 2))

# In the order of csrc/kernels.h's WeightingRule. `kernels.reference.weightings` and
# `kernels.reference.loss_weightings` say what each does with them, and what of what is in the state in which order.
WEIGHTING_RULES: dict[str, WeightingRule] = {
    "upgrad": WeightingRule((_positive("eps", 1e-4),)),
    "dualproj": WeightingRule((_positive("eps", 1e-4),)),
    "mgda": WeightingRule(),
    "cagrad": WeightingRule((_at_least_0("c", 0.4),)),
    "imtl-g": WeightingRule(),
    "aligned-mtl": WeightingRule((Option("mode", 0, *_MODE),)),
    "nash-mtl": WeightingRule((_at_least_0("max_norm", 1), _count("every", 1)), state_size=lambda tasks: 1 + tasks),
    "config": WeightingRule(),
    "gradvac": WeightingRule((Option("beta", 0.5, *_SHARE),), ("orders",), lambda tasks: tasks * tasks),
    "fairgrad": WeightingRule((_at_least_0("alpha", 1),)),
    "random": WeightingRule(needs=("noise",)),
    "famo": WeightingRule(
        (_at_least_0("lr", 0.025), _at_least_0("weight_decay", 0.001)), ("losses",), lambda tasks: 1 + 4 * tasks
    ),
    "uncertainty": WeightingRule((_at_least_0("lr", 0.01),), ("losses",), lambda tasks: 1 + 3 * tasks),
    "dwa": WeightingRule((_positive("temperature", 2), _count("every", 100)), ("losses",), lambda tasks: 1 + 3 * tasks),
    "gradnorm": WeightingRule(
        (_at_least_0("alpha", 1.5), _at_least_0("lr", 0.025)), ("losses",), lambda tasks: 1 + 4 * tasks
    ),
    "geometric-mean": WeightingRule(needs=("losses",)),
}


@torch.library.custom_op("minbert::task_weights", mutates_args=("state",), device_types=("cpu", "cuda"))
@recorded("task_weights")
def _task_weights(
    gram: Tensor,
    rule: str,
    options: Sequence[float],
    losses: Tensor | None,
    noise: Tensor | None,
    orders: Tensor | None,
    state: Tensor | None,
) -> Tensor:
    if orders is not None:
        checks.permutations("task_weights", "orders", orders)
    tasks, parts = gram.shape[-1], gram.shape[:-2].numel()
    of_cpu = gram.device.type == "cpu"
    weights = gram.new_empty(gram.shape[:-1])
    scratch = gram.new_empty(library().weighting_scratch(tasks) * (1 if of_cpu else parts))
    sizes = parts, tasks, 0 if state is None else state.shape[-1]
    addresses = map(native_calls.address, (gram, losses, noise, orders, state, weights, scratch))
    numbers = *options, *[0.0] * (2 - len(options))
    arguments = (list(WEIGHTING_RULES).index(rule), *sizes, *addresses, *numbers)  # csrc/kernels.h's WeightingProblem
    if of_cpu:
        library().task_weights(arguments)  # on one thread
    else:
        native_calls.run("task_weights", gram.device, arguments)
    return weights


@_task_weights.register_fake
def _(gram: Tensor, *_: Any) -> Tensor:
    return gram.new_empty(gram.shape[:-1])


def weighting_state_size(rule: str, tasks: int) -> int:
    """How many float64 numbers a rule keeps from call to call for T tasks; 0 for one without state.

    Raises:
        ValueError: an unknown rule, or T is not 1 to 16.
    """
    checks.choice("weighting_state_size", "rule", rule, tuple(WEIGHTING_RULES))
    if not 1 <= tasks <= MOST_TASKS:
        raise ValueError(f"weighting_state_size: tasks must be 1 to {MOST_TASKS}, got {tasks}")
    return WEIGHTING_RULES[rule].state_size(tasks)


def task_weights(
    gram: Tensor,
    rule: str,
    options: Sequence[float] = (),
    *,
    losses: Tensor | None = None,
    noise: Tensor | None = None,
    orders: Tensor | None = None,
    state: Tensor | None = None,
) -> Tensor:
    """The weights of an update by a rule, from the Gram matrix of the task gradients: unclipped, and without waiting.

    `surgery_weights(gram, weights=...)` clips them. Where a number of a Gram matrix or its trace is not finite, or one
    of the losses that the rule needs, all weights are 1 and the state of no part changes: the step is skipped. For a
    Gram matrix of zeros the weights are 1 / T, of "nash-mtl", "config" and "gradvac" 1, and their state does not
    change; rules that need losses have no such case.

    Native code gives the reference's weights up to rounding, and the same bits in every call. Where gradients depend on
    each other, several weights may give the same update, and another implementation may choose others.

    Args:
        gram: float64 [T, T] as from `gram`, or [G, T, T] of G parts of a model, each of which has weights of its own.
            T is 1 to 16.
        rule: a name of `WEIGHTING_RULES`.
        options: its numbers, in the order that it has there.
        losses: float64 [T], for the rules that need them.
        noise: standard normal numbers, float64 [T] or [G, T], for "random".
        orders: int64 [T, T] or [G, T, T], for "gradvac": row i is a permutation of the tasks (where i itself stands in
            it does not matter).
        state: float64 [S] or [G, S], S of `weighting_state_size`; zeros at the start of a run. Changed in place.

    Returns:
        float64 [T] or [G, T].

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op, float64 = "task_weights", [torch.float64]
    of_parts = isinstance(gram, Tensor) and gram.dim() == 3
    checks.tensor(op, "gram", gram, ["G", "T", "T"] if of_parts else ["T", "T"], float64)
    parts, tasks = gram.shape[:-2], gram.shape[-1]
    checks.tensor(op, "gram", gram, [*parts, tasks, tasks], float64)
    checks.choice(op, "rule", rule, tuple(WEIGHTING_RULES))
    if tasks > MOST_TASKS:
        raise ValueError(f"{op}: gram must be of at most {MOST_TASKS} tasks, got {tasks}")
    known = WEIGHTING_RULES[rule]
    if len(options) != len(known.options):
        names = ", ".join(option.name for option in known.options) or "none"
        raise ValueError(f"{op}: options of {rule} must be {len(known.options)} ({names}), got {len(options)}")
    for option, value in zip(known.options, options, strict=True):
        if not option.allows(value):
            raise ValueError(f"{op}: {option.name} of {rule} must be {option.expected}, got {value}")
    size = known.state_size(tasks)
    given = {"losses": losses, "noise": noise, "orders": orders, "state": state}
    needs = (*known.needs, "state") if size else known.needs
    for name, tensor in given.items():
        if (tensor is not None) != (name in needs):
            verb = "takes no" if tensor is not None else "needs"
            raise ValueError(f"{op}: {rule} {verb} {name}")
    if losses is not None:
        checks.tensor(op, "losses", losses, [tasks], float64, like=gram)
    if noise is not None:
        checks.tensor(op, "noise", noise, [*parts, tasks], float64, like=gram)
    if orders is not None:
        checks.tensor(op, "orders", orders, [*parts, tasks, tasks], [torch.int64], like=gram)
    if state is not None:
        checks.tensor(op, "state", state, [*parts, size], float64, like=gram)
    given_options = [float(value) for value in options]
    if is_compiled(op, gram.device):
        return _task_weights(gram, rule, given_options, losses, noise, orders, state)
    if orders is not None:
        checks.permutations(op, "orders", orders)
    return reference.task_weights(gram, rule, given_options, losses, noise, orders, state)
