"""SMART of some tasks: their sequences alone go through its passes, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_trainer import REGULARISERS, TASKS, parts, trainer
from torch import Tensor

from minbert.methods.rdrop import RDropConfig
from minbert.methods.smart import SmartConfig
from minbert.training.batches import SmartPart
from minbert.training.loop import training_step

NAMES = [task.name for task in TASKS]


SMART = SmartConfig(epsilon=0.5, sigma=0.1, eta=0.5)


def steps_with(weights: dict[str, float], masks: str, smart: SmartConfig = SMART, **options):
    """A trainer whose SMART has these weights."""
    return trainer(smart=replace(smart, lambda_s=weights, masks=masks), **options)


def packed(steps):
    (stream,) = steps.batches.streams([parts()], 0, 0)
    return steps.batches.pack(stream)


def results(steps, batch) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The regularisers of the tasks that have one, and all gradients."""
    losses = steps.objective(batch, steps.gradients.attached)
    losses.total.backward()
    rows = [
        grad.to_dense() if grad.is_sparse else grad for row in steps.gradients.rows for grad in row if grad is not None
    ]
    heads = [param.grad for param in steps.model.heads.parameters() if param.grad is not None]
    return {**losses.smart, **losses.rdrop, "total": losses.total.detach()}, [*rows, *heads]


@pytest.mark.parametrize("masks", ["shared", "independent"])
@pytest.mark.parametrize("surgery", ["sum", "pcgrad"])
@pytest.mark.parametrize("chosen", [NAMES[:1], NAMES[1:2], NAMES[1:], NAMES[::2]], ids="+".join)
def test_is_what_the_whole_batch_gives_with_the_other_weights_0(chosen: list[str], surgery: str, masks: str) -> None:
    weights = {name: 2.0 + i for i, name in enumerate(chosen)}
    some, whole = (steps_with(weights, masks, surgery=surgery, dropout=0.3, mu=0.5) for _ in range(2))
    batch = packed(some)
    tokens = sum(len(part.packed.token_ids) for part in batch.smart_parts)
    assert [name for part in batch.smart_parts for name in part.tasks] == chosen
    assert tokens < len(batch.packed.token_ids)
    of_all = replace(batch, smart_parts=(SmartPart(batch.packed, tuple(batch.counts), 0),))
    (got, gradients), (wanted, expected) = results(some, batch), results(whole, of_all)
    assert set(got) == {*chosen, "total"}
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)
    assert all(value > 1e-4 for value in got.values())
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


@pytest.mark.parametrize("surgery", ["sum", "pcgrad"])
@pytest.mark.parametrize("name", ["R3F", "SiFT", "VAT", "FreeLB"])
def test_of_every_regulariser_too(name: str, surgery: str) -> None:
    weights, smart = {NAMES[0]: 1.0, NAMES[2]: 0.5}, REGULARISERS[name]["smart"]
    some, whole = (steps_with(weights, "independent", smart, surgery=surgery, dropout=0.3, mu=0.5) for _ in range(2))
    batch = packed(some)
    assert [part.tasks for part in batch.smart_parts] == [(NAMES[0],), (NAMES[2],)]
    of_all = replace(batch, smart_parts=(SmartPart(batch.packed, tuple(batch.counts), 0),))
    (got, gradients), (wanted, expected) = results(some, batch), results(whole, of_all)
    for task, value in got.items():
        torch.testing.assert_close(value, wanted[task], rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6


@pytest.mark.parametrize("surgery", ["sum", "pcgrad"])
def test_of_rdrop_too(surgery: str) -> None:
    alphas = RDropConfig({NAMES[0]: 1.0, NAMES[2]: 2.0})
    some, whole = (trainer(rdrop=alphas, surgery=surgery, dropout=0.3) for _ in range(2))
    batch = packed(some)
    assert [part.tasks for part in batch.rdrop_parts] == [(NAMES[0],), (NAMES[2],)]
    of_all = replace(batch, rdrop_parts=(SmartPart(batch.packed, tuple(batch.counts), 0),))
    (got, gradients), (wanted, expected) = results(some, batch), results(whole, of_all)
    assert set(got) == {NAMES[0], NAMES[2], "total"}
    for task, value in got.items():
        torch.testing.assert_close(value, wanted[task], rtol=1e-4, atol=1e-6)
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_smart_and_rdrop_may_have_parts_of_their_own() -> None:
    smart, rdrop = replace(SMART, lambda_s={NAMES[0]: 1.0}), RDropConfig({NAMES[2]: 1.0})
    batch = packed(trainer(smart=smart, rdrop=rdrop))
    copied = batch.with_tensors([tensor.clone() for tensor in batch.tensors])
    assert [part.tasks for part in copied.smart_parts] == [(NAMES[0],)]
    assert [part.tasks for part in copied.rdrop_parts] == [(NAMES[2],)]
    for one, other in zip(copied.tensors, batch.tensors, strict=True):
        assert torch.equal(one, other)


def test_a_batch_whose_tasks_all_have_it_is_one_part() -> None:
    batch = packed(steps_with(dict.fromkeys(NAMES, 1.0), "shared"))
    (part,) = batch.smart_parts
    assert part.packed is batch.packed
    assert part.tasks == tuple(NAMES)


def test_tensors_come_back_in_their_places() -> None:
    batch = packed(steps_with({NAMES[0]: 1.0, NAMES[2]: 1.0}, "shared"))
    copied = batch.with_tensors([tensor.clone() for tensor in batch.tensors])
    for one, other in zip(copied.tensors, batch.tensors, strict=True):
        assert torch.equal(one, other)
    assert [part.first_token for part in copied.smart_parts] == [0, batch.packed.token_bounds[2]]
    assert copied.smart_parts[1].packed.sequence_bounds == (0, 0, 0, batch.counts[NAMES[2]])


def test_low_memory_skips_streams_without_it() -> None:
    steps = steps_with({NAMES[0]: 1.0}, "shared", low_memory=True)
    streams = steps.batches.streams([parts()], 0, 0)
    assert [bool(steps.batches.pack(stream).smart_parts) for stream in streams] == [True, False, False]
    result = training_step(steps, 0, 0.5).result()
    assert set(result.smart) == {NAMES[0]}
    assert result.perturbation > 0
