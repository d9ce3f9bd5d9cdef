"""bench/recipe_study.py: its runs at equal epochs and equal time, its tables and record, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import scores_of_runs
from groups import quick_options
from recipe_study import RECIPES, SAME_TIME, equal_time_steps, main, table, tables
from results import result
from scores_of_runs import Row, footnote, read_table
from training_runs import directories

from minbert.errors import UserError
from minbert.runs.run_directory import Run


def row(name: str, *runs: tuple[float, float]) -> Row:
    return Row(name, [result(seed, score, step_seconds=time) for seed, (score, time) in enumerate(runs)])


PLAIN = row("plain", (0.5, 0.4), (0.7, 0.6), (0.6, 0.5))
SMART = row("smart", (0.52, 1.2), (0.71, 1.3), (0.63, 9.0))


def test_equal_time_is_the_budget_by_the_median_of_a_recipes_steps():
    assert equal_time_steps([PLAIN, SMART], PLAIN.seconds) == {"smart": 33}  # 40 s, by steps of 1.2 s
    assert equal_time_steps([PLAIN, SMART], 120) == {"plain": 300}
    assert equal_time_steps([PLAIN, SMART], 140) == {"plain": 350}  # 120 s are within 15 % of it
    assert equal_time_steps([PLAIN, SMART], 142) == {"plain": 355, "smart": 118}
    assert equal_time_steps([SMART], 0.1) == {"smart": 1}


def test_the_table_has_differences_seed_by_seed_steps_and_seconds():
    lines = table("Equal epochs: 1 epoch.", [PLAIN, SMART]).splitlines()
    assert lines[:2] == ["Equal epochs: 1 epoch.", ""]
    assert lines[2] == "| recipe | sst | sts | overall | less plain | steps | minutes |"
    plain = "0.600 ± 0.100"
    assert lines[4] == f"| plain | {plain} | 0.800 ± 0.000 | {plain} |  | 100 | 0.7 |"
    assert lines[5].endswith("| +0.020 ± 0.010 | 100 | 2.0 |")


@pytest.mark.slow
def test_runs_are_trained_once_and_recorded(course_data, tmp_path):
    own = quick_options(course_data, tmp_path)
    rest = [option for option in own if option.split("=")[0] not in ("--data", "--out", "--recipe", "--epochs")]
    given = ["--data", course_data, "--recipes", "plain", "plain --surgery=config", "--seeds", "3", "--epochs", "2"]
    command = [*given, "--runs", tmp_path / "runs", "--results", tmp_path / "results", "--", *rest]
    assert main([*map(str, command)]) == 0
    (path,) = (tmp_path / "results").glob("*.json")
    record = json.loads(path.read_text())
    plain, config, *of_time = record["rows"]
    assert [(row["case"], row["name"]) for row in record["rows"]] == [
        (case, name) for case in ("equal epochs", "equal time") for name in ("plain", "plain --surgery=config")
    ]
    assert of_time[0] == {**plain, "case": "equal time"}  # these are its runs
    assert record["budget_seconds"] == plain["seconds"] == pytest.approx(12 * plain["step_seconds"])
    assert (plain["steps"], config["steps"]) == (12, 12)
    near = abs(config["seconds"] / plain["seconds"] - 1) <= SAME_TIME
    steps = 12 if near else round(plain["seconds"] / config["step_seconds"])
    assert of_time[1]["steps"] == steps
    lengths = {"epochs-2": 12, f"steps-{steps}": steps} if steps != 12 else {"epochs-2": 12}
    place = tmp_path / "runs" / "plain-surgery=config"
    runs = [Run(place / length / "seed-3") for length in lengths]
    assert [run.summary()["steps"] for run in runs] == [*lengths.values()]
    assert {(run.config().recipe, run.config().surgery) for run in runs} == {("plain", "config")}
    assert of_time[1]["less_first"] == pytest.approx(of_time[1]["overall"] - plain["overall"])
    text = path.with_suffix(".md").read_text()
    assert "`python bench/recipe_study.py --data DIR --recipes plain" in text
    assert "Equal epochs: 2 epochs, 1 seed." in text
    assert re.search(r"Equal time: \d+\.\d minutes of steps, 1 seed\.", text)

    before = [run.metrics.path.stat().st_mtime_ns for run in runs]
    path.unlink()
    assert main([*map(str, command)]) == 0
    assert [run.metrics.path.stat().st_mtime_ns for run in runs] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "plian"], "unknown recipe 'plian' (did you mean 'plain'?)"),
        (["--recipes", "plain", "plain"], "--recipes must be a list without repetitions, got plain,plain"),
        (["--recipes", "plain --lr=1e-3", "plain --lr 1e-3"], "unknown option --lr 1e-3"),
        (["--recipes", "plain --lr=1", "plain  --lr=1"], "no two have one directory"),
        (["--recipes", "plain --steps=5"], "--steps in 'plain --steps=5': this script gives it to every run"),
        (["--minutes", "-1"], "--minutes must be at least 0, got -1"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--", "--steps=5"], "--steps after --: this script gives it to every run"),
        (["--", "--epochs=5"], "--epochs after --: this script gives it to every run"),
    ],
)
def test_bad_input_is_refused_before_the_first_run(arguments, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        main(["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_the_lengths_of_runs_follow_from_the_epochs_or_the_minutes(monkeypatch, tmp_path, capsys):
    """With runs that are not trained: a step of plain takes 0.5 s, one of all other recipes 1.5 s."""
    lines = []

    def finish_runs(runs, table, jobs, begin, end, **rest):
        for run in runs:
            length, recipe = run.directory.parent, run.directory.parent.parent.name
            lines.append([option for option in run.arguments if option.startswith(("--recipe", "--epochs", "--steps"))])
            steps = int(length.name.partition("-")[2]) * (100 if "epochs" in length.name else 1)
            end(run, result(run.seed, 0.5, step_seconds=0.5 if recipe == "plain" else 1.5, steps=steps))

    monkeypatch.setattr(scores_of_runs, "finish_runs", finish_runs)
    monkeypatch.setattr("recipe_study.write", lambda *arguments, **more: None)
    assert main(["--seeds", "0", "--epochs", "3", "--runs", str(tmp_path)]) == 0
    assert lines[:6] == [[f"--recipe={name}", "--epochs=3"] for name in RECIPES]
    assert lines[6:] == [
        ["--recipe=plain", "--epochs=3"],
        *([f"--recipe={name}", "--steps=100"] for name in RECIPES[1:]),
    ]
    lines.clear()
    assert main(["--seeds", "0", "--epochs", "3", "--minutes", "5", "--runs", str(tmp_path)]) == 0
    assert lines[6:] == [
        ["--recipe=plain", "--steps=600"],
        *([f"--recipe={name}", "--steps=200"] for name in RECIPES[1:]),
    ]
    lines.clear()
    capsys.readouterr()
    assert main(["--seeds", "0", "--epochs", "3", "--minutes", "0", "--runs", str(tmp_path)]) == 0
    assert lines == [[f"--recipe={name}", "--epochs=3"] for name in RECIPES]
    assert "Equal time" not in capsys.readouterr().out


def test_the_readme_shows_the_recorded_runs():
    root = Path(__file__).parents[2]
    text, recorded = (root / "README.md").read_text(), read_table(root / "docs" / "studies" / "recipes.json")
    shown = re.findall(r"^Equal epochs: (\d+) epochs?, (\d) seeds\.\n\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert [epochs for epochs, *_ in shown] == ["1", "3"]
    for epochs, seeds, lines in shown:
        names = re.findall(r"^\| (\w.*?) \|", lines, re.MULTILINE)[1:]
        places = directories(names, "recipes")

        def row(name: str, length: str, places=places, seeds=int(seeds)) -> Row:
            return Row(name, [recorded[f"{places[name]}/{length}"][seed] for seed in range(seeds)])

        same_epochs = [row(name, f"epochs-{epochs}") for name in names]
        if epochs == "1":
            assert {*RECIPES} <= {*names}
            budget = same_epochs[0].seconds
            steps = equal_time_steps(same_epochs, budget)
            same_time = [row(name, f"steps-{steps[name]}" if name in steps else f"epochs-{epochs}") for name in names]
            assert tables(int(epochs), same_epochs, same_time, budget) in text
        else:
            assert table(f"Equal epochs: {epochs} epochs, {seeds} seeds.", same_epochs) in text
            assert footnote(same_epochs) in text
