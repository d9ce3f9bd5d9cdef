"""The directory for files that minbert can make again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_directory() -> Path:
    """`$MINBERT_CACHE`, or else the user's cache directory: ~/.cache/minbert on Linux. It need not exist yet."""
    return Path(os.environ.get("MINBERT_CACHE") or platformdirs.user_cache_path("minbert", appauthor=False))
