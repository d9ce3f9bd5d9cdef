"""Tokenized examples as flat arrays, kept on disk between runs and packed into batches without padding."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minbert.data.examples import Examples
from minbert.data.lines import short
from minbert.data.packing import Packed, dummies, length_bucket, pack_flat
from minbert.data.skipped import SHOWN
from minbert.files.cache import cache_directory
from minbert.tasks import PAIR_ENCODINGS

FORMAT = "minbert-encoded-1"  # part of every cache file's name: a new layout leaves old files alone


class BatchTokenizer(Protocol):
    """What `encode` needs of a tokenizer."""

    @property
    def fingerprint(self) -> str:
        """Different for tokenizers that may encode some text differently."""

    def encode_batch(
        self, texts: list[str], pairs: list[str] | None, max_length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Token ids int32 and token types uint8, end to end; lengths int64 [n]; and how many texts were cut."""


@dataclass(frozen=True)
class Encoded:
    """n examples of `width` sequences each, N tokens in all; sequence s is `token_ids[offsets[s]:offsets[s + 1]]`."""

    token_ids: np.ndarray  # int32 [N]
    token_type_ids: np.ndarray  # uint8 [N]
    offsets: np.ndarray  # int64 [n * width + 1]
    labels: np.ndarray | None  # float32 [n]
    ids: list[str]
    truncated: int  # sequences that were cut to the longest length allowed
    width: int = 1

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [n]."""
        return np.diff(self.offsets[:: self.width])

    @property
    def without_tokens(self) -> np.ndarray:
        """Indices of the examples with a text that has no token of its own, such as one of control characters alone.

        The model reads nothing but [CLS] and [SEP] of it.
        """
        second = np.add.reduceat(self.token_type_ids, self.offsets[:-1], dtype=np.int64)  # of a pair, with its [SEP]
        empty = (np.diff(self.offsets) - second <= 2) | (second == 1)
        return np.flatnonzero(empty.reshape(-1, self.width).any(1))

    def notes(self, max_length: int | None = None) -> list[str]:
        """What to say of texts that the model reads nothing of; or, by the most tokens it takes, in part."""
        notes = []
        if self.truncated and max_length is not None:
            what = "example" if self.width == 1 else "sequence"
            notes.append(f"{_counted(self.truncated, what)} cut to {max_length} tokens")
        empty = self.without_tokens
        if len(empty):
            ids = ", ".join(short(self.ids[index]) for index in empty[:SHOWN])
            more = f" and {len(empty) - SHOWN} more" if len(empty) > SHOWN else ""
            notes.append(
                f"{_counted(len(empty), 'example')} with a text of which the tokenizer leaves nothing, such as one of"
                f" control characters alone: id {ids}{more}"
            )
        return notes

    @property
    def checksum(self) -> str:
        """The same for examples that train alike: of the same tokens, labels and ids in the same order."""
        arrays = {"token_ids": self.token_ids, "token_type_ids": self.token_type_ids, "offsets": self.offsets}
        arrays["ids"] = np.frombuffer(json.dumps(self.ids).encode(), np.uint8)
        if self.labels is not None:
            arrays["labels"] = self.labels
        return f"{self.width} {_checksum(arrays)}"

    def is_recorded_as(self, checksum: object) -> bool:
        """Whether a checkpoint recorded these examples: by their checksum, or, up to 0.1.0, by the tokens' crc32."""
        return checksum in (self.checksum, zlib.crc32(self.token_ids.tobytes()))

    def pack(self, indices: np.ndarray) -> Packed:
        """The examples at `indices` (int64, at least one), in that order, as one packed stream."""
        return pack_batches([(self, indices)])


def pack_batches(parts: Sequence[tuple[Encoded, np.ndarray]], bucket_to: int | None = None) -> Packed:
    """Pack a batch of each of several tasks into one stream: task after task, each a contiguous segment.

    Args:
        bucket_to: give streams few different shapes: round the longest length up, to this at most, and each task's
            tokens with sequences of padding after its own.
    """
    gathered = [_gather(encoded, indices) for encoded, indices in parts]
    longest = max(int(lengths.max()) for _, _, lengths in gathered)
    padding = 0
    if bucket_to is not None:
        longest = length_bucket(longest, bucket_to)
        added = [dummies(int(lengths.sum()), longest) for _, _, lengths in gathered]
        padding = len(added[0])
        gathered = [_padded(*arrays, extra) for arrays, extra in zip(gathered, added, strict=True)]
    token_ids, token_type_ids, lengths = (np.concatenate(arrays) for arrays in zip(*gathered, strict=True))
    return pack_flat(token_ids, token_type_ids, lengths, longest, padding)


def _gather(encoded: Encoded, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids and token types of the examples at `indices`, and lengths of their sequences, end to end."""
    sequences = (indices[:, None] * encoded.width + np.arange(encoded.width)).ravel()
    lengths = np.diff(encoded.offsets)[sequences]
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1]) + np.repeat(encoded.offsets[sequences] - (ends - lengths), lengths)
    return encoded.token_ids[tokens], encoded.token_type_ids[tokens], lengths


def _padded(
    ids: np.ndarray, types: np.ndarray, lengths: np.ndarray, extra: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same with further sequences of these lengths, all of them token 0."""
    zeros = np.zeros(extra.sum(), ids.dtype)
    return np.append(ids, zeros), np.append(types, zeros.astype(types.dtype)), np.append(lengths, extra)


def encode(
    examples: Examples,
    tokenizer: BatchTokenizer,
    max_length: int,
    cache_dir: str | Path | None = None,
    *,
    pair_encoding: str = "cross-encoder",
) -> Encoded:
    """Tokenize examples, or take the tokens from the cache if the same texts were encoded alike before.

    Args:
        examples: texts, or pairs of texts.
        tokenizer: what encodes them.
        max_length: the most tokens a sequence may have; longer ones are cut.
        cache_dir: where the tokens are kept; `$MINBERT_CACHE` or else `~/.cache/minbert` when left out. A directory
            that cannot be written means no cache, and a damaged file in it is made anew.
        pair_encoding: of pairs, a key of `PAIR_ENCODINGS`; single texts are `cross-encoder`.
    """
    if pair_encoding == "both":
        joint, apart = (
            encode(examples, tokenizer, max_length, cache_dir, pair_encoding=how)
            for how in ("cross-encoder", "bi-encoder")
        )
        return _side_by_side(joint, apart)
    if pair_encoding == "bi-encoder":
        sentences = [sentence for pair in zip(examples.texts, examples.pairs or (), strict=True) for sentence in pair]
        singly = encode(Examples([""] * len(sentences), sentences, None, None), tokenizer, max_length, cache_dir)
        return replace(singly, labels=examples.labels, ids=examples.ids, width=PAIR_ENCODINGS[pair_encoding])
    path = _cache_file(examples, tokenizer, max_length, cache_dir)
    arrays = _load(path)
    if arrays is None:
        ids, types, lengths, truncated = tokenizer.encode_batch(examples.texts, examples.pairs, max_length)
        arrays = {
            "token_ids": ids.astype(np.int32, copy=False),
            "token_type_ids": types.astype(np.uint8, copy=False),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64, copy=False),
            "truncated": np.array([truncated], np.int64),
        }
        _store(path, arrays)
    return Encoded(
        arrays["token_ids"],
        arrays["token_type_ids"],
        arrays["offsets"],
        examples.labels,
        examples.ids,
        int(arrays["truncated"][0]),
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _side_by_side(*parts: Encoded) -> Encoded:
    """The same examples encoded in several ways, as one: an example's sequences are those it has in each."""
    ends = np.cumsum([0, *(len(part.offsets) - 1 for part in parts)])
    sequences = [
        np.arange(start, end).reshape(-1, part.width) for part, start, end in zip(parts, ends, ends[1:], strict=False)
    ]
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    pool = replace(
        parts[0],
        token_ids=np.concatenate([part.token_ids for part in parts]),
        token_type_ids=np.concatenate([part.token_type_ids for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        width=1,
    )
    ids, types, lengths = _gather(pool, np.concatenate(sequences, 1).ravel())
    return replace(
        parts[0],
        token_ids=ids,
        token_type_ids=types,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        truncated=sum(part.truncated for part in parts),
        width=sum(part.width for part in parts),
    )


def _cache_file(examples: Examples, tokenizer: BatchTokenizer, max_length: int, cache_dir: str | Path | None) -> Path:
    """The cache file, named after everything its content follows from."""
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint} {max_length} {len(examples)}".encode())
    for texts in (examples.texts, examples.pairs or ()):
        digest.update(b"%d;" % len(texts))
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(content))
            digest.update(content)
    return Path(cache_dir or cache_directory()) / f"{digest.hexdigest()}.safetensors"


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _load(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file, or None when it is not there or not as it was written."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            intact = (file.metadata() or {}).get("checksum") == _checksum(arrays)
    except (OSError, SafetensorError, TypeError, ValueError):
        return None
    return arrays if intact else None


def _store(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a cache file that is there whole or not at all; a disk that refuses it is no error."""
    content = save(arrays, {"checksum": _checksum(arrays)})
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = file.name
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
