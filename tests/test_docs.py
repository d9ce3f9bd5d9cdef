"""What the docs say is there: their code runs, their paths, names and options exist, their tables are complete."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints
from unittest.mock import patch

import pytest
from groups import drawing, quick_options

from minbert import train
from minbert.augment import AugmentConfig
from minbert.cli import FileOptions, options_of
from minbert.config import BY_TASK, TrainConfig
from minbert.data.skipped import SkippedRow
from minbert.doctor import DoctorConfig
from minbert.errors import dashed
from minbert.evaluate import EvaluateConfig
from minbert.export.__main__ import ExportConfig
from minbert.kernels import native
from minbert.methods.divergences import DIVERGENCES
from minbert.methods.losses import LOSSES
from minbert.methods.weightings import WEIGHTINGS
from minbert.model import HEADS, POOLINGS, SHARED_LAYERS
from minbert.predict import PredictConfig
from minbert.push import PushConfig
from minbert.replay import ReplayConfig
from minbert.report.__main__ import ReportConfig
from minbert.reproduce import ReproduceConfig
from minbert.runs.metrics_log import FIELDS
from minbert.runs.predictions import PredictedExample
from minbert.runs.progress_counters import Progress
from minbert.runs.resume import LENGTH, ROUNDING, WITHOUT_EFFECT, flat
from minbert.runs.scores import SINCE, SUMMARY
from minbert.tasks import TASKS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tests" / "fixtures" / "README.md"])
MODEL = ROOT / "tests" / "fixtures" / "run-0.1.0" / "run" / "best"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def sections() -> Iterator[tuple[Path, str, list[str]]]:
    """The sections of all pages that have Python code: page, title and blocks."""
    for page in PAGES:
        if page.name == "export.md":  # its code reads what its commands wrote: test_export_command.py
            continue
        for section in re.split(r"^## ", text_of(page), flags=re.MULTILINE):
            if found := blocks(section, "python"):
                yield page, section.partition("\n")[0], found


@pytest.mark.parametrize(
    ("page", "title", "code"), [pytest.param(*each, id=f"{each[0].stem}: {each[1]}") for each in sections()]
)
def test_the_code_of_a_section_runs(page, title, code, tmp_path, monkeypatch):
    """Its blocks one after the other; a block that begins with `# NAME.py` is a module, too."""
    if title == "A kernel" and not native.available():
        pytest.skip("needs the native extension")
    names = "".join(code)
    for package in ("transformers", "lightning"):
        if package in names:
            pytest.importorskip(package)
    if "TrainingArguments" in names:
        pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace = {"__name__": f"{page.stem}_{title.lower().replace(' ', '_')}"}
    with patch.dict(TASKS), patch.dict(HEADS), patch.dict(LOSSES), patch.dict(DIVERGENCES):
        for number, block in enumerate(code):
            if module := re.match(r"# (\w+)\.py\n", block):
                (tmp_path / f"{module[1]}.py").write_text(block)
                monkeypatch.delitem(sys.modules, module[1], raising=False)
            source = block.replace('"bert-base-uncased"', repr(str(MODEL)))
            exec(compile(source, f"{page.name}, {title}, block {number}", "exec"), namespace)


# Paths, names and options -------------------------------------------------------------------------------------------

OF_USERS = {
    "inverse_norms.py",
    "small.yaml",
    "tasks.yaml",
    "make_data.py",
    "serve.py",
}  # files that the pages let a reader write
OLD = re.compile(r"^ *\| [^|]*\|", re.MULTILINE)  # the first cell of a row: what it was before


def prose(page: Path) -> str:
    """A page without what no longer exists: the left column of CHANGELOG's tables."""
    return OLD.sub("|", text_of(page)) if page.name == "CHANGELOG.md" else text_of(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_exists(page):
    text = re.sub(r"https?://\S+", "", prose(page))
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    text = re.sub(r"\[[^\]]*\]\(", "(", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    code = re.findall(r"(?<![\w/*-])(?:\.\./)?(?:[\w.-]+/)*[\w.-]+\.(?:py|cpp|cu|h|sh|yaml|md|toml)\b", text)
    folders = re.findall(r"(?<![\w/])(?:minbert|kernels|csrc|bench|tests|docs)/[\w/-]*(?![\w./*-])", text)
    roots = (ROOT, page.parent, ROOT / "minbert", ROOT / "csrc")
    generated = {"config.yaml", "table.md", "folds.md", "OUT/folds.md"} | OF_USERS  # of runs
    missing = [name for name in {*code, *folders} - generated if not any((root / name).exists() for root in roots)]
    assert sorted(missing) == []


def test_every_heading_that_is_linked_to_exists():
    for page in PAGES:
        for link, heading in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text_of(page)):
            target = page.parent / link if link else page
            titles = re.findall(r"^#+ (.*)", text_of(target), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_dotted_name_exists(page):
    names = {name.rstrip(".") for name in re.findall(r"(?<![\w/.-])minbert(?:\.\w+)+", prose(page))}
    assert sorted(name for name in names if not exists(name)) == []


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    if name.endswith((".so", ".egg", ".json")):
        return True
    module, _, attributes = name, "", []
    while module:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            attributes.insert(0, last)
            continue
        for attribute in attributes:
            found = getattr(found, attribute, None)
        return found is not None
    return False


def test_what_the_architecture_says_of_files_is_in_them():
    page = text_of(ROOT / "docs" / "architecture.md")
    named = re.findall(r"([\w/]+)\.py: ([\w.]+)", page)
    named += [("training/loop", name) for name in re.findall(r"^\| `(\w+)` \| ", page, re.MULTILINE)]
    assert len(named) >= 10
    for path, name in named:
        module = path if path.startswith("minbert/") else f"minbert/{path}"
        assert exists(f"{module}.{name}".replace("/", ".")), (path, name)


def test_the_readme_has_the_commands_that_ci_runs():
    names = re.findall(r"\breadme (\w+)", (ROOT / ".ci" / "run").read_text())
    assert sorted(names) == ["demo", "install", "test"]
    for name in names:
        assert re.search(rf"^<!-- ci: {name} -->\n```bash\n\S.*\n```$", text_of(ROOT / "README.md"), re.MULTILINE)


def test_the_c_plus_plus_is_that_of_the_repository():
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp"))
    for page in PAGES:
        for line in "".join(blocks(text_of(page), "cpp")).splitlines():
            assert line.strip() in sources, line


OWN_TASKS = ("topic", "satisfaction", "tags")  # of docs/own-tasks.md
OTHERS = {  # options of other programs, and of those in bench/ and tests/
    *("--dist", "--durations", "--benchmark-only", "--nproc-per-node", "--max-restarts"),
    *("--force-reinstall", "--no-cache-dir", "--no-deps"),
    *(
        "--count",
        "--size",
        "--seed",
        "--only",
        "--text",
        "--estimates",
        "--minutes",
        "--budget",
        "--dry-run",
        "--help",
        "--help-all",
        "--quick",
        "--minbert-results",
        "--surgeries",
    ),
    *("--recipes", "--target", "--plot", "--since", "--write"),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_exists(page):
    commands = (TrainConfig, FileOptions, EvaluateConfig, PredictConfig, AugmentConfig, ReproduceConfig, ReportConfig)
    commands += (DoctorConfig, ReplayConfig, ExportConfig, PushConfig)
    options = {name for command in commands for name, _ in options_of(command)}
    by_task = {f"{name}.{task}" for name in BY_TASK for task in (*TASKS, *OWN_TASKS, "TASK")}
    of_rules = {f"surgery.{field.name}" for rule in WEIGHTINGS.values() for field in dataclasses.fields(rule)}
    known = {dashed(name) for name in options | by_task | of_rules | {"surgery.OPTION"}} | OTHERS
    written = re.findall(r"(?<![\w-])--[a-z][a-zA-Z0-9.-]*\w", prose(page))
    assert sorted({option.rstrip(".") for option in written} - known) == []


# The run directory --------------------------------------------------------------------------------------------------

RUN_DIRECTORY = text_of(ROOT / "docs" / "run-directory.md")


def described(mark: str, column: int = 0) -> list[str]:
    """The names in backticks in a column of the table after a mark."""
    table = RUN_DIRECTORY.partition(f"<!-- {mark} -->\n")[2].partition("\n\n")[0]
    return [name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split(" | ")[column])]


def files() -> list[str]:
    """The first column of the table of files."""
    table = RUN_DIRECTORY.partition("| file | written | content |\n")[2].partition("\n\n")[0]
    return [name for row in table.splitlines()[1:] for name in re.findall(r"^\| `([^`]+)`", row)]


def test_the_fields_on_the_page_are_those_of_the_schemas():
    names = {
        "metrics.jsonl": [*FIELDS, "dev"],
        "summary.json": [*SUMMARY, *SINCE, "format", "dev", "test"],
        "progress.json": [*Progress().to_json()],
        "predictions": [field.name for field in dataclasses.fields(PredictedExample)],
        "skipped.jsonl": [field.name for field in dataclasses.fields(SkippedRow)],
    }
    for name, expected in names.items():
        assert sorted(described(f"fields: {name}")) == sorted(expected), name
    options = described("options: resume", 1)
    assert sorted(options) == sorted(name for name, _ in flat(TrainConfig()))
    assert {*WITHOUT_EFFECT, *ROUNDING, *LENGTH} == {*options[: options.index("tasks")]}


def test_a_run_writes_what_the_page_says(course_data, tmp_path):
    """With all methods, a skipped row and a test split without labels."""
    data = shutil.copytree(course_data, tmp_path / "data")
    with open(data / "ids-sst-train.csv", "a", encoding="utf-8") as file:
        file.write("99\tbad\tthe film was good .\t7\n")
    out = tmp_path / "run"
    with drawing():
        assert train.main([*quick_options(data, out), "--bregman.mu=0.1", "--rdrop.alpha=1"]) == 0
    names = {path.name + "/" * path.is_dir() for path in out.iterdir()}
    assert names | {".lock", "tensorboard/", "trackers.json", "tasks.yaml"} == {*files()}
    written: dict[str, set[str]] = {
        name: {key for line in lines(out / name) for key in line} for name in ("metrics.jsonl", "skipped.jsonl")
    }
    written["summary.json"] = {*json.loads((out / "summary.json").read_text())}
    written["progress.json"] = {*json.loads((out / "last" / "progress.json").read_text())}
    written["predictions"] = {
        key for path in (out / "predictions").glob("*.jsonl") for line in lines(path) for key in line
    }
    absent = {"metrics.jsonl": {"bytes_sent"}, "summary.json": {"test"}}  # several processes; labels of the test split
    for name, keys in written.items():
        assert {*described(f"fields: {name}")} == keys | absent.get(name, set()), name
    for checkpoint in ("best", "last"):
        assert {path.name for path in (out / checkpoint).iterdir()} == {*described("files: checkpoint")}
    assert {path.name for path in (out / "plots").iterdir()} == {"curves.png", "timing.png", "conflicts.png"}
    phases = {phase for line in lines(out / "metrics.jsonl") for phase in line.get("seconds", {})}
    assert phases == {"batch", "forward", "rdrop", "smart", "bregman", "backward", "update"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_options_page_has_every_choice():
    page = text_of(ROOT / "docs" / "options.md")
    for name in (*HEADS, *LOSSES, *POOLINGS, *SHARED_LAYERS, *WEIGHTINGS):
        assert f"`{name}`" in page, name
    samplings = get_args(get_type_hints(TrainConfig)["sampling"])
    assert r"\|".join(samplings[1:]) in page
