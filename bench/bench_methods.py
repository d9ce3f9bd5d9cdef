"""SMART and PCGrad against the same with transformers, Pytorch-PCGrad, smart-pytorch and TorchJD: a step's time and
memory. And the time of every regulariser against a plain step's."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batches import BATCHES, DECILES, MAX_LENGTH, drawn
from peers import TASKS, Padded, labels, shape

from minbert.config import ScratchConfig, TrainConfig
from minbert.data import Encoded
from minbert.data.sources import DemoSource
from minbert.device import keep_freed_memory, resolve_precision
from minbert.distributed.process_group import ProcessGroup
from minbert.methods.rdrop import RDropConfig
from minbert.methods.smart import SmartConfig
from minbert.methods.surgery import find_surgery
from minbert.recipes import recipe
from minbert.tasks import Task
from minbert.training.loop import training_step
from minbert.training.setup import TrainingData, build_model, build_plan, build_trainer
from minbert.training.trainer import Trainer

TORCHJD = "PCGrad by TorchJD's autojac"
REGULARISERS = ("plain", "r3f", "rdrop", "sift", "vat", "freelb", "smart")  # recipes, all without surgery
METHODS = {"plain": ("sum", 0.0), "PCGrad": ("pcgrad", 0.0), "SMART": ("sum", 1.0), "SMART + PCGrad": ("pcgrad", 1.0)}


def encoded(task: str, seed: int, batch_size: int, batches: int, vocabulary: int) -> Encoded:
    rows = [row for turn in range(batches) for row in drawn(task, batch_size, vocabulary, seed + turn)]
    ids, offsets = np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)])
    targets = np.tile(labels(batch_size)[task].numpy(), batches)
    return Encoded(ids, np.zeros(len(ids), np.uint8), offsets, targets, [str(i) for i in range(len(rows))], 0)


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
    """A trainer as `minbert.train` builds it, of the batches that the peers pad, in turns.

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
    group = group or ProcessGroup(device=torch.device(device))
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
    train = {name: encoded(name, 100 * i, batch_size, batches, sizes["vocab_size"]) for i, name in enumerate(DECILES)}
    tokenizer: Any = SimpleNamespace(vocab_size=sizes["vocab_size"])
    data = TrainingData(DemoSource(), TASKS, tokenizer, MAX_LENGTH, {"train": train}, {})
    model = build_model(config, data, device=group.device).train()
    trainer = build_trainer(config, data, build_plan(config, data), model, find_surgery(surgery), group)

    def sample(step: int) -> list[list[tuple[Task, np.ndarray]]]:
        return [[(task, np.arange(batch_size) + step % batches * batch_size) for task in TASKS]]

    trainer.sample = sample
    return trainer


def ours(*arguments: Any, **options: Any) -> Callable[[], object]:
    """A step of `our_trainer`, results and all."""
    trainer, numbers = our_trainer(*arguments, **options), itertools.count()
    return lambda: training_step(trainer, next(numbers), 1.0).result()


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


WHO = {"minbert": ours, "transformers": theirs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_methods(race, smoke: bool, quick: bool, dtype: torch.dtype) -> None:
    """Each method by minbert and by the peers' algorithms in transformers' eager and SDPA encoders (bf16: autocast)."""
    if not smoke and dtype == torch.bfloat16 and resolve_precision("auto", torch.device("cpu")) != "bf16":
        pytest.skip("this processor multiplies no bf16 matrices: torch would take half a minute for a step")
    sizes, batch_size = shape(smoke), 2 if smoke else 32
    methods = ["plain", "SMART + PCGrad"] if quick and not smoke else list(METHODS)
    own = {f"minbert {method}": ours(method, sizes, batch_size, dtype, batches=BATCHES) for method in methods}
    first = f"minbert {methods[-1]}"
    contenders = {first: own[first], **own}
    name = str(dtype).removeprefix("torch.")
    if importlib.util.find_spec("transformers") is not None:
        attentions = ["eager"] if quick and not smoke else ["eager", "sdpa"]
        if importlib.util.find_spec("torchjd") is not None:
            methods = [*methods, TORCHJD] if smoke or not quick else methods
        for attention in attentions:
            for method in methods:
                step = theirs(method, sizes, batch_size, dtype, attention, BATCHES)
                contenders[f"transformers {attention} {method}"] = step
    race(f"step, 3 x {batch_size} sequences, {name}", contenders)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_regularisers(race, smoke: bool, dtype: torch.dtype) -> None:
    """A step with each regulariser; the ratio is that to the plain step."""
    if not smoke and dtype == torch.bfloat16 and resolve_precision("auto", torch.device("cpu")) != "bf16":
        pytest.skip("this processor multiplies no bf16 matrices")
    sizes, batch_size = shape(smoke), 2 if smoke else 32
    name = str(dtype).removeprefix("torch.")
    race(
        f"regularisers, 3 x {batch_size} sequences, {name}",
        {method: ours(method, sizes, batch_size, dtype, batches=BATCHES) for method in REGULARISERS},
    )


def _resident_peak() -> int:
    """Bytes; Linux's count for this program alone, where getrusage's begins with that of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _peak(who: str, method: str, sizes: dict[str, int], batch_size: int, steps: int, threads: int, answer) -> None:
    torch.set_num_threads(threads)
    if who == "minbert":
        keep_freed_memory()  # as minbert.train does
    else:
        import transformers  # noqa: F401
    before = _resident_peak()
    step = WHO[who](method, sizes, batch_size)
    for _ in range(steps):
        step()
    answer.put(_resident_peak() - before)


def peak_memory(who: str, method: str, sizes: dict[str, int], batch_size: int, steps: int) -> int:
    """Bytes by which a fresh process grows over its first steps: parameters, optimizer state, activations, gradients.

    Args:
        steps: at least 2: the optimizer's state is made at the end of the first one.
    """
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    arguments = who, method, sizes, batch_size, steps, torch.get_num_threads(), answer
    process = context.Process(target=_peak, args=arguments)
    process.start()
    size = answer.get(timeout=600)
    process.join()
    return size


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers, of the extra [bench]")
def test_memory(benchmark, memory: dict[str, dict[str, int]], smoke: bool, quick: bool) -> None:
    sizes, batch_size, steps = shape(smoke), 2 if smoke else 32, 2 if quick else 3
    methods = ["SMART + PCGrad"] if quick else list(METHODS)

    def measure() -> dict[str, int]:
        return {
            f"{who} {method}": peak_memory(who, method, sizes, batch_size, steps) for who in WHO for method in methods
        }

    memory[f"step, 3 x {batch_size} sequences, float32"] = benchmark.pedantic(measure, rounds=1)
