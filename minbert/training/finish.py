"""What a run leaves when its steps are taken: the best epoch's predictions, plots, summary.json and the report."""

from __future__ import annotations

import torch
from rich.console import Console

import minbert
from minbert import kernels
from minbert.console import score_table
from minbert.device import describe, peak_memory_bytes
from minbert.files.atomic import writing
from minbert.inference import evaluate, load_model
from minbert.report import plot_run, write_report
from minbert.runs.checkpoint import Progress, Scores
from minbert.runs.run_directory import RESUME, Run
from minbert.tasks.metrics import overall
from minbert.training.setup import Workbench


def finish_run(bench: Workbench, run: Run, progress: Progress, epoch_steps: int, console: Console) -> dict[str, object]:
    """Write the best epoch's predictions, the plots and summary.json; show the dev table of all epochs."""
    bench.group.broadcast_object("saved")
    model, _ = load_model(run.best, bench.config, bench.device)
    scores: dict[str, Scores] = {}
    for split, encoded in (("dev", bench.dev), ("test", bench.test)):
        present = [task for task in bench.tasks if task.name in encoded]
        scores[split], outputs = evaluate(model, present, encoded, bench.device, bench.group)
        for task in present if bench.group.is_main else ():
            run.write_predictions(task, split, encoded[task.name], outputs[task.name])
    if not bench.group.is_main:
        return {}
    with writing(run.path / "plots", RESUME):
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
    report = write_report(run, bench.config.data)
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
