"""Checkpoints: an encoder that `transformers` loads, the heads, the tokenizer, the optimizer, the progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minbert.data.tokenizer import SHORTEST, Tokenizer
from minbert.distributed.sharded_parameters import OptimizerState
from minbert.errors import UserError
from minbert.files.atomic import write_directory, write_json, write_tensors, writing
from minbert.files.json_yaml import read_json, short
from minbert.files.validation import FORMAT, build, without_format
from minbert.methods.surgery import Surgery
from minbert.model import HEADS, EncoderConfig, MultitaskModel, pair_encoding, save_heads
from minbert.model.weights import fitting, open_safetensors
from minbert.runs.scores import Scores, check_scores
from minbert.tasks import Task

ENTRIES = ("step", "exp_avg", "exp_avg_sq", "average")  # of an optimizer's state for a parameter, perhaps with @NAME


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

    def count(self, losses: Mapping[str, float], smart_share: float, cosines: Mapping[str, float]) -> None:
        """Add a step's losses by task, SMART's share of them, and cosines by pair of tasks to the epoch's sums."""
        for name, value in losses.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0.0) + value
            self.loss_counts[name] = self.loss_counts.get(name, 0) + 1
        self.smart_shares += smart_share
        for pair, cosine in cosines.items():
            conflicts, steps = self.conflicts.get(pair, (0, 0))
            self.conflicts[pair] = [conflicts + (cosine < 0), steps + 1]

    def start_epoch(self) -> None:
        """Clear the epoch's sums."""
        self.loss_sums, self.loss_counts, self.smart_shares, self.conflicts = {}, {}, 0.0, {}


def save(
    path: Path,
    model: MultitaskModel,
    tokenizer: Tokenizer,
    state: OptimizerState,
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
        write_json(directory / "progress.json", {"format": FORMAT, **asdict(progress)})

    with writing(path, "free some space and run the same command with --resume"):
        write_directory(path, fill)


def check_fits(
    config: EncoderConfig, tokenizer: Tokenizer, tasks: Sequence[Task], max_length: int | None, where: object
) -> None:
    """Refuse an encoder that cannot read what its tokenizer and the tasks' heads will give it.

    Raises:
        UserError: too few token embeddings, positions or token types.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: its tokenizer has {tokenizer.vocab_size} tokens but its encoder only {config.vocab_size};"
            " give a directory in which they belong together"
        )
    positions = config.max_position_embeddings
    if positions < SHORTEST:
        raise UserError(f"{where}: an encoder with {positions} positions reads no text; it needs {SHORTEST} or more")
    if max_length is not None and max_length > positions:
        raise UserError(f"--max-length {max_length} is more than the {positions} positions of the encoder")
    pairs = [task for task in tasks if task.is_pair and pair_encoding(task) != "bi-encoder"]
    if pairs and config.type_vocab_size < 2:
        apart = [head for head in HEADS if HEADS[head].pair_encoding == "bi-encoder"]
        raise UserError(
            f"{where}: its encoder has {config.type_vocab_size} token type, and head {pairs[0].head} of {pairs[0].name}"
            f" reads two sentences as one sequence, with a type for each; give --heads.{pairs[0].name} one of"
            f" {', '.join(apart)}, or another model"
        )


def load_progress(path: Path) -> Progress:
    """Where the run stood at a checkpoint that `verify` found whole; what an earlier minbert did not note is empty.

    Raises:
        UserError: progress.json is damaged, or a later minbert wrote it.
    """
    file = path / "progress.json"
    remedy = "restore it from a copy, or use another checkpoint"
    progress = build(Progress, without_format(read_json(file, remedy=remedy), str(file)), str(file))
    counts = (progress.step, progress.examples, progress.skipped, progress.skipped_in_a_row, progress.best_epoch)
    try:
        for number, scores in enumerate(progress.dev):
            check_scores(scores, f"dev[{number}]")
        consistent = (
            min(counts) >= 0
            and progress.seconds >= 0
            and (progress.seconds > 0 or progress.step == 0)
            and progress.best_epoch <= len(progress.dev)
            and all(progress.loss_counts.get(name, 0) >= 1 for name in progress.loss_sums)
            and all(len(pair) == 2 and 0 <= pair[0] <= pair[1] and pair[1] >= 1 for pair in progress.conflicts.values())
        )
        if not consistent:
            raise UserError("its counts contradict each other")
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}); {remedy}") from None
    return progress


def load_state(path: Path, model: MultitaskModel) -> OptimizerState:
    """The optimizer's state that `save` wrote, on the CPU.

    Raises:
        UserError: the file is damaged, or belongs to another model.
    """
    file = path / "optimizer.safetensors"
    state: dict[Tensor, dict[str, Tensor]] = {}
    params = dict(model.named_parameters())
    with open_safetensors(file) as tensors:
        for key in tensors.keys():  # noqa: SIM118 (not a mapping)
            name, _, entry = key.rpartition(".")
            kind = entry.partition("@")[0]
            if name not in params or kind not in ENTRIES:
                raise UserError(f"{file}: {short(key)} does not fit the model; resume with its config")
            shape = torch.Size() if kind == "step" else params[name].shape
            value = fitting(tensors.get_tensor(key), shape, f"{file}: {key}")
            if kind in ("step", "exp_avg_sq") and value.numel() and value.min() < 0:
                raise UserError(f"{file}: {key} is negative; restore it from a copy, or use another checkpoint")
            state.setdefault(params[name], {})[entry] = value
    return state
