"""The lines that a run prints before its first step: device, kernels, data, method, and what is wrong with the data."""

from __future__ import annotations

import torch
from rich.table import Table

import minbert
from minbert import kernels
from minbert.config import TrainConfig
from minbert.console import data_table
from minbert.data import skipped_lines
from minbert.device import describe
from minbert.distributed.process_group import ProcessGroup
from minbert.methods.smart import embedding_scale
from minbert.methods.surgery import needs_task_gradients
from minbert.model import MultitaskModel
from minbert.model.parts import parts_of
from minbert.training.cuda_graphs import reason_against
from minbert.training.setup import TrainingData


def device_lines(config: TrainConfig, group: ProcessGroup) -> list[str]:
    """The version, the device and the precision; the number of processes."""
    line = f"minbert {minbert.__version__} on {describe(group.device, config.precision)}"
    return [line, *([f"{group.world_size} processes over {group.backend}"] if group.world_size > 1 else [])]


def kernels_line(device: torch.device) -> str:
    """Which ops run compiled, on CPUs with which instruction set, and which in plain PyTorch.

    Without compiled code, a second line says how to get it.
    """
    by_backend: dict[str, list[str]] = {}
    for op, backend in kernels.backends(device).items():
        by_backend.setdefault(backend, []).append(op)
    isa = f" ({kernels.native.isa()})" if device.type == "cpu" and "native" in by_backend else ""
    line = f"kernels{isa}: " + "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in sorted(by_backend.items()))
    missing = kernels.native.missing_reason()
    return f"{line}\n{missing}" if missing else line


def graphs_lines(config: TrainConfig, model: MultitaskModel, group: ProcessGroup) -> list[str]:
    """Of a run on a GPU, whether its steps are replayed as CUDA graphs, and if not, why."""
    if group.device.type != "cuda":
        return []
    reason = reason_against(config, model.encoder.config, group)
    return ["steps are replayed as CUDA graphs" if reason is None else f"no CUDA graphs: {reason}"]


def method_line(config: TrainConfig, model: MultitaskModel) -> str:
    """What is added to the task losses, and how the tasks' gradients become one update."""
    frozen = not any(param.requires_grad for param in model.trunk.parameters())
    surgery = f"surgery {config.surgery}"
    if (scopes := parts_of(model, config.surgery_scope)) is not None:
        listed = f" ({', '.join(scopes.names)})" if config.surgery_scope == "layer" else ""
        surgery += f" of {len(scopes.names)} parts by {config.surgery_scope}{listed}"
    parts = ["no surgery: the encoder is frozen" if frozen else surgery]
    parts += [
        f"{task.name} with head {task.head} and {task.loss.replace('_', ' ')}"
        for task in model.tasks.values()
        if (task.head, task.loss) != ("linear", task.usual_loss)
    ]
    layers = f"the first {config.freeze_layers} layers" if config.freeze_layers > 1 else "the first layer"
    parts += [f"embeddings and {layers} are not trained"] if config.freeze_layers else []
    parts += [f"layer-wise learning rate decay {config.layer_decay:g}"] if config.layer_decay < 1 else []
    parts += [f"a shared layer ({config.shared_layer})"] if config.shared_layer else []
    parts += [f"L2 norms with lambda {config.l2}"] if config.l2 else []
    weighted = [task.name for task in model.tasks.values() if task.class_weights]
    parts += [f"class weights of {', '.join(weighted)}"] if weighted else []
    parts += [f"label smoothing {config.label_smoothing}"] if config.label_smoothing else []
    smart, scale = config.smart, embedding_scale(model)
    if smart.on:
        name = smart.reach[0]  # epsilon; sigma without a search
        length = getattr(smart, name) * (scale if smart.relative and not smart.normalized else 1.0)
        size = "are normalised" if smart.normalized else f"have a root mean square of {scale:.2g}"
        parts.append(f"{smart.title} with lambda_s {smart.lambda_s}, {name} {length:.2g} where embeddings {size}")
    if config.rdrop.on:
        parts.append(f"R-Drop with alpha {config.rdrop.alpha}")
    if config.bregman.mu:
        parts.append(f"Bregman proximal point with mu {config.bregman.mu}")
    return f"method: {'; '.join(parts)}"


def data_lines(config: TrainConfig, data: TrainingData, model: MultitaskModel, skipped_file: str) -> list[str | Table]:
    """The data, the method, a table of the examples of each task, and the rows that are skipped or not read in full.

    Args:
        skipped_file: the file that lists all skipped rows.
    """
    rows = []
    for task in data.tasks:
        truncated = [of[task.name].truncated for of in data.splits.values() if task.name in of]
        sizes = {split: len(of.get(task.name, ())) for split, of in data.splits.items()}
        skipped = sum(len(of.get(task.name, ())) for of in data.skipped.values())
        if any(sizes.values()):  # else a further dev or test set that the data lacks
            rows.append((task, sizes, skipped, sum(truncated)))
    lines: list[str | Table] = [
        f"data: {data.source.name}; model: {config.model or 'a small encoder from scratch'}",
        method_line(config, model),
        data_table(rows),
    ]
    if config.surgery_reduction != "sum" and config.surgery != "pcgrad":  # no error: runs of earlier versions have it
        lines.append(f"warning: --surgery-reduction does nothing with --surgery {config.surgery}")
    if config.surgery_groups is not None and not needs_task_gradients(config.surgery):
        lines.append(f"warning: --surgery-groups does nothing with --surgery {config.surgery}")
    trained = [task.name for task in data.tasks]
    if others := [name for name in data.source.tasks() if name not in trained]:
        lines.append(f"not trained: {', '.join(others)} (--tasks chooses)")
    lines += [f"warning: {note}" for task in data.tasks for note in data.source.warnings(task)]
    for split, by_task in data.splits.items():
        for name, encoded in by_task.items():
            lines += skipped_lines(data.skipped[split][name], skipped_file)
            lines += [f"warning: {name}, {split}: {note}" for note in encoded.warnings()]
    return lines
