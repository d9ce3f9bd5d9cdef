"""Tokenized examples in flat arrays, cached on disk between runs, and their batches as packed streams."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minbert.data.examples import Examples
from minbert.data.line_reader import shorten
from minbert.data.packing import IdRanges, Packed, id_ranges, pack_flat
from minbert.data.skipped import SHOWN
from minbert.files.cache_directory import TEMPORARY, cache_directory, cache_limit, keep_within_limit, touch
from minbert.tasks import PAIR_ENCODINGS

CACHE_FORMAT = "minbert-encoded-1"  # part of a cache file's name: files of another layout are ignored


class BatchTokenizer(Protocol):
    """A tokenizer, as `encode` uses it."""

    @property
    def fingerprint(self) -> str:
        """Different for any two tokenizers that may encode a text differently."""

    def encode_batch(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Token ids int32 [N] and token types uint8 [N], end to end; lengths int64 [n]; number of truncated texts."""


@dataclass(frozen=True)
class Encoded:
    """n examples of `width` sequences each, N tokens in all; sequence s is `token_ids[offsets[s]:offsets[s + 1]]`."""

    token_ids: np.ndarray  # int32 [N]
    token_type_ids: np.ndarray  # uint8 [N]
    offsets: np.ndarray  # int64 [n * width + 1]
    labels: np.ndarray | None  # float32 [n], of a multi-label task [n, C]
    ids: list[str]
    truncated: int  # number of sequences cut to the maximum length
    width: int = 1  # sequences of an example

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [n]."""
        return np.diff(self.offsets[:: self.width])

    @property
    def id_ranges(self) -> IdRanges:
        """For `Encoder.check_ids`: batches of these examples are not checked again where they are on a GPU."""
        return id_ranges(self.token_ids, self.token_type_ids)

    @property
    def without_tokens(self) -> np.ndarray:
        """Indices of the examples with a text without tokens but [CLS] and [SEP], such as one of control characters."""
        second = np.add.reduceat(self.token_type_ids, self.offsets[:-1], dtype=np.int64)  # with its [SEP]
        empty = (np.diff(self.offsets) - second <= 2) | (second == 1)
        return np.flatnonzero(empty.reshape(-1, self.width).any(1))

    def warnings(self, max_length: int | None = None) -> list[str]:
        """Warnings about texts without tokens and, if `max_length` is given, about truncated ones."""
        warnings = TokenWarnings(max_length)
        warnings.add(self)
        return warnings.lines()

    @property
    def checksum(self) -> str:
        """Equal for examples with the same tokens, labels and ids in the same order."""
        arrays = {"token_ids": self.token_ids, "token_type_ids": self.token_type_ids, "offsets": self.offsets}
        arrays["ids"] = np.frombuffer(json.dumps(self.ids).encode(), np.uint8)
        if self.labels is not None:
            arrays["labels"] = self.labels
        return f"{self.width} {_checksum(arrays)}"

    def is_recorded_as(self, checksum: object) -> bool:
        """Whether a checkpoint's checksum is of these examples; up to 0.1.0 it was the tokens' crc32."""
        return checksum in (self.checksum, zlib.crc32(self.token_ids.tobytes()))

    def pack(self, indices: np.ndarray) -> Packed:
        """The examples at `indices` (int64, at least one), in that order, as one packed stream."""
        return pack_batches([(self, indices)])


class TokenWarnings:
    """Counts the examples of several `Encoded` of a task whose tokens are not those of the whole text.

    Args:
        max_length: of a sequence; None says nothing of truncated ones.
    """

    def __init__(self, max_length: int | None) -> None:
        self._max_length = max_length
        self._truncated = self._empty = 0
        self._unit = "example"
        self._ids: list[str] = []  # of the first examples with a text without tokens

    def add(self, encoded: Encoded) -> None:
        empty = encoded.without_tokens
        self._truncated += encoded.truncated
        self._unit = "example" if encoded.width == 1 else "sequence"
        self._empty += len(empty)
        self._ids += [shorten(encoded.ids[index]) for index in empty[: SHOWN - len(self._ids)]]

    def lines(self) -> list[str]:
        lines = []
        if self._truncated and self._max_length is not None:
            lines.append(f"{_counted(self._truncated, self._unit)} cut to {self._max_length} tokens")
        if self._empty:
            more = f" and {self._empty - SHOWN} more" if self._empty > SHOWN else ""
            lines.append(
                f"{_counted(self._empty, 'example')} with a text without tokens, such as one of control characters:"
                f" id {', '.join(self._ids)}{more}"
            )
        return lines


# From the lengths of each task's sequences to the length that stands for the longest, and the lengths of padding
# sequences after each task's own (`minbert.data.buckets.Buckets.pad`).
Padding = Callable[[Sequence[np.ndarray]], tuple[int, Sequence[np.ndarray]]]


def pack_batches(parts: Sequence[tuple[Encoded, np.ndarray]], pad: Padding | None = None) -> Packed:
    """Pack batches of several tasks into one stream, in which each task is a contiguous segment.

    Args:
        parts: of each task its examples, and the indices of those in its batch (int64, at least one).
        pad: gives the stream's shape, for CUDA graphs; without it nothing is padded.
    """
    batches = [_select(encoded, indices) for encoded, indices in parts]
    longest = padding = 0
    if pad is not None:
        longest, added = pad([lengths for _, _, lengths in batches])
        padding = len(added[0])
        batches = [_pad(*arrays, extra) for arrays, extra in zip(batches, added, strict=True)]
    token_ids, token_type_ids, lengths = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return pack_flat(token_ids, token_type_ids, lengths, longest, padding)


def _select(encoded: Encoded, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids [N], token types [N] and lengths [S] of the sequences of the examples at `indices`."""
    sequences = (indices[:, None] * encoded.width + np.arange(encoded.width)).ravel()
    lengths = np.diff(encoded.offsets)[sequences]
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1]) + np.repeat(encoded.offsets[sequences] - (ends - lengths), lengths)
    return encoded.token_ids[tokens], encoded.token_type_ids[tokens], lengths


def _pad(
    ids: np.ndarray, types: np.ndarray, lengths: np.ndarray, extra: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same arrays with further sequences of lengths `extra`, all of token 0."""
    zeros = np.zeros(extra.sum(), ids.dtype)
    return np.append(ids, zeros), np.append(types, zeros.astype(types.dtype)), np.append(lengths, extra)


def encode(
    examples: Examples,
    tokenizer: BatchTokenizer,
    max_length: int,
    cache_dir: str | Path | None = None,
    *,
    pair_encoding: str = "cross-encoder",
    cached: bool = True,
) -> Encoded:
    """Tokenize examples, or load their tokens from the cache.

    Args:
        examples: texts, or pairs of texts.
        max_length: of a sequence in tokens; longer ones are truncated.
        cache_dir: the cache; `minbert.files.cache_directory` gives the default and the limit. Without write permission
            nothing is cached, and a damaged file is replaced.
        pair_encoding: of pairs, a key of `PAIR_ENCODINGS`; `cross-encoder` for single texts.
        cached: whether to use the cache.
    """
    if pair_encoding == "both":
        encodings = ("cross-encoder", "bi-encoder")
        parts = [encode(examples, tokenizer, max_length, cache_dir, pair_encoding=e, cached=cached) for e in encodings]
        return _combine(*parts)
    if pair_encoding == "bi-encoder":
        sentences = Alternating(examples.texts, examples.pairs or ())
        singles = Examples([""] * len(sentences), sentences, None, None)
        encoded = encode(singles, tokenizer, max_length, cache_dir, cached=cached)
        return replace(encoded, labels=examples.labels, ids=examples.ids, width=PAIR_ENCODINGS[pair_encoding])
    limit = cache_limit() if cached else 0
    path = None if limit == 0 else _cache_file(examples, tokenizer, max_length, cache_dir)
    arrays = None if path is None else _load(path)
    if arrays is None:
        ids, types, lengths, truncated = tokenizer.encode_batch(examples.texts, examples.pairs, max_length)
        arrays = {
            "token_ids": ids.astype(np.int32, copy=False),
            "token_type_ids": types.astype(np.uint8, copy=False),
            "offsets": _offsets(lengths),
            "truncated": np.array([truncated], np.int64),
        }
        if path is not None:
            _store(path, arrays)
            if limit is not None:
                keep_within_limit(path, limit)
    return Encoded(
        arrays["token_ids"],
        arrays["token_type_ids"],
        arrays["offsets"],
        examples.labels,
        examples.ids,
        int(arrays["truncated"][0]),
    )


class Alternating(Sequence[str]):
    """The sentences of pairs, one after the other: 2n of n pairs."""

    def __init__(self, first: Sequence[str], second: Sequence[str]) -> None:
        self._both = (first, second)

    def __len__(self) -> int:
        return 2 * len(self._both[0])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self._both[number % 2][number // 2] for number in numbers]
        return self._both[numbers % 2][numbers // 2]

    def __iter__(self) -> Iterator[str]:
        return (sentence for pair in zip(*self._both, strict=True) for sentence in pair)


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _combine(*parts: Encoded) -> Encoded:
    """Several encodings of the same examples as one: an example's sequences are those of each encoding in turn."""
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    pool = replace(
        parts[0],
        token_ids=np.concatenate([part.token_ids for part in parts]),
        token_type_ids=np.concatenate([part.token_type_ids for part in parts]),
        offsets=_offsets(lengths),
        width=1,
    )
    numbers = np.split(np.arange(len(lengths)), np.cumsum([len(part.offsets) - 1 for part in parts])[:-1])
    order = [each.reshape(-1, part.width) for each, part in zip(numbers, parts, strict=True)]
    ids, types, lengths = _select(pool, np.concatenate(order, axis=1).ravel())
    return replace(
        pool,
        token_ids=ids,
        token_type_ids=types,
        offsets=_offsets(lengths),
        truncated=sum(part.truncated for part in parts),
        width=sum(part.width for part in parts),
    )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64, copy=False)


def _cache_file(examples: Examples, tokenizer: BatchTokenizer, max_length: int, cache_dir: str | Path | None) -> Path:
    """The cache file, named after everything that determines its content."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {tokenizer.fingerprint} {max_length} {len(examples)}".encode())
    for texts in (examples.texts, () if examples.pairs is None else examples.pairs):
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
    """The arrays of a cache file, or None if it is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            intact = (file.metadata() or {}).get("checksum") == _checksum(arrays)
    except (OSError, SafetensorError, TypeError, ValueError):
        return None
    if not intact:
        return None
    touch(path)
    return arrays


def _store(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a cache file atomically; a failure is ignored."""
    content = save(arrays, {"checksum": _checksum(arrays)})
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=TEMPORARY, delete=False) as file:
            temporary = file.name
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
