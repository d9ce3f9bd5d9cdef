"""The papers' rows as recipes, and the protocol that gives them all as many examples."""

from __future__ import annotations

import math
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from course import write_further_data
from groups import SWEEP_OPTIONS

from minbert import reproduce, train
from minbert.cli import parse_layers
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.recipes import paper, papers, protocol
from minbert.reproduce import FILES, ReproduceConfig, train_options
from minbert.runs.run_directory import Run
from minbert.tasks import TASKS

ROWS = [(number, name) for number in papers() for name in paper(number).rows]


def test_the_papers_tables_are_whole():
    assert {number: len(paper(number).rows) for number in papers()} == {
        "000": 10,
        "001": 10,
        "002": 16,
        "003": 21,
        "004": 13,
    }


@pytest.mark.parametrize(("number", "name"), ROWS)
def test_every_row_is_a_recipe_with_the_papers_figures(number, name):
    row = paper(number).rows[name]
    parse_layers("train", TrainConfig, [f"--recipe={number}/{name}"])
    for split, scores in row.published.items():
        assert split in ("dev", "test")
        assert set(scores) <= {*TASKS, "overall"}
        assert all(0 < score < 1 for score in scores.values())


def test_a_recipe_of_a_paper_is_named_whole():
    with pytest.raises(UserError, match=r"paper 000 has no row 'smrat' \(did you mean 'smart'\?\)"):
        parse_layers("train", TrainConfig, ["--recipe=000/smrat"])


@pytest.fixture
def real(tmp_path):
    """Options that name real data, with splits of 16 rows to evaluate, and a real encoder."""
    if not (os.environ.get("MINBERT_TEST_DATA") and os.environ.get("MINBERT_TEST_MODEL")):
        pytest.skip("needs MINBERT_TEST_DATA and MINBERT_TEST_MODEL")
    directory = tmp_path / "data"
    directory.mkdir()
    for path in Path(os.environ["MINBERT_TEST_DATA"]).glob("*.csv"):
        if "train" in path.name:
            (directory / path.name).symlink_to(path.resolve())
        else:
            (directory / path.name).write_text("".join(path.read_text().splitlines(keepends=True)[:17]))
    return [f"--data={directory}", f"--model={os.environ['MINBERT_TEST_MODEL']}", "--precision=fp32"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", ["000/smart-pcgrad-sts-aug", "001/surgery-auxiliary-2", "002/f-finetune", "003/6", "004/smart-gse"]
)
def test_a_row_of_each_paper_trains_a_real_encoder_on_real_data(row, real, tmp_path):
    files = write_further_data(tmp_path)
    needs = [f"--{FILES[need]}={files[need]}" for need in paper(row[:3]).rows[row[4:]].needs]
    with patch("minbert.training.training_run.write_report"):
        assert train.main([f"--recipe={row}", *real, *needs, "--steps=1", f"--out={tmp_path / 'run'}"]) == 0
    (epoch,) = Run(tmp_path / "run").epochs()
    assert all(math.isfinite(score) for score in (*epoch.scores.values(), epoch.overall))


@pytest.mark.parametrize("recipe", ["003/sst-smart", "004/smart"])
def test_smart_after_smart_pytorch_moves_embeddings_by_a_norm_of_1(recipe, course_data, tmp_path):
    """Whatever its epsilon: that of 003 is 1e-6, and with such a perturbation the row would be its baseline."""
    (tmp_path / "small.yaml").write_text(SWEEP_OPTIONS)
    given = [f"--data={course_data}", f"--config={tmp_path / 'small.yaml'}", f"--out={tmp_path / 'run'}"]
    assert train.main([f"--recipe={recipe}", *given, "--steps=1", "--log-steps=1"]) == 0
    (step,) = [record for record in Run(tmp_path / "run").records() if "perturbation" in record]
    assert step["perturbation"] == pytest.approx(1, rel=1e-3)
    assert step["smart_share"] > 1e-6


def test_a_row_says_which_file_it_needs(sweep, tmp_path):
    assert sweep("001", "--rows=auxiliary-0.3") == 1
    assert "needs a file: give --reviews FILE" in (tmp_path / "out" / "table.md").read_text()


def test_a_protocol_gives_every_row_as_many_examples(course_data, tmp_path):
    small = protocol("small")
    for number, name in ROWS:
        row = paper(number).rows[name]
        options = small.options(row)
        sizes = options["batch_size"]
        of_tasks = [sizes[task] for task in ("sst", "qqp", "sts")] if isinstance(sizes, dict) else 3 * [sizes]
        assert sum(of_tasks) == 96, (number, name)
        assert options["epochs"] * options["epoch_length"] * 96 == 18_144
        parse_layers("train", TrainConfig, {"recipe": f"{number}/{name}", **options})
    proportions = small.options(paper("000").rows["finetune"])["batch_size"]
    assert proportions == {"sst": 8, "qqp": 80, "sts": 8}
    rates = {name: small.options(paper("002").rows[name])["lr"] for name in ("a-finetune", "c-finetune", "c-pretrain")}
    assert rates == dict(zip(rates, (small.rates[kind] for kind in ("joint", "in-turn", "frozen")), strict=True))


def test_a_protocol_stands_between_the_recipe_and_the_given_options(course_data, tmp_path):
    (tmp_path / "small.yaml").write_text("lr: 0.25\n")
    given = {"data": course_data, "protocol": "small", "options": str(tmp_path / "small.yaml"), "epochs": 1}
    words = train_options(ReproduceConfig("004", **given), paper("004").rows["smart"])
    config = parse_layers("train", TrainConfig, ["--recipe=004/smart", *words])
    assert (config.lr, config.epochs, config.epoch_length, config.batch_size) == (0.25, 1, 63, 32)
    assert (config.smart.lambda_s, config.sampling) == (5.0, "round-robin")


def test_the_names_of_the_rows_can_be_listed(capsys):
    assert reproduce.main(["004", "--rows=list"]) == 0
    assert "smart-gse: SMART Loss w/ GSE" in capsys.readouterr().out
