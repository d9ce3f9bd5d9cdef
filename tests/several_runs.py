"""Train several runs one after another in one group of processes: `torchrun several_runs.py FILE DEVICE [BACKEND]`.

FILE has lists of options. The ranks speak as over BACKEND, whatever carries it: what NCCL is given runs over gloo too.
No plots are drawn, which would take longer than such small runs.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from rich.console import Console

from minbert.cli import parse_layers
from minbert.config import TrainConfig
from minbert.device import resolve_device
from minbert.ranks import Ranks
from minbert.train import train

file, device, *backend = sys.argv[1:]
no_plots, no_report = patch("minbert.finish.plot_run"), patch("minbert.finish.write_report")
speaking = patch.object(Ranks, "backend", *backend) if backend else nullcontext()
with no_plots, no_report, Ranks.joined(resolve_device(device), 60.0) as ranks, speaking:
    for options in json.loads(Path(file).read_text()):
        config = parse_layers("train", TrainConfig, options)
        assert config.precision != "auto", "what it chooses depends on the processor"
        train(config, Console(quiet=True), ranks)

# A thread that is left may want a tensor's memory freed when there is no interpreter any more: that aborts the process.
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), threads
