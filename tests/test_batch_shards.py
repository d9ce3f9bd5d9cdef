"""Which examples of a batch each rank computes."""

from __future__ import annotations

import numpy as np
import pytest

from minbert.distributed.batch_shards import shard_examples, split_by_tokens
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError


def test_shards_have_about_as_many_tokens():
    rng = np.random.default_rng(0)
    for shards in (1, 2, 3, 7):
        for n in (shards, shards + 1, 96):
            lengths = rng.integers(3, 60, n)
            bounds = split_by_tokens(lengths, shards)
            assert bounds[0] == 0
            assert bounds[-1] == n
            assert (np.diff(bounds) >= 1).all()
            if n == 96:
                tokens = np.add.reduceat(lengths, bounds[:-1])
                assert tokens.max() - tokens.min() <= 60
    with pytest.raises(ValueError, match="at least 3 examples for as many shards, got 2"):
        split_by_tokens(np.array([5, 5]), 3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_shards_of_all_ranks_are_the_batch(world_size):
    rng = np.random.default_rng(0)
    lengths, widths = [rng.integers(3, 60, n) for n in (8, 1, 5)], [1, 2, 3]
    sequences = np.repeat(widths, [8, 1, 5])
    examples, first_token, first_sequence = np.concatenate(lengths), 0, 0
    found: list[list[int]] = [[], [], []]
    for rank in range(world_size):
        own, shard = shard_examples(lengths, widths, ProcessGroup(rank, world_size))
        for task, part in enumerate(own):
            found[task] += lengths[task][part].tolist()
        assert shard.first_token == first_token
        assert shard.tokens == examples.sum()
        assert sum(shard.sequences) == sequences.sum()
        counts = [len(lengths[task][part]) for task, part in enumerate(own)]
        assert shard.sequences[rank] == np.dot(counts, widths) > 0
        assert shard.bounds is None
        first_token += sum(int(lengths[task][part].sum()) for task, part in enumerate(own))
        first_sequence += shard.sequences[rank]
    assert found == [of_task.tolist() for of_task in lengths]
    assert (first_token, first_sequence) == (examples.sum(), sequences.sum())


def test_fewer_examples_than_ranks_are_refused():
    with pytest.raises(UserError, match="a batch of 2 examples is too small for 3 processes; give a larger --batch"):
        shard_examples([np.array([5]), np.array([4])], [1, 1], ProcessGroup(0, 3))
