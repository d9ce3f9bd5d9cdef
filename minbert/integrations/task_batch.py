"""The gradients of all tasks by one backward, for encoders of other libraries whose batches hold several tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

# Functions that compute each row of their first argument by itself. Their first dimension is the example.
_BY_ROW: tuple[Callable[..., Any], ...] = (F.linear, F.layer_norm, F.rms_norm, F.embedding)
_EMBEDDING_OPTIONS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


class TaskBatch(TorchFunctionMode):
    """A batch of examples of several tasks, for `GradientSurgery.backward`: one backward gives all tasks' gradients.

        batch = TaskBatch(encoder, task_of_example, tasks=3)  # [0, 0, 0, 1, 1, 2], for 6 examples
        with batch:
            hidden = encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        losses = [
            criterion(heads[t](hidden[batch.rows(t), 0]), labels[batch.rows(t)]) if batch.sizes[t] else None
            for t in range(3)
        ]
        optimizer.backward(losses, batch=batch)

    Inside the block, torch's linear, layer_norm, rms_norm and embedding run on the rows of each task by themselves,
    where they use a parameter of `module`, with one view of the parameter for each task. So the backward of the summed
    losses gives each view the gradient of its task alone. No approximation is involved: the gradients are those of a
    backward for each loss, up to rounding. That holds if
    - the first dimension of what the module computes is the example, and examples do not influence each other (there is
      no batch normalisation), as in all of transformers' encoders;
    - the loss of task t depends on no rows of `module`'s output but `rows(t)`.
    A parameter that is used in another way (by another function, or on a tensor whose first dimension is not the
    example) is a ValueError, so that no gradient is wrong. An embedding of positions [1, L] is computed for each
    example. Refused are also a table that is read in the block and outside of it, as a language model's, and gradient
    checkpointing, which runs the module again in the backward.

    Args:
        module: what the tasks share. Its trainable parameters get a gradient for each task.
        task_of_example: for each example of the batch the number of its task; those of a task adjacent, in the order of
            the tasks.
        tasks: how many there are; the highest number + 1 of this batch when left out.

    Attributes:
        sizes: for each task the number of its examples.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    def __init__(self, module: nn.Module, task_of_example: Sequence[int] | Tensor, tasks: int | None = None) -> None:
        super().__init__()
        numbers = task_of_example.tolist() if isinstance(task_of_example, Tensor) else list(task_of_example)
        if not isinstance(module, nn.Module):
            raise TypeError(f"TaskBatch: module must be a torch.nn.Module, got {type(module).__name__}")
        if not numbers or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"TaskBatch: task_of_example must hold numbers from 0 on, got {str(numbers)[:60]}")
        if any(first > second for first, second in pairwise(numbers)):
            raise ValueError(
                "TaskBatch: task_of_example must not decrease; sort the batch by task, for instance by"
                " task_of_example.argsort(stable=True)"
            )
        self.tasks = numbers[-1] + 1 if tasks is None else tasks
        if numbers[-1] >= self.tasks:
            raise ValueError(f"TaskBatch: task_of_example must be below tasks, {tasks}, got {numbers[-1]}")
        self.sizes = [numbers.count(task) for task in range(self.tasks)]
        self._bounds = [0, *accumulate(self.sizes)]
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._views = {id(p): [p.detach().requires_grad_() for _ in range(self.tasks)] for p in self.parameters}

    def rows(self, task: int) -> slice:
        """The rows of the batch that are the task's.

        Raises:
            ValueError: there is no such task.
        """
        if not 0 <= task < self.tasks:
            raise ValueError(f"TaskBatch: no task {task} in a batch of {self.tasks}; give tasks=, how many there are")
        return slice(self._bounds[task], self._bounds[task + 1])

    def views(self, parameter: Tensor) -> list[Tensor]:
        """The parameter as one view for each task; autograd's gradients with respect to them are the tasks'."""
        return self._views[id(parameter)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used = [value for value in _tensors([*args, *kwargs.values()]) if id(value) in self._views]
        if not used or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in _BY_ROW:
            return self._by_task(func, used, *args, **kwargs)
        result = func(*args, **kwargs)
        if any(value.requires_grad and id(value) not in self._views for value in _tensors([result])):
            raise self._refusal(used[0], f"is used by {getattr(func, '__name__', func)}")
        return result  # a size, a dtype, or what autograd does not see

    def _by_task(self, func: Callable[..., Any], used: list[Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The function on the rows of each task, with the task's views of the parameters."""
        if func is F.embedding:
            options = dict(zip(_EMBEDDING_OPTIONS, args[1:], strict=False)) | kwargs
            for name in ("max_norm", "scale_grad_by_freq"):
                if options.get(name):
                    raise self._refusal(used[0], f"is an embedding with {name}")
            if len(input) == 1 and input.dim() > 1:  # positions, the same of all examples
                input = input.expand(self._bounds[-1], *input.shape[1:])
        if input.dim() < 2 or len(input) != self._bounds[-1] or id(input) in self._views:
            shape = list(input.shape)
            raise self._refusal(used[0], f"is used by {func.__name__} on a tensor {shape}, whose rows are no examples")
        parts = [
            func(
                rows,
                *(self._view(value, task) for value in args),
                **{name: self._view(value, task) for name, value in kwargs.items()},
            )
            for task, rows in enumerate(input.split(self.sizes))
            if len(rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _view(self, value: Any, task: int) -> Any:
        return self._views[id(value)][task] if id(value) in self._views else value

    def _refusal(self, parameter: Tensor, how: str) -> ValueError:
        return ValueError(
            f"TaskBatch: the parameter {self._names[id(parameter)]} {how}; only linear, layer_norm, rms_norm and"
            f" embedding, of tensors [{self._bounds[-1]}, ...], one row for each example, can be split by task; leave"
            " out batch=, for one backward for each loss"
        )

    def gradients(
        self, where: str, losses: Sequence[Tensor | None], parameters: Sequence[Tensor]
    ) -> list[list[Tensor | None]]:
        """Each loss's gradients of the parameters, None of those it does not reach, by one backward.

        Raises:
            ValueError: the losses are not one for each task, or a gradient cannot be told apart.
        """
        if len(losses) != self.tasks:
            raise ValueError(
                f"{where}: losses must be one for each of the batch's {self.tasks} tasks, got {len(losses)}"
            )
        split = {id(parameter) for parameter in self.parameters}
        leaves = [_leaves(loss) for loss in losses]
        for index, parameter in enumerate(parameters):
            reaching = [task for task, reached in enumerate(leaves) if id(parameter) in reached]
            if reaching and id(parameter) in split:
                raise ValueError(
                    f"{where}: losses[{reaching[0]}] uses the parameter {self._names[id(parameter)]} of the batch's"
                    " module outside of the block, too; run all of it in the block, or leave out batch="
                )
            if len(reaching) > 1:
                raise ValueError(
                    f"{where}: losses {reaching[0]} and {reaching[1]} reach parameter {index}, of shape"
                    f" {list(parameter.shape)}, which is not of the batch's module; give TaskBatch a module that"
                    " has it, or leave out batch="
                )
        own = [parameter for parameter in parameters if id(parameter) not in split]
        shared = [parameter for parameter in parameters if id(parameter) in split]
        inputs = [*own, *(view for parameter in shared for view in self.views(parameter))]
        try:
            grads = torch.autograd.grad([loss for loss in losses if loss is not None], inputs, allow_unused=True)
        except CheckpointError:
            raise ValueError(
                f"{where}: a checkpoint of torch.utils.checkpoint runs a part of the batch's block again outside of it,"
                " where gradients cannot be split by task; switch gradient checkpointing off, or leave out batch="
            ) from None
        by_view = {id(view): grad for view, grad in zip(inputs, grads, strict=True)}

        def gradient(task: int, parameter: Tensor) -> Tensor | None:
            if losses[task] is None:
                return None
            if id(parameter) in split:
                return by_view[id(self.views(parameter)[task])]
            return by_view[id(parameter)] if id(parameter) in leaves[task] else None

        return [[gradient(task, parameter) for parameter in parameters] for task in range(self.tasks)]


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _leaves(loss: Tensor | None) -> set[int]:
    """The ids of the leaves that a loss's graph reaches."""
    found: set[int] = set()
    pending: list[Node | None] = [None if loss is None else loss.grad_fn]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        new = [other for other, _ in node.next_functions if other not in seen]
        seen.update(new)
        pending += new
    return found
