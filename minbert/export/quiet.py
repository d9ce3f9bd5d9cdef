"""Without the remarks of other libraries."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, what libraries log on the root logger, and what transformers shows while it loads a model."""
    root, transformers = logging.getLogger(), sys.modules.get("transformers")
    root_disabled, root.disabled = root.disabled, True
    logs: Any = None if transformers is None else transformers.utils.logging
    verbosity, bars = (logs.get_verbosity(), logs.is_progress_bar_enabled()) if logs else (None, False)
    try:
        if logs:
            logs.set_verbosity_error()
            logs.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.disabled = root_disabled
        if logs:
            logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()
