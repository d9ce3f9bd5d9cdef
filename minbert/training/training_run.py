"""A training run: what it works with, and what it does at its start, at the end of an epoch and at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

import minbert
from minbert import diagnosis, kernels
from minbert.config import TrainConfig
from minbert.console import InferenceProgress, score_table
from minbert.data import Plan
from minbert.device import describe, peak_memory_bytes
from minbert.distributed.liveness import RankLost
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError
from minbert.files.atomic import writing
from minbert.inference import evaluate, load_model, with_thresholds_of
from minbert.methods.task_gradients import substituted
from minbert.model import MultitaskModel, load_heads
from minbert.report import plot_run, write_report
from minbert.runs import checkpoint
from minbert.runs.predictions import write_predictions
from minbert.runs.progress_counters import EpochSums, Progress, load_progress
from minbert.runs.run_directory import RESUME, Run
from minbert.runs.scores import Scores
from minbert.tasks.metrics import overall
from minbert.training.callbacks import CallbackCalls, EpochInfo
from minbert.training.setup import TrainingData
from minbert.training.step_result import StepResult
from minbert.training.stop_signal import Stopped, StopSignal
from minbert.training.trainer import Trainer

LEAST_SMART_SHARE = 1e-4  # of the loss: below it SMART does nothing


@dataclass
class TrainingRun:
    """A run directory, and what is trained there."""

    config: TrainConfig  # every option that was left open is decided
    data: TrainingData
    plan: Plan
    trainer: Trainer
    directory: Run
    console: Console
    progress: Progress
    calls: CallbackCalls
    best_outputs: dict[str, np.ndarray] | None = field(default=None, init=False)  # dev, if scored in this process

    @property
    def group(self) -> ProcessGroup:
        return self.trainer.group

    # Checkpoints -------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write a checkpoint, and before it the lines of metrics.jsonl up to it; all ranks call this together."""
        self.directory.metrics.sync()
        trainer = self.trainer
        trainer.parameters.all_gather_masters()
        state = trainer.parameters.gather_full_state(trainer.optimizer.state)
        if self.group.is_main:
            model, master = trainer.model, trainer.optimizer.master
            checkpoint.save(path, model, self.data.tokenizer, state, self.progress, trainer.surgeries, master)

    def restore(self) -> None:
        """Load the last checkpoint of a resumed run, if there is one.

        Raises:
            UserError: the checkpoint is of another model, or the training or dev data has changed since.
        """
        train, dev = self.data.splits["train"], self.data.splits["dev"]
        data: dict[str, int | str] = {name: encoded.checksum for name, encoded in train.items()}
        data |= {f"{name} dev": encoded.checksum for name, encoded in dev.items()}
        self.progress = Progress(data=data)
        last = self.directory.last
        if not (self.config.resume and last.exists()):
            return
        progress = load_progress(last)
        for split, of_split, suffix in (("training", train, ""), ("dev", dev, " dev")):
            recorded = {name: progress.data.get(f"{name}{suffix}") for name in of_split}
            changed = [name for name, checksum in recorded.items() if not of_split[name].is_recorded_as(checksum)]
            if changed and (split == "training" or any(recorded.values())):  # up to 0.1.0, there were none of dev
                names = ", ".join(changed)
                raise UserError(
                    f"the {split} data of {names} changed since {self.directory.path} began; start a new run"
                )
        progress.data = data
        self.progress, trainer = progress, self.trainer
        load_heads(trainer.model, last / "heads.safetensors")
        for task in checkpoint.load_tasks(last, list(trainer.model.tasks.values())):
            trainer.model.tasks[task.name] = task
        trainer.optimizer.load(trainer.parameters.shard_state(checkpoint.load_state(last, trainer.model)))
        trainer.parameters.all_gather()  # of an EMA every rank has loaded its shards alone
        for surgery in trainer.surgeries:
            if surgery.weighting is not None:
                surgery.weighting.load(last, self.group.device)
        self.console.print(f"resuming {self.directory.path} after step {progress.step}")

    @contextmanager
    def report_lost_ranks(self) -> Iterator[None]:
        """Add to the message of a lost rank where the run stands and how it goes on."""
        try:
            yield
        except RankLost as lost:
            message = f"{lost} after step {self.progress.step}; {self.directory.where_it_stands()}"
            raise RankLost(message, prints=lost.prints) from None

    # Steps -------------------------------------------------------------------------------------------------------

    def count(self, result: StepResult, seconds: float) -> None:
        """Count a step in the run's progress.

        Raises:
            UserError: too many steps in a row had a loss or gradient that is not finite.
        """
        progress = self.progress
        progress.examples += result.examples
        progress.seconds += seconds
        if result.updated:
            progress.skipped_in_a_row = 0
            progress.epoch_sums.add(result.loss, result.smart_share, result.conflicts.get("cosine", {}))
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            if progress.skipped_in_a_row >= self.config.max_skipped:
                losses = ", ".join(f"{name} {value:g}" for name, value in result.loss.items())
                raise UserError(
                    f"the loss or gradient was not finite {progress.skipped_in_a_row} steps in a row, up to step "
                    f"{progress.step + 1} (loss {losses}, gradient norm {result.grad_norm:g}); try a smaller --lr, "
                    f"a longer --warmup, a smaller --clip-norm or --precision fp32"
                )
        progress.step += 1

    # The end of an epoch -----------------------------------------------------------------------------------------

    def is_scored(self, epoch: int) -> bool:
        """Whether `finish_epoch` is done for an epoch, which ended with the last step."""
        return len(self.progress.scores.dev) >= epoch and not self.progress.epoch_sums.loss_counts

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the overall dev score has not improved for --patience epochs: the same on all ranks."""
        patience = self.config.patience
        return patience is not None and self.progress.scores.epochs_since_best >= patience

    def finish_epoch(self, epoch: int, stop: StopSignal) -> None:
        """Score the dev split, show it, and save best/ and then last/: a last/ never names a best/ that is not there.

        A signal stops the scoring at once, and a resumed run does it again. A second scoring, of a run that ended in
        the middle of the epoch, keeps the better scores.

        Raises:
            Stopped: a signal came while the split was scored.
        """
        data, progress, directory, model = self.data, self.progress, self.directory, self.trainer.model
        self.trainer.parameters.all_gather_masters()
        try:
            with (
                stop.deferred(self.group.world_size > 1),  # several processes stop together, after a step
                substituted(model.encoder, self._as_loaded),
            ):
                scores, outputs = self.evaluate_split(model, "dev", choose_thresholds=True)
        except Stopped:
            self.save(directory.last)
            raise
        total = overall(scores, data.tasks)
        losses, rates = progress.epoch_sums.mean_losses(), progress.epoch_sums.conflict_rates()
        record = {"dev": {**scores, "overall": total}, "train_loss": losses}
        directory.metrics.append(
            {"step": progress.step, "epoch": epoch, **record, **({"conflict_rate": rates} if rates else {})}
        )
        self._warn_of_idle_smart()
        progress.epoch_sums = EpochSums()
        shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        self.console.print(score_table(f"train loss: {shown}", [(f"dev, epoch {epoch}", scores, total)]))
        if progress.scores.add(epoch, scores, data.tasks):
            self.save(directory.best)
            self.best_outputs = outputs
        self.save(directory.last)
        if self.calls.after_epochs:
            copied = {name: dict(of_task) for name, of_task in scores.items()}
            self.calls.call(self.calls.callbacks.on_epoch, EpochInfo(epoch, progress.step, copied, total, losses))

    def evaluate_split(
        self, model: MultitaskModel, split: str, **options: bool
    ) -> tuple[Scores, dict[str, np.ndarray]]:
        """`evaluate` of a split, with its options, and a line every ten seconds of how far this process is."""
        encoded, group = self.data.splits[split], self.group
        present = [task for task in self.data.tasks if task.name in encoded]
        total = sum(map(len, encoded.values())) if group.world_size == 1 else None  # several share them
        with InferenceProgress(self.console, total, live=False, title=split) as progress:
            return evaluate(model, present, encoded, group.device, group, count=progress.add, **options)

    def _as_loaded(self, param: nn.Parameter) -> Tensor:
        """A parameter as a model that is loaded from a checkpoint reads it, which rounds the ties of bf16 to even."""
        return self.trainer.optimizer.master(param).to(param.dtype)

    def _warn_of_idle_smart(self) -> None:
        """Say once if SMART is on and its regulariser was next to nothing in this epoch."""
        progress = self.progress
        counts = progress.epoch_sums.loss_counts.values()  # a step is counted for each task that took it
        steps = max(counts, default=0) if self.config.sampling == "joint" else sum(counts)
        share = progress.epoch_sums.smart_shares / max(1, steps)
        if self.config.smart.on and share < LEAST_SMART_SHARE and not progress.smart_warned:
            progress.smart_warned = True
            smart = self.config.smart
            lengths = ", ".join(f"--smart.{name}" for name in smart.reach)
            self.console.print(
                f"warning: {smart.title}'s regulariser was {share:.1e} of the loss: it does nothing; give a larger"
                f" {lengths} or --smart.lambda-s"
            )

    # The end of the run ------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, object]:
        """Write the best epoch's predictions, the plots, summary.json and the report; show the scores of all epochs.

        The dev split is evaluated here only if an earlier process scored the best epoch.

        Returns:
            the content of summary.json; nothing on other ranks than the first.
        """
        config, data, directory, progress, group = self.config, self.data, self.directory, self.progress, self.group
        stopped_early = progress.step < self.plan.steps
        if stopped_early:
            waited, ended = progress.scores.epochs_since_best, f"after step {progress.step} of {self.plan.steps}"
            self.console.print(
                f"the overall dev score has not improved for {waited} epoch{'' if waited == 1 else 's'}: training stops"
                f" {ended} (--patience {config.patience})"
                if self.is_out_of_patience
                else f"a callback returned True: training stops {ended}"
            )
        group.broadcast_object("saved")
        model, _ = load_model(directory.best, config, group.device)
        dev_outputs = self.best_outputs or self.evaluate_split(model, "dev")[1]
        test_scores, test_outputs = self.evaluate_split(model, "test")
        if not group.is_main:
            return {}
        for split, outputs in (("dev", dev_outputs), ("test", test_outputs)):
            for task in data.tasks:
                if (name := task.name) in outputs:
                    own, examples = with_thresholds_of(model, task), data.splits[split][name]
                    write_predictions(directory.predictions_directory(), own, split, examples, outputs[name])
        with writing(directory.path / "plots", RESUME):
            plot_run(directory)
        tested = {"test": {**test_scores, "overall": overall(test_scores, data.tasks)}} if test_scores else {}
        rate = progress.examples / progress.seconds
        source = {"commit": commit} if (commit := diagnosis.commit()) is not None else {}
        summary: dict[str, object] = {
            "dev": {**progress.scores.dev[progress.scores.best_epoch - 1], "overall": progress.scores.best_overall},
            **tested,
            "best_epoch": progress.scores.best_epoch,
            "steps": progress.step,
            "stopped_early": stopped_early,
            "steps_per_epoch": self.plan.epoch_steps,
            "skipped_steps": progress.skipped,
            "examples": progress.examples,
            "seconds": progress.seconds,
            "examples_per_second": rate,
            "peak_memory_bytes": peak_memory_bytes(group.device),
            "parameters": sum(param.numel() for param in model.parameters()),
            "device": describe(group.device, config.precision),
            "precision": config.precision,
            "backends": kernels.backends(group.device),
            "processor": diagnosis.processor_name(),
            "versions": {"minbert": minbert.__version__, "torch": torch.__version__, **source},
        }
        directory.write_summary(summary)
        report = write_report(directory, config.data, config.tasks_file)
        rows = [
            (
                f"dev, epoch {epoch}{' (best)' if epoch == progress.scores.best_epoch else ''}",
                of_epoch,
                overall(of_epoch, data.tasks),
            )
            for epoch, of_epoch in enumerate(progress.scores.dev, 1)
        ]
        self.console.print(score_table("all epochs", rows))
        if progress.skipped:
            self.console.print(f"{progress.skipped} steps were skipped: their loss or gradient was not finite")
        self.console.print(f"report: {report}")
        self.console.print(f"{rate:.0f} examples/s; run directory: {directory.path}")
        return summary
