"""A trained run in Python: `minbert.load` gives a `Predictor`, which predicts, embeds and scores texts."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minbert import kernels
from minbert.config import TrainConfig
from minbert.data import Encoded, Examples, encode
from minbert.data.examples import Row, check_row
from minbert.device import resolve_device
from minbert.errors import UserError, require_known
from minbert.files import MANIFEST
from minbert.files.atomic import readable, verify
from minbert.files.hub import checkpoint_directory, names_repository
from minbert.files.json_yaml import short
from minbert.inference import READ, embeddings, head_outputs, kernels_of, load_model, prepare, run_tasks
from minbert.model import POOLINGS, pair_encoding
from minbert.runs.run_directory import Run
from minbert.tasks import Task
from minbert.tasks.labels import LabelEncoder, decode_labels
from minbert.tasks.metrics import predictions, probabilities, score
from minbert.tasks.task import Label

_kernels_in_use = threading.RLock()  # which backend and library compute is chosen for the whole process


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for a text or a pair.

    Attributes:
        label: as the training file has it: a class, of a multi-label task the list of those predicted, of a regression
            the score.
        score: of a regression the score, on the user's scale; of a class its probability, or where the head has none
            (one for cosines) its output; None of a multi-label task, whose classes have a probability each.
        probabilities: of each class, in the order of `Predictor.tasks[name].classes`; None where there are none.
    """

    label: Label | list[Label]
    score: float | None
    probabilities: list[float] | None


def load(trained: str | Path | Run, *, device: str = "auto") -> Predictor:
    """A trained model, ready to predict.

    Args:
        trained: a run or its directory, of which the best epoch is taken; one of its checkpoints, RUN/best or
            RUN/last, or a copy of one with the run's config.yaml in it; or what `minbert push` wrote, as a directory or
            by its name on the hub, OWNER/NAME.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: there is no run or no checkpoint, a file is damaged, the hub is out of reach, or no such device.
    """
    if not isinstance(trained, str | Path | Run):
        raise UserError(f"load: expected a run or the path of one, got {type(trained).__name__}")
    return Predictor(*find(trained), device)


def find(trained: str | Path | Run, checkpoint: Literal["best", "last"] = "best") -> tuple[Path, TrainConfig]:
    """The directory of a checkpoint and the options of its run.

    Args:
        trained: as of `load`.
        checkpoint: which one of a run's.

    Raises:
        UserError: as of `load`; or the last checkpoint is asked for where there is only one.
    """
    path = trained.path if isinstance(trained, Run) else Path(trained)
    on_hub = isinstance(trained, str) and names_repository(trained)
    if on_hub:
        path = checkpoint_directory(str(trained), (MANIFEST, "config.yaml"))
        if not (path / MANIFEST).exists() or not (path / "config.yaml").exists():
            raise UserError(f"{trained} on the hub is no model that minbert push wrote; --model can train from a BERT")
        path = checkpoint_directory(str(trained), (MANIFEST, "config.yaml", *READ))
    elif not (readable(path) / MANIFEST).exists():
        run = Run(path)
        return (run.best if checkpoint == "best" else run.last), run.config()
    if checkpoint != "best":
        raise UserError(f"{trained} is one checkpoint of a run; leave --checkpoint out")
    if not (path / "config.yaml").exists():
        return path, Run(path.parent).config()
    verify(path, ("config.yaml",))
    # the files of a snapshot are links into the hub's cache, which a run directory may not have
    return path, TrainConfig.from_yaml(path / "config.yaml") if on_hub else Run(path).config()


class Predictor:
    """A trained model that predicts, embeds and scores. Its weights are prepared once.

    Threads may share it: they take turns. It computes as its run did, with the run's backend and library of matrix
    products, which are chosen for the whole process while a call lasts; afterwards they are as before.

    Args:
        checkpoint: the directory of the model.
        config: the options of its run.
        device: auto, cpu, cuda or cuda:N.
        warn: called with a line for each difference from the run; `warnings.warn` when left out.

    Attributes:
        tasks: by name, with the classes and the thresholds of their heads.
        max_length: tokens of a sequence, beyond which a text is cut.

    Raises:
        UserError: the checkpoint is missing, damaged, or not of this run; no such device.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: TrainConfig,
        device: str = "auto",
        warn: Callable[[str], object] = lambda line: warnings.warn(line, stacklevel=5),
    ) -> None:
        if not readable(checkpoint).is_dir():
            raise UserError(f"{checkpoint} is not there: the run has saved no such checkpoint yet")
        self.checkpoint, self.config, self.device = checkpoint, config, resolve_device(device)
        with _kernels_in_use, kernels_of(config, warn):
            self._matmul = kernels.matmul()
            self._model, self._tokenizer = load_model(checkpoint, config, self.device)
            prepare(self._model)
        self.max_length = config.max_length or self._model.encoder.config.max_position_embeddings
        self.tasks = dict(self._model.tasks)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle names the checkpoint, which is loaded again: weights are prepared for one processor."""
        return Predictor, (self.checkpoint, self.config, str(self.device))

    def __repr__(self) -> str:
        return f"Predictor({str(self.checkpoint)!r}: {', '.join(self.tasks)}; {self.device})"

    def predict(self, task: str, texts: Iterable[str], pairs: Iterable[str] | None = None) -> list[Prediction]:
        """Predict a task for n texts, in their order.

        Args:
            task: a name in `tasks`, or of a further dev set of one.
            texts: of a pair task the first sentences.
            pairs: of a pair task the second sentences, n too.

        Raises:
            UserError: no such task, too few or too many pairs, or a text that is empty or not a string.
        """
        record, outputs = self._outputs(task, texts, pairs)
        if outputs is None:
            return []
        labels = decode_labels(record, predictions(record, outputs))
        shares = probabilities(record, outputs)
        of_each: Any = [None] * len(labels) if shares is None else shares.tolist()
        if record.is_regression:
            scores = labels
        elif record.is_multilabel:
            scores = [None] * len(labels)
        else:
            scores = outputs.astype(np.float64).tolist() if shares is None else shares.max(axis=-1).tolist()
        return [Prediction(*values) for values in zip(labels, scores, of_each, strict=True)]

    def embed(self, texts: Iterable[str], pooling: str = "mean") -> np.ndarray:
        """The encoder's vectors of n texts, float32 [n, D], in their order.

        Args:
            pooling: from tokens to a vector: cls, mean, max, or pooler if the encoder has one. The mean when left out,
                whatever the run's heads read.

        Raises:
            UserError: unknown pooling, or a text that is empty or not a string.
        """
        require_known("unknown pooling", pooling, POOLINGS)
        if pooling == "pooler" and self._model.encoder.pooler is None:
            raise UserError("pooling 'pooler': the run's encoder has none; pool with 'cls' or 'mean'")
        examples = _examples(texts, None)
        if not len(examples):
            return np.zeros((0, self._model.encoder.config.hidden_size), np.float32)
        with self._computing():
            return embeddings(self._model, self._encoded(examples), self.device, pooling)

    def score(
        self, task: str, texts: Iterable[str], labels: Iterable[Any], pairs: Iterable[str] | None = None
    ) -> dict[str, float]:
        """The task's metrics on n labelled texts, by name; the one that decides first.

        Args:
            labels: as the training file has them; of a multi-label task lists, or texts with its separator.

        Raises:
            UserError: as of `predict`; no texts; or a label that is none of the task's, or one too few or too many.
        """
        encode_label, truth = LabelEncoder(self.task(task)), []
        for number, label in enumerate(labels):
            try:
                truth.append(encode_label(label))
            except ValueError as error:
                raise UserError(f"labels[{number}]: {error}") from None
        record, outputs = self._outputs(task, texts, pairs)
        if outputs is None:
            raise UserError("texts: there are none to score")
        if len(truth) != len(outputs):
            raise UserError(f"labels: expected {len(outputs)}, one for each text, got {len(truth)}")
        shares = probabilities(record, outputs)
        return score(record, predictions(record, outputs), np.array(truth, np.float32), shares)

    # For minbert.predict, which reads files -------------------------------------------------------------------------

    def task(self, name: str) -> Task:
        """A task's record, with the classes and the thresholds of its head.

        Raises:
            UserError: the run was not trained on it.
        """
        task, *_ = run_tasks(self.config, [name])  # further dev sets of a task come with it
        head = self.tasks[task.head_of or name]
        return replace(task, classes=head.classes, thresholds=head.thresholds)

    def outputs(
        self, task: Task, examples: Examples, count: Callable[[int, int], object] | None = None
    ) -> tuple[Encoded, np.ndarray]:
        """Examples with their tokens, and the head's outputs for them, float32 [n, C] or [n] (`head_outputs`)."""
        encoded = encode(examples, self._tokenizer, self.max_length, pair_encoding=pair_encoding(task), cached=False)
        with self._computing():
            return encoded, head_outputs(self._model, task, encoded, self.device, count=count)

    # ----------------------------------------------------------------------------------------------------------------

    def _outputs(self, name: str, texts: Iterable[str], pairs: Iterable[str] | None) -> tuple[Task, np.ndarray | None]:
        """A task and its head's outputs for texts, None without texts; warns of those that are cut."""
        task = self.task(name)
        if task.is_pair and pairs is None:
            raise UserError(f"the task {name} is about pairs of texts; give the second ones as pairs")
        if not task.is_pair and pairs is not None:
            raise UserError(f"the task {name} is about single texts; leave pairs out")
        examples = _examples(texts, pairs)
        if not len(examples):
            return task, None
        encoded, outputs = self.outputs(task, examples)
        self._warn_of(encoded)
        return task, outputs

    def _encoded(self, examples: Examples) -> Encoded:
        encoded = encode(examples, self._tokenizer, self.max_length, cached=False)
        self._warn_of(encoded)
        return encoded

    def _warn_of(self, encoded: Encoded) -> None:
        """Warn of texts that are cut, and of those without tokens."""
        for line in encoded.warnings(self.max_length):
            warnings.warn(line, stacklevel=4)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute with the run's kernels in this block, alone of all predictors."""
        with _kernels_in_use, kernels.use_backend(self.config.backend), kernels.use_matmul(self._matmul):
            yield


def _examples(texts: Iterable[str], pairs: Iterable[str] | None) -> Examples:
    """Examples of a user's texts, numbered from 0.

    Raises:
        UserError: something is not a text, is empty, or there are not as many pairs as texts.
    """
    first, second = _texts(texts, "texts"), None if pairs is None else _texts(pairs, "pairs")
    if second is not None and len(second) != len(first):
        raise UserError(f"pairs: expected {len(first)}, one for each text, got {len(second)}")
    return Examples(list(map(str, range(len(first)))), first, second, None)


def _texts(values: Iterable[str], name: str) -> Sequence[str]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"{name}: expected a list of texts, got {short(values)}")
    texts: list[str] = []
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(f"{name}[{number}]: expected a text, got {short(value)}")
        try:
            texts += check_row(Row(number, str(number), texts=[value])).texts
        except ValueError as error:
            raise UserError(f"{name}[{number}]: {error}") from None
    return texts
