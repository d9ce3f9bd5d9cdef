"""Steps of several processes, one thread each: `python -m torch.distributed.run --nproc-per-node N ranks_worker.py`.

Prints JSON: by method the median seconds of a step, the bytes that a rank sends in it, and the most tokens of a rank as
a multiple of an equal share.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from batches import DECILES, drawn, joint_batch
from peers import TASKS, labels, shape
from steps import ours
from torch import nn

from minbert.device import keep_freed_memory
from minbert.distributed.batch_shards import split_by_tokens
from minbert.distributed.process_group import ProcessGroup
from minbert.methods.losses import LOSSES
from minbert.model import Encoder, EncoderConfig, MultitaskModel

ROUNDS = 1 if os.environ.get("MINBERT_BENCH_SMOKE") == "1" else 5
DDP = "DistributedDataParallel, plain"


def data_parallel(sizes: dict[str, int], batch_size: int, group: ProcessGroup) -> Callable[[], object]:
    """The plain step of the same encoder on the same batch under torch's own wrapper, with its fused AdamW.

    Each rank has every `size`th example, as from a DistributedSampler.
    """
    torch.manual_seed(0)
    model: nn.Module = MultitaskModel(Encoder(EncoderConfig(**sizes)), TASKS)
    if group.world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    own = slice(group.rank, None, group.world_size)
    packed = joint_batch(batch_size, sizes["vocab_size"], own)
    targets = {name: values[own] for name, values in labels(batch_size).items()}
    counts = {name: len(values) for name, values in targets.items()}

    def step() -> None:
        outputs = model(packed, counts)
        torch.stack([LOSSES[task.loss](outputs[task.name], targets[task.name]) for task in TASKS]).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    smoke = ROUNDS == 1
    sizes, batch_size = shape(smoke), 4 if smoke else 32
    with ProcessGroup.join(torch.device("cpu"), 300.0) as group:
        steps = {name: ours(name, sizes, batch_size, group=group) for name in ("plain", "PCGrad", "SMART + PCGrad")}
        steps[DDP] = data_parallel(sizes, batch_size, group)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        sent = {}
        for _ in range(ROUNDS + 1):  # the first warms up
            for name, step in steps.items():
                before = group.bytes_sent
                group.broadcast_object("go")
                start = time.perf_counter()
                step()
                group.all_reduce_max(0)  # until all are done
                seconds[name].append(time.perf_counter() - start)
                sent[name] = group.bytes_sent - before
        del step, steps[DDP]  # DistributedDataParallel as the last owner of gloo's group may hang at its end
        gc.collect()
        parameters = sum(p.numel() for p in MultitaskModel(Encoder(EncoderConfig(**sizes)), TASKS).parameters())
        sent[DDP] = 2 * 4 * parameters * (group.world_size - 1) // group.world_size  # of an all-reduce
        rows = [drawn(task, batch_size, sizes["vocab_size"], 100 * i) for i, task in enumerate(DECILES)]
        lengths = np.array([len(row) for of_task in rows for row in of_task])
        tokens = np.add.reduceat(lengths, split_by_tokens(lengths, group.world_size)[:-1])
        dealt = [
            len(joint_batch(batch_size, sizes["vocab_size"], slice(rank, None, group.world_size)).token_ids)
            for rank in range(group.world_size)
        ]
        most = [max(share) * group.world_size / sum(share) for share in (tokens.tolist(), dealt)]
        if group.is_main:
            found = {
                name: [statistics.median(times[1:]), sent[name], most[name == DDP]] for name, times in seconds.items()
            }
            json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
