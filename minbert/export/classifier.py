"""A directory of transformers' BertForSequenceClassification, for `pipeline("text-classification", DIR)`.

That model's head is a linear layer on BERT's pooler, tanh(P x + b) of the first token's vector x. Most runs of minbert
have a linear layer on x itself (pooling `cls`), and no other architecture of transformers' has it on BERT's weights.
So the pooler is made to be the identity: P is 2^-12 times the identity, b is 0, and the linear layer's weights are
multiplied by 2^12. Powers of two change no digit of a float32, and tanh(y) is y (1 - y^2 / 3 + ...): for |x| = 1 the
result differs from x by 2e-8 of x, less than float32 resolves, and for |x| = 10 by 2e-6 of x. A smaller factor would
be closer still, but float16 could not hold it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minbert.data import Examples
from minbert.errors import UserError
from minbert.export.quiet import quiet
from minbert.export.trained import Agreement, Trained, agreement, only_task
from minbert.files.atomic import write_json
from minbert.model.heads import LinearHead
from minbert.model.weights import save_weights
from minbert.runs.predictions import label_text
from minbert.tasks import Task
from minbert.tasks.labels import decode_labels
from minbert.tasks.metrics import THRESHOLD, predictions, probabilities
from minbert.tasks.task import SCORE_TOP

PACKAGES = ("transformers",)
SMALL = 2.0**-12
OTHER = "--to onnx exports every head"


def check(trained: Trained) -> None:
    """Refuse a head that BertForSequenceClassification does not have.

    Raises:
        UserError: it does not; or there are several tasks.
    """
    task = only_task(trained, "classifier of transformers")
    model = trained.model
    refused = {
        f"head {task.head}": type(model.heads[task.name]) is not LinearHead,
        f"pooling {model.pooling_of(task.name)}": model.pooling_of(task.name) not in ("cls", "pooler"),
        "a shared layer": model.shared is not None,
        f"a score by {task.loss}": task.is_regression and task.loss != "mean_squared_error",
    }
    if found := [what for what, is_there in refused.items() if is_there]:
        raise UserError(f"task {task.name} has {found[0]}, and transformers' BERT for classification has none; {OTHER}")


def notes(trained: Trained) -> list[str]:
    """What a user of the pipeline should know, a line each."""
    if not trained.tasks[0].is_multilabel:
        return []
    return [
        "the pipeline gives each label's probability; config.json has the thresholds above which they are predicted"
    ]


def write(trained: Trained, directory: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files."""
    check(trained)
    (task,), encoder = trained.tasks, trained.model.encoder
    encoder.config.to_json(directory / "config.json")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    labels = [task.name] if task.is_regression else list(map(label_text, task.classes or ()))
    kinds = {"classification": "single_label_classification", "multilabel": "multi_label_classification"}
    config |= {
        "architectures": ["BertForSequenceClassification"],
        "problem_type": kinds.get(task.type, "regression"),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    if task.is_multilabel:
        config["thresholds"] = list(task.thresholds or [THRESHOLD] * task.num_classes)
    write_json(directory / "config.json", config)
    tensors = {f"bert.{name}": tensor for name, tensor in encoder.huggingface_tensors(pooler=False).items()}
    save_weights({**tensors, **head_tensors(trained, task)}, directory)
    save_tokenizer(trained, directory)


def head_tensors(trained: Trained, task: Task) -> dict[str, Tensor]:
    """The pooler and the classifier, by transformers' names."""
    head: Any = trained.model.heads[task.name]
    pooler: Any = trained.model.encoder.pooler
    weight, bias = head.weight.detach(), head.bias.detach()
    if task.is_regression:
        weight, bias = (each * _per_unit(task) for each in (weight, bias))
        bias = bias + task.scale[0]
    elif not task.is_multilabel and len(weight) == 1:  # softmax of 0 and z gives the second class sigmoid(z)
        weight, bias = (torch.cat([torch.zeros_like(each), each]) for each in (weight, bias))
    if trained.model.pooling_of(task.name) == "pooler":
        dense = {"weight": pooler.weight, "bias": pooler.bias}
    else:
        size = weight.shape[1]
        dense = {"weight": SMALL * torch.eye(size), "bias": torch.zeros(size)}
        weight = weight / SMALL
    dense = {f"bert.pooler.dense.{name}": tensor for name, tensor in dense.items()}
    return {**dense, "classifier.weight": weight, "classifier.bias": bias}


def save_tokenizer(trained: Trained, directory: Path) -> None:
    """Write the tokenizer's files, with the run's length as the one to cut at."""
    trained.tokenizer.save(directory)
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, {**config, "model_max_length": trained.max_length})


def compare(trained: Trained, directory: Path, task: Task, examples: Examples) -> Agreement:
    """The scores of transformers' pipeline for examples against minbert's: probabilities, or scores of the scale."""
    import transformers

    texts = examples.texts if examples.pairs is None else zip(examples.texts, examples.pairs, strict=True)
    inputs = [each if isinstance(each, str) else {"text": each[0], "text_pair": each[1]} for each in texts]
    with quiet():
        pipeline: Any = transformers.pipeline("text-classification", str(directory), device="cpu", top_k=None)
        scored = pipeline(inputs, truncation=True, batch_size=16)
    by_label = [{each["label"]: each["score"] for each in scores} for scores in scored]
    outputs = trained.outputs(task, examples)
    labels = list(pipeline.model.config.id2label.values())
    found = np.array([[scores[label] for label in labels] for scores in by_label])
    if task.is_regression:
        expected = np.array(decode_labels(task, predictions(task, outputs)))
        return agreement(found[:, 0], expected, unit=max(1.0, _per_unit(task)))
    of_classes = probabilities(task, outputs)
    assert of_classes is not None  # the losses of a linear head give some
    if task.is_multilabel:
        same = ((found > np.array(task.thresholds or THRESHOLD)) == predictions(task, outputs)).all(-1)
    else:
        same = found.argmax(-1) == predictions(task, outputs)
    return agreement(found, of_classes, int(same.sum()))


def _per_unit(task: Task) -> float:
    """What a score on the user's scale changes by where it changes by 1 inside minbert."""
    low, high = task.scale
    return (high - low) / SCORE_TOP
