"""A trained model's outputs and scores: load a checkpoint, run examples through it, score them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minbert import kernels
from minbert.config import TASKS_FILE, TrainConfig
from minbert.data import Encoded, token_budget_batches
from minbert.data.packing import Packed
from minbert.data.tokenizer import Tokenizer
from minbert.device import resolve_precision
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError
from minbert.files.atomic import readable, verify
from minbert.files.hub import TOKENIZER
from minbert.kernels.matmul_library import multiplies_in_tiles
from minbert.model import Encoder, MultitaskModel, load_heads
from minbert.model.weights import WEIGHTS_FILE
from minbert.runs.checkpoint import HEADS_FILE, check_fits, load_tasks
from minbert.runs.scores import Scores
from minbert.tasks import Task
from minbert.tasks.metrics import predictions, probabilities, score, with_thresholds

TOKENS_PER_BATCH = 8192
READ = (WEIGHTS_FILE, HEADS_FILE, TASKS_FILE, *TOKENIZER)  # of a checkpoint


def prepare(model: MultitaskModel) -> None:
    """Let evaluation of the model, without gradients, read weights that are cast once; it is for nothing else then.

    Otherwise each product casts its weight. Where compiled code runs all layers in one call, it gets them packed
    (`kernels.encoder_layers`). Elsewhere, and in bf16 on processors with AMX, they are packed for the library of matrix
    products, if that allows it. A later change of the parameters may not be seen.
    """
    encoder, dtype = model.encoder, model.encoder.compute_dtype
    head_dim = encoder.config.hidden_size // encoder.config.num_attention_heads
    runs = kernels.backends(encoder.embeddings.norm.weight.device, dtype=dtype, head_dim=head_dim)
    in_tiles = dtype == torch.bfloat16 and multiplies_in_tiles()
    if runs["encoder_layers"] == "native" and not in_tiles:
        encoder.packed_layers = encoder.pack_layers()
        return
    read = cast_once(encoder)
    for module in encoder.modules():
        for name, param in module._parameters.items():
            if param in read:
                module._parameters[name] = read[param]


@contextmanager
def prepared(model: MultitaskModel) -> Iterator[None]:
    """`prepare` for the length of a `with` block."""
    before = [(module._parameters, dict(module._parameters)) for module in model.encoder.modules()]
    prepare(model)
    try:
        yield
    finally:
        model.encoder.packed_layers = None
        for parameters, own in before:
            parameters.update(own)


def cast_once(encoder: Any) -> dict[Tensor, Any]:
    """By parameter that a product of the layers reads, the same in the compute dtype."""
    dtype, read = encoder.compute_dtype, dict[Tensor, Any]()
    for layer in encoder.layers:
        for projection in (layer.qkv, layer.attention_output, layer.intermediate, layer.output):
            read[projection.weight] = kernels.pack_weight(projection.weight, dtype)
        for projection in (layer.qkv, layer.attention_output, layer.output):  # bias_gelu reads the other in float32
            read[projection.bias] = projection.bias.detach().to(dtype)
    return read


def head_outputs(
    model: MultitaskModel,
    task: Task,
    encoded: Encoded,
    device: torch.device,
    group: ProcessGroup | None = None,
    count: Callable[[int, int], object] | None = None,
) -> np.ndarray:
    """A task's head outputs for every example in order, float32 [n, C] or [n]; arguments as of `in_batches`."""
    name = task.head_of or task.name
    return in_batches(model, encoded, device, lambda packed, n: model(packed, {name: n})[name], group, count)


def embeddings(model: MultitaskModel, encoded: Encoded, device: torch.device, pooling: str) -> np.ndarray:
    """The encoder's pooled vector of every sequence in order, float32 [n, D], for examples of one sequence each.

    Raises:
        ValueError: unknown pooling, or `pooler` for an encoder without one.
    """
    encoder = model.encoder
    return in_batches(model, encoded, device, lambda packed, n: encoder.pool(encoder(packed), packed, pooling))


@torch.inference_mode()
def in_batches(
    model: MultitaskModel,
    encoded: Encoded,
    device: torch.device,
    compute: Callable[[Packed, int], Tensor],
    group: ProcessGroup | None = None,
    count: Callable[[int, int], object] | None = None,
) -> np.ndarray:
    """What the model computes of every example, float32, in order; in evaluation mode.

    Args:
        compute: a row for each example of a batch, from its packed stream and its number of examples.
        group: who shares the work, all of them with the same model.
        count: called with the numbers of examples and tokens of each batch after it.

    Raises:
        ValueError: an id outside the encoder's tables.
    """
    model.encoder.check_ids(encoded.id_ranges)
    group = group or ProcessGroup()
    training = model.training
    model.eval()
    outputs: list[np.ndarray] = []
    order: list[np.ndarray] = []
    for indices in token_budget_batches(encoded.lengths, TOKENS_PER_BATCH)[group.rank :: group.world_size]:
        outputs.append(compute(encoded.pack(indices).to(device), len(indices)).float().cpu().numpy())
        order.append(indices)
        if count is not None:
            count(len(indices), int(encoded.lengths[indices].sum()))
    model.train(training)
    outputs, order = (
        [array for told in group.all_gather_object(arrays) for array in told] for arrays in (outputs, order)
    )
    return np.concatenate(outputs)[np.argsort(np.concatenate(order))]


def evaluate(
    model: MultitaskModel,
    tasks: Sequence[Task],
    encoded: Mapping[str, Encoded],
    device: torch.device,
    group: ProcessGroup | None = None,
    *,
    choose_thresholds: bool = False,
    count: Callable[[int, int], object] | None = None,
) -> tuple[Scores, dict[str, np.ndarray]]:
    """Scores and head outputs of every task; a task without labels has outputs only.

    Args:
        choose_thresholds: choose those of multi-label tasks by these examples, and keep them in the model's tasks.
        count: as for `head_outputs`.
    """
    scores: Scores = {}
    outputs = {}
    with prepared(model):
        for task in tasks:
            outputs[task.name] = head_outputs(model, task, encoded[task.name], device, group, count)
    for task in tasks:
        examples = encoded[task.name]
        if examples.labels is not None:
            own = with_thresholds_of(model, task)
            if choose_thresholds and own.is_multilabel:
                own = with_thresholds(own, outputs[task.name], examples.labels)
                model.tasks[task.name] = replace(model.tasks[task.name], thresholds=own.thresholds)
            predicted = predictions(own, outputs[task.name])
            scores[task.name] = score(own, predicted, examples.labels, probabilities(own, outputs[task.name]))
    return scores, outputs


def with_thresholds_of(model: MultitaskModel, task: Task) -> Task:
    """The task with the thresholds of its head's classes, chosen on dev in training."""
    return replace(task, thresholds=model.tasks[task.head_of or task.name].thresholds)


def load_model(path: Path, config: TrainConfig, device: torch.device) -> tuple[MultitaskModel, Tokenizer]:
    """The model and tokenizer of a checkpoint, after a check of the files that they are read from.

    Raises:
        UserError: the checkpoint is missing, damaged, or not of this run.
    """
    path = readable(path)
    verify(path, READ)
    encoder, tokenizer = Encoder.from_pretrained(path), Tokenizer.from_pretrained(path)
    tasks = load_tasks(path, config.chosen_tasks(config.tasks or []))
    check_fits(encoder.config, tokenizer, tasks, config.max_length, path)
    encoder.compute_dtype = torch.bfloat16 if resolve_precision(config.precision, device) == "bf16" else torch.float32
    with torch.random.fork_rng(devices=[]):  # new heads draw from torch's generator, and are then filled
        model = MultitaskModel(encoder, tasks, pooling=config.pooling, shared_layer=config.shared_layer)
    load_heads(model, path / HEADS_FILE)
    return model.to(device).eval(), tokenizer


@contextmanager
def kernels_of(config: TrainConfig, warn: Callable[[str], object]) -> Iterator[None]:
    """Compute in this block as the run did, or say where that is not possible, and where no code is compiled."""
    if config.backend == "auto" and (missing := kernels.native.missing_reason()) is not None:
        warn(missing)
    with kernels.use_backend(config.backend), kernels.use_matmul(kernels.matmul()):
        try:
            kernels.set_matmul(config.matmul)
        except ValueError as error:
            warn(f"the run multiplied by another library, so outputs may differ in their last digits: {error}")
        yield


def run_tasks(config: TrainConfig, names: Sequence[str] | None) -> list[Task]:
    """The named tasks, all of the run's when None.

    Raises:
        UserError: a task that the run was not trained on.
    """
    trained = config.tasks or []
    tasks = config.chosen_tasks(names if names is not None else trained)
    for task in tasks:
        if (task.head_of or task.name) not in trained:
            raise UserError(f"the run was not trained on {task.name}; it knows {', '.join(trained)}")
    return tasks
