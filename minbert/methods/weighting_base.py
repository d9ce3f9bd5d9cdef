"""What the rules that weight the tasks have in common: options, state, random numbers and the call of the op."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from minbert import kernels
from minbert.errors import require


@dataclass(frozen=True)
class Weighting:
    """A rule from the Gram matrix of the task gradients, and for some rules the losses, to a weight for each task.

    The fields of a rule are its options. Weights are the same whatever the order of the tasks, but for random numbers.

    Raises:
        UserError: an option is not as its rule describes it.
    """

    rule: ClassVar[str]  # its name on the command line and in kernels.WEIGHTING_RULES
    reduction: ClassVar[str] = "mean"  # the plain update that its own is compared with: "mean" or "sum"
    needs_losses: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = False
    needs_orders: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        needs = kernels.WEIGHTING_RULES[cls.rule].needs if cls.rule in kernels.WEIGHTING_RULES else ()
        cls.needs_losses, cls.needs_noise, cls.needs_orders = (name in needs for name in ("losses", "noise", "orders"))

    def __post_init__(self) -> None:
        for option in kernels.WEIGHTING_RULES[self.rule].options:
            value = getattr(self, option.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            require(is_number and option.allows(value), f"surgery.{option.name}", option.expected, value)
            default = getattr(type(self), option.name)
            object.__setattr__(self, option.name, type(default)(value))  # one form of a number in `str`

    def __str__(self) -> str:
        """The rule with all its options, as `weighting_from` reads it."""
        options = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
        return f"{self.rule}({options})" if options else self.rule

    @property
    def options(self) -> list[float]:
        """The numbers of the options in the op's order."""
        return [float(getattr(self, option.name)) for option in kernels.WEIGHTING_RULES[self.rule].options]

    def remark(self, steps: int) -> str | None:
        """Why the rule does nothing in a run of so many steps, in a few words; None where it does."""
        return None

    def state(self, tasks: int, parts: int | None = None, device: torch.device | str = "cpu") -> Tensor | None:
        """What the rule keeps from call to call, at the start of a run: zeros, float64 [S], of G parts [G, S].

        Returns:
            None for a rule without state.

        Raises:
            ValueError: more than 16 tasks.
        """
        size = kernels.weighting_state_size(self.rule, tasks)
        shape = (size,) if parts is None else (parts, size)
        return torch.zeros(shape, dtype=torch.float64, device=device) if size else None

    def weights(
        self,
        gram: Tensor,
        losses: Tensor | None = None,
        state: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The weights of an update, unclipped: `kernels.task_weights`. Waits for no device.

        Args:
            gram: float64 [T, T] or [G, T, T].
            losses: float64 [T]; used by a rule that `needs_losses`.
            state: as from `state`, for a rule that has one; changed in place.
            generator: of a CPU, for a rule that `needs_noise` or `needs_orders`; torch's default when left out.

        Returns:
            float64 [T] or [G, T].

        Raises:
            ValueError, TypeError: an argument is missing or not as described.
        """
        return kernels.task_weights(
            gram,
            self.rule,
            self.options,
            losses=losses if self.needs_losses else None,
            noise=random_noise(gram, generator) if self.needs_noise else None,
            orders=random_orders(gram, generator) if self.needs_orders else None,
            state=state,
        )


def random_noise(gram: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers for each task, float64 [T] or [G, T], on gram's device."""
    return moved(torch.randn(gram.shape[:-1], dtype=torch.float64, generator=generator), gram.device)


def random_orders(gram: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random order of the tasks for each of them, int64 [T, T] or [G, T, T], on gram's device."""
    rows = [torch.randperm(gram.shape[-1], generator=generator) for _ in range(gram.shape[:-1].numel())]
    return moved(torch.stack(rows).view(gram.shape), gram.device)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device, without waiting for the copy."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
