"""GradientSurgery of two processes over gloo: the update of one process with the whole batch, the same on both."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawned_ranks import run_two_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minbert.integrations import GradientSurgery, PCGrad, TaskBatch
from minbert.integrations.averaged_gradients import averaged

RULES = ["upgrad", "famo", "gradvac", "pcgrad", "random", "mean"]


class Network(nn.Module):
    """A trunk with a buffer, and a head for each of three tasks; 256 KiB in its largest parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(16, affine=False)
        self.trunk = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(256, 1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(self.norm(x) if self.training else x)
        return [head(hidden) for head in self.heads]


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 16), 3 * torch.randn(3, 8, 1)


def losses_of(model: nn.Module, rows: slice, without: tuple[int, ...] = ()) -> list[Tensor | None]:
    x, y = data()
    outputs = model(x[rows])
    return [None if t in without else (outputs[t] - y[t, rows]).square().mean() for t in range(3)]


def optimizer_of(model: nn.Module, rule: str, seed: int) -> GradientSurgery:
    generator = torch.Generator().manual_seed(seed)
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    return PCGrad(inner, generator=generator) if rule == "pcgrad" else GradientSurgery(inner, rule, generator=generator)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def by_one_backward(trunk: nn.Module, heads: nn.ModuleList, rows: slice) -> Tensor:
    """The parameters after two steps with a TaskBatch; each half of the data has two examples of each of two tasks."""
    inner = torch.optim.SGD([*trunk.parameters(), *heads[:2].parameters()], lr=0.05)
    optimizer = GradientSurgery(inner, "upgrad")
    x, y = data()
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7]) if rows == slice(8) else torch.arange(rows.start, rows.stop)
    for _ in range(2):
        batch = TaskBatch(trunk, [0] * (len(order) // 2) + [1] * (len(order) // 2))
        with batch:
            hidden = trunk(x[order])
        losses = [
            (heads[t](hidden[its]) - y[0, order[its]]).square().mean() for t, its in enumerate(map(batch.rows, (0, 1)))
        ]
        optimizer.zero_grad()
        optimizer.backward(losses, batch=batch)
        optimizer.step()
    return torch.cat([flat(trunk), flat(heads)])


def _rank(rank: int, folder: Path) -> None:
    """All cases in one group of processes; each rank writes a file of what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    results: dict[str, object] = {}
    halves = slice(4 * rank, 4 * rank + 4)
    for rule in RULES:
        for wrapped in (False, True):
            network = Network().eval()
            model = DistributedDataParallel(network) if wrapped else network
            optimizer = optimizer_of(model, rule, seed=3 + 10 * rank)  # the first process's numbers count
            for step in range(3):
                optimizer.zero_grad()
                # In the last step the second process has no examples of the third task.
                optimizer.backward(losses_of(model, halves, (2,) if rank == 1 and step == 2 and rule != "mean" else ()))
                optimizer.step()
            results[f"{rule} {wrapped}"] = flat(network), optimizer.weights

    network = Network().eval()
    optimizer = optimizer_of(network, "upgrad", 0)
    for part in range(2):  # each process has two batches of two
        rows = slice(halves.start + 2 * part, halves.start + 2 * part + 2)
        optimizer.backward([loss / 2 for loss in losses_of(network, rows)], hold=part == 0)
    optimizer.step()
    results["held"] = flat(network), optimizer.weights

    trunk, heads = Network().trunk, Network().heads
    results["batch"] = by_one_backward(DistributedDataParallel(trunk), heads, halves)

    model = DistributedDataParallel(Network().train())  # buffers follow the first process
    for _ in range(2):
        optimizer_of(model, "upgrad", 0).backward(losses_of(model, halves))
    with torch.no_grad():
        model(data()[0][halves])
    results["sent buffers"] = model.module.norm.running_mean.clone()

    try:
        optimizer.backward(losses_of(network, halves)[: 2 + rank])
    except ValueError as error:
        results["message"] = str(error)
    values = [torch.full((2, 3), float(rank)), torch.full((1,), 2.0 * rank, dtype=torch.bfloat16)]
    values += [torch.full((4, 3), float(rank)).T]
    means = averaged(values, None)
    results["means"] = [mean.flatten().tolist() for mean in means], [mean.stride() for mean in means]
    torch.save(results, folder / f"rank{rank}.pt")
    # DistributedDataParallel as a group's last owner waits, with Python's lock held, for threads that may wait for it.
    del model, optimizer
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks(_rank, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "DistributedDataParallel"])
@pytest.mark.parametrize("rule", RULES)
def test_two_processes_make_the_steps_of_one(ranks, rule: str, wrapped: bool) -> None:
    network = Network().eval()
    optimizer = optimizer_of(network, rule, seed=3)
    for step in range(3):
        optimizer.zero_grad()
        losses = losses_of(network, slice(8))
        if step == 2 and rule != "mean":
            losses[2] = losses_of(network, slice(4))[2] / 2  # the other half counts as zero
        optimizer.backward(losses)
        optimizer.step()
    one, other = (rank[f"{rule} {wrapped}"] for rank in ranks)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    torch.testing.assert_close(one[0], flat(network), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one[1], optimizer.weights, rtol=1e-4, atol=1e-6)


def test_held_batches_are_averaged_once(ranks) -> None:
    network = Network().eval()
    optimizer = optimizer_of(network, "upgrad", 0)
    optimizer.backward(losses_of(network, slice(8)))
    optimizer.step()
    assert torch.equal(*(rank["held"][0] for rank in ranks))
    torch.testing.assert_close(ranks[0]["held"][0], flat(network), rtol=1e-5, atol=1e-6)


def test_one_backward_for_all_tasks_is_averaged_too(ranks) -> None:
    network = Network()
    expected = by_one_backward(network.trunk, network.heads, slice(8))
    assert torch.equal(*(rank["batch"] for rank in ranks))
    assert not torch.equal(expected, torch.cat([flat(Network().trunk), flat(Network().heads)]))
    torch.testing.assert_close(ranks[0]["batch"], expected, rtol=1e-5, atol=1e-6)


def test_the_wrapper_sends_buffers(ranks) -> None:
    assert not torch.equal(ranks[0]["sent buffers"], torch.zeros(16))
    # Before each forward both have the first process's, so that they differ by the last batch alone.
    difference = (ranks[0]["sent buffers"] - ranks[1]["sent buffers"]).double()
    last = data()[0][:4].mean(0) - data()[0][4:].mean(0)
    torch.testing.assert_close(difference, 0.1 * last.double(), rtol=1e-4, atol=1e-6)


def test_another_number_of_losses_is_refused_by_both(ranks) -> None:
    for rank in ranks:
        assert "all processes must have the same number of losses, got 2 in one and 3 in another" in rank["message"]


def test_means_keep_dtype_and_strides(ranks) -> None:
    for rank in ranks:
        assert rank["means"] == ([[0.5] * 6, [1.0], [0.5] * 12], [(3, 1), (1,), (1, 3)])
