"""The charts of the report and of plots/ show the same curves."""

from __future__ import annotations

from unittest.mock import patch

from matplotlib.axes import Axes

from minbert.report.training_charts import palette, plot_run, score_curves, training_figures
from minbert.report.training_history import curves


def test_both_draw_the_losses_and_the_scores_of_the_log(copy):
    records = copy.metrics.records()
    scores, losses = score_curves(records), curves(records, "loss")
    assert list(scores) == ["sst", "qqp", "sts", "overall"]
    assert [len(points) for points in scores.values()] == [2, 2, 2, 2]
    figures = training_figures(records, palette(["sst", "qqp", "sts"]))
    assert [figure.title for figure in figures] == ["Dev scores", *(f"Training loss, {name}" for name in losses)]
    with patch.object(Axes, "plot", autospec=True, side_effect=Axes.plot) as plot:
        paths = plot_run(copy)
    assert [path.name for path in paths] == ["curves.png", "timing.png", "conflicts.png"]
    drawn = {(call.kwargs["label"], call.args[2]) for call in plot.call_args_list}
    assert drawn >= {(name, tuple(y for _, y in points)) for name, points in [*scores.items(), *losses.items()]}


def test_a_run_without_records_has_no_figures_and_empty_plots(copy):
    copy.metrics.path.unlink()
    assert training_figures(copy.metrics.records(), {}) == []
    assert [path.name for path in plot_run(copy)] == ["curves.png", "timing.png"]
