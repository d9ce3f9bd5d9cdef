"""Options that may differ by task, such as --heads, --losses and --label-smoothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from minbert.errors import UserError, require_known
from minbert.methods.losses import LOSSES, accepts, losses_for
from minbert.model import HEADS
from minbert.tasks import Task

Value = TypeVar("Value")


def with_head_and_loss(task: Task, heads: Mapping[str, str], losses: Mapping[str, str]) -> Task:
    """The task with the head and the loss that --heads and --losses give it.

    While the classes of a task are not known its usual loss is not either; what depends on it is checked when this is
    called again with the classes.

    Raises:
        UserError: an unknown head or loss, a head for pairs where texts are single, or a loss that does not fit the
            labels or the head.
    """
    name = task.head_of or task.name
    task = replace(task, head=heads.get(name, task.head), loss=losses.get(name, task.loss))
    head_key = f"--heads.{name}" if name in heads else f"task {name}: head"  # where it stands
    loss_key = f"--losses.{name}" if name in losses else f"task {name}: loss"
    require_known(f"{head_key}: unknown head", task.head, HEADS)
    encodable = [head for head in HEADS if task.is_pair or HEADS[head].pair_encoding == "cross-encoder"]
    if task.head not in encodable:
        raise UserError(
            f"{head_key} {task.head}: reads pairs of sentences, and {task.title} has single ones;"
            f" expected {' or '.join(encodable)}"
        )
    if not task.loss:
        return task
    require_known(f"{loss_key}: unknown loss", task.loss, LOSSES)
    if task.loss not in losses_for(task):
        fitting = losses_for(task)
        raise UserError(
            f"{loss_key} {task.loss}: does not fit the labels of {task.title}; expected {' or '.join(fitting)}"
        )
    if task.loss not in HEADS[task.head].losses_for(task):
        fitting = [head for head in encodable if task.loss in HEADS[head].losses_for(task)]
        raise UserError(
            f"{loss_key} {task.loss}: does not fit the outputs of head {task.head};"
            f" expected --heads.{name} {' or '.join(fitting)}"
        )
    return task


def smoothing_of(task: Task, option: float | Mapping[str, float]) -> float:
    """The label smoothing of a task: 0 where one number for all tasks does not fit it.

    Raises:
        UserError: --label-smoothing names a task whose loss takes none.
    """
    fits = not task.is_regression and (not task.loss or accepts(task.loss, "label_smoothing"))
    if isinstance(option, Mapping) and option.get(task.name) and not fits:
        labels = "its labels are scores" if task.is_regression else f"its loss {task.loss} takes none"
        raise UserError(f"--label-smoothing.{task.name} {option[task.name]:g}: {labels}; leave {task.name} out")
    return of_task(option, task.name, 0.0) if fits else 0.0


def of_task(option: Value | Mapping[str, Value], task: str, otherwise: Value) -> Value:
    """A task's value of an option that has one for all tasks, or one for some of them."""
    return option.get(task, otherwise) if isinstance(option, Mapping) else option


def task_groups(tasks: Sequence[Task], groups: Sequence[str] | None) -> list[list[Task]]:
    """The tasks with heads of their own by --surgery-groups, in its order; each its own group without it.

    Raises:
        UserError: a group names an unknown task, a task is in two groups, or one is in none.
    """
    if groups is None:
        return [[task] for task in tasks if not task.head_of]
    by_name = {task.name: task for task in tasks if not task.head_of}
    names = [group.split("+") for group in groups]
    flat = [name for group in names for name in group]
    if sorted(flat) != sorted(by_name):
        raise UserError(
            f"--surgery-groups must hold each of the tasks {', '.join(by_name)} once, joined by +;"
            f" got {', '.join(groups)}"
        )
    return [[by_name[name] for name in group] for group in names]
