"""Change one file of a run or a model at a time, and let every command read it: it succeeds or says one line.

`python tests/mutate_files.py --count 2000 --seed 0` prints each change that did neither; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from minbert import evaluate, predict, train
from minbert.errors import UserError, one_line
from minbert.files.atomic import MANIFEST, sha256
from minbert.report import __main__ as report

FIXTURE = Path(__file__).parent / "fixtures" / "run-0.1.0"
OPTIONS = ["--data=data", "--tasks=sst,sts", "--batch-size=4", "--epochs=2", "--precision=fp32", "--log-steps=1"]
OPTIONS += ["--checkpoint-steps=1", "--threads=1", "--lr=0.01"]
VALUES = [None, True, False, 0, -1, 0.5, 1e308, float("nan"), float("inf"), "x", "", [], {}, 2**63, 2**70, -(2**70)]
VALUES += [[[[[]]]], {"x": None}, "../x", "/etc/passwd", "\0", "\u2028", "[/b]", "x" * 5000, 10**30, "a:b"]
BYTES = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"[" * 200_000,
    b'{"a":' * 50_000,
    b"1e999",
    b"\xef\xbb\xbf",
    b'"\\ud800"',
    b"- &a [*a]",
]


def prepare(directory: Path) -> None:
    """A finished run in today's format, the data and the model that it was trained on."""
    shutil.copytree(FIXTURE / "data", directory / "data")
    shutil.copytree(FIXTURE / "run" / "best", directory / "model")
    shutil.copytree(FIXTURE / "run", directory / "run")
    run_quietly(train.main, [*OPTIONS, "--model=model", "--out=run", "--resume"])


def commands(rng: random.Random) -> list[tuple[Callable[[list[str]], int], list[str]]]:
    """The commands that read a run, one of which trains too, in a random order."""
    found: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (report.main, ["run"]),
        (evaluate.main, ["run", rng.choice(["--checkpoint=best", "--checkpoint=last"])]),
        (predict.main, ["run", "--task=sts", "--input=data/sts-dev.csv"]),
        (train.main, [*OPTIONS, "--model=model", "--out=run", "--resume"]),
    ]
    rng.shuffle(found)
    return found


def run_quietly(command: Callable[[list[str]], int], words: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        command(words)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value."""
    yield path
    for name, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(each, (*path, name))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], change)
    return copy


def mutate(file: Path, rng: random.Random) -> str:
    """Change the file in a random way; what was done, in words."""
    content = file.read_bytes()
    kind = rng.choice(["value"] * 6 + ["key", "flip", "cut", "bytes", "insert"])
    if kind in ("value", "key") and file.suffix in (".json", ".jsonl", ".yaml"):
        lines = content.decode().splitlines() if file.suffix == ".jsonl" else [content.decode()]
        number = rng.randrange(len(lines))
        parsed = yaml.safe_load(lines[number]) if file.suffix == ".yaml" else json.loads(lines[number])
        path = rng.choice(list(places(parsed)))
        new = rng.choice(VALUES)
        if kind == "value":
            parsed, done = changed(parsed, path, lambda old: new), f"{path} = {new!r:.40}"
        else:
            name = str(rng.choice(VALUES[9:]))[:50]

            def change(old: Any) -> Any:
                if not isinstance(old, dict):
                    return new
                kept = {key: each for key, each in old.items() if key != rng.choice(list(old))}
                return {**kept, name: new}

            parsed, done = changed(parsed, path, change), f"{path}: a key away, {name!r} = {new!r:.40}"
        lines[number] = yaml.safe_dump(parsed, sort_keys=False) if file.suffix == ".yaml" else json.dumps(parsed)
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    else:
        place, done = rng.randrange(len(content) + 1), kind
        if kind == "cut":
            content = content[:place]
        elif kind == "bytes":
            content = rng.choice(BYTES)
        elif kind == "insert":
            content = content[:place] + rng.choice(BYTES) + content[place:]
        elif content:
            place %= len(content)
            content = content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
        done = f"{done} at {place}"
    file.write_bytes(content)
    manifest = file.with_name(MANIFEST)
    if manifest.exists() and file.name != MANIFEST and rng.random() < 0.9:  # past the checksums
        sums = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**sums, file.name: sha256(file)}))
    return done


def campaign(directory: Path, count: int, seed: int) -> list[str]:
    """Mutate `count` files in copies below `directory`, which is the working directory meanwhile; every failure."""
    rng = random.Random(seed)
    original, sandbox, home = directory / "original", directory / "sandbox", Path.cwd()
    original.mkdir(parents=True)
    failures = []
    try:
        os.chdir(original)
        prepare(Path("."))
        skipped = (".png", ".html", ".csv", ".lock")
        files = [path for part in ("run", "model") for path in sorted(Path(part).rglob("*")) if path.is_file()]
        files = [
            path for path in files if path.suffix not in skipped and path.name != ".lock" and path.parts[1] != "plots"
        ]
        for number in range(count):
            os.chdir(directory)
            shutil.rmtree(sandbox, ignore_errors=True)
            shutil.copytree(original, sandbox)
            os.chdir(sandbox)
            file = rng.choice(files)
            done = mutate(file, rng)
            for command, words in commands(rng):
                name = command.__module__.removesuffix(".__main__")
                if file.parts[0] == "model" and command is not train.main:
                    continue
                if file.parts[0] == "model":
                    words = [
                        *(word for word in words if word not in ("--resume", "--out=run")),
                        "--out=new",
                        "--steps=1",
                    ]
                try:
                    run_quietly(command, words)
                except UserError as error:
                    if len(str(error)) > 1500 or "Traceback" in str(error) or one_line(str(error)) != str(error):
                        failures.append(f"{number}: {file}, {done}, {name}: {str(error)!r:.300}")
                except (Exception, SystemExit):
                    last = traceback.format_exc().strip().splitlines()
                    failures.append(f"{number}: {file}, {done}, {name}: {' | '.join(last[-6:])}")
            if strays := {path.name for path in directory.iterdir()} - {"original", "sandbox"}:
                failures.append(f"{number}: {file}, {done}: wrote {strays}")
    finally:
        os.chdir(home)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description="Change files of a run, one at a time, and let every command read it.")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        failures = campaign(Path(directory) / "campaign", options.count, options.seed)
    for failure in failures:
        print(failure)
    print(f"{options.count} changed files, {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
