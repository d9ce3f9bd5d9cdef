"""Everything a run works with, made ready from its options: data, model, optimizer, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

import minbert
from minbert import kernels
from minbert.config import TrainConfig, task_groups
from minbert.console import data_table
from minbert.data import (
    Encoded,
    Examples,
    SkippedRow,
    Source,
    WithReviews,
    encode,
    joined,
    open_source,
    read_augmented,
    refuse_skipped,
    skipped_lines,
    skipped_rows,
    swapped,
)
from minbert.data.tokenizer import Tokenizer
from minbert.device import describe, resolve_precision
from minbert.distributed.process_group import ProcessGroup
from minbert.distributed.sharded_parameters import OptimizerState, ShardedParameters
from minbert.errors import UserError
from minbert.methods.smart import embedding_scale, rounds_away
from minbert.methods.surgery import find_surgery
from minbert.methods.task_gradients import TaskGradients
from minbert.model import Encoder, EncoderConfig, MultitaskModel, load_heads, pair_encoding
from minbert.options_by_task import of_task
from minbert.runs import checkpoint
from minbert.runs.checkpoint import Progress
from minbert.runs.run_directory import Run
from minbert.seeds import derive_seed
from minbert.tasks import TASKS, Task
from minbert.training.objective import Objective
from minbert.training.optimizer import AdamW
from minbert.training.step import Stepper

DEFAULT_TASKS = ("sst", "qqp", "sts")


@dataclass(frozen=True)
class Workbench:
    """All that a run works with."""

    config: TrainConfig  # every choice that was left open is made
    tasks: list[Task]
    source: Source
    tokenizer: Tokenizer
    model: MultitaskModel
    optimizer: AdamW
    stepper: Stepper
    arena: ShardedParameters | None  # where there are several ranks
    group: ProcessGroup
    train: dict[str, Encoded]
    dev: dict[str, Encoded]
    test: dict[str, Encoded]
    skipped: list[SkippedRow]  # rows of the splits that were left out
    device: torch.device
    max_length: int

    def save(self, path: Path, progress: Progress) -> None:
        """Write a checkpoint, once for all ranks, which have to call this together."""
        state: OptimizerState = (
            self.optimizer.state if self.arena is None else self.arena.gather_full_state(self.optimizer.state)
        )
        if self.group.is_main:
            checkpoint.save(path, self.model, self.tokenizer, state, progress, self.stepper.surgeries)

    def load(self, path: Path) -> None:
        """Take over a checkpoint's heads, and the state of its optimizer and its surgery."""
        load_heads(self.model, path / "heads.safetensors")
        state = checkpoint.load_state(path, self.model)
        self.optimizer.load(state if self.arena is None else self.arena.shard_state(state))
        for surgery in self.stepper.surgeries:
            if surgery.weighting is not None:
                surgery.weighting.load(path, self.device)


def prepare(config: TrainConfig, run: Run, console: Console, group: ProcessGroup) -> Workbench:
    """Read the data, build or load the model, and settle what `config` left open. Nothing is written.

    The weights are drawn from torch's default generator, which stays as it is then.

    Raises:
        UserError: bad data, a bad model directory, or options that do not fit them.
    """
    device = group.device
    surgeries = find_surgery(config.surgery, config.surgery_reduction)
    precision = resolve_precision(config.precision, device)
    console.print(f"minbert {minbert.__version__} on {describe(device, precision)}")
    if group.world_size > 1:
        console.print(f"{group.world_size} processes over {group.backend}")

    source, tasks = open_tasks(config)
    dev = {task.name: source.load(task, "dev") for task in tasks if task.evaluated}
    splits = {
        "train": {task.name: training_examples(task, source, config, dev) for task in tasks},
        "dev": dev,
        "test": {task.name: source.load(task, "test") for task in tasks if "test" in source.splits(task)},
    }
    if config.strict:
        refuse_skipped([row for of in splits.values() for examples in of.values() for row in examples.skipped])

    pooler = any(of_task(config.pooling, task.name, "cls") == "pooler" for task in tasks)
    torch.default_generator.manual_seed(derive_seed(config.seed, "weights"))
    goes_on = config.resume and run.last.exists()
    start = run.last if goes_on else config.model
    if start is not None:
        tokenizer = Tokenizer.from_pretrained(start)
        encoder = Encoder.from_pretrained(start, pooler=True if pooler else None, dropout=config.dropout)
    else:
        texts = [text for e in splits["train"].values() for text in (*e.texts, *(e.pairs or ()))]
        tokenizer = Tokenizer.train(texts, config.scratch.vocab_size)
        # BERT's 0.02 suits a width of 768: a narrow encoder learns sooner when its products start at unit scale.
        spread = config.scratch.hidden_size**-0.5
        shape = {**asdict(config.scratch), "vocab_size": tokenizer.vocab_size, "initializer_range": spread}
        encoder_config = EncoderConfig(**shape).with_dropout(config.dropout or 0.0)
        encoder = Encoder(encoder_config, pooler=pooler)
    checkpoint.check_fits(encoder, tokenizer, tasks, config.max_length, start)
    max_length = config.max_length or encoder.config.max_position_embeddings
    encoder.compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    torch.default_generator.manual_seed(derive_seed(config.seed, "heads"))
    model = MultitaskModel(
        encoder,
        tasks,
        pooling=config.pooling,
        head_dropout=config.head_dropout,
        shared_layer=config.shared_layer,
    ).to(device)
    if config.mode == "pretrain":
        model.freeze_encoder()
        for task in tasks:
            if not model.parameters_of(task.name):
                raise UserError(
                    f"--mode pretrain leaves nothing to train for {task.name}: its head {task.head} has no parameters;"
                    f" give another --heads.{task.name}, or --mode finetune"
                )
    if not goes_on:  # else it was decided by the weights that the run began with
        precision = fit_for_smart(model, config, precision, console)
    matmul = choose_matmul(config, encoder.config, precision, group)
    console.print(kernels_line(device))
    lr = config.lr or default_learning_rate(config, encoder.config.hidden_size)
    config = config.replace(
        tasks=[task.name for task in tasks],
        max_length=max_length,
        precision=precision,
        matmul=matmul,
        lr=lr,
        out=str(run.path),
    )
    encoded = {
        split: {
            name: encode(examples, tokenizer, max_length, pair_encoding=pair_encoding(model.tasks[name]))
            for name, examples in by_task.items()
        }
        for split, by_task in splits.items()
    }
    console.print(f"data: {source.name}; model: {config.model or 'a small encoder from scratch'}")
    console.print(method_line(config, model))
    console.print(
        data_table(
            [
                (
                    task,
                    {split: len(encoded[split].get(task.name, ())) for split in splits},
                    sum(len(of[task.name].skipped) for of in splits.values() if task.name in of),
                    sum(of[task.name].truncated for of in encoded.values() if task.name in of),
                )
                for task in tasks
            ]
        )
    )
    skipped = []
    for split, by_task in splits.items():
        for name, examples in by_task.items():
            skipped += skipped_rows(split, name, examples.skipped)
            lines = [f"warning: {name}, {split}: {note}" for note in encoded[split][name].notes()]
            for line in (*skipped_lines(examples.skipped, str(run.skipped)), *lines):
                console.print(line)
    groups = task_groups(tasks, config.surgery_groups)
    rows = len(groups) if any(surgery.per_task for surgery in surgeries) else 1
    one_stream = config.accumulate == 1 and not config.low_memory
    # Gradients of copies are in half precision: fit for what one backward gives, not to sum up several.
    copies = model.encoder.copies() if one_stream or (config.accumulate == 1 and rows > 1) else {}
    beta = config.bregman.beta if config.bregman.mu else None
    l2 = {task.name: of_task(config.l2, task.name, 0.0) for task in tasks}
    params = model.parameter_groups(config.weight_decay)
    for param_group in params:
        param_group["lr"] = config.head_lr if config.head_lr and param_group["name"].startswith("heads.") else lr
    arena = None
    if group.world_size > 1:
        trunk = [param for param in model.trunk.parameters() if param.requires_grad]
        arena = ShardedParameters(list(model.heads.parameters()), trunk, rows, group)
        arena.all_gather()  # all ranks start alike
        params = arena.param_groups(params)
        sent = len(surgeries) * arena.bytes_per_update(ema=beta is not None)
        console.print(f"each process sends {sent / 1e6:.1f} MB a step")
    optimizer = AdamW(params, lr=lr, eps=config.adam_eps, average_beta=beta, copies=None if arena else copies)
    if arena is not None and beta is not None:
        arena.keep_ema(optimizer)
    gradients = TaskGradients(model.trunk, rows, copies)
    if arena is not None:
        arena.register_hooks(gradients)
    averages = optimizer.averages if arena is None else arena.ema
    stepper = Stepper(
        model,
        Objective(model, config.smart, config.bregman, averages, copies, config.loss_weights, l2),
        optimizer,
        gradients,
        groups,
        surgeries,
        encoded["train"],
        config.accumulate,
        config.low_memory,
        config.clip_norm,
        config.seed,
        device,
        bucket_to=max_length if device.type == "cuda" and config.cuda_graphs and one_stream and not arena else None,
        group=group,
        arena=arena,
    )
    return Workbench(
        config,
        tasks,
        source,
        tokenizer,
        model,
        optimizer,
        stepper,
        arena,
        group,
        encoded["train"],
        encoded["dev"],
        encoded["test"],
        skipped,
        device,
        max_length,
    )


def open_tasks(config: TrainConfig) -> tuple[Source, list[Task]]:
    """Where the data is, and the tasks to train on it.

    Raises:
        UserError: no such data or task, or an option that is about a task which is not trained.
    """
    source = open_source(config.data)
    names = config.tasks or [name for name in DEFAULT_TASKS if name in source.tasks()] or source.tasks()
    if config.reviews is not None:
        source = WithReviews(source, config.reviews, config.reviews_per_star, config.seed)
        names = names if WithReviews.task in names else [*names, WithReviews.task]
    tasks = config.chosen_tasks(names)
    for option in ("loss_weights", "sampling_weights", "swap_pairs", "augmented"):
        for name in getattr(config, option) or ():
            if name not in names:
                raise UserError(f"--{option.replace('_', '-')} names {name}; the tasks of this run: {', '.join(names)}")
    for name in names:
        config.batch_size_of(name)
    return source, tasks


def training_examples(task: Task, source: Source, config: TrainConfig, dev: Mapping[str, Examples]) -> Examples:
    """A task's training examples, and those that its options add."""
    examples = source.load(task, "train")
    file = (config.augmented or {}).get(task.name)
    if file is not None:
        held_out = set(dev[task.name].ids) if task.name in dev else ()
        examples = joined(examples, read_augmented(file, task, examples, held_out))
    return joined(examples, swapped(examples)) if task.name in (config.swap_pairs or ()) else examples


def fit_for_smart(model: MultitaskModel, config: TrainConfig, precision: str, console: Console) -> str:
    """Give the encoder a precision that does not round SMART's perturbations away, and return its name.

    Where none may be given, say so.
    """
    encoder, smart = model.encoder, config.smart
    if not smart.on or not rounds_away(model, smart, encoder.compute_dtype):
        return precision
    reason = f"--smart.epsilon {smart.epsilon:g} lies below what {precision} rounds the embeddings by"
    if precision == "bf16" and smart.precision == "auto":
        encoder.compute_dtype = torch.float32
        console.print(f"{reason}: the steps run in fp32 (--smart.precision same keeps {precision})")
        return "fp32"
    console.print(f"warning: {reason}: SMART will do nothing")
    return precision


def choose_matmul(config: TrainConfig, encoder: EncoderConfig, precision: str, group: ProcessGroup) -> str:
    """Choose the library of float32 products, on all ranks the one that the first finds the faster, and return it.

    Raises:
        UserError: torch was built without the one asked for.
    """
    name: str = config.matmul
    if name == "auto":
        measures = group.is_main and group.device.type == "cpu" and precision == "fp32" and config.backend == "auto"
        found = kernels.faster_matmul(encoder.hidden_size, encoder.intermediate_size) if measures else "blas"
        name = group.broadcast_object(found)
    try:
        kernels.set_matmul(name)
    except ValueError as error:
        raise UserError(f"--matmul {name}: {error}") from None
    return name


def method_line(config: TrainConfig, model: MultitaskModel) -> str:
    """What is added to the task losses, and how the tasks' gradients become one update."""
    frozen = config.mode == "pretrain" and model.shared is None
    parts = ["no surgery: the encoder is frozen" if frozen else f"surgery {config.surgery}"]
    parts += [
        f"{task.name} with head {task.head} and {task.loss.replace('_', ' ')}"
        for task in model.tasks.values()
        if task != TASKS[task.name]
    ]
    parts += [f"a shared layer ({config.shared_layer})"] if config.shared_layer else []
    parts += [f"L2 norms with lambda {config.l2}"] if config.l2 else []
    smart, scale = config.smart, embedding_scale(model)
    if smart.on:
        epsilon = smart.epsilon * scale if smart.relative else smart.epsilon
        radius = f"epsilon {epsilon:.2g} where embeddings have a root mean square of {scale:.2g}"
        parts.append(f"SMART with lambda_s {smart.lambda_s}, {radius}")
    if config.bregman.mu:
        parts.append(f"Bregman proximal point with mu {config.bregman.mu}")
    return f"method: {'; '.join(parts)}"


def default_learning_rate(config: TrainConfig, hidden_size: int) -> float:
    """5e-5 to fine-tune a model as wide as BERT-base, more for a narrower one; 1.5e-3 from scratch; 1e-3 for heads."""
    if config.mode == "pretrain":
        return 1e-3
    if config.model is None:
        return 1.5e-3
    return min(1e-3, 5e-5 * (768 / hidden_size) ** 2)


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


def restore(bench: Workbench, run: Run, console: Console) -> Progress:
    """Where the run stands: at its last checkpoint if it is resumed and has one, else at the start.

    Raises:
        UserError: the checkpoint is of another model, or the training or dev data has changed since.
    """
    data: dict[str, int | str] = {name: encoded.checksum for name, encoded in bench.train.items()}
    data |= {f"{name} dev": encoded.checksum for name, encoded in bench.dev.items()}
    if not (bench.config.resume and run.last.exists()):
        return Progress(data=data)
    progress = checkpoint.load_progress(run.last)
    for split, part, suffix in (("training", bench.train, ""), ("dev", bench.dev, " dev")):
        recorded = {name: progress.data.get(f"{name}{suffix}") for name in part}
        changed = [name for name, checksum in recorded.items() if not part[name].is_recorded_as(checksum)]
        if changed and (split == "training" or any(recorded.values())):  # up to 0.1.0, there were none of dev
            raise UserError(f"the {split} data of {', '.join(changed)} changed since {run.path} began; start a new run")
    progress.data = data
    bench.load(run.last)
    console.print(f"resuming {run.path} after step {progress.step}")
    return progress
