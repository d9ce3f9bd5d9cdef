"""bench/protocol_rates.py: the rate that it takes, its runs and its record."""

from __future__ import annotations

import json
from pathlib import Path

import protocol_rates
import pytest
from groups import quick_options
from protocol_rates import best, main, table
from results import result
from scores_of_runs import Row, read_table

from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.recipes import paper, protocol
from minbert.runs.run_directory import Run


def row(rate: str, *overall: float) -> Row:
    return Row(rate, [result(seed, score) for seed, score in enumerate(overall)])


def test_the_best_mean_counts_and_of_equal_ones_the_first():
    assert best([row("0.001", 0.5, 0.7), row("0.0001", 0.65, 0.65), row("0.01", 0.1, 0.9)]).name == "0.0001"
    assert best([row("0.0001", 0.5), row("0.001", 0.5)]).name == "0.0001"
    text = table({"joint": [row("0.0001", 0.5), row("0.0002", 0.75)]}, {"joint": 1e-4}, "small")
    assert "| joint | 004/multitask | 0.0002 | 0.7500 |" in text
    assert "- joint: 0.0002 is best, and small has 0.0001." in text
    assert "which the protocol has" in table({"joint": [row("0.0001", 0.5)]}, {"joint": 1e-4}, "small")


def test_every_family_has_a_row_of_it():
    for family, (name, rates) in protocol_rates.FAMILIES.items():
        number, _, of_paper = name.partition("/")
        assert protocol("small").options(paper(number).row(of_paper))["lr"] == protocol("small").rates[family]
        assert protocol("small").rates[family] in rates


def test_the_rates_and_the_docs_are_those_of_the_recorded_runs():
    docs = Path(__file__).parents[2] / "docs"
    recorded = read_table(docs / "studies" / "rates.json")
    found = {
        family: [Row(f"{rate:g}", [recorded[f"{family}/{rate:g}"][0]]) for rate in rates]
        for family, (_, rates) in protocol_rates.FAMILIES.items()
    }
    assert {family: float(best(rows).name) for family, rows in found.items()} == protocol("small").rates
    assert table(found, protocol("small").rates, "small") in (docs / "papers.md").read_text()


@pytest.mark.slow
def test_runs_are_trained_as_the_protocol_says(course_data, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol_rates, "FAMILIES", {"joint": ("004/multitask", (1e-3, 1e-2))})
    own = quick_options(course_data, tmp_path)
    rest = [option for option in own if option.split("=")[0] not in ("--data", "--out", "--epochs", "--lr", "--recipe")]
    rest = [option for option in rest if option.split("=")[0] not in ("--batch-size", "--epoch-length")]
    given = ["--data", course_data, "--runs", tmp_path / "runs", "--results", tmp_path / "results", "--", *rest]
    assert main([*map(str, given), "--steps=2"]) == 0
    (path,) = (tmp_path / "results").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == ["0.001", "0.01"]
    for found in rows:
        run = Run(tmp_path / "runs" / "joint" / found["name"] / "seed-0")
        config = run.config()
        assert isinstance(config, TrainConfig)
        assert (config.lr, config.batch_size, config.epoch_length) == (float(found["name"]), 32, 63)
        assert found["overall"] == run.summary()["dev"]["overall"]


def test_what_the_script_gives_itself_is_refused(tmp_path):
    with pytest.raises(UserError, match="--lr after --: this script gives it to every run"):
        main(["--runs", str(tmp_path), "--", "--lr=1"])
    with pytest.raises(UserError, match="unknown protocol 'tiny'"):
        main(["--protocol", "tiny"])
