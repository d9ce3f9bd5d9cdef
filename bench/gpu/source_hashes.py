"""Hashes of what a kernel is compiled from: equal as long as nothing but comments, docstrings and layout change."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from configurations import Compilation

_PLAIN = (bool, int, float, str, tuple)
_COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_INCLUDES = re.compile(r'#include "([^"]+)"')


def of_triton(compilation: Compilation, architecture: int) -> str:
    """Of a configuration: its kernel, what of the package that names, and all that it is compiled with."""
    given = [compilation.signature, compilation.constants, compilation.options]
    parts = [*(sorted(each.items()) for each in given), sorted(compilation.divisible)]
    code = _code(compilation.kernel, frozenset(map(type, compilation.constants.values())))
    return _hash(repr((code, parts, compilation.num_warps, compilation.num_stages, architecture)))


def of_cuda(path: Path, folder: Path, options: object) -> str:
    """Of a file of CUDA kernels: with the headers that it includes from `folder`, and nvcc's options."""
    texts: dict[str, str] = {}
    pending = [path.relative_to(folder).as_posix()]
    while pending:
        name = pending.pop()
        if name not in texts:
            texts[name] = _COMMENTS.sub("", (folder / name).read_text(encoding="utf-8"))
            pending += _INCLUDES.findall(texts[name])
    return _hash(repr((options, [(name, text.split()) for name, text in sorted(texts.items())])))


@functools.cache
def _code(kernel: Any, types: frozenset[type]) -> str:
    """The code of a kernel, of the types of its constants, and of what of its package they name."""
    found: dict[str, str] = {}
    for each in (kernel, *types):
        _collect(each, found, _module(kernel).partition(".")[0])
    return _hash(repr((_name(kernel), sorted(found.items()))))


def _collect(value: Any, found: dict[str, str], package: str) -> None:
    """Add the code of a function or class of the package, and of all that it names."""
    module, name = _module(value), _name(value)
    if module.partition(".")[0] != package or name in found:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(_function(value))))
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            node.value.value = ""
    found[name] = ast.unparse(tree)
    scope = vars(sys.modules[module])
    for node in ast.walk(tree):
        named = _named(node, scope)
        if isinstance(named, _PLAIN) or type(named).__name__ == "constexpr":
            found[f"{module}.{ast.unparse(node)}"] = repr(named)
        elif callable(named):
            _collect(named, found, package)


def _named(node: ast.AST, scope: dict[str, Any]) -> Any:
    """The global that a name or dotted name of the code means, or None."""
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_named(node.value, scope), node.attr, None)
    return None


def _function(value: Any) -> Any:
    return getattr(value, "fn", value)  # of what `triton.jit` made


def _module(value: Any) -> str:
    return str(getattr(_function(value), "__module__", ""))


def _name(value: Any) -> str:
    return f"{_module(value)}.{getattr(_function(value), '__qualname__', '')}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]
