"""Sampling is a pure function of the step, fair to every example, and the same under every NumPy."""

from __future__ import annotations

import collections
import itertools
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data import Plan, TaskSampler, plan, token_budget_batches
from minbert.data.sampling import ORDERS

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


tasks = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 20)), min_size=1, max_size=5)  # sizes, batch sizes


def planned(pairs, order, **options):
    """A plan for tasks named a, b, ... of these sizes and batch sizes."""
    names = string.ascii_lowercase
    sizes, batch_sizes = ({names[i]: pair[k] for i, pair in enumerate(pairs)} for k in (0, 1))
    return plan(sizes, batch_sizes, order=order, **options)


def turns(of: Plan, start: int = 0, stop: int | None = None) -> list[str]:
    """The tasks of the steps, one a step."""
    return ["".join(of.at(step)) for step in range(start, of.steps if stop is None else stop)]


@given(pairs=tasks, order=st.sampled_from(["joint", *ORDERS]), seed=st.integers(0, 2**63 - 1))
def test_a_task_counts_its_own_steps_from_0(pairs, order, seed):
    of = planned(pairs, order, seed=seed, epochs=3)
    counted = collections.Counter()
    for step in range(of.steps):
        for name, number in of.at(step).items():
            assert number == counted[name]
            counted[name] += 1
    assert {name: of.steps_of(name) for name in of.names} == {name: counted[name] for name in of.names}


@given(pairs=tasks, order=st.sampled_from(["sequential", "round-robin", "shuffled"]), seed=st.integers(0, 99))
def test_an_epoch_shows_each_task_as_often_as_its_length_says(pairs, order, seed):
    own = [-(-size // batch_size) for size, batch_size in pairs]
    for length, expected in (("smallest", min(own)), ("largest", max(own)), (3, 3), ("each", None)):
        of = planned(pairs, order, length=length, seed=seed, epochs=2)
        assert of.epoch_steps == (sum(own) if expected is None else expected * len(own))
        for epoch in range(2):
            counts = collections.Counter(turns(of, epoch * of.epoch_steps, (epoch + 1) * of.epoch_steps))
            assert [counts[name] for name in of.names] == (own if expected is None else [expected] * len(own))


def test_the_orders_are_what_their_names_say():
    pairs = [(4, 2), (3, 1), (1, 1)]
    assert "".join(turns(planned(pairs, "sequential", length="each", epochs=2))) == "aabbbc" * 2
    assert "".join(turns(planned(pairs, "round-robin", length="each", epochs=2))) == "abcabb" * 2
    assert "".join(turns(planned(pairs, "round-robin", length=2))) == "abcabc"
    shuffled = planned([(40, 2), (30, 1)], "shuffled", length="each", epochs=2)
    first, second = turns(shuffled, 0, 50), turns(shuffled, 50, 100)
    assert first != second
    assert first != sorted(first)
    assert planned(pairs, "joint", length="largest").at(2) == {"a": 2, "b": 2, "c": 2}
    with pytest.raises(
        ValueError, match="'joint' or one of sequential, round-robin, shuffled, proportional, got 'any'"
    ):
        planned(pairs, "any")


@pytest.mark.parametrize("order", ["joint", *ORDERS])
def test_times_as_many_batches_make_an_epoch(order):
    once, thrice = (planned([(10, 2), (30, 3)], order, times=times) for times in (1, 3))
    assert thrice.epoch_steps == 3 * once.epoch_steps == (15 if order == "joint" else 30)


def test_a_task_of_twice_the_weight_takes_twice_the_steps():
    counts = collections.Counter(turns(planned([(8, 1), (4, 1)], "shuffled", length="each", weights={"b": 2.0})))
    assert counts == {"a": 8, "b": 8}
    drawn = collections.Counter(turns(planned([(8, 1), (4, 1)], "proportional", weights={"b": 2.0}, steps=4000)))
    assert abs(drawn["a"] - 2000) < 6 * np.sqrt(4000 / 4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_tasks_are_drawn_in_proportion_to_a_power_of_their_sizes(alpha):
    sizes = np.array([100, 400, 2500])
    of = planned([(size, 8) for size in sizes], "proportional", alphas=(alpha, alpha), steps=20000)
    odds = sizes**alpha / (sizes**alpha).sum()
    counts = np.array([of.steps_of(name) for name in of.names])
    assert np.all(np.abs(counts - 20000 * odds) < 6 * np.sqrt(20000 * odds * (1 - odds)))


def test_annealing_goes_from_the_sizes_shares_to_those_of_the_last_alpha_in_even_steps():
    sizes, length = np.array([100, 1600]), 20000
    of = planned([(100, 1), (1600, 1)], "proportional", length=length // 2, alphas=(1.0, 0.0), epochs=3)
    for epoch, alpha in enumerate((1.0, 0.5, 0.0)):
        share = (sizes**alpha / (sizes**alpha).sum())[0]
        drawn = turns(of, epoch * length, (epoch + 1) * length).count("a")
        assert abs(drawn - length * share) < 6 * np.sqrt(length * share * (1 - share))


@pytest.mark.parametrize("order", ["joint", *ORDERS])
def test_a_longer_run_begins_as_a_shorter_one(order):
    short, long = (planned([(20, 2), (50, 3)], order, seed=7, steps=steps) for steps in (30, 300))
    assert [long.at(step) for step in range(30)] == [short.at(step) for step in range(30)]


def test_the_plan_is_the_same_on_every_machine():
    assert "".join(turns(planned([(4, 1), (3, 1)], "shuffled", length="each"))) == "baaabab"
    assert "".join(turns(planned([(4, 1), (3, 1)], "proportional", length="each"))) == "aabaabb"


@given(st.lists(st.integers(1, 60), max_size=50), st.integers(1, 100))
def test_token_budget_batches_split_the_examples_within_the_budget(lengths, tokens):
    lengths = np.array(lengths, np.int64)
    batches = token_budget_batches(lengths, tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(lengths[batch].sum() <= tokens or len(batch) == 1 for batch in batches)
    for batch, following in itertools.pairwise(batches):
        assert lengths[batch].max() <= lengths[following].min()
        assert lengths[batch].sum() + lengths[following].min() > tokens
