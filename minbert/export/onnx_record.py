"""minbert.json: what a program without minbert needs to feed an ONNX graph and to read its outputs."""

from __future__ import annotations

from typing import Any

from minbert import __version__
from minbert.export.trained import Trained
from minbert.model import pair_encoding
from minbert.tasks import Task
from minbert.tasks.metrics import THRESHOLD
from minbert.tasks.task import SCORE_TOP

FILE = "minbert.json"
FORMAT = 1
# The sequences of an example by pair encoding: the prefix of the names of its inputs, and which of its texts it has.
SEQUENCES = {
    "cross-encoder": {"": [0, 2]},
    "bi-encoder": {"first_": [0, 1], "second_": [1, 2]},
    "both": {"": [0, 2], "first_": [0, 1], "second_": [1, 2]},
}
INPUTS = {
    "input_ids": "ids",
    "token_type_ids": "type_ids",
    "attention_mask": "attention_mask",
}  # fields of `tokenizers`


def record(trained: Trained) -> dict[str, Any]:
    """The content of minbert.json (docs/export.md)."""
    (encoding,) = {pair_encoding(task) for task in trained.tasks}
    return {
        "format": FORMAT,
        "minbert": __version__,
        "max_length": trained.max_length,
        "pair_encoding": encoding,
        "sequences": [{"prefix": prefix, "texts": texts} for prefix, texts in SEQUENCES[encoding].items()],
        "tasks": {
            task.name: {
                "type": task.type,
                "text": list(task.text),
                "label": task.label,
                "head": task.head,
                "loss": task.loss,
                "pooling": trained.model.pooling_of(task.name),
                **reading(task),
            }
            for task in trained.tasks
        },
    }


def reading(task: Task) -> dict[str, Any]:
    """How labels follow from a task's outputs, as `predictions`, `probabilities` and `decode_labels` have it.

    `activation` of an output comes first. Of `classes`, the one with the largest value is predicted; with `threshold`
    the second of two where the one value is above it, and with `thresholds` each whose value is above its own. A score
    is `factor` times the value plus `offset`.
    """
    if task.is_regression:
        low, high = task.scale
        outputs_top = SCORE_TOP if task.loss in ("mean_squared_error", "multiple_negatives_ranking") else 1
        activation = "sigmoid" if task.loss == "binary_cross_entropy" else None
        return {
            "scale": [low, high],
            "activation": activation,
            "factor": (high - low) / outputs_top,
            "offset": low,
        }
    classes = {"classes": list(task.classes or ())}
    if task.is_multilabel:
        return classes | {
            "activation": "sigmoid",
            "thresholds": list(task.thresholds or [THRESHOLD] * task.num_classes),
        }
    if task.loss == "cross_entropy":
        return classes | {"activation": "softmax"}
    if task.loss == "binary_cross_entropy":
        return classes | {"activation": "sigmoid", "threshold": 0.5}
    return classes | {"activation": None, "threshold": 0.5 if task.loss == "cosine_embedding" else 0.0}
