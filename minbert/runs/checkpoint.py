"""Checkpoints: an encoder that `transformers` loads, the heads, the tokenizer, the optimizer, the progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minbert.config import TASKS_FILE
from minbert.data.tokenizer import SHORTEST, Tokenizer
from minbert.distributed.sharded_parameters import OptimizerState
from minbert.errors import UserError
from minbert.files.atomic import write_directory, write_json, write_tensors, write_text, writing
from minbert.files.json_yaml import read_text, short
from minbert.methods.surgery import Surgery
from minbert.methods.task_gradients import substituted
from minbert.model import HEADS, EncoderConfig, MultitaskModel, pair_encoding, save_heads
from minbert.model.weights import fitting, open_safetensors
from minbert.runs.progress_counters import Progress
from minbert.tasks import Task, parse_tasks, tasks_to_yaml
from minbert.tasks.tasks_file import LIMIT

HEADS_FILE = "heads.safetensors"
ENTRIES = ("step", "exp_avg", "exp_avg_sq", "average")  # of an optimizer's state for a parameter, perhaps with @NAME


def save(
    path: Path,
    model: MultitaskModel,
    tokenizer: Tokenizer,
    state: OptimizerState,
    progress: Progress,
    surgeries: Sequence[Surgery] = (),
    master: Callable[[nn.Parameter], Tensor] = lambda param: param,
) -> None:
    """Replace the checkpoint at `path`, or leave it as it was.

    Args:
        state: the optimizer's, by parameter of the model.
        surgeries: those whose state is written too.
        master: gives what is written of a parameter of the encoder (`AdamW.master`).

    Raises:
        UserError: the disk is full, or a surgery's state cannot be saved.
    """

    def fill(directory: Path) -> None:
        with substituted(model.encoder, master):
            model.encoder.save_pretrained(directory)
        tokenizer.save(directory)
        save_heads(model, directory / HEADS_FILE)
        entries = {
            f"{name}.{key}": value
            for name, param in model.named_parameters()
            for key, value in state.get(param, {}).items()
        }
        write_tensors(directory / "optimizer.safetensors", entries)
        for surgery in surgeries:
            if surgery.weighting is not None:
                surgery.weighting.save(directory)
        write_text(directory / TASKS_FILE, tasks_to_yaml(_without_files(model.tasks)))
        write_json(directory / "progress.json", progress.to_json())

    with writing(path, "free some space and run the same command with --resume"):
        write_directory(path, fill)


def _without_files(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks' records as a checkpoint has them: it may go where their data is not."""
    return {name: replace(task, train=None, dev=None, test=None) for name, task in tasks.items()}


def load_tasks(path: Path, tasks: Sequence[Task]) -> list[Task]:
    """The tasks with the classes and thresholds that a checkpoint has for them; their heads and losses are the run's.

    A checkpoint of minbert 0.1.0 has none: its tasks are the built-in ones.

    Raises:
        UserError: its tasks.yaml is damaged, of other tasks, or lacks a task whose classes are not known.
    """
    file = path / TASKS_FILE
    saved = {}
    if file.exists():
        remedy = "restore it from a copy, or use another checkpoint"
        saved = parse_tasks(read_text(file, LIMIT, remedy), str(file), path, built_in=True)
    for task in tasks:
        if task.name not in saved and not task.is_regression and task.classes is None:
            raise UserError(f"{path} does not have the classes of {task.name}; restore its {TASKS_FILE}")
        same = saved.get(task.name, task)
        if same.type != task.type or (task.classes is not None and same.classes != task.classes):
            raise UserError(f"{file} has another task {task.name} than the run; restore it from a copy")
        thresholds = same.thresholds or ()
        if thresholds and (len(thresholds) != same.num_classes or not all(0 <= each <= 1 for each in thresholds)):
            raise UserError(f"{file}: task {task.name}: expected thresholds of its classes between 0 and 1")
    names = ("classes", "thresholds")
    return [replace(task, **{name: getattr(saved.get(task.name, task), name) for name in names}) for task in tasks]


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
        bi_encoders = [head for head in HEADS if HEADS[head].pair_encoding == "bi-encoder"]
        raise UserError(
            f"{where}: its encoder has {config.type_vocab_size} token type, and head {pairs[0].head} of {pairs[0].name}"
            f" reads two sentences as one sequence, with a type for each; give --heads.{pairs[0].name} one of"
            f" {', '.join(bi_encoders)}, or another model"
        )


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
