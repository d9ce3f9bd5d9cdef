"""Encoded examples: packing is concatenation, and the cache can only make things faster."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minbert.data import Encoded, Examples, encode, pack_batches
from minbert.data.buckets import Buckets
from minbert.data.packing import Packed, pack
from minbert.data.tokenizer import Tokenizer


class Letters:
    """A tokenizer of one token per letter, which counts its calls."""

    def __init__(self, fingerprint: str = "letters") -> None:
        self.fingerprint = fingerprint
        self.calls = 0

    def encode_batch(self, texts, pairs, max_length):
        self.calls += 1
        rows = [[ord(letter) for letter in text] for text in texts]
        types = [[0] * len(row) for row in rows]
        for row, kinds, pair in zip(rows, types, pairs or (), strict=False):
            row += [ord(letter) for letter in pair]
            kinds += [1] * len(pair)
        truncated = sum(len(row) > max_length for row in rows)
        rows, types = ([row[:max_length] for row in both] for both in (rows, types))
        lengths = np.array([len(row) for row in rows], np.int64)
        return np.concatenate(rows).astype(np.int32), np.concatenate(types).astype(np.uint8), lengths, truncated


EXAMPLES = Examples(["a", "b", "c"], ["one", "three", "x"], ["two", "four", "yz"], np.array([0, 1, 1], np.float32))


@pytest.fixture
def encoded(tmp_path) -> Encoded:
    return encode(EXAMPLES, Letters(), 8, tmp_path)


def assert_same_packed(one: Packed, other: Packed) -> None:
    for name in ("token_ids", "token_type_ids", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == getattr(other, name).dtype, name
    assert one.max_seqlen == other.max_seqlen


def sequences(encoded: Encoded, values: np.ndarray) -> list[list[int]]:
    return [values[start:end].tolist() for start, end in zip(encoded.offsets, encoded.offsets[1:], strict=False)]


def test_encoding_keeps_ids_labels_and_the_count_of_cut_examples(encoded):
    assert (len(encoded), encoded.ids, encoded.labels.tolist()) == (3, ["a", "b", "c"], [0, 1, 1])
    assert encoded.lengths.tolist() == [6, 8, 3]
    assert encoded.truncated == 1
    assert bytes(encoded.token_ids.astype(np.uint8)) == b"onetwothreefouxyz"
    assert (encoded.token_ids.dtype, encoded.token_type_ids.dtype) == (np.int32, np.uint8)


@given(st.data())
def test_packing_lays_the_chosen_examples_end_to_end(tmp_path_factory, data):
    texts = data.draw(st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=8))
    examples = Examples([str(i) for i in range(len(texts))], texts, texts[::-1], None)
    encoded = encode(examples, Letters(), 7, tmp_path_factory.getbasetemp() / "cache")
    indices = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=10))
    ids, types = (sequences(encoded, values) for values in (encoded.token_ids, encoded.token_type_ids))
    assert_same_packed(
        encoded.pack(np.array(indices)), pack([ids[index] for index in indices], [types[index] for index in indices])
    )


@pytest.mark.parametrize("pair_encoding", ["cross-encoder", "bi-encoder", "both"])
def test_texts_of_which_no_token_is_left_are_told(tmp_path, pair_encoding):
    tokenizer = Tokenizer.train(["one two three"], 100)
    texts, pairs = ["one", "\x01\u200b", "two", "\x02"], ["two", "one", "\x03", "\x04"]
    pair = encode(Examples(list("abcd"), texts, pairs, None), tokenizer, 8, tmp_path, pair_encoding=pair_encoding)
    assert pair.without_tokens.tolist() == [1, 2, 3]
    single = encode(Examples(list("abcd"), texts, None, None), tokenizer, 8, tmp_path)
    assert single.without_tokens.tolist() == [1, 3]


def test_the_checksum_is_of_tokens_types_lengths_labels_and_ids_in_order(encoded, tmp_path):
    other = {
        "token_ids": encoded.token_ids[::-1].copy(),
        "token_type_ids": 1 - encoded.token_type_ids,
        "offsets": np.array([0, 5, 14, 17]),
        "labels": np.array([1, 0, 1], np.float32),
        "ids": ["a", "c", "b"],
        "width": 3,
    }
    changed = [replace(encoded, **{name: value}).checksum for name, value in other.items()]
    changed += [replace(encoded, labels=None).checksum, replace(encoded, ids=["a", 'b", "c', "c"]).checksum]
    assert len({encoded.checksum, *changed}) == len(changed) + 1
    again = encode(EXAMPLES, Letters(), 8, tmp_path)
    assert again.checksum == encoded.checksum
    assert encoded.is_recorded_as(json.loads(json.dumps(encoded.checksum)))
    assert not any(encoded.is_recorded_as(checksum) for checksum in (*changed, None, {}, [], 0, True))


def test_a_checkpoint_of_0_1_0_knows_the_tokens_alone(encoded):
    recorded = zlib.crc32(encoded.token_ids.tobytes())
    assert encoded.is_recorded_as(recorded)
    assert replace(encoded, labels=None).is_recorded_as(recorded)
    assert not replace(encoded, token_ids=encoded.token_ids[::-1].copy()).is_recorded_as(recorded)


def test_packing_batches_lays_tasks_end_to_end(encoded, tmp_path):
    other = encode(Examples(["d"], ["lonely"], None, None), Letters(), 8, tmp_path)
    together = pack_batches([(encoded, np.array([2, 0])), (other, np.array([0, 0])), (encoded, np.array([1]))])
    ids, types = (sequences(encoded, values) for values in (encoded.token_ids, encoded.token_type_ids))
    lonely = [ord(letter) for letter in "lonely"]
    expected = pack([ids[2], ids[0], lonely, lonely, ids[1]], [types[2], types[0], [0] * 6, [0] * 6, types[1]])
    assert_same_packed(together, expected)


def test_a_pair_read_apart_is_two_sequences_and_both_ways_are_three(encoded, tmp_path):
    apart, both = (encode(EXAMPLES, Letters(), 8, tmp_path, pair_encoding=how) for how in ("bi-encoder", "both"))
    joint = [bytes(row) for row in sequences(encoded, encoded.token_ids)]
    singly = [word.encode() for pair in zip(EXAMPLES.texts, EXAMPLES.pairs, strict=True) for word in pair]
    together = [row for i in range(3) for row in (joint[i], singly[2 * i], singly[2 * i + 1])]
    for read, width, expected in ((apart, 2, singly), (both, 3, together)):
        assert [bytes(row) for row in sequences(read, read.token_ids)] == expected
        assert (read.width, len(read), read.ids, read.labels.tolist()) == (width, 3, EXAMPLES.ids, [0, 1, 1])
        assert read.lengths.tolist() == [sum(map(len, expected[i * width : (i + 1) * width])) for i in range(3)]
        packed = read.pack(np.array([2, 0]))
        rows = [list(expected[i * width + k]) for i in (2, 0) for k in range(width)]
        assert torch.equal(packed.token_ids, pack(rows).token_ids)
        assert torch.equal(packed.cu_seqlens, pack(rows).cu_seqlens)
    assert apart.token_type_ids.tolist() == [0] * len(apart.token_ids)
    assert apart.truncated + encoded.truncated == both.truncated


def test_padding_comes_after_all_sequences_of_a_task(tmp_path):
    apart = encode(EXAMPLES, Letters(), 8, tmp_path, pair_encoding="bi-encoder")
    pad = partial(Buckets({"sts": apart}, 32).pad, tasks=["sts", "sts"], segments=[1, 1])
    packed = pack_batches([(apart, np.array([1, 0])), (apart, np.array([2]))], pad)
    lengths = packed.lengths.tolist()
    assert lengths[:4] == [5, 4, 3, 3]
    assert lengths[4 + packed.padding : 6 + packed.padding] == [1, 2]
    assert len(lengths) == 6 + 2 * packed.padding


def test_what_was_encoded_before_is_not_encoded_again(encoded, tmp_path):
    tokenizer = Letters()
    relabelled = Examples(["x", "y", "z"], EXAMPLES.texts, EXAMPLES.pairs, None)
    again = encode(relabelled, tokenizer, 8, tmp_path)
    assert tokenizer.calls == 0
    assert_same_arrays(again, encoded)
    assert (again.ids, again.labels) == (["x", "y", "z"], None)


def assert_same_arrays(one: Encoded, other: Encoded) -> None:
    for name in ("token_ids", "token_type_ids", "offsets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype, name
    assert one.truncated == other.truncated


@pytest.mark.usefixtures("encoded")
@pytest.mark.parametrize(
    ("texts", "pairs", "max_length", "fingerprint"),
    [
        (["one", "three", "y"], EXAMPLES.pairs, 8, "letters"),
        (["onet", "three", "x"], ["wo", "four", "yz"], 8, "letters"),
        (["on", "ethree", "x"], EXAMPLES.pairs, 8, "letters"),
        (EXAMPLES.texts, None, 8, "letters"),
        (EXAMPLES.texts, EXAMPLES.pairs, 7, "letters"),
        (EXAMPLES.texts, EXAMPLES.pairs, 8, "other"),
    ],
)
def test_anything_that_changes_the_tokens_is_encoded_anew(tmp_path, texts, pairs, max_length, fingerprint):
    tokenizer = Letters(fingerprint)
    encode(Examples(EXAMPLES.ids, texts, pairs, None), tokenizer, max_length, tmp_path)
    assert tokenizer.calls == 1


@given(position=st.integers(0, 10**6), change=st.integers(1, 255))
def test_a_flipped_byte_of_the_cache_changes_nothing(tmp_path_factory, position, change):
    directory = tmp_path_factory.mktemp("cache")
    whole = encode(EXAMPLES, Letters(), 8, directory)
    (file,) = directory.iterdir()
    content = bytearray(file.read_bytes())
    content[position % len(content)] ^= change
    file.write_bytes(content)
    assert_same_arrays(encode(EXAMPLES, Letters(), 8, directory), whole)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_cache_file_is_made_anew(encoded, tmp_path, kept):
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    tokenizer = Letters()
    assert_same_arrays(encode(EXAMPLES, tokenizer, 8, tmp_path), encoded)
    assert tokenizer.calls == 1
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_is_no_error(encoded, tmp_path):
    (tmp_path / "file").write_text("in the way")
    tokenizer = Letters()
    assert_same_arrays(encode(EXAMPLES, tokenizer, 8, tmp_path / "file" / "cache"), encoded)
    assert tokenizer.calls == 1


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no")

    monkeypatch.setattr("minbert.data.encoded.os.replace", refuse)
    encode(EXAMPLES, Letters(), 8, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MINBERT_CACHE", str(tmp_path / "here"))
    encode(EXAMPLES, Letters(), 8)
    assert len(list((tmp_path / "here").glob("*.safetensors"))) == 1
