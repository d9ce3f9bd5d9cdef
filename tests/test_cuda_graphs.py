"""Steps whose forward and backward are replayed train like those that compute them."""

from __future__ import annotations

import pytest
import torch
from small_trainer import DATA, REGULARISERS, parts, trainer

from minbert.data.buckets import Buckets
from minbert.methods.rdrop import RDropConfig
from minbert.methods.smart import SmartConfig
from minbert.training.cuda_graphs import Graph
from minbert.training.host_device_copy import Layout
from minbert.training.loop import training_step
from minbert.training.trainer import Trainer


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
        for old, new in zip(tensors(self.losses), tensors(losses), strict=True):
            old.copy_(new)


def tensors(losses):
    """All tensors of losses."""
    found = []
    losses.map(lambda tensor: found.append(tensor) or tensor)
    return found


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


BUCKETS = Buckets(DATA, 64)
OF_ONE = {"sst": 1.0}  # the regulariser's weight
DENSE = {"buckets": BUCKETS, "sparse": False}  # as on GPUs
METHODS = {name: {"surgery": "pcgrad", **options} for name, options in REGULARISERS.items()}
METHODS |= {name: {"surgery": name} for name in ("famo", "gradvac")}  # whose states are not in the graph
METHODS |= {
    f"SMART of one task, {surgery}": {"surgery": surgery, "smart": SmartConfig(lambda_s=OF_ONE)}
    for surgery in ("sum", "pcgrad")
}
METHODS["R-Drop of one task"] = {"surgery": "pcgrad", "rdrop": RDropConfig(OF_ONE)}


@pytest.mark.parametrize("method", METHODS)
def test_replayed_steps_train_like_those_that_are_computed(method):
    captures = Captures()
    options = {
        **METHODS[method],
        **DENSE,
        "sample": lambda step: [parts(step=0 if step < 3 else 1)],
    }  # one shape three times
    straight, replayed = trainer(**options), trainer(**options, capture=captures)
    for step in range(4):
        wanted, got = (training_step(steps, step, step / 4).result() for steps in (straight, replayed))
        assert got.loss == pytest.approx(wanted.loss)
        assert got.smart == pytest.approx(wanted.smart, abs=1e-6)
    assert len(captures) == 1
    theirs = dict(straight.model.named_parameters())
    for name, param in replayed.model.named_parameters():
        torch.testing.assert_close(param, theirs[name], rtol=1e-5, atol=1e-7)
    if method in ("famo", "gradvac"):
        states = [steps.surgeries[0].weighting.state for steps in (straight, replayed)]
        assert states[0].any()
        torch.testing.assert_close(*states, rtol=1e-4, atol=1e-6)


def test_only_what_has_a_regulariser_goes_through_its_passes():
    steps = trainer(buckets=BUCKETS, **METHODS["SMART of one task, sum"])
    shapes = set()
    for step in range(5):
        (stream,) = steps.batches.streams([parts(step=step)], step, 0)
        batch = steps.batches.pack(stream)
        (part,) = batch.smart_parts
        assert part.tasks == ("sst",)
        assert len(part.packed.token_ids) < len(batch.packed.token_ids) / 2
        shapes.add((len(batch.packed.token_ids), batch.packed.max_seqlen, batch.packed.padding))
        shapes.add((len(part.packed.token_ids), part.packed.max_seqlen, part.packed.padding))
    assert len(shapes) <= 6


def test_the_addresses_of_replayed_gradients_are_looked_up_once_for_each_graph(monkeypatch):
    captures, tables = Captures(), []
    steps = trainer(**DENSE, sample=lambda step: [parts(n=8 - step % 2)], capture=captures)
    wait = steps.wait_for_gradients
    monkeypatch.setattr(Trainer, "wait_for_gradients", lambda _: tables.append(wait()) or tables[-1])
    for step in range(8):
        training_step(steps, step, 0.0).result()
    assert len(captures) == 2
    for first, second in (tables[4::2], tables[5::2]):  # of shared parameters, and of all others
        assert [*map(id, first)] == [*map(id, second)]
    for graph, (shared, own) in zip(captures, tables[-2:], strict=True):
        assert all(a is b for a, b in zip(graph.grads, [*shared.grads, *own.grads], strict=True))


# Which graphs are kept --------------------------------------------------------------------------------------------


def test_shapes_beyond_the_most_have_no_graph():
    """Shapes a, b and c, of which two have graphs: the third one runs without."""
    order, captures = "aabccbbaccaab", Captures()
    number = {"a": 8, "b": 7, "c": 6}
    sample = [[parts(n=number[name])] for name in order]
    options = {"weight": 0.0, **DENSE, "sample": sample.__getitem__}
    straight, replayed = trainer(**options), trainer(**options, capture=captures)
    replayed.graphs.most = 2
    captured, replays = [], []
    for step in range(len(order)):
        wanted, got = (training_step(steps, step, 0.0).result() for steps in (straight, replayed))
        assert got.loss == pytest.approx(wanted.loss)
        captured.append(len(captures))
        replays.append(replayed.graphs.replayed is not None)
    assert captured == [0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert [name for name, replay in zip(order, replays, strict=True) if replay] == list("acaccaa")


def test_a_step_that_cannot_be_captured_runs_without_a_graph():
    calls, lines = [], []

    def fails(compute, batch, leaves, device):
        calls.append(batch)
        compute(batch)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    options = {**DENSE, "sample": lambda step: [parts()]}
    straight, replayed = trainer(**options), trainer(**options, capture=fails)
    replayed.graphs.report = lines.append
    for step in range(4):
        wanted, got = (training_step(steps, step, 0.0).result() for steps in (straight, replayed))
        assert (got.loss, got.grad_norm) == (wanted.loss, wanted.grad_norm)
    assert len(calls) == 1
    assert lines == [
        "warning: no more CUDA graphs: a step cannot be captured (operation not permitted when stream is capturing);"
        " it runs without"
    ]
