"""The state of a user's weighting, written to a safetensors file and read back: numbers and tensors, never code."""

from __future__ import annotations

import functools
import json
import logging
import re
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from minbert.files.atomic import write_tensors

_PLAIN = (type(None), bool, int, float, str)
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "set": set, "deque": deque}
_CONSTANT: tuple[type, ...] = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
_CONSTANT += (functools.partial, logging.Logger, PurePath, re.Pattern)
_INTERNALS = vars(nn.Module()).keys() - {"_buffers", "_parameters", "_modules", "training"}  # hooks and the like


class Unsaved(Exception):
    """An attribute that a file of data cannot hold. The message names it and its type."""


def state_of(weighting: Any) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """An object's state, if it has any: a JSON value, and the tensors that it names.

    The state is what `state_dict()` returns, if the object has that method and `load_state_dict`; else its attributes:
    numbers, strings, tensors, arrays, torch generators, containers of them, and objects that have a state in turn.
    A torch module's attributes are taken even though it has `state_dict`, which leaves out those that are no buffers,
    and cannot load a buffer that is None at first. Functions, classes and modules of Python count as constant.

    Raises:
        Unsaved: an attribute is something else.
    """
    if isinstance(weighting, _CONSTANT):
        return None
    writer = _Writer()
    state = writer.object("", weighting)
    return None if state == {"attributes": {}} else (state, writer.tensors)


def save_state(state: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
    """Write what `state_of` gave."""
    write_tensors(path, tensors, metadata={"state": json.dumps(state)})


def load_state(weighting: Any, path: Path, device: torch.device) -> None:
    """Give an object, built as the saved one was, the state that `save_state` wrote.

    Args:
        device: where tensors go that were not on the CPU.

    Raises:
        Exception: the file holds no such state, or that of another object.
    """
    with safe_open(path, "pt") as file:
        reader = _Reader({key: file.get_tensor(key) for key in file.keys()}, device)  # noqa: SIM118
        reader.object(json.loads(file.metadata()["state"]), weighting)


class _Writer:
    """A state as a JSON value; what JSON has no type for is a record whose first key names the type."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, tuple[str, Tensor]] = {}  # two attributes may hold one tensor
        self._open: list[int] = []

    def object(self, where: str, value: Any) -> dict[str, Any]:
        if id(value) in self._open:
            raise Unsaved(f"{where} ({type(value).__name__}, which refers back to itself)")
        self._open.append(id(value))
        if _has_protocol(value):
            state = {"state_dict": self.value(f"{where}.state_dict()", value.state_dict())}
        else:
            hidden = _INTERNALS if isinstance(value, nn.Module) else ()
            kept = {name: each for name, each in vars(value).items() if name not in hidden}
            state = {"attributes": {name: self.value(f"{where}.{name}", each) for name, each in kept.items()}}
        self._open.pop()
        return state

    def value(self, where: str, value: Any) -> Any:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, _CONSTANT):
            return {"constant": type(value).__name__}
        if isinstance(value, Enum):
            return {"enum": value.name}
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex():
            return {
                "tensor": self._name(value),
                "cpu": value.device.type == "cpu",
                "requires_grad": value.requires_grad and value.is_leaf,
            }
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
            return {"array": self._name(torch.from_numpy(np.array(value))), "scalar": isinstance(value, np.generic)}
        if isinstance(value, torch.dtype | torch.device):
            return {type(value).__name__: str(value)}
        if isinstance(value, torch.Generator):
            return {"generator": self._name(value.get_state())}
        if isinstance(value, Mapping):
            entries = [[self.value(where, key), self.value(f"{where}[{key!r}]", each)] for key, each in value.items()]
            return {"mapping": type(value).__name__, "entries": entries}
        if type(value).__name__ in _SEQUENCES:
            entries = [self.value(f"{where}[{index}]", each) for index, each in enumerate(value)]
            return {"sequence": type(value).__name__, "entries": entries, "maxlen": getattr(value, "maxlen", None)}
        if not isinstance(value, Tensor) and (_has_protocol(value) or hasattr(value, "__dict__")):
            return self.object(where, value)
        raise Unsaved(f"{where.lstrip('.')} ({type(value).__name__})")

    def _name(self, value: Tensor) -> str:
        name = str(len(self.tensors))
        if id(value) not in self._seen:
            self._seen[id(value)] = name, value
            self.tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return self._seen[id(value)][0]


class _Reader:
    """What `_Writer` wrote, as the values that it was; objects and constants are those that are there already."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.tensors = tensors
        self.device = device
        self._placed: dict[str, Tensor] = {}

    def object(self, state: Mapping[str, Any], target: Any) -> None:
        if _has_protocol(target):
            target.load_state_dict(self.value(state["state_dict"], None))
            return
        current = vars(target)
        for name, each in state["attributes"].items():
            if name in current or not (isinstance(each, dict) and "constant" in each):
                current[name] = self.value(each, current.get(name))

    def value(self, state: Any, current: Any) -> Any:
        if not isinstance(state, dict):
            return state
        kind, what = next(iter(state.items()))
        if kind == "tensor":
            return self._tensor(state, current)
        if kind == "array":
            array = self.tensors[what].numpy()
            return array[()] if state["scalar"] else array
        if kind in ("dtype", "device"):
            return torch.device(what) if kind == "device" else _dtype(what)
        if kind == "generator":
            generator = torch.Generator() if current is None else current
            return generator.set_state(self.tensors[what])
        if kind == "enum":
            return type(current)[what]
        if kind == "mapping":
            return self._mapping(state, current)
        if kind == "sequence":
            known = list(current) if isinstance(current, list | tuple) else []
            known += [None] * len(state["entries"])
            entries = [self.value(each, old) for each, old in zip(state["entries"], known, strict=False)]
            return deque(entries, state["maxlen"]) if what == "deque" else _SEQUENCES[what](entries)
        if current is None:
            raise LookupError(f"no {what if kind == 'constant' else 'object'} to go on with")
        if kind != "constant":
            self.object(state, current)
        return current

    def _tensor(self, state: Mapping[str, Any], current: Any) -> Tensor:
        name = state["tensor"]
        if isinstance(current, nn.Parameter):  # an optimizer may hold it too
            with torch.no_grad():
                return current.copy_(self.tensors[name])
        if name not in self._placed:
            placed = self.tensors[name] if state["cpu"] else self.tensors[name].to(self.device)
            self._placed[name] = placed.requires_grad_(state["requires_grad"])
        return self._placed[name]

    def _mapping(self, state: Mapping[str, Any], current: Any) -> Any:
        new: dict[str, Callable[[], Any]] = {"dict": dict, "OrderedDict": OrderedDict}
        target = current if type(current).__name__ == state["mapping"] else new[state["mapping"]]()
        entries = [(self.value(key, None), each) for key, each in state["entries"]]
        values = {key: self.value(each, target.get(key)) for key, each in entries}
        target.clear()
        target.update(values)
        return target


def _has_protocol(value: Any) -> bool:
    """Whether a class says itself what its state is."""
    methods = [getattr(type(value), name, None) for name in ("state_dict", "load_state_dict")]
    return None not in methods and methods[0] is not nn.Module.state_dict


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."))
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} is no torch.dtype")
    return found
