"""Upload a run's model to the Hugging Face hub: `minbert push RUN OWNER/NAME`."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minbert import cli
from minbert.config import TASKS_FILE, TrainConfig
from minbert.console import Terminal
from minbert.cross_validation import summarize
from minbert.errors import UserError
from minbert.files import MANIFEST
from minbert.files.atomic import new_directory, readable, sha256, verify, write_json, write_text, writing
from minbert.files.hub import check_upload, is_downloaded, names_repository, upload
from minbert.files.json_yaml import dump_yaml
from minbert.files.schema_checks import FORMAT
from minbert.inference import READ
from minbert.report.model_card import CardFacts, model_card
from minbert.runs.checkpoint import load_tasks
from minbert.runs.resume import differences
from minbert.runs.run_directory import Run
from minbert.tasks import Task
from minbert.tasks.tasks_file import HUB

OPTIONS, CARD = "config.yaml", "README.md"
LEFT_OUT = "left out"  # stands for a path of this machine
SIBLING = re.compile(r"(seed|fold)-\d+")  # how minbert reproduce and --folds name the runs beside each other


@dataclass(frozen=True)
class PushConfig:
    """Upload a run's model to the Hugging Face hub, with a model card that is made from the run.

    The commands and `minbert.load` take it by its name. The optimizer's state, predictions and texts stay here, and so
    do the names of local files.

    Args:
        run: directory of a finished run.
        name: OWNER/NAME on the hub; a repository that is there gets a further commit.
        private: make the repository private, if it is not there yet.
        checkpoint: best or last.
        message: of the commit.
        license: of the model, by the hub's name for it, such as apache-2.0; the card names none when left out.
        seeds_of: directory of finished runs that differ from RUN in their seed or fold alone; the card has the mean and
            the deviation of their scores. By default the directory that holds RUN, if RUN is named seed-N or fold-N.
        data: source of the numbers of examples in the card; by default the run's training data.
        tasks_file: tasks file that names the files of the run's own tasks; by default those that it was trained with.
        dry_run: write what would be uploaded to --out, and upload nothing.
        out: with --dry-run, directory to create; RUN-hub when left out.
    """

    run: str
    name: str
    private: bool = False
    checkpoint: Literal["best", "last"] = "best"
    message: str = "Upload with minbert push"
    license: str | None = None
    seeds_of: str | None = None
    data: str | None = None
    tasks_file: str | None = None
    dry_run: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        if self.out is not None and not self.dry_run:
            raise UserError("--out is of --dry-run, and without it nothing is written here; leave one out")
        if self.seeds_of is not None and self.checkpoint == "last":
            raise UserError("--seeds-of is of --checkpoint best, whose scores the runs have; leave one out")


def main(arguments: Sequence[str]) -> int:
    options = cli.parse("push", PushConfig, arguments, positional="run name")
    console = Terminal()
    run = Run(options.run)
    config = run.config()
    if not run.summary():
        raise UserError(
            f"{run.path} has not finished, so it has no scores; minbert train with --resume goes on with it"
        )
    check_upload(options.name, needs_token=not options.dry_run)
    with directory_to_fill(options, run) as directory:
        for line in fill(directory, run, config, options):
            console.print(line)
        for path in sorted(directory.iterdir()):
            console.print(f"  {path.name:<24} {path.stat().st_size:>14,} bytes")
        if not options.dry_run:
            console.print(f"uploading to {options.name}")
            owned = (*READ, OPTIONS, MANIFEST)
            address = upload(directory, options.name, private=options.private, message=options.message, owned=owned)
            console.print(f"{options.name}: {address}")
    return 0


@contextmanager
def directory_to_fill(options: PushConfig, run: Run) -> Iterator[Path]:
    """A new directory: with --dry-run it stays, else it is for the upload alone."""
    if options.dry_run:
        path = run.path.resolve()
        out = Path(options.out) if options.out else path.with_name(f"{path.name}-hub")
        with writing(out, "choose another --out"), new_directory(out) as directory:
            yield directory
        Terminal().print(f"{out}: nothing is uploaded")
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def fill(directory: Path, run: Run, config: TrainConfig, options: PushConfig) -> Iterator[str]:
    """Write the model, its options, its manifest and its card; yields lines about them.

    The manifest has no checksum of the card, which may be edited on the hub.

    Raises:
        UserError: the checkpoint is missing or damaged, or the disk is full.
    """
    checkpoint = readable(run.path / options.checkpoint)
    verify(checkpoint, READ)
    tasks = load_tasks(checkpoint, config.chosen_tasks(config.tasks or []))
    public, left_out = without_paths(config)
    with writing(directory, "free some space"):
        for name in READ:
            if (checkpoint / name).exists():
                shutil.copyfile(checkpoint / name, directory / name)
        write_text(directory / OPTIONS, dump_yaml(public))
        write_json(directory / MANIFEST, {file.name: sha256(file) for file in sorted(directory.iterdir())})
    yield f"{checkpoint}: {', '.join(task.title for task in tasks)}"
    if left_out:
        yield f"left out of {OPTIONS}, as they name files here: {', '.join(left_out)}"
    beside, problems = runs_beside(run, config, options)
    yield from problems
    counts, problem = example_counts(run, config, tasks, options)
    if problem:
        yield f"the card lacks numbers of examples: {problem}"
    base_model = public["model"] if public["model"] != LEFT_OUT else None
    facts = CardFacts(
        name=options.name,
        config=config,
        summary=run.summary(),
        records=run.records(),
        tasks=tasks,
        checkpoint=options.checkpoint,
        counts=counts,
        spread=summarize(dict(enumerate(each.summary() for each in beside))) if len(beside) > 1 else {},
        spread_of=of_runs([each.config() for each in beside]) if len(beside) > 1 else "",
        base_model=base_model,
        datasets=data_sets(public["data"], tasks, config),
        license=options.license,
    )
    if facts.spread_of:
        yield f"the card has the mean and the deviation of {facts.spread_of}"
    named = [name for name in (base_model, *facts.datasets) if name]
    if named:
        yield f"the card names {', '.join(named)} of the hub"
    with writing(directory, "free some space"):
        write_text(directory / CARD, model_card(facts))


# What of a run is public --------------------------------------------------------------------------------------------


def without_paths(config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    """The content of config.yaml without names of local files, and the options that had some.

    A model or data set is public if it has the form of a name on the hub and the hub's cache here has it.
    """
    public: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(config), "out": None, "resume": False}
    left_out = ["--out"] if config.out is not None else []
    for name, on_hub in (
        ("data", config.data is None or (names_repository(config.data) and is_downloaded(config.data, "dataset"))),
        ("model", config.model is None or is_public_model(config.model)),
        ("reviews", config.reviews is None),
    ):
        if not on_hub:
            public[name] = LEFT_OUT
            left_out.append(f"--{name}")
    if config.augmented:
        public["augmented"] = dict.fromkeys(config.augmented, LEFT_OUT)
        left_out.append("--augmented")
    if config.tasks_file is not None:
        public["tasks_file"] = TASKS_FILE  # beside config.yaml; the checkpoint's records name no files
        left_out.append("files of the tasks")
    return public, left_out


def is_public_model(name: str) -> bool:
    """Whether it is a name on the hub, perhaps without an owner, that the hub's cache has."""
    without_owner = re.fullmatch(r"\w[\w.-]*", name) is not None and not os.path.lexists(name)
    return (names_repository(name) or without_owner) and is_downloaded(name, "model")


def data_sets(data: str | None, tasks: Sequence[Task], config: TrainConfig) -> list[str]:
    """The data sets on the hub that the run was trained on."""
    names = [data] if data is not None and data != LEFT_OUT else []
    for task in (config.own_tasks.get(task.name, task) for task in tasks):
        if isinstance(task.train, str) and task.train.startswith(HUB):
            *parts, _ = task.train.removeprefix(HUB).split("/")  # OWNER/NAME/CONFIG, NAME, or one of two with two parts
            name = "/".join(parts[:2])
            names += [name] if len(parts) != 2 or is_downloaded(name, "dataset") else []
    return list(dict.fromkeys(names))


# What the card says besides the run itself --------------------------------------------------------------------------


def example_counts(
    run: Run, config: TrainConfig, tasks: Sequence[Task], options: PushConfig
) -> tuple[Mapping[str, Mapping[str, int]], str]:
    """By task the number of examples of each split; of dev alone where the data cannot be read, and why."""
    try:
        source = run.source(config, options.data, options.tasks_file)
        counts = {task.name: {split: len(source.load(task, split)) for split in source.splits(task)} for task in tasks}
        return counts, ""
    except UserError as error:
        return {task.name: {"dev": len(found)} for task in tasks if (found := run.predictions(task, "dev"))}, str(error)


def runs_beside(run: Run, config: TrainConfig, options: PushConfig) -> tuple[list[Run], list[str]]:
    """The run and the finished ones that differ from it in their seed or fold alone; and lines about all others.

    Raises:
        UserError: --seeds-of holds no such run.
    """
    path, lines = run.path.resolve(), list[str]()
    parts = SIBLING.fullmatch(path.name)
    if options.checkpoint == "last" or (options.seeds_of is None and parts is None):
        return [run], []
    holder = Path(options.seeds_of) if options.seeds_of else path.parent
    pattern = f"{parts[1]}-*" if options.seeds_of is None and parts else "*"
    found = {config_key(config): run}
    for other in (Run(each) for each in sorted(holder.glob(pattern)) if (each / "config.yaml").exists()):
        if other.path.resolve() == path:
            continue
        record = other.config()
        differing = differences(record, config)
        reasons = [text for name, text in differing.items() if name not in ("seed", "fold")]
        reasons = reasons or ([] if other.summary() else ["it has not finished"])
        if not reasons and config_key(record) in found:
            reasons = [f"its seed and fold are those of {found[config_key(record)].path}"]
        if reasons:
            lines.append(f"{other.path} does not enter the mean: {', '.join(reasons)}")
        else:
            found[config_key(record)] = other
    if options.seeds_of is not None and len(found) < 2:
        lines.insert(0, f"--seeds-of {holder} has no finished run that differs from {run.path} in its seed alone")
        raise UserError("; ".join(lines))
    return [found[key] for key in sorted(found)], lines


def config_key(config: TrainConfig) -> tuple[int, int]:
    return config.seed, config.fold or 0


def of_runs(configs: Sequence[TrainConfig]) -> str:
    """Which runs there are several of."""
    seeds = list(dict.fromkeys(config.seed for config in configs))
    folds = list(dict.fromkeys(config.fold for config in configs if config.fold is not None))
    parts = [f"seeds {', '.join(map(str, seeds))}"] if len(seeds) > 1 else []
    parts += [f"folds {', '.join(map(str, folds))} of {configs[0].folds}"] if len(folds) > 1 else []
    return f"{len(configs)} runs, {' and '.join(parts)}"


if __name__ == "__main__":
    cli.run(main)
