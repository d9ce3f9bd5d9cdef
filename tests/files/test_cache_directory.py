"""The cache keeps within its limit: what was used least recently goes, never what was just written."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from minbert.data import Examples, encode
from minbert.errors import UserError
from minbert.files import cache_directory
from minbert.files.cache_directory import ABANDONED, cache_limit, cache_usage, keep_within_limit, touch


def entry(directory: Path, digit: str, *, size: int = 100, used: float = 0.0) -> Path:
    path = directory / f"{digit * 64}.safetensors"
    path.write_bytes(bytes(size))
    os.utime(path, (used, used))
    return path


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", 2 * 2**30),
        ("2GiB", 2 * 2**30),
        ("1.5 gib", 3 * 2**29),
        ("500MB", 500 * 10**6),
        ("10k", 10_000),
        ("123", 123),
        ("0", 0),
        ("none", None),
    ],
)
def test_limits(monkeypatch, text, size):
    monkeypatch.setenv("MINBERT_CACHE_LIMIT", text)
    assert cache_limit() == size


@pytest.mark.parametrize("text", ["much", "-1", "2 XB", "1e9", "GiB"])
def test_what_is_no_limit_is_refused(monkeypatch, text):
    monkeypatch.setenv("MINBERT_CACHE_LIMIT", text)
    with pytest.raises(UserError, match=r"MINBERT_CACHE_LIMIT must be a size such as 2GiB or 500MB, 0 .* got '"):
        cache_limit()


def test_the_least_recently_used_goes(tmp_path):
    old, used_again, middle, new = (entry(tmp_path, digit, used=1000.0 + int(digit)) for digit in "1234")
    touch(used_again)
    keep_within_limit(new, 250)
    assert set(tmp_path.iterdir()) == {used_again, new}
    assert cache_usage(tmp_path) == (2, 200)
    assert not old.exists()
    assert not middle.exists()


def test_what_was_just_written_stays_whatever_its_size_and_time(tmp_path):
    written, other = entry(tmp_path, "1", size=1000), entry(tmp_path, "2", used=1000.0)
    keep_within_limit(written, 10)
    assert written.exists()
    assert not other.exists()


def test_nothing_goes_within_the_limit(tmp_path):
    entries = {entry(tmp_path, digit) for digit in "123"}
    keep_within_limit(min(entries), 300)
    assert set(tmp_path.iterdir()) == entries


def test_files_of_others_stay_and_those_of_crashed_processes_go(tmp_path):
    written = entry(tmp_path, "1")
    others = [tmp_path / name for name in ("model.safetensors", "notes.txt", "ab.safetensors", "writing.tmp")]
    for path in others:
        path.write_bytes(bytes(1000))
    abandoned = tmp_path / "abandoned.tmp"
    abandoned.write_bytes(bytes(1000))
    os.utime(abandoned, (abandoned.stat().st_mtime - ABANDONED - 1,) * 2)
    keep_within_limit(written, 1)
    assert set(tmp_path.iterdir()) == {written, *others}


def test_an_entry_that_is_being_read_is_read_to_its_end(tmp_path):
    from safetensors.numpy import save_file

    path, written = tmp_path / f"{'1' * 64}.safetensors", entry(tmp_path, "2")
    values = np.arange(100_000)
    save_file({"values": values}, path)
    with safe_open(path, framework="numpy") as file:
        keep_within_limit(written, 1)
        assert not path.exists()
        np.testing.assert_array_equal(file.get_tensor("values"), values)


def test_a_cache_that_is_not_there_is_empty(tmp_path):
    assert cache_usage(tmp_path / "none") == (0, 0)
    keep_within_limit(tmp_path / "none" / "entry", 1)
    touch(tmp_path / "none")


# Encoded texts ------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token per letter, which counts its calls."""

    fingerprint = "letters"
    calls = 0

    def encode_batch(self, texts, pairs, max_length):
        self.calls += 1
        ids = np.array([ord(letter) for text in texts for letter in text], np.int32)
        return ids, np.zeros(len(ids), np.uint8), np.array(list(map(len, texts))), 0


def encoded(directory: Path, text: str) -> tuple[np.ndarray, bool]:
    """The tokens of a text, and whether they came from the cache."""
    tokenizer = Letters()
    tokens = encode(Examples(["x"], [text], None, None), tokenizer, 8, directory).token_ids
    return tokens, not tokenizer.calls


def test_encoded_texts_are_dropped_by_their_last_use(tmp_path, monkeypatch):
    monkeypatch.setenv("MINBERT_CACHE_LIMIT", "none")
    encoded(tmp_path, "a")
    (one,) = tmp_path.iterdir()
    encoded(tmp_path, "b")
    for path in tmp_path.iterdir():
        os.utime(path, (1000.0 + (path != one),) * 2)  # "a" is older ...
    assert encoded(tmp_path, "a")[1]  # ... and is used again
    monkeypatch.setenv("MINBERT_CACHE_LIMIT", str(2 * one.stat().st_size))
    assert not encoded(tmp_path, "c")[1]
    assert [encoded(tmp_path, text)[1] for text in "ca"] == [True, True]
    assert not encoded(tmp_path, "b")[1]


def test_a_limit_of_0_caches_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MINBERT_CACHE_LIMIT", "0")
    assert [encoded(tmp_path, "a")[1] for _ in range(2)] == [False, False]
    assert list(tmp_path.iterdir()) == []


def _encode_many(directory: Path, seed: int) -> None:
    for number in np.random.default_rng(seed).integers(0, 12, 150):
        text = "ab" * (number + 1)
        tokens, _ = encoded(directory, text)
        assert tokens.tolist() == [ord(letter) for letter in text]


def test_several_processes_share_a_small_cache(tmp_path, monkeypatch):
    encoded(tmp_path, "a" * 24)
    (one,) = tmp_path.iterdir()
    limit = 4 * one.stat().st_size
    monkeypatch.setenv("MINBERT_CACHE_LIMIT", str(limit))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_encode_many, args=(tmp_path, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    encoded(tmp_path, "the last one")
    assert cache_usage(tmp_path).size <= limit
    assert all(cache_directory._ENTRY.fullmatch(path.name) for path in tmp_path.iterdir())
