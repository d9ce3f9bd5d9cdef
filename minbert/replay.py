"""Run recorded calls of ops again: `minbert replay DIR`, where MINBERT_RECORD=DIR recorded them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minbert import cli, kernels
from minbert.errors import UserError, first_line, one_line
from minbert.kernels import flight_recorder, op_checks


@dataclass(frozen=True)
class ReplayConfig:
    """Run the recorded calls of ops again, in their order, and compare each with the reference.

    A line is printed for each call. The exit code is 1 where a result differs from the reference's, or is not finite
    where the reference's is. Each call runs with the threads, instruction set and library of matrix products that it
    was recorded with, where this machine has them.

    Args:
        directory: of recorded calls, which MINBERT_RECORD named.
    """

    directory: str


def main(arguments: Sequence[str]) -> int:
    directory = Path(cli.parse("replay", ReplayConfig, arguments, positional="directory").directory)
    if flight_recorder.is_on():
        raise UserError("MINBERT_RECORD is set, and a replay would be recorded itself; unset it")
    if (missing := kernels.native.missing_reason()) is not None:
        raise UserError(missing)
    files = [
        file for part in (directory, *sorted(directory.glob("rank-*"))) for file in flight_recorder.call_files(part)
    ]
    if not files:
        raise UserError(f"{directory} has no recorded calls; run the command again with MINBERT_RECORD={directory}")
    wrong = sum([not replayed(file) for file in files])
    print(f"{len(files)} calls, {wrong or 'none'} of which differ{'s' * (wrong == 1)} from the reference")
    return int(wrong > 0)


def replayed(file: Path) -> bool:
    """Run a file's call again, print how it compares, and return whether it agrees with the reference.

    Raises:
        UserError: the file is damaged, or of an op or a device that is not here.
    """
    try:
        call = flight_recorder.read_call(file)
    except ValueError as error:
        raise UserError(f"{error}; remove the file to replay the others") from None
    if call.op not in op_checks.REFERENCES:
        raise UserError(f"{file} has a call of {call.op!r}, which this version of minbert does not have")
    isa = call.settings["isa"]
    if isa not in kernels.native.library().isas():
        print(f"{file.name} was recorded with {isa}, which this processor lacks; it runs with {kernels.native.isa()}")
    print(f"{file.name.split('-')[0]} ", end="", flush=True)  # before a call that may crash
    try:
        with op_checks.settings_of(call):
            comparison = op_checks.compare(call)
    except (RuntimeError, TypeError, ValueError) as error:
        print(one_line(f"{call.op}: WRONG, {first_line(error)}"), flush=True)
        return False
    print(comparison, flush=True)
    return comparison.ok


if __name__ == "__main__":
    cli.run(main)
