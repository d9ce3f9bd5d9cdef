"""What minbert finds on this machine: processor, libraries, native code, ops, GPUs, memory, cache and extras."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

import minbert
from minbert import kernels
from minbert.device import resolve_precision
from minbert.errors import UserError
from minbert.files.cache_directory import cache_directory, cache_limit, cache_usage
from minbert.kernels import example_calls, flight_recorder, op_checks
from minbert.kernels.dispatch import too_old

_MATMULS = ("blas", "onednn")
_Facts = dict[str, Any]


class Bytes(int):
    """A size: a number for JSON, a text with its unit for people."""

    def __str__(self) -> str:
        return f"{self / 2**30:.1f} GiB" if self >= 2**27 else f"{self / 2**20:.1f} MiB"


def facts() -> dict[str, _Facts]:
    """All of them by section; numbers, texts, lists and dictionaries that JSON has."""
    sections: dict[str, Callable[[], _Facts]] = {
        "versions": versions,
        "processor": processor,
        "threads": threads,
        "native extension": native_extension,
        "GPUs": gpus,
        "memory": memory,
        "cache": cache,
        "extras": extras,
        "environment": environment,
    }
    return {name: section() for name, section in sections.items()}


def versions() -> _Facts:
    return {
        "minbert": minbert.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "CUDA of torch": torch.version.cuda,
    }


def processor() -> _Facts:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: _Facts = {"name": processor_name(), "architecture": platform.machine(), "cores": os.cpu_count()}
    found |= {"usable cores": usable}
    with suppress(RuntimeError, ValueError):  # without native code, or where it is refused
        found["instruction sets"] = list(kernels.native.library().isas())
        found["instruction set chosen"] = kernels.native.isa()
        found["multiplies bfloat16"] = resolve_precision("auto", torch.device("cpu")) == "bf16"
    return found


def threads() -> _Facts:
    config = torch.__config__.show()
    onednn, blas = re.search(r"MKL-DNN (v[\d.]+)", config), re.search(r"BLAS_INFO=(\w+)", config)
    return {
        "CPU threads": torch.get_num_threads(),
        "OpenMP": _openmp_libraries() or None,
        "BLAS of torch": blas and blas[1],
        "oneDNN of torch": (onednn[1] if onednn else "yes") if torch.backends.mkldnn.is_available() else None,
    }


def native_extension() -> _Facts:
    if (reason := kernels.native.refusal() or kernels.native.missing_reason()) is not None:
        return {"missing": reason}
    library = kernels.native.library()
    return {"path": library.__file__, "interface": library.INTERFACE, "built with CUDA": library.CUDA}


def gpus() -> _Facts:
    """By name of the device."""
    found = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device, properties = torch.device("cuda", index), torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = {
            "name": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory": Bytes(properties.total_memory),
            "multiplies bfloat16": properties.major >= 8,
            "supported": too_old(device) is None,
        }
    return found


def memory() -> _Facts:
    """Of the machine."""
    names = {"MemTotal": "total", "MemAvailable": "available"}
    with suppress(OSError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        return {names[name[:-1]]: Bytes(int(size) * 1024) for name, size, *_ in lines if name[:-1] in names}
    if hasattr(os, "sysconf"):
        return {"total": Bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "available": None}
    return {"total": None, "available": None}


def cache() -> _Facts:
    directory = cache_directory()
    files, size = cache_usage(directory)
    found: _Facts = {"directory": str(directory), "files": files, "size": Bytes(size)}
    with suppress(UserError):  # says `problems`
        limit = cache_limit()
        found["limit"] = None if limit is None else Bytes(limit)
    return found


def extras() -> _Facts:
    """What is installed of each extra of pyproject.toml, and what is missing."""
    try:
        required = [Requirement(line) for line in importlib.metadata.requires("minbert") or ()]
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: _Facts = {}
    for extra in importlib.metadata.metadata("minbert").get_all("Provides-Extra") or ():
        own = [each for each in required if each.marker and each.marker.evaluate({"extra": extra})]
        own = [each for each in own if not each.marker.evaluate({"extra": ""})]  # type: ignore[union-attr]
        versions = {each.name: _version(each.name) for each in own}
        found[extra] = {
            "installed": {name: version for name, version in versions.items() if version is not None},
            "missing": [name for name, version in versions.items() if version is None],
            "of another version": [
                str(Requirement(f"{each.name}{each.specifier}"))
                for each in own
                if (version := versions[each.name]) is not None and not each.specifier.contains(version, True)
            ],
        }
    return found


def environment() -> _Facts:
    """The variables that change what minbert and torch compute with."""
    prefixes = ("MINBERT_", "OMP_", "MKL_", "GOMP_", "KMP_", "CUDA", "TORCH", "TRITON_", "LD_PRELOAD")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}


def ops() -> dict[str, _Facts]:
    """By type of device, for each op what runs it, and why other compiled code does not."""
    found: dict[str, _Facts] = {}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        with kernels.use_backend("reference" if kernels.native.refusal() else "auto"):
            explained = kernels.backends(device, explain=True)
        found[device] = {
            op: {"runs": _shown(op, runs), "not": {backend: list(why) for backend, why in against.items()}}
            for op, (runs, against) in explained.items()
        }
    return found


def problems() -> list[str]:
    """What is wrong, and what to do about it, a line each."""
    found = [kernels.native.refusal() or kernels.native.missing_reason(), flight_recorder.refusal()]
    if (other := other_kernels()) is not None:
        root = Path(minbert.__file__).parents[1]
        found.append(f"minbert is that of {root}, and its kernels, which differ, are those of {other}; install {root}")
    try:
        cache_limit()
    except UserError as error:
        found.append(str(error))
    return [line for line in found if line is not None]


def notes() -> Iterator[str]:
    """What works less well than it could, and what to do about it, a line each."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        if (old := too_old(device)) is not None:
            yield f"{device} is not used: minbert {old}; --device auto takes the CPU"
    if not devices and Path("/dev/nvidia0").exists():
        build = "was built without CUDA" if torch.version.cuda is None else "sees no device"
        yield f"an NVIDIA GPU is here, but torch {torch.__version__} {build}; install torch for this driver's CUDA"
    usable = any(too_old(device) is None for device in devices)
    if usable and not kernels.native.refusal() and not kernels.native.cuda_available():
        remedy = "install minbert with MINBERT_CUDA=1 where nvcc is"
        yield f"the native extension was built without CUDA: on GPUs surgery and AdamW run in plain PyTorch; {remedy}"
    if len({re.split(r"[-.]", Path(path).name)[0] for path in _openmp_libraries()}) > 1:
        paths = ", ".join(_openmp_libraries())
        yield f"OpenMP libraries of several kinds are loaded, each with threads of its own: {paths}"


def checks(device: torch.device) -> Iterator[op_checks.Comparison]:
    """Compare each custom op with the reference, on small inputs of the dtypes that are compiled for the device.

    Products of float32 on CPUs are by each library that torch has. Of several calls of an op that with the greatest
    share of its bound is given.
    """
    halves = (torch.bfloat16,) if device.type == "cpu" else (torch.float16, torch.bfloat16)
    found: dict[tuple[str, str, str], op_checks.Comparison] = {}
    for matmul in _MATMULS[: 1 + (device.type == "cpu" and torch.backends.mkldnn.is_available())]:
        with kernels.use_matmul(matmul):
            calls = example_calls.calls(device, (torch.float32, *halves), sizes=example_calls.SMALL)
            for name, call in calls.items():
                if matmul != _MATMULS[0] and not name.startswith("linear"):
                    continue
                with op_checks.captured_calls() as captured:
                    call()
                for each in map(op_checks.compare, captured):
                    key = each[:3]
                    if key not in found or each.share > found[key].share:
                        found[key] = each
    yield from found.values()


def _shown(op: str, runs: str) -> str:
    return "torch" if op == "linear" and runs == "reference" else runs


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """The processor's own name, or its architecture's."""
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found is not None:
            return found[1]
    return platform.processor() or platform.machine()


def other_kernels() -> Path | None:
    """Where the kernels are, if it is not the source tree of minbert and they differ from those there.

    In the root of a source tree Python finds minbert there, and its kernels in an installed one.
    """
    own, used = Path(minbert.__file__).resolve().parents[1] / "kernels", Path(kernels.__file__).resolve().parent
    if not (own / "__init__.py").exists() or own == used:
        return None
    files = [{path.relative_to(each): path.read_bytes() for path in each.rglob("*.py")} for each in (own, used)]
    return used if files[0] != files[1] else None


def commit() -> str | None:
    """The commit of the source tree that minbert runs from; None where git knows of none.

    It ends in -dirty after changes, and where the kernels are others (`other_kernels`).
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        found = done.stdout.strip()
        return f"{found.removesuffix('-dirty')}-dirty" if found and other_kernels() else found or None
    return None


def _openmp_libraries() -> list[str]:
    """The paths of the OpenMP libraries that this process has loaded, where the system tells."""
    with suppress(OSError):
        paths = re.findall(
            r"\S*/lib(?:gomp|omp|iomp)[\w.-]*\.so[\w.]*$", Path("/proc/self/maps").read_text(), re.MULTILINE
        )
        return list(dict.fromkeys(paths))
    return []
