"""Train several runs one after another in one group of processes: `torchrun several_runs.py FILE`, lists of options."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from minbert.cli import parse_layers
from minbert.config import TrainConfig
from minbert.ranks import Ranks
from minbert.train import train

with Ranks.joined(torch.device("cpu"), 60.0) as ranks:
    for options in json.loads(Path(sys.argv[1]).read_text()):
        train(parse_layers("train", TrainConfig, options), Console(quiet=True), ranks)
