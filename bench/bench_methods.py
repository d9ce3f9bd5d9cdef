"""SMART and PCGrad against the same with transformers, Pytorch-PCGrad and smart-pytorch: time and memory of a step."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import DECILES, sequences
from peers import TASKS, Padded, labels, shape

from minbert.data import Encoded
from minbert.device import keep_freed_memory
from minbert.distributed.process_group import ProcessGroup
from minbert.distributed.sharded_parameters import ShardedParameters
from minbert.distributed.unsharded_parameters import UnshardedParameters
from minbert.methods.smart import BregmanConfig, SmartConfig
from minbert.methods.surgery import find_surgery
from minbert.methods.task_gradients import TaskGradients
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.training.batches import Batches
from minbert.training.loop import training_step
from minbert.training.objective import Objective
from minbert.training.optimizer import AdamW
from minbert.training.trainer import Trainer

METHODS = {"plain": ("sum", 0.0), "PCGrad": ("pcgrad", 0.0), "SMART": ("sum", 1.0), "SMART + PCGrad": ("pcgrad", 1.0)}


def encoded(task: str, seed: int, batch_size: int, vocabulary: int) -> Encoded:
    rows = sequences(task, batch_size, vocabulary, seed)
    ids, offsets = np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)])
    names = [str(i) for i in range(batch_size)]
    return Encoded(ids, np.zeros(len(ids), np.uint8), offsets, labels(batch_size)[task].numpy(), names, 0)


def ours(
    method: str,
    sizes: dict[str, int],
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    group: ProcessGroup | None = None,
) -> Callable[[], object]:
    """A step of `minbert.train`, on the sequences that the peers pad."""
    name, weight = METHODS[method]
    surgeries = find_surgery(name)
    torch.manual_seed(0)
    model = MultitaskModel(Encoder(EncoderConfig(**sizes)), TASKS).to(device).train()
    model.encoder.compute_dtype = dtype
    rows = len(TASKS) if surgeries[0].per_task else 1
    group = group or ProcessGroup(device=torch.device(device))
    parameters: UnshardedParameters | ShardedParameters = UnshardedParameters(model.heads)
    if group.world_size > 1:
        parameters = ShardedParameters(list(model.heads.parameters()), list(model.trunk.parameters()), rows, group)
    optimizer = AdamW(parameters.param_groups(model.parameter_groups(0.01)), lr=1e-5)
    parameters.register_hooks(TaskGradients(model.encoder, rows))
    model.encoder.embeddings.sparse_gradient = device == "cpu"
    smart = SmartConfig(lambda_s=weight)
    data = {name: encoded(name, 100 * i, batch_size, sizes["vocab_size"]) for i, name in enumerate(DECILES)}
    batch = [(task, np.arange(batch_size)) for task in TASKS]
    trainer = Trainer(
        lambda step: [batch],
        Batches(data, [[task] for task in TASKS], rows > 1, smart, seed=0, group=group),
        Objective(model, smart, BregmanConfig()),
        parameters,
        optimizer,
        surgeries,
        clip_norm=1.0,
    )
    return lambda: training_step(trainer, 0, 1.0).result()


def theirs(method: str, sizes: dict[str, int], batch_size: int) -> Callable[[], object]:
    peer = Padded(sizes, batch_size)
    steps = peer.plain, peer.pcgrad, peer.smart, peer.smart_pcgrad
    return dict(zip(METHODS, steps, strict=True))[method]


WHO = {"minbert": ours, "transformers": theirs}


def test_methods(race, smoke: bool) -> None:
    sizes, batch_size = shape(smoke), 2 if smoke else 32
    who = [name for name in WHO if name == "minbert" or importlib.util.find_spec("transformers")]
    contenders = {f"{name} {method}": WHO[name](method, sizes, batch_size) for name in who for method in METHODS}
    ordered = {"minbert SMART + PCGrad": contenders["minbert SMART + PCGrad"], **contenders}
    race(f"step, 3 x {batch_size} sequences, float32", ordered)


def _resident_peak() -> int:
    """Bytes; Linux's count for this program alone, where getrusage's begins with that of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _peak(who: str, method: str, sizes: dict[str, int], batch_size: int, threads: int, answer) -> None:
    torch.set_num_threads(threads)
    if who == "minbert":
        keep_freed_memory()  # as minbert.train does
    else:
        import transformers  # noqa: F401
    before = _resident_peak()
    step = WHO[who](method, sizes, batch_size)
    for _ in range(3):
        step()
    answer.put(_resident_peak() - before)


def peak_memory(who: str, method: str, sizes: dict[str, int], batch_size: int) -> int:
    """Bytes by which a fresh process grows over three steps: parameters, optimizer state, activations, gradients."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    arguments = who, method, sizes, batch_size, torch.get_num_threads(), answer
    process = context.Process(target=_peak, args=arguments)
    process.start()
    size = answer.get(timeout=600)
    process.join()
    return size


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers, of the extra [bench]")
def test_memory(benchmark, memory: dict[str, dict[str, int]], smoke: bool) -> None:
    sizes, batch_size = shape(smoke), 2 if smoke else 32
    methods = ["SMART + PCGrad"] if smoke else list(METHODS)

    def measure() -> dict[str, int]:
        return {f"{who} {method}": peak_memory(who, method, sizes, batch_size) for who in WHO for method in methods}

    memory[f"step, 3 x {batch_size} sequences, float32"] = benchmark.pedantic(measure, rounds=1)
