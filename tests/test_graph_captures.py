"""When a step is captured as a CUDA graph, on which stream, and what a capture that fails leaves behind."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from small_trainer import DATA, parts, trainer

from minbert import kernels
from minbert.config import TrainConfig
from minbert.data.buckets import Buckets
from minbert.distributed.process_group import ProcessGroup
from minbert.kernels import native
from minbert.methods.smart import SmartConfig
from minbert.model import EncoderConfig
from minbert.training import cuda_graphs
from minbert.training.batches import Batch
from minbert.training.cuda_graphs import Capture, CudaGraphs, Graph, reason_against
from minbert.training.host_device_copy import Layout
from minbert.training.startup_report import graphs_lines

# What prevents them -----------------------------------------------------------------------------------------------

GPU = ProcessGroup(device=torch.device("cuda", 0))
SMALL = EncoderConfig(vocab_size=60, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


@pytest.fixture
def all_compiled(monkeypatch):
    """A machine that has compiled code of all ops for GPUs."""
    monkeypatch.setattr(kernels.triton, "available", lambda: True)
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "cuda_available", lambda: True)
    monkeypatch.setattr(native, "missing_reason", lambda: None)


def config(**options) -> TrainConfig:
    return TrainConfig(**{"precision": "bf16", **options})


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_steps_whose_ops_are_compiled_are_captured(all_compiled, precision, per):
    options = config(precision=precision, smart=SmartConfig(lambda_s=1.0, per=per))
    assert reason_against(options, SMALL, GPU) is None


def test_the_op_that_prevents_graphs_is_named(all_compiled, monkeypatch):
    odd = EncoderConfig(vocab_size=60, hidden_size=40, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    assert reason_against(config(), odd, GPU) == (
        "attention runs in plain PyTorch (takes heads of 8, 16, 24, ... or 128 elements, not 20)"
    )
    wide = EncoderConfig(
        vocab_size=60, hidden_size=8192, num_hidden_layers=1, num_attention_heads=64, intermediate_size=32
    )
    assert "dropout runs in plain PyTorch (takes rows of up to 4096" in reason_against(config(), wide, GPU)
    with kernels.use_backend("reference"):
        assert "attention runs in plain PyTorch" in reason_against(config(), SMALL, GPU)
    monkeypatch.setattr(native, "cuda_available", lambda: False)
    assert reason_against(config(smart=SmartConfig(lambda_s=0.0)), SMALL, GPU) is None
    reason = reason_against(config(smart=SmartConfig(lambda_s=1.0)), SMALL, GPU)
    assert reason.startswith("smart_ascend runs in plain PyTorch (the native extension was built without CUDA")


def test_a_run_on_a_gpu_says_whether_it_has_graphs(all_compiled):
    model = SimpleNamespace(encoder=SimpleNamespace(config=SMALL))
    assert graphs_lines(config(), model, GPU) == ["steps are replayed as CUDA graphs"]
    assert graphs_lines(config(cuda_graphs=False), model, GPU) == ["no CUDA graphs: --cuda-graphs false"]
    assert graphs_lines(config(), model, ProcessGroup()) == []


def test_so_are_options(all_compiled):
    assert reason_against(config(cuda_graphs=False), SMALL, GPU) == "--cuda-graphs false"
    for options in ({"accumulate": 2}, {"low_memory": True}):
        assert "several streams" in reason_against(config(**options), SMALL, GPU)
    group = ProcessGroup(rank=0, world_size=2, device=GPU.device)
    assert reason_against(config(), SMALL, group) == "2 processes"


# Captures, with a fake of torch's ---------------------------------------------------------------------------------


class FakeGraph:
    """Records its calls; ending a capture that has failed is an error, as in torch."""

    calls: list[str]

    def __init__(self):
        self.calls, self.failed = [], False

    def capture_begin(self, pool, capture_error_mode):
        self.calls.append(f"begin in {pool}, {capture_error_mode}")

    def capture_end(self):
        self.calls.append("end")
        if self.failed:
            raise RuntimeError("previous error during capture")


@pytest.fixture
def fake_graphs(monkeypatch):
    """The graphs that captures make; all memory is the CPU's."""
    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(FakeGraph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(cuda_graphs, "unowned_view", torch.Tensor.detach)
    for name in ("synchronize", "empty_cache", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: pytest.fail(f"{name} is called"))
    return made


def a_batch() -> Batch:
    steps = trainer(buckets=Buckets(DATA, 64))
    (stream,) = steps.batches.streams([parts()], 0, 0)
    return steps.batches.pack(stream)


class Computed:
    """A `compute` that leaves a gradient and returns losses with a graph."""

    def __init__(self, fails: bool = False):
        self.leaf, self.fails, self.seen = torch.ones(2, requires_grad=True), fails, []

    def __call__(self, batch):
        loss = (2 * self.leaf).sum()
        loss.backward()
        if self.fails:
            raise RuntimeError("the first error")
        return cuda_graphs.Losses({"sst": loss}, {}, {}, {}, loss, loss.detach())


def test_captures_share_a_pool_and_wait_for_nothing(fake_graphs):
    capture, compute = Capture(), Computed()
    captured = [capture(compute, a_batch(), [compute.leaf], torch.device("cpu")) for _ in range(2)]
    assert [graph.calls for graph in fake_graphs] == [["begin in a pool, thread_local", "end"]] * 2
    assert compute.leaf.grad is None
    for graph in captured:
        assert torch.equal(graph.grads[0], torch.full((2,), 2.0))
        assert not graph.losses.total.requires_grad


def test_a_capture_that_fails_is_ended_and_raises_its_first_error(fake_graphs, monkeypatch):
    monkeypatch.setattr(Capture, "_unfinished", [])
    compute = Computed(fails=True)
    monkeypatch.setattr(FakeGraph, "capture_begin", lambda graph, **_: setattr(graph, "failed", True))
    with pytest.raises(RuntimeError, match="the first error"):
        Capture()(compute, a_batch(), [compute.leaf], torch.device("cpu"))
    (graph,) = fake_graphs
    assert graph.calls == ["end"]
    assert Capture._unfinished == [graph]


def test_the_generator_of_the_device_gets_another_state(monkeypatch):
    states = []
    generators = [SimpleNamespace(clone_state=lambda n=n: n, graphsafe_set_state=states.append) for n in range(2)]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("cuda:1", "cuda", "cpu"):
        cuda_graphs.renew_generator(torch.device(name))
    assert states == [1, 0]


# Devices and streams, with fakes ----------------------------------------------------------------------------------


class FakeStream:
    """A stream that records what it waits for."""

    def __init__(self, log, device, name):
        self.log, self.device, self.name = log, device, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def second_gpu(monkeypatch):
    """Two GPUs, of which the first is current; gives the second, and a log of waits and of what runs where."""
    log, device = [], torch.device("cuda", 1)
    current = [FakeStream(log, torch.device("cuda", number), f"default of {number}") for number in (0, 1)]
    on = [current[0]]

    @contextmanager
    def stream(chosen):
        before = current[chosen.device.index]
        current[chosen.device.index] = chosen
        on.append(chosen)
        yield
        on.pop()
        current[chosen.device.index] = before

    def current_stream(device=None):
        return current[0 if device is None else device.index]

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log, device, f"own of {device.index}"))
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(cuda_graphs, "copy_to_buffer", lambda *_, pinned: torch.zeros(1) if pinned else None)
    return SimpleNamespace(device=device, log=log, on=on)


def test_steps_and_captures_run_on_a_stream_of_their_device(second_gpu):
    """In order with what its current stream has to do before and after; replays are on that stream."""
    log, on = second_gpu.log, second_gpu.on
    loss, batch = torch.zeros(()), a_batch()
    losses = cuda_graphs.Losses({}, {}, {}, {}, loss, loss)

    def compute(_):
        log.append(f"computes on {on[-1].name}")
        return losses

    def capture(*_):
        log.append(f"captures on {on[-1].name}")
        graph = SimpleNamespace(replay=lambda: log.append(f"replays on {torch.cuda.current_stream(device).name}"))
        return Graph(graph, Layout([]), torch.ones(1), losses, [])

    device = second_gpu.device
    object.__setattr__(batch, "to", lambda to: batch if to == device else pytest.fail(f"to {to}"))
    graphs = CudaGraphs(compute, [], device, capture=capture)
    for _ in range(3):
        graphs(batch)
    before, after = "own of 1 waits for default of 1", "default of 1 waits for own of 1"
    assert log == [
        *(before, "computes on own of 1", after),
        *(before, "captures on own of 1", after, "replays on default of 1"),
        "replays on default of 1",
    ]
