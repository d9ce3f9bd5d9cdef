"""A resumed run compares its data with the data it started with; bad data is refused before the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from groups import quick_options
from skipped_rows import write_data

from minbert import train
from minbert.errors import UserError


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("ids-sst-train.csv", "fine .\t1", "fine .\t2", "the training data of sst changed"),
        ("ids-sst-train.csv", "tr1\t", "tr9\t", "the training data of sst changed"),
        ("ids-sst-dev.csv", "fine .\t1", "fine .\t2", "the dev data of sst changed"),
        ("STS-B/train.tsv", "they won .\t1", "they won .\t2", "the training data of sts changed"),
    ],
)
def test_a_changed_label_or_id_is_seen_when_a_run_is_resumed(tmp_path, name, old, new, said):
    data = write_data(tmp_path)
    options = [*quick_options(data, tmp_path / "run"), "--batch-size=4", "--steps=1"]
    assert train.main(options) == 0
    before = (tmp_path / "run" / "skipped.jsonl").read_text()
    text = (data / name).read_text()
    assert old in text
    (data / name).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=said):
        train.main([*options, "--steps=2", "--resume"])
    (data / name).write_text(text)
    assert train.main([*options, "--steps=2", "--resume"]) == 0
    assert (tmp_path / "run" / "skipped.jsonl").read_text() == before


def test_a_bad_test_file_is_refused_before_the_training(tmp_path):
    data = write_data(tmp_path)
    (data / "QQP" / "test.tsv").write_bytes("id\tquestion1\tquestion2\n1\té\té\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"QQP/test\.tsv, line 2: not UTF-8"):
        train.main([*quick_options(data, tmp_path / "run"), "--batch-size=4"])
    assert not (tmp_path / "run").exists()


FIXTURE = Path(__file__).parent / "fixtures" / "run-0.1.0"


@pytest.mark.parametrize(("word", "said"), [("", None), ("film", "the training data of sst changed")])
def test_a_checkpoint_of_0_1_0_compares_the_tokens_that_it_recorded(tmp_path, monkeypatch, word, said):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    options = ["--config=run/config.yaml", "--out=run", "--resume"]
    if said:
        path = Path("data/ids-sst-train.csv")
        lines = path.read_text().splitlines()
        fields = lines[1].split("\t")
        lines[1] = "\t".join([*fields[:-2], word, fields[-1]])
        path.write_text("\n".join(lines))
        with pytest.raises(UserError, match=said):
            train.main(options)
        return
    assert train.main(options) == 0
    recorded = json.loads(Path("run/last/progress.json").read_text())["data"]
    assert recorded.keys() == {"sst", "sts", "sst dev", "sts dev"}
    path = Path("data/ids-sst-dev.csv")
    path.write_text(path.read_text().replace("\t1\n", "\t2\n"))
    with pytest.raises(UserError, match="the dev data of sst changed"):
        train.main([*options, "--epochs=3"])
