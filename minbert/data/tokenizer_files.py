"""The files beside a BERT vocabulary: the tokenizer's class, its options and the tokens added to it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from minbert.errors import UserError
from minbert.files.json_yaml import VOCABULARY_LIMIT, read_json, read_text, short
from minbert.files.schema_checks import checked

# Tokenizers of transformers that are BERT's WordPiece, or, if generic, leave everything to tokenizer.json.
CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
# Options that only some versions of transformers follow, with the value that has no effect.
UNSUPPORTED = {"do_basic_tokenize": True, "never_split": None, "auto_map": None, "extra_special_tokens": None}


@dataclass(frozen=True)
class Token:
    """A token added to a vocabulary, in the form of transformers."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    single_word: bool = False
    special: bool = False


def read_config(directory: Path) -> dict[str, Any]:
    """The options of tokenizer_config.json and, below it, special_tokens_map.json; missing files are empty.

    Raises:
        UserError: a damaged file, another class of tokenizer than BERT's, or an unsupported option.
    """
    config = _object(directory / "special_tokens_map.json") | _object(directory / "tokenizer_config.json")
    where = directory / "tokenizer_config.json"
    own_class = config.get("tokenizer_class")
    kind = own_class if own_class is not None else _object(directory / "config.json").get("tokenizer_class")
    known = (*CLASSES, *(f"{name}Fast" for name in CLASSES), *GENERIC)
    if kind is not None and kind not in known:
        file = where if own_class is not None else directory / "config.json"
        raise UserError(f"{file}: tokenizer_class {short(kind)} is not BERT's WordPiece; minbert reads {CLASSES[0]}")
    for name, harmless in UNSUPPORTED.items():
        value = config.get(name, harmless)
        if value != harmless and value not in ([], {}):
            raise UserError(f"{where}: minbert does not have {name} {short(value)}; give a tokenizer without it")
    for name, token in SPECIAL.items():
        value = config.get(f"{name}_token", token)
        if value is not None and _token(value, f"{where}: {name}_token").content != token:
            raise UserError(f"{where}: {name}_token must be {token}, as in BERT, got {short(value)}")
    return config


def add_tokens(backend: Tokenizer, directory: Path, config: Mapping[str, Any]) -> None:
    """Add the tokens of added_tokens.json, `added_tokens_decoder` and `additional_special_tokens`, with their ids.

    Raises:
        UserError: a damaged file, or an id that the token cannot have.
    """
    where = directory / "tokenizer_config.json"
    by_id: dict[int, Token] = {}
    decoder = checked(config.get("added_tokens_decoder") or {}, dict[str, Token], f"{where}: added_tokens_decoder")
    for number, token in decoder.items():
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            raise UserError(f"{where}: added_tokens_decoder: expected ids as keys, got {short(number)}")
        by_id[int(number)] = token
    if not decoder:
        added = directory / "added_tokens.json"
        for name, number in checked(_object(added), dict[str, int], str(added)).items():
            by_id[number] = Token(name)
    specials = config.get("additional_special_tokens") or []
    for token in checked(specials, list[str | Token], f"{where}: additional_special_tokens"):
        name = token if isinstance(token, str) else token.content
        if name not in {each.content for each in by_id.values()}:
            _add(backend, [Token(name, normalized=False, special=True)])
    by_id = {number: by_id[number] for number in sorted(by_id)}
    _add(backend, list(by_id.values()))
    for number, token in by_id.items():
        found = backend.token_to_id(token.content)
        if found != number:
            raise UserError(
                f"{directory}: the added token {short(token.content)} has id {number} there, but would be {found};"
                " give a tokenizer whose added tokens follow its vocabulary without a gap"
            )


def _add(backend: Tokenizer, tokens: Sequence[Token]) -> None:
    for token in tokens:
        if not token.content:
            raise UserError("an added token is empty; give a tokenizer without it")
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "normalized", "single_word", "special")}
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([AddedToken(token.content, **flags)])


def read_vocab(path: Path) -> dict[str, int]:
    """The ids of a file with one token a line; a token's id is its line's number, from 0."""
    text = read_text(path, VOCABULARY_LIMIT, "expected UTF-8 text with one token a line")
    return {line.rstrip("\n"): i for i, line in enumerate(io.StringIO(text, newline=None))}


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _token(value: Any, where: str) -> Token:
    if isinstance(value, dict):
        value = {name: each for name, each in value.items() if name != "__type"}
    token = checked(value, str | Token, where)
    return Token(token) if isinstance(token, str) else token
