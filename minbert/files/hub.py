"""Checkpoints in a local directory or on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from minbert.errors import UserError, first_line

WEIGHTS = ("*.json", "vocab.txt", "*.safetensors")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "config.json",
)


def checkpoint_directory(path_or_name: str | Path, patterns: tuple[str, ...]) -> Path:
    """The local directory of a checkpoint's files, downloaded from the hub if necessary.

    Args:
        path_or_name: a directory, or a hub name such as `bert-base-uncased`. A path that exists, is a `Path`, starts
            with `.`, `/` or `~`, or has two slashes is a directory, never a hub name.
        patterns: the files to download, `WEIGHTS` or `TOKENIZER`.

    Raises:
        UserError: no such directory, no such name on the hub, or the hub out of reach.
    """
    name = str(path_or_name)
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return path
    if name and os.path.lexists(path):
        raise UserError(f"{name} is a file; give the directory that holds config.json, vocab.txt and model.safetensors")
    if isinstance(path_or_name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise UserError(f"no directory {name!r}; give a directory of a BERT checkpoint or the name of one on the hub")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{name!r} is neither a directory nor a model you can read on the hub; check the spelling"
            " (and, for a private model, run `hf auth login`)"
        ) from None
    except Exception as error:  # a lost connection raises the error of the library's HTTP client, which varies
        raise UserError(
            f"{name!r} is not a directory, and the hub is out of reach ({first_line(error)[:100]});"
            " go online (and unset HF_HUB_OFFLINE), or give the directory of a downloaded checkpoint"
        ) from None
