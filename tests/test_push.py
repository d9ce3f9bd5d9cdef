"""`minbert push`: what it uploads to a hub on this machine, what stays here, and that it is the run's model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from fake_hub import TOKEN, FakeHub, Repository, serving
from huggingface_hub import constants
from own_task_files import write_tasks

import minbert
from minbert import predict, push, train
from minbert.errors import UserError
from minbert.files.atomic import verify
from minbert.model import Encoder
from minbert.report.model_card import markdown

FIXTURE = Path(__file__).parent / "fixtures" / "run-0.1.0"
NAME = "ada/two-tasks"
TEXTS = ["the film was superb .", "a dull meal", "so so"]
SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
READ_BACK = {"README.md", "config.json", "config.yaml", "heads.safetensors", "manifest.json", "model.safetensors"}
READ_BACK |= {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[FakeHub]:
    """A hub that huggingface_hub talks to, with a token and an empty cache."""
    with serving() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield fake


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A finished run of sst and sts, whose data is where its options say."""
    shutil.copytree(FIXTURE, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work" / "run"


@pytest.fixture(scope="module")
def own_run(tmp_path_factory) -> minbert.Run:
    directory = tmp_path_factory.mktemp("own")
    tasks = write_tasks(directory / "secret")
    records = yaml.safe_load(tasks.read_text())
    records["tasks"]["topics"]["title"] = "Topics | <b>of</b> *all*"
    tasks.write_text(yaml.safe_dump(records))
    options = {"precision": "fp32", "batch_size": 8, "steps": 3, "lr": 3e-3, "recipe": "plain", "scratch": SHAPE}
    return minbert.fit(tasks_file=tasks, out=directory / "run", quiet=True, **options)


def with_seed(run: Path, seed: int, accuracy: float, **options: object) -> Path:
    """A copy of a run beside it, as one of another seed with other scores."""
    other = shutil.copytree(run, run.with_name(f"seed-{seed}"))
    values = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**values, "seed": seed, **options}))
    summary = json.loads((other / "summary.json").read_text())
    summary["dev"]["sst"]["accuracy"] = accuracy
    (other / "summary.json").write_text(json.dumps(summary))
    return other


def metadata_and_text(directory: Path) -> tuple[dict, str]:
    _, metadata, text = (directory / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(metadata), text


def dry(run: Path, out: Path, *options: str) -> Path:
    assert push.main([str(run), NAME, "--dry-run", f"--out={out}", *options]) == 0
    return out


# To the hub and back --------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_read_back_and_predicts_the_same_to_the_bit(hub, run, tmp_path, capsys):
    assert push.main([str(run), NAME, "--private", "--message=first one"]) == 0
    repository = hub.repositories[NAME]
    assert (repository.private, repository.commits) == (True, ["first one"])
    assert {*repository.files} == READ_BACK
    assert repository.large == {"model.safetensors", "heads.safetensors"}
    shown = capsys.readouterr().out
    for name, data in repository.files.items():
        assert re.search(rf"{re.escape(name)} +{len(data):,} bytes", shown)
    assert shown.splitlines()[-1].startswith(f"{NAME}: {hub.address}/{NAME}/commit/")

    expected, found = minbert.load(run), minbert.load(NAME)
    assert found.checkpoint.is_relative_to(tmp_path / "hub-cache")
    assert found.predict("sst", TEXTS) == expected.predict("sst", TEXTS)
    assert found.predict("sts", TEXTS, TEXTS[::-1]) == expected.predict("sts", TEXTS, TEXTS[::-1])
    assert (found.embed(TEXTS) == expected.embed(TEXTS)).all()


def test_the_command_predicts_by_the_name_on_the_hub(hub, run, capsys):
    assert push.main([str(run), NAME]) == 0
    Path("texts").write_text("\n".join(TEXTS))
    capsys.readouterr()
    found = []
    for trained in (str(run), NAME):
        assert predict.main([trained, "--task=sst", "--input=texts"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != ""
    with pytest.raises(UserError, match=f"{NAME} is one checkpoint of a run; leave --checkpoint out"):
        predict.main([NAME, "--task=sst", "--input=texts", "--checkpoint=last"])


def test_the_encoder_is_read_by_the_name_on_the_hub(hub, run, tmp_path, monkeypatch):
    assert push.main([str(run), NAME]) == 0
    found, expected = Encoder.from_pretrained(NAME).state_dict(), Encoder.from_pretrained(run / "best").state_dict()
    assert {*found} == {*expected}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    options = ["--data=data", f"--model={NAME}", "--tasks=sst", "--steps=1", "--precision=fp32", "--batch-size=2"]
    assert train.main([*options, "--max-length=24", f"--out={tmp_path / 'further'}"]) == 0
    metadata, _ = metadata_and_text(dry(tmp_path / "further", tmp_path / "out"))
    assert metadata["base_model"] == NAME


def test_a_second_push_is_a_further_commit_and_removes_what_the_first_one_alone_has(hub, run):
    hub.repositories[NAME] = Repository(files={"tasks.yaml": b"of another run", "notes.md": b"of the user"})
    assert push.main([str(run), NAME]) == 0
    assert {*hub.repositories[NAME].files} == READ_BACK | {"notes.md"}
    minbert.load(NAME)
    with pytest.raises(UserError, match=f"{NAME} is on the hub already, and public; leave --private out"):
        push.main([str(run), NAME, "--private"])
    assert len(hub.repositories[NAME].commits) == 1


def test_own_tasks_go_and_come_back(hub, own_run):
    assert push.main([str(own_run.path), NAME]) == 0
    found, expected = minbert.load(NAME), minbert.load(own_run)
    for task in ("topics", "tags"):
        assert found.predict(task, TEXTS) == expected.predict(task, TEXTS)
    for task in ("same", "stars"):
        assert found.predict(task, TEXTS, TEXTS[::-1]) == expected.predict(task, TEXTS, TEXTS[::-1])


def test_a_pushed_run_predicts_the_files_that_it_was_trained_on(own_run, tmp_path, capsys):
    pushed = dry(own_run.path, tmp_path / "pushed")
    table, lines = tmp_path / "tickets.csv", tmp_path / "tickets.jsonl"
    table.write_text('ticket id,message,topic\n1,"the invoice,\npaid",billing\n2,a crash,bug\n')
    lines.write_text('{"message": "hello", "id": "x"}\n')
    capsys.readouterr()
    for file in (table, lines):
        outputs = []
        for each in (own_run.path, pushed):
            assert predict.main([str(each), "--task=topics", f"--input={file}"]) == 0
            outputs.append(capsys.readouterr().out)
        assert outputs[0] == outputs[1]
    assert outputs[0].splitlines()[1].startswith("x,")


def test_an_altered_file_on_the_hub_is_named(hub, run):
    assert push.main([str(run), NAME]) == 0
    files = hub.repositories[NAME].files
    for name in ("config.yaml", "heads.safetensors"):
        before = files[name]
        files[name] = before + b" "
        hub.repositories[NAME].commits.append("altered")
        with pytest.raises(UserError, match=f"{name} was truncated or altered"):
            minbert.load(NAME)
        files[name] = before


# What stays here ------------------------------------------------------------------------------------------------------


def test_no_path_of_this_machine_is_in_what_is_uploaded(own_run, run, tmp_path, capsys):
    out = dry(own_run.path, tmp_path / "out")
    assert "left out of config.yaml, as they name files here: --out, files of the tasks" in capsys.readouterr().out
    for path in out.iterdir():
        data = path.read_bytes()
        assert str(own_run.path.parent).encode() not in data, path.name
        assert b"secret" not in data, path.name
        assert b"-train.csv" not in data, path.name
    values = yaml.safe_load((run / "config.yaml").read_text())
    files = {
        "data": "/home/ada/data",
        "model": "../ada/model",
        "reviews": "/ada/reviews.csv",
        "tasks": ["sst", "sts", "yelp"],
    }
    (run / "config.yaml").write_text(yaml.safe_dump({**values, **files, "augmented": {"sst": "/ada/more.tsv"}}))
    with patch("minbert.push.load_tasks", lambda path, tasks: tasks[:2]):
        out = dry(run, tmp_path / "all")
    assert "--out, --data, --model, --reviews, --augmented" in capsys.readouterr().out
    assert not [path.name for path in out.iterdir() if re.search(rb"/ada|/home", path.read_bytes())]


def test_a_relative_directory_is_no_name_on_the_hub(run, tmp_path):
    """Of a directory that is gone the name alone is left, which may look like one on the hub."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**values, "model": "secrets/bert", "data": "secrets/files"}))
    out = dry(run, tmp_path / "out")
    assert not [path.name for path in out.iterdir() if b"secrets" in path.read_bytes()]


def test_the_optimizers_state_stays_and_a_resume_says_so(run, tmp_path):
    out = dry(run, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == READ_BACK
    verify(out)
    assert "README.md" not in json.loads((out / "manifest.json").read_text())  # the hub's users may edit it
    for options in (["--resume"], []):
        with pytest.raises(UserError, match=r"out is a checkpoint without the state of its optimizer.*give --model"):
            train.main(["--data=data", "--model=model", "--precision=fp32", f"--out={out}", *options])
    shutil.rmtree(run / "last")
    shutil.copytree(out, run / "last")
    with pytest.raises(UserError, match=r"last/progress\.json"):
        train.main([f"--config={run / 'config.yaml'}", f"--out={run}", "--resume"])


def test_dry_run_needs_no_hub_and_writes_beside_the_run(run, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert push.main([str(run), NAME, "--dry-run"]) == 0
    out = run.with_name("run-hub")
    assert capsys.readouterr().out.endswith(f"{out}: nothing is uploaded\n")
    assert minbert.load(out).predict("sst", TEXTS) == minbert.load(run).predict("sst", TEXTS)
    with pytest.raises(UserError, match="run-hub is there already"):
        push.main([str(run), NAME, "--dry-run"])


def test_the_last_checkpoint_has_its_own_scores(run, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    summary["dev"]["sst"]["accuracy"] = 0.9
    (run / "summary.json").write_text(json.dumps(summary))
    metadata, text = metadata_and_text(dry(run, tmp_path / "out", "--checkpoint=last"))
    assert "Of the last epoch, 2." in text
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.2


# The card -------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_says(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where the run's relative paths lead nowhere
    metadata, text = metadata_and_text(dry(run, tmp_path / "without", "--license=apache-2.0"))
    assert "| SST-5 sentiment | – | 5 | – |" in text
    assert "the card lacks numbers of examples: no such directory: 'data'" in capsys.readouterr().out
    data = f"--data={run.parent / 'data'}"
    metadata, text = metadata_and_text(dry(run, tmp_path / "out", "--license=apache-2.0", data))
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("minbert", "text-classification")
    assert metadata["license"] == "apache-2.0"
    assert not {"base_model", "datasets"} & {*metadata}
    results = metadata["model-index"][0]["results"]
    scores = {each["dataset"]["type"]: each["metrics"][0] for each in results}
    dev = json.loads((run / "summary.json").read_text())["dev"]
    assert scores["sst"]["value"] == dev["sst"]["accuracy"]
    assert (scores["sts"]["type"], scores["sts"]["value"]) == ("pearsonr", dev["sts"]["pearson"])
    for line in (
        "| SST-5 sentiment | 8 | 5 | – |",
        "| STS-B similarity | 8 | 5 | – |",
        "| dev | STS-B similarity | Pearson | 0.810 |",
        "| sst/sts | 75% | −0.069 |",
        "| --lr | 0.01 | left out |",
        "| parameters | 1,254 |",
        f'predictor = minbert.load("{NAME}")',
    ):
        assert line in text.splitlines()
    assert "0 (negative), 1 (somewhat negative)" in text
    assert "| score from 0 to 5 |" in text


def test_the_cards_python_runs(hub, run, capsys):
    assert push.main([str(run), NAME]) == 0
    text = hub.repositories[NAME].files["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    capsys.readouterr()
    names: dict = {}
    exec(blocks[0], names)
    assert capsys.readouterr().out.count("Prediction(") == 2
    assert names["vectors"].shape == (2, 8)


def test_texts_of_the_user_are_nothing_but_text(own_run, tmp_path):
    metadata, text = metadata_and_text(dry(own_run.path, tmp_path / "out"))
    assert r"Topics \| \<b\>of\</b\> \*all\*" in text
    assert "<b>" not in text
    names = [each["dataset"]["name"] for each in metadata["model-index"][0]["results"]]
    assert "Topics | <b>of</b> *all*" in names
    assert markdown("a\n# b [c](d) `e` https://f") == r"a\\n\# b \[c\](d) \`e\` https\://f"


def test_the_spread_is_that_of_the_finished_runs_of_other_seeds(run, tmp_path, capsys):
    runs = run.rename(run.with_name("seed-0"))
    with_seed(runs, 1, 0.4)
    with_seed(runs, 2, 0.6)
    with_seed(runs, 3, 0.9, clip_norm=2.0)
    (with_seed(runs, 4, 0.9) / "summary.json").unlink()
    _, text = metadata_and_text(dry(runs, tmp_path / "out"))
    assert "| dev | SST-5 sentiment | accuracy | 0.200 | 0.400 ± 0.200 |" in text
    assert "Mean and standard deviation: 3 runs, seeds 0, 1, 2." in text
    shown = capsys.readouterr().out
    assert re.search(r"seed-3 does not enter the mean: --clip-norm \(was 2.*is 1", shown)
    assert re.search(r"seed-4 does not enter the mean: it has not finished", shown)
    elsewhere = shutil.copytree(runs, tmp_path / "alone")
    _, text = metadata_and_text(dry(elsewhere, tmp_path / "none"))
    assert "±" not in text
    _, text = metadata_and_text(dry(elsewhere, tmp_path / "named", f"--seeds-of={runs.parent}"))
    assert "0.400 ± 0.200" in text
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no finished run that differs from .* in its seed alone"):
        dry(elsewhere, tmp_path / "other", f"--seeds-of={tmp_path / 'empty'}")


def test_the_folds_of_a_cross_validation_are_its_spread(run, tmp_path):
    values = yaml.safe_load((run / "config.yaml").read_text())
    for fold in (1, 2):
        other = shutil.copytree(run, tmp_path / "folds" / f"fold-{fold}")
        (other / "config.yaml").write_text(yaml.safe_dump({**values, "folds": 2, "fold": fold}))
    _, text = metadata_and_text(dry(tmp_path / "folds" / "fold-1", tmp_path / "out"))
    assert "Mean and standard deviation: 2 runs, folds 1, 2 of 2." in text
    assert "| fold | 1 of 2 |" in text


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_pushed_is_one_line(hub, run, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="NAME two-tasks: expected OWNER/NAME"):
        push.main([str(run), "two-tasks"])
    with pytest.raises(UserError, match="NAME a//b: "):
        push.main([str(run), "a//b"])
    with pytest.raises(UserError, match="NAME is missing: OWNER/NAME on the hub"):
        push.main([str(run)])
    with pytest.raises(UserError, match="--out is of --dry-run"):
        push.main([str(run), NAME, f"--out={tmp_path / 'out'}"])
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="no token of the hub here: run `hf auth login`, or set HF_TOKEN"):
        push.main([str(run), NAME])
    (run / "best" / "model.safetensors").write_bytes(b"altered")
    with pytest.raises(UserError, match=r"model\.safetensors was truncated or altered"):
        dry(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="run has not finished"):
        push.main([str(run), NAME])
    assert hub.requests == []


def test_the_hubs_refusals_are_one_line(hub, run, monkeypatch):
    hub.failing = (403, "You don't have the rights to create a model under the namespace")
    with pytest.raises(UserError, match=rf"the hub does not take {NAME} \(.*403 Forbidden"):
        push.main([str(run), NAME])
    hub.failing = (500, "broken")
    with pytest.raises(UserError, match=rf"the hub does not take {NAME} \(.*500 Internal Server Error") as caught:
        push.main([str(run), NAME])
    assert "\n" not in str(caught.value)
    hub.failing = None
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(UserError, match="401"):
        push.main([str(run), NAME])
    assert hub.repositories == {}


def test_a_command_line_ends_with_one_line_and_code_2(hub, run):
    """In a process of its own, which finds the hub by HF_ENDPOINT."""
    hub.failing = (500, "broken")
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "minbert", "push", str(run), NAME]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert found.returncode == 2
    assert re.fullmatch(rf"error: the hub does not take {NAME} \(.*500 Internal Server Error.*\)\n", found.stderr)


def test_what_is_no_model_of_minbert_on_the_hub_is_named(hub):
    with pytest.raises(UserError, match="neither a directory nor a model you can read on the hub"):
        minbert.load("ada/nothing")
    hub.repositories["ada/bert"] = Repository(files={"config.json": b"{}", "model.safetensors": b"large"})
    with pytest.raises(UserError, match="ada/bert on the hub is no model that minbert push wrote"):
        minbert.load("ada/bert")
    assert not any("model.safetensors" in request for request in hub.requests)


def test_a_hub_name_of_the_data_or_the_model_stands_in_the_card_if_the_cache_has_it(hub, run, tmp_path, capsys):
    values = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**values, "model": "tiny-bert", "data": "ada/films"}))
    metadata, text = metadata_and_text(dry(run, tmp_path / "before"))
    assert not {"base_model", "datasets"} & {*metadata}
    for folder in ("models--tiny-bert", "datasets--ada--films"):
        (Path(constants.HF_HUB_CACHE) / folder).mkdir(parents=True)
    metadata, text = metadata_and_text(dry(run, tmp_path / "after"))
    assert (metadata["base_model"], metadata["datasets"]) == ("tiny-bert", ["ada/films"])
    assert {each["dataset"]["type"] for each in metadata["model-index"][0]["results"]} == {"ada/films"}
    assert "On the hub: ada/films." in text
    assert "the card names tiny-bert, ada/films of the hub" in capsys.readouterr().out
    values = yaml.safe_load((tmp_path / "after" / "config.yaml").read_text())
    assert (values["model"], values["data"]) == ("tiny-bert", "ada/films")
    Path("tiny-bert").mkdir()  # a directory here of the same name
    metadata, _ = metadata_and_text(dry(run, tmp_path / "directory"))
    assert "base_model" not in metadata
