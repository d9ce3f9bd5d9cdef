"""Sampling is a pure function of the step, fair to every example, and the same under every NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data import TaskSampler, steps_per_epoch, task_at, token_budget_batches

small = st.integers(1, 40)


@given(n=small, batch_size=small, seed=st.integers(0, 2**63 - 1))
def test_every_pass_visits_every_example_once(n, batch_size, seed):
    sampler = TaskSampler(n, batch_size, seed, "sst")
    passes = 3
    batches = [sampler.batch(i) for i in range(-(-passes * n // batch_size))]
    assert all(batch.dtype == np.int64 and batch.shape == (batch_size,) for batch in batches)
    for order in np.concatenate(batches)[: passes * n].reshape(passes, n):
        assert sorted(order) == list(range(n))


def test_a_batch_depends_on_its_number_alone():
    forwards = [TaskSampler(100, 32, 5, "sst").batch(i) for i in range(20)]
    sampler = TaskSampler(100, 32, 5, "sst")
    for i in reversed(range(20)):
        np.testing.assert_array_equal(sampler.batch(i), forwards[i])


def test_a_batch_is_the_callers_to_change():
    sampler = TaskSampler(8, 8, 0, "sst")
    first = sampler.batch(0)
    first[:] = -1
    assert sorted(sampler.batch(0)) == list(range(8))


def test_passes_seeds_and_tasks_have_different_orders():
    orders = [
        TaskSampler(100, 100, seed, name).batch(i).tolist()
        for seed in (0, 1)
        for name in ("sst", "sts")
        for i in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 8


def test_the_order_is_the_same_on_every_machine():
    assert TaskSampler(10, 12, 0, "sst").batch(0).tolist() == [0, 1, 2, 7, 6, 9, 4, 3, 8, 5, 7, 4]


def test_every_position_of_a_pass_is_equally_likely():
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[np.arange(5), TaskSampler(5, 5, seed, "sst").batch(0)] += 1
    assert np.abs(counts - 400).max() < 6 * np.sqrt(2000 * 0.2 * 0.8)


def test_nothing_to_sample_is_refused():
    with pytest.raises(ValueError, match="got 0 and 4"):
        TaskSampler(0, 4, 0, "sst")


@given(tasks=st.integers(1, 6), seed=st.integers(0, 2**63 - 1), mode=st.sampled_from(["round-robin", "shuffled"]))
def test_every_cycle_gives_each_task_its_next_batch(tasks, seed, mode):
    for cycle in range(4):
        turns = [task_at(cycle * tasks + slot, tasks, mode, seed) for slot in range(tasks)]
        assert sorted(turns) == [(task, cycle) for task in range(tasks)]


def test_round_robin_keeps_its_order_and_shuffled_does_not():
    def orders(mode):
        return {tuple(task_at(cycle * 4 + slot, 4, mode, 0)[0] for slot in range(4)) for cycle in range(30)}

    assert orders("round-robin") == {(0, 1, 2, 3)}
    assert len(orders("shuffled")) > 10
    with pytest.raises(ValueError, match="'round-robin' or 'shuffled', got 'joint'"):
        task_at(0, 4, "joint", 0)


def test_an_epoch_follows_the_smallest_or_largest_task_or_a_number():
    assert steps_per_epoch([100, 33], 32, "smallest") == 2
    assert steps_per_epoch([100, 33], 32, "largest") == 4
    assert steps_per_epoch([96, 64], 32, "largest") == 3
    assert steps_per_epoch([100, 33], 32, 7) == 7


@given(st.lists(st.integers(1, 60), max_size=50), st.integers(1, 100))
def test_token_budget_batches_split_the_examples_within_the_budget(lengths, tokens):
    lengths = np.array(lengths, np.int64)
    batches = token_budget_batches(lengths, tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(lengths[batch].sum() <= tokens or len(batch) == 1 for batch in batches)
    for batch, following in itertools.pairwise(batches):
        assert lengths[batch].max() <= lengths[following].min()
        assert lengths[batch].sum() + lengths[following].min() > tokens
