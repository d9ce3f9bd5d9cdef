"""A lock on a directory: one process at a time writes to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from minbert.errors import UserError
from minbert.files.atomic import sync

LOCK = ".lock"
PATIENCE = 0.1  # seconds: a lock file that its last holder removed is made again, one that is held stays held


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process, and make it if need be; an empty one is removed on leaving.

    The lock is the operating system's, so it ends with the process.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    lock = FileLock(directory / LOCK, PATIENCE, fallback_to_soft=False)  # a soft lock would outlive the process
    try:
        while not lock.is_locked:
            _make(directory)
            with suppress(FileNotFoundError):  # the last holder has just removed the directory
                lock.acquire()
    except Timeout:
        raise UserError(f"{directory} is in use by another training process; choose another --out") from None
    except OSError as error:
        raise UserError(f"--out {directory}: cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        with suppress(OSError):
            if [entry.name for entry in directory.iterdir()] == [LOCK]:
                (directory / LOCK).unlink()
                directory.rmdir()
        lock.release()


def _make(directory: Path) -> None:
    """Make a directory and its parents, and sync each parent."""
    if not directory.is_dir():
        _make(directory.parent)
        directory.mkdir(exist_ok=True)
        sync(directory.parent)
