"""Multitask fine-tuning of BERT with SMART regularisation and gradient surgery, on compiled kernels."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minbert.config import TrainConfig
    from minbert.data.packing import pack
    from minbert.data.tokenizer import Tokenizer
    from minbert.errors import UserError
    from minbert.methods.surgery import pcgrad_weights
    from minbert.model import Encoder, MultitaskModel
    from minbert.predictor import Prediction, Predictor, load
    from minbert.runs.run_directory import Run
    from minbert.tasks import Task
    from minbert.train import fit
    from minbert.training.callbacks import EpochInfo, StepInfo
    from minbert.training.optimizer import AdamW

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    # torch's OpenMP threads (libgomp's) spin while they wait, for as long as this says when torch is loaded. By default
    # that is so long that a step takes ten times as long where something else keeps the cores busy.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    # This is the repository's directory, and its kernels stand beside it. Where Python looks here first, as for
    # `python -m` in the repository's root, those of an installed minbert are taken.
    __path__ += [
        path for place in sys.path if os.path.isdir(os.path.join(path := os.path.join(place, "minbert"), "kernels"))
    ]

__version__ = "0.2.0"
__all__ = [
    "AdamW",
    "Encoder",
    "EpochInfo",
    "MultitaskModel",
    "Prediction",
    "Predictor",
    "Run",
    "StepInfo",
    "Task",
    "Tokenizer",
    "TrainConfig",
    "UserError",
    "fit",
    "load",
    "pack",
    "pcgrad_weights",
]

_MODULES = {  # where each public name is defined: importing minbert alone imports none of them, nor torch
    "AdamW": "minbert.training.optimizer",
    "Encoder": "minbert.model",
    "EpochInfo": "minbert.training.callbacks",
    "MultitaskModel": "minbert.model",
    "Prediction": "minbert.predictor",
    "Predictor": "minbert.predictor",
    "Run": "minbert.runs.run_directory",
    "StepInfo": "minbert.training.callbacks",
    "Task": "minbert.tasks",
    "Tokenizer": "minbert.data.tokenizer",
    "TrainConfig": "minbert.config",
    "UserError": "minbert.errors",
    "fit": "minbert.train",
    "load": "minbert.predictor",
    "pack": "minbert.data.packing",
    "pcgrad_weights": "minbert.methods.surgery",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'minbert' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
