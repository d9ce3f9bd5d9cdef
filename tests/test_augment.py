"""Back-translation with a tiny model of random weights: every sentence once, whatever stops it, beside its label."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from groups import quick_options

from minbert import augment, train
from minbert.data import read_augmented, read_examples
from minbert.errors import UserError
from minbert.tasks import TASKS

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(course_data, tmp_path_factory) -> Path:
    """A Marian model of a few words, which writes nonsense."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    lines = (course_data / "ids-sst-train.csv").read_text().split() + (
        course_data / "sts-train.csv"
    ).read_text().split()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *lines]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    directory = tmp_path_factory.mktemp("marian")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)
    shape = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("layers", 1), ("ffn_dim", 16))}
    shape |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 8, "vocab_size": len(vocabulary)}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": 1, "decoder_start_token_id": 0}
    transformers.set_seed(0)
    marian = transformers.MarianMTModel(transformers.MarianConfig(**shape, **ids, init_std=1.0))
    marian.generation_config.bad_words_ids = None
    marian.save_pretrained(directory)
    return directory


@pytest.fixture
def options(course_data, model, tmp_path) -> list[str]:
    return [
        f"--data={course_data}",
        f"--model={model}",
        f"--back-model={model}",
        f"--out={tmp_path / 'more.jsonl'}",
        "--batch-size=7",
        "--max-length=8",
        "--temperature=1",
    ]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_training_sentence_is_written_once_beside_its_label(options, course_data, tmp_path):
    assert augment.main(options) == 0
    originals = read_examples(course_data / "ids-sst-train.csv", TASKS["sst"])
    written = {row["id"]: row for row in rows(tmp_path / "more.jsonl")}
    assert [row["sentiment"] for row in map(written.get, originals.ids)] == originals.labels.tolist()
    assert len(rows(tmp_path / "more.jsonl")) == len(originals) == 48
    assert len({row["sentence"] for row in written.values()}) > 20
    examples = read_augmented(tmp_path / "more.jsonl", TASKS["sst"], originals)
    assert len(examples) + len(examples.skipped) == 48


def test_both_sentences_of_a_pair_are_written_anew(options, course_data, tmp_path):
    assert augment.main([*options, "--task=sts", "--batch-size=16"]) == 0
    originals = read_examples(course_data / "sts-train.csv", TASKS["sts"])
    examples = read_augmented(tmp_path / "more.jsonl", TASKS["sts"], originals)
    assert set(examples.texts).isdisjoint(originals.texts)
    assert set(examples.pairs).isdisjoint(originals.pairs)


def test_own_tasks_keep_their_columns_and_labels(options, tmp_path):
    """Of several labels a list, which trains as the texts with a separator do."""
    (tmp_path / "data.csv").write_text(
        "nr,a text,tags\n" + "".join(f"n{i},the film {i},x;{'yz'[i % 2]}\n" for i in range(8))
    )
    (tmp_path / "tasks.yaml").write_text(
        "tasks: {own: {text: a text, label: tags, type: multilabel, id: nr, train: data.csv, dev: 0.25}}\n"
    )
    assert augment.main([*options[1:], f"--tasks-file={tmp_path / 'tasks.yaml'}", "--task=own"]) == 0
    found = rows(tmp_path / "more.jsonl")
    assert {tuple(row["tags"]) for row in found} <= {("x", "y"), ("x", "z")}
    assert {row["nr"] for row in found} == {row["id"] for row in found} <= {f"n{i}" for i in range(8)}
    own = [f"--tasks-file={tmp_path / 'tasks.yaml'}", f"--augmented.own={tmp_path / 'more.jsonl'}"]
    quick = [option for option in quick_options(Path(), tmp_path / "run") if not option.startswith("--data")]
    assert train.main([*quick, *own, "--batch-size=2", "--steps=2"]) == 0


@pytest.mark.parametrize("cut", [0, 5, 700])  # bytes of the next batch that a crash left: none, part of a line, lines
def test_stopped_and_started_again_gives_the_same_file(options, tmp_path, monkeypatch, capsys, cut):
    assert augment.main(options) == 0
    whole = (tmp_path / "more.jsonl").read_bytes()
    real, calls = augment.Translator.__call__, []

    def stopping(self, texts, seed):
        calls.append(seed)
        if len(calls) == 6:  # of the third batch, on the way back
            raise KeyboardInterrupt
        return real(self, texts, seed)

    stopped = [*options, f"--out={tmp_path / 'stopped.jsonl'}"]
    monkeypatch.setattr(augment.Translator, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        augment.main(stopped)
    path = tmp_path / "stopped.jsonl"
    assert "14 of 48 are in" in capsys.readouterr().out
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:14])
    with open(path, "ab") as file:
        file.write(whole[path.stat().st_size :][:cut])
    assert augment.main(stopped) == 0
    assert path.read_bytes() == whole


def test_a_finished_file_is_left_as_it_is(options, tmp_path, monkeypatch):
    assert augment.main(options) == 0
    before = (tmp_path / "more.jsonl").read_bytes()
    monkeypatch.setattr(augment.Translator, "__init__", None)
    assert augment.main(options) == 0
    assert (tmp_path / "more.jsonl").read_bytes() == before


def test_the_seed_decides_what_is_drawn(options, tmp_path):
    for seed in (1, 2):
        assert augment.main([*options, f"--seed={seed}", f"--out={tmp_path / str(seed)}"]) == 0
    one, two = ([row["sentence"] for row in rows(tmp_path / str(seed))] for seed in (1, 2))
    assert one != two


def test_beam_search_draws_nothing(options, tmp_path):
    beams = [option for option in options if "temperature" not in option] + ["--beams=2"]
    for seed in (1, 2):
        assert augment.main([*beams, f"--seed={seed}", f"--out={tmp_path / str(seed)}"]) == 0
    one, two = ([row["sentence"] for row in rows(tmp_path / str(seed))] for seed in (1, 2))
    assert one == two


def test_training_takes_the_file(options, quick, tmp_path):
    assert augment.main(options) == 0
    assert train.main([*quick, "--steps=1", f"--augmented.sst={tmp_path / 'more.jsonl'}"]) == 0


def test_a_file_of_another_making_is_refused(options, tmp_path):
    assert augment.main(options) == 0
    with pytest.raises(UserError, match=r"more\.jsonl, line 1: made from other data or by .*temperature 1, .*seed 0"):
        augment.main([*options, "--seed=1"])
    for text in ("my only copy\n", "my only copy", "[" * 100_000, '{"id": 1}\n', "3\n"):
        (tmp_path / "more.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"more\.jsonl, line 1: not a row that minbert augment wrote"):
            augment.main(options)
        assert (tmp_path / "more.jsonl").read_text() == text


def test_a_pipe_is_not_waited_for(options, tmp_path):
    os.mkfifo(tmp_path / "more.jsonl")
    with pytest.raises(UserError, match=r"--out .*more\.jsonl: cannot be written \(not a regular file\)"):
        augment.main(options)


def test_a_model_that_is_not_there_leaves_no_file(options, tmp_path):
    with pytest.raises(UserError, match="not a translation model"):
        augment.main([*options, "--model=/nowhere"])
    assert not (tmp_path / "more.jsonl").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--task=stt", r"unknown task 'stt' \(did you mean 'sts'\?\)"),
        ("--data=/nowhere", "no such directory: '/nowhere'"),
        ("--model=/nowhere", "/nowhere: not a translation model that transformers loads"),
        ("--out=/nowhere/file", r"--out /nowhere/file: cannot be written \(No such file"),
        ("--batch-size=0", "--batch-size must be at least 1, got 0"),
        ("--temperature=0", "--temperature must be more than 0, got 0"),
        ("--beam=3", r"unknown option --beam \(did you mean '--beams'\?\)"),
    ],
)
def test_a_mistake_is_named_in_one_line(options, changed, message):
    with pytest.raises(UserError, match=message) as caught:
        augment.main([*options, changed])
    assert "\n" not in str(caught.value)


def test_without_transformers_it_says_what_to_install(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers and sentencepiece: pip install 'minbert\[augment\]'"):
        augment.main(options)
