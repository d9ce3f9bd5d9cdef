"""A torch optimizer around another, whose parameter groups, state and hooks it has."""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor


class WrappedOptimizer(torch.optim.Optimizer):
    """An optimizer with the parameter groups, state and hooks of the inner one, `.optimizer`.

    Raises:
        TypeError: the inner one is no optimizer.
    """

    _name: ClassVar[str]  # that messages have

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # Optimizer.__init__ is not called: it would make groups, state and hooks of its own.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{self._name}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _trainable(self) -> list[Tensor]:
        """The parameters that require gradients, each once."""
        return [parameter for parameter in dict.fromkeys(self._parameters()) if parameter.requires_grad]


def _inner_method(name: str) -> Any:
    @wraps(getattr(torch.optim.Optimizer, name))
    def method(self: WrappedOptimizer, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.optimizer, name)(*args, **kwargs)

    return method


for _attribute in ("param_groups", "state", "defaults"):
    setattr(WrappedOptimizer, _attribute, property(attrgetter(f"optimizer.{_attribute}")))
for _attribute in vars(torch.optim.Optimizer):
    if _attribute.startswith("register_") or _attribute == "add_param_group":
        setattr(WrappedOptimizer, _attribute, _inner_method(_attribute))
