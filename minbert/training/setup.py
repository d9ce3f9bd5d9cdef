"""The setup of a training run: `build_data`, `build_model`, `build_optimizer`; `build_trainer` puts them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from minbert.config import SPLITS, TrainConfig
from minbert.data import (
    Encoded,
    Examples,
    Folds,
    Plan,
    Skipped,
    SkippedRow,
    Source,
    TaskSampler,
    WithReviews,
    encode,
    joined,
    open_source,
    plan,
    read_augmented,
    refuse_skipped,
    skipped_rows,
    swapped,
)
from minbert.data.buckets import Buckets
from minbert.data.tokenizer import Tokenizer
from minbert.distributed.process_group import ProcessGroup
from minbert.distributed.sharded_parameters import ShardedParameters
from minbert.distributed.unsharded_parameters import UnshardedParameters
from minbert.errors import UserError
from minbert.files.hub import WEIGHTS, checkpoint_directory
from minbert.methods.surgery import Surgery
from minbert.methods.task_gradients import TaskGradients
from minbert.model import Encoder, EncoderConfig, MultitaskModel, pair_encoding
from minbert.model.parts import parts_of
from minbert.model.weights import check_shapes
from minbert.options_by_task import of_task, task_groups, with_head_and_loss
from minbert.runs.checkpoint import check_fits
from minbert.runs.predictions import stem_of
from minbert.seeds import derive_seed
from minbert.tasks import Task
from minbert.training.batches import Batches, StepSampler
from minbert.training.cuda_graphs import reason_against
from minbert.training.freelb import FreeLB
from minbert.training.loss_options import loss_options
from minbert.training.objective import Objective
from minbert.training.optimizer import AdamW, split_
from minbert.training.trainer import Trainer, cuda_graphs

DEFAULT_TASKS = ("sst", "qqp", "sts")

Checkpoint = str | Path | None  # a directory or a name on the hub; None: from scratch


# Data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """The tasks of a run and their encoded examples, by split and task."""

    source: Source
    tasks: list[Task]
    tokenizer: Tokenizer
    max_length: int
    splits: dict[str, dict[str, Encoded]]  # train, dev and test
    skipped: dict[str, dict[str, list[Skipped]]]  # rows of the splits that were left out

    @property
    def train(self) -> dict[str, Encoded]:
        return self.splits["train"]

    @property
    def skipped_rows(self) -> list[SkippedRow]:
        """The skipped rows of all splits, for RUN/skipped.jsonl."""
        by_task = [(split, name, rows) for split, of in self.skipped.items() for name, rows in of.items()]
        return [row for split, name, rows in by_task for row in skipped_rows(split, name, rows)]


def build_data(config: TrainConfig, checkpoint: Checkpoint = None) -> TrainingData:
    """Read the examples of all splits and encode them with the checkpoint's tokenizer, or one trained on their texts.

    Raises:
        UserError: bad data, options that do not fit it, or a checkpoint whose tokenizer or encoder does not.
    """
    source, tasks = open_tasks(config)
    evaluated = [task for task in tasks if task.evaluated and (not task.head_of or "dev" in source.splits(task))]
    dev = {task.name: source.load(task, "dev") for task in evaluated}
    splits = {
        "train": {task.name: training_examples(task, source, config, dev) for task in tasks if not task.head_of},
        "dev": dev,
        "test": {task.name: source.load(task, "test") for task in tasks if "test" in source.splits(task)},
    }
    skipped = {split: {name: of.skipped for name, of in by_task.items()} for split, by_task in splits.items()}
    if config.strict:
        refuse_skipped([row for by_task in skipped.values() for rows in by_task.values() for row in rows])
    if checkpoint is None:
        columns = [column for e in splits["train"].values() for column in (e.texts, e.pairs) if column is not None]
        texts = (text for column in columns for text in column)
        tokenizer = Tokenizer.train(texts, config.scratch.vocab_size)
    else:
        tokenizer = Tokenizer.from_pretrained(checkpoint)
    encoder_config = find_encoder_config(config, tokenizer, checkpoint)
    check_fits(encoder_config, tokenizer, tasks, config.max_length, checkpoint)
    max_length = config.max_length or encoder_config.max_position_embeddings
    encodings = {task.name: pair_encoding(task) for task in tasks}
    encoded = {
        split: {
            name: encode(examples, tokenizer, max_length, pair_encoding=encodings[name])
            for name, examples in by_task.items()
        }
        for split, by_task in splits.items()
    }
    return TrainingData(source, tasks, tokenizer, max_length, encoded, skipped)


def open_tasks(config: TrainConfig) -> tuple[Source, list[Task]]:
    """Where the data is, and the tasks to train on it.

    Raises:
        UserError: no such data or task, or an option that is about a task which is not trained.
    """
    own = config.own_tasks
    source = open_source(config.data, own)
    if config.folds is not None:
        if config.fold is None:
            raise UserError(f"--folds {config.folds} is of several runs: minbert.cross_validation; give one's --fold")
        source = Folds(source, config.folds, config.fold - 1)
    usual = [name for name in DEFAULT_TASKS if name in source.tasks() and name not in own]
    names = config.tasks or [*usual, *own] or source.tasks()
    if config.reviews is not None:
        source = WithReviews(source, config.reviews, config.reviews_per_star, config.seed)
        names = names if WithReviews.task in names else [*names, WithReviews.task]
    tasks = [with_head_and_loss(source.complete(task), config.heads, config.losses) for task in config.find(names)]
    for option in ("loss_weights", "sampling_weights", "swap_pairs", "augmented", "label_smoothing"):
        value = getattr(config, option)
        for name in value if isinstance(value, dict | list) else ():
            if name not in names:
                raise UserError(f"--{option.replace('_', '-')} names {name}; the tasks of this run: {', '.join(names)}")
    for name in names:
        config.batch_size_of(name)
    by_stem: dict[str, Task] = {}
    for task in tasks:
        if (other := by_stem.setdefault(stem_of(task), task)) is not task:
            raise UserError(
                f"tasks {other.name} and {task.name} both write predictions/{stem_of(task)}-dev.jsonl; give the one of"
                " your own another name"
            )
    return source, tasks


def training_examples(task: Task, source: Source, config: TrainConfig, dev: Mapping[str, Examples]) -> Examples:
    """A task's training examples, and those that its options add."""
    examples = source.load(task, "train")
    file = (config.augmented or {}).get(task.name)
    if file is not None:
        held_out = set(dev[task.name].ids) if task.name in dev else ()
        in_a_fold = config.folds is not None
        examples = joined(examples, read_augmented(file, task, examples, held_out, leave_out=in_a_fold))
    return joined(examples, swapped(examples)) if task.name in (config.swap_pairs or ()) else examples


def find_encoder_config(config: TrainConfig, tokenizer: Tokenizer, checkpoint: Checkpoint = None) -> EncoderConfig:
    """The shape of the checkpoint's encoder, or of the one that --scratch describes.

    Raises:
        UserError: the checkpoint's configuration and weights do not fit each other.
    """
    if checkpoint is not None:
        directory = checkpoint_directory(checkpoint, WEIGHTS)
        encoder_config = EncoderConfig.from_json(directory / "config.json")
        check_shapes(encoder_config, directory)
        return encoder_config
    # BERT's 0.02 suits a width of 768: a narrow encoder learns sooner when its products start at unit scale.
    spread = config.scratch.hidden_size**-0.5
    shape = {**asdict(config.scratch), "vocab_size": tokenizer.vocab_size, "initializer_range": spread}
    return EncoderConfig(**shape).with_dropout(config.dropout or 0.0)


def build_plan(config: TrainConfig, data: TrainingData) -> Plan:
    """Which tasks take each step."""
    sizes = {name: len(encoded) for name, encoded in data.train.items()}
    end = config.sampling_alpha_end
    return plan(
        sizes,
        {name: config.batch_size_of(name) * config.accumulate for name in sizes},
        order=config.sampling,
        length=config.epoch_length,
        times=config.epoch_times,
        weights=config.sampling_weights,
        alphas=(config.sampling_alpha, config.sampling_alpha if end is None else end),
        seed=config.seed,
        epochs=config.epochs,
        steps=config.steps,
    )


# Model ------------------------------------------------------------------------------------------------------------


def build_model(
    config: TrainConfig, data: TrainingData, checkpoint: Checkpoint = None, device: torch.device | str = "cpu"
) -> MultitaskModel:
    """The encoder of a checkpoint, or a small one from scratch, with a new head for each task.

    New weights are drawn from torch's default generator, seeded here.

    Raises:
        UserError: a bad checkpoint, more layers to freeze than it has, or a task that has nothing to train.
    """
    pooler = any(of_task(config.pooling, task.name, "cls") == "pooler" for task in data.tasks)
    torch.default_generator.manual_seed(derive_seed(config.seed, "weights"))
    if checkpoint is None:
        encoder = Encoder(find_encoder_config(config, data.tokenizer), pooler=pooler)
    else:
        encoder = Encoder.from_pretrained(checkpoint, pooler=True if pooler else None, dropout=config.dropout)
    encoder.compute_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    torch.default_generator.manual_seed(derive_seed(config.seed, "heads"))
    model = MultitaskModel(
        encoder,
        data.tasks,
        pooling=config.pooling,
        head_dropout=config.head_dropout,
        shared_layer=config.shared_layer,
    ).to(device)
    if config.mode == "pretrain":
        model.freeze_encoder()
    layers = len(encoder.layers)
    if config.freeze_layers > layers:
        raise UserError(
            f"--freeze-layers {config.freeze_layers}: the encoder has {layers} layers; give at most {layers}"
        )
    model.freeze_layers(config.freeze_layers)
    for task in model.tasks.values():
        if not model.parameters_of(task.name):
            option, instead = "--mode pretrain", "--mode finetune"
            if config.mode == "finetune":
                option, instead = f"--freeze-layers {config.freeze_layers}", "fewer layers"
            raise UserError(
                f"{option} leaves nothing to train for {task.name}: its head {task.head} has no parameters;"
                f" give another --heads.{task.name}, or {instead}"
            )
    return model


# Optimizer --------------------------------------------------------------------------------------------------------


def default_learning_rate(config: TrainConfig, hidden_size: int) -> float:
    """5e-5 to fine-tune a model as wide as BERT-base, more for a narrower one; 1.5e-3 from scratch; 1e-3 for heads."""
    if config.mode == "pretrain":
        return 1e-3
    if config.model is None:
        return 1.5e-3
    return min(1e-3, 5e-5 * (768 / hidden_size) ** 2)


def build_optimizer(
    config: TrainConfig, model: MultitaskModel, rows: int, group: ProcessGroup
) -> tuple[AdamW, UnshardedParameters | ShardedParameters]:
    """AdamW for the model's parameters, of which several ranks each own a shard; and where their gradients are.

    Args:
        config: with a learning rate.
        rows: task gradients of the parameters that the tasks share.
    """
    assert config.lr is not None
    param_groups = model.parameter_groups(config.weight_decay, by_layer=config.layer_decay < 1)
    for param_group in param_groups:
        of_heads = param_group["name"].startswith("heads.")
        peak = config.head_lr if config.head_lr and of_heads else config.lr
        param_group["lr"] = peak * config.layer_decay ** param_group["depth"]
    one_stream = config.accumulate == 1 and not config.low_memory
    # What is read in half precision has such gradients: a sum over several backwards needs more.
    one_backward = (one_stream or (config.accumulate == 1 and rows > 1)) and not config.smart.repeats_backward
    low_bits = split_(_matrices_to_split(config, model, one_backward, group)) if config.split_master_weights else {}
    copies = model.encoder.copies() if one_backward else {}
    parameters: UnshardedParameters | ShardedParameters = UnshardedParameters(model.heads, copies)
    if group.world_size > 1:
        trunk = [param for param in model.trunk.parameters() if param.requires_grad]
        parameters = ShardedParameters(
            list(model.heads.parameters()), trunk, rows, group, copies, model.encoder.embeddings.word
        )
        parameters.all_gather_masters()  # every rank starts with the same parameters
        parameters.all_gather()
    optimizer = AdamW(
        parameters.param_groups(param_groups),
        lr=config.lr,
        eps=config.adam_eps,
        ema_decay=config.bregman.beta if config.bregman.mu else None,
        copies=parameters.optimizer_copies,
        low_bits=low_bits,
    )
    if config.bregman.mu:
        parameters.keep_ema(optimizer)
    parameters.register_hooks(TaskGradients(model.trunk, rows, parameters.copies))
    model.encoder.embeddings.sparse_gradient = group.device.type == "cpu" and group.backend == "gloo"
    return optimizer, parameters


def _matrices_to_split(
    config: TrainConfig, model: MultitaskModel, one_backward: bool, group: ProcessGroup
) -> list[Tensor]:
    """The matrices that --split-master-weights splits.

    Raises:
        UserError: there are none, or several processes, whose shards are in float32.
    """
    if group.world_size > 1:
        raise UserError(f"--split-master-weights is for one process, and this run has {group.world_size}; leave it out")
    matrices = model.encoder.cast_weights() if one_backward else []
    if not matrices:
        raise UserError(f"{SPLITS}, and this run in {config.precision} has none; leave it out")
    return matrices


# All together -----------------------------------------------------------------------------------------------------


def build_trainer(
    config: TrainConfig,
    data: TrainingData,
    sampling: Plan,
    model: MultitaskModel,
    surgeries: list[Surgery],
    group: ProcessGroup,
) -> Trainer:
    """Everything that a training step works with.

    Raises:
        ValueError: an id of a training example is outside the encoder's tables.
    """
    for examples in data.train.values():
        model.encoder.check_ids(examples.id_ranges)
    groups = task_groups(data.tasks, config.surgery_groups)
    per_task = any(surgery.per_task for surgery in surgeries)
    rows = len(groups) if per_task else 1
    parts = parts_of(model, config.surgery_scope)
    for surgery in surgeries:
        surgery.prepare(rows, group.device, None if parts is None else len(parts.names))
    optimizer, parameters = build_optimizer(config, model, rows, group)
    l2 = {task.name: of_task(config.l2, task.name, 0.0) for task in data.tasks}
    options = loss_options(data.tasks, data.train, config.label_smoothing, group.device)
    of_objective = FreeLB if config.smart.repeats_backward else Objective
    methods = config.smart, config.bregman, parameters.ema, parameters.copies
    objective = of_objective(model, *methods, config.loss_weights, l2, options, config.rdrop)
    objective.share = 1 / (config.accumulate * group.world_size)
    graphs = None
    if group.device.type == "cuda" and reason_against(config, model.encoder.config, group) is None:
        graphs = cuda_graphs(objective, parameters.gradients, group.device)
    samplers = {
        name: TaskSampler(len(encoded), config.batch_size_of(name), config.seed, name)
        for name, encoded in data.train.items()
    }
    return Trainer(
        StepSampler(sampling, samplers, [task for tasks in groups for task in tasks], config.accumulate),
        Batches(
            data.train,
            groups,
            per_task and rows > 1,
            config.smart,
            config.seed,
            config.low_memory,
            Buckets(data.train, data.max_length) if graphs is not None else None,
            group,
            config.rdrop,
        ),
        objective,
        parameters,
        optimizer,
        surgeries,
        config.clip_norm,
        graphs,
        parts and parts._replace(numbers=parameters.by_shard(parts.numbers)),
    )
