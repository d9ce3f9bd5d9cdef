"""Files that are whole or not there: written to a temporary name, synced, then renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minbert.errors import UserError

MANIFEST = "manifest.json"
LOCK = ".lock"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def no_room_is_a_user_error(path: Path, remedy: str) -> Iterator[None]:
    """Turn a full disk while writing `path` into one clear line that ends with `remedy`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports the system's error as text
        if getattr(error, "errno", None) in _NO_ROOM or any(os.strerror(code) in str(error) for code in _NO_ROOM):
            raise UserError(f"no room left on the disk to write {path}; {remedy}") from None
        raise


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: after a crash the file is the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Replace directory `path` by one that `fill` fills, with a manifest of its files' checksums.

    After a crash at any moment, `recover(path)` finds the old directory or the new one, whole.
    """
    new, old = _new(path), _old(path)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        fill(new)
        write_json(new / MANIFEST, {file.name: sha256(file) for file in sorted(new.iterdir())})
        for file in new.iterdir():
            _sync(file)
        _sync(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Undo a `write_directory` that a crash cut short."""
    if not path.exists() and _old(path).exists():
        _old(path).rename(path)
    for leftover in (_new(path), _old(path)):
        shutil.rmtree(leftover, ignore_errors=True)


def readable(path: Path) -> Path:
    """Where a reader finds the directory that `write_directory` may be replacing at this moment."""
    return path if path.exists() or not _old(path).exists() else _old(path)


def verify(directory: Path) -> None:
    """Check every file of `directory` against its manifest.

    Raises:
        UserError: a file is missing, or is not what was written; it is named.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} is not a checkpoint: it has no {MANIFEST}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{directory / MANIFEST} is damaged ({error}); restore it from a copy") from None
    for name, checksum in manifest.items():
        file = directory / name
        if not file.is_file():
            raise UserError(f"{file} is missing; restore it from a copy, or use another checkpoint")
        if sha256(file) != checksum:
            raise UserError(f"{file} was truncated or altered; restore it from a copy, or use another checkpoint")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory`, made if need be, for this process; on leaving, it goes again if nothing was put there.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    lock = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise UserError(f"--out {directory}: cannot be written ({error.strerror})") from None
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{directory} is in use by another training process; choose another --out") from None
        try:
            yield
        finally:
            if [entry.name for entry in directory.iterdir()] == [LOCK]:
                lock.unlink()
                directory.rmdir()


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
