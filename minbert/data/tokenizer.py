"""BERT's WordPiece tokenizer, over the `tokenizers` library (Devlin et al. 2019; Wu et al. 2016)."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer

from minbert.data.tokenizer_files import add_tokens, read_config, read_vocab
from minbert.errors import UserError, one_line
from minbert.files.atomic import write_text
from minbert.files.hub import TOKENIZER, checkpoint_directory
from minbert.files.json_yaml import VOCABULARY_LIMIT, is_unicode, read_text, short

REQUIRED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SPECIAL = (*REQUIRED, "[MASK]")
CHUNK = 8192  # texts encoded by the library at once: each takes some kilobytes until it is read
SHORTEST = 4  # tokens of a pair in which one is not special
SMALLEST_VOCABULARY = 100
LARGEST_ALPHABET = 1000  # characters of a learned vocabulary
LARGEST_VOCABULARY = 2**24

VOCABULARIES = ("tokenizer.json", "vocab.txt")  # the first one present is read
# From transformers' names to BertNormalizer's
NORMALIZER_OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


class Tokenizer:
    """Text to token ids: `[CLS] text [SEP]`, or `[CLS] text [SEP] pair [SEP]`.

    Attributes:
        vocab_size: one more than the largest token id.
        pad_id, unk_id, cls_id, sep_id: ids of the special tokens.
        fingerprint: sha256 of everything that determines a token id, in hexadecimal.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        model_max_length: int = 512,
        directory: Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap a `tokenizers` tokenizer and replace its truncation, padding and template.

        Args:
            directory, config: of the files and options that add tokens to the vocabulary.

        Raises:
            UserError: it is not a BERT tokenizer, or lacks a special token.
        """
        vocab = backend.get_vocab(with_added_tokens=True)
        model, normalizer = type(backend.model).__name__, type(backend.normalizer).__name__
        if (model, normalizer) != ("WordPiece", "BertNormalizer"):
            raise UserError(
                f"expected a BERT tokenizer (WordPiece with BertNormalizer), got {model} with {normalizer};"
                " use a BERT checkpoint"
            )
        if missing := [token for token in REQUIRED if token not in vocab]:
            raise UserError(f"the vocabulary lacks {', '.join(missing)}; BERT needs {', '.join(REQUIRED)}")
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([token for token in SPECIAL if token in vocab])
        if directory is not None:
            add_tokens(backend, directory, config or {})
            vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            raise UserError(f"the largest token id is {self.vocab_size - 1}; expected less than {LARGEST_VOCABULARY}")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (vocab[token] for token in REQUIRED)
        backend.post_processor = TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[("[CLS]", self.cls_id), ("[SEP]", self.sep_id)],
        )
        self._backend = backend
        self._model_max_length = model_max_length
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path) -> Tokenizer:
        """Read tokenizer.json, or else vocab.txt, with the options of tokenizer_config.json.

        Args:
            path_or_name: a directory, or a model's name on the Hugging Face hub.

        Raises:
            UserError: nothing there, a damaged file, or a tokenizer that is not BERT's.
        """
        directory = checkpoint_directory(path_or_name, TOKENIZER)
        config = read_config(directory)
        source = next((path for name in VOCABULARIES if (path := directory / name).is_file()), None)
        if source is None:
            raise UserError(f"{directory} holds neither {' nor '.join(VOCABULARIES)}; give a BERT checkpoint")
        backend = _read_backend(source) if source.suffix == ".json" else _backend(read_vocab(source))
        length = config.get("model_max_length")
        try:
            return cls(_with_options(backend, config), length if isinstance(length, int) else 512, directory, config)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a lower-casing WordPiece vocabulary; the same texts give the same vocabulary in every process.

        Args:
            texts: of at least one word; read once, one by one.
            vocab_size: maximum number of tokens, 100 or more. Up to half of them are single characters, the commonest
                ones; a word with another character becomes [UNK].

        Raises:
            UserError: no word in `texts`, or `vocab_size` below 100.
        """
        backend = _backend({token: i for i, token in enumerate(SPECIAL)})
        counts = _count_words(backend, texts)
        if not counts:
            raise UserError("no word to learn a vocabulary from: every text is empty; give texts")
        if vocab_size < SMALLEST_VOCABULARY:
            raise UserError(f"vocab_size must be at least {SMALLEST_VOCABULARY}, got {vocab_size}; ask for more tokens")
        alphabet = _commonest_characters(counts, min(LARGEST_ALPHABET, vocab_size // 4))
        learned = [word for word in sorted(counts) if alphabet.issuperset(word)]
        # The library numbers the characters inside words in the order of a randomly seeded hash map, and breaks ties
        # between merges by these numbers. As special tokens they have a fixed order.
        inside = sorted({f"##{character}" for word in learned for character in word[1:]})
        trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*SPECIAL, *inside], show_progress=False)
        backend.train_from_iterator((" ".join([word] * counts[word]) for word in learned), trainer)
        return cls(_backend(backend.get_vocab(with_added_tokens=False)))

    def encode(self, text: str, pair: str | None = None, max_length: int | None = None) -> list[int]:
        """The token ids of one text or pair, cut to `max_length` tokens if that is given."""
        ids, *_ = self.encode_batch([text], None if pair is None else [pair], max_length)
        return ids.tolist()

    def encode_batch(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int | None = 512
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Token ids of many texts or pairs, end to end, ready for `minbert.data.packing.pack_flat`.

        Args:
            texts: S texts.
            pairs: their S second sentences, if they have any.
            max_length: of an example in tokens, with special tokens; the end of the longer text of a pair is cut, or
                of both once they are even. None keeps everything.

        Returns:
            ids, int32 [N]; token types, uint8 [N]; lengths, int64 [S]; the number of truncated examples.

        Raises:
            ValueError: `pairs` of another length than `texts`, or `max_length` below 4.
            UserError: a text that is no string, or that is not valid Unicode.
        """
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"pairs must be as many as texts: got {len(pairs)} for {len(texts)}")
        if max_length is not None and max_length < SHORTEST:
            raise ValueError(f"max_length must be at least {SHORTEST}, got {max_length}")
        ids = array("i")
        segments = np.zeros((len(texts), 2), np.int64)  # tokens of type 0 and of type 1
        truncated = 0
        second = self._token_ids(pairs) if pairs is not None else (None for _ in texts)
        for example, (first_ids, second_ids) in enumerate(zip(self._token_ids(texts), second, strict=True)):
            first, last = len(first_ids), len(second_ids or ())
            if max_length is not None:
                first, last = _longest_first(first, last, max_length - (2 if second_ids is None else 3))
                truncated += first < len(first_ids) or last < len(second_ids or ())
            ids.extend((self.cls_id, *first_ids[:first], self.sep_id))
            segments[example] = first + 2, 0
            if second_ids is not None:
                ids.extend((*second_ids[:last], self.sep_id))
                segments[example, 1] = last + 1
        types = np.repeat(np.tile(np.array([0, 1], np.uint8), len(texts)), segments.ravel())
        return np.array(ids, np.int32), types, segments.sum(1), truncated

    def decode(self, ids: Sequence[int]) -> str:
        """The tokens with these ids as a text, special tokens among them; the pieces of a word are joined."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def token_type_ids(self, ids: Sequence[int]) -> list[int]:
        """Token types of an encoded text or pair: 0 up to the first [SEP], 1 after it."""
        boundary = ids.index(self.sep_id) + 1 if self.sep_id in ids else len(ids)
        return [0] * boundary + [1] * (len(ids) - boundary)

    def save(self, directory: str | Path) -> None:
        """Write vocab.txt, tokenizer.json and tokenizer_config.json, as transformers reads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        vocab = self._backend.get_vocab(with_added_tokens=True)
        token_of = {i: token for token, i in vocab.items()}
        lines = [token_of.get(i, f"[unused line {i + 1}]") for i in range(self.vocab_size)]
        write_text(directory / "vocab.txt", "\n".join(lines) + "\n")
        write_text(directory / "tokenizer.json", self._backend.to_str(pretty=True))
        normalizer: Any = self._backend.normalizer
        config = {
            "tokenizer_class": "BertTokenizer",
            **{theirs: getattr(normalizer, ours) for theirs, ours in NORMALIZER_OPTIONS.items()},
            **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL if token in vocab},
            "model_max_length": self._model_max_length,
        }
        write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def _token_ids(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Each text's token ids without [CLS] and [SEP], encoded in parallel chunk by chunk."""
        for start in range(0, len(texts), CHUNK):
            chunk = list(texts[start : start + CHUNK])
            try:
                encodings = self._backend.encode_batch_fast(chunk, add_special_tokens=False)
            except TypeError:
                number = next(i for i, text in enumerate(chunk) if not (isinstance(text, str) and is_unicode(text)))
                raise UserError(
                    f"text {start + number + 1} of {len(texts)} is not valid Unicode text: {chunk[number]!r:.80};"
                    " give UTF-8 text"
                ) from None
            yield from (encoding.ids for encoding in encodings)


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """The lengths of a pair truncated to `room` tokens: the shorter keeps up to half, the longer the rest."""
    if first + second <= room:
        return first, second
    if first > second:
        return _longest_first(second, first, room)[::-1]
    kept = min(first, room // 2)
    return kept, room - kept


def _count_words(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often the texts have each word, as the tokenizer splits them.

    It splits at spaces whatever is beside them, so it is asked about each different piece between spaces once.
    """
    pieces: Counter[str] = Counter()
    for text in texts:
        pieces.update(text.split(" "))
    counts: Counter[str] = Counter()
    for piece, count in pieces.items():
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(piece)):
            counts[word] += count
    return counts


def _commonest_characters(counts: Mapping[str, int], limit: int) -> set[str]:
    """The `limit` commonest characters of words with these counts; of equally common ones, the lower code point."""
    characters: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
    return set(sorted(characters, key=lambda character: (-characters[character], character))[:limit])


def _backend(vocab: dict[str, int]) -> tokenizers.Tokenizer:
    """BERT's tokenizer with this vocabulary."""
    backend = tokenizers.Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = BertNormalizer()
    backend.pre_tokenizer = BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    return backend


def _with_options(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer with tokenizer_config.json's options, which override its own file's, as in transformers."""
    if isinstance(backend.normalizer, BertNormalizer):
        for name in NORMALIZER_OPTIONS.keys() & config.keys():
            try:
                setattr(backend.normalizer, NORMALIZER_OPTIONS[name], config[name])
            except TypeError:
                raise UserError(
                    f"tokenizer_config.json: {name} must be true or false, got {short(config[name])}"
                ) from None
    return backend


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(read_text(path, VOCABULARY_LIMIT))
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:  # the library raises nothing narrower, and its panics are no Exception
        raise UserError(f"cannot read {path} ({one_line(str(error))[:200]}); copy or download it again") from None
