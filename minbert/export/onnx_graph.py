"""An ONNX graph of standard operators, from padded sequences to the outputs of one task or several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
import torch

from minbert.data import Examples
from minbert.errors import UserError
from minbert.export.onnx_record import FILE, INPUTS, SEQUENCES, record
from minbert.export.padded_model import PaddedModel
from minbert.export.quiet import quiet
from minbert.export.trained import Agreement, Trained, agreement
from minbert.files.atomic import write_json
from minbert.model import pair_encoding
from minbert.tasks import Task
from minbert.tasks.metrics import predictions

PACKAGES = ("onnx", "onnxruntime")
OPSET = 17  # the first with LayerNormalization; onnxruntime has it since 1.12
GRAPH, INT8_GRAPH = "model.onnx", "model_int8.onnx"
BATCH = 32
LARGEST = 2**31 - 2**24  # bytes of weights in a file


def check(trained: Trained) -> None:
    """Refuse tasks that one graph cannot have.

    Raises:
        UserError: they read examples in different ways, or the weights are too large for a file.
    """
    if sum(tensor.numel() * tensor.element_size() for tensor in trained.model.state_dict().values()) > LARGEST:
        raise UserError("an ONNX file holds at most 2 GiB, and the weights of this model are larger; export another")
    by_encoding: dict[str, list[str]] = {}
    for task in trained.tasks:
        by_encoding.setdefault(pair_encoding(task), []).append(task.name)
    if len(by_encoding) > 1:
        groups = "; ".join(f"{encoding}: {', '.join(names)}" for encoding, names in by_encoding.items())
        raise UserError(
            f"one graph reads all examples alike, and the heads of the run do not ({groups}); give --task NAME"
        )


def notes(trained: Trained) -> list[str]:
    """What a user of the graph should know, a line each."""
    return [f"inputs: {', '.join(_inputs(trained))}; outputs: {', '.join(task.name for task in trained.tasks)}"]


def _inputs(trained: Trained) -> dict[str, dict[int, str]]:
    """The graph's inputs by name, with the names of their dimensions."""
    prefixes = SEQUENCES[pair_encoding(trained.tasks[0])]
    return {f"{prefix}{name}": {0: "batch", 1: f"{prefix}tokens"} for prefix in prefixes for name in INPUTS}


def write(trained: Trained, directory: Path) -> None:
    """Write model.onnx, tokenizer.json, which cuts and pads, and minbert.json."""
    check(trained)
    trained.tokenizer.save(directory)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(trained.max_length)
    backend.enable_padding(pad_id=trained.tokenizer.pad_id)
    for file in directory.iterdir():
        file.unlink()
    backend.save(str(directory / "tokenizer.json"))
    write_json(directory / FILE, record(trained))

    names = [task.name for task in trained.tasks]
    inputs = _inputs(trained)
    example = [torch.full((2, 3), int(not name.endswith("token_type_ids"))) for name in inputs]
    with quiet():
        # The tracing exporter: the other one needs onnxscript besides. torch says that it will remove this one, which
        # its bound in pyproject.toml keeps away.
        torch.onnx.export(
            PaddedModel(trained.model, names),
            tuple(example),
            str(directory / GRAPH),
            input_names=list(inputs),
            output_names=names,
            dynamic_axes={**inputs, **{name: {0: "batch"} for name in names}},
            opset_version=OPSET,
            dynamo=False,
        )


def compare(trained: Trained, directory: Path, task: Task, examples: Examples) -> Agreement:
    """The outputs of the graph for examples against minbert's."""
    found, expected = Graph(directory).outputs(examples)[task.name], trained.outputs(task, examples)
    labels = None if task.is_regression else predictions(task, found) == predictions(task, expected)
    if labels is not None and task.is_multilabel:
        labels = labels.all(-1)
    return agreement(found, expected, None if labels is None else int(labels.sum()))


class Graph:
    """A graph that `write` wrote, with its tokenizer, run by onnxruntime on the CPU."""

    def __init__(self, directory: Path, file: str = GRAPH) -> None:
        import onnxruntime

        self.tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(directory / file), options, providers=["CPUExecutionProvider"])
        self.tasks = [output.name for output in self.session.get_outputs()]
        inputs = {node.name for node in self.session.get_inputs()}
        self.sequences = next(each for each in SEQUENCES.values() if {p + n for p in each for n in INPUTS} == inputs)

    def outputs(self, examples: Examples, count: Callable[[int, int], object] | None = None) -> dict[str, np.ndarray]:
        """By task, its outputs for examples in their order, [n, C] or [n].

        Args:
            count: called with the numbers of examples and tokens of each batch after it.
        """
        rows = list(zip(*filter(None, (examples.texts, examples.pairs)), strict=True))
        order = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])))
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        found = []
        for batch in batches:
            feed = self._feed([rows[index] for index in batch])
            found.append(self.session.run(None, feed))
            if count is not None:
                count(len(batch), int(sum(value.sum() for name, value in feed.items() if name.endswith("_mask"))))
        columns = (np.concatenate(column)[np.argsort(order)] for column in zip(*found, strict=True))
        return dict(zip(self.tasks, columns, strict=True))

    def _feed(self, rows: list[tuple[str, ...]]) -> dict[str, np.ndarray]:
        feed = {}
        for prefix, (start, end) in self.sequences.items():
            parts = [row[start:end] for row in rows]
            encodings = self.tokenizer.encode_batch([part if len(part) == 2 else part[0] for part in parts])
            for name, field in INPUTS.items():
                feed[prefix + name] = np.array([getattr(encoding, field) for encoding in encodings], np.int64)
        return feed


def quantise(directory: Path) -> None:
    """Write model_int8.onnx: onnxruntime's dynamic quantisation, with int8 weights of products and of embeddings."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(directory / GRAPH, directory / INT8_GRAPH, weight_type=QuantType.QInt8)
