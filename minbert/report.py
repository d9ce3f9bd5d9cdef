"""Pictures of a run, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from minbert.runs import Run


def plot_curves(run: Run) -> Path:
    """Draw plots/curves.png: each task's training loss by step, and its dev scores by epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = run.records()
    figure, (losses, scores) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    trained = [record for record in records if "loss" in record]
    for name in dict.fromkeys(name for record in trained for name in record["loss"]):
        points = [(record["step"], record["loss"][name]) for record in trained if name in record["loss"]]
        losses.plot(*zip(*points, strict=True), label=name, linewidth=1)
    losses.set(xlabel="step", ylabel="training loss")
    evaluated = [record for record in records if "dev" in record]
    for name in evaluated[0]["dev"] if evaluated else ():
        values = [record["dev"][name] for record in evaluated]
        values = [next(iter(value.values())) if isinstance(value, dict) else value for value in values]
        scores.plot([record["epoch"] for record in evaluated], values, label=name, marker="o")
    scores.set(xlabel="epoch", ylabel="dev score")
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    path = run.path / "plots" / "curves.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
