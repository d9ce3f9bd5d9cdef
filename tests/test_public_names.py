"""The names that `minbert` itself has, and that importing it is instant."""

from __future__ import annotations

import subprocess
import sys

import pytest

import minbert
from minbert import train
from minbert.config import TrainConfig
from minbert.data.packing import pack
from minbert.data.tokenizer import Tokenizer
from minbert.errors import UserError
from minbert.methods.surgery import pcgrad_weights
from minbert.model import Encoder, MultitaskModel
from minbert.predictor import Prediction, Predictor, load
from minbert.runs.run_directory import Run
from minbert.tasks import Task
from minbert.training.callbacks import EpochInfo, StepInfo
from minbert.training.optimizer import AdamW

CLASSES = (AdamW, Encoder, EpochInfo, MultitaskModel, Prediction, Predictor, Run, StepInfo)
CLASSES += (Task, Tokenizer, TrainConfig, UserError)
NAMES = {each.__name__: each for each in (*CLASSES, train.fit, load, pack, pcgrad_weights)}


def fresh(code: str) -> str:
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_public_names_are_those_of_their_modules():
    assert {name: getattr(minbert, name) for name in minbert.__all__} == NAMES
    assert set(minbert.__all__) <= set(dir(minbert))
    assert minbert.train is train


def test_importing_minbert_imports_nothing_else():
    loaded = "[name for name in sys.modules if name.partition('.')[0] in ('torch', 'numpy', 'yaml', 'minbert')]"
    assert fresh(f"import sys, minbert; dir(minbert); print({loaded})") == "['minbert']"


def test_a_command_starts_without_what_only_some_runs_need():
    some = "('scipy.linalg', 'scipy.optimize', 'scipy.stats', 'sklearn', 'matplotlib', 'transformers', 'triton')"
    assert fresh(f"import sys, minbert.train; print([name for name in {some} if name in sys.modules])") == "[]"


def test_all_names_are_imported_by_a_star():
    assert fresh("from minbert import *; print(Encoder.__name__, pack.__name__, Task.__name__)") == "Encoder pack Task"


def test_a_name_that_is_none_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'minbert' has no attribute 'Encodre'"):
        _ = minbert.Encodre
    with pytest.raises(ImportError):
        from minbert import Encodre  # noqa: F401
