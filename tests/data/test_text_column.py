"""A column on disk is the list of its texts, and does not hold them in memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data import TextColumn, text_column
from minbert.errors import UserError

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=20)


@given(TEXTS, st.data())
def test_a_column_is_the_list_of_its_texts(texts, data):
    column = TextColumn.of(iter(texts))
    assert (len(column), list(column)) == (len(texts), texts)
    cut = slice(
        *data.draw(st.tuples(*[st.integers(-25, 25) | st.none()] * 2)), data.draw(st.sampled_from([None, 2, -1]))
    )
    assert list(column[cut]) == texts[cut]
    if texts:
        indices = data.draw(st.lists(st.integers(-len(texts), len(texts) - 1)))
        assert list(column.select(np.array(indices, np.int64))) == [texts[index] for index in indices]
        assert [column[index] for index in indices] == [texts[index] for index in indices]
        assert list(column[cut][::-1]) == texts[cut][::-1]


def test_an_index_past_the_end_is_an_index_error():
    with pytest.raises(IndexError):
        TextColumn.of(["one"])[1]


def test_memory_holds_positions_alone():
    size, count = 1000, 3000
    tracemalloc.start()
    try:
        column = TextColumn.of(f"{number:{size}}" for number in range(count))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(column), len(column[7])) == (count, size)
    assert held < count * 40
    assert peak < count * size / 2 + (1 << 20), "a megabyte is the file's buffer"


def test_a_full_disk_is_said_in_one_line(monkeypatch):
    class Full:
        def write(self, content: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_column.tempfile, "TemporaryFile", lambda **options: Full())
    with pytest.raises(
        UserError, match=r"temporary file in .* \(No space left on device\); free some space, or set TMP"
    ):
        TextColumn.of(["one"])
