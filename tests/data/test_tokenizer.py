"""The tokenizer against transformers', its own files and the errors of bad input."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data.packing import pack_flat
from minbert.data.tokenizer import REQUIRED, SPECIAL, Tokenizer, _backend, _count_words, _longest_first
from minbert.errors import UserError

MODEL, DATA = os.environ.get("MINBERT_TEST_MODEL"), os.environ.get("MINBERT_TEST_DATA")
needs_model = pytest.mark.skipif(MODEL is None, reason="MINBERT_TEST_MODEL names no pretrained model")
needs_data = pytest.mark.skipif(DATA is None, reason="MINBERT_TEST_DATA names no data")

WORDS = [*SPECIAL, "the", "cat", "sat", "##s", "##ting", "un", "##known", "é", "e", ",", "[", "]", "The"]
TEXTS = ["the cats sat", "The CAT, sitting", "unknown é", "", "the the the the the the", "[SEP] the [MASK]", "zebra 猫"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint's tokenizer with a small vocabulary, as vocab.txt alone."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(directory)


@cache
def examples() -> tuple[list[tuple[str]], list[tuple[str, str]]]:
    """Every single text and every pair of the real data; some long reviews make pairs too, each with the next."""
    singles, pairs = [], []
    for path in sorted(Path(DATA or "").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, delimiter="\t")
        columns = [i for i, name in enumerate(header) if name.startswith("sentence") and name != "sentiment"]
        rows = [[row[i] for i in columns] for row in rows if len(row) > columns[-1]]
        singles += [(text,) for row in rows for text in row]
        if len(columns) == 2:
            pairs += [(first, second) for first, second in rows]
        elif "cfimdb-dev" in path.name:
            pairs += [(first, second) for [first], [second] in pairwise(rows)]
    return singles, pairs


@needs_model
@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
def test_ids_types_and_truncation_equal_transformers_on_all_real_texts(paired: bool) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.from_pretrained(str(MODEL)), AutoTokenizer.from_pretrained(MODEL)
    columns = [list(column) for column in zip(*examples()[paired], strict=True)]
    assert len(columns[0]) > 20_000
    whole = theirs(*columns, verbose=False)["input_ids"]
    for max_length in (512, 32):
        expected = theirs(*columns, truncation=True, max_length=max_length)
        ids, types, lengths, truncated = ours.encode_batch(*columns, max_length=max_length)
        assert lengths.tolist() == [len(row) for row in expected["input_ids"]]
        assert ids.tolist() == list(chain.from_iterable(expected["input_ids"]))
        assert types.tolist() == list(chain.from_iterable(expected["token_type_ids"]))
        assert truncated == sum(len(row) > max_length for row in whole) > 0


@pytest.mark.parametrize(
    "config", [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": 0}]
)
@pytest.mark.parametrize("source", ["vocab.txt", "tokenizer.json"])
def test_options_of_tokenizer_config_act_as_in_transformers(directory: Path, source: str, config: dict) -> None:
    from transformers import AutoTokenizer, BertConfig

    if source == "tokenizer.json":
        Tokenizer.from_pretrained(directory).save(directory)
        (directory / "vocab.txt").unlink()
    config = {key: bool(value) for key, value in config.items()}
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))
    BertConfig().save_pretrained(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.from_pretrained(directory)
    assert [ours.encode(text) for text in TEXTS] == theirs(TEXTS)["input_ids"]


def test_truncation_and_padding_stored_in_tokenizer_json_are_ignored(directory: Path, tokenizer: Tokenizer) -> None:
    import tokenizers

    expected = tokenizer.encode("the cats sat")
    tokenizer.save(directory)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(directory / "tokenizer.json"))
    again = Tokenizer.from_pretrained(directory)
    assert again.encode("the cats sat") == expected
    assert again.fingerprint == tokenizer.fingerprint


@given(st.lists(st.integers(0, 40), min_size=2, max_size=2), st.integers(4, 40))
def test_truncation_takes_tokens_off_the_longer_one_by_one(lengths: list[int], room: int) -> None:
    first, second = _longest_first(*lengths, room)
    shorter, longer = sorted(lengths)
    while shorter + longer > room:
        shorter, longer = sorted((shorter, longer - 1))
    assert sorted((first, second)) == [shorter, longer]
    assert first <= lengths[0]
    assert second <= lengths[1]


def test_batches_agree_with_encode_and_pack(tokenizer: Tokenizer) -> None:
    ids, types, lengths, truncated = tokenizer.encode_batch(TEXTS, TEXTS[::-1], max_length=6)
    assert (ids.dtype, types.dtype, lengths.dtype) == (np.int32, np.uint8, np.int64)
    rows = [tokenizer.encode(text, pair, 6) for text, pair in zip(TEXTS, TEXTS[::-1], strict=True)]
    assert ids.tolist() == list(chain.from_iterable(rows))
    assert lengths.tolist() == [len(row) for row in rows]
    assert truncated == sum(
        len(tokenizer.encode(text, pair)) > 6 for text, pair in zip(TEXTS, TEXTS[::-1], strict=True)
    )
    assert pack_flat(ids, types, lengths).token_ids.tolist() == ids.tolist()


def test_token_types_turn_one_after_the_first_sep(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_type_ids(tokenizer.encode("the", "cat sat")) == [0, 0, 0, 1, 1, 1]
    assert tokenizer.token_type_ids(tokenizer.encode("the")) == [0, 0, 0]
    assert tokenizer.encode_batch(["the"], ["cat sat"])[1].tolist() == [0, 0, 0, 1, 1, 1]


def test_no_texts_give_empty_arrays(tokenizer: Tokenizer) -> None:
    ids, types, lengths, truncated = tokenizer.encode_batch([])
    assert (len(ids), len(types), len(lengths), truncated) == (0, 0, 0, 0)


def test_special_ids_and_vocab_size_are_the_vocabularys(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == len(WORDS)


def test_saved_tokenizer_is_the_same_from_each_of_its_files_and_in_transformers(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, BertConfig

    saved = tmp_path / "saved"
    tokenizer.save(saved)
    BertConfig().save_pretrained(saved)
    expected = [tokenizer.encode(text) for text in TEXTS]
    for removed in (None, "tokenizer.json"):
        if removed:
            (saved / removed).unlink()
        again = Tokenizer.from_pretrained(saved)
        assert again.fingerprint == tokenizer.fingerprint
        assert [again.encode(text) for text in TEXTS] == expected
        assert AutoTokenizer.from_pretrained(saved)(TEXTS)["input_ids"] == expected


def test_fingerprint_tells_vocabularies_and_options_apart(directory: Path, tokenizer: Tokenizer) -> None:
    (directory / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = Tokenizer.from_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join([*WORDS, "dog"]) + "\n", encoding="utf-8")
    assert len({tokenizer.fingerprint, cased.fingerprint, Tokenizer.from_pretrained(directory).fingerprint}) == 3


TRAINING = """
import random
from minbert.data.tokenizer import Tokenizer
rng = random.Random(0)
texts = ["".join(rng.choices("abcdefgh ,É", k=60)) for _ in range(300)]
print(Tokenizer.train(texts, 400).fingerprint)
"""


def test_training_gives_the_same_vocabulary_in_every_process() -> None:
    runs = {subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True).stdout for _ in range(3)}
    assert len(runs) == 1
    assert len(runs.pop().strip()) == 64


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\n\x1c\u0301.Σ猫"))))
def test_words_are_counted_as_the_tokenizer_splits_whole_texts(texts: list[str]) -> None:
    backend = _backend({token: number for number, token in enumerate(SPECIAL)})
    words = [
        word
        for text in texts
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    ]
    assert _count_words(backend, iter(texts)) == Counter(words)


def test_trained_vocabulary_covers_its_texts_in_whole_words() -> None:
    texts = ["Good films make good evenings", "good evenings make good films"] * 20
    tokenizer = Tokenizer.train(texts, 200)
    assert tokenizer.vocab_size <= 200
    assert len(tokenizer.encode("GOOD films make good evenings")) == 2 + 5
    assert tokenizer.unk_id not in tokenizer.encode("a good demon")[1:]


def test_trained_vocabulary_leaves_rare_characters_out_and_keeps_its_size() -> None:
    common = ["the good film"] * 50
    rare = ["".join(map(chr, range(0x4E00 + 40 * i, 0x4E00 + 40 * i + 40))) for i in range(10)]
    tokenizer = Tokenizer.train(common + rare, 100)
    assert tokenizer.vocab_size <= 100
    assert tokenizer.unk_id not in tokenizer.encode("the good film")
    assert tokenizer.unk_id in tokenizer.encode(rare[-1])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds neither tokenizer.json nor vocab.txt"),
        ({"vocab.txt": b"[PAD]\n[UNK]\nthe\n"}, r"vocab.txt: the vocabulary lacks \[CLS\], \[SEP\]"),
        ({"vocab.txt": b"\xff\xfe\x00"}, "cannot read .*vocab.txt .*UTF-8"),
        ({"tokenizer.json": b'{"version": "1.0", "trunc'}, "cannot read .*tokenizer.json .*again"),
        ({"tokenizer.json": b"version https://git-lfs"}, "cannot read .*tokenizer.json .*again"),
        ({"vocab.txt": b"", "tokenizer_config.json": b"{"}, "cannot read .*tokenizer_config.json .*again"),
        (
            {"vocab.txt": b"", "tokenizer_config.json": b"[]"},
            r"tokenizer_config.json \(expected a JSON object, got a list\)",
        ),
        (
            {"vocab.txt": "\n".join(SPECIAL).encode(), "tokenizer_config.json": b'{"do_lower_case": "yes"}'},
            "do_lower_case must be true or false, got 'yes'",
        ),
    ],
)
def test_damaged_tokenizers_are_refused_in_one_line(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_tokenizers_of_another_kind_are_refused(tmp_path: Path) -> None:
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer.json: expected a BERT tokenizer .* got BPE"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no directory './nowhere'"),
        ("/nowhere/at/all", "no directory '/nowhere/at/all'"),
        ("runs/today/best", "no directory 'runs/today/best'"),
        (Path("nowhere"), "no directory 'nowhere'"),
        ("", "no directory ''"),
        (__file__, "is a file; give the directory"),
        ("no such name", "neither a directory nor a model you can read on the hub"),
    ],
)
def test_paths_that_are_no_checkpoint_are_refused_without_asking_the_hub(
    name: str | Path, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **options: pytest.fail("asked the network"))
    with pytest.raises(UserError, match=message):
        Tokenizer.from_pretrained(name)


def test_hub_names_offline_are_refused_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    command = "from minbert.data.tokenizer import Tokenizer as T; from minbert.errors import UserError\n"
    command += "try: T.from_pretrained('owner/absent')\nexcept UserError as error: print(error)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment)
    assert run.stdout.startswith("'owner/absent' is not a directory, and the hub is out of reach"), run.stderr
    assert run.stdout.endswith("unset HF_HUB_OFFLINE), or give the directory of a downloaded checkpoint\n")
    assert run.stdout.count("\n") == 1


@pytest.mark.parametrize("bad", [None, 3.5, "\ud800"])
def test_texts_that_are_no_text_are_named(tokenizer: Tokenizer, bad: object) -> None:
    with pytest.raises(UserError, match="text 2 of 3 is not valid Unicode text"):
        tokenizer.encode_batch(["the", bad, "cat"])  # type: ignore[list-item]


def test_impossible_arguments_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="pairs must be as many as texts: got 1 for 2"):
        tokenizer.encode_batch(["the", "cat"], ["sat"])
    with pytest.raises(ValueError, match="max_length must be at least 4, got 3"):
        tokenizer.encode("the", max_length=3)
    with pytest.raises(UserError, match="vocab_size must be at least 100, got 99"):
        Tokenizer.train(["the cat"], 99)
    with pytest.raises(UserError, match="no word to learn a vocabulary from"):
        Tokenizer.train(["", " "], 100)


@pytest.mark.parametrize("token", REQUIRED)
def test_each_special_token_is_required(tmp_path: Path, token: str) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(word for word in WORDS if word != token))
    with pytest.raises(UserError, match=rf"lacks \[{token.strip('[]')}\];"):
        Tokenizer.from_pretrained(tmp_path)


def decoder(**tokens: dict) -> dict:
    flags = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False, "special": False}
    return {"added_tokens_decoder": {number.lstrip("n"): {**flags, **token} for number, token in tokens.items()}}


ADDED_TEXTS = ["covid19 the cats [E1] the", "The COVID19 cat,covid19s", "[E1][E1] xcovid19x [NEW]", *TEXTS]
N = len(WORDS)


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {"covid19": N, "[E1]": N + 1}},
        {"added_tokens.json": {"[E1]": N + 1, "covid19": N}, "tokenizer_config.json": {"do_lower_case": False}},
        {"tokenizer_config.json": decoder(**{f"n{N}": {"content": "covid19"}, f"n{N + 1}": {"content": "[E1]"}})},
        {
            "tokenizer_config.json": decoder(
                **{
                    f"n{N}": {"content": "[E1]", "normalized": False, "special": True, "lstrip": True},
                    f"n{N + 1}": {"content": "covid19", "single_word": True},
                }
            )
        },
        {"tokenizer_config.json": {"additional_special_tokens": ["[E1]", "[NEW]"]}},
        {"special_tokens_map.json": {"additional_special_tokens": ["[E1]"], "unk_token": "[UNK]"}},
        {"tokenizer_config.json": {"tokenizer_class": "BertTokenizerFast", "never_split": None}},
        {"tokenizer_config.json": {"tokenizer_class": "DistilBertTokenizer", "do_basic_tokenize": True}},
        {"tokenizer_config.json": {"unk_token": {"__type": "AddedToken", "content": "[UNK]", "lstrip": False}}},
        {"tokenizer_config.json": {"strip_accents": True, "do_lower_case": False}},
    ],
)
@pytest.mark.parametrize("source", ["vocab.txt", "tokenizer.json"])
def test_added_tokens_and_options_give_the_ids_of_transformers(directory: Path, source: str, files: dict) -> None:
    from transformers import AutoTokenizer, BertConfig

    if source == "tokenizer.json":
        Tokenizer.from_pretrained(directory).save(directory)
        (directory / "vocab.txt").unlink()
    files = {"tokenizer_config.json": {}, **files}
    files["tokenizer_config.json"] = {"tokenizer_class": "BertTokenizer", **files["tokenizer_config.json"]}
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    BertConfig().save_pretrained(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.from_pretrained(directory)
    assert [ours.encode(text) for text in ADDED_TEXTS] == theirs(ADDED_TEXTS)["input_ids"]
    assert ours.vocab_size == len(theirs)
    ours.save(directory / "saved")
    again = Tokenizer.from_pretrained(directory / "saved")
    assert [again.encode(text) for text in ADDED_TEXTS] == theirs(ADDED_TEXTS)["input_ids"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config.json": {"tokenizer_class": "BertJapaneseTokenizer"}},
            "'BertJapaneseTokenizer' is not BERT",
        ),
        ({"config.json": {"tokenizer_class": "BertJapaneseTokenizer"}}, r"config\.json: .*'BertJapaneseTokenizer'"),
        ({"tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"}}, "'RobertaTokenizer'"),
        ({"tokenizer_config.json": {"tokenizer_class": [1]}}, "tokenizer_class a list"),
        ({"tokenizer_config.json": {"never_split": ["covid19"]}}, "does not have never_split a list"),
        ({"tokenizer_config.json": {"do_basic_tokenize": False}}, "does not have do_basic_tokenize false"),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": "x.Y"}}}, "does not have auto_map an object"),
        ({"tokenizer_config.json": {"unk_token": "un"}}, r"unk_token must be \[UNK\], as in BERT, got 'un'"),
        ({"special_tokens_map.json": {"cls_token": "<s>"}}, r"cls_token must be \[CLS\]"),
        ({"tokenizer_config.json": {"sep_token": 3}}, r"sep_token: expected str or Token, got 3"),
        ({"added_tokens.json": {"covid19": 40}}, f"added token 'covid19' has id 40 there, but would be {N}"),
        ({"added_tokens.json": {"covid19": 2**70}}, r"added_tokens\.json\.covid19: expected int"),
        ({"added_tokens.json": {"covid19": None}}, r"added_tokens\.json\.covid19: expected int, got null"),
        ({"added_tokens.json": {"": N}}, "an added token is empty"),
        ({"added_tokens.json": []}, r"added_tokens\.json \(expected a JSON object"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "expected ids as keys, got 'x'"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"19": {}}}}, "added_tokens_decoder"),
        ({"tokenizer_config.json": {"additional_special_tokens": "x"}}, r"additional_special_tokens: expected a list"),
    ],
)
def test_tokenizers_that_minbert_does_not_have_are_refused(directory: Path, files: dict, message: str) -> None:
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.from_pretrained(directory)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)
