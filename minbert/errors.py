"""Bad input to commands, files, `fit` and `load`: commands print it as a single line and exit with code 2.

Functions of tensors raise ValueError and TypeError, as torch's do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches


class UserError(Exception):
    """Bad input. The message says what is wrong, where, what was expected and what to do, in one line."""


def require(ok: bool, option: str, expected: str, got: object) -> None:
    """Refuse the value of an option unless it is ok.

    Raises:
        UserError: it is not.
    """
    if not ok:
        raise UserError(f"{dashed(option)} must be {expected}, got {got}")


def require_known(what: str, name: str, known: Collection[str]) -> None:
    """Refuse a name that is none of the known ones; `what` is the start of the line, such as "unknown task".

    Raises:
        UserError: it is not.
    """
    if name not in known:
        raise UserError(f"{what} {name!r}{did_you_mean(name, list(known))}; known: {', '.join(known)}")


def dashed(option: str) -> str:
    """An option as the command line has it."""
    return f"--{option.replace('_', '-')}"


def one_line(text: str) -> str:
    """The text with every character that is not printable as its escape: a name cannot break a line or colour it."""
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none, in at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name nearest to `word`, or `""` when none is near."""
    nearest = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
