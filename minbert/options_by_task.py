"""Options that may differ by task, such as --heads, --losses and --l2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from minbert.errors import UserError, require_known
from minbert.methods.losses import LOSSES, losses_for
from minbert.model import HEADS
from minbert.tasks import Task

Value = TypeVar("Value")


def with_head_and_loss(task: Task, heads: Mapping[str, str], losses: Mapping[str, str]) -> Task:
    """The task with the head and the loss that --heads and --losses give it.

    Raises:
        UserError: an unknown head or loss, a head for pairs where texts are single, or a loss that does not fit the
            labels or the head.
    """
    name = task.name
    task = replace(task, head=heads.get(name, task.head), loss=losses.get(name, task.loss))
    require_known(f"--heads.{name}: unknown head", task.head, HEADS)
    require_known(f"--losses.{name}: unknown loss", task.loss, LOSSES)
    if not task.is_pair and HEADS[task.head].pair_encoding != "cross-encoder":
        fitting = [head for head in HEADS if HEADS[head].pair_encoding == "cross-encoder"]
        raise UserError(
            f"--heads.{name} {task.head}: reads pairs of sentences, and {task.title} has single ones;"
            f" expected {' or '.join(fitting)}"
        )
    if task.loss not in losses_for(task):
        fitting = losses_for(task)
        raise UserError(
            f"--losses.{name} {task.loss}: does not fit the labels of {task.title}; expected {' or '.join(fitting)}"
        )
    if task.loss not in HEADS[task.head].losses:
        fitting = [head for head in HEADS if task.loss in HEADS[head].losses]
        raise UserError(
            f"--losses.{name} {task.loss}: does not fit the outputs of head {task.head};"
            f" expected --heads.{name} {' or '.join(fitting)}"
        )
    return task


def of_task(option: Value | Mapping[str, Value], task: str, otherwise: Value) -> Value:
    """A task's value of an option that has one for all tasks, or one for some of them."""
    return option.get(task, otherwise) if isinstance(option, Mapping) else option
