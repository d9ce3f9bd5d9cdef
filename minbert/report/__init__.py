"""What a run looks like: pictures, RUN/report.html, and one page for several runs."""

from minbert.report.comparison_report import Row, write_comparison
from minbert.report.run_report import write_report
from minbert.report.training_charts import plot_run

__all__ = ["Row", "plot_run", "write_comparison", "write_report"]
