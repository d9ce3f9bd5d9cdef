"""Where minbert keeps what it can make again: `$MINBERT_CACHE`, or else ~/.cache/minbert."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The cache directory, which need not exist yet."""
    return Path(os.environ.get("MINBERT_CACHE") or os.path.expanduser("~/.cache/minbert"))
