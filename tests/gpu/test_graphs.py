"""Ops and whole updates are captured into CUDA graphs, and a replay gives the same bits as the calls one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_repeats import bits, differing
from torch import Tensor

from minbert import kernels
from minbert.data.packing import pack
from minbert.kernels.example_calls import ADAMW, calls
from minbert.methods.losses import LOSSES
from minbert.methods.task_gradients import TaskGradients
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.tasks import find_tasks

pytestmark = pytest.mark.gpu


def captured(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The call as a graph, and the results that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def test_every_op_can_be_captured_and_replayed(cuda):
    for name, call in calls(cuda).items():
        wanted = call()
        graph, results = captured(call)
        for _ in range(3):
            for result in results:
                bits(result).fill_(127)
            graph.replay()
            assert differing(wanted, results).item() == 0, name


class Update:
    """A training step on fixed data from the losses to AdamW: nothing in it waits for the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        self.tasks = find_tasks(["sst", "qqp", "sts"])
        config = EncoderConfig(
            vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
        )
        self.model = MultitaskModel(Encoder(config), self.tasks).to(device).train()
        self.model.encoder.compute_dtype = dtype
        self.gradients = TaskGradients(self.model.encoder, len(self.tasks))
        generator = torch.Generator().manual_seed(1)
        sizes = torch.randint(3, 60, (12,), generator=generator).tolist()
        rows = [torch.randint(1, 200, (n,), generator=generator).tolist() for n in sizes]
        self.packed = pack(rows).by_task([4, 4, 4]).to(device)
        self.labels = {task.name: torch.tensor([0.0, 1, 1, 0]).to(device) for task in self.tasks}
        self.counts = {task.name: 4 for task in self.tasks}
        self.seed = torch.tensor(5).to(device)
        self.orders = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 1, 2]]).to(device)
        self.first, self.second = ([torch.zeros_like(p) for p in self.gradients.params] for _ in range(2))

    def __call__(self) -> list[Tensor]:
        """Take the step, by PCGrad; the losses, the Gram matrix, and what surgery says of it."""
        self.gradients.clear()
        with self.gradients.attached():
            outputs = self.model(self.packed, self.counts, seed=self.seed)
        losses = [LOSSES[task.loss](outputs[task.name], self.labels[task.name]) for task in self.tasks]
        torch.stack(losses).sum().backward()
        rows = self.gradients.rows
        gram = kernels.gram(rows)
        weights, stats = kernels.surgery_weights(gram, orders=self.orders, max_norm=1.0)
        with torch.no_grad():
            kernels.combine_adamw_(
                self.gradients.params, rows, weights, self.first, self.second, skip_unless=stats[2], **ADAMW
            )
        self.model.heads.zero_grad(set_to_none=True)
        return [*(loss.detach() for loss in losses), gram, stats]

    def state(self) -> list[Tensor]:
        return [*self.gradients.params, *self.first, *self.second]

    def restore(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, saved in zip(self.state(), state, strict=True):
                tensor.copy_(saved)


def test_a_captured_training_step_trains_as_the_step_itself(cuda):
    update = Update(cuda)
    start = [tensor.clone() for tensor in update.state()]
    wanted = [[result.clone() for result in update()] for _ in range(4)]
    trained = [tensor.clone() for tensor in update.state()]
    graph, results = captured(update)
    update.restore(start)
    for step in wanted:
        graph.replay()
        assert differing(step, results).item() == 0
    assert differing(trained, update.state()).item() == 0


def test_a_training_step_waits_for_nothing(cuda):
    update = Update(cuda)
    update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
