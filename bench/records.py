"""The form of the records in bench/results: the machine, versions and commit beside the rows of a table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from minbert import diagnosis
from minbert.kernels import matmul, native

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "minbert",
    "torch",
    "triton",
    "torchjd",
    "transformers",
    "onnx",
    "onnxruntime",
    "flash-attn",
    "liger-kernel",
)


def machine() -> dict[str, object]:
    """The processor, and what this process uses of it."""
    return {
        "cpu": diagnosis.processor_name(),
        "threads": torch.get_num_threads(),
        "isa": native.isa() or "none",
        "matmul": matmul(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_record(
    rows: Sequence[Mapping[str, object]],
    *,
    made_on: Mapping[str, object] | None = None,
    results: Path = RESULTS,
    path: Path | None = None,
    **more: Any,
) -> Path:
    """Write rows as `path`, or else `results`/TIME.json, with the machine (`machine()` unless given), versions, commit
    and `more`.

    Returns:
        the file.
    """
    now = datetime.now(timezone.utc)
    record = {
        "time": now.isoformat(timespec="seconds"),
        "commit": diagnosis.commit() or os.environ.get("MINBERT_COMMIT", "unknown"),  # in a copy without .git
        "machine": made_on or machine(),
        "versions": {name: _version(name) for name in PACKAGES},
        "rows": rows,
        **more,
    }
    path = path or results / f"{now:%Y-%m-%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
