"""Gradient surgery: from the Gram matrix of the task gradients to one weight for each of them.

A surgery is a function `weights(gram, generator)`; whatever it is, the update is the weighted sum of the gradients. So
no surgery reads a gradient: the T x T numbers that `minbert.kernels.gram` gives are all it needs.
"""

from __future__ import annotations

import ast
import importlib
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minbert import kernels
from minbert.errors import UserError, did_you_mean
from minbert.transfer import moved
from minbert.weighting_state import Unsaved, load_state, save_state, state_of

STATE = "surgery.safetensors"  # in a checkpoint

Weighting = Callable[[Tensor], Tensor]  # gram [T, T] -> weights [T], as TorchJD's weightings are


def sum_weights(gram: Tensor) -> Tensor:
    """The plain sum of the gradients: a weight of 1 each, float64 [T]."""
    return gram.new_ones(len(gram))


def mean_weights(gram: Tensor) -> Tensor:
    """The mean of the gradients: a weight of 1 / T each, float64 [T]."""
    return gram.new_full((len(gram),), 1 / len(gram))


def pcgrad_weights(gram: Tensor, generator: torch.Generator | None = None, reduction: str = "sum") -> Tensor:
    """PCGrad's weights (Yu et al. 2020, algorithm 1), by projecting coefficients of gradients instead of gradients.

    Each task's gradient walks the other tasks' in a random order of its own, and where it conflicts with one (their
    inner product is negative) loses its component along that one's original gradient.

    Args:
        gram: float64 [T, T], the inner products of the task gradients. If one of them is not finite, no gradient is
            projected: the sum is not finite either, and whoever updates with it has to tell.
        generator: for the T orders, each a `torch.randperm(T)`; torch's default generator when left out.
        reduction: "sum" of the projected gradients, as in the paper, or their "mean".

    Returns:
        float64 [T], on gram's device.

    Raises:
        ValueError: gram is not square, or an unknown reduction.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"pcgrad_weights: gram must be [T, T], got {list(gram.shape)}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"pcgrad_weights: reduction must be 'sum' or 'mean', got {reduction!r}")
    orders = _orders(len(gram), generator, gram.device)
    return kernels.surgery_weights(gram.double(), orders=orders, reduction=reduction)[0]


def _orders(tasks: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A random order of the tasks for each of them, int64 [T, T]."""
    return moved([torch.stack([torch.randperm(tasks, generator=generator) for _ in range(tasks)])], device)[0]


@dataclass(frozen=True)
class Surgery:
    """How the tasks' gradients become one update."""

    name: str
    projects: bool = False  # whether the weights are PCGrad's
    weighting: UserWeighting | None = None
    reduction: str = "sum"  # of the (projected) gradients, where there is no weighting: "sum" or "mean"
    per_task: bool = True  # whether it needs the tasks' gradients apart; if not, T is 1 whatever the tasks

    def weights(
        self,
        gram: Tensor,
        generator: torch.Generator,
        own_square: Tensor,
        max_norm: float,
        agree: Callable[[Tensor], Tensor] = lambda weights: weights,
    ) -> tuple[Tensor, Tensor]:
        """Clipped weights [T], and what else `kernels.surgery_weights` says of them.

        Waits for no device, except to call a weighting of the user's.

        Args:
            gram: float64 [T, T].
            generator: what a random order follows.
            own_square, max_norm: as for `kernels.surgery_weights`.
            agree: gives all processes one's weights; only a user's weighting could give each process others.
        """
        orders = _orders(len(gram), generator, gram.device) if self.projects else None
        weights = agree(self.weighting(gram, generator)) if self.weighting is not None else None
        return kernels.surgery_weights(
            gram, orders=orders, weights=weights, reduction=self.reduction, own_square=own_square, max_norm=max_norm
        )


_SUM, _MEAN = Surgery("sum", per_task=False), Surgery("mean", reduction="mean")
_PCGRAD = {reduction: Surgery("pcgrad", projects=True, reduction=reduction) for reduction in ("sum", "mean")}
NAMES = ("sum", "mean", "pcgrad", "gse")


def names_code(name: str) -> bool:
    """Whether a surgery is a MODULE:NAME, which is imported and called."""
    return ":" in name


def check_surgery(name: str) -> None:
    """Check the name of a surgery, or the form of a MODULE:NAME. Imports nothing.

    Raises:
        UserError: an unknown name, or another form.
    """
    if names_code(name):
        _reference(name)
    elif name not in NAMES:
        raise UserError(
            f"--surgery {name}: unknown{did_you_mean(name, NAMES)}; expected {', '.join(NAMES)}, or MODULE:NAME of a"
            " callable from Gram matrix to weights"
        )


def needs_task_gradients(name: str) -> bool:
    """Whether a surgery needs the tasks' gradients apart, and so a batch of every task in each step."""
    return name not in ("sum", "mean")


def find_surgery(name: str, reduction: str = "sum") -> list[Surgery]:
    """The updates of one step: one for most surgeries, two for "gse". Imports the module of a MODULE:NAME.

    GSE (paper 004) updates with the mean of PCGrad's gradients, and at once again with the gradient of the tasks'
    summed loss at the new parameters.

    Args:
        name: "sum", "mean", "pcgrad", "gse", or "MODULE:NAME": a callable from Gram matrix to weights, or a class of
            such, as TorchJD's weightings are; "MODULE:NAME(0.4, norm_eps=1e-4)" calls it first, with Python's literals.
            Such a name is code: pass none on from a file that is not trusted.
        reduction: of "pcgrad".

    Raises:
        UserError: an unknown name, nothing callable there, or one whose state cannot be saved.
    """
    check_surgery(name)
    known = {"sum": [_SUM], "mean": [_MEAN], "pcgrad": [_PCGRAD[reduction]], "gse": [_PCGRAD["mean"], _SUM]}
    return known[name] if name in known else [Surgery(name, weighting=UserWeighting(name))]


def _reference(name: str) -> tuple[str, str, list[Any] | None, dict[str, Any]]:
    """Module, attribute and arguments of a "MODULE:NAME(...)"; None for the positional ones where there is no call.

    Raises:
        UserError: it has another form.
    """
    module, _, rest = name.partition(":")
    try:
        call = ast.parse(rest.strip(), mode="eval").body
        function = call.func if isinstance(call, ast.Call) else call
        attribute = ast.unparse(function)
        if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
            raise ValueError("not a dotted name")
        if not isinstance(call, ast.Call):
            return module, attribute, None, {}
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("**keywords")
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return module, attribute, [ast.literal_eval(argument) for argument in call.args], keywords
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise UserError(
            f"--surgery {name[:100]}: expected MODULE:NAME or MODULE:NAME(ARGUMENTS), such as some.module:Name(c=0.4);"
            " arguments are numbers, strings, True, False, None, and lists, tuples or dictionaries of them"
        ) from None


class UserWeighting:
    """A weighting named by MODULE:NAME. It may keep a state from step to step, which goes into the checkpoints.

    Every process calls it in every step, with the same Gram matrix, and takes the first one's weights.

    Raises:
        UserError: it cannot be imported or built, is not callable, or has a state that cannot be saved.
    """

    def __init__(self, name: str) -> None:
        module, attribute, arguments, keywords = _reference(name)
        self.name = name
        self._called = False
        try:
            found = operator.attrgetter(attribute)(importlib.import_module(module))
            if arguments is not None or isinstance(found, type):
                found = found(*(arguments or ()), **keywords)
        except Exception as error:
            raise UserError(f"--surgery {name}: cannot be loaded ({_said(error)})") from error
        if not callable(found):
            raise UserError(f"--surgery {name}: expected a callable from Gram matrix to weights, got {found!r}")
        self.weighting: Weighting = found
        self._state()

    def __call__(self, gram: Tensor, generator: torch.Generator) -> Tensor:
        """The weights [T] for a Gram matrix [T, T]. torch's, numpy's and Python's default generators follow ours.

        A matrix that is not finite gets weights of 1 and does not reach the weighting: that step is skipped.

        Raises:
            UserError: it raised, or gave something else than one number for each task.
        """
        if not gram.isfinite().all():
            return sum_weights(gram)
        try:
            with _seeded(generator.initial_seed()):
                weights = self.weighting(gram)
        except Exception as error:
            problem = f"raised {type(error).__name__}: {_said(error)}"
            raise UserError(f"--surgery {self.name}: {problem}, for a Gram matrix {list(gram.shape)}") from error
        if not isinstance(weights, Tensor) or weights.shape != gram.shape[:1]:
            got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise UserError(f"--surgery {self.name}: must return a tensor of {len(gram)} weights, got {got}")
        if not self._called:
            self._state()  # refuse now what the first call added
        self._called = True
        return weights.detach().to(gram)

    def save(self, directory: Path) -> None:
        """Write the state, if there is any, into a checkpoint.

        Raises:
            UserError: it cannot be saved.
        """
        state = self._state()
        if state is not None:
            save_state(*state, directory / STATE)

    def load(self, directory: Path, device: torch.device) -> None:
        """Take over the state in a checkpoint.

        Raises:
            UserError: there is none, or it is that of something else.
        """
        path = directory / STATE
        if not path.exists():
            if self._state() is None:
                return
            raise UserError(
                f"{path} is missing: the checkpoint holds no state of --surgery {self.name}; start a new run"
            )
        try:
            load_state(self.weighting, path, device)
        except Exception as error:
            raise UserError(
                f"{path} does not fit --surgery {self.name} ({_said(error)}); resume with the weighting that wrote it"
            ) from None

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        try:
            return state_of(self.weighting)
        except Unsaved as unsaved:
            raise UserError(
                f"--surgery {self.name}: its attribute {unsaved} cannot be saved in a checkpoint; give the class"
                " state_dict() and load_state_dict(state), of numbers, strings, tensors and containers of them"
            ) from None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Have the default random generators follow a seed, and as they were afterwards."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


def _said(error: Exception) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Conflicts:
    """How task gradients disagree (two of Yu et al.'s tragic triad), and what a surgery did about it."""

    cosine: Tensor  # float64 [T, T]; NaN where a gradient is 0 or not finite
    magnitude_similarity: Tensor  # float64 [T, T]: 2 |a| |b| / (|a|^2 + |b|^2), 1 for equal norms
    projected_share: float  # |weighted sum - the surgery's own plain sum or mean| / |that plain sum or mean|

    @classmethod
    def of(cls, gram: Tensor, projected_share: float) -> Conflicts:
        """From a Gram matrix [T, T], and what `kernels.surgery_weights` says that surgery projected."""
        gram = gram.double().cpu()
        squares = gram.diagonal()
        norms = squares.sqrt()
        return cls(
            gram / torch.outer(norms, norms),
            2 * torch.outer(norms, norms) / (squares[:, None] + squares[None, :]),
            projected_share,
        )
