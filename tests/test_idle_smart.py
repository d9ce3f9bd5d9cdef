"""A run says when SMART did nothing in an epoch: by its mean share of the loss over the steps of the epoch."""

from __future__ import annotations

import re

import pytest

from minbert import train
from minbert.runs.run_directory import Run
from minbert.training import training_run

WARNING = re.compile(r"warning: SMART's regulariser was (\S+) of the loss: it does nothing")


@pytest.mark.parametrize(
    "options", [[], ["--sampling=round-robin", "--surgery=sum"], ["--sampling=shuffled", "--surgery=sum"]]
)
def test_the_share_is_a_mean_over_the_epochs_steps(quick, tmp_path, capsys, options, monkeypatch):
    monkeypatch.setattr(training_run, "LEAST_SMART_SHARE", 1.0)
    assert train.main([*quick, *options, "--epochs=1"]) == 0
    shares = [record["smart_share"] for record in Run(tmp_path / "run").metrics.records() if "smart_share" in record]
    assert len(shares) == (18 if options else 6)
    (said,) = WARNING.findall(capsys.readouterr().out)
    assert float(said) == pytest.approx(sum(shares) / len(shares), rel=0.05)
    monkeypatch.setattr(training_run, "LEAST_SMART_SHARE", sum(shares) / len(shares) / 1.5)
    assert train.main([*quick, *options, "--epochs=1", f"--out={tmp_path / 'other'}"]) == 0
    assert not WARNING.search(capsys.readouterr().out)
