"""Small data in the course's format, and the options of a run that takes a second."""

from __future__ import annotations

import json
import os

# Small work on few threads that sleep when idle: quick even when something else keeps the cores busy.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ.setdefault("OMP_NUM_THREADS", "2")

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from course import write_course_data
from groups import SMALL, quick_options, quickly

from minbert import kernels
from minbert.device import resolve_precision

if not torch.cuda.is_available():  # for tests/triton, before a module of other tests imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the tests' encoded texts and compiled code out of the user's caches."""
    os.environ["MINBERT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    # Inductor takes code from its cache that another instruction set compiled.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="session", autouse=True)
def named_precision() -> Iterator[None]:
    """Let no test leave the precision of a run open: what `auto` chooses depends on the processor."""

    def resolve(name: str, *arguments: object) -> str:
        assert name != "auto", "name the precision of a test's run: --precision=fp32 or bf16"
        return resolve_precision(name, *arguments)

    with (
        patch("minbert.training.loop.resolve_precision", resolve),
        patch("minbert.inference.resolve_precision", resolve),
    ):
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_runs() -> Iterator[None]:
    with quickly():
        yield


@pytest.fixture(scope="session")
def course_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_course_data(tmp_path_factory.mktemp("course"))


@pytest.fixture(scope="session")
def shared(course_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A directory for the runs that tests of several processes share, and the options of all runs."""
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "ranks"
    directory.mkdir(exist_ok=True)
    small = tmp_path_factory.mktemp("small") / "small.yaml"
    small.write_text(json.dumps(SMALL))
    return directory, [f"--config={small}", f"--data={course_data}"]


@pytest.fixture
def quick(course_data: Path, tmp_path: Path) -> list[str]:
    """Options of a run of twelve steps in two epochs with a very small encoder, in `tmp_path / "run"`."""
    return quick_options(course_data, tmp_path / "run")


@pytest.fixture(params=["reference", "native"])
def weights_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference and the native code of `kernels.task_weights` in turn."""
    if request.param == "native" and kernels.backends("cpu").get("task_weights") != "native":
        pytest.skip(kernels.native.missing_reason() or "task_weights has no native code")
    with kernels.use_backend("auto" if request.param == "native" else "reference"):
        yield request.param
