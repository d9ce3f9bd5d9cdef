"""The options of a training run: a frozen record that refuses invalid values when it is built."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from minbert.errors import UserError, dashed, require, require_known
from minbert.files.json_yaml import dump_yaml, read_yaml
from minbert.files.schema_checks import FORMAT, build, checked, types_of_fields, without_format
from minbert.methods.rdrop import RDropConfig
from minbert.methods.smart import BregmanConfig, SmartConfig
from minbert.methods.surgery import check_surgery, needs_task_gradients
from minbert.model import HEADS, POOLINGS, SHARED_LAYERS
from minbert.model.scratch_config import ScratchConfig
from minbert.options_by_task import of_task, smoothing_of, task_groups, with_head_and_loss
from minbert.tasks import TASKS, Task, find_tasks, read_tasks

TASKS_FILE = "tasks.yaml"  # in a run directory: the records of its own tasks
INFINITE = float("inf")
SPLITS = "--split-master-weights splits the matrices that a step trains in bf16 with one backward"
RANGES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (  # of values that are given, also by task
    ("at least 1", lambda value: value >= 1, ("epochs", "steps", "batch_size", "threads", "accumulate", "epoch_times")),
    ("at least 1", lambda value: value >= 1, ("reviews_per_star", "max_skipped", "checkpoint_steps", "log_steps")),
    ("at least 1", lambda value: value >= 1, ("patience", "fold")),
    ("at least 2", lambda value: value >= 2, ("folds",)),
    ("at least 4", lambda value: value >= 4, ("max_length",)),
    ("between 0 and 1", lambda value: 0 < value < 1, ("lr", "head_lr", "adam_eps")),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, ("dropout", "head_dropout", "warmup", "label_smoothing")),
    ("more than 0", lambda value: 0 < value < INFINITE, ("timeout", "loss_weights", "sampling_weights")),
    ("0 or more", lambda value: 0 <= value < INFINITE, ("weight_decay", "clip_norm", "l2", "freeze_layers")),
    ("more than 0 and at most 1", lambda value: 0 < value <= 1, ("layer_decay",)),
    ("between 0 and 10", lambda value: 0 <= value <= 10, ("sampling_alpha", "sampling_alpha_end")),
    ("between 0 and 2**63 - 1", lambda value: 0 <= value < 2**63, ("seed",)),
)
BY_TASK = (
    "batch_size",
    "loss_weights",
    "sampling_weights",
    "swap_pairs",
    "augmented",
    "heads",
    "losses",
    "pooling",
    "l2",
    "label_smoothing",
    "smart.lambda_s",
    "rdrop.alpha",
)


def _as_in_a_file(value: Any) -> Any:
    """A path as its name, and a tuple as a list."""
    return os.fspath(value) if isinstance(value, os.PathLike) else list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; the command line beats --config, which beats --recipe.

    Data:
        data: directory of CS224N files or GLUE folders, or a hub name; the built-in demo corpus when left out.
        tasks_file: YAML file of records of your own tasks (docs/own-tasks.md), which join the built-in tasks; one with
            the name of a built-in task takes its place.
        tasks: tasks to train, in order, such as sst,qqp,sts; when left out, those of the tasks file, and with --data
            or without such a file those of sst, qqp and sts that the data holds.
        max_length: tokens kept of each sequence; the model's position limit when left out.
        swap_pairs: pair tasks, such as sts, whose training pairs are doubled by each pair with its sentences swapped,
            and whose batch size is doubled with them.
        augmented: files of further training examples by task, such as {sst: FILE}: tab-separated with the columns of
            the task's training file, or a JSON object with them on each line; a row without a label has that of the
            training example with its id.
        reviews: file of reviews with 1 to 5 stars, which adds the task yelp to the others: JSON objects on lines, or
            CSV with a header, with stars and text. Never evaluated.
        reviews_per_star: reviews drawn for each number of stars.
        strict: start no run whose data has a row that cannot be used; else such rows are left out and named.
        folds: cross-validation: train as many runs, RUN/fold-1 and so on, each with another share of the training
            examples as its dev split, and write the mean and the deviation of their scores to RUN/folds.md; a dev split
            of the data is not used.
        fold: train the run of this fold of --folds alone, from 1, in --out itself.

    Model:
        model: directory or hub name of a pretrained BERT; a small encoder from scratch when left out.
        pooling: how a sequence becomes one vector: cls, mean, max or pooler; or by task, cls for those left out.
        shared_layer: a layer between pooling and every head: linear (with ReLU), or transform (linear, BatchNorm, GELU,
            dropout); none when left out.
        heads: by task, how pooled vectors become outputs, such as {qqp: concatenated, sts: cosine}; a head encodes a
            pair as one sequence (cross-encoder) or each sentence alone (bi-encoder); linear for tasks left out.
        dropout: dropout of the encoder; when left out, a pretrained model's own, and none from scratch.
        head_dropout: dropout before each task head.
        mode: finetune trains everything, pretrain freezes the encoder and trains the heads.
        freeze_layers: do not train the embeddings and this many of the encoder's first layers; dropout acts there as
            in training.
        scratch: the encoder built when no pretrained model is given.

    Method:
        recipe: named options of minbert; --config and the command line override them.
        surgery: how the tasks' gradients become one update: sum, mean, pcgrad, gse (a pcgrad update with the mean, then
            one with the sum); upgrad, dualproj, mgda, cagrad, imtl-g, aligned-mtl, nash-mtl, config, gradvac, fairgrad,
            random, famo, uncertainty, dwa, gradnorm, geometric-mean or constant, whose options follow as
            --surgery.OPTION VALUE or in the name, as in cagrad(c=0.4); or MODULE:NAME of a callable from Gram matrix to
            weights, such as TorchJD's weightings, with arguments if need be: MODULE:NAME(c=0.4). That is imported and
            called: from the command line only, unless --allow-code is given there.
        surgery_reduction: whether pcgrad sums the projected gradients or takes their mean.
        surgery_scope: what has a Gram matrix and weights of its own: the whole model; each layer, as which embeddings,
            pooler and shared layer count too; or each module that has parameters.
        surgery_groups: tasks whose gradients surgery sees as one, joined by +, such as sst+qqp+sts,cfimdb; left out,
            each task is a group.
        smart: smoothness-inducing adversarial regularisation, and its relatives R3F, SiFT, virtual adversarial training
            and FreeLB; off unless --smart.lambda-s is given.
        rdrop: R-Drop, two passes with other dropout masks; off unless --rdrop.alpha is given.
        bregman: momentum Bregman proximal point method; off unless --bregman.mu is given.
        losses: by task, the loss, such as {sts: cosine_embedding}; the task's own for tasks left out.
        loss_weights: what a task's loss is multiplied by, such as {sst: 2}; 1 where left out.
        l2: weight of the L2 norm of a task's parameters in its loss, or one for each task, such as {qqp: 0.1}.
        label_smoothing: share of the target that is spread over all classes, in the loss of every task with classes,
            or by task, such as {sst: 0.1}.

    Schedule:
        epochs: passes over the data, each of epoch_length steps.
        steps: stop after this many optimizer steps in all, whatever epochs says.
        patience: stop when the overall dev score has not improved for this many epochs; never when left out.
        batch_size: examples of each task in one step, or a number for each, such as {sst: 2, qqp: 20, sts: 2}.
        accumulate: batches of each task in one update.
        lr: peak learning rate; left out, 5e-5 for a pretrained model as wide as BERT-base (growing with the square of
            how much narrower a model is), 1.5e-3 from scratch, and 1e-3 with a frozen encoder.
        head_lr: peak learning rate of the heads; lr when left out.
        layer_decay: what the learning rate of a layer of the encoder is multiplied by for each layer above it: its top
            layer, a pooler and the heads have lr, its embeddings lr * F^layers (Sun et al. 2019, section 5.3.4).
        schedule: what the learning rate does after warm-up.
        warmup: share of the steps in which the learning rate rises from zero.
        weight_decay: decoupled weight decay on matrices.
        adam_eps: what AdamW adds to the square root of the second moment.
        clip_norm: gradients are scaled down to this norm; 0 leaves them.
        optimizers: shared has one AdamW for all tasks; per-task has separate moments, step counts and learning rate
            schedules (for one task a step).
        sampling: joint has a batch of every task in each step, the others one task a step: round-robin in turn,
            sequential all of an epoch's batches of one task and then of the next, shuffled those of all tasks in a
            random order, proportional draws the task of every step.
        sampling_alpha: proportional draws a task with n examples in proportion to n^alpha: 0 draws all tasks alike; a
            temperature T is an alpha of 1/T.
        sampling_alpha_end: alpha of the last epoch, reached in even steps, such as 0.2 after 1 (Stickland and Murray
            2019, "annealed sampling"); left out, alpha stays.
        sampling_weights: how many times as often a step is a task's, such as {sst: 2}; 1 where left out.
        epoch_length: batches of each task in an epoch follow the smallest task, the largest, each task itself, or are
            this many.
        epoch_times: how many times as many batches as epoch_length says.

    Run:
        out: run directory to create; runs/<date>-<time> when left out.
        resume: continue the run in --out from its last checkpoint.
        seed: everything random follows from it.
        device: auto, cpu, cuda or cuda:N.
        precision: arithmetic of the encoder; auto is bf16 where the processor has it.
        split_master_weights: in bf16, keep the matrices of the encoder's layers as bfloat16 numbers, which the products
            read, and the low 16 bits of their float32 values beside them (Kalamkar et al. 2020): with AdamW's moments
            12 bytes a parameter, not 14. Checkpoints are in float32 as ever. One process.
        low_memory: run task after task instead of all in one stream.
        backend: auto uses compiled kernels where there are some; reference is plain PyTorch.
        matmul: library of float32 matrix products on CPUs: torch's BLAS, or oneDNN; auto times both as a run in fp32
            begins, unless its encoder is narrow, and records the faster.
        threads: CPU threads; torch's own choice when left out.
        cuda_graphs: on a GPU, replay forward and backward as CUDA graphs, with batches padded to few different numbers
            of tokens; only where a step is one stream and one batch.
        timeout: seconds that processes wait for one that does not answer; then they stop.
        max_skipped: give up after this many steps in a row with a non-finite loss or gradient.
        checkpoint_steps: steps between two checkpoints; every epoch also ends with one.
        log_steps: steps between two lines of metrics.jsonl.
        log_to: experiment trackers that get the metrics too, by their own clients, which their own environment
            variables configure: tensorboard (in RUN/tensorboard), wandb, trackio, mlflow.
        tensorboard: the same as tensorboard in --log-to.
    """

    COMMON: ClassVar[Sequence[str]] = (  # what --help shows
        *("data", "tasks_file", "tasks", "model", "recipe", "surgery", "epochs", "batch_size", "lr"),
        *("out", "resume", "seed"),
    )

    data: str | None = None
    tasks_file: str | None = None
    tasks: list[str] | None = None
    max_length: int | None = None
    swap_pairs: list[str] | None = None
    augmented: dict[str, str] | None = None
    reviews: str | None = None
    reviews_per_star: int = 500
    strict: bool = False
    folds: int | None = None
    fold: int | None = None

    model: str | None = None
    pooling: str | dict[str, str] = "cls"
    shared_layer: Literal["linear", "transform"] | None = None
    heads: dict[str, str] = field(default_factory=dict)
    dropout: float | None = None
    head_dropout: float = 0.1
    mode: Literal["finetune", "pretrain"] = "finetune"
    freeze_layers: int = 0
    scratch: ScratchConfig = field(default_factory=ScratchConfig)

    recipe: str | None = None
    surgery: str = "pcgrad"
    surgery_reduction: Literal["sum", "mean"] = "sum"
    surgery_scope: Literal["model", "layer", "module"] = "model"
    surgery_groups: list[str] | None = None
    smart: SmartConfig = field(default_factory=SmartConfig)
    rdrop: RDropConfig = field(default_factory=RDropConfig)
    bregman: BregmanConfig = field(default_factory=BregmanConfig)
    losses: dict[str, str] = field(default_factory=dict)
    loss_weights: dict[str, float] | None = None
    l2: float | dict[str, float] = 0.0
    label_smoothing: float | dict[str, float] = 0.0

    epochs: int = 3
    steps: int | None = None
    patience: int | None = None
    batch_size: int | dict[str, int] = 32
    accumulate: int = 1
    lr: float | None = None
    head_lr: float | None = None
    layer_decay: float = 1.0
    schedule: Literal["linear", "constant"] = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    adam_eps: float = 1e-8
    clip_norm: float = 1.0
    optimizers: Literal["shared", "per-task"] = "shared"
    sampling: Literal["joint", "round-robin", "sequential", "shuffled", "proportional"] = "joint"
    sampling_alpha: float = 1.0
    sampling_alpha_end: float | None = None
    sampling_weights: dict[str, float] | None = None
    epoch_length: Literal["smallest", "largest", "each"] | int = "smallest"
    epoch_times: int = 1

    out: str | None = None
    resume: bool = False
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    split_master_weights: bool = False
    low_memory: bool = False
    backend: Literal["auto", "reference"] = "auto"
    matmul: Literal["auto", "blas", "onednn"] = "auto"
    threads: int | None = None
    cuda_graphs: bool = True
    timeout: float = 600.0
    max_skipped: int = 10
    checkpoint_steps: int = 200
    log_steps: int = 10
    log_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        records = {"smart": SmartConfig, "rdrop": RDropConfig, "bregman": BregmanConfig, "scratch": ScratchConfig}
        for name, kind in types_of_fields(TrainConfig).items():
            if name in records:
                record = getattr(self, name)
                require(isinstance(record, records[name]), name, f"a {records[name].__name__}", record)
                for part, of_part in types_of_fields(records[name]).items():
                    checked(getattr(record, part), of_part, dashed(f"{name}.{part}"))
            elif name != "COMMON":
                object.__setattr__(self, name, checked(_as_in_a_file(getattr(self, name)), kind, dashed(name)))
        if self.tasks is not None:
            self.find(self.tasks)
        for expected, holds, names in RANGES:
            for name in names:
                option = getattr(self, name)
                for task, value in option.items() if isinstance(option, dict) else [("", option)]:
                    require(value is None or holds(value), f"{name}.{task}" if task else name, expected, value)
        if isinstance(self.epoch_length, int):
            require(self.epoch_length >= 1, "epoch_length", "smallest, largest, each or at least 1", self.epoch_length)
        require(not (self.resume and self.out is None), "out", "given with --resume: it names the run", None)
        if self.fold is not None:
            require(self.folds is not None, "fold", "given with --folds, their number", self.fold)
            require(self.fold <= (self.folds or 0), "fold", f"between 1 and {self.folds}", self.fold)
        self._check_sampling()
        self._check_tasks()
        self._check_heads()
        self._check_regularisers()
        self._check_split()
        object.__setattr__(self, "surgery", check_surgery(self.surgery))  # with all options of a rule
        if self.sampling != "joint" and needs_task_gradients(self.surgery):
            raise UserError(
                f"--surgery {self.surgery} needs a batch of every task in each step, and --sampling {self.sampling}"
                " takes one task a step; give --surgery sum, or --sampling joint"
            )
        if self.surgery_scope != "model" and not needs_task_gradients(self.surgery):
            raise UserError(
                f"--surgery-scope {self.surgery_scope} does nothing with --surgery {self.surgery}, whose weights are"
                " the same for every part; leave it out, or give another --surgery"
            )
        if self.surgery_groups is not None and self.tasks is not None:
            task_groups(self.find(self.tasks), self.surgery_groups)

    def _check_sampling(self) -> None:
        """Refuse options that have no effect with this --sampling."""
        if self.sampling == "joint":
            for name, unwanted, instead in (
                ("optimizers", self.optimizers == "per-task", "--optimizers shared"),
                ("epoch_length", self.epoch_length == "each", "--epoch-length smallest or largest"),
                ("sampling_weights", self.sampling_weights, "--loss-weights to weigh a task's loss"),
            ):
                if unwanted:
                    raise UserError(
                        f"{dashed(name)} {getattr(self, name)} needs one task a step, and --sampling joint takes all of"
                        f" them in each; give {instead}, or another --sampling"
                    )
        if self.sampling != "proportional" and (self.sampling_alpha, self.sampling_alpha_end) != (1.0, None):
            raise UserError(
                f"--sampling-alpha does nothing with --sampling {self.sampling}; give --sampling proportional"
            )

    def _check_tasks(self) -> None:
        """Refuse unknown tasks in options by task, and tasks that an option does not fit."""
        known = self.known_tasks
        for name in BY_TASK:
            record, _, of_record = name.rpartition(".")
            option = getattr(getattr(self, record) if record else self, of_record)
            for task in option if isinstance(option, dict | list) else ():
                require_known(f"{dashed(name)}: unknown task", task, known)
        auxiliary = [task.name for task in self.find(self.tasks or list(known)) if not task.evaluated]
        if self.tasks is not None and auxiliary and self.reviews is None:
            raise UserError(f"the task {auxiliary[0]} is trained on reviews; give them with --reviews FILE")
        for name in self.tasks or ():
            if head_of := known[name].head_of:
                raise UserError(f"the task {name} is a further dev set of {head_of} and comes with it; give {head_of}")
        if self.tasks is not None and self.tasks == auxiliary:
            raise UserError(f"the task {auxiliary[0]} only helps others: it has no dev split; add a task")
        for task in self.swap_pairs or []:
            if not known[task].is_pair:
                pairs = ", ".join(name for name in known if known[name].is_pair)
                raise UserError(
                    f"--swap-pairs {task}: its examples are single sentences; the tasks with pairs: {pairs}"
                )

    def _check_heads(self) -> None:
        for name, unwanted in (("freeze_layers", self.freeze_layers > 0), ("layer_decay", self.layer_decay < 1)):
            if unwanted and self.mode == "pretrain":
                raise UserError(
                    f"{dashed(name)} {getattr(self, name):g}: --mode pretrain trains no layer; leave one out"
                )
        for task in self.chosen_tasks(self.tasks or list(self.known_tasks)):
            smoothing_of(task, self.label_smoothing)
            require_known("--pooling: unknown pooling", of_task(self.pooling, task.name, "cls"), POOLINGS)
            shared = self.shared_layer is not None and SHARED_LAYERS[self.shared_layer].normalises
            if (shared or HEADS[task.head].normalises) and of_task(self.batch_size, task.name, 2) < 2:
                layer = f"--shared-layer {self.shared_layer}" if shared else f"--heads.{task.name} {task.head}"
                raise UserError(f"--batch-size {self.batch_size}: {layer} normalises over a batch; give at least 2")

    def _check_regularisers(self) -> None:
        if self.rdrop.on and self.smart.on and self.smart.is_freelb:
            raise UserError(
                "--rdrop.alpha and --smart.objective task-loss both put another loss in place of a task's; leave one of"
                " both out"
            )
        none = self.dropout == 0 or (self.dropout is None and self.model is None)
        if self.rdrop.on and none and self.head_dropout == 0:
            raise UserError("--rdrop.alpha compares two dropout masks, and nothing is dropped; give --dropout 0.1")

    def _check_split(self) -> None:
        unwanted = {
            "precision": (self.precision, self.precision == "fp32"),
            "accumulate": (self.accumulate, self.accumulate > 1),
            "mode": (self.mode, self.mode != "finetune"),
            "smart.objective": (self.smart.objective, self.smart.on and self.smart.is_freelb),
        }
        for name, (value, is_set) in unwanted.items() if self.split_master_weights else ():
            if is_set:
                raise UserError(f"{SPLITS}, and {dashed(name)} {value} leaves none; leave one of both out")

    @property
    def own_tasks(self) -> dict[str, Task]:
        """The tasks of the tasks file by name; none without one.

        Raises:
            UserError: the file cannot be read, or a record is wrong.
        """
        return {} if self.tasks_file is None else read_tasks(self.tasks_file)

    @property
    def known_tasks(self) -> dict[str, Task]:
        """The built-in tasks and those of the tasks file, which may take their places."""
        return {**TASKS, **self.own_tasks}

    def find(self, names: Sequence[str]) -> list[Task]:
        """The records of the named tasks (`find_tasks`)."""
        return find_tasks(names, self.known_tasks)

    def batch_size_of(self, task: str) -> int:
        """Examples of a task in one step.

        Raises:
            UserError: there is a batch size for each task, but none for this one.
        """
        size = self.batch_size.get(task) if isinstance(self.batch_size, dict) else self.batch_size
        if size is None:
            raise UserError(f"--batch-size has none for {task}; give it one, or one number for all tasks")
        return 2 * size if task in (self.swap_pairs or []) else size

    def chosen_tasks(self, names: Sequence[str]) -> list[Task]:
        """The named tasks, each with the head and the loss of this run.

        Raises:
            UserError: an unknown name, the same name twice, or no name.
        """
        return [with_head_and_loss(task, self.heads, self.losses) for task in self.find(names)]

    @property
    def trackers(self) -> list[str]:
        """The experiment trackers that get the metrics."""
        return [*(self.log_to or ()), *(["tensorboard"] if self.tensorboard else ())]

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)

    def to_yaml(self) -> str:
        return dump_yaml({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_yaml(cls, path: Path) -> TrainConfig:
        """Read what `to_yaml` wrote; an option that an earlier minbert did not have has its default.

        Raises:
            UserError: no such file, it is not such a record, or a later minbert wrote it.
        """
        if not path.exists():
            raise UserError(f"{path} is missing: {path.parent} is not a run directory of minbert")
        values = without_format(read_yaml(path, "restore it or start a new run"), str(path))
        if values.get("tasks_file") is not None:  # the run's records, whose classes are known
            values["tasks_file"] = str(path.with_name(TASKS_FILE))
        return build(cls, values, str(path))
