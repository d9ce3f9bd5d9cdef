"""A training step that is replayed as a CUDA graph gives the bits of the step itself on the same padded batch."""

from __future__ import annotations

import pytest
import torch
from small_trainer import DATA, REGULARISERS, parts, trainer

from minbert import kernels
from minbert.data.buckets import Buckets
from minbert.methods.rdrop import RDropConfig
from minbert.methods.smart import SmartConfig
from minbert.training.cuda_graphs import MOST_GRAPHS, Capture
from minbert.training.loop import training_step

pytestmark = pytest.mark.gpu

METHODS = {"plain": {"surgery": "sum", "weight": 0.0}, "PCGrad": {"surgery": "pcgrad", "weight": 0.0}}
METHODS |= {f"{name} + PCGrad": {"surgery": "pcgrad", **options} for name, options in REGULARISERS.items()}
METHODS |= {
    "SMART of one task": {"surgery": "sum", "smart": SmartConfig(lambda_s={"sst": 1.0})},
    "R-Drop of one task": {"surgery": "pcgrad", "rdrop": RDropConfig({"sst": 1.0})},
    "EMA teacher": {"surgery": "pcgrad", "weight": 0.0, "mu": 0.5},
    "GSE": {"surgery": "gse", "weight": 0.0},
}
# The number of each task's examples in a step, and which they are: three shapes, and different examples of one shape.
BATCHES = [(8, 0), (8, 4), (8, 0), (4, 0), (4, 3), (6, 1), (6, 1), (4, 6), (8, 4), (6, 1), (8, 0)]


def train(device: torch.device, *, graphs: bool, most: int = MOST_GRAPHS, **options):
    """The trainer after its steps, and their results."""
    steps = trainer(
        **options,
        device=device,
        buckets=Buckets(DATA, 64),
        sparse=False,
        copied=options.get("dtype") == torch.bfloat16,
        sample=lambda step: [parts(n=BATCHES[step][0], step=BATCHES[step][1])],
        capture=Capture() if graphs else None,
    )
    if graphs:
        steps.graphs.most, steps.graphs.report = most, pytest.fail
    return steps, [training_step(steps, step, step / len(BATCHES)).result() for step in range(len(BATCHES))]


def assert_same_bits(one, other) -> None:
    (steps, results), (others, wanted) = one, other
    for got, expected in zip(results, wanted, strict=True):
        assert got.record().keys() == expected.record().keys()
        for name in ("loss", "smart", "rdrop", "bregman", "grad_norm", "weights"):
            assert getattr(got, name) == getattr(expected, name), name
    theirs = dict(others.model.named_parameters())
    for name, param in steps.model.named_parameters():
        assert torch.equal(param, theirs[name]), name


QUICK = ("PCGrad", "SMART + PCGrad", "plain", "SMART of one task")
OTHERS = [(method, torch.bfloat16) for method in METHODS if method not in QUICK]


@pytest.mark.parametrize("method", QUICK)
def test_replayed_steps_have_the_bits_of_the_steps_themselves(cuda, method):
    options = {**METHODS[method], "dtype": torch.bfloat16}
    graphs = train(cuda, graphs=True, **options)
    assert_same_bits(graphs, train(cuda, graphs=False, **options))
    assert len(graphs[0].graphs._graphs) >= 2


def test_so_they_have_where_one_shape_alone_has_a_graph(cuda):
    options = {**METHODS["SMART + PCGrad"], "dtype": torch.bfloat16}
    graphs = train(cuda, graphs=True, most=1, **options)
    assert_same_bits(graphs, train(cuda, graphs=False, **options))
    assert len(graphs[0].graphs._graphs) == 1


def test_a_second_gpu_trains_as_the_first(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    options, second = {**METHODS["SMART + PCGrad"], "dtype": torch.bfloat16}, torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    on_second = train(second, graphs=True, **options)
    assert_same_bits(on_second, train(second, graphs=False, **options))
    assert {param.device for param in on_second[0].model.parameters()} == {second}


def test_a_graph_is_replayed_after_the_capture_of_another_failed(cuda):
    options, lines = {**METHODS["PCGrad"], "dtype": torch.bfloat16}, []
    capture, failing = Capture(), []

    def capture_of_one(compute, batch, leaves, device):
        def fails(batch):
            losses = compute(batch)
            losses.map(torch.Tensor.tolist)  # waits for the device
            return losses

        failing.append(len(failing) > 0)
        return capture(fails if failing[-1] else compute, batch, leaves, device)

    found = []
    for graphs in (True, False):
        steps = trainer(
            **options,
            device=cuda,
            buckets=Buckets(DATA, 64),
            sparse=False,
            copied=True,
            sample=lambda step: [parts(n=BATCHES[step][0], step=BATCHES[step][1])],
            capture=capture_of_one if graphs else None,
        )
        if graphs:
            steps.graphs.report = lines.append
        found.append((steps, [training_step(steps, step, step / 11).result() for step in range(len(BATCHES))]))
    assert failing == [False, True]
    assert len(lines) == len(found[0][0].graphs._graphs) == 1
    assert_same_bits(*found)
    assert torch.rand(1, device=cuda).item() < 1


def test_a_step_that_cannot_be_captured_runs_and_later_graphs_work(cuda):
    """The reference of attention reads numbers of the device."""
    lines, options = [], {"surgery": "pcgrad", "weight": 0.0, "buckets": Buckets(DATA, 64), "sparse": False}
    found = []
    with kernels.use_backend("reference"):
        for capture in (None, Capture()):
            steps = trainer(**options, device=cuda, sample=lambda step: [parts()], capture=capture)
            if capture is not None:
                steps.graphs.report = lines.append
            found.append([training_step(steps, step, 0.0).result().loss for step in range(4)])
    assert len(lines) == 1
    assert lines[0].startswith("warning: no more CUDA graphs: a step cannot be captured")
    for got, wanted in zip(*found, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    assert torch.rand(1, device=cuda).item() < 1  # torch's generator is not left capturing
    options = {**METHODS["PCGrad"], "dtype": torch.bfloat16}
    assert_same_bits(train(cuda, graphs=True, **options), train(cuda, graphs=False, **options))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype"), [("SMART + PCGrad", torch.float32), *OTHERS])
def test_so_they_have_with_other_methods(cuda, method, dtype):
    options = {**METHODS[method], "dtype": dtype}
    assert_same_bits(train(cuda, graphs=True, **options), train(cuda, graphs=False, **options))
