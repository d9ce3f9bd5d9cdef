"""Look at this machine as minbert does: `minbert doctor`. Bug reports start with what it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minbert import cli, diagnosis
from minbert.device import resolve_device
from minbert.errors import one_line

WIDTH = 24  # characters of the names of facts and ops


@dataclass(frozen=True)
class DoctorConfig:
    """Show what minbert finds on this machine, what runs each op, and what is wrong.

    The exit code is 1 where something is wrong: the last lines say what, and what to do about it.

    Args:
        check: run each op on small inputs, and compare it with the reference in float64; the error may be twice that
            of the reference in the op's own precision.
        device: of the check: auto, cpu, cuda or cuda:N.
        json: print JSON.
    """

    check: bool = False
    device: str = "auto"
    json: bool = False


def main(arguments: Sequence[str]) -> int:
    options = cli.parse("doctor", DoctorConfig, arguments)
    device = resolve_device(options.device)
    facts, ops, problems, notes = diagnosis.facts(), diagnosis.ops(), diagnosis.problems(), list(diagnosis.notes())
    checks = list(diagnosis.checks(device)) if options.check and not problems else []
    problems += [
        f"{each.op} of {each.dtype or 'any dtype'} by {each.backend} gives wrong results; please report it, with all "
        "that is printed here"
        for each in checks
        if not each.ok
    ]
    if options.json:
        rows = [{**each._asdict(), "ok": each.ok} for each in checks]
        print(json.dumps({**facts, "ops": ops, "checks": rows, "notes": notes, "problems": problems}, indent=2))
        return int(bool(problems))
    lines = [*_sections(facts), *_tables(ops)]
    if checks:
        lines += ["", f"check on {device}", *(f"  {each}" for each in checks)]
    lines += ["", *(f"note: {note}" for note in notes)]
    lines += [f"wrong: {problem}" for problem in problems] or ["nothing is wrong"]
    print("\n".join(map(one_line, lines)))
    return int(bool(problems))


def _sections(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for section, found in facts.items():
        yield section
        for name, value in found.items():
            yield f"  {name:<{WIDTH}} {_shown(value)}"
        if not found:
            yield "  none"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items() if each not in ([], {})) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tables(ops: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What runs each op on each device, and why other compiled code does not."""
    for device, table in ops.items():
        yield f"ops on {device}"
        for op, row in table.items():
            against = "; ".join(f"{backend}: {', '.join(why)}" for backend, why in row["not"].items())
            yield f"  {op:<{WIDTH}} {row['runs']:<10} {f'not {against}' if against else ''}".rstrip()


if __name__ == "__main__":
    cli.run(main, needs_kernels=False)
