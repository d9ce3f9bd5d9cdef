"""What a run is made of: one frozen record of options that refuses nonsense when it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from minbert.errors import UserError, require
from minbert.smart import BregmanConfig, SmartConfig
from minbert.surgery import find_surgery
from minbert.tasks import Task, find_tasks


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
        batch_size: examples of each task in one step.
        lr: peak learning rate; left out, 5e-5 for a pretrained model as wide as BERT-base (growing with the square of
            how much narrower a model is), and 1e-3 from scratch or with a frozen encoder.
        seed: everything random follows from it.
        precision: arithmetic of the encoder; auto takes bf16 where the processor has it.
        device: auto, cpu, cuda or cuda:N.
        backend: auto takes compiled kernels where there are some; reference is plain PyTorch.
        threads: CPU threads; torch's own choice when left out.
        mode: finetune trains everything, pretrain freezes the encoder and trains the heads.
        surgery: how the tasks' gradients become one update: sum, mean, pcgrad, gse (a pcgrad update with the mean, then
            one with the sum), or MODULE:NAME of a callable from Gram matrix to weights, such as TorchJD's weightings.
        surgery_reduction: whether pcgrad sums the projected gradients or takes their mean.
        surgery_groups: tasks whose gradients surgery sees as one, joined by +, such as sst+qqp+sts,cfimdb; left out,
            each task is its own.
        low_memory: run task after task instead of all in one stream.
        accumulate: batches of each task in one update.
        cuda_graphs: on a GPU, replay forward and backward as CUDA graphs, with batches padded to few different numbers
            of tokens; only where a step is one stream and one batch.
        smart: smoothness-inducing adversarial regularisation; --smart.lambda-s 0 turns it off.
        bregman: momentum Bregman proximal point method; off unless --bregman.mu is given.
        sampling: joint takes a batch of every task in each step; round-robin and shuffled take one task a step.
        epoch_length: steps of an epoch follow the smallest task, the largest, or are this many batches per task.
        pooling: how a sequence becomes one vector.
        max_length: tokens kept of each example; the model's position limit when left out.
        dropout: dropout of the encoder; when left out, a pretrained model's own, and none from scratch.
        head_dropout: dropout before each task head.
        schedule: what the learning rate does after warm-up.
        warmup: share of the steps in which the learning rate rises from zero.
        weight_decay: decoupled weight decay on matrices.
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
    batch_size: int = 32
    lr: float | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    backend: Literal["auto", "reference"] = "auto"
    threads: int | None = None
    mode: Literal["finetune", "pretrain"] = "finetune"
    surgery: str = "pcgrad"
    surgery_reduction: Literal["sum", "mean"] = "sum"
    surgery_groups: list[str] | None = None
    low_memory: bool = False
    accumulate: int = 1
    cuda_graphs: bool = True
    smart: SmartConfig = field(default_factory=SmartConfig)
    bregman: BregmanConfig = field(default_factory=BregmanConfig)
    sampling: Literal["joint", "round-robin", "shuffled"] = "joint"
    epoch_length: Literal["smallest", "largest"] | int = "smallest"
    pooling: Literal["cls", "mean", "max", "pooler"] = "cls"
    max_length: int | None = None
    dropout: float | None = None
    head_dropout: float = 0.1
    schedule: Literal["linear", "constant"] = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    max_skipped: int = 10
    checkpoint_steps: int = 200
    log_steps: int = 10
    tensorboard: bool = False
    scratch: ScratchConfig = field(default_factory=ScratchConfig)

    def __post_init__(self) -> None:
        if self.tasks is not None:
            find_tasks(self.tasks)
        for name in ("epochs", "batch_size", "max_skipped", "checkpoint_steps", "log_steps", "accumulate"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("steps", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1", value)
        require(self.max_length is None or self.max_length >= 4, "max_length", "at least 4", self.max_length)
        require(self.lr is None or 0 < self.lr < 1, "lr", "between 0 and 1", self.lr)
        for name in ("weight_decay", "clip_norm"):
            require(0 <= getattr(self, name) < float("inf"), name, "0 or more", getattr(self, name))
        for name in ("dropout", "head_dropout", "warmup"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, name, "at least 0 and below 1", value)
        if isinstance(self.epoch_length, int):
            require(self.epoch_length >= 1, "epoch_length", "smallest, largest or at least 1", self.epoch_length)
        surgeries = find_surgery(self.surgery, self.surgery_reduction)
        if self.sampling != "joint" and any(surgery.per_task for surgery in surgeries):
            raise UserError(
                f"--surgery {self.surgery} needs a batch of every task in each step, and --sampling {self.sampling}"
                " takes one task a step; give --surgery sum, or --sampling joint"
            )
        if self.surgery_groups is not None and self.tasks is not None:
            task_groups(find_tasks(self.tasks), self.surgery_groups)
        require(0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1", self.seed)
        require(not (self.resume and self.out is None), "out", "given with --resume: it names the run", None)

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    @classmethod
    def from_yaml(cls, path: Path) -> TrainConfig:
        """Read what `to_yaml` wrote.

        Raises:
            UserError: no such file, or it is not such a record.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            nested = {name: kind(**values[name]) for name, kind in NESTED.items()}
            return cls(**{**values, **nested})
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {path.parent} is not a run directory of minbert") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is damaged ({str(error).splitlines()[0]}); restore it or start a new run"
            ) from None


NESTED = {"scratch": ScratchConfig, "smart": SmartConfig, "bregman": BregmanConfig}


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
