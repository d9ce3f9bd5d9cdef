"""What a run looks like: pictures, RUN/report.html, and one page for several runs."""

from minbert.report.comparison import Row, write_comparison
from minbert.report.plots import plot_run
from minbert.report.single import write_report

__all__ = ["Row", "plot_run", "write_comparison", "write_report"]
