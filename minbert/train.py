"""Fine-tune on several tasks at once: `python -m minbert.train`. The training loop is `train`, top to bottom."""

from __future__ import annotations

import datetime
import math
import signal
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import FrameType

import torch
from rich.console import Console
from torch import Tensor

import minbert
from minbert import checkpoint, cli, kernels
from minbert.checkpoint import Progress
from minbert.config import TrainConfig
from minbert.console import TrainingProgress, data_table, score_table
from minbert.data import Encoded, Source, TaskSampler, encode, open_source, pack_batches, steps_per_epoch, task_at
from minbert.device import describe, peak_memory_bytes, resolve_device, resolve_precision
from minbert.errors import UserError
from minbert.evaluate import evaluate, load_model
from minbert.losses import LOSSES
from minbert.metrics import overall
from minbert.model import Encoder, EncoderConfig, MultitaskModel, load_heads
from minbert.optimizer import AdamW
from minbert.report import plot_curves
from minbert.runs import Run
from minbert.schedule import learning_rate_factor
from minbert.seeds import derive_seed
from minbert.tasks import Task, find_tasks
from minbert.tokenizer import Tokenizer

DEFAULT_TASKS = ("sst", "qqp", "sts")


class Stopped(Exception):
    """A signal asked the run to stop, and it has saved itself."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True)
class Workbench:
    """All that a run works with."""

    config: TrainConfig  # every choice that was left open is made
    tasks: list[Task]
    source: Source
    tokenizer: Tokenizer
    model: MultitaskModel
    optimizer: AdamW
    train: dict[str, Encoded]
    dev: dict[str, Encoded]
    device: torch.device
    max_length: int


def main(arguments: Sequence[str]) -> int:
    config = cli.parse_layers("train", TrainConfig, arguments)
    try:
        train(config, Console(soft_wrap=True))
    except Stopped as stopped:
        return 128 + stopped.number
    return 0


def train(config: TrainConfig, console: Console) -> dict[str, object]:
    """Train as `config` says, and return what summary.json holds.

    Raises:
        UserError: bad input, a full disk, or a loss that stays non-finite.
        Stopped: SIGINT or SIGTERM came; the run is saved.
    """
    run = Run(config.out or f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}")
    with run.opened(config.resume), StopSignal() as stop:
        bench = prepare(config, run, console)
        config = bench.config
        run.check_same(config) if config.resume else run.begin(config)
        progress = restore(bench, run, console)
        samplers = [
            TaskSampler(len(bench.train[task.name]), config.batch_size, config.seed, task.name) for task in bench.tasks
        ]
        sizes = [sampler.n for sampler in samplers]
        epoch_steps = steps_per_epoch(sizes, config.batch_size, config.epoch_length)
        if config.sampling != "joint":
            epoch_steps *= len(bench.tasks)
        total_steps = config.steps or config.epochs * epoch_steps
        epochs = math.ceil(total_steps / epoch_steps)
        peak_rates = [group["lr"] for group in bench.optimizer.param_groups]
        bench.model.train()

        with TrainingProgress(console, total_steps, progress.step) as display:
            while progress.step < total_steps:
                started = time.perf_counter()
                step = progress.step
                factor = learning_rate_factor(step, total_steps, config.warmup, config.schedule)
                for group, peak in zip(bench.optimizer.param_groups, peak_rates, strict=True):
                    group["lr"] = peak * factor

                losses, examples = task_losses(bench, samplers, step)
                torch.stack(list(losses.values())).sum().backward()
                norm = clip_gradients(bench.model, config.clip_norm)
                values = {name: loss.item() for name, loss in losses.items()}
                if math.isfinite(norm) and all(map(math.isfinite, values.values())):
                    bench.optimizer.step()
                    count_losses(progress, values)
                    progress.skipped_in_a_row = 0
                else:
                    skip_step(progress, values, norm, config)
                bench.optimizer.zero_grad(set_to_none=True)

                progress.step += 1
                progress.examples += examples
                progress.seconds += time.perf_counter() - started
                epoch, rate = step // epoch_steps + 1, progress.examples / progress.seconds
                if progress.step % config.log_steps == 0:
                    record = {"loss": values, "lr": factor * peak_rates[0], "grad_norm": norm}
                    run.log({"step": progress.step, "epoch": epoch, **record, "examples_per_second": rate})
                display.update(progress.step, f"epoch {epoch}/{epochs}", rate, sum(progress.mean_losses().values()))

                if progress.step % epoch_steps == 0 or progress.step == total_steps:
                    finish_epoch(bench, run, progress, epoch, console)
                elif progress.step % config.checkpoint_steps == 0 or stop.number:
                    checkpoint.save(run.last, bench.model, bench.tokenizer, bench.optimizer, progress)
                if stop.number and progress.step < total_steps:
                    console.print(f"stopped after step {progress.step}; the same command with --resume goes on")
                    raise Stopped(stop.number)
        return finish_run(bench, run, progress, console)


# Before the loop --------------------------------------------------------------------------------------------------


def prepare(config: TrainConfig, run: Run, console: Console) -> Workbench:
    """Read the data, build or load the model, and settle what `config` left open. Nothing is written.

    Raises:
        UserError: bad data, a bad model directory, or options that do not fit them.
    """
    device = resolve_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    kernels.set_backend(config.backend)
    precision = resolve_precision(config.precision, device)
    console.print(f"minbert {minbert.__version__} on {describe(device, precision)}")
    console.print(kernels_line(device))

    source = open_source(config.data)
    tasks = find_tasks(config.tasks or [name for name in DEFAULT_TASKS if name in source.tasks()] or source.tasks())
    splits = {split: {task.name: source.load(task, split) for task in tasks} for split in ("train", "dev")}

    torch.manual_seed(derive_seed(config.seed, "weights"))
    start = run.last if config.resume and run.last.exists() else config.model
    if start is not None:
        tokenizer = Tokenizer.from_pretrained(start)
        encoder = Encoder.from_pretrained(
            start, pooler=True if config.pooling == "pooler" else None, dropout=config.dropout
        )
        if tokenizer.vocab_size > encoder.config.vocab_size:
            raise UserError(
                f"{start}: its tokenizer has {tokenizer.vocab_size} tokens but its encoder only "
                f"{encoder.config.vocab_size}; give a directory in which they belong together"
            )
    else:
        texts = [text for e in splits["train"].values() for text in (*e.texts, *(e.pairs or ()))]
        tokenizer = Tokenizer.train(texts, config.scratch.vocab_size)
        # BERT's 0.02 suits a width of 768: a narrow encoder learns sooner when its products start at unit scale.
        spread = config.scratch.hidden_size**-0.5
        shape = {**asdict(config.scratch), "vocab_size": tokenizer.vocab_size, "initializer_range": spread}
        encoder_config = EncoderConfig(**shape).with_dropout(config.dropout or 0.0)
        encoder = Encoder(encoder_config, pooler=config.pooling == "pooler")
    limit = encoder.config.max_position_embeddings
    max_length = config.max_length or limit
    if max_length > limit:
        raise UserError(f"--max-length {config.max_length} is more than the {limit} positions of the encoder")
    encoder.compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    torch.manual_seed(derive_seed(config.seed, "heads"))
    model = MultitaskModel(encoder, tasks, pooling=config.pooling, head_dropout=config.head_dropout).to(device)
    if config.mode == "pretrain":
        model.freeze_encoder()
    lr = config.lr or default_learning_rate(config, encoder.config.hidden_size)
    config = config.replace(
        tasks=[task.name for task in tasks],
        max_length=max_length,
        precision=precision,
        lr=lr,
        out=str(run.path),
    )
    encoded = {
        split: {name: encode(examples, tokenizer, max_length) for name, examples in by_task.items()}
        for split, by_task in splits.items()
    }
    skipped = {task.name: sum(len(splits[split][task.name].skipped) for split in splits) for task in tasks}
    console.print(f"data: {source.name}; model: {config.model or 'a small encoder from scratch'}")
    console.print(
        data_table(
            [
                (
                    task,
                    {split: len(encoded[split][task.name]) for split in splits},
                    skipped[task.name],
                    sum(encoded[split][task.name].truncated for split in splits),
                )
                for task in tasks
            ]
        )
    )
    optimizer = AdamW(model.parameter_groups(config.weight_decay), lr=lr)
    return Workbench(
        config, tasks, source, tokenizer, model, optimizer, encoded["train"], encoded["dev"], device, max_length
    )


def default_learning_rate(config: TrainConfig, hidden_size: int) -> float:
    """5e-5 to fine-tune a model as wide as BERT-base, more for a narrower one; 1e-3 from scratch or for heads alone."""
    if config.model is None or config.mode == "pretrain":
        return 1e-3
    return min(1e-3, 5e-5 * (768 / hidden_size) ** 2)


def kernels_line(device: torch.device) -> str:
    """Which ops run compiled and which in plain PyTorch; and, without compiled code, how to get it."""
    by_backend: dict[str, list[str]] = {}
    for op, backend in kernels.backends(device).items():
        by_backend.setdefault(backend, []).append(op)
    line = "kernels: " + "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in sorted(by_backend.items()))
    missing = kernels.native.missing_reason()
    return f"{line}\n{missing}" if missing else line


def restore(bench: Workbench, run: Run, console: Console) -> Progress:
    """Where the run stands: at its last checkpoint if it is resumed and has one, else at the start.

    Raises:
        UserError: the checkpoint is of another model, or the training data has changed since.
    """
    data = {name: zlib.crc32(encoded.token_ids.tobytes()) for name, encoded in bench.train.items()}
    if not (bench.config.resume and run.last.exists()):
        run.forget_after(-1)
        return Progress(data=data)
    progress = checkpoint.load_progress(run.last)
    changed = [name for name in data if data[name] != progress.data.get(name)]
    if changed:
        raise UserError(f"the training data of {', '.join(changed)} changed since {run.path} began; start a new run")
    load_heads(bench.model, run.last / "heads.safetensors")
    checkpoint.load_optimizer(run.last, bench.model, bench.optimizer)
    run.forget_after(progress.step)
    console.print(f"resuming {run.path} after step {progress.step}")
    return progress


# In the loop ------------------------------------------------------------------------------------------------------


def task_losses(bench: Workbench, samplers: Sequence[TaskSampler], step: int) -> tuple[dict[str, Tensor], int]:
    """The loss of each task that takes part in this step, and the number of examples."""
    config = bench.config
    if config.sampling == "joint":
        parts = [(task, sampler.batch(step)) for task, sampler in zip(bench.tasks, samplers, strict=True)]
    else:
        index, batch = task_at(step, len(bench.tasks), config.sampling, config.seed)
        parts = [(bench.tasks[index], samplers[index].batch(batch))]
    packed = pack_batches([(bench.train[task.name], indices) for task, indices in parts]).to(bench.device)
    counts = {task.name: len(indices) for task, indices in parts}
    seed = torch.tensor(derive_seed(config.seed, "dropout", step), device=bench.device)
    outputs = bench.model(packed, counts, seed=seed)
    losses = {}
    for task, indices in parts:
        labels = torch.from_numpy(bench.train[task.name].labels[indices]).to(bench.device)  # type: ignore[index]
        losses[task.name] = LOSSES[task.loss](outputs[task.name], labels)
    return losses, sum(counts.values())


def clip_gradients(model: MultitaskModel, limit: float) -> float:
    """Scale the gradients down to norm `limit` (0: leave them), and return the norm they had."""
    params = [param for param in model.parameters() if param.grad is not None]
    return torch.nn.utils.clip_grad_norm_(params, limit or math.inf).item()


def count_losses(progress: Progress, values: dict[str, float]) -> None:
    for name, value in values.items():
        progress.loss_sums[name] = progress.loss_sums.get(name, 0.0) + value
        progress.loss_counts[name] = progress.loss_counts.get(name, 0) + 1


def skip_step(progress: Progress, values: dict[str, float], norm: float, config: TrainConfig) -> None:
    """Count a step whose loss or gradient is not finite; give up when there were too many in a row."""
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    if progress.skipped_in_a_row >= config.max_skipped:
        shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise UserError(
            f"the loss or gradient was not finite {progress.skipped_in_a_row} steps in a row, up to step "
            f"{progress.step + 1} (loss {shown}, gradient norm {norm:g}); try a smaller --lr, a longer --warmup, "
            f"a smaller --clip-norm or --precision fp32"
        )


def finish_epoch(bench: Workbench, run: Run, progress: Progress, epoch: int, console: Console) -> None:
    """Score the dev split, show it, and save: best/ first, so that last/ never knows of a best/ that is not there."""
    scores, _ = evaluate(bench.model, bench.tasks, bench.dev, bench.device)
    total = overall(scores)
    losses = progress.mean_losses()
    run.log({"step": progress.step, "epoch": epoch, "dev": {**scores, "overall": total}, "train_loss": losses})
    progress.dev.append(scores)
    progress.loss_sums, progress.loss_counts = {}, {}
    shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    console.print(score_table(f"train loss: {shown}", [(f"dev, epoch {epoch}", scores, total)]))
    if total > progress.best_overall:
        progress.best_epoch, progress.best_overall = epoch, total
        checkpoint.save(run.best, bench.model, bench.tokenizer, bench.optimizer, progress)
    checkpoint.save(run.last, bench.model, bench.tokenizer, bench.optimizer, progress)


class StopSignal:
    """Notes SIGINT and SIGTERM so that the loop can save and stop; a second one stops at once."""

    def __init__(self) -> None:
        self.number = 0
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number


# After the loop ---------------------------------------------------------------------------------------------------


def finish_run(bench: Workbench, run: Run, progress: Progress, console: Console) -> dict[str, object]:
    """Write the best epoch's predictions, the plots and summary.json; show the dev table of all epochs."""
    model, _ = load_model(run.best, bench.config, bench.device)
    for split in ("dev", "test"):
        present = [task for task in bench.tasks if split in bench.source.splits(task)]
        encoded = bench.dev
        if split == "test":
            encoded = {
                task.name: encode(bench.source.load(task, split), bench.tokenizer, bench.max_length) for task in present
            }
        _, predicted = evaluate(model, present, encoded, bench.device)
        for task in present:
            run.write_predictions(task, split, encoded[task.name].ids, predicted[task.name])
    plot_curves(run)
    best = progress.dev[progress.best_epoch - 1]
    summary = {
        "dev": {**best, "overall": progress.best_overall},
        "best_epoch": progress.best_epoch,
        "steps": progress.step,
        "skipped_steps": progress.skipped,
        "examples": progress.examples,
        "seconds": progress.seconds,
        "examples_per_second": progress.examples / progress.seconds,
        "peak_memory_bytes": peak_memory_bytes(bench.device),
        "parameters": sum(param.numel() for param in model.parameters()),
        "device": describe(bench.device, bench.config.precision),
        "precision": bench.config.precision,
        "backends": kernels.backends(bench.device),
        "versions": {"minbert": minbert.__version__, "torch": torch.__version__},
    }
    run.write_summary(summary)
    rows = [
        (f"dev, epoch {epoch}{' (best)' if epoch == progress.best_epoch else ''}", scores, overall(scores))
        for epoch, scores in enumerate(progress.dev, 1)
    ]
    console.print(score_table("all epochs", rows))
    if progress.skipped:
        console.print(f"{progress.skipped} steps were skipped: their loss or gradient was not finite")
    console.print(f"{progress.examples / progress.seconds:.0f} examples/s; run directory: {run.path}")
    return summary


if __name__ == "__main__":
    cli.run(main)
