"""The training loop: `train` sets up, `train_steps` repeats `training_step`, which takes a batch to its update."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from minbert.config import TrainConfig
from minbert.console import TrainingProgress
from minbert.device import resolve_device, resolve_precision, settings
from minbert.distributed.process_group import ProcessGroup
from minbert.methods.surgery import find_surgery
from minbert.runs.experiment_trackers import Trackers
from minbert.runs.progress_counters import Progress
from minbert.runs.resume import check_length, check_records
from minbert.runs.run_directory import Run
from minbert.seeds import derive_seed
from minbert.training.arithmetic import choose_matmul, fit_for_smart
from minbert.training.callbacks import FAILED, CallbackCalls, Callbacks, StepInfo
from minbert.training.schedule import learning_rate_factor
from minbert.training.setup import (
    build_data,
    build_model,
    build_plan,
    build_trainer,
    default_learning_rate,
)
from minbert.training.startup_report import data_lines, device_lines, graphs_lines, kernels_line
from minbert.training.step_result import PendingStep, PendingUpdate, PhaseTimer
from minbert.training.stop_signal import Stopped, StopSignal
from minbert.training.trainer import Trainer, gradient_products, step_numbers
from minbert.training.training_run import TrainingRun


def training_step(trainer: Trainer, step: int, progress: float) -> PendingStep:
    """Update the model once, or as often as surgery says. Nothing waits for a GPU: the results are read later.

    Args:
        step: its number, from 0.
        progress: share of the run's steps that are done.
    """
    batches, gradients, optimizer, group = trainer.batches, trainer.gradients, trainer.optimizer, trainer.group
    timer, updates = PhaseTimer(group.device, group.liveness.wait_for), list[PendingUpdate]()
    finite: Tensor | None = None  # float64 []: 1 as long as all updates are finite, else 0

    sampled = trainer.sample(step)
    for number, surgery in enumerate(trainer.surgeries):  # one update; two for GSE
        gradients.clear()
        optimizer.zero_grad(set_to_none=True)
        streams, losses = batches.streams(sampled, step, number), []
        with trainer.products():
            for stream in streams:  # one; several for accumulated batches, or task after task in low memory
                batch = batches.pack(stream, progress)
                timer.end("batch")
                if trainer.graphs is None:
                    tracked = partial(gradients.attached, stream.row)  # the forward reads per-task views of parameters
                    losses.append(trainer.objective(batch.to(group.device), tracked, on_phase=timer.end))
                    if stream is streams[-1]:
                        trainer.parameters.reduce_next_backward()
                    (losses[-1].total / (len(sampled) * group.world_size)).backward()
                else:
                    losses.append(trainer.graphs(batch))  # the same forward and backward as a CUDA graph
                timer.end("backward")

        shared, own = trainer.wait_for_gradients()  # one gradient per task of shared parameters
        by_group = trainer.losses_by_group(losses, len(sampled)) if surgery.needs_losses else None
        parts = trainer.parts  # of the model, for surgery by layer or module
        products = gradient_products(shared, own, losses, group, by_group, parts)  # Gram matrix
        generator = torch.Generator().manual_seed(derive_seed(batches.seed, "surgery", step, number))
        norms = products.own_square, trainer.clip_norm
        weights, stats = surgery.weights(products.gram, generator, *norms, group.broadcast, products.losses)
        finite = stats[2] if finite is None else finite * stats[2]
        if trainer.last_update is not None:
            trainer.last_update.result()  # corrects the optimizer's step counts if that update changed nothing
        counted = optimizer.combined_step(  # combine, clip and AdamW
            shared, own, weights, stats[1:2], skip_unless=finite, parts=parts.numbers if parts is not None else None
        )
        trainer.parameters.all_gather()

        numbers = step_numbers(losses, products, weights, stats, finite)  # metrics, on their way to the host
        trainer.last_update = PendingUpdate(numbers, optimizer, counted, group.liveness.wait_for)
        updates.append(trainer.last_update)
        timer.end("update")
    examples = sum(len(indices) for batch in sampled for _, indices in batch)
    return PendingStep(updates, batches.names, examples, timer, weighs=not trainer.surgeries[0].is_plain)


def train_steps(run: TrainingRun, stop: StopSignal) -> dict[str, object]:
    """Take the steps of a run, log and save them, score every epoch; return the content of summary.json."""
    config, trainer, directory, progress = run.config, run.trainer, run.directory, run.progress
    group, optimizer, plan, calls = run.group, trainer.optimizer, run.plan, run.calls
    epochs = math.ceil(plan.steps / plan.epoch_steps)
    peak_rates = [param_group["lr"] for param_group in optimizer.param_groups]
    # Steps that a GPU is given before the last results are read: none where a callback may stop the run after any step.
    ahead = int(group.device.type == "cuda" and not calls.after_steps)
    pending: deque[tuple[int, float, int, PendingStep]] = deque()
    display = TrainingProgress(run.console, plan.steps, progress.step)
    trainer.model.train()

    with display, run.report_lost_ranks(), stop.deferred():
        epoch = math.ceil(progress.step / plan.epoch_steps)
        if (progress.step == plan.steps or progress.step % plan.epoch_steps == 0) and not run.is_scored(epoch):
            run.finish_epoch(epoch, stop)
        for step in range(progress.step, plan.steps):
            if run.is_out_of_patience or calls.asked:
                break
            started = time.perf_counter()
            position, length = step, plan.steps
            if config.optimizers == "per-task":
                ((name, position),) = plan.at(step).items()
                length = plan.steps_of(name)
                optimizer.select(name)
            factor = learning_rate_factor(position, length, config.warmup, config.schedule)
            for param_group, peak in zip(optimizer.param_groups, peak_rates, strict=True):
                param_group["lr"] = peak * factor

            sent_before, signalled = group.bytes_sent, group.start_all_reduce_max(stop.number)
            next_step = training_step(trainer, step, step / plan.steps)
            pending.append((step, factor, group.bytes_sent - sent_before, next_step))

            ends_epoch = (step + 1) % plan.epoch_steps == 0 or step + 1 == plan.steps
            stops = signalled()  # of signals before the step: no rank waits for another here
            if not stops and (ends_epoch or group.world_size == 1):
                stops = group.all_reduce_max(stop.number)
            saves = ends_epoch or (step + 1) % config.checkpoint_steps == 0 or stops
            while len(pending) > (0 if saves else ahead):
                done, its_factor, sent, pending_step = pending.popleft()
                result = pending_step.result()
                run.count(result, time.perf_counter() - started)
                epoch, rate = done // plan.epoch_steps + 1, progress.examples / progress.seconds
                lr = its_factor * peak_rates[0]
                if progress.step % config.log_steps == 0:
                    record = {"lr": lr, **result.record(), "examples_per_second": rate}
                    record |= {"bytes_sent": sent} if group.world_size > 1 else {}
                    directory.metrics.append({"step": progress.step, "epoch": epoch, **record})
                loss = sum(progress.epoch_sums.mean_losses().values())
                display.update(progress.step, f"epoch {epoch}/{epochs}", rate, loss)
                if calls.after_steps:
                    calls.call(calls.callbacks.on_step, StepInfo(progress.step, epoch, dict(result.loss), lr, rate))
                started = time.perf_counter()

            if ends_epoch and not stops:
                run.finish_epoch(epoch, stop)
            elif saves:
                run.save(directory.last)
            if stops:
                raise Stopped(stops)
        epoch = math.ceil(progress.step / plan.epoch_steps)
        if calls.asked != FAILED and not run.is_scored(epoch):  # a callback stopped the run within the epoch
            run.finish_epoch(epoch, stop)
        if calls.asked == FAILED:
            run.save(directory.last)
            run.console.print(f"a callback raised an error; {directory.where_it_stands()}")
            calls.raise_error()
    with run.report_lost_ranks():
        if stops := group.all_reduce_max(stop.number):
            raise Stopped(stops)
        return run.finish()


def train(
    config: TrainConfig, console: Console, group: ProcessGroup | None = None, callbacks: Callbacks | None = None
) -> dict[str, object]:
    """Train as `config` says, and return the content of summary.json.

    The process is left as it was: threads, kernels, torch's generator and signal handlers are those from before. Off
    Python's main thread no signal handlers are set. `minbert.device.freed_memory_kept` makes steps on a CPU faster.

    Args:
        config: with `out`.
        group: the processes that train together, each of which calls this; a single one when left out. Rank 0 writes
            and prints.
        callbacks: of rank 0. After an error in one the run can be resumed.

    Raises:
        UserError: bad input, a disk that refuses to be written, or a loss that stays non-finite.
        Stopped: SIGINT or SIGTERM came; the checkpoints of the run are whole. It is a KeyboardInterrupt.
        RankLost: another process ended or was silent.
    """
    group = group or ProcessGroup(device=resolve_device(config.device))
    assert config.out is not None
    directory = Run(config.out, writes=group.is_main)
    with StopSignal() as stop, directory.opened(config.resume):
        try:
            config = group.broadcast_object(directory.options(config, console))
            with settings(config.threads, config.backend):
                return train_steps(start(config, directory, console, group, callbacks), stop)
        except Stopped:
            console.print(f"stopped; {directory.where_it_stands()}")
            raise


def start(
    config: TrainConfig, directory: Run, console: Console, group: ProcessGroup, callbacks: Callbacks | None = None
) -> TrainingRun:
    """Set a run up in its directory, which is held, and restore its last checkpoint if it is resumed."""
    if config.resume:
        directory.check_seen()
    resumes = config.resume and directory.last.exists()
    checkpoint = directory.last if resumes else config.model
    surgeries = find_surgery(config.surgery, config.surgery_reduction)
    # Rank 0's: processors that multiply bf16 and others may train together.
    config = config.replace(precision=group.broadcast_object(resolve_precision(config.precision, group.device)))
    for line in device_lines(config, group):
        console.print(line)
    data = build_data(config, checkpoint)
    model = build_model(config, data, checkpoint, group.device)
    if not resumes:  # else it was decided by the weights that the run began with
        config = config.replace(precision=fit_for_smart(model, config, config.precision, console))
    config = config.replace(matmul=choose_matmul(config, model.encoder.config, group))
    console.print(kernels_line(group.device))
    for line in graphs_lines(config, model, group):
        console.print(line)
    config = config.replace(
        tasks=[task.name for task in data.tasks if not task.head_of],
        max_length=data.max_length,
        lr=config.lr or default_learning_rate(config, model.encoder.config.hidden_size),
        out=str(directory.path),
    )
    for part in data_lines(config, data, model, str(directory.skipped)):
        console.print(part)
    plan = build_plan(config, data)
    for surgery in surgeries:
        if remark := surgery.remark(plan.steps):
            console.print(f"warning: --surgery {surgery.name}, {plan.steps} steps: {remark}")
    trainer = build_trainer(config, data, plan, model, surgeries, group)
    if trainer.graphs is not None:
        trainer.graphs.report = console.print
    if group.world_size > 1:
        sent = len(surgeries) * trainer.parameters.bytes_per_update(ema=bool(config.bregman.mu))
        console.print(f"each process sends at most {sent / 1e6:.1f} MB a step")
    calls = CallbackCalls(callbacks or Callbacks(), group)
    run = TrainingRun(config, data, plan, trainer, directory, console, Progress(), calls)
    if directory.record is not None:
        check_records(directory.record, data.tasks, directory.path)
    run.restore()
    record_start(run)
    return run


def record_start(run: TrainingRun) -> None:
    """Record the options with which a run begins or goes on, and drop what it will write again."""
    config, directory, console, steps = run.config, run.directory, run.console, run.plan.steps
    if (record := directory.record) is not None:
        before = build_plan(config.replace(epochs=record.epochs, steps=record.steps), run.data).steps
        for line in check_length(config, before, steps, run.progress.step):
            console.print(line)
    own = config.own_tasks
    if own:
        completed = {task.name: task for task in run.data.tasks}
        directory.write_tasks([completed.get(name, record) for name, record in own.items()])
    directory.write_options(config)
    run.group.broadcast_object("begun")
    directory.check_seen()
    if damaged := directory.metrics.drop_after(run.progress.step):
        console.print(f"warning: {len(damaged)} damaged lines of {directory.metrics.path} are dropped; {damaged[0]}")
    directory.write_skipped(run.data.skipped_rows)
    if run.progress.step < steps:
        directory.forget_summary()
    if directory.writes and (trackers := config.trackers):
        options = dataclasses.asdict(config)
        directory.metrics.trackers = Trackers(trackers, directory.path, options, run.progress.step, console.print)
