"""Training steps of BERT-base on a GPU, on 96 sequences of real lengths, as training takes them, against the peers'.

Ours is `training_step` of a trainer that `build_trainer` made: batches are sampled, packed and rounded to buckets on
the host, copied to the device, and forward and backward are replayed as CUDA graphs, or not. Peers copy batches that
were padded beforehand. The results of all are read once the next step is begun.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from statistics import mean

import pytest
import roofline
import torch
from batches import DECILES, drawn
from peers import Padded
from session import FOUND
from steps import METHODS, our_trainer
from timing import StartStep

from minbert.training.host_device_copy import Readback
from minbert.training.loop import training_step

GOALS = {"plain": 6e-3, "PCGrad": 7e-3, "SMART": None, "SMART + PCGrad": 13e-3}  # seconds on an H100
PEER_METHODS = {"plain": "plain", "PCGrad": "pcgrad", "SMART": "smart", "SMART + PCGrad": "smart_pcgrad"}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "vocab_size": 30522}  # fmt: skip
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
        "vocab_size": 200}  # fmt: skip
TORCHJD = "TorchJD's autojac"
COMPILED, FLASH = "transformers sdpa compiled", "transformers flash_attention_2"
NEEDS = {"transformers": "transformers", TORCHJD: "torchjd", FLASH: "flash_attn"}  # packages, by part of the name


def ours(
    method: str,
    sizes: dict[str, int],
    batch_size: int,
    device: torch.device,
    batches: int,
    graphs: bool,
    note: Callable[[str], None] = print,
) -> StartStep:
    """`note` is given a line where the step is to be replayed from graphs, and is not."""
    trainer = our_trainer(method, sizes, batch_size, torch.bfloat16, str(device), batches=batches, cuda_graphs=graphs)
    if trainer.graphs is not None:
        trainer.graphs.report = note
    elif graphs and device.type == "cuda":
        note("there are none: see minbert.training.cuda_graphs.reason_against")
    numbers = itertools.count()
    return lambda: training_step(trainer, next(numbers), 1.0).result


def theirs(
    step: str,
    sizes: dict[str, int],
    batch_size: int,
    device: torch.device,
    batches: int,
    attention: str = "sdpa",
    compiled: bool = False,
) -> StartStep:
    peer = Padded(sizes, batch_size, torch.bfloat16, attention, compiled, device, batches)
    return lambda: Readback({"loss": [getattr(peer, step)()]}).read


def contenders(method: str, *size: object, note: Callable[[str], None]) -> dict[str, Callable[[], StartStep]]:
    """By name, what builds a step: ours first; transformers' are padded, in bf16 autocast."""
    of_peer = partial(theirs, PEER_METHODS[method], *size)
    found: dict[str, Callable[[], StartStep]] = {
        "minbert": partial(ours, method, *size, graphs=True, note=note),
        "minbert without CUDA graphs": partial(ours, method, *size, graphs=False, note=note),
        "transformers sdpa": of_peer,
        "transformers eager": partial(of_peer, attention="eager"),
    }
    if method == "PCGrad":
        found[f"transformers, {TORCHJD}"] = partial(theirs, "torchjd", *size)
    if method == "plain":
        found[FLASH] = partial(of_peer, attention="flash_attention_2")
        found[COMPILED] = partial(of_peer, compiled=True)  # last: it compiles for a minute
    return found


def missing(name: str) -> str | None:
    """Why a contender cannot be there, or None."""
    packages = [package for part, package in NEEDS.items() if part in name]
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{absent[0]} is not installed" if absent else None


def floor(method: str, sizes: Mapping[str, int], batch_size: int, batches: int, reach: roofline.Ceilings) -> float:
    """The mean over the batches of the least seconds for a step."""
    surgery, weight = METHODS[method]
    rows = len(DECILES) if surgery == "pcgrad" else 1
    seconds = []
    for turn in range(batches):
        real = [
            len(row)
            for i, task in enumerate(DECILES)
            for row in drawn(task, batch_size, sizes["vocab_size"], 100 * i + turn)
        ]
        parts = roofline.step(roofline.Encoder(*sizes.values()), real, rows=rows, smart=weight > 0)
        seconds.append(sum(roofline.floor(each, reach) for each in parts.values()))
    return mean(seconds)


@pytest.mark.parametrize("method", ["PCGrad", "SMART + PCGrad", "SMART", "plain"])  # plain has the one that compiles
def test_step(
    step_race, any_gpu: torch.device, reach, request: pytest.FixtureRequest, smoke: bool, method: str
) -> None:
    sizes, batch_size, batches = (TINY, 2, 2) if smoke else (BASE, 32, 6)
    case = f"{method} step, {3 * batch_size} sequences, bf16"
    note = partial(request.config.stash[FOUND].leave_out, case, "CUDA graphs of minbert")
    builds = contenders(method, sizes, batch_size, any_gpu, batches, note=note)
    if any_gpu.type == "cpu":
        builds.pop(COMPILED, None)  # a dry run is short
    for name in list(builds):
        if (why := missing(name)) is not None:
            request.config.stash[FOUND].leave_out(case, name, why)
            del builds[name]
    step_race(
        case,
        builds,
        examples=3 * batch_size,
        batches=batches,
        floor=floor(method, sizes, batch_size, batches, reach),
        goal=GOALS[method],
    )
