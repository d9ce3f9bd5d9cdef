"""The directory for files that minbert can make again, and its limit."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import platformdirs

from minbert.errors import UserError

LIMIT = "2GiB"
TEMPORARY = ".tmp"  # how the names of files end that are being written
ABANDONED = 24 * 3600.0  # seconds after which a file that is being written is taken for a crashed process's
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")  # nobody else's file has such a name
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class CacheUsage(NamedTuple):
    """What the cache takes."""

    files: int
    size: int  # in bytes


def cache_directory() -> Path:
    """`$MINBERT_CACHE`, or else the user's cache directory: ~/.cache/minbert on Linux. It need not exist yet."""
    return Path(os.environ.get("MINBERT_CACHE") or platformdirs.user_cache_path("minbert", appauthor=False))


def cache_limit() -> int | None:
    """The most bytes that the cache may take, from `$MINBERT_CACHE_LIMIT`: 0 caches nothing, None is no limit.

    Raises:
        UserError: the variable is no size.
    """
    text = os.environ.get("MINBERT_CACHE_LIMIT") or LIMIT
    if text.lower() == "none":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]I?)?B?", text.strip().upper())
    if found is None:
        raise UserError(
            f"MINBERT_CACHE_LIMIT must be a size such as {LIMIT} or 500MB, 0 (nothing is cached) or none (no limit), "
            f"got {text!r}"
        )
    return int(float(found[1]) * _UNITS[found[2] or ""])


def cache_usage(directory: Path) -> CacheUsage:
    """The number and the size of the cache's entries."""
    sizes = [size for _, size, _ in _entries(directory)]
    return CacheUsage(len(sizes), sum(sizes))


def touch(path: Path) -> None:
    """Mark an entry as used now."""
    with suppress(OSError):
        os.utime(path)


def keep_within_limit(written: Path, limit: int) -> None:
    """Remove the entries of the directory of `written` that were used least recently, until the rest fit the limit.

    The entry `written` stays. Several processes may do so at once: an entry that another one has removed meanwhile
    counts as removed, a process that has an entry open reads it to its end, and one that misses an entry makes it anew.

    Args:
        limit: bytes of all entries.
    """
    entries = sorted(_entries(written.parent))
    excess = sum(size for _, size, _ in entries) - limit
    for _, size, path in entries:
        if excess > 0 and path.name != written.name:
            with suppress(OSError):  # on Windows, it is open somewhere
                path.unlink(missing_ok=True)
                excess -= size


def _entries(directory: Path) -> list[tuple[float, int, Path]]:
    """When each entry was used last, its size and its path; among them what crashed processes left."""
    found = []
    with suppress(OSError), os.scandir(directory) as files:
        for file in files:
            with suppress(OSError):  # removed meanwhile
                status = file.stat()
                left = file.name.endswith(TEMPORARY) and time.time() - status.st_mtime > ABANDONED
                if left or _ENTRY.fullmatch(file.name):
                    found.append((status.st_mtime, status.st_size, Path(file.path)))
    return found
