"""minbert's commands: `minbert COMMAND ...`, or `python -m minbert COMMAND ...`."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress

import minbert
from minbert.errors import did_you_mean, one_line

COMMANDS = {  # the module whose `main` a command is, imported when it runs (torch takes its time), and what it does
    "train": ("minbert.train", "fine-tune BERT on one task or several"),
    "evaluate": ("minbert.evaluate", "score a run on a split, and write its predictions"),
    "predict": ("minbert.predict", "predict a task for a file of texts, or for standard input"),
    "export": ("minbert.export.__main__", "write a run's model for ONNX, transformers or sentence-transformers"),
    "push": ("minbert.push", "upload a run's model to the Hugging Face hub, with a model card"),
    "report": ("minbert.report.__main__", "write a run's report again"),
    "reproduce": ("minbert.reproduce", "train the rows of a paper's tables"),
    "augment": ("minbert.augment", "back-translate the training sentences of a task"),
    "tasks": ("minbert.describe_tasks", "show what is understood of a tasks file and its data"),
    "doctor": ("minbert.doctor", "show what is on this machine, what runs each op, and what is wrong"),
    "replay": ("minbert.replay", "run recorded calls of ops again, and compare them with the reference"),
}


def overview() -> str:
    """The commands with a line each."""
    lines = [f"  {name:<10} {does}" for name, (_, does) in COMMANDS.items()]
    return "\n".join(
        ["usage: minbert COMMAND [--OPTION VALUE ...]", "", *lines, "", "minbert COMMAND --help lists its options."]
    )


def main() -> None:
    """Run the command that the arguments name, and exit as it does; without one, show them all."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        from minbert import cli

        cli.run(importlib.import_module(COMMANDS[command][0]).main, arguments, needs_kernels=command != "doctor")
    elif command in ("-h", "--help", "--version"):
        with suppress(BrokenPipeError):  # the reader left, as `head` does
            print(f"minbert {minbert.__version__}" if command == "--version" else overview(), flush=True)
    else:
        known = f"{did_you_mean(command, list(COMMANDS))}; minbert alone lists them"
        print(one_line(f"error: unknown command {command}{known}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
