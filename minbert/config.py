"""What a run is made of: one frozen record of options that refuses nonsense when it is built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from minbert.errors import UserError
from minbert.tasks import find_tasks


def _require(ok: bool, option: str, expected: str, got: object) -> None:
    if not ok:
        raise UserError(f"--{option.replace('_', '-')} must be {expected}, got {got}")


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
            _require(value > 0, f"scratch.{name}", "positive", value)


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
    scratch: ScratchConfig = field(default_factory=ScratchConfig)

    def __post_init__(self) -> None:
        if self.tasks is not None:
            find_tasks(self.tasks)
        for name in ("epochs", "batch_size", "max_skipped", "checkpoint_steps", "log_steps"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("steps", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        _require(self.max_length is None or self.max_length >= 4, "max_length", "at least 4", self.max_length)
        _require(self.lr is None or 0 < self.lr < 1, "lr", "between 0 and 1", self.lr)
        for name in ("weight_decay", "clip_norm"):
            _require(0 <= getattr(self, name) < float("inf"), name, "0 or more", getattr(self, name))
        for name in ("dropout", "head_dropout", "warmup"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, name, "at least 0 and below 1", value)
        if isinstance(self.epoch_length, int):
            _require(self.epoch_length >= 1, "epoch_length", "smallest, largest or at least 1", self.epoch_length)
        _require(0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1", self.seed)
        _require(not (self.resume and self.out is None), "out", "given with --resume: it names the run", None)

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
            return cls(**{**values, "scratch": ScratchConfig(**values["scratch"])})
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {path.parent} is not a run directory of minbert") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is damaged ({str(error).splitlines()[0]}); restore it or start a new run"
            ) from None
