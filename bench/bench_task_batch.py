"""Gradients of three tasks for transformers' BERT: by TaskBatch, by a backward for each loss, by a forward for each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minbert.integrations import GradientSurgery, TaskBatch
from minbert.integrations.transformers import register

transformers = pytest.importorskip("transformers")
TASKS = 3


@pytest.mark.parametrize("attention", ["sdpa", "minbert"])
def test_gradients_of_three_tasks(race, smoke: bool, quick: bool, attention: str) -> None:
    """Forward, backward and UPGrad, without the optimizer's step; padded batches of lengths from 16 to 48."""
    register()
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = transformers.BertConfig(**({**shape, "num_hidden_layers": 1} if smoke else shape))
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    encoder.set_attn_implementation(attention)
    heads = torch.nn.ModuleList(torch.nn.Linear(384, 2) for _ in range(TASKS))
    optimizer = GradientSurgery(torch.optim.SGD([*encoder.parameters(), *heads.parameters()]), "upgrad")
    examples = 2 if smoke else 8 if quick else 32
    task_of_example = [task for task in range(TASKS) for _ in range(examples)]
    lengths = torch.randint(16, 49, (len(task_of_example),))
    mask = (torch.arange(48) < lengths[:, None]).long()
    ids = torch.randint(5, config.vocab_size, mask.shape) * mask

    def hidden(rows: slice = slice(None)) -> Tensor:
        return encoder(ids[rows], attention_mask=mask[rows]).last_hidden_state[:, 0]

    def losses(batch: TaskBatch, states: Tensor) -> list[Tensor]:
        return [head(states[batch.rows(task)]).square().mean() for task, head in enumerate(heads)]

    def by_task_batch() -> None:
        batch = TaskBatch(encoder, task_of_example)
        with batch:
            states = hidden()
        optimizer.backward(losses(batch, states), batch=batch)

    def by_backwards() -> None:
        optimizer.backward(losses(TaskBatch(encoder, task_of_example), hidden()))

    def by_forwards() -> None:
        rows = [TaskBatch(encoder, task_of_example).rows(task) for task in range(TASKS)]
        optimizer.backward([head(hidden(rows[task])).square().mean() for task, head in enumerate(heads)])

    def plain() -> None:
        torch.stack(losses(TaskBatch(encoder, task_of_example), hidden())).sum().backward()

    functions = {
        "TaskBatch": by_task_batch,
        "a backward for each loss": by_backwards,
        "a forward and backward for each task": by_forwards,
        "plain sum, no surgery": plain,
    }

    def without_grad(function):
        def run() -> None:
            optimizer.zero_grad()
            function()

        return run

    race(
        f"transformers BERT, {TASKS} x {examples}, {attention}, float32",
        {name: without_grad(function) for name, function in functions.items()},
    )
