"""The record of a task: its columns, labels, metrics, head, loss and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from minbert.errors import UserError, require_known

Label = str | int | float | bool  # as the user's files have it

SCORE_TOP = 5  # the largest score of STS-B, to which every regression's scale is brought
CORRELATIONS = ("mcc", "pearson", "spearman")  # in [-1, 1]
ERRORS = ("mse", "mae")  # smaller is better; they are in no overall score
METRICS_OF = {  # by type of task
    "classification": ("accuracy", "f1", "f1_micro", "f1_macro", "mcc", "roc_auc", "average_precision"),
    "regression": ("pearson", "spearman", *ERRORS),
    "multilabel": ("accuracy", "f1_micro", "f1_macro", "f1", "roc_auc", "average_precision"),
}
DEFAULT_METRICS = {
    "classification": ("accuracy",),
    "regression": ("pearson",),
    "multilabel": ("accuracy", "f1_micro"),  # all labels of an example right; and one by one
}
METRICS = tuple(dict.fromkeys(name for names in METRICS_OF.values() for name in names))


@dataclass(frozen=True)
class Course:
    """A task's files in the CS224N default project, and its prediction files there."""

    files: dict[str, str] = field(default_factory=dict)  # by split
    stem: str = ""  # the start of its prediction files' names
    column: str = ""  # of the labels in them


@dataclass(frozen=True)
class Glue:
    """What a task is in GLUE: its tab-separated files, its configuration on the hub, its submission file.

    Args:
        folder: of the files train.tsv, dev.tsv and test.tsv.
        columns: of the texts in the files.
        label: the label column in the files.
        hub: the configuration on the hub.
        submission: the name of the benchmark's file of predictions, without .tsv.
        genres: which of the dev and test sets are the task's, where there are two: matched or mismatched.
        other_files: by split, a file that is read where SPLIT.tsv is missing.
        without_header: the columns of files that have no header.
    """

    folder: str
    columns: list[str]
    label: str
    hub: str
    submission: str
    genres: Literal["", "matched", "mismatched"] = ""
    other_files: dict[str, str] = field(default_factory=dict)
    without_header: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """A task: the record of a tasks file, or of the built-in tasks (`builtin.yaml`).

    Inside minbert a label is a float32: the index of its class; a score on the scale brought to 0 to 5; or of a
    multi-label task a row of 0 and 1, one for each class (`minbert.tasks.labels`).

    Args:
        name: letters, digits, - and _; on the command line, in tables and in files.
        text: the text columns: one for single texts, two for pairs.
        label: the label column.
        type: classification, regression or multilabel.
        classes: the labels, in the order of the outputs; None until they are read from the training file.
        class_names: what the classes are called in reports; the classes themselves when left out.
        scale: the smallest and the largest score of a regression.
        separator: what separates the labels of a multi-label task in a text.
        train, dev, test: files by their absolute paths, or `hub:NAME/CONFIG/SPLIT`; dev may be a share of train.
        delimiter: of the fields of .csv files.
        id: the column of the rows' ids; a column `id` if there is one, else the row's number, when left out.
        metrics: the first one decides which epoch is best.
        class_weights: factors of the classes' losses by class, or `balanced`.
        head: of `minbert.model.HEADS`.
        loss: of `minbert.methods.losses.LOSSES`; by type and number of classes when left out.
        title: in tables and messages; the name when left out.
        in_overall: whether the overall score includes it.
        evaluated: whether it has a dev split; an auxiliary task is only trained on.
        course: its files in the CS224N project; only built-in tasks have some.
        glue: what it is in GLUE.
        head_of: the task whose head it is evaluated with: a further dev and test set of that task, never trained on.
        thresholds: by class, the probability above which a multi-label task predicts it; chosen on dev.
    """

    name: str
    text: tuple[str, ...]
    label: str
    type: Literal["classification", "regression", "multilabel"] = "classification"
    classes: tuple[Label, ...] | None = None
    class_names: tuple[str, ...] = ()
    scale: tuple[float, float] = (0.0, 1.0)
    separator: str = ";"
    train: str | None = None
    dev: str | float | None = None
    test: str | None = None
    delimiter: str = ","
    id: str = ""
    metrics: tuple[str, ...] = ()
    class_weights: Literal["balanced"] | Mapping[str, float] | None = None
    head: str = "linear"
    loss: str = ""
    title: str = ""
    in_overall: bool = True
    evaluated: bool = True
    course: Course | None = None
    glue: Glue | None = None
    head_of: str = ""
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require_known(f"task {self.name}: unknown type", self.type, DEFAULT_METRICS)
        if isinstance(self.text, str) or not 1 <= len(self.text) <= 2:
            raise UserError(f"task {self.name}: text must be a tuple of one or two columns, got {self.text!r}")
        defaults = {"title": self.name, "metrics": DEFAULT_METRICS[self.type], "loss": self.usual_loss}
        for name, value in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or value)

    @property
    def usual_loss(self) -> str:
        """The loss of the type; empty while the number of classes is unknown."""
        if self.type == "regression":
            return "mean_squared_error"
        if self.type == "multilabel":
            return "binary_cross_entropy"
        if self.classes is None:
            return ""
        return "binary_cross_entropy" if len(self.classes) == 2 else "cross_entropy"

    @property
    def metric(self) -> str:
        """The one that decides."""
        return self.metrics[0]

    @property
    def is_pair(self) -> bool:
        """Whether an example is a pair of texts."""
        return len(self.text) == 2

    @property
    def is_regression(self) -> bool:
        """Whether labels are scores; else they are classes."""
        return self.type == "regression"

    @property
    def is_multilabel(self) -> bool:
        return self.type == "multilabel"

    @property
    def num_classes(self) -> int:
        """Classes; 0 for a regression.

        Raises:
            ValueError: they are not known yet.
        """
        if self.is_regression:
            return 0
        if self.classes is None:
            raise ValueError(f"the classes of {self.name} are known once its training file is read")
        return len(self.classes)

    @property
    def max_label(self) -> int:
        """The largest label inside minbert."""
        return SCORE_TOP if self.is_regression else 1 if self.is_multilabel else self.num_classes - 1

    @property
    def num_outputs(self) -> int:
        """Outputs of a head for one example: a logit of each class, one logit, or one score."""
        classes = self.num_classes
        return classes if self.loss == "cross_entropy" or self.is_multilabel else 1

    @property
    def names_of_classes(self) -> tuple[str, ...]:
        """What reports call the classes."""
        return self.class_names or tuple(map(str, self.classes or ()))
