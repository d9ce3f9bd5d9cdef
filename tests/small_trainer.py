"""A trainer of three tasks with random examples and a very small encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from minbert.data import Encoded
from minbert.distributed.process_group import ProcessGroup
from minbert.distributed.unsharded_parameters import UnshardedParameters
from minbert.methods.rdrop import RDropConfig
from minbert.methods.smart import BregmanConfig, SmartConfig
from minbert.methods.surgery import find_surgery
from minbert.methods.task_gradients import TaskGradients
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.tasks import Task, find_tasks
from minbert.training.batches import Batches
from minbert.training.freelb import FreeLB
from minbert.training.objective import Objective
from minbert.training.optimizer import AdamW, split_
from minbert.training.trainer import Trainer, cuda_graphs

TASKS = find_tasks(["sst", "qqp", "sts"])
SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CPU = torch.device("cpu")


def examples(n: int, seed: int) -> Encoded:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, n)
    ids = rng.integers(1, 60, lengths.sum()).astype(np.int32)
    labels = rng.integers(0, 2, n).astype(np.float32)
    return Encoded(ids, np.zeros(len(ids), np.uint8), np.cumsum([0, *lengths]), labels, [""] * n, 0)


REGULARISERS: dict[str, dict[str, Any]] = {  # options of `trainer`
    "SMART": {"smart": SmartConfig(lambda_s=1.0)},
    "R3F": {"smart": SmartConfig(lambda_s=1.0, steps=0, sigma=0.1, noise="uniform")},
    "SiFT": {"smart": SmartConfig(lambda_s=1.0, epsilon=0.1, eta=0.1, normalized=True)},
    "VAT": {
        "smart": SmartConfig(
            lambda_s=1.0, search="power", objective="kl", norm="2", per="sequence", sigma=0.5, epsilon=0.5
        )
    },
    "FreeLB": {
        "smart": SmartConfig(
            lambda_s=1.0, objective="task-loss", steps=2, norm="2", per="sequence", epsilon=1.0, eta=0.7
        )
    },
    "R-Drop": {"rdrop": RDropConfig(1.0)},
}


DATA = {task.name: examples(40, i) for i, task in enumerate(TASKS)}


def parts(*, n: int = 8, step: int = 0, tasks: Sequence[Task] = TASKS):
    return [(task, np.arange(step * n, (step + 1) * n)) for task in tasks]


def trainer(
    surgery: str = "pcgrad",
    weight: float = 1.0,
    mu: float = 0.0,
    dropout: float = 0.1,
    copied: bool = False,
    split: bool = False,
    sample=lambda step: [parts(step=step)],
    capture=None,
    dtype: torch.dtype = torch.float32,
    freeze: int = 0,
    sparse: bool = True,
    tasks: Sequence[Task] = TASKS,
    data: Mapping[str, Encoded] = DATA,
    loss_options: Mapping[str, Mapping[str, Any]] | None = None,
    smart: SmartConfig | None = None,
    rdrop: RDropConfig | None = None,
    task_groups: Sequence[Sequence[Task]] | None = None,
    weights: Mapping[str, float] | None = None,
    device: torch.device = CPU,
    **options,
) -> Trainer:
    torch.manual_seed(0)
    config = EncoderConfig(**SIZES, max_position_embeddings=64).with_dropout(dropout)
    model = MultitaskModel(Encoder(config), tasks, head_dropout=dropout).to(device).train()
    model.encoder.compute_dtype = dtype
    model.freeze_layers(freeze)
    model.encoder.embeddings.sparse_gradient = sparse
    low_bits = split_(model.encoder.cast_weights()) if split else {}
    parameters = UnshardedParameters(model.heads, model.encoder.copies() if copied else {})
    groups = parameters.param_groups(model.parameter_groups(0.01))
    written = {"copies": parameters.copies, "low_bits": low_bits}
    optimizer = AdamW(groups, lr=1e-2, ema_decay=0.9 if mu else None, **written)
    if mu:
        parameters.keep_ema(optimizer)
    per_task = surgery != "sum"
    task_groups = task_groups or [[task] for task in tasks]
    gradients = TaskGradients(model.encoder, len(task_groups) if per_task else 1, parameters.copies)
    parameters.register_hooks(gradients)
    smart, rdrop = smart or SmartConfig(lambda_s=0.0 if rdrop else weight), rdrop or RDropConfig()
    added = {"loss_options": loss_options, "rdrop": rdrop, "weights": weights}
    of_objective = FreeLB if smart.repeats_backward else Objective
    objective = of_objective(model, smart, BregmanConfig(mu=mu), parameters.ema, parameters.copies, **added)
    objective.share = 1 / len(sample(0))
    group = ProcessGroup(device=device)
    batches = Batches(data, task_groups, per_task, smart, 0, rdrop=rdrop, **{"group": group, **options})
    graphs = None
    if capture is not None:
        graphs = cuda_graphs(objective, gradients, device, capture=capture)
    surgeries = find_surgery(surgery)
    for each in surgeries:
        each.prepare(len(gradients.rows), device)
    return Trainer(sample, batches, objective, parameters, optimizer, surgeries, 1.0, graphs)
