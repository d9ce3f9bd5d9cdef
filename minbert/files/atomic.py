"""Atomic writes of files and directories: to a temporary name, synced, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from minbert.errors import UserError
from minbert.files import MANIFEST
from minbert.files.json_yaml import read_json, short

BLOCK = 1 << 24  # bytes written at once
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Windows opens no directories, other systems only readable ones; some network file systems sync no directories.
_NO_SYNC = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP)
_DTYPES = {  # safetensors' names, in its order of writing
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Turn an `OSError` about writing `path` into a `UserError` that ends with `remedy`.

    Raises:
        UserError: a disk that is full, broken or read-only, or a directory that is missing.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(f"no room left on the disk to write {path}; {remedy}") from None
        raise UserError(f"{path} cannot be written ({error.strerror or error}); {remedy}") from None


# One file ---------------------------------------------------------------------------------------------------------


def write(path: Path, parts: Iterable[Any]) -> None:
    """Write bytes-like parts to a new file in order, and sync it. A failure may leave a truncated file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
    try:
        for part in parts:
            left = memoryview(part).cast("B")
            while left:
                left = left[os.write(descriptor, left[:BLOCK]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """`write` as UTF-8."""
    write(path, [text.encode()])


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the content of `path`, a text as UTF-8: after a crash the file is the old one or the new one."""
    with _replacing(path) as temporary:
        write(temporary, [content.encode() if isinstance(content, str) else content])


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file to write, which replaces `path` at the end of the block: after an error `path` is the old one."""
    with _replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """The name of a temporary file, which is to be written and gets the name of `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, equal to that of `safetensors.torch.save`, and sync it.

    Copies one tensor at a time; `safetensors.torch.save_file` copies all of them and does not sync.
    """
    order = sorted(tensors, key=lambda name: (list(_DTYPES).index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)

    def parts() -> Iterator[Any]:
        yield len(encoded).to_bytes(8, "little") + encoded
        for name in order:
            yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

    write(path, parts())


def append_line(path: Path, line: str) -> None:
    """Append a line; a failure leaves the file unchanged."""
    data = f"{line}\n".encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    try:
        before = os.fstat(descriptor).st_size
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except BaseException:
            with suppress(OSError):
                os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


# A directory ------------------------------------------------------------------------------------------------------


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Replace directory `path` by a new one that `fill` writes, and add a manifest of its files' checksums.

    After a crash at any time, `recover(path)` restores the complete old directory or the new one.
    """
    recover(path)
    new, old = _new(path), _old(path)
    try:
        new.mkdir(parents=True)
        fill(new)
        write_json(new / MANIFEST, {file.name: sha256(file) for file in sorted(new.iterdir())})
        for file in new.iterdir():
            sync(file)
        sync(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            recover(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove directory `path`, if it is there: after a crash at any time it is whole, or `recover(path)` removes it."""
    recover(path)
    if path.exists():
        path.rename(_new(path))
        sync(path.parent)
        shutil.rmtree(_new(path))


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which gets the name `path` at the end of the block; after an error nothing is left.

    Raises:
        UserError: something other than an empty directory has that name.
    """
    check_vacant(path)
    new = _new(path)
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    try:
        new.mkdir(parents=True)
        yield new
        for entry in (*new.rglob("*"), new):
            sync(entry)
        check_vacant(path)
        if path.exists():
            path.rmdir()
        new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync(path.parent)


def check_vacant(path: Path) -> None:
    """Refuse a path that something other than an empty directory has.

    Raises:
        UserError: it is taken.
    """
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already and is not an empty directory; give another one")


def recover(path: Path) -> None:
    """Undo a `write_directory` that a crash interrupted."""
    new, old = _new(path), _old(path)
    if not (new.exists() or old.exists()):
        return
    if not path.exists() and old.exists():
        old.rename(path)
    sync(path.parent)  # before the removal of what may be the only complete directory on the disk
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def readable(path: Path) -> Path:
    """The path of a complete directory while `write_directory` may be replacing it."""
    return path if path.exists() or not _old(path).exists() else _old(path)


def verify(directory: Path, names: Collection[str] | None = None) -> None:
    """Check the files of `directory` against its manifest.

    Args:
        names: those that are to be read; all when left out.

    Raises:
        UserError: a file is missing or was altered; it is named.
    """
    path, remedy = directory / MANIFEST, "restore it from a copy, or use another checkpoint"
    if not path.exists():
        raise UserError(f"{directory} is not a checkpoint: it has no {MANIFEST}")
    for name, checksum in read_json(path, remedy=remedy).items():
        if name in ("", "..") or Path(name).name != name or not isinstance(checksum, str):
            raise UserError(
                f"{path}: expected names of files in {directory} and checksums, got {short(name)}; {remedy}"
            )
        if names is not None and name not in names:
            continue
        file = directory / name
        if not file.is_file():
            raise UserError(f"{file} is missing; {remedy}")
        try:
            found = sha256(file)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); {remedy}") from None
        if found != checksum:
            raise UserError(f"{file} was truncated or altered; {remedy}")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk, where the system supports it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (error.errno in _NO_SYNC and path.is_dir()):
            raise
