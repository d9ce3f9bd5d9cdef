"""Which options of a run may change when it is resumed, come from its config.yaml, or decide its results."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minbert.config import TrainConfig
from minbert.device import resolve_device
from minbert.errors import UserError, dashed
from minbert.files.json_yaml import short
from minbert.tasks import Task

# With the default, None or auto, a new run chooses a value and records it; a resumed run has the recorded one.
CHOSEN_AT_START = ("tasks", "max_length", "precision", "lr", "smart.precision")

# The data may have moved: a resumed run compares its content. When left out, the recorded path holds.
DATA_PATHS = ("data", "tasks_file", "augmented", "reviews")

WITHOUT_EFFECT = {  # options that change neither weights nor scores, and why
    **dict.fromkeys(DATA_PATHS, "the content is compared"),
    "recipe": "a name for other options, which are compared",
    "out": "where the run is",
    "resume": "says that there is a run",
    "timeout": "when to stop because a process is lost",
    "max_skipped": "when to stop because losses are not finite",
    "checkpoint_steps": "when to save",
    "log_steps": "what is logged",
    **dict.fromkeys(("log_to", "tensorboard"), "what is logged"),
    "strict": "whether to start at all",
}

# Sums are in another order, or ties round otherwise: the run can be resumed, but its weights equal an uninterrupted
# run's only to rounding.
ROUNDING = ("device", "threads", "backend", "matmul", "split_master_weights")

LENGTH = ("epochs", "steps", "patience")  # a run can be extended, or end earlier

# Defaults that have changed: before, now. A run with the former one that is resumed with the present one keeps its own.
FORMER_DEFAULTS = {"smart.lambda_s": (1.0, 0.0)}

# All other options determine the weights: they are fixed.


def resumed(saved: TrainConfig, given: TrainConfig, run: Path) -> TrainConfig:
    """The options of a resumed run: the given ones, and the recorded ones for those with the default None or auto.

    Raises:
        UserError: an option is fixed and differs; all of them are named.
    """
    recorded, wanted = dict(flat(saved)), dict(flat(given))
    for name in (*CHOSEN_AT_START, *DATA_PATHS, "threads", "backend", "matmul"):
        if wanted[name] in (None, "auto"):
            wanted[name] = recorded[name]
    for name in _with_former_default(saved, given):
        wanted[name] = recorded[name]
    if wanted["precision"] == "bf16" and raised_for_smart(saved):
        wanted["precision"] = "fp32"
    may_differ = (*WITHOUT_EFFECT, *ROUNDING, *LENGTH)
    differing = [name for name in wanted if name not in may_differ and not _same(recorded[name], wanted[name])]
    if differing:
        shown = ", ".join(_change(name, recorded[name], wanted[name]) for name in differing)
        raise UserError(f"{run} was started with other options: {shown}; resume with its own")
    records: dict[str, dict[str, Any]] = {}
    for name, value in wanted.items():
        record, _, field = name.rpartition(".")
        records.setdefault(record, {})[field] = value
    own = records.pop("")
    nested = {name: dataclasses.replace(getattr(given, name), **values) for name, values in records.items()}
    return given.replace(**own, **nested)


def differences(saved: TrainConfig, given: TrainConfig) -> dict[str, str]:
    """The options in which a saved run differs from the run that `given` would start: by name, `--name (was x, is y)`.

    Options without effect on the results do not count, nor those for which `given` lets the run choose.
    """
    recorded, wanted = dict(flat(saved)), dict(flat(given))
    ignored = {*WITHOUT_EFFECT, *ROUNDING}.difference(DATA_PATHS)
    ignored |= {name for name in CHOSEN_AT_START if wanted[name] in (None, "auto")}
    if wanted["precision"] == "bf16" and raised_for_smart(saved):
        ignored.add("precision")
    own, before = given.own_tasks, saved.own_tasks
    if all(name in own and not _changed_fields(record, own[name]) for name, record in before.items()):
        ignored.add("tasks_file")
    differing = [name for name in wanted if name not in ignored and not _same(recorded[name], wanted[name])]
    return {name: _change(name, recorded[name], wanted[name]) for name in differing}


def deciding(config: TrainConfig) -> dict[str, Any]:
    """The options that decide a run's results where they are not the defaults: what `departures` compares.

    Directories and files have their last name alone, which holds on other machines.
    """
    default, ignored = dict(flat(TrainConfig())), {*WITHOUT_EFFECT, *ROUNDING, "seed"}.difference(DATA_PATHS)
    found = {name: value for name, value in flat(config) if name not in ignored and value != default[name]}
    return {name: _last_name(value) if name in (*DATA_PATHS, "model") else value for name, value in found.items()}


def departures(recorded: Mapping[str, Any], given: TrainConfig) -> dict[str, str]:
    """The options in which a run whose `deciding` options were recorded differs from the run that `given` would start.

    As `differences` of a run whose directory may be on another machine or gone; options of `LENGTH` count too.
    """
    default, wanted = dict(flat(TrainConfig())), deciding(given)
    chosen = {name for name in CHOSEN_AT_START if wanted.get(name) in (None, "auto")}
    if given.precision == "bf16" and raised_for_smart(given.replace(precision=recorded.get("precision", "auto"))):
        chosen.add("precision")
    return {
        name: _change(name, recorded.get(name, default.get(name)), wanted.get(name, default.get(name)))
        for name in dict.fromkeys((*recorded, *wanted))
        if name not in chosen and recorded.get(name) != wanted.get(name)
    }


def _last_name(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _last_name(each) for name, each in value.items()}
    return Path(value).name if isinstance(value, str) else value


def _with_former_default(saved: TrainConfig, given: TrainConfig) -> list[str]:
    """The options of which a run has a former default, and `given` the present one."""
    recorded, wanted = dict(flat(saved)), dict(flat(given))
    return [name for name, defaults in FORMER_DEFAULTS.items() if (recorded[name], wanted[name]) == defaults]


def raised_for_smart(saved: TrainConfig) -> bool:
    """Whether SMART's radius may have raised the precision of a run from bf16 to float32."""
    return saved.precision == "fp32" and saved.smart.on and saved.smart.precision == "auto"


def remarks(saved: TrainConfig, given: TrainConfig) -> list[str]:
    """Lines about options that differ from the record and do not prevent the run from being resumed."""
    lines = []
    if (saved.precision, given.precision) == ("fp32", "bf16"):
        lines.append("the run goes on in fp32, which SMART needed at its start")
    for name in _with_former_default(saved, given):
        lines.append(f"the run goes on with {dashed(name)} {dict(flat(saved))[name]}, the default when it was begun")
    changed = [name for name in ROUNDING if _computing(saved, name) != _computing(given, name)]
    if changed:
        shown = ", ".join(_change(name, getattr(saved, name), getattr(given, name)) for name in changed)
        lines.append(f"{shown}: sums may round differently, so the weights differ in their last digits")
    return lines


OF_A_FILE = ("train", "dev", "test", "delimiter", "id", "title", "class_names", "thresholds")  # may change in a record


def check_records(saved: TrainConfig, tasks: Sequence[Task], run: Path) -> None:
    """Refuse to resume a run with other records of its tasks.

    Args:
        tasks: with which it would be resumed; their classes are known.

    Raises:
        UserError: a field that may not change differs.
    """
    for before, now in zip(saved.chosen_tasks([task.name for task in tasks]), tasks, strict=True):
        for name in _changed_fields(before, now):
            raise UserError(
                f"{run} was started with another {name} of task {now.name}: it was {short(getattr(before, name))}, and"
                f" is {short(getattr(now, name))}; resume with the record that it was started with"
            )


def _changed_fields(before: Task, now: Task) -> list[str]:
    """The fields of a task's record that may not change and differ; classes that are not known yet do not."""
    names = [field.name for field in dataclasses.fields(now) if field.name not in OF_A_FILE]
    names = [name for name in names if not (name in ("classes", "loss") and now.classes is None)]
    return [name for name in names if getattr(before, name) != getattr(now, name)]


def check_length(config: TrainConfig, before: int, after: int, done: int) -> list[str]:
    """Lines about a run of `before` steps that is resumed after `done` of them, for `after` steps in all.

    From the next step on, the learning rate and SMART's warm-up follow their schedule for the new number of steps. So
    the weights equal those of a run that was planned with that number only where neither depends on it.

    Raises:
        UserError: more steps than that are done, or the sampling of tasks depends on the number of epochs.
    """
    if after < done:
        raise UserError(
            f"{config.out} has taken {done} steps, more than the {after} asked for; give more --epochs or --steps"
        )
    if after == before:
        return []
    if config.sampling_alpha_end is not None:
        raise UserError(
            f"{config.out} was planned for {before} steps and not for {after}: --sampling-alpha-end spreads over all"
            " epochs, so their number cannot change; start a new run"
        )
    line = f"{before} steps were planned, and now {after}"
    if config.schedule == "constant" and config.warmup == 0 and config.smart.warmup == 0:
        return [line]
    return [
        f"{line}: from step {done + 1} on the learning rate follows the schedule of {after} steps, so the weights are"
        f" not those of a run planned for {after} from the start"
    ]


def _computing(config: TrainConfig, name: str) -> Any:
    """The value of an option of `ROUNDING`; of the device, what it means on this machine."""
    value = getattr(config, name)
    with suppress(UserError):
        return resolve_device(value) if name == "device" else value
    return value


def flat(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All options by name, those of nested records as `smart.epsilon`."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, or name the same file or directory."""
    if isinstance(one, str) and isinstance(other, str) and os.path.exists(other):
        return os.path.realpath(one) == os.path.realpath(other)
    return bool(one == other)


def _change(name: str, was: Any, now: Any) -> str:
    return f"{dashed(name)} (was {was}, is {now})"
