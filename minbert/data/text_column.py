"""A column of texts on disk: memory holds where each text lies, not the texts."""

from __future__ import annotations

import mmap
import operator
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from minbert.errors import UserError

CHUNK = 8192  # texts whose positions are Python numbers at once


class TextSpool:
    """Writes the texts of a column to a temporary file, which has no name and ends with its last user."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115
        self._ends = array("q", [0])

    def append(self, content: bytes) -> None:
        """Add a text in UTF-8.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._file.write(content)
        except OSError as error:
            raise self._failed(error) from None
        self._ends.append(self._ends[-1] + len(content))

    def finish(self) -> TextColumn:
        """The column of all texts.

        Raises:
            UserError: the disk is full.
        """
        ends = np.array(self._ends, np.int64)
        try:
            self._file.flush()
            content = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if ends[-1] else b""
        except OSError as error:
            raise self._failed(error) from None
        self._file.close()  # the mapping stays
        return TextColumn(content, ends[:-1], ends[1:])

    def _failed(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write the texts to a temporary file in {tempfile.gettempdir()} ({error.strerror});"
            " free some space, or set TMPDIR to another directory"
        )


class TextColumn(Sequence[str]):
    """n texts in a memory-mapped file. A slice or a selection is a column over the same file.

    Args:
        content: the texts in UTF-8.
        starts, ends: of each text in it, in bytes, int64 [n].
    """

    def __init__(self, content: mmap.mmap | bytes, starts: np.ndarray, ends: np.ndarray) -> None:
        self._content, self._starts, self._ends = content, starts, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextColumn:
        """A column of texts that are valid Unicode."""
        spool = TextSpool()
        for text in texts:
            spool.append(text.encode())
        return spool.finish()

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> TextColumn: ...
    def __getitem__(self, index: Any) -> str | TextColumn:
        if isinstance(index, slice):
            return TextColumn(self._content, self._starts[index], self._ends[index])
        number = operator.index(index)
        return str(self._content[int(self._starts[number]) : int(self._ends[number])], "utf-8")

    def __iter__(self) -> Iterator[str]:
        content = self._content
        for first in range(0, len(self), CHUNK):
            starts, ends = (each[first : first + CHUNK].tolist() for each in (self._starts, self._ends))
            for start, end in zip(starts, ends, strict=True):
                yield str(content[start:end], "utf-8")

    def select(self, indices: np.ndarray) -> TextColumn:
        """The texts at `indices`, int64, in that order."""
        return TextColumn(self._content, self._starts[indices], self._ends[indices])
