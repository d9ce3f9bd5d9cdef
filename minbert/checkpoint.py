"""Checkpoints: an encoder that `transformers` loads, the heads, the tokenizer, the optimizer, the progress."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from minbert.errors import UserError
from minbert.files import write_directory, write_json, write_tensors, writing
from minbert.model import MultitaskModel, save_heads
from minbert.optimizer import State
from minbert.surgery import Surgery
from minbert.tokenizer import Tokenizer

Scores = dict[str, dict[str, float]]


@dataclass
class Progress:
    """Where a run stands. With the seed it is the whole state of the random numbers: they are functions of the step."""

    step: int = 0  # optimizer steps taken, skipped ones included
    examples: int = 0
    seconds: float = 0.0  # spent in training steps
    skipped: int = 0  # steps skipped for a non-finite loss or gradient, and how many of them were the last ones
    skipped_in_a_row: int = 0
    loss_sums: dict[str, float] = field(default_factory=dict)  # over this epoch's steps
    loss_counts: dict[str, int] = field(default_factory=dict)
    smart_shares: float = 0.0  # sum over this epoch's steps of SMART's share of the loss
    conflicts: dict[str, list[int]] = field(default_factory=dict)  # by pair of tasks: steps with one, and steps
    smart_warned: bool = False  # whether the user knows that SMART does nothing
    best_epoch: int = 0
    best_overall: float = -1.0
    dev: list[Scores] = field(default_factory=list)  # one entry per finished epoch
    data: dict[str, int | str] = field(default_factory=dict)  # checksums of each task's data; up to 0.1.0, numbers

    def mean_losses(self) -> dict[str, float]:
        return {name: total / self.loss_counts[name] for name, total in self.loss_sums.items()}


def save(
    path: Path,
    model: MultitaskModel,
    tokenizer: Tokenizer,
    state: State,
    progress: Progress,
    surgeries: Sequence[Surgery] = (),
) -> None:
    """Replace the checkpoint at `path`, or leave it as it was.

    Args:
        state: the optimizer's, by parameter of the model.
        surgeries: those whose state is written too.

    Raises:
        UserError: the disk is full, or a surgery's state cannot be saved.
    """

    def fill(directory: Path) -> None:
        model.encoder.save_pretrained(directory)
        tokenizer.save(directory)
        save_heads(model, directory / "heads.safetensors")
        entries = {
            f"{name}.{key}": value
            for name, param in model.named_parameters()
            for key, value in state.get(param, {}).items()
        }
        write_tensors(directory / "optimizer.safetensors", entries)
        for surgery in surgeries:
            if surgery.weighting is not None:
                surgery.weighting.save(directory)
        write_json(directory / "progress.json", asdict(progress))

    with writing(path, "free some space and run the same command with --resume"):
        write_directory(path, fill)


def load_progress(path: Path) -> Progress:
    """Where the run stood at a checkpoint that `verify` found whole."""
    return Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))


def load_state(path: Path, model: MultitaskModel) -> State:
    """The optimizer's state that `save` wrote, on the CPU.

    Raises:
        UserError: they belong to another model.
    """
    state: dict[Tensor, dict[str, Tensor]] = {}
    params = dict(model.named_parameters())
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, _, entry = key.rpartition(".")
        if name not in params or (value.ndim and value.shape != params[name].shape):
            raise UserError(f"{path / 'optimizer.safetensors'}: {key} does not fit the model; resume with its config")
        state.setdefault(params[name], {})[entry] = value
    return state
