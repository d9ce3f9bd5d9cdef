"""How long a step of several GPUs should take: what each sends, over assumed links, on top of one GPU's floor.

python bench/gpu/several_gpus.py prints it for BERT-base, SMART + PCGrad on three tasks, in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from roofline import H100, Encoder, floor, step

from minbert.distributed.process_group import ProcessGroup
from minbert.distributed.sharded_parameters import ShardedParameters
from minbert.model import Encoder as Model
from minbert.model import EncoderConfig, MultitaskModel
from minbert.tasks import find_tasks

TASKS = 3
GPUS_OF_MACHINE = 8
LINK = 350e9  # bytes per second of each GPU, within a machine and between machines
RING = {8: 0.0, 64: 0.3e-3, 1024: 5e-3}  # seconds of a collective through so many GPUs, whatever it carries
BACKWARD = 4e-3  # seconds, behind which gradients are sent


@dataclass(frozen=True)
class Sent:
    """What a rank sends in a step."""

    gradients: int  # bytes
    parameters: int  # bytes
    collectives: int

    @property
    def bytes(self) -> int:
        return self.gradients + self.parameters


def sent(gpus: int) -> Sent:
    """By the buckets that training makes."""
    meta = torch.device("meta")
    with meta:
        model = MultitaskModel(Model(EncoderConfig()), find_tasks(["sst", "qqp", "sts"]))
    model.encoder.compute_dtype = torch.bfloat16
    group = ProcessGroup(0, gpus, meta, one_machine=gpus <= GPUS_OF_MACHINE)
    heads, trunk = list(model.heads.parameters()), list(model.trunk.parameters())
    words = model.encoder.embeddings.word
    buckets = ShardedParameters(heads, trunk, TASKS, group, model.encoder.copies(), words).buckets
    of_others = (gpus - 1) / gpus
    gradients = sum(bucket.tasks * bucket.flat.numel() * bucket.gradient_dtype.itemsize for bucket in buckets)
    parameters = sum(bucket.read.nbytes for bucket in buckets)
    collectives = sum(bucket.tasks + 1 for bucket in buckets)
    return Sent(int(gradients * of_others), int(parameters * of_others), collectives)


def seconds(gpus: int) -> tuple[float, float, float, float]:
    """Of sending and of the rings; of a step without overlap, and with all that can overlap."""
    alone = floor(
        [work for works in step(Encoder(), [28] * 96, rows=TASKS, smart=True).values() for work in works], H100
    )
    of_step = sent(gpus)
    sending, rings = of_step.bytes / LINK, RING[gpus] * of_step.collectives
    hidden = min(BACKWARD, (sending + rings) * of_step.gradients / of_step.bytes)
    return sending, rings, alone + sending + rings, alone + sending + rings - hidden


def table() -> str:
    """The table of docs/scaling.md."""
    lines = ["| GPUs | GB sent | collectives | sending, ms | rings, ms | step, ms | with overlap |"]
    lines.append("|--:|--:|--:|--:|--:|--:|--:|")
    for gpus in RING:
        of_step, (sending, rings, plain, overlapped) = sent(gpus), seconds(gpus)
        alone = plain - sending - rings
        times = [f"{1e3 * time:.1f}, {alone / time:.0%}" for time in (plain, overlapped)]
        cells = [
            f"{of_step.bytes / 1e9:.2f}",
            of_step.collectives,
            f"{1e3 * sending:.1f}",
            f"{1e3 * rings:.0f}",
            *times,
        ]
        lines.append(f"| {gpus} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
