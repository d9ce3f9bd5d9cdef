"""Fine-tune on several tasks at once: `python -m minbert.train`. The training loop is `train`, top to bottom."""

from __future__ import annotations

import datetime
import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

import minbert
from minbert import cli, kernels
from minbert.checkpoint import Progress, Scores, load_progress
from minbert.config import TrainConfig
from minbert.console import Terminal, TrainingProgress, score_table
from minbert.data import Plan, TaskSampler, encode, plan
from minbert.device import describe, peak_memory_bytes, resolve_device
from minbert.errors import UserError
from minbert.evaluate import evaluate, load_model
from minbert.files import readable
from minbert.metrics import overall
from minbert.model import reading
from minbert.pending import Pending, Taken
from minbert.ranks import RankLost, Ranks
from minbert.report import plot_run, write_report
from minbert.runs import Followed, Run
from minbert.schedule import learning_rate_factor
from minbert.step import Parts
from minbert.workbench import Workbench, prepare, restore

SMART_SHARE_THAT_ACTS = 1e-4  # of the loss


class Stopped(Exception):
    """A signal asked the run to stop, and it has saved itself."""

    def __init__(self, number: int) -> None:
        self.number = number


def main(arguments: Sequence[str]) -> int:
    config = restarted(cli.parse_layers("train", TrainConfig, arguments))
    try:
        with Ranks.joined(resolve_device(config.device), config.timeout) as ranks:
            train(config, Terminal(quiet=not ranks.leads), ranks)
    except Stopped as stopped:
        return 128 + stopped.number
    return 0


def restarted(config: TrainConfig) -> TrainConfig:
    """The options for a process that torchrun has started again (--max-restarts): the run goes on.

    Raises:
        UserError: it cannot be found.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or config.resume:
        return config
    if config.out is None:
        raise UserError("--max-restarts of torchrun needs --out: a process that is started again finds the run there")
    return config.replace(resume=(Path(config.out) / "config.yaml").exists())


def train(config: TrainConfig, console: Console, ranks: Ranks | None = None) -> dict[str, object]:
    """Train as `config` says, and return what summary.json holds.

    Args:
        ranks: the processes that train together, each of which calls this; one by itself when left out. The first one
            writes and prints.

    Raises:
        UserError: bad input, a full disk, or a loss that stays non-finite.
        Stopped: SIGINT or SIGTERM came; the run is saved.
        RankLost: another process ended or was silent.
    """
    ranks = ranks or Ranks(device=resolve_device(config.device))
    path = ranks.agreed(config.out or f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}")
    run = Run(path) if ranks.leads else Followed(path)
    with run.opened(config.resume), StopSignal() as stop:
        ranks.agreed("opened")
        bench = prepare(config, run, console, ranks)
        config = bench.config
        run.check_same(config) if config.resume else run.begin(config)
        ranks.agreed("begun")
        run.check_seen()
        progress = restore(bench, run, console)
        if config.tensorboard:
            run.open_board(progress.step)
        sizes = {name: len(encoded) for name, encoded in bench.train.items()}
        batch_sizes = {name: config.batch_size_of(name) for name in sizes}
        samplers = {name: TaskSampler(n, batch_sizes[name], config.seed, name) for name, n in sizes.items()}
        planned = plan_run(config, sizes, batch_sizes)
        epoch_steps, total_steps = planned.epoch_steps, planned.steps
        own_steps = {name: planned.steps_of(name) for name in sizes}
        epochs = math.ceil(total_steps / epoch_steps)
        peak_rates = [group["lr"] for group in bench.optimizer.param_groups]
        bench.model.train()

        ahead = int(bench.device.type == "cuda")  # a GPU is given the next step before the last one is looked at
        pending: deque[tuple[int, float, int, Pending]] = deque()

        with TrainingProgress(console, total_steps, progress.step) as display, where(progress, run):
            for step in range(progress.step, total_steps):
                started = time.perf_counter()
                turns = planned.at(step)
                position, length = step, total_steps
                if config.optimizers == "per-task":
                    ((name, position),) = turns.items()
                    length = own_steps[name]
                    bench.optimizer.select(name)
                factor = learning_rate_factor(position, length, config.warmup, config.schedule)
                for group, peak in zip(bench.optimizer.param_groups, peak_rates, strict=True):
                    group["lr"] = peak * factor

                batches = [batch_at(bench, samplers, turns, micro) for micro in range(config.accumulate)]
                before = ranks.sent
                waiting = bench.stepper.take(batches, step, step / total_steps)
                pending.append((step, factor, ranks.sent - before, waiting))

                ends_epoch = (step + 1) % epoch_steps == 0 or step + 1 == total_steps
                stops = ranks.highest(stop.number) if step + 1 < total_steps else 0
                saves = ends_epoch or (step + 1) % config.checkpoint_steps == 0 or stops
                while len(pending) > (0 if saves else ahead):
                    done, its_factor, sent, waiting = pending.popleft()
                    taken = waiting.taken()
                    if taken.updated:
                        count_losses(progress, taken)
                        progress.skipped_in_a_row = 0
                    else:
                        skip_step(progress, taken, config)
                    progress.step = done + 1
                    progress.examples += taken.examples
                    progress.seconds += time.perf_counter() - started
                    started = time.perf_counter()
                    epoch, rate = done // epoch_steps + 1, progress.examples / progress.seconds
                    if progress.step % config.log_steps == 0:
                        record = {"lr": its_factor * peak_rates[0], **taken.record(), "examples_per_second": rate}
                        record |= {"bytes_sent": sent} if ranks.size > 1 else {}
                        run.log({"step": progress.step, "epoch": epoch, **record})
                    shown = sum(progress.mean_losses().values())
                    display.update(progress.step, f"epoch {epoch}/{epochs}", rate, shown)

                if ends_epoch:
                    finish_epoch(bench, run, progress, epoch, console)
                elif saves:
                    bench.save(run.last, progress)
                if stops:
                    console.print(f"stopped after step {progress.step}; the same command with --resume goes on")
                    raise Stopped(stops)
        with where(progress, run):
            return finish_run(bench, run, progress, epoch_steps, console)


# In the loop ------------------------------------------------------------------------------------------------------


def plan_run(config: TrainConfig, sizes: Mapping[str, int], batch_sizes: Mapping[str, int]) -> Plan:
    """Which tasks take each step, from the examples of each and those in a batch of it."""
    end = config.sampling_alpha_end
    return plan(
        sizes,
        {name: size * config.accumulate for name, size in batch_sizes.items()},
        order=config.sampling,
        length=config.epoch_length,
        times=config.epoch_times,
        weights=config.sampling_weights,
        alphas=(config.sampling_alpha, config.sampling_alpha if end is None else end),
        seed=config.seed,
        epochs=config.epochs,
        steps=config.steps,
    )


def batch_at(bench: Workbench, samplers: Mapping[str, TaskSampler], turns: Mapping[str, int], micro: int) -> Parts:
    """A batch of a step: the tasks that take it, in the order of their groups, and their examples.

    Args:
        turns: those tasks, and how many steps each took before.
        micro: which of the step's accumulated batches, from 0.
    """
    tasks = [task for group in bench.stepper.groups for task in group if task.name in turns]
    accumulate = bench.config.accumulate
    return [(task, samplers[task.name].batch(turns[task.name] * accumulate + micro)) for task in tasks]


def count_losses(progress: Progress, taken: Taken) -> None:
    for name, value in taken.loss.items():
        progress.loss_sums[name] = progress.loss_sums.get(name, 0.0) + value
        progress.loss_counts[name] = progress.loss_counts.get(name, 0) + 1
    progress.smart_shares += taken.smart_share
    for pair, cosine in taken.conflicts.get("cosine", {}).items():
        conflicts, steps = progress.conflicts.get(pair, (0, 0))
        progress.conflicts[pair] = [conflicts + (cosine < 0), steps + 1]


def warn_of_idle_smart(config: TrainConfig, progress: Progress, console: Console) -> None:
    """Say once if SMART is on and its regulariser was next to nothing in this epoch."""
    share = progress.smart_shares / max(1, *progress.loss_counts.values())
    if config.smart.on and share < SMART_SHARE_THAT_ACTS and not progress.smart_warned:
        progress.smart_warned = True
        console.print(
            f"warning: SMART's regulariser was {share:.1e} of the loss: it does nothing; give a larger"
            " --smart.epsilon, --smart.eta or --smart.lambda-s"
        )


def skip_step(progress: Progress, taken: Taken, config: TrainConfig) -> None:
    """Count a step whose loss or gradient is not finite; give up when there were too many in a row."""
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    if progress.skipped_in_a_row >= config.max_skipped:
        shown = ", ".join(f"{name} {value:g}" for name, value in taken.loss.items())
        raise UserError(
            f"the loss or gradient was not finite {progress.skipped_in_a_row} steps in a row, up to step "
            f"{progress.step + 1} (loss {shown}, gradient norm {taken.grad_norm:g}); try a smaller --lr, "
            f"a longer --warmup, a smaller --clip-norm or --precision fp32"
        )


def finish_epoch(bench: Workbench, run: Run, progress: Progress, epoch: int, console: Console) -> None:
    """Score the dev split, show it, and save: best/ first, so that last/ never knows of a best/ that is not there."""
    evaluated = [task for task in bench.tasks if task.name in bench.dev]
    scores, _ = evaluate(bench.model, evaluated, bench.dev, bench.device, bench.ranks)
    total = overall(scores)
    losses = progress.mean_losses()
    rates = {pair: conflicts / steps for pair, (conflicts, steps) in progress.conflicts.items()}
    record = {"dev": {**scores, "overall": total}, "train_loss": losses}
    run.log({"step": progress.step, "epoch": epoch, **record, **({"conflict_rate": rates} if rates else {})})
    warn_of_idle_smart(bench.config, progress, console)
    progress.dev.append(scores)
    progress.loss_sums, progress.loss_counts, progress.smart_shares, progress.conflicts = {}, {}, 0.0, {}
    shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    console.print(score_table(f"train loss: {shown}", [(f"dev, epoch {epoch}", scores, total)]))
    if total > progress.best_overall:
        progress.best_epoch, progress.best_overall = epoch, total
        bench.save(run.best, progress)
    bench.save(run.last, progress)


@contextmanager
def where(progress: Progress, run: Run) -> Iterator[None]:
    """Say where the run stood when a rank was lost, and what goes on from there."""
    try:
        yield
    except RankLost as lost:
        last = readable(run.last)
        saved = f"{run.last} holds step {load_progress(last).step}" if last.exists() else "nothing is saved yet"
        raise lost.saying(f"after step {progress.step}; {saved}: the same command with --resume goes on") from None


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


def finish_run(bench: Workbench, run: Run, progress: Progress, epoch_steps: int, console: Console) -> dict[str, object]:
    """Write the best epoch's predictions, the plots and summary.json; show the dev table of all epochs."""
    bench.ranks.agreed("saved")
    model, _ = load_model(run.best, bench.config, bench.device)
    scores: dict[str, Scores] = {}
    for split in ("dev", "test"):
        present = [task for task in bench.tasks if split in bench.source.splits(task)]
        encoded = bench.dev
        if split == "test":
            encoded = {
                task.name: encode(
                    bench.source.load(task, split), bench.tokenizer, bench.max_length, reading=reading(task)
                )
                for task in present
            }
        scores[split], outputs = evaluate(model, present, encoded, bench.device, bench.ranks)
        for task in present if bench.ranks.leads else ():
            run.write_predictions(task, split, encoded[task.name], outputs[task.name])
    if not bench.ranks.leads:
        return {}
    plot_run(run)
    best = progress.dev[progress.best_epoch - 1]
    tested = {"test": {**scores["test"], "overall": overall(scores["test"])}} if scores["test"] else {}
    summary: dict[str, object] = {
        "dev": {**best, "overall": progress.best_overall},
        **tested,
        "best_epoch": progress.best_epoch,
        "steps": progress.step,
        "steps_per_epoch": epoch_steps,
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
    report = write_report(run)
    rows = [
        (f"dev, epoch {epoch}{' (best)' if epoch == progress.best_epoch else ''}", scores, overall(scores))
        for epoch, scores in enumerate(progress.dev, 1)
    ]
    console.print(score_table("all epochs", rows))
    if progress.skipped:
        console.print(f"{progress.skipped} steps were skipped: their loss or gradient was not finite")
    console.print(f"report: {report}")
    console.print(f"{progress.examples / progress.seconds:.0f} examples/s; run directory: {run.path}")
    return summary


if __name__ == "__main__":
    cli.run(main)
