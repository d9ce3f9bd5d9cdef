"""Gradients in bfloat16 are sent as they are and summed in float32; parameters come back in bfloat16."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
import torch
from spawned_ranks import free_port, joined, run_ranks
from torch import Tensor, nn

from minbert.distributed import sharded_parameters
from minbert.distributed.process_group import ProcessGroup
from minbert.distributed.sharded_parameters import ShardedParameters
from minbert.kernels.gradient_table import GradientColumns, GradientTable
from minbert.methods.task_gradients import TaskGradients
from minbert.training.optimizer import AdamW

RANKS, TASKS = 3, 2
MATRICES = {"first": (40, 7), "second": (33, 5)}  # with copies in bfloat16
VECTORS = {"bias": (7,), "positions": (11, 4)}


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in (MATRICES | VECTORS).items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def sharded(self, group: ProcessGroup) -> ShardedParameters:
        copies = {param: param.detach().bfloat16() for name, param in self.named_parameters() if name in MATRICES}
        return ShardedParameters([], list(self.parameters()), TASKS, group, copies)


def derivatives(rank: int, task: int, param: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * rank + 10 * task + param))


def sum_over_ranks(task: int, number: int, param: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 sum of what the ranks' backwards give in `dtype`."""
    return sum(derivatives(r, task, number, param.shape).to(dtype).float() for r in range(RANKS))


def up(n: int, to: int) -> int:
    return -(-n // to) * to


def _collective(group: ProcessGroup) -> None:
    inputs = [derivatives(rank, 0, 0, torch.Size([RANKS * 64])).bfloat16() for rank in range(RANKS)]
    shards = [group.shard(of_rank) for of_rank in inputs]
    output, before = torch.full((64,), torch.nan), group.bytes_sent
    group.reduce_scatter(output, inputs[group.rank]).wait()
    exact = sum(shard.double() for shard in shards)
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=1e-6)
    assert (sum(shards).double() - exact).abs().max() > 1e-3  # as a sum in bfloat16 would be
    assert group.bytes_sent - before == 2 * 64 * (RANKS - 1)


def _update(group: ProcessGroup) -> None:
    trunk, alone = Trunk(), Trunk()
    sharded = trunk.sharded(group)
    sharded.all_gather_masters()
    sharded.all_gather()
    gradients = TaskGradients(trunk, TASKS, sharded.copies)
    sharded.register_hooks(gradients)
    optimizer = AdamW(sharded.param_groups([{"params": list(trunk.parameters())}]), copies=sharded.optimizer_copies)
    of_one = AdamW(alone.parameters())

    before = group.bytes_sent
    sharded.reduce_next_backward()
    params = list(trunk.parameters())
    terms = []
    for index, leaf in enumerate(gradients.leaves):
        task, number = divmod(index, len(params))
        if (task, number) != (1, 1):  # the second task's loss does not reach one parameter
            terms.append((leaf * derivatives(group.rank, task, number, leaf.shape).to(leaf.dtype)).float().sum())
    torch.stack(terms).sum().backward()
    shared, own = sharded.wait_for_gradients()
    assert list(own.grads) == []
    expected = {
        number: [
            None if (task, number) == (1, 1) else sum_over_ranks(task, number, param, leaf.dtype)
            for task, leaf in enumerate(gradients.leaves[number :: len(params)])
        ]
        for number, param in enumerate(params)
    }
    by_shard = dict(zip(shared.columns.params, zip(*shared.rows, strict=True), strict=True))
    for shard in sharded.shards:
        (number,) = (i for i, param in enumerate(params) if param is shard.param)
        for found, wanted in zip(by_shard[shard.values], expected[number], strict=True):
            assert (found is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(found, wanted.flatten()[shard.elements], rtol=0, atol=1e-6)
    weights = torch.ones(TASKS, dtype=torch.float64)
    optimizer.combined_step(shared, own, weights, weights[:1])
    sharded.all_gather()
    narrow, wide = (
        up(sum(up(torch.Size(shape).numel(), 16) for shape in shapes.values()), 16 * RANKS)
        for shapes in (MATRICES, VECTORS)
    )
    sent = (TASKS + 1) * (2 * narrow + 4 * wide) * (RANKS - 1) // RANKS
    assert group.bytes_sent - before == sharded.bytes_per_update(ema=False) == sent

    rows = [grads[task] for task in range(TASKS) for grads in expected.values()]
    whole = GradientTable(GradientColumns(list(alone.parameters()), TASKS), rows)
    of_one.combined_step(whole, GradientTable(GradientColumns([], 1), []), weights, weights[:1])
    for param, wanted in zip(params, alone.parameters(), strict=True):
        if param in sharded.copies:
            torch.testing.assert_close(sharded.copies[param].float(), wanted.data, rtol=2**-8, atol=0)
    before, matrices = group.bytes_sent, [param for param in params if param in sharded.copies]
    assert any((param - wanted).abs().max() > 1e-4 for param, wanted in zip(params, alone.parameters(), strict=True))
    for _ in range(2):  # the second time there is nothing to send
        sharded.all_gather_masters()
        assert group.bytes_sent - before == 4 * narrow * (RANKS - 1) // RANKS
    for param, wanted in zip(params, alone.parameters(), strict=True):
        torch.testing.assert_close(param, wanted, rtol=0, atol=1e-6)
    for param in matrices:
        assert torch.equal(sharded.copies[param], param.detach().bfloat16())


def _rank(rank: int, port: int) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    with joined(rank, RANKS, port) as group:
        assert not group.one_machine
        _collective(group)
        _update(group)
        group.one_machine = True
        with patch.object(ProcessGroup, "backend", "nccl"):
            _collective(group)
            _update(group)
        if rank == 0:  # a rank does not wait for the others' numbers before it reads them
            largest = group.start_all_reduce_max(1)
            group.liveness.store.set("started", "")
        else:
            group.liveness.store.wait(["started"])
            largest = group.start_all_reduce_max(rank)
        assert largest() == RANKS - 1


def test_three_ranks_send_half_of_the_bytes_and_update_as_one() -> None:
    """Over gloo, and what NCCL is given. What each rank sends is counted; all get the same sums, in float32."""
    run_ranks(RANKS, _rank, free_port())


@pytest.mark.parametrize("one_machine", [True, False])
def test_a_bucket_has_gradients_of_one_dtype(one_machine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets are in the order in which a backward completes them, as their last parameters are."""
    monkeypatch.setattr(sharded_parameters, "BUCKET_ELEMENTS", 300)
    trunk = Trunk()
    group = ProcessGroup(0, 2, torch.device("meta"), one_machine=one_machine)
    sharded = trunk.sharded(group)
    names = {param: name for name, param in trunk.named_parameters()}
    assert [[names[param] for param in bucket.params] for bucket in sharded.buckets] == [
        ["positions", "bias"],
        ["second"],
        ["first"],
    ]
    assert [bucket.read.dtype for bucket in sharded.buckets] == [torch.float32, torch.bfloat16, torch.bfloat16]
    sent = torch.bfloat16 if one_machine else torch.float32  # NCCL's sums cross a network once
    assert [bucket.gradient_dtype for bucket in sharded.buckets] == [torch.float32, sent, sent]
    elements = [bucket.flat.numel() for bucket in sharded.buckets]
    gradients = 4 * elements[0] + sent.itemsize * sum(elements[1:])
    assert sharded.bytes_per_update(ema=False) == (TASKS * gradients + 4 * elements[0] + 2 * sum(elements[1:])) // 2
