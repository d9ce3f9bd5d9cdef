"""A directory of sentence-transformers: the encoder, its pooling, and linear layers after it where the run has some.

A sentence's vector is what the task's head reads. Of the heads that compare projected sentences by their cosine it is
the projection, so that `similarity` of two vectors is the head's cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minbert import __version__
from minbert.data import Examples, encode
from minbert.data.packing import Packed
from minbert.errors import UserError
from minbert.export.classifier import save_tokenizer
from minbert.export.quiet import quiet
from minbert.export.trained import CPU, Agreement, Trained, agreement
from minbert.files.atomic import write_json
from minbert.inference import in_batches
from minbert.model.heads import ProjectedCosineHead, pair_encoding
from minbert.model.layers import SharedTransform
from minbert.model.weights import save_weights
from minbert.tasks import Task

PACKAGES = ("sentence_transformers",)
POOLING = "1_Pooling"
MODULES = {  # the names of classes that all versions of the library know
    "Transformer": "sentence_transformers.models.Transformer",
    "Pooling": "sentence_transformers.models.Pooling",
    "Dense": "sentence_transformers.models.Dense",
}


class Dense(NamedTuple):
    """activation(W x + b)."""

    weight: Tensor
    bias: Tensor
    activation: str  # a class of torch.nn


def check(trained: Trained) -> None:
    """Refuse tasks whose heads read different vectors.

    Raises:
        UserError: they do.
    """
    vectors = {(trained.model.pooling_of(task.name), _projection(trained, task)) for task in trained.tasks}
    if len(vectors) > 1:
        names = ", ".join(task.name for task in trained.tasks)
        raise UserError(f"the heads of {names} read different vectors of a sentence; give --task NAME")


def notes(trained: Trained) -> list[str]:
    """What a user of the vectors should know, a line each."""
    whole = [task.name for task in trained.tasks if task.is_pair and pair_encoding(task) == "cross-encoder"]
    return [f"{name} reads a pair as one sequence: its training compared no vectors of sentences" for name in whole]


def write(trained: Trained, directory: Path) -> None:
    """Write the encoder, the tokenizer and the configuration of each module."""
    check(trained)
    model, task = trained.model, trained.tasks[0]
    how, size = model.pooling_of(task.name), model.encoder.config.hidden_size
    model.encoder.config.to_json(directory / "config.json")
    save_weights(model.encoder.huggingface_tensors(pooler=False), directory)
    save_tokenizer(trained, directory)
    settings = {
        "max_seq_length": trained.max_length,
        "do_lower_case": False,
        "model_args": {"add_pooling_layer": False},
    }
    write_json(directory / "sentence_bert_config.json", settings)
    write_json(
        directory / "config_sentence_transformers.json",
        {"__version__": {"minbert": __version__}, "similarity_fn_name": "cosine"},
    )
    modes = {"cls": "cls_token", "pooler": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    pooling: dict[str, Any] = {"word_embedding_dimension": size}
    pooling |= {f"pooling_mode_{mode}": mode == modes[how] for mode in dict.fromkeys(modes.values())}
    (directory / POOLING).mkdir()
    write_json(directory / POOLING / "config.json", pooling)
    paths = {"": "Transformer", POOLING: "Pooling"}
    for number, layer in enumerate(layers(trained, task), len(paths)):
        path = f"{number}_Dense"
        paths[path] = "Dense"
        (directory / path).mkdir()
        outputs, inputs = layer.weight.shape
        activation = getattr(torch.nn, layer.activation)
        config = {
            "in_features": inputs,
            "out_features": outputs,
            "bias": True,
            "activation_function": f"{activation.__module__}.{activation.__qualname__}",
        }
        write_json(directory / path / "config.json", config)
        save_weights({"linear.weight": layer.weight, "linear.bias": layer.bias}, directory / path)
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": MODULES[kind]}
        for number, (path, kind) in enumerate(paths.items())
    ]
    write_json(directory / "modules.json", modules)


def layers(trained: Trained, task: Task) -> list[Dense]:
    """What comes after pooling: the pooler, the shared layer with its normalisation in its weights, the projection."""
    model, found = trained.model, []
    shared: Any = model.shared
    pooler: Any = model.encoder.pooler
    if model.pooling_of(task.name) == "pooler":
        found.append(Dense(pooler.weight, pooler.bias, "Tanh"))
    if isinstance(shared, SharedTransform):
        norm = shared.norm
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        bias = norm.bias - factor * norm.running_mean
        found.append(Dense(factor[:, None] * shared.linear.weight, bias, "GELU"))
    elif shared is not None:
        found.append(Dense(shared.linear.weight, shared.linear.bias, "ReLU"))
    if (projection := _projection(trained, task)) is not None:
        found.append(Dense(projection.weight, projection.bias, "Identity"))
    return found


def _projection(trained: Trained, task: Task) -> Any:
    """The layer between a sentence's vector and the cosine, or None."""
    head: Any = trained.model.heads[task.name]
    return head.projection if isinstance(head, ProjectedCosineHead) else None


def compare(trained: Trained, directory: Path, task: Task, examples: Examples) -> Agreement:
    """The vectors of the library for the sentences of examples against minbert's."""
    from sentence_transformers import SentenceTransformer

    texts = [*examples.texts, *(examples.pairs or ())]
    with quiet():
        found = SentenceTransformer(str(directory), device="cpu").encode(texts, show_progress_bar=False)
    return agreement(found, vectors(trained, task, texts))


def vectors(trained: Trained, task: Task, texts: Sequence[str]) -> np.ndarray:
    """minbert's vectors of single sentences, float32 [n, D]: what the task's head reads, or compares by a cosine."""
    encoder, shared, projection = trained.model.encoder, trained.model.shared, _projection(trained, task)
    how = trained.model.pooling_of(task.name)

    def of_batch(packed: Packed, count: int) -> Tensor:
        rows = encoder.pool(encoder(packed), packed, how)
        if shared is not None:
            rows = shared(rows, seed=None, stream_id=0)
        return rows if projection is None else projection(rows)  # type: ignore[no-any-return]

    sentences = Examples([""] * len(texts), texts, None, None)
    encoded = encode(sentences, trained.tokenizer, trained.max_length, cached=False)
    return in_batches(trained.model, encoded, CPU, of_batch)
