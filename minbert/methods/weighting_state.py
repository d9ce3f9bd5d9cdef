"""The state of a user's weighting in a safetensors file: tensors, and JSON that refers to them; never code."""

from __future__ import annotations

import functools
import itertools
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

_JSON_SCALARS = (type(None), bool, int, float, str)
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "set": set, "deque": deque}
_MAPPINGS: dict[str, Callable[[], Any]] = {"dict": dict, "OrderedDict": OrderedDict}
_CONSTANTS: tuple[type, ...] = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_CONSTANTS += (types.ModuleType, functools.partial, logging.Logger, PurePath, re.Pattern)
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_MODULE_INTERNALS = vars(nn.Module()).keys() - {"_buffers", "_parameters", "_modules", "training"}


class UnsupportedAttribute(Exception):
    """The message names an attribute whose type cannot be saved, and the type."""


def state_of(weighting: Any) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """An object's state as a JSON value and the tensors that it refers to by name; None if it has no state.

    The state is that of `state_dict()` if the class has this method and `load_state_dict`. Otherwise it is the object's
    attributes: numbers, strings, tensors, arrays, torch generators, containers of these, and objects with a state.
    Attributes are also saved for a torch module, whose own `state_dict` has only parameters and buffers and cannot load
    a buffer that was None. Functions, classes and Python modules are constants.

    Raises:
        UnsupportedAttribute: an attribute is none of these.
    """
    if isinstance(weighting, _CONSTANTS):
        return None
    encoder = _Encoder()
    state = encoder.object("", weighting)
    return None if state == {"attributes": {}} else (state, encoder.tensors)


def save_state(state: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
    """Write what `state_of` returned."""
    write_tensors(path, tensors, metadata={"state": json.dumps(state)})


def load_state(weighting: Any, path: Path, device: torch.device) -> None:
    """Set the state of an object, constructed like the one that was saved, from a file of `save_state`.

    Args:
        device: for tensors that were not on the CPU.

    Raises:
        Exception: the file holds no such state, or that of another object.
    """
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        restore_state(weighting, json.loads(file.metadata()["state"]), tensors, device)


def restore_state(
    weighting: Any, state: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    """Set the state of an object, constructed like the one that was saved, to what `state_of` returned.

    Args:
        device: for tensors that were not on the CPU.

    Raises:
        Exception: the state is that of another object.
    """
    _Decoder(tensors, device).object(state, weighting)


class _Encoder:
    """Encodes a state in JSON. Values without a JSON type become an object whose first key names the type."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, tuple[str, Tensor]] = {}  # by id; two attributes may hold one tensor
        self._ancestors: list[int] = []

    def object(self, path: str, value: Any) -> dict[str, Any]:
        if id(value) in self._ancestors:
            raise UnsupportedAttribute(f"{path} ({type(value).__name__}, which refers back to itself)")
        self._ancestors.append(id(value))
        if _has_state_dict(value):
            state = {"state_dict": self.value(f"{path}.state_dict()", value.state_dict())}
        else:
            left_out = _MODULE_INTERNALS if isinstance(value, nn.Module) else ()
            saved = {name: each for name, each in vars(value).items() if name not in left_out}
            state = {"attributes": {name: self.value(f"{path}.{name}", each) for name, each in saved.items()}}
        self._ancestors.pop()
        return state

    def value(self, path: str, value: Any) -> Any:
        kind = type(value).__name__
        if type(value) in _JSON_SCALARS:
            return value
        if isinstance(value, _CONSTANTS):
            return {"constant": kind}
        if isinstance(value, Enum):
            return {"enum": value.name}
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex():
            requires_grad = value.requires_grad and value.is_leaf
            return {"tensor": self._name(value), "cpu": value.device.type == "cpu", "requires_grad": requires_grad}
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
            return {"array": self._name(torch.from_numpy(np.array(value))), "scalar": isinstance(value, np.generic)}
        if isinstance(value, torch.dtype | torch.device):
            return {kind: str(value)}
        if isinstance(value, torch.Generator):
            return {"generator": self._name(value.get_state())}
        if isinstance(value, Mapping):
            entries = [[self.value(path, key), self.value(f"{path}[{key!r}]", each)] for key, each in value.items()]
            return {"mapping": kind, "entries": entries}
        if kind in _SEQUENCES:
            entries = [self.value(f"{path}[{index}]", each) for index, each in enumerate(value)]
            return {"sequence": kind, "entries": entries, "maxlen": getattr(value, "maxlen", None)}
        if not isinstance(value, Tensor) and (_has_state_dict(value) or hasattr(value, "__dict__")):
            return self.object(path, value)
        raise UnsupportedAttribute(f"{path.lstrip('.')} ({kind})")

    def _name(self, value: Tensor) -> str:
        if id(value) not in self._names:
            name = str(len(self.tensors))
            self._names[id(value)] = name, value
            self.tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return self._names[id(value)][0]


class _Decoder:
    """Decodes what `_Encoder` encoded, given the values now in place; of these, objects and constants stay."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.tensors = tensors
        self.device = device
        self._decoded: dict[str, Tensor] = {}

    def object(self, state: Mapping[str, Any], target: Any) -> None:
        if _has_state_dict(target):
            target.load_state_dict(self.value(state["state_dict"], None))
            return
        attributes = vars(target)
        for name, each in state["attributes"].items():
            if name in attributes or not (isinstance(each, dict) and "constant" in each):
                attributes[name] = self.value(each, attributes.get(name))

    def value(self, state: Any, current: Any) -> Any:
        if not isinstance(state, dict):
            return state
        kind, content = next(iter(state.items()))
        if kind == "tensor":
            return self._tensor(content, current, state)
        if kind == "array":
            array = self.tensors[content].numpy()
            return array[()] if state["scalar"] else array
        if kind == "device":
            return torch.device(content)
        if kind == "dtype":
            return _DTYPES[content]
        if kind == "generator":
            return (current or torch.Generator()).set_state(self.tensors[content])
        if kind == "enum":
            return type(current)[content]
        if kind == "mapping":
            target = current if type(current).__name__ == content else _MAPPINGS[content]()
            entries = [(self.value(key, None), each) for key, each in state["entries"]]
            values = {key: self.value(each, target.get(key)) for key, each in entries}
            target.clear()
            target.update(values)
            return target
        if kind == "sequence":
            elements = itertools.chain(current if isinstance(current, list | tuple) else (), itertools.repeat(None))
            entries = [self.value(each, element) for each, element in zip(state["entries"], elements, strict=False)]
            return deque(entries, state["maxlen"]) if content == "deque" else _SEQUENCES[content](entries)
        if current is None:
            raise LookupError(f"the object has no {content if kind == 'constant' else 'object'} there")
        if kind != "constant":
            self.object(state, current)
        return current

    def _tensor(self, name: str, current: Any, state: Mapping[str, Any]) -> Tensor:
        if isinstance(current, nn.Parameter):  # in place, for an optimizer that holds it too
            with torch.no_grad():
                return current.copy_(self.tensors[name])
        if name not in self._decoded:
            tensor = self.tensors[name] if state["cpu"] else self.tensors[name].to(self.device)
            self._decoded[name] = tensor.requires_grad_(state["requires_grad"])
        return self._decoded[name]


def _has_state_dict(value: Any) -> bool:
    """Whether the class defines its state by `state_dict` and `load_state_dict`."""
    methods = [getattr(type(value), name, None) for name in ("state_dict", "load_state_dict")]
    return None not in methods and methods[0] is not nn.Module.state_dict
