"""Pictures that the scripts write."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from minbert.files.atomic import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # the scripts' tables do without


def picture(text: str) -> Path:
    """A type of argparse's: the path of a picture."""
    path = Path(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"must end in .png or .svg, got {text!r}")
    return path


def save(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Write a picture that is the same each time: without date and version.

    Raises:
        UserError: the file cannot be written.
    """
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with writing(path, "choose another file"):
        figure.savefig(path, dpi=dpi, facecolor="white", metadata=metadata)
