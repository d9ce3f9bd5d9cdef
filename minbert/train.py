"""Fine-tune on several tasks at once: `minbert train`. The training loop is minbert/training/loop.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from minbert import cli
from minbert.config import TrainConfig
from minbert.console import Terminal
from minbert.cross_validation import cross_validate, has_begun
from minbert.device import keep_freed_memory, resolve_device
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError
from minbert.training.loop import train
from minbert.training.stop_signal import Stopped


def main(arguments: Sequence[str]) -> int:
    config = restarted(cli.parse_layers("train", TrainConfig, arguments))
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    try:
        with ProcessGroup.join(device, config.timeout) as group:
            start(config, Terminal(quiet=not group.is_main), group)
    except Stopped as stopped:
        return 128 + stopped.number
    return 0


def start(config: TrainConfig, console: Console, group: ProcessGroup) -> dict[str, Any]:
    """Train a run, or with --folds and no --fold the runs of all folds; raises as `train` does."""
    several = config.folds is not None and config.fold is None
    return cross_validate(config, console, group) if several else train(config, console, group)


def restarted(config: TrainConfig) -> TrainConfig:
    """The options for a process that torchrun has started again (--max-restarts): the run goes on.

    Raises:
        UserError: it cannot be found.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or config.resume:
        return config
    if config.out is None:
        raise UserError("--max-restarts of torchrun needs --out: a process that is started again finds the run there")
    return config.replace(resume=has_begun(config))


if __name__ == "__main__":
    cli.run(main)
