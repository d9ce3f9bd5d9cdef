"""What a run is made of: one frozen record of options that refuses nonsense when it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from minbert.errors import UserError, require
from minbert.files.json_yaml import read_yaml
from minbert.files.validation import FORMAT, build, without_format
from minbert.methods.smart import BregmanConfig, SmartConfig
from minbert.methods.surgery import check_surgery, needs_task_gradients
from minbert.model import HEADS, POOLINGS, SHARED_LAYERS
from minbert.task_options import check_known, check_tasks, chosen, of_task
from minbert.tasks import TASKS, Task, find_tasks


@dataclass(frozen=True)
class ScratchConfig:
    """The encoder built when no pretrained model is given.

    Args:
        vocab_size: WordPiece vocabulary learned from the training texts, at most this many pieces.
        hidden_size: width of the token stream.
        num_hidden_layers: transformer layers.
        num_attention_heads: attention heads; must divide hidden_size.
        intermediate_size: width of the feed-forward layers.
    """

    vocab_size: int = 8000
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 512

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(value > 0, f"scratch.{name}", "positive", value)


@dataclass(frozen=True)
class TrainConfig:
    """Options of `python -m minbert.train`; the command line beats --config, which beats --recipe.

    Args:
        data: directory of CS224N files or GLUE folders, or a hub name; the built-in demo corpus when left out.
        tasks: tasks to train, in order, such as sst,qqp,sts; when left out, those of them that the data holds.
        model: directory or hub name of a pretrained BERT; a small encoder from scratch when left out.
        recipe: named options of minbert, taken before --config and the command line.
        out: run directory to create; runs/<date>-<time> when left out.
        resume: continue the run in --out from its last checkpoint.
        epochs: passes over the data, each of epoch_length steps.
        steps: stop after this many optimizer steps in all, whatever epochs says.
        batch_size: examples of each task in one step, or a number for each, such as {sst: 2, qqp: 20, sts: 2}.
        lr: peak learning rate; left out, 5e-5 for a pretrained model as wide as BERT-base (growing with the square of
            how much narrower a model is), 1.5e-3 from scratch, and 1e-3 with a frozen encoder.
        head_lr: peak learning rate of the heads; lr when left out.
        seed: everything random follows from it.
        precision: arithmetic of the encoder; auto takes bf16 where the processor has it.
        device: auto, cpu, cuda or cuda:N.
        backend: auto takes compiled kernels where there are some; reference is plain PyTorch.
        matmul: library of float32 matrix products on CPUs: torch's BLAS, or oneDNN; auto times both as a run in fp32
            begins, unless its encoder is narrow, and records the faster.
        threads: CPU threads; torch's own choice when left out.
        mode: finetune trains everything, pretrain freezes the encoder and trains the heads.
        surgery: how the tasks' gradients become one update: sum, mean, pcgrad, gse (a pcgrad update with the mean, then
            one with the sum), or MODULE:NAME of a callable from Gram matrix to weights, such as TorchJD's weightings,
            with arguments if need be: MODULE:NAME(c=0.4). It is imported and called: from the command line only, unless
            --allow-code is given there.
        surgery_reduction: whether pcgrad sums the projected gradients or takes their mean.
        surgery_groups: tasks whose gradients surgery sees as one, joined by +, such as sst+qqp+sts,cfimdb; left out,
            each task is its own.
        low_memory: run task after task instead of all in one stream.
        accumulate: batches of each task in one update.
        timeout: seconds for which a process may be silent before the others give it up.
        cuda_graphs: on a GPU, replay forward and backward as CUDA graphs, with batches padded to few different numbers
            of tokens; only where a step is one stream and one batch.
        smart: smoothness-inducing adversarial regularisation; --smart.lambda-s 0 turns it off.
        bregman: momentum Bregman proximal point method; off unless --bregman.mu is given.
        loss_weights: what a task's loss is multiplied by, such as {sst: 2}; 1 where left out.
        optimizers: shared has one AdamW for all tasks; per-task gives each task moments, step counts and a learning
            rate schedule of its own (for one task a step).
        sampling: joint takes a batch of every task in each step, the others one task a step: round-robin in turn,
            sequential all of an epoch's batches of one task and then of the next, shuffled those of all tasks in a
            random order, proportional draws the task of every step.
        sampling_alpha: proportional draws a task with n examples in proportion to n^alpha: 0 draws all tasks alike; a
            temperature T is an alpha of 1/T.
        sampling_alpha_end: alpha of the last epoch, reached in even steps, such as 0.2 after 1 (Stickland and Murray
            2019, "annealed sampling"); left out, alpha stays.
        sampling_weights: how many times as often a task takes a step, such as {sst: 2}; 1 where left out.
        epoch_length: batches of each task in an epoch follow the smallest task, the largest, each task itself, or are
            this many.
        epoch_times: how many times as many batches as epoch_length says.
        swap_pairs: pair tasks, such as sts, whose training pairs are doubled by each pair with its sentences swapped,
            and whose batch size is doubled with them.
        augmented: files of further training examples by task, such as {sst: FILE}: tab-separated with the columns of
            the task's training file, or a JSON object with them on each line; a row without a label takes that of the
            training example whose id it has.
        reviews: file of reviews with 1 to 5 stars, which adds the task yelp to the others: JSON objects on lines, or
            CSV with a header, with stars and text. Never evaluated.
        reviews_per_star: reviews drawn for each number of stars.
        strict: start no run whose data has a row that cannot be used; else such rows are left out and named.
        heads: by task, how pooled vectors become outputs, such as {qqp: concatenated, sts: cosine}; it decides whether
            a pair is read as one sequence or each sentence by itself; linear for tasks left out.
        losses: by task, what is minimised, such as {sts: cosine_embedding}; the task's own for tasks left out.
        l2: weight of the L2 norm of a task's parameters in its loss, or one for each task, such as {qqp: 0.1}.
        shared_layer: a layer between pooling and every head: linear (with ReLU), or transform (linear, BatchNorm, GELU,
            dropout); none when left out.
        pooling: how a sequence becomes one vector: cls, mean, max or pooler; or by task, cls for those left out.
        max_length: tokens kept of each sequence; the model's position limit when left out.
        dropout: dropout of the encoder; when left out, a pretrained model's own, and none from scratch.
        head_dropout: dropout before each task head.
        schedule: what the learning rate does after warm-up.
        warmup: share of the steps in which the learning rate rises from zero.
        weight_decay: decoupled weight decay on matrices.
        adam_eps: what AdamW adds to the square root of the second moment.
        clip_norm: gradients are scaled down to this norm; 0 leaves them.
        max_skipped: give up after this many steps in a row with a non-finite loss or gradient.
        checkpoint_steps: steps between two checkpoints; every epoch also ends with one.
        log_steps: steps between two lines of metrics.jsonl.
        tensorboard: whether to write the metrics for TensorBoard too, to RUN/tensorboard.
        scratch: the encoder built when no pretrained model is given.
    """

    data: str | None = None
    tasks: list[str] | None = None
    model: str | None = None
    recipe: str | None = None
    out: str | None = None
    resume: bool = False
    epochs: int = 3
    steps: int | None = None
    batch_size: int | dict[str, int] = 32
    lr: float | None = None
    head_lr: float | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    backend: Literal["auto", "reference"] = "auto"
    matmul: Literal["auto", "blas", "onednn"] = "auto"
    threads: int | None = None
    mode: Literal["finetune", "pretrain"] = "finetune"
    surgery: str = "pcgrad"
    surgery_reduction: Literal["sum", "mean"] = "sum"
    surgery_groups: list[str] | None = None
    low_memory: bool = False
    accumulate: int = 1
    timeout: float = 600.0
    cuda_graphs: bool = True
    smart: SmartConfig = field(default_factory=SmartConfig)
    bregman: BregmanConfig = field(default_factory=BregmanConfig)
    loss_weights: dict[str, float] | None = None
    optimizers: Literal["shared", "per-task"] = "shared"
    sampling: Literal["joint", "round-robin", "sequential", "shuffled", "proportional"] = "joint"
    sampling_alpha: float = 1.0
    sampling_alpha_end: float | None = None
    sampling_weights: dict[str, float] | None = None
    epoch_length: Literal["smallest", "largest", "each"] | int = "smallest"
    epoch_times: int = 1
    swap_pairs: list[str] | None = None
    augmented: dict[str, str] | None = None
    reviews: str | None = None
    reviews_per_star: int = 500
    strict: bool = False
    heads: dict[str, str] = field(default_factory=dict)
    losses: dict[str, str] = field(default_factory=dict)
    l2: float | dict[str, float] = 0.0
    shared_layer: Literal["linear", "transform"] | None = None
    pooling: str | dict[str, str] = "cls"
    max_length: int | None = None
    dropout: float | None = None
    head_dropout: float = 0.1
    schedule: Literal["linear", "constant"] = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    adam_eps: float = 1e-8
    clip_norm: float = 1.0
    max_skipped: int = 10
    checkpoint_steps: int = 200
    log_steps: int = 10
    tensorboard: bool = False
    scratch: ScratchConfig = field(default_factory=ScratchConfig)

    def __post_init__(self) -> None:
        if self.tasks is not None:
            find_tasks(self.tasks)
        counts = ("epochs", "max_skipped", "checkpoint_steps", "log_steps", "accumulate", "epoch_times")
        for name in (*counts, "reviews_per_star"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        sizes = self.batch_size if isinstance(self.batch_size, dict) else {None: self.batch_size}
        for task, size in sizes.items():
            require(size >= 1, f"batch_size{f'.{task}' if task else ''}", "at least 1", size)
        for name in ("steps", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        require(self.max_length is None or self.max_length >= 4, "max_length", "at least 4", self.max_length)
        for name in ("lr", "head_lr", "adam_eps"):
            value = getattr(self, name)
            require(value is None or 0 < value < 1, name, "between 0 and 1", value)
        require(0 < self.timeout < float("inf"), "timeout", "more than 0", self.timeout)
        for name in ("weight_decay", "clip_norm"):
            require(0 <= getattr(self, name) < float("inf"), name, "0 or more", getattr(self, name))
        for name in ("dropout", "head_dropout", "warmup"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, name, "at least 0 and below 1", value)
        if isinstance(self.epoch_length, int):
            require(self.epoch_length >= 1, "epoch_length", "smallest, largest, each or at least 1", self.epoch_length)
        self._check_sampling()
        self._check_tasks_named()
        self._check_heads()
        check_surgery(self.surgery)
        if self.sampling != "joint" and needs_task_gradients(self.surgery):
            raise UserError(
                f"--surgery {self.surgery} needs a batch of every task in each step, and --sampling {self.sampling}"
                " takes one task a step; give --surgery sum, or --sampling joint"
            )
        if self.surgery_groups is not None and self.tasks is not None:
            task_groups(find_tasks(self.tasks), self.surgery_groups)
        require(0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1", self.seed)
        require(not (self.resume and self.out is None), "out", "given with --resume: it names the run", None)

    def _check_sampling(self) -> None:
        """Refuse options that the way of sampling has no use for."""
        if self.sampling == "joint":
            for name, unwanted, instead in (
                ("optimizers", self.optimizers == "per-task", "--optimizers shared"),
                ("epoch_length", self.epoch_length == "each", "--epoch-length smallest or largest"),
                ("sampling_weights", self.sampling_weights, "--loss-weights to weigh a task's loss"),
            ):
                if unwanted:
                    raise UserError(
                        f"--{name.replace('_', '-')} {getattr(self, name)} needs one task a step, and --sampling joint"
                        f" takes all of them in each; give {instead}, or another --sampling"
                    )
        for name in ("sampling_alpha", "sampling_alpha_end"):
            value = getattr(self, name)
            require(value is None or 0 <= value < float("inf"), name, "0 or more", value)
        if self.sampling != "proportional" and (self.sampling_alpha, self.sampling_alpha_end) != (1.0, None):
            raise UserError(
                f"--sampling-alpha does nothing with --sampling {self.sampling}; give --sampling proportional"
            )

    def _check_tasks_named(self) -> None:
        """Refuse unknown tasks, and values out of range, in the options that say something of each task."""
        sizes = self.batch_size if isinstance(self.batch_size, dict) else {}
        weights = {"loss_weights": self.loss_weights or {}, "sampling_weights": self.sampling_weights or {}}
        named: dict[str, Iterable[str]] = {**weights, "batch_size": sizes, "augmented": self.augmented or {}}
        for option, tasks in {**named, "swap_pairs": self.swap_pairs or []}.items():
            for task in tasks:
                check_known(f"--{option.replace('_', '-')}", "task", task, TASKS)
        if self.tasks is not None and "yelp" in self.tasks and self.reviews is None:
            raise UserError("the task yelp is trained on reviews; give them with --reviews FILE")
        if self.tasks == ["yelp"]:
            raise UserError("the task yelp only helps others: it has no dev split; add a task")
        for option, values in weights.items():
            for task, value in values.items():
                require(0 < value < float("inf"), f"{option}.{task}", "more than 0", value)
        for task in self.swap_pairs or []:
            if not TASKS[task].is_pair:
                pairs = ", ".join(name for name, known in TASKS.items() if known.is_pair)
                raise UserError(
                    f"--swap-pairs {task}: its examples are single sentences; the tasks with pairs: {pairs}"
                )

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
        return [chosen(task, self.heads, self.losses) for task in find_tasks(names)]

    def _check_heads(self) -> None:
        for option in ("heads", "losses", "pooling", "l2"):
            check_tasks(f"--{option}", getattr(self, option))
        tasks = self.chosen_tasks(self.tasks or list(TASKS))
        for task in tasks:
            check_known("--pooling", "pooling", of_task(self.pooling, task.name, "cls"), POOLINGS)
            weight = of_task(self.l2, task.name, 0.0)
            require(0 <= weight < float("inf"), "l2", "0 or more", weight)
            shared = self.shared_layer is not None and SHARED_LAYERS[self.shared_layer].normalises
            if (shared or HEADS[task.head].normalises) and of_task(self.batch_size, task.name, 2) < 2:
                layer = f"--shared-layer {self.shared_layer}" if shared else f"--heads.{task.name} {task.head}"
                raise UserError(f"--batch-size {self.batch_size}: {layer} normalises over a batch; give at least 2")

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)

    def to_yaml(self) -> str:
        return yaml.safe_dump({"format": FORMAT, **dataclasses.asdict(self)}, sort_keys=False)

    @classmethod
    def from_yaml(cls, path: Path) -> TrainConfig:
        """Read what `to_yaml` wrote; an option that an earlier minbert did not have has its default.

        Raises:
            UserError: no such file, it is not such a record, or a later minbert wrote it.
        """
        if not path.exists():
            raise UserError(f"{path} is missing: {path.parent} is not a run directory of minbert")
        values = read_yaml(path, "restore it or start a new run")
        return build(cls, without_format(values, str(path)), str(path))


def task_groups(tasks: Sequence[Task], groups: Sequence[str] | None) -> list[list[Task]]:
    """The tasks by --surgery-groups, in its order; each its own group without it.

    Raises:
        UserError: a group names an unknown task, a task is in two groups, or one is in none.
    """
    if groups is None:
        return [[task] for task in tasks]
    by_name = {task.name: task for task in tasks}
    names = [group.split("+") for group in groups]
    flat = [name for group in names for name in group]
    if sorted(flat) != sorted(by_name):
        raise UserError(
            f"--surgery-groups must hold each of the tasks {', '.join(by_name)} once, joined by +;"
            f" got {', '.join(groups)}"
        )
    return [[by_name[name] for name in group] for group in names]
