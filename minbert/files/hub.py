"""Checkpoints in a local directory or on the Hugging Face hub: where their files are, and how they are uploaded."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from minbert.errors import UserError, first_line

DATASETS = (2, 20)  # earlier versions run code that a data set brings along
WEIGHTS = ("*.json", "vocab.txt", "*.safetensors")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "config.json",
)


def import_datasets(missing: str) -> Any:
    """The package `datasets`.

    Args:
        missing: the line that says that it is not installed.

    Raises:
        UserError: it is not, or is too old.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(missing) from None
    version = datasets.__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < DATASETS:
        raise UserError(f"datasets {version} runs code that a data set brings along; pip install 'datasets>=2.20'")
    return datasets


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


def names_repository(text: str) -> bool:
    """Whether a text is OWNER/NAME, and no file or directory here."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text)) and not os.path.lexists(text)


def is_downloaded(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Whether the hub's cache on this machine has files of a repository."""
    folder = repo_folder_name(repo_id=name, repo_type=kind)
    return os.path.isdir(os.path.join(huggingface_hub.constants.HF_HUB_CACHE, folder))


# Upload -----------------------------------------------------------------------------------------------------------


def check_upload(name: str, *, needs_token: bool) -> None:
    """Refuse what the hub would refuse, before there is anything to upload.

    Raises:
        UserError: the name is not OWNER/NAME, or there is no token.
    """
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"NAME {name}: {first_line(error)}") from None
    if name.count("/") != 1:
        raise UserError(f"NAME {name}: expected OWNER/NAME; OWNER is your name on the hub, or your organisation's")
    if needs_token and huggingface_hub.get_token() is None:
        raise UserError("there is no token of the hub here: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, name: str, *, private: bool, message: str, owned: Collection[str]) -> str:
    """Upload a folder in one commit to a repository of models, which is created if it is not there.

    Args:
        private: create the repository as a private one.
        owned: files that are removed from the repository where the folder has none of their name.

    Returns:
        the commit's address.

    Raises:
        UserError: the repository is there and public, and `private` is asked for; the hub refuses or is out of reach.
    """
    api = huggingface_hub.HfApi()
    try:
        if private and api.repo_exists(name) and not api.model_info(name).private:
            raise UserError(
                f"{name} is on the hub already, and public; leave --private out, give another NAME, or make it private"
                " in its settings"
            )
        api.create_repo(name, private=private or None, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=[*owned])
    except UserError:
        raise
    except HfHubHTTPError as error:
        raise UserError(f"the hub does not take {name} ({first_line(error)})") from None
    except Exception as error:  # a lost connection raises the error of the library's HTTP client, which varies
        raise UserError(f"{name} is not uploaded: the hub is out of reach ({first_line(error)})") from None
    return str(commit.commit_url)
