"""k-fold cross-validation: a training run for each fold, and the mean and the deviation of their scores."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import escape
from rich import box
from rich.console import Console
from rich.table import Table

from minbert.config import TrainConfig
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError
from minbert.files.atomic import write_atomically, write_json, writing
from minbert.files.schema_checks import FORMAT
from minbert.runs.resume import LENGTH, resumed
from minbert.runs.run_directory import Run
from minbert.training.callbacks import Callbacks
from minbert.training.loop import train

SPLITS = ("dev", "test")
FINISHED = ("dev", "test", "best_epoch", "steps", "stopped_early")  # of a fold's summary.json in folds.json


class CrossValidation:
    """The runs of all folds, and the table of their scores: the directory that `cross_validate` writes.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def runs(self) -> list[Run]:
        """The runs that are there, by fold."""
        folds = sorted(int(path.name[5:]) for path in self.path.glob("fold-*") if path.name[5:].isdecimal())
        return [Run(fold_directory(self.path, fold)) for fold in folds]

    def summary(self) -> dict[str, Any]:
        """The folds' scores with their mean and deviation, as folds.json has them; nothing while a fold goes on.

        Raises:
            UserError: a file of a run is damaged.
        """
        summaries = {fold: run.summary() for fold, run in enumerate(self.runs, 1)}
        return summarize(summaries) if len(summaries) > 1 and all(summaries.values()) else {}

    def __repr__(self) -> str:
        return f"CrossValidation({str(self.path)!r}, {len(self.runs)} runs)"

    def _repr_html_(self) -> str:
        record = self.summary()
        if not record:
            return str(escape(self))
        names, rows = table(record)
        lines = ["".join(f"<th>{escape(name)}</th>" for name in names)]
        lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def cross_validate(
    config: TrainConfig, console: Console, group: ProcessGroup, callbacks: Callbacks | None = None
) -> dict[str, Any]:
    """Train the run of every fold, OUT/fold-1 and so on; write OUT/folds.json and folds.md, and show them.

    Each run has its fold as dev split (`minbert.data.Folds`), and chooses its best epoch by it. A test split is the
    same for all. To resume goes on with what is missing: a fold that has finished stays as it is, unless --epochs,
    --steps or --patience are others now.

    Args:
        config: with `folds` and `out`, and without `fold`.
        group: the processes that train together, each of which calls this.
        callbacks: of each run; to stop one goes on with the next.

    Returns:
        the content of folds.json; nothing on other ranks than the first.

    Raises:
        UserError: as of `train`, or a directory that holds something else.
    """
    assert config.folds is not None
    assert config.out is not None
    out = Path(config.out)
    folds = range(1, config.folds + 1)
    if group.is_main:
        _check_usable(out, config, folds)
    for fold in folds:
        directory = fold_directory(out, fold)
        begun = config.resume and (directory / "config.yaml").exists()
        of_fold = config.replace(fold=fold, out=str(directory), resume=begun)
        begun, finished = group.broadcast_object((begun, group.is_main and begun and has_finished(of_fold)))
        console.rule(f"fold {fold} of {config.folds}{', which has finished' if finished else ''}", align="left")
        if not finished:
            train(of_fold.replace(resume=begun), console, group, callbacks)
    if not group.is_main:
        return {}
    record = summarize({fold: Run(fold_directory(out, fold)).summary() for fold in folds})
    names, rows = table(record)
    with writing(out, "free some space and run the same command with --resume"):
        write_json(out / "folds.json", {"format": FORMAT, **record})
        write_atomically(out / "folds.md", markdown(names, rows))
    shown = Table(box=box.SIMPLE_HEAD, title=f"{config.folds} folds", title_justify="left", title_style="bold")
    for name in names:
        shown.add_column(name, justify="right" if name else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    console.print(f"written to {out}: folds.json and folds.md")
    return record


def fold_directory(out: Path, fold: int) -> Path:
    """The run directory of a fold, from 1."""
    return out / f"fold-{fold}"


def has_begun(config: TrainConfig) -> bool:
    """Whether the run that --out names is there, or that of one of its folds."""
    assert config.out is not None
    out = Path(config.out)
    directories = [out] if config.folds is None or config.fold is not None else out.glob("fold-*")
    return any((directory / "config.yaml").exists() for directory in directories)


def has_finished(config: TrainConfig) -> bool:
    """Whether a fold's run has finished, and is as long as these options say.

    Raises:
        UserError: it was started with other options.
    """
    run = Run(config.out or "")
    if not run.summary():
        return False
    record = run.config()
    resumed(record, config, run.path)
    return all(getattr(record, name) == getattr(config, name) for name in LENGTH)


def _check_usable(out: Path, config: TrainConfig, folds: Sequence[int]) -> None:
    if (out / "config.yaml").exists():
        raise UserError(f"{out} holds a single run, and --folds makes a directory of runs; give another --out")
    begun = [fold for fold in folds if (fold_directory(out, fold) / "config.yaml").exists()]
    if config.resume and not begun:
        raise UserError(f"{out}: no run of a fold there; without --resume the command starts them")
    if begun and not config.resume:
        raise UserError(f"{fold_directory(out, begun[0])} holds a run: give --resume to go on, or another --out")


def summarize(summaries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of folds.json.

    Args:
        summaries: by fold, its summary.json.

    Returns:
        the folds' scores, and by split, task and metric their mean and standard deviation (with n - 1; `overall` is
        one of the tasks there).
    """
    runs = [
        {"fold": fold, **{name: summary[name] for name in FINISHED if name in summary}}
        for fold, summary in summaries.items()
    ]
    record: dict[str, Any] = {"folds": len(runs), "runs": runs}
    for split in SPLITS:
        if any(split not in run for run in runs):
            continue
        values = [dict(_flat(run[split])) for run in runs]
        record[split] = {}
        for task, metric in values[0]:
            each = [of_run[task, metric] for of_run in values]
            found = {"mean": statistics.fmean(each), "deviation": statistics.stdev(each)}
            if metric:
                record[split].setdefault(task, {})[metric] = found
            else:
                record[split][task] = found
    return record


def table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Names of columns, the folds and the mean with the deviation; and rows, one for each split, task and metric."""
    runs = record["runs"]
    rows = []
    for split in (split for split in SPLITS if split in record):
        scores = [dict(_flat(run[split])) for run in runs]
        for task, metric in scores[0]:
            found = record[split][task][metric] if metric else record[split][task]
            name = " ".join(filter(None, (split, task, metric)))
            each = [f"{of_run[task, metric]:.3f}" for of_run in scores]
            rows.append([name, *each, f"{found['mean']:.3f} ± {found['deviation']:.3f}"])
    return ["", *(f"fold {run['fold']}" for run in runs), "mean ± deviation"], rows


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(names)} |", "|---" + "|---:" * (len(names) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _flat(scores: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """Scores by task and metric; of `overall` the metric is empty."""
    for task, value in scores.items():
        if isinstance(value, Mapping):
            yield from (((task, metric), score) for metric, score in value.items())
        else:
            yield (task, ""), value
