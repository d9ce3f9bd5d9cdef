"""A disk that fails: at the n-th call, or by losing what was not synced when the power went.

Every call through which minbert changes files goes through the functions of `os` that are wrapped here, those of
`pathlib` and `shutil` among them.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from minbert.errors import UserError

CHANGING = ("open", "write", "ftruncate", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")


@contextmanager
def wrapped(names: Sequence[str], wrap: Callable[[str, Any], Any]) -> Iterator[None]:
    """Replace functions of `os` by what `wrap(name, function)` makes of them."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(os, name, wrap(name, getattr(os, name))))
        yield


class Gone(BaseException):
    """The process has ended: nothing that follows reaches the disk."""


class FailingDisk:
    """Fails at one call.

    Args:
        at: the number of the call, from 0.
        error: an errno, or None for a sudden end of the process. A write that fails writes half of its bytes before.

    Attributes:
        calls: how many were made.
    """

    def __init__(self, at: int, error: int | None) -> None:
        self.at, self.error, self.calls = at, error, 0

    def fails(self, work: Callable[[], object]) -> bool:
        """Whether `work` fails on this disk: with a UserError, or with `Gone` where the process ends."""
        expected = (Gone,) if self.error is None else (UserError,)
        try:
            with self.watching():
                work()
        except expected:
            return True
        return False

    @contextmanager
    def watching(self) -> Iterator[FailingDisk]:
        with wrapped(CHANGING, self._wrapped):
            yield self

    def _wrapped(self, name, real):
        def call(*arguments, **options):
            number, self.calls = self.calls, self.calls + 1
            ended = self.error is None and number > self.at
            if number == self.at or ended:
                if name == "write" and not ended:
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                raise Gone if self.error is None else OSError(self.error, os.strerror(self.error))
            return None if name == "fsync" else real(*arguments, **options)  # nothing here needs the wait

        return call


# Power loss ---------------------------------------------------------------------------------------------------------


class File:
    """What a file holds, and what of it is on the disk for certain."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = self.synced = content


class Directory:
    """Which names a directory holds, and which of them are on the disk for certain."""

    def __init__(self, names: dict[str, File | Directory] | None = None) -> None:
        self.names = dict(names or {})
        self.synced = dict(self.names)


class RecordingDisk:
    """Records what becomes of the files under a directory, call by call.

    Attributes:
        moments: after every call, what may be found after a loss of power: see `_images`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = self._read(root)
        self.open: dict[int, File | Directory] = {}
        self.moments: list[list[dict[str, bytes]]] = []

    def _read(self, path: Path) -> File | Directory:
        if path.is_file():
            return File(path.read_bytes())
        return Directory({entry.name: self._read(entry) for entry in path.iterdir()})

    @contextmanager
    def watching(self) -> Iterator[RecordingDisk]:
        with wrapped((*CHANGING, "close"), self._wrapped):
            yield self

    def _wrapped(self, name, real):
        def call(*arguments, **options):
            found = None if name == "fsync" else real(*arguments, **options)
            getattr(self, f"_{name}")(found, *arguments, **options)
            if name not in ("open", "close", "write"):
                self.moments.append(self._images())
            return found

        return call

    def _at(self, path, dir_fd: int | None = None) -> tuple[Directory, str]:
        if dir_fd is None:
            parts = Path(path).relative_to(self.root).parts
            at = self.tree
        else:
            parts, at = (path,), self.open[dir_fd]
        for part in parts[:-1]:
            at = at.names[part]
        return at, parts[-1] if parts else ""

    def _open(self, found, path, flags, *rest, dir_fd=None) -> None:
        parent, name = self._at(path, dir_fd)
        if name and flags & os.O_CREAT and name not in parent.names:
            parent.names[name] = File()
        node = parent.names[name] if name else parent
        if flags & os.O_TRUNC:
            node.content = b""
        self.open[found] = node

    def _close(self, found, descriptor) -> None:
        self.open.pop(descriptor, None)

    def _write(self, found, descriptor, data) -> None:
        self.open[descriptor].content += bytes(data)[:found]

    def _ftruncate(self, found, descriptor, length) -> None:
        self.open[descriptor].content = self.open[descriptor].content[:length]

    def _fsync(self, found, descriptor) -> None:
        node = self.open[descriptor]
        node.synced = node.content if isinstance(node, File) else dict(node.names)

    def _rename(self, found, source, target, **options) -> None:
        old, old_name = self._at(source)
        new, new_name = self._at(target)
        new.names[new_name] = old.names.pop(old_name)

    _replace = _rename

    def _unlink(self, found, path, *, dir_fd=None) -> None:
        parent, name = self._at(path, dir_fd)
        del parent.names[name]

    _rmdir = _unlink

    def _mkdir(self, found, path, mode=0o777, *, dir_fd=None) -> None:
        parent, name = self._at(path, dir_fd)
        parent.names[name] = Directory()

    def _images(self) -> list[dict[str, bytes]]:
        """What the disk may hold if the power goes now, as contents by path.

        Of each file, what was synced: the rest is cut off. Of each directory either the names that it has, or those
        that it had when it was last synced; every combination of these.
        """
        directories = [(), *self._changed(self.tree, ())]
        images = []
        for choice in itertools.product((True, False), repeat=len(directories)):
            kept = {id(node) for node, keep in zip(map(self._node, directories), choice, strict=True) if keep}
            images.append(dict(self._contents(self.tree, "", kept)))
        return images

    def _node(self, path: tuple[str, ...]) -> Directory:
        node = self.tree
        for part in path:
            node = node.names[part]
        return node

    def _changed(self, node: Directory, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, child in node.names.items():
            if isinstance(child, Directory):
                if child.names != child.synced:
                    yield (*path, name)
                yield from self._changed(child, (*path, name))

    def _contents(self, node: Directory, prefix: str, kept: set[int]) -> Iterator[tuple[str, bytes]]:
        for name, child in (node.names if id(node) in kept else node.synced).items():
            if isinstance(child, File):
                yield prefix + name, child.synced
            else:
                yield f"{prefix}{name}/", b""
                yield from self._contents(child, f"{prefix}{name}/", kept)


def build(image: dict[str, bytes], root: Path) -> Path:
    """Write what a disk holds to a new directory."""
    root.mkdir()
    for name, content in image.items():
        if name.endswith("/"):
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
    return root


NAMES = {errno.ENOSPC: "ENOSPC", errno.EIO: "EIO", errno.EROFS: "EROFS", None: "exit"}
