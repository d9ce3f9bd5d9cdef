"""The flight recorder: with MINBERT_RECORD=DIR every custom op writes its inputs to a file in DIR before it runs.

After a crash within an op (SIGSEGV, SIGABRT, an illegal address on a GPU), the last file has the inputs of that op:
the copies to the host wait for the calls before. `minbert.kernels.op_checks` runs a file's call again.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import native
from .dispatch import choice
from .matmul_library import matmul

KEPT = 32  # calls, unless MINBERT_RECORD_CALLS says otherwise
SUFFIX = ".safetensors"
_FORMAT = "minbert-call-1"
_Arguments = Sequence[Any]


class Call(NamedTuple):
    """A call of a custom op."""

    op: str  # without "minbert::"
    arguments: list[Any]  # tensors, numbers, dtypes, None, and lists of them
    settings: dict[str, Any]  # at the time of the call: see `settings`


def settings() -> dict[str, Any]:
    """What else decides the result of a call: backend, library of matrix products, CPU threads, instruction set."""
    return {
        "backend": choice(),
        "matmul": matmul(),
        "threads": torch.get_num_threads(),
        "isa": native.isa(),
        "torch": torch.__version__,
    }


# A file of a call ---------------------------------------------------------------------------------------------------


def write_call(path: Path, call: Call) -> None:
    """Write a call, atomically. A tensor that occurs several times is written once."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = value.data_ptr(), value.shape, value.stride(), value.dtype
            if key not in names:
                names[key] = str(len(names))
                tensors[names[key]] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": names[key], "strides": value.stride(), "device": value.device.type}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        return [described(each) for each in value] if isinstance(value, list | tuple) else value

    content = {"op": call.op, "arguments": described(call.arguments), "settings": call.settings}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"format": _FORMAT, "call": json.dumps(content)})
    os.replace(temporary, path)


def read_call(path: Path) -> Call:
    """The call that `write_call` wrote, with tensors laid out and placed as they were.

    Raises:
        ValueError: the file is damaged or of another kind, or was written where another kind of device is.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')}, not {_FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads(metadata["call"])
        placed: dict[str, Tensor] = {}
        arguments = [_restored(value, tensors, placed) for value in content["arguments"]]
        return Call(content["op"], arguments, content["settings"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or no file of a recorded call ({error})") from None


def _restored(value: Any, tensors: dict[str, Tensor], placed: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(each, tensors, placed) for each in value]
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    if value["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("it was recorded on a CUDA device, and there is none here")
    name = value["tensor"]
    if name not in placed:
        placed[name] = _laid_out(tensors[name].to(value["device"]), value["strides"])
    return placed[name]


def _laid_out(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """The same numbers with these strides."""
    if tensor.stride() == tuple(strides):
        return tensor
    once = tensor[tuple(slice(0, 1 if stride == 0 else None) for stride in strides)]  # of an expanded dimension
    memory = torch.empty_strided(once.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return memory.copy_(once).expand(tensor.shape)


# Recording ----------------------------------------------------------------------------------------------------------


class Recorder:
    """Writes calls to a directory, and keeps the last of them. A call that cannot be written is a RuntimeError.

    Args:
        directory: made if need be; the numbers of calls go on from those that are there.
        kept: how many files stay.

    Raises:
        OSError: the directory cannot be made or read.
    """

    def __init__(self, directory: Path, kept: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._kept, self._lock = directory, kept, threading.Lock()
        self._files = deque(call_files(directory))
        self._number = int(self._files[-1].name.split("-")[0]) if self._files else 0

    def __call__(self, op: str, arguments: _Arguments) -> None:
        with self._lock:
            self._number += 1
            path = self._directory / f"{self._number:06}-{op}{SUFFIX}"
            try:
                write_call(path, Call(op, list(arguments), settings()))
            except (OSError, SafetensorError) as error:
                raise RuntimeError(f"MINBERT_RECORD: {path} cannot be written ({error})") from None
            self._files.append(path)
            while len(self._files) > self._kept:
                self._files.popleft().unlink(missing_ok=True)


def call_files(directory: Path) -> list[Path]:
    """The files of recorded calls in the order of the calls."""
    return sorted(directory.glob(f"[0-9]*-*{SUFFIX}"), key=lambda path: (len(path.name.split("-")[0]), path.name))


def _of_environment() -> tuple[Recorder | None, str | None]:
    """The recorder that the environment asks for, or why there cannot be one."""
    if not (directory := os.environ.get("MINBERT_RECORD")):
        return None, None
    kept = os.environ.get("MINBERT_RECORD_CALLS") or str(KEPT)
    if not kept.isdecimal() or int(kept) == 0:
        return None, f"MINBERT_RECORD_CALLS must be a number of calls, at least 1, got {kept!r}"
    rank = os.environ.get("RANK")  # of several processes that torchrun starts, each has a directory of its own
    path = Path(directory) / f"rank-{rank}" if rank else Path(directory)
    try:
        return Recorder(path, int(kept)), None
    except (OSError, ValueError) as error:
        return None, f"MINBERT_RECORD: {path} cannot be used for recorded calls ({error})"


_recorder, _refusal = _of_environment()


def refusal() -> str | None:
    """Why calls cannot be recorded though the environment asks for it, in one line, or None."""
    return _refusal


def is_on() -> bool:
    """Whether calls are recorded in this process."""
    return _recorder is not None


def recorded(
    op: str, inputs: Callable[..., _Arguments] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate an implementation of a custom op so that its calls are recorded; without MINBERT_RECORD it stays itself.

    A call while a CUDA graph is captured is not recorded. Where MINBERT_RECORD is refused, a call raises a ValueError.

    Args:
        inputs: gives the arguments to record, where they are not those of the op.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if _recorder is None and _refusal is None:
            return function

        @functools.wraps(function)  # torch reads the signature, whose annotations it looks up among this module's names
        def recording(*arguments: Any) -> Any:
            if _recorder is None:
                raise ValueError(_refusal)
            if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                _recorder(op, arguments if inputs is None else inputs(*arguments))
            return function(*arguments)

        return recording

    return decorate
