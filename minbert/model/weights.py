"""An encoder's weights in safetensors files, under Hugging Face's names for BERT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minbert.errors import UserError
from minbert.files.atomic import write_tensors
from minbert.files.json_yaml import read_json, short
from minbert.files.schema_checks import checked
from minbert.model.config import EncoderConfig

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}  # LayerNorm's parameters in checkpoints converted from TensorFlow
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
POOLER = "pooler.dense.weight"


def load_weights(wanted: Mapping[str, Tensor], directory: Path) -> None:
    """Fill tensors from the checkpoint in `directory`; half precision is widened to theirs.

    Args:
        wanted: by Hugging Face's names, what to fill.

    Raises:
        UserError: a missing, misshapen or unexpected tensor, a damaged file, or a checkpoint in another format.
    """
    files = _find_tensors(directory)
    if missing := sorted(wanted.keys() - files.keys()):
        raise UserError(
            f"{directory}: no tensor {missing[0]!r} ({len(missing)} of {len(wanted)} are missing);"
            " expected a BERT checkpoint that agrees with its config.json"
        )
    unknown = sorted(
        name
        for name in files.keys() - wanted.keys()
        if name.startswith(("embeddings.", "encoder.")) and name not in BUFFERS
    )
    if unknown:
        raise UserError(
            f"{directory}: tensor {unknown[0]!r} has no place in the encoder of config.json ({len(unknown)} such);"
            " expected a BERT checkpoint that agrees with its config.json"
        )
    for path in sorted({files[name][0] for name in wanted}):
        with open_safetensors(path) as tensors, torch.no_grad():
            for name, tensor in wanted.items():
                source, stored_name = files[name]
                if source == path:
                    tensor.copy_(fitting(tensors.get_tensor(stored_name), tensor.shape, f"{path}: {stored_name}"))


def check_shapes(config: EncoderConfig, directory: Path) -> None:
    """Compare an encoder's sizes with the tensors in `directory`, before memory is allocated for it.

    Raises:
        UserError: they differ; or as `load_weights` does.
    """
    files = _find_tensors(directory)
    layers = {name.split(".")[2] for name in files if name.startswith("encoder.layer.")}
    if layers and len(layers) < config.num_hidden_layers:  # `load_weights` names those that are too many
        raise UserError(
            f"{directory}: config.json says {config.num_hidden_layers} layers, and the weights have {len(layers)};"
            " expected a BERT checkpoint that agrees with its config.json"
        )
    word, position, token_type = (f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type"))
    sizes = {
        word: (config.vocab_size, config.hidden_size),
        position: (config.max_position_embeddings, config.hidden_size),
        token_type: (config.type_vocab_size, config.hidden_size),
        "encoder.layer.0.intermediate.dense.weight": (config.intermediate_size, config.hidden_size),
    }
    for name in sizes.keys() & files.keys():  # `load_weights` names those that are missing
        path, stored_name = files[name]
        with open_safetensors(path) as tensors:
            shape = tuple(tensors.get_slice(stored_name).get_shape())
        if shape != sizes[name]:
            raise UserError(
                f"{path}: {stored_name} has shape {list(shape)}, expected {list(sizes[name])};"
                " give weights that agree with the model's configuration"
            )
    if sizes.keys() - files.keys():
        wanted = (*sizes, "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias")
        missing = sorted(name for name in wanted if name not in files)
        raise UserError(f"{directory}: no tensor {missing[0]!r}; expected a BERT checkpoint")


def save_weights(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Write tensors, by Hugging Face's names, to model.safetensors."""
    write_tensors(directory / WEIGHTS_FILE, tensors, metadata={"format": "pt"})


def has_pooler(directory: Path) -> bool:
    """Whether the checkpoint in `directory` holds BERT's pooler; raises UserError as `load_weights` does."""
    return POOLER in _find_tensors(directory)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading on the CPU.

    Raises:
        UserError: it is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise UserError(f"no file {path}; copy or download the checkpoint again") from None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {path} ({error}); it is damaged or cut short: copy or download it again"
        ) from None


def fitting(tensor: Tensor, shape: torch.Size, where: str) -> Tensor:
    """The tensor, if it holds finite floating-point numbers in the expected shape.

    Raises:
        UserError: it does not; the message starts with `where`.
    """
    if tensor.shape != shape:
        raise UserError(
            f"{where} has shape {list(tensor.shape)}, expected {list(shape)};"
            " give weights that agree with the model's configuration"
        )
    if not tensor.is_floating_point():
        raise UserError(f"{where} is {tensor.dtype}, expected floating point; give weights that are not quantised")
    if not tensor.isfinite().all():
        raise UserError(f"{where} holds NaN or an infinity; copy or download it again, or use another checkpoint")
    return tensor


def _find_tensors(directory: Path) -> dict[str, tuple[Path, str]]:
    """The checkpoint's tensors by today's name: the file that holds each, and its name there."""
    if (directory / WEIGHTS_FILE).exists():
        with open_safetensors(directory / WEIGHTS_FILE) as tensors:
            stored = {name: directory / WEIGHTS_FILE for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
    elif (directory / INDEX_FILE).exists():
        stored = _read_index(directory / INDEX_FILE)
    elif any((directory / name).exists() for name in PICKLE_FILES):
        raise UserError(
            f"{directory} holds its weights as a pickle, which minbert does not read; convert them once:"
            f" python -c \"from transformers import BertModel as B; d = '{directory}';"
            ' B.from_pretrained(d).save_pretrained(d)"'
        )
    else:
        raise UserError(f"{directory} holds no {WEIGHTS_FILE}; give the directory of a BERT checkpoint")
    return {_modern_name(name): (path, name) for name, path in stored.items()}


def _modern_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        if name.endswith(f"LayerNorm{old}"):
            name = name.removesuffix(old) + new
    return name.removeprefix("bert.")


def _read_index(path: Path) -> dict[str, Path]:
    """Where a sharded checkpoint keeps each tensor."""
    shards = checked(read_json(path).get("weight_map"), dict[str, str], f"{path}: weight_map")
    for shard in shards.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(
                f"{path}: expected names of safetensors files in {path.parent}, got {short(shard)};"
                " copy or download the checkpoint again"
            )
    return {name: path.parent / shard for name, shard in shards.items()}
