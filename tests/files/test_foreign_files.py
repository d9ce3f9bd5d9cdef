"""A run or a model from elsewhere is data: opening it imports nothing, and touches nothing that was not named."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from mutate_files import FIXTURE, OPTIONS, campaign

from minbert import evaluate, predict, reproduce, train
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.export import __main__ as export
from minbert.files.atomic import MANIFEST, sha256, verify
from minbert.files.hub import checkpoint_directory
from minbert.report import __main__ as report
from minbert.runs.run_directory import Run
from minbert.training import child_process as separate_process

PAYLOAD = "from pathlib import Path\nPath('payload-ran').touch()\ndef X(gram): return gram.new_ones(len(gram))\n"
HTML = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A finished run and its data in the working directory, beside a module that notes that it was imported."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("downloaded").mkdir()
    Path("downloaded/payload.py").write_text(PAYLOAD)
    Path("downloaded/__init__.py").touch()
    yield Path("run")
    for name in ("downloaded", "downloaded.payload"):
        sys.modules.pop(name, None)


def options(run: Path, **values: object) -> None:
    """Set options in a run's config.yaml."""
    config = run / "config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **values}))


def sealed(directory: Path) -> None:
    """Write the manifest that fits the files."""
    files = {file.name: sha256(file) for file in directory.iterdir() if file.is_file() and file.name != MANIFEST}
    (directory / MANIFEST).write_text(json.dumps(files))


# Code --------------------------------------------------------------------------------------------------------------


def test_what_opens_a_run_imports_nothing_that_it_names(run):
    options(run, surgery="downloaded.payload:X")
    assert evaluate.main(["run"]) == 0
    assert predict.main(["run", "--task=sts", "--input=data/sts-dev.csv"]) == 0
    assert report.main(["run"]) == 0
    assert "downloaded.payload:X" in Path("run/report.html").read_text()
    assert not Path("payload-ran").exists()
    assert "downloaded.payload" not in sys.modules


def test_training_imports_what_the_command_line_names_and_no_file(run):
    options(run, surgery="downloaded.payload:X")
    words = [*OPTIONS, "--model=model", "--out=run", "--resume"]
    with pytest.raises(UserError, match=r"--surgery \(was downloaded\.payload:X, is "):
        train.main(words)
    with pytest.raises(UserError, match="names code to import"):
        train.main(["--config=run/config.yaml", "--out=new"])
    assert not Path("payload-ran").exists()


def test_reproducing_into_a_foreign_directory_imports_nothing(run, monkeypatch, capsys):
    foreign = Path("out/baseline/seed-0")
    shutil.copytree(run, foreign)
    options(foreign, surgery="downloaded.payload:X")
    monkeypatch.setattr(separate_process, "subprocess", None)  # were it to train, it would fail
    assert reproduce.main(["004", "--rows=baseline", "--out=out"]) == 1
    assert "--surgery (was downloaded.payload:X" in capsys.readouterr().out.replace("\n", " ")
    assert not Path("payload-ran").exists()


# Places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", ".", "sst/../../x"])
def test_names_of_tasks_never_become_paths(run, name):
    options(run, tasks=[name])
    before = sorted(Path(".").rglob("*"))
    for command, words in ((evaluate, []), (report, []), (predict, ["--task=sst", "--input=data/ids-sst-dev.csv"])):
        with pytest.raises(UserError, match=r"config\.yaml: unknown task"):
            command.main(["run", *words])
    assert sorted(Path(".").rglob("*")) == before


@pytest.mark.parametrize("name", ["../config.yaml", "/dev/zero", "a/b", "", ".."])
def test_a_manifest_names_files_beside_it_only(run, name):
    manifest = run / "best" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), name: "0" * 64}))
    with pytest.raises(UserError, match=r"manifest\.json: expected names of files in"):
        verify(run / "best")


@pytest.mark.parametrize(
    "place",
    ["predictions", "best", "report.html", "summary.json", "metrics.jsonl", "config.yaml", ".report.html.tmp", "plots"],
)
def test_links_that_lead_out_of_a_run_are_refused(run, tmp_path, place):
    outside = tmp_path / "outside"
    source = run / place
    if source.exists():
        shutil.move(source, outside)
    else:
        outside.write_text("kept")
    source.symlink_to(outside)
    before = {
        path: path.read_bytes() for path in (outside.rglob("*") if outside.is_dir() else [outside]) if path.is_file()
    }
    for command, words in (
        (evaluate, []),
        (report, []),
        (predict, ["--task=sst", "--input=data/ids-sst-dev.csv"]),
    ):
        with pytest.raises(UserError, match=r"is a link to .*outside the run directory"):
            command.main(["run", *words])
    with pytest.raises(UserError, match=r"is a link to .*outside the run directory"):
        train.main([*OPTIONS, "--model=model", "--out=run", "--resume"])
    assert {path: path.read_bytes() for path in before} == before


def test_a_link_to_a_run_and_links_within_it_are_followed(run):
    Path("linked").symlink_to("run")
    shutil.move(run / "best", run / "epoch-2")
    (run / "best").symlink_to("epoch-2")
    assert evaluate.main(["linked"]) == 0


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.jsonl", "predictions/sst-dev.jsonl"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(UserError, match="it is no regular file"):
        report.main(["run"])


def test_data_that_a_run_names_is_said_and_never_fetched(run, monkeypatch, capsys):
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **options: pytest.fail("asked the network"))
    options(run, data="someone/dataset")
    with pytest.raises(UserError, match="names the data someone/dataset of the hub; give --data someone/dataset"):
        evaluate.main(["run"])
    assert report.main(["run"]) == 0
    assert "someone/dataset of the hub" in Path("run/report.html").read_text()
    capsys.readouterr()
    options(run, data="../secret", model="/nowhere")
    with pytest.raises(UserError, match=r"no such directory: '\.\./secret'"):
        evaluate.main(["run"])
    assert evaluate.main(["run", "--data=data"]) == 0
    assert "which run/config.yaml names" not in capsys.readouterr().out
    assert not Path("/nowhere").exists()


def test_what_else_a_run_names_is_not_opened(run):
    named = {name: Path(f"named-{name}").absolute() for name in ("model", "out", "reviews", "augmented")}
    for path in named.values():
        path.write_text("{}")
    options(run, **{name: str(path) for name, path in named.items()} | {"augmented": {"sst": str(named["augmented"])}})
    opened, watching = [], [True]

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(note)
    try:
        assert evaluate.main(["run"]) == 0
        assert report.main(["run"]) == 0
        assert predict.main(["run", "--task=sts", "--input=data/sts-dev.csv"]) == 0
        assert export.main(["run", "--to=transformers", "--task=sst", "--out=exported"]) == 0
    finally:
        watching.clear()
    assert any("sts-dev.csv" in path for path in opened)
    assert not [path for path in opened if "named-" in path]


def test_a_tag_in_a_runs_options_is_not_obeyed(run):
    (run / "config.yaml").write_text("surgery: !!python/object/apply:pathlib.Path.touch [payload-ran]\n")
    with pytest.raises(UserError, match=r"config\.yaml: not valid YAML .*tag .*python/object"):
        evaluate.main(["run"])
    assert not Path("payload-ran").exists()


def test_texts_of_a_run_are_text_in_its_report(run):
    options(run, recipe=HTML, model="javascript:alert(3)", data=HTML)
    lines = (run / "predictions" / "sst-dev.jsonl").read_text().splitlines()
    changed = [{**json.loads(line), "id": HTML} for line in lines]
    (run / "predictions" / "sst-dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    summary = json.loads((run / "summary.json").read_text())
    summary["versions"][HTML], summary["backends"][HTML], summary["device"] = HTML, HTML, "{{ 7 * 7 }}" + HTML
    (run / "summary.json").write_text(json.dumps(summary))
    record = {"step": 9, "epoch": 2, "loss": {HTML: 1.0}, "cosine": {HTML: 0.5}, "magnitude_similarity": {HTML: 0.5}}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**record, "seconds": {HTML: 1.0}}) + "\n")
    assert report.main(["run"]) == 0
    page = Path("run/report.html").read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert 'href="javascript' not in page
    assert "{{ 7 * 7 }}" in page


@pytest.mark.parametrize("name", ["~nobody-here/x", "a\0b", "x" * 5000, "../x", "~"])
def test_names_of_models_never_fail_otherwise(name, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **options: pytest.fail("asked the network"))
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *arguments, **options: (_ for _ in ()).throw(OSError("offline"))
    )
    if name == "~":
        assert checkpoint_directory(name, ()).is_dir()
    else:
        with pytest.raises(UserError):
            checkpoint_directory(name, ())


def test_a_run_of_a_task_alone_is_what_it_was(run):
    assert Run(run).config() == TrainConfig.from_yaml(run / "config.yaml")
    sealed(run / "best")
    verify(run / "best")


# Any byte ----------------------------------------------------------------------------------------------------------


def test_any_change_to_a_file_is_read_or_refused_in_one_line(tmp_path):
    assert campaign(tmp_path / "campaign", count=12, seed=0) == []


def test_a_command_that_fails_otherwise_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "main", lambda words: {}["x"])
    failures = campaign(tmp_path / "campaign", count=3, seed=0)
    assert failures
    assert all("KeyError" in failure for failure in failures)
