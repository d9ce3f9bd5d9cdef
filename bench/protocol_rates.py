"""Which learning rate each family of the papers' rows gets: `python bench/protocol_rates.py --data DIR --model DIR`.

A protocol of `minbert reproduce` has one rate for each family of rows. For each, this trains one row of it, as the
protocol says, with a few rates, and takes the best overall dev score. A finished run is used again, and an interrupted
one goes on.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from scores_of_runs import Row, footnote, made_on, trained
from training_runs import Parser, check, command, command_line, require_distinct, with_deviation, write

from minbert import cli
from minbert.recipes import paper, protocol
from minbert.training.stop_signal import StopSignal

FAMILIES = {  # a row without the methods that the papers compare, and the rates: the whole budget
    "joint": ("004/multitask", (1e-4, 2e-4, 4e-4)),
    "in-turn": ("004/baseline", (5e-5, 1e-4, 2e-4)),
    "frozen": ("002/d-pretrain", (1e-3, 3e-3, 1e-2)),
}


def best(rows: Sequence[Row]) -> Row:
    """The row with the best mean score; of equal ones the first."""
    return max(rows, key=lambda row: statistics.mean(row.overall))


def table(found: Mapping[str, Sequence[Row]], chosen: Mapping[str, float], name: str) -> str:
    """A Markdown table of the overall dev scores, and which rate is best.

    Args:
        found: by family, a row for each rate, which is its name.
        chosen: the protocol's rates.
        name: of the protocol.
    """
    lines = ["| family | row | rate | overall dev score |", "|---|---|---|---|"]
    for family, rows in found.items():
        lines += [f"| {family} | {FAMILIES[family][0]} | {row.name} | {with_deviation(row.overall)} |" for row in rows]
    lines.append("")
    for family, rows in found.items():
        rate = best(rows).name
        has = "which the protocol has" if float(rate) == chosen[family] else f"and {name} has {chosen[family]:g}"
        lines.append(f"- {family}: {rate} is best, {has}.")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    made = Parser("protocol_rates.py", (__doc__ or "").partition(":")[0], "runs/protocol-rates")
    made.add_argument("--protocol", default="small", help="of minbert reproduce (%(default)s)")
    made.set_defaults(seeds=[0])
    made.add_table()
    options = made.parse_args(arguments)
    require_distinct(options, "seeds")
    followed = protocol(options.protocol)

    def given(case: str, seed: int) -> tuple[Path, list[str]]:
        family, rate = cases[case]
        recipe = FAMILIES[family][0]
        number, _, row = recipe.partition("/")
        directory = options.runs / family / rate / f"seed-{seed}"
        own = followed.options(paper(number).row(row)) | {"lr": rate, "recipe": recipe, "seed": seed, "out": directory}
        return directory, command_line(options, {name.replace("_", "-"): value for name, value in own.items()})

    cases = {f"{family}, {rate:g}": (family, f"{rate:g}") for family, (_, rates) in FAMILIES.items() for rate in rates}
    check([given(case, seed)[1] for case in cases for seed in options.seeds], options)
    with StopSignal():
        rows = trained([*cases], options, given)
    found: dict[str, list[Row]] = {}
    for row in rows:
        family, rate = cases[row.name]
        found.setdefault(family, []).append(replace(row, name=rate))
    text = table(found, followed.rates, options.protocol) + "\n" + footnote(rows)
    print(text, end="")
    write(
        "Rates of a protocol",
        command("protocol_rates.py", arguments),
        [
            {"benchmark": "protocol_rates", "case": f"{family}, {FAMILIES[family][0]}", **row.record(of_family[0])}
            for family, of_family in found.items()
            for row in of_family
        ],
        text,
        made_on(rows),
        options.results,
        protocol=options.protocol,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
