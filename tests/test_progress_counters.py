"""progress.json: flat keys, which 0.1.0 wrote too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minbert.errors import UserError
from minbert.runs.progress_counters import DevScores, EpochSums, Progress, load_progress
from minbert.tasks import TASKS

KEYS = [
    *("format", "step", "examples", "seconds", "skipped", "skipped_in_a_row", "smart_warned", "data"),
    *("loss_sums", "loss_counts", "smart_shares", "conflicts", "dev", "best_epoch", "best_overall"),
]
FIXTURE = Path(__file__).parent / "fixtures" / "run-0.1.0" / "run"


def score(value: float) -> dict[str, dict[str, float]]:
    return {"sst": {"accuracy": value}}


def test_the_file_has_the_fields_of_all_records_and_is_read_back(tmp_path):
    progress = Progress(step=7, examples=56, seconds=1.5, data={"sst": "abc"})
    progress.epoch_sums.add({"sst": 2.0, "sts": 1.0}, 0.25, {"sst/sts": -0.5})
    progress.scores.add(1, score(0.5), [TASKS["sst"]])
    (tmp_path / "progress.json").write_text(json.dumps(progress.to_json()))
    assert list(progress.to_json()) == KEYS
    assert load_progress(tmp_path) == progress


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_a_file_of_0_1_0_is_read(checkpoint):
    written = json.loads((FIXTURE / checkpoint / "progress.json").read_text())
    read = load_progress(FIXTURE / checkpoint).to_json()
    assert {name: read[name] for name in written} == written


def test_sums_become_means_over_the_steps_of_each_task():
    sums = EpochSums()
    sums.add({"sst": 2.0, "sts": 1.0}, 0.25, {"sst/sts": -0.5})
    sums.add({"sst": 4.0}, 0.75, {"sst/sts": 0.5})
    assert sums.mean_losses() == {"sst": 3.0, "sts": 1.0}
    assert sums.conflict_rates() == {"sst/sts": 0.5}
    assert sums.smart_shares == 1.0


def test_an_epoch_keeps_its_better_scores_and_the_first_best_epoch_stays():
    scores = DevScores()
    assert [
        scores.add(epoch, score(value), [TASKS["sst"]]) for epoch, value in ((1, 0.5), (2, 0.7), (2, 0.6), (3, 0.7))
    ] == [*(True, True, False, False)]
    assert scores == DevScores([score(0.5), score(0.7), score(0.7)], 2, 0.7)


def test_counts_that_contradict_each_other_are_refused(tmp_path):
    (tmp_path / "progress.json").write_text(json.dumps({**Progress().to_json(), "loss_sums": {"sst": 1.0}}))
    with pytest.raises(UserError, match=r"progress\.json is damaged \(its counts contradict each other\)"):
        load_progress(tmp_path)
