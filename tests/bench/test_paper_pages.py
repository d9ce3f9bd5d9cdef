"""bench/paper_pages.py: pages and figures from small tables, what --check finds, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import paper_pages
import pytest
from paper_comparisons import COMPARED_WITH, compared_with, overall_of, read_tables
from paper_pages import main, paper_page

from minbert.errors import UserError
from minbert.recipes import paper, papers

OVERALL = {"finetune": (0.600, 0.610), "smart": (0.604, 0.612), "pcgrad": (0.590,)}  # by seed
PUBLISHED = {  # of the paper's own table
    "finetune": {"dev sst": 0.511, "dev qqp": 0.750, "dev sts": 0.345},
    "smart": {"dev sst": 0.502, "dev qqp": 0.759, "dev sts": 0.371},
    "pcgrad": {"dev sst": 0.500, "dev qqp": 0.760, "dev sts": 0.352},
    "sts-aug": {"dev sst": 0.489, "dev qqp": 0.768, "dev sts": 0.352},
}
STEP_SECONDS = {"finetune": 1.5, "smart": 3.0, "pcgrad": 1.0}
PNG = b"\x89PNG"


def run(row: str, seed: int) -> dict[str, Any]:
    total = OVERALL[row][seed]
    return {
        "seed": seed,
        "scores": {"dev sst": total, "dev qqp": total, "dev sts": 2 * total - 1, "dev overall": total},
        "steps": 200,
        "steps_per_epoch": 100,
        "examples": 18144,
        "seconds": 9000.0,
        "step_seconds": STEP_SECONDS[row],
        "peak_memory_bytes": 3 * 2**29 + seed,
        "device": "CPU (x86_64), 1 thread, fp32, torch 2.13.0+cpu",
        "processor": "Some processor",
        "commit": "779aba2",
        "conflict_rate": None,
        "projected_share": None,
        "options": {"lr": 1e-4, "batch_size": {"sst": 2}, "smart.lambda_s": 5.0 * (row == "smart")},
    }


def table() -> dict[str, Any]:
    """Of 000: a baseline and a row of two seeds, a row of which one seed failed, and one that was not run."""
    found = {}
    for row, published in PUBLISHED.items():
        runs = [run(row, seed) for seed in range(len(OVERALL.get(row, ())))]
        ours = {f"dev {task}": [each["scores"][f"dev {task}"] for each in runs] for task in ("sst", "sts", "overall")}
        found[row] = {
            "title": paper("000").rows[row].title,
            "published": dict(published),
            "ours": ours if runs else {},
            "failures": ["seed 1: it stopped\nafter step 3"] if row == "pcgrad" else [],
            "runs": runs,
        }
    return found


def write(directory: Path, content: object, number: str = "000") -> Path:
    path = directory / f"{number}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables with their pages and figures."""
    directory = tmp_path_factory.mktemp("papers")
    write(directory, table())
    assert main(["--tables", str(directory), "--out", str(directory)]) == 0
    return directory


def line_of(page: str, start: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    return line


def test_a_page_has_protocol_table_failures_and_what_was_not_run(written):
    page = (written / "000.md").read_text()
    assert "python bench/paper_pages.py" in page.splitlines()[0]
    assert line_of(page, "# ") == f"# 000: {paper('000').title}"
    assert "Runs: 5 of seeds 0, 1, each of 200 steps and 18,144 examples. Commit: 779aba2." in page
    device = "Some processor; CPU (x86_64), 1 thread, fp32, torch 2.13.0+cpu"
    assert line_of(page, "Machine: ") == f"Machine: {device} (5 of 5 runs)."
    assert line_of(page, "Options ") == 'Options of all runs: `batch_size: {"sst": 2}`, `lr: 0.0001`.'
    columns = "dev sst | dev qqp | dev sts | dev overall"
    assert line_of(page, "| published") == f"| published / ours | {columns} | minutes | peak memory |"
    cells = "0.502 / 0.608 ± 0.006 | 0.759 / 0.608 ± 0.006 | 0.371 / 0.216 ± 0.011 | – / 0.608 ± 0.006"
    assert line_of(page, "| SMART f") == f"| SMART finetune (`smart`) | {cells} | 10.0 ± 0.0 | 1.5 GiB |"
    cells = "0.489 / – | 0.768 / – | 0.352 / – | "
    assert line_of(page, "| stsAug") == f"| stsAug finetune (`sts-aug`) | {cells} |  |  |"
    assert line_of(page, "- ") == r"- `pcgrad`, seed 1: it stopped\nafter step 3"
    not_run = "`single-task`, `pretrain`, `sts-aug`, `smart-pcgrad`"
    assert page.splitlines()[-1].startswith(f"Not run: {not_run}, ")
    assert "](000.png)" in page


def test_a_page_says_which_rows_need_a_file(tmp_path):
    write(tmp_path, {}, "001")
    (table,) = read_tables(tmp_path)
    last = paper_page(table).splitlines()[-1]
    assert last.startswith("Not run: `pretrain`, `finetune-seq`, ")
    assert "`auxiliary-0.3` (for want of a file for `--reviews`), " in last


def test_the_committed_pages_are_what_the_tables_give(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_the_page_across_papers_sorts_by_gain_and_divides_it_by_the_minutes_more(written):
    page = (written / "across.md").read_text()
    assert "python bench/paper_pages.py" in page.splitlines()[0]
    assert line_of(page, "Machine: ").endswith("torch 2.13.0+cpu (3 of 3 runs).")
    smart, pcgrad = [line for line in page.splitlines() if line.startswith("| [")]
    # Published: (0.502 + 0.759 + 1.371 / 2 - 0.511 - 0.750 - 1.345 / 2) / 3. Ours: 0.004 and 0.002 in 5 minutes.
    gains = "+0.004 | +0.003 ± 0.001 | 10.0 ± 0.0 | +5.0 ± 0.0 | +0.0006"
    assert smart == f"| [`000/smart`](000.md) | SMART finetune | `finetune` | {gains} |"
    gains = "+0.001 | -0.010 | 3.3 | -1.7 | no more time"
    assert pcgrad == f"| [`000/pcgrad`](000.md) | PCGRAD finetune | `finetune` | {gains} |"


@pytest.mark.parametrize(("step_seconds", "shown"), [(1.75, "no more time"), (1.85, "+0.0034")])
def test_a_fifth_more_time_of_one_seed_is_noise(step_seconds, shown, tmp_path):
    content = table()
    content["smart"]["runs"] = [{**content["smart"]["runs"][0], "step_seconds": step_seconds}]  # 200; 1.5 s of finetune
    write(tmp_path, content)
    (table_read,) = read_tables(tmp_path)
    (smart, *_) = table_read.compared()
    assert paper_pages.minutes_cells(smart)[1] == shown


def test_minutes_of_two_machines_are_not_compared(tmp_path):
    content = table()
    content["smart"]["runs"][1] |= {"processor": None, "device": "NVIDIA H200, bf16, torch 2.13.0"}
    write(tmp_path, content)
    (table_read,) = read_tables(tmp_path)
    (smart, *_) = table_read.compared()
    assert paper_pages.minutes_cells(smart) == ["other machine", "–"]
    page = paper_pages.paper_page(table_read)
    assert "; unknown processor; NVIDIA H200, bf16, torch 2.13.0 (1 of 5 runs)." in page


def test_rows_are_compared_where_both_have_scores_of_three_tasks(tmp_path):
    content = table()
    content["single-task"] = {**content["smart"], "published": {"dev sst": 0.515}, "runs": []}
    content["pcgrad"]["runs"] = [{**run("pcgrad", 0), "seed": 7}]  # a seed that the baseline has not
    write(tmp_path, content)
    rows = {each.row.row.name: each for read in read_tables(tmp_path) for each in read.compared()}
    assert [*rows] == ["smart", "pcgrad", "sts-aug"]
    assert rows["smart"].gains == pytest.approx([0.004, 0.002])
    assert rows["pcgrad"].gains == rows["sts-aug"].gains == []
    assert rows["sts-aug"].published == pytest.approx((-0.022 + 0.018 + 0.007 / 2) / 3)


def test_a_run_with_a_failure_does_not_count(tmp_path):
    content = table()
    content["smart"]["failures"] = ["seed 0: lr was 1e-05 and is to be 0.0001"]
    write(tmp_path, content)
    (read,) = read_tables(tmp_path)
    assert [*read.rows["smart"].counted] == [1]
    assert read.compared()[0].gains == pytest.approx([0.002])


def test_published_overall_scores_are_computed_as_ours():
    assert overall_of({"dev sst": 0.5, "dev qqp": 0.7, "dev sts": 0.4, "dev overall": 0.533}) == pytest.approx(1.9 / 3)
    assert overall_of({"dev sst": 0.5, "dev qqp": 0.7, "dev overall": 0.6}) is None
    for row in paper("004").rows.values():  # which computes it in this way
        published = {f"dev {task}": score for task, score in row.published["dev"].items()}
        if published:
            assert overall_of(published) == pytest.approx(published["dev overall"], abs=1.1e-3)


def test_every_row_of_the_papers_is_compared_with_a_row_of_its_paper():
    assert [*COMPARED_WITH] == papers()
    for number in papers():
        rows = paper(number).rows
        assert {compared_with(number, row) for row in rows} == {*COMPARED_WITH[number].values()} <= {*rows}
    assert compared_with("001", "surgery-0.5") == "finetune-mix-0.5"
    assert compared_with("001", "surgery-auxiliary-4") == "finetune-mix-0.3"
    assert compared_with("002", "h-pretrain") == "e-pretrain"
    assert compared_with("002", "e-finetune") == "a-finetune"
    assert compared_with("003", "4") == "4"
    assert compared_with("004", "cosine-2d1") == "gse"
    assert compared_with("004", "cosine-2d1-3x") == "cosine-2d1"


def test_figures_have_the_same_bytes_each_time(written, tmp_path):
    assert main(["--tables", str(written), "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.md", "000.png", "across.md", "across.png"]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (written / path.name).read_bytes()
    assert (tmp_path / "000.png").read_bytes().startswith(PNG)


def test_a_paper_without_runs_has_its_published_differences(tmp_path):
    write(tmp_path, {name: {**row, "ours": {}, "failures": [], "runs": []} for name, row in table().items()})
    assert main(["--tables", str(tmp_path), "--out", str(tmp_path / "new" / "pages")]) == 0
    pages = tmp_path / "new" / "pages"
    assert "No run yet." in (pages / "000.md").read_text()
    assert "No run yet." in (pages / "across.md").read_text()
    assert [path.name for path in pages.glob("*.png")] == ["000.png"]


def test_check_names_what_is_out_of_date_and_writes_nothing(written, tmp_path, capsys):
    pages = tmp_path / "pages"
    shutil.copytree(written, pages)
    command = ["--tables", str(pages), "--out", str(pages), "--check"]
    assert main(command) == 0
    assert capsys.readouterr().out == ""
    content = table()
    content["smart"]["runs"][0]["step_seconds"] = 6.0
    write(pages, content)
    (pages / "across.png").unlink()
    before = {path: path.read_bytes() for path in pages.iterdir()}
    assert main(command) == 1
    stale = ", ".join(str(pages / name) for name in ("000.md", "across.md", "across.png"))
    assert capsys.readouterr().out == f"not what the tables give: {stale}; run python bench/paper_pages.py\n"
    assert {path: path.read_bytes() for path in pages.iterdir()} == before


def changed(*path: str | int, value: object) -> dict[str, Any]:
    """The table with another value at a path."""
    content: Any = table()
    inner = content
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["smart"], "000.json (expected a JSON object, got a list); restore it"),
        ({"smrat": {}}, "paper 000 has no row 'smrat' (did you mean 'smart'?)"),
        ({"smart": 3}, "smart: expected a mapping, got 3"),
        (changed("smart", "runs", 1, value=None), "smart: runs[1]: expected a mapping, got null"),
        (changed("smart", "runs", 0, "steps", value=1.5), "smart: runs: steps: expected int, got 1.5"),
        (changed("smart", "runs", 1, "seed", value=0), "smart: two runs of seed 0"),
        (changed("smart", "runs", 0, "step_seconds", value=0.0), "expected steps and seconds of more than 0"),
    ],
)
def test_a_damaged_table_is_refused(content, message, tmp_path):
    write(tmp_path, content)
    with pytest.raises(UserError, match=re.escape(message)):
        main(["--tables", str(tmp_path), "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["000.json"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "error: no tables in "),
        ({"000.json": '{"smart": '}, "error: cannot read "),
        ({"000.json": "{}", "table.json": "{}"}, "error: unknown paper 'table'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, paper_pages.__file__, "--tables", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_an_unknown_option_is_one_line():
    with pytest.raises(UserError, match=re.escape("unrecognized arguments: --tabels; --help lists the options")):
        main(["--tabels"])
