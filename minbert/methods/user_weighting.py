"""A user's weighting, MODULE:NAME of a callable from Gram matrix to weights, and its state in checkpoints."""

from __future__ import annotations

import ast
import importlib
import inspect
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minbert.errors import UserError
from minbert.methods.weighting_state import UnsupportedAttribute, load_state, save_state, state_of
from minbert.seeds import derive_seed

STATE = "surgery.safetensors"  # file in a checkpoint

State = tuple[dict[str, Any], dict[str, Tensor]] | None  # as from `state_of`
Weighting = Callable[..., Tensor]  # gram [T, T] -> weights [T], as TorchJD's weightings are; perhaps with losses=


def check_reference(name: str) -> tuple[str, str, list[Any] | None, dict[str, Any]]:
    """Parse "MODULE:NAME(...)" into module, attribute, positional arguments (None without a call) and keywords.

    Raises:
        UserError: the name has another form.
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
    """A weighting named by MODULE:NAME. Checkpoints hold its state, if it keeps one from step to step.

    Every process calls it in every step, with the same Gram matrix, and uses the weights of rank 0.

    Attributes:
        needs_losses: whether the weighting has a parameter `losses`: float64 [T], of the tasks or groups.

    Raises:
        UserError: it cannot be imported or constructed, is not callable, or has a state that cannot be saved.
    """

    def __init__(self, name: str) -> None:
        module, attribute, arguments, keywords = check_reference(name)
        self.name = name
        self._called = False
        try:
            weighting = operator.attrgetter(attribute)(importlib.import_module(module))
            if arguments is not None or isinstance(weighting, type):
                weighting = weighting(*(arguments or ()), **keywords)
        except Exception as error:
            raise UserError(f"--surgery {name}: cannot be loaded ({_one_line(error)})") from error
        if not callable(weighting):
            raise UserError(f"--surgery {name}: expected a callable from Gram matrix to weights, got {weighting!r}")
        self.weighting: Weighting = weighting
        self.needs_losses = has_parameter(weighting, "losses")
        self._state()

    def prepare(self, tasks: int, device: torch.device, parts: int | None = None) -> None:
        """Nothing: the weighting makes its state itself."""

    def __call__(self, gram: Tensor, generator: torch.Generator, losses: Tensor | None = None) -> Tensor:
        """The weights [T] for a Gram matrix [T, T], with torch's, numpy's and Python's default generators seeded.

        Of matrices [G, T, T] of G parts of the model it is called for one after the other, and the weights are [G, T].

        The weighting is not called for a matrix that is not finite, of a step that is skipped; the weights are then 1.

        Args:
            generator: its seed is the default generators' during the call.
            losses: float64 [T], for a weighting that needs them.

        Raises:
            UserError: the weighting raised an exception, or did not return one number per task.
        """
        if gram.dim() == 3:
            return self._by_part(gram, generator, losses)
        if not gram.isfinite().all():
            return gram.new_ones(len(gram))
        try:
            with _seeded(generator.initial_seed()):
                weights = self.weighting(gram, **({"losses": losses} if self.needs_losses else {}))
        except Exception as error:
            problem = f"raised {type(error).__name__}: {_one_line(error)}"
            raise UserError(f"--surgery {self.name}: {problem}, for a Gram matrix {list(gram.shape)}") from error
        if not isinstance(weights, Tensor) or weights.shape != gram.shape[:1]:
            got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise UserError(f"--surgery {self.name}: must return a tensor of {len(gram)} weights, got {got}")
        if not self._called:
            self._state()  # checks the attributes that the first call added
        self._called = True
        return weights.detach().to(gram)

    def _by_part(self, grams: Tensor, generator: torch.Generator, losses: Tensor | None) -> Tensor:
        """The weights of each part of the model, each with seeds of its own.

        Raises:
            UserError: the weighting keeps a state from call to call, which several parts would share.
        """
        before, weights = self._state(), []
        for part, gram in enumerate(grams):
            seeded = torch.Generator().manual_seed(derive_seed(generator.initial_seed(), "part", part))
            weights.append(self(gram, seeded, losses))
        if len(grams) > 1 and not _equal(before, self._state()):
            raise UserError(
                f"--surgery {self.name} keeps a state from call to call, which the parts of --surgery-scope would"
                " share; leave --surgery-scope out"
            )
        return torch.stack(weights)

    def save(self, directory: Path) -> None:
        """Write the state, if any, to a checkpoint.

        Raises:
            UserError: it cannot be saved.
        """
        state = self._state()
        if state is not None:
            save_state(*state, directory / STATE)

    def load(self, directory: Path, device: torch.device) -> None:
        """Load the state from a checkpoint.

        Raises:
            UserError: the checkpoint has none, or that of another weighting.
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
            problem = f"{path} does not fit --surgery {self.name} ({_one_line(error)})"
            raise UserError(f"{problem}; resume with the weighting that wrote it") from None

    def _state(self) -> State:
        try:
            return state_of(self.weighting)
        except UnsupportedAttribute as attribute:
            raise UserError(
                f"--surgery {self.name}: its attribute {attribute} cannot be saved in a checkpoint; give the class"
                " state_dict() and load_state_dict(state), of numbers, strings, tensors and containers of them"
            ) from None


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether a callable, or the forward of a module, has a parameter of this name."""
    try:
        return name in inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):  # of some functions in C
        return False


def _equal(one: State, other: State) -> bool:
    """Whether two states of `state_of` are the same."""
    if one is None or other is None:
        return one is other
    (values, tensors), (others, their_tensors) = one, other
    return values == others and all(torch.equal(tensor, their_tensors[name]) for name, tensor in tensors.items())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the default generators of torch, numpy and Python, and restore their states afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _one_line(error: Exception) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__
