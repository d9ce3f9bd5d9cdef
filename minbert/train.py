"""Fine-tune on several tasks at once: `python -m minbert.train`. The training loop is `take_steps`, top to bottom."""

from __future__ import annotations

import datetime
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from minbert import cli
from minbert.config import TrainConfig
from minbert.console import Terminal, TrainingProgress, score_table
from minbert.data import Plan, TaskSampler, plan
from minbert.device import keep_freed_memory, resolve_device, settings
from minbert.distributed.liveness import RankLost
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError
from minbert.inference import evaluate
from minbert.runs.checkpoint import Progress
from minbert.runs.resume import check_length
from minbert.runs.run_directory import Run
from minbert.tasks.metrics import overall
from minbert.training.finish import finish_run
from minbert.training.schedule import learning_rate_factor
from minbert.training.setup import Workbench, prepare, restore
from minbert.training.step import Parts
from minbert.training.step_result import Pending, Taken
from minbert.training.stop_signal import Stopped, StopSignal

SMART_SHARE_THAT_ACTS = 1e-4  # of the loss


def main(arguments: Sequence[str]) -> int:
    config = restarted(cli.parse_layers("train", TrainConfig, arguments))
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    try:
        with ProcessGroup.join(device, config.timeout) as group:
            train(config, Terminal(quiet=not group.is_main), group)
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


def train(config: TrainConfig, console: Console, group: ProcessGroup | None = None) -> dict[str, object]:
    """Train as `config` says, and return what summary.json holds.

    The process is left as it was: threads, kernels, torch's generator and signal handlers are those from before. Off
    Python's main thread no signal handlers are set. `minbert.device.keep_freed_memory`, which the command calls,
    makes steps on a CPU faster.

    Args:
        ranks: the processes that train together, each of which calls this; one by itself when left out. The first one
            writes and prints.

    Raises:
        UserError: bad input, a disk that refuses to be written, or a loss that stays non-finite.
        Stopped: SIGINT or SIGTERM came; what the run has saved is whole. It is a KeyboardInterrupt.
        RankLost: another process ended or was silent.
    """
    group = group or ProcessGroup(device=resolve_device(config.device))
    path = group.broadcast_object(config.out or f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}")
    run = Run(path, writes=group.is_main)
    with StopSignal() as stop, run.opened(config.resume):
        try:
            config = group.broadcast_object(run.options(config, console))
            with settings(config.threads, config.backend):
                return take_steps(config, run, console, group, stop)
        except Stopped:
            console.print(f"stopped; {run.where_it_stands()}")
            raise


def take_steps(
    config: TrainConfig, run: Run, console: Console, group: ProcessGroup, stop: StopSignal
) -> dict[str, object]:
    """`train`, in a run directory that is held."""
    if config.resume:
        run.check_seen()
    bench = prepare(config, run, console, group)
    config = bench.config
    progress = restore(bench, run, console)
    sizes = {name: len(encoded) for name, encoded in bench.train.items()}
    batch_sizes = {name: config.batch_size_of(name) for name in sizes}
    samplers = {name: TaskSampler(n, batch_sizes[name], config.seed, name) for name, n in sizes.items()}
    planned = plan_run(config, sizes, batch_sizes)
    epoch_steps, total_steps = planned.epoch_steps, planned.steps
    own_steps = {name: planned.steps_of(name) for name in sizes}
    epochs = math.ceil(total_steps / epoch_steps)
    if run.record is not None:
        before = plan_run(config.replace(epochs=run.record.epochs, steps=run.record.steps), sizes, batch_sizes).steps
        for line in check_length(config, before, total_steps, progress.step):
            console.print(line)
    run.write_options(config)
    group.broadcast_object("begun")
    run.check_seen()
    if damaged := run.forget_after(progress.step):
        console.print(f"warning: {len(damaged)} damaged lines of {run.metrics} are dropped; {damaged[0]}")
    run.write_skipped(bench.skipped)
    if progress.step < total_steps:
        run.forget_summary()
    if config.tensorboard:
        run.open_board(progress.step)
    peak_rates = [param_group["lr"] for param_group in bench.optimizer.param_groups]
    bench.model.train()

    ahead = int(bench.device.type == "cuda")  # a GPU is given the next step before the last one is looked at
    pending: deque[tuple[int, float, int, Pending]] = deque()

    with TrainingProgress(console, total_steps, progress.step) as display, where(progress, run), stop.deferred():
        epoch = math.ceil(progress.step / epoch_steps)
        if (progress.step == total_steps or progress.step % epoch_steps == 0) and not is_scored(progress, epoch):
            finish_epoch(bench, run, progress, epoch, console, stop)
        for step in range(progress.step, total_steps):
            started = time.perf_counter()
            turns = planned.at(step)
            position, length = step, total_steps
            if config.optimizers == "per-task":
                ((name, position),) = turns.items()
                length = own_steps[name]
                bench.optimizer.select(name)
            factor = learning_rate_factor(position, length, config.warmup, config.schedule)
            for param_group, peak in zip(bench.optimizer.param_groups, peak_rates, strict=True):
                param_group["lr"] = peak * factor

            batches = [batch_at(bench, samplers, turns, micro) for micro in range(config.accumulate)]
            before = group.bytes_sent
            waiting = bench.stepper.take(batches, step, step / total_steps)
            pending.append((step, factor, group.bytes_sent - before, waiting))

            ends_epoch = (step + 1) % epoch_steps == 0 or step + 1 == total_steps
            stops = group.all_reduce_max(stop.number)
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
                    record |= {"bytes_sent": sent} if group.world_size > 1 else {}
                    run.log({"step": progress.step, "epoch": epoch, **record})
                shown = sum(progress.mean_losses().values())
                display.update(progress.step, f"epoch {epoch}/{epochs}", rate, shown)

            if ends_epoch and not stops:
                finish_epoch(bench, run, progress, epoch, console, stop)
            elif saves:
                save(bench, run, run.last, progress)
            if stops:
                raise Stopped(stops)
    with where(progress, run):
        if stops := group.all_reduce_max(stop.number):
            raise Stopped(stops)
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
    counts = progress.loss_counts.values()  # a step is counted for each task that took it
    steps = max(counts, default=0) if config.sampling == "joint" else sum(counts)
    share = progress.smart_shares / max(1, steps)
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


def is_scored(progress: Progress, epoch: int) -> bool:
    """Whether `finish_epoch` has been done after the steps so far, the last of which ended this epoch or the run."""
    return len(progress.dev) >= epoch and not progress.loss_counts


def finish_epoch(
    bench: Workbench, run: Run, progress: Progress, epoch: int, console: Console, stop: StopSignal
) -> None:
    """Score the dev split, show it, and save: best/ first, so that last/ never knows of a best/ that is not there.

    A signal stops the scoring at once; it is done when the run is resumed. An epoch that is scored again, because the
    run once ended in its middle, keeps its better scores.

    Raises:
        Stopped: a signal came while the split was scored.
    """
    evaluated = [task for task in bench.tasks if task.name in bench.dev]
    try:
        with stop.deferred(bench.group.world_size > 1):  # several processes stop together, after a step
            scores, _ = evaluate(bench.model, evaluated, bench.dev, bench.device, bench.group)
    except Stopped:
        save(bench, run, run.last, progress)
        raise
    total = overall(scores)
    losses = progress.mean_losses()
    rates = {pair: conflicts / steps for pair, (conflicts, steps) in progress.conflicts.items()}
    record = {"dev": {**scores, "overall": total}, "train_loss": losses}
    run.log({"step": progress.step, "epoch": epoch, **record, **({"conflict_rate": rates} if rates else {})})
    warn_of_idle_smart(bench.config, progress, console)
    if len(progress.dev) < epoch:
        progress.dev.append(scores)
    elif total >= overall(progress.dev[epoch - 1]):
        progress.dev[epoch - 1] = scores
    progress.loss_sums, progress.loss_counts, progress.smart_shares, progress.conflicts = {}, {}, 0.0, {}
    shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    console.print(score_table(f"train loss: {shown}", [(f"dev, epoch {epoch}", scores, total)]))
    if total > progress.best_overall:
        progress.best_epoch, progress.best_overall = epoch, total
        save(bench, run, run.best, progress)
    save(bench, run, run.last, progress)


def save(bench: Workbench, run: Run, path: Path, progress: Progress) -> None:
    """Write a checkpoint, and the lines of metrics.jsonl up to it before."""
    run.sync()
    bench.save(path, progress)


@contextmanager
def where(progress: Progress, run: Run) -> Iterator[None]:
    """Say where the run stood when a rank was lost, and what goes on from there."""
    try:
        yield
    except RankLost as lost:
        message = f"{lost} after step {progress.step}; {run.where_it_stands()}"
        raise RankLost(message, prints=lost.prints) from None


if __name__ == "__main__":
    cli.run(main)
