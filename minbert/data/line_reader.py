"""Lines of text files and their fields, for every reader of data."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from minbert.errors import UserError

LONGEST_LINE = 1 << 26  # bytes
LONGEST_RECORD = 1 << 26  # characters of a quoted field over several lines
STANDARD_INPUT = "-"
BLOCK = 1 << 16  # bytes of a pipe that are read at once


class Pipe:
    """A pipe or terminal that is read by lines, and tells whether the next line is there."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._read, self._searched = descriptor, bytearray(), 0

    def readline(self, limit: int) -> bytes:
        """The next line, or its first `limit` bytes; waits until it is there. Empty at the end."""
        while (size := self._line()) == 0 and len(self._read) < limit:
            self._searched = len(self._read)
            block = os.read(self._descriptor, BLOCK)
            self._read += block
            if not block:
                break
        size = min(size or len(self._read), limit)
        line = bytes(self._read[:size])
        del self._read[:size]
        self._searched = 0
        return line

    def read(self, size: int) -> bytes:
        return self.readline(size)

    def waits(self) -> bool:
        """Whether `readline` would wait for more to come."""
        return self._line() == 0 and not select.select([self._descriptor], [], [], 0)[0]

    def _line(self) -> int:
        """The size of the next line, or 0 if its end is not there yet."""
        return self._read.find(b"\n", self._searched) + 1


def pipe_of(path: str | Path) -> Pipe | None:
    """The pipe or terminal that standard input is, if `path` is `-` and it is one."""
    if str(path) != STANDARD_INPUT or os.name != "posix":
        return None
    try:
        descriptor = sys.stdin.fileno()
        mode = os.fstat(descriptor).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return None
    return Pipe(descriptor) if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode) else None


def read_lines(
    path: str | Path, expected: str, *, option: str = "", pipes: bool = False, pipe: Pipe | None = None
) -> Iterator[str]:
    r"""The lines of a UTF-8 text file one by one, without their ends.

    A line ends with `\n` or `\r\n`. Every other character is text: a lone `\r`, form feeds, U+0085, U+2028. A byte
    order mark at the start is dropped.

    Args:
        path: a regular file.
        expected: the content that the file should have, for messages.
        option: the option that named the file, for messages.
        pipes: also read a pipe, or standard input when `path` is `-`.
        pipe: `pipe_of` the path, if the caller asks it whether lines are there.

    Raises:
        UserError: the file cannot be read, is not UTF-8, has a line of more than 64 MiB, or ends its lines with `\r`
            alone.
    """
    named = "standard input" if pipes and str(path) == STANDARD_INPUT else str(path)
    try:
        with nullcontext(pipe) if pipe is not None else _opened(path, pipes) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), file.read(0)), 1):
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{named}, line {number}: longer than {LONGEST_LINE >> 20} MiB; expected {expected}"
                    )
                text = line if isinstance(line, str) else _decoded(line, number, named)
                if number == 1 and not text.endswith("\n") and "\r" in text.rstrip("\r"):
                    raise UserError(f"{named}: its lines end with carriage returns alone; convert them to line feeds")
                yield text.removesuffix("\n").removesuffix("\r")
    except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        if option:
            raise UserError(f"{option} {named}: cannot be read ({reason})") from None
        raise UserError(f"cannot read {named}: {reason}; expected {expected}") from None


@contextmanager
def _opened(path: str | Path, pipes: bool) -> Iterator[IO[Any]]:
    if pipes and str(path) == STANDARD_INPUT:
        if sys.stdin is None:
            raise OSError(0, "it is closed")
        yield getattr(sys.stdin, "buffer", sys.stdin)
        return
    mode = os.stat(path).st_mode  # before it is opened: opening a pipe waits for its writer
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (pipes and stat.S_ISFIFO(mode))):
        raise OSError(0, "not a regular file")
    with open(path, "rb") as file:
        yield file


def _decoded(line: bytes, number: int, named: str) -> str:
    if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{named}: UTF-16 text; convert the file to UTF-8")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{named}, line {number}: not UTF-8 text; convert the file to UTF-8") from None


def split_quoted(line: str, delimiter: str = "\t", more: Iterator[str] | None = None) -> tuple[list[str], str]:
    """The fields of a line of CSV, with one level of quoting undone.

    A field that begins with a quote ends with the next one that is not doubled; quotes elsewhere are text.

    Args:
        more: the lines that follow, for quoted fields that span several; by default a quoted field ends on its line.

    Returns:
        The fields, and the problem that ended them early, or "".
    """
    if '"' not in line:
        return line.split(delimiter), ""
    fields: list[str] = []
    position = 0
    while True:
        if not line.startswith('"', position):
            end = line.find(delimiter, position)
            end = len(line) if end < 0 else end
            fields.append(line[position:end])
        else:
            parts: list[str] = []
            size = 0
            position += 1
            while (end := line.find('"', position)) < 0 or line.startswith('""', end):
                parts.append(line[position:] if end < 0 else line[position : end + 1])
                position = end + 2
                size += len(parts[-1])
                if end < 0:
                    following = next(more, None) if more is not None and size < LONGEST_RECORD else None
                    if following is None:
                        return fields, "cannot split its fields (a quote is not closed); is a quote unbalanced?"
                    parts.append("\n")
                    line, position = following, 0
            fields.append("".join([*parts, line[position:end]]))
            end += 1
            if end < len(line) and not line.startswith(delimiter, end):
                return fields[:-1], "cannot split its fields (text after a closing quote); is a quote unbalanced?"
        if end >= len(line):
            return fields, ""
        position = end + len(delimiter)


def shorten(text: str, limit: int = 40) -> str:
    """A text cut to `limit` characters, for messages."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
