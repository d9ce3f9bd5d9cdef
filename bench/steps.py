"""Training steps by minbert and by its peers on the same batches, and the peak memory of a process that takes them."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from batches import DECILES, MAX_LENGTH, course, drawn, sequences_as
from peers import Padded, labels
from rich.console import Console

from minbert.config import ScratchConfig, TrainConfig
from minbert.data import Encoded
from minbert.data.sources import DemoSource
from minbert.device import keep_freed_memory
from minbert.distributed.process_group import ProcessGroup
from minbert.methods.rdrop import RDropConfig
from minbert.methods.smart import SmartConfig
from minbert.methods.surgery import find_surgery
from minbert.model import pair_encoding
from minbert.recipes import recipe
from minbert.tasks import PAIR_ENCODINGS, Task
from minbert.training.arithmetic import fit_for_smart
from minbert.training.loop import training_step
from minbert.training.setup import TrainingData, build_model, build_plan, build_trainer
from minbert.training.trainer import Trainer

TORCHJD = "PCGrad by TorchJD's autojac"
METHODS = {"plain": ("sum", 0.0), "PCGrad": ("pcgrad", 0.0), "SMART": ("sum", 1.0), "SMART + PCGrad": ("pcgrad", 1.0)}


def encoded(task: Task, seed: int, batch_size: int, batches: int, vocabulary: int) -> Encoded:
    """A task's batches, one after the other, as its head reads its examples."""
    encoding, turns = pair_encoding(task), range(batches)
    examples = [row for turn in turns for row in drawn(task.name, batch_size, vocabulary, seed + turn)]
    rows = [sequence for row in examples for sequence in sequences_as(encoding, row)]
    ids, offsets = np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)])
    targets, names = np.tile(labels(batch_size)[task.name].numpy(), batches), [str(i) for i in range(len(examples))]
    return Encoded(ids, np.zeros(len(ids), np.uint8), offsets, targets, names, 0, PAIR_ENCODINGS[encoding])


def trainer_of(config: TrainConfig, batches: int = 1, group: ProcessGroup | None = None) -> Trainer:
    """A trainer as `minbert.train` builds it, of the batches that the peers pad, in turns.

    Args:
        config: with a precision and a learning rate, for the encoder of its `scratch`.
        batches: of each task.
    """
    group = group or ProcessGroup()
    tasks, vocabulary = config.chosen_tasks(list(DECILES)), config.scratch.vocab_size
    sizes = {task.name: config.batch_size_of(task.name) for task in tasks}
    train = {task.name: encoded(task, 100 * i, sizes[task.name], batches, vocabulary) for i, task in enumerate(tasks)}
    tokenizer: Any = SimpleNamespace(vocab_size=vocabulary)
    data = TrainingData(DemoSource(), tasks, tokenizer, MAX_LENGTH, {"train": train}, {})
    model = build_model(config, data, device=group.device).train()
    config = config.replace(precision=fit_for_smart(model, config, config.precision, Console()))
    surgeries = find_surgery(config.surgery, config.surgery_reduction)
    trainer = build_trainer(config, data, build_plan(config, data), model, surgeries, group)
    turns = [tasks] if config.sampling == "joint" else [[task] for task in tasks]

    def sample(step: int) -> list[list[tuple[Task, np.ndarray]]]:
        number, turn = divmod(step, len(turns))
        return [[(task, np.arange(sizes[task.name]) + number % batches * sizes[task.name]) for task in turns[turn]]]

    trainer.sample = sample
    return trainer


def our_trainer(
    method: str,
    sizes: dict[str, int],
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    group: ProcessGroup | None = None,
    batches: int = 1,
    **options: Any,
) -> Trainer:
    """`trainer_of` a method's configuration.

    Args:
        method: of `METHODS`, or a recipe.
        options: more of `TrainConfig`'s.
    """
    if method in METHODS:
        surgery, weight = METHODS[method]
        smart, rdrop = SmartConfig(lambda_s=weight), RDropConfig()
    else:
        named = recipe(method)
        surgery = named["surgery"]
        smart, rdrop = SmartConfig(**named.get("smart", {})), RDropConfig(**named.get("rdrop", {}))
    config = TrainConfig(
        surgery=surgery,
        smart=smart,
        rdrop=rdrop,
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
        batch_size=batch_size,
        lr=1e-5,
        dropout=0.1,
        scratch=ScratchConfig(**sizes),
        **options,
    )
    return trainer_of(config, batches, group or ProcessGroup(device=torch.device(device)))


def step_of(trainer: Trainer, updates: int = 1) -> Callable[[], object]:
    """So many training steps, results and all."""
    numbers = itertools.count()
    return lambda: [training_step(trainer, next(numbers), 1.0).result() for _ in range(updates)]


def ours(*arguments: Any, **options: Any) -> Callable[[], object]:
    """A step of `our_trainer`."""
    return step_of(our_trainer(*arguments, **options))


def theirs(
    method: str,
    sizes: dict[str, int],
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    batches: int = 1,
) -> Callable[[], object]:
    peer = Padded(sizes, batch_size, dtype, attention, batches=batches)
    steps = peer.plain, peer.pcgrad, peer.smart, peer.smart_pcgrad
    return {**dict(zip(METHODS, steps, strict=True)), TORCHJD: peer.torchjd}[method]


def as_command(make: Callable[..., Callable[[], object]], *arguments: Any) -> Callable[[], object]:
    """A step made in a process that keeps freed memory, as minbert.train does."""
    keep_freed_memory()
    return make(*arguments)


WHO = {"minbert": partial(as_command, ours), "transformers": theirs}


def _resident_peak() -> int:
    """Bytes; Linux's count for this program alone, where getrusage's begins with that of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _peak(make: Callable[..., Callable[[], object]], arguments: Any, steps: int, threads: int, answer: Any) -> None:
    from transformers import BertModel  # noqa: F401  neither this nor the data is the step's

    for task in DECILES:
        course(task)
    torch.set_num_threads(threads)
    before = _resident_peak()
    step = make(*arguments)
    for _ in range(steps):
        step()
    answer.send(_resident_peak() - before)


def peak_memory(make: Callable[..., Callable[[], object]], *arguments: Any, steps: int) -> int:
    """Bytes by which a fresh process grows over its first steps: parameters, optimizer state, activations, gradients.

    Args:
        make: returns the step, given the arguments; all of them are pickled.
        steps: at least 2: the optimizer's state is made at the end of the first one.

    Raises:
        EOFError: the process ended before its last step, as one does that the system has no memory for.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(make, arguments, steps, torch.get_num_threads(), sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()
