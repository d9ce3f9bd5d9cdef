"""Write a run's report again: `minbert report RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minbert import cli
from minbert.console import Terminal
from minbert.report import write_report
from minbert.runs.run_directory import Run


@dataclass(frozen=True)
class ReportConfig:
    """Write RUN/report.html, as training does at its end.

    Args:
        run: run directory.
        data: where the dev split's texts are; the run's own training data when left out.
        tasks_file: tasks file that names the files of the run's own tasks; by default those that it was trained with.
    """

    run: str
    data: str | None = None
    tasks_file: str | None = None


def main(arguments: Sequence[str]) -> int:
    options = cli.parse("report", ReportConfig, arguments, positional="run")
    run = Run(options.run)
    config = run.config()
    if options.data is None and config.data is not None:
        Terminal(stderr=True).print(f"data: {config.data}, which {run.path}/config.yaml names; --data DIR reads other")
    Terminal().print(str(write_report(run, options.data, options.tasks_file)))
    return 0


if __name__ == "__main__":
    cli.run(main)
