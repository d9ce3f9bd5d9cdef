"""Examples of a task."""

from __future__ import annotations

import pytest

from minbert.data import Examples


def test_examples_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="pairs has 1 entries for 2 ids"):
        Examples(["a", "b"], ["x", "y"], ["z"], None)
