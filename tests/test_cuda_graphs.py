"""Steps whose forward and backward are replayed train like those that compute them."""

from __future__ import annotations

import pytest
import torch
from small_trainer import REGULARISERS, parts, trainer

from minbert.training.cuda_graphs import Graph
from minbert.training.host_device_copy import Layout
from minbert.training.loop import training_step


class Recomputed:
    """Does what a CUDA graph does, by computing again and writing to the addresses of the first time."""

    def __init__(self, compute, batch, leaves):
        self.compute, self.batch, self.leaves = compute, batch, leaves
        self.losses, self.grads = self._run()

    def _run(self):
        for leaf in self.leaves:
            leaf.grad = None
        losses = self.compute(self.batch).map(torch.Tensor.detach)
        return losses, [leaf.grad for leaf in self.leaves]

    def replay(self):
        losses, grads = self._run()
        written = [grad for grad in self.grads if grad is not None]
        for old, new in zip(written, [grad for grad in grads if grad is not None], strict=True):
            old.copy_(new)
        values = iter([*losses.task.values(), losses.total, losses.smart_term])
        for old in [*self.losses.task.values(), self.losses.total, self.losses.smart_term]:
            old.copy_(next(values))


class Captures(list):
    """Captures graphs where no GPU is, and lists them."""

    def __call__(self, compute, batch, leaves, device):
        layout = Layout(batch.tensors)
        buffer = torch.zeros(layout.size, dtype=torch.uint8)
        views = layout.views(buffer)
        for view, tensor in zip(views, batch.tensors, strict=True):
            view.copy_(tensor)  # a GPU's capture computes nothing; this one needs a batch that makes sense
        graph = Recomputed(compute, batch.with_tensors(views), leaves)
        buffer.zero_()
        self.append(graph)
        return Graph(graph, layout, buffer, graph.losses, graph.grads)


METHODS = {name: {"surgery": "pcgrad", **options} for name, options in REGULARISERS.items()}
METHODS |= {name: {"surgery": name} for name in ("famo", "gradvac")}  # whose states are not in the graph


@pytest.mark.parametrize("method", METHODS)
def test_replayed_steps_train_like_those_that_are_computed(method):
    captures = Captures()
    options = {
        **METHODS[method],
        "bucket_to": 64,
        "sample": lambda step: [parts(step=0 if step < 3 else 1)],
    }  # one shape three times
    straight, replayed = trainer(**options), trainer(**options, capture=captures)
    for step in range(4):
        wanted, got = (training_step(steps, step, step / 4).result() for steps in (straight, replayed))
        assert got.loss == pytest.approx(wanted.loss)
    assert len(captures) == 1
    theirs = dict(straight.model.named_parameters())
    for name, param in replayed.model.named_parameters():
        torch.testing.assert_close(param, theirs[name], rtol=1e-5, atol=1e-7)
    if method in ("famo", "gradvac"):
        states = [steps.surgeries[0].weighting.state for steps in (straight, replayed)]
        assert states[0].any()
        torch.testing.assert_close(*states, rtol=1e-4, atol=1e-6)


def test_shapes_beyond_the_most_graphs_are_computed():
    captures = Captures()
    steps = trainer(bucket_to=64, sample=lambda step: [parts()], capture=captures)
    steps.graphs.most = 0
    for step in range(3):
        assert training_step(steps, step, 0.0).result().updated
    assert not captures
