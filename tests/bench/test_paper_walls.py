"""bench/paper_walls.py: its rows, that all contenders read the same batches, its record, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re

import paper_walls
import pytest
import torch
from batches import sequences_as
from paper_walls import (
    CONTENDERS,
    PLAIN,
    ROWS,
    Case,
    alone,
    main,
    maker,
    minbert_trainer,
    table,
    transformers_model,
)
from peers import shape
from steps import peak_memory

from minbert.errors import UserError


@pytest.fixture(autouse=True)
def small_work(monkeypatch):
    monkeypatch.setattr(paper_walls, "SMOKE", True)
    monkeypatch.setitem(paper_walls.SIZES, "small", shape(True))


def test_rows_are_those_of_the_papers(monkeypatch):
    monkeypatch.setattr(paper_walls, "SMOKE", False)
    rows = {name: Case(name, "base", "fp32").config for name in ROWS}
    assert [config.batch_size for config in rows.values()] == [32, 64, 8]
    assert [config.surgery for config in rows.values()] == ["sum", "pcgrad", "gse"]
    assert [config.sampling for config in rows.values()] == ["round-robin", "joint", "joint"]
    assert [config.smart.lambda_s for config in rows.values()] == [1.0, {"qqp": 0.5}, 5.0]
    assert {config.dropout for config in rows.values()} == {0.1}
    assert rows["003/6"].shared_layer == "linear"
    assert rows["004/smart-gse"].scratch.hidden_size == 768


@pytest.mark.parametrize(
    ("row", "apart"),
    [([1, 5, 6, 2, 7, 2], [[1, 5, 6, 2], [1, 7, 2]]), ([9, 8, 7, 6], [[9, 8], [9, 7, 6]])],
)
def test_a_pair_is_divided_after_its_first_separator_or_in_the_middle(row, apart):
    assert sequences_as("cross-encoder", row) == [row]
    assert sequences_as("bi-encoder", row) == apart
    assert sequences_as("both", row) == [row, *apart]


@pytest.mark.parametrize("row", ROWS)
def test_peers_read_the_sequences_that_minbert_reads(row, monkeypatch):
    monkeypatch.setattr(paper_walls, "BATCHES", 2)
    case = Case(row, "small", "fp32")
    trainer, peer = minbert_trainer(case, False), transformers_model(case, "eager")
    for turn in range(3):
        peer.load()
        steps = range(3 * turn, 3 * turn + 3) if case.config.sampling == "round-robin" else [turn]
        sampled = [each for step in steps for batch in trainer.sample(step) for each in batch]
        assert [task.name for task, _ in sampled] == list(peer.ids)
        for task, indices in sampled:
            packed, kinds = trainer.batches.data[task.name].pack(indices), peer.ids[task.name]
            read = [row[row != 0] for rows in zip(*kinds, strict=True) for row in rows]
            assert packed.lengths.tolist() == [len(row) for row in read]
            assert packed.token_ids.tolist() == torch.cat(read).tolist()


@pytest.mark.parametrize("row", ROWS)
def test_every_contender_takes_a_step(row):
    case = Case(row, "small", "fp32")
    updates = 3 if case.config.sampling == "round-robin" else 1
    for who, is_plain in CONTENDERS.values():
        found = maker(who, case)(is_plain)()
        if who == "minbert":
            assert [result.examples for result in found] == [6 // updates] * updates
            assert {name for result in found for name in result.loss} == {"sst", "qqp", "sts"}
            regularised = {name for result in found for name in result.smart}
            assert regularised == ({*()} if is_plain else {"qqp"} if row == "003/6" else {"sst", "qqp", "sts"})
        else:
            assert math.isfinite(found.item())


def test_gse_updates_twice_and_round_robin_once_for_each_task():
    for row, updates in zip(ROWS, (3, 1, 2), strict=True):
        case = Case(row, "small", "fp32")
        peer = transformers_model(case, "sdpa")
        getattr(peer, ROWS[row][0])(smart=True)
        assert {state["step"].item() for state in peer.optimizer.state.values()} >= {updates}


def test_the_table_has_ratios_to_the_plain_step_of_transformers():
    row = {"case": "003/6, 3 x 64", "name": "minbert", "seconds": 1.5, "ratio": 0.5, "peak_bytes": 2**30}
    lines = table([{**row, "peak_ratio": 0.25}]).splitlines()
    assert lines[2] == "| 003/6, 3 x 64 | minbert | 1.500 | 0.50 | 1024 | 0.25 |"
    assert lines[-1] == f"x: of {PLAIN}."


def test_a_record_has_time_and_memory_of_every_contender(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_walls, "peak_memory", lambda make, *arguments, steps: 2**20 * len(arguments[0]))
    assert main(["--rows", "003/6", "--steps", "1", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == list(CONTENDERS)
    for row in rows.values():
        assert row["case"] == "003/6, 3 x 2, small, fp32"
        assert row["ratio"] == row["seconds"] / rows[PLAIN]["seconds"]
        assert row["peak_ratio"] == row["peak_bytes"] / rows[PLAIN]["peak_bytes"]
    assert rows["minbert"]["peak_bytes"] == 7 * 2**20
    text = path.with_suffix(".md").read_text()
    assert "`python bench/paper_walls.py --size small --rows 003/6 --steps 1 --precision fp32`" in text
    assert str(tmp_path) not in text + path.read_text()


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_that_takes_the_steps(monkeypatch):
    monkeypatch.setenv("MINBERT_BENCH_SMOKE", "1")
    case = Case("004/smart-gse", "small", "fp32")
    assert 2**20 < peak_memory(alone, *CONTENDERS["minbert"], case, steps=2) < 2**28
    with pytest.raises(EOFError):
        peak_memory(os._exit, 3, steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "bsae"], "--size: unknown size 'bsae' (did you mean 'base'?); known: small, base"),
        (["--rows", "002/h-finetun"], "--rows: unknown row '002/h-finetun' (did you mean '002/h-finetune'?)"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "one"], "argument --steps: invalid int value: 'one'; --help lists the options"),
        (["--precision", "fp16"], "argument --precision: invalid choice: 'fp16'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_timed(arguments, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        main(["--results", str(tmp_path), *arguments])
    assert list(tmp_path.iterdir()) == []
