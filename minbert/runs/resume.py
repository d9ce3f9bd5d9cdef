"""Which options of a run may change when it is resumed, and what it takes from its own record."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from minbert.config import TrainConfig
from minbert.device import resolve_device
from minbert.errors import UserError

# Decided when the run began if they were left open; a resumed run never decides them anew.
DECIDED = ("tasks", "max_length", "precision", "lr", "smart.precision")

# Where data is. It may have moved: a resumed run compares what was read. Left out, it is where it was.
PLACES = ("data", "augmented", "reviews")

FREE = {  # options that change neither weights nor scores, and why
    **dict.fromkeys(PLACES, "what was read is compared"),
    "recipe": "a name for other options, which are compared",
    "out": "where the run is",
    "resume": "says that there is a run",
    "timeout": "when to give a process up",
    "max_skipped": "when to give the run up",
    "checkpoint_steps": "when to save",
    "log_steps": "what is written down",
    "tensorboard": "what is written down",
    "strict": "whether to begin at all",
}

# The same arithmetic, with sums in another order: the run goes on, but not to the bit as if undisturbed.
ROUNDING = ("device", "threads", "backend", "matmul")

LENGTH = ("epochs", "steps")  # a run can be extended, or end earlier

# All others decide what is trained, and on what: they are fixed.


def resumed(saved: TrainConfig, given: TrainConfig, run: Path) -> TrainConfig:
    """The options with which a run goes on: the given ones, and those of its record for what was left open.

    Raises:
        UserError: an option is fixed and differs; all of them are named.
    """
    recorded, wanted = dict(flat(saved)), dict(flat(given))
    for name in (*DECIDED, *PLACES, "threads", "backend", "matmul"):
        if wanted[name] in (None, "auto"):
            wanted[name] = recorded[name]
    if (wanted["precision"], recorded["precision"]) == ("bf16", "fp32") and raised_for_smart(saved):
        wanted["precision"] = "fp32"
    may_differ = (*FREE, *ROUNDING, *LENGTH)
    differing = [name for name in wanted if name not in may_differ and not _same(recorded[name], wanted[name])]
    if differing:
        shown = ", ".join(_change(name, recorded[name], wanted[name]) for name in differing)
        raise UserError(f"{run} was started with other options: {shown}; resume with its own")
    records = dict.fromkeys(name.partition(".")[0] for name in wanted if "." in name)
    nested = {name: type(getattr(given, name))(**_within(f"{name}.", wanted)) for name in records}
    return given.replace(**{name: value for name, value in wanted.items() if "." not in name}, **nested)


def differences(saved: TrainConfig, given: TrainConfig) -> dict[str, str]:
    """The options with which another run was begun than `given` would begin: by name, `--name (was x, is y)`.

    Those that change no result do not count, and those that `given` leaves for a run to decide do not.
    """
    recorded, wanted = dict(flat(saved)), dict(flat(given))
    found = []
    for name, value in wanted.items():
        left_open = name in DECIDED and value in (None, "auto")
        free = (name in FREE and name not in PLACES) or name in ROUNDING
        if not (free or left_open or _same(recorded[name], value)):
            found.append(name)
    if "precision" in found and wanted["precision"] == "bf16" and raised_for_smart(saved):
        found.remove("precision")
    return {name: _change(name, recorded[name], wanted[name]) for name in found}


def raised_for_smart(saved: TrainConfig) -> bool:
    """Whether a run may have been begun with bf16 and computes in float32, which SMART's radius needed."""
    return saved.precision == "fp32" and saved.smart.on and saved.smart.precision == "auto"


def remarks(saved: TrainConfig, given: TrainConfig) -> list[str]:
    """What a resumed run says of options that differ from its record but do not stop it."""
    lines = []
    if (saved.precision, given.precision) == ("fp32", "bf16"):
        lines.append("the run goes on in fp32, as SMART needed it when it began")
    changed = [name for name in ROUNDING if _computing(saved, name) != _computing(given, name)]
    if changed:
        shown = ", ".join(_change(name, getattr(saved, name), getattr(given, name)) for name in changed)
        lines.append(f"{shown}: sums may round otherwise, so the weights differ in their last digits")
    return lines


def check_length(config: TrainConfig, before: int, after: int, done: int) -> list[str]:
    """What to say of a run of `before` steps, `done` of them taken, that is resumed for `after` steps in all.

    From the step at hand on, the learning rate and SMART's warm-up follow their schedule for the new number of steps.
    So the weights are those of a run planned with that number from the start only where neither depends on it.

    Raises:
        UserError: more steps were taken already, or how the tasks are drawn depends on the number of epochs.
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


def _within(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, or name the same place."""
    if isinstance(one, str) and isinstance(other, str) and os.path.exists(other):
        return os.path.realpath(one) == os.path.realpath(other)
    return bool(one == other)


def _change(name: str, was: Any, now: Any) -> str:
    return f"--{name.replace('_', '-')} (was {was}, is {now})"
