"""Which learning rate each family of the papers' rows gets: `python bench/protocol_rates.py --data DIR --model DIR`.

A protocol of `minbert reproduce` has one rate for each family of rows. For each, this trains one row of it, as the
protocol says, with a few rates, and takes the best overall dev score. A finished run is used again, and an interrupted
one goes on.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from training_runs import Parser, check, command_line, require_distinct, train, with_deviation, write

from minbert import cli
from minbert.recipes import paper, protocol
from minbert.runs.run_directory import Run
from minbert.training.stop_signal import StopSignal

FAMILIES = {  # a row without the methods that the papers compare, and the rates: the whole budget
    "joint": ("004/multitask", (1e-4, 2e-4, 4e-4)),
    "in-turn": ("004/baseline", (1e-4, 2e-4, 4e-4)),
    "frozen": ("002/d-pretrain", (1e-3, 3e-3, 1e-2)),
}


def best(scores: Mapping[float, Sequence[float]]) -> float:
    """The rate with the best mean score; of equal ones the lowest."""
    return max(sorted(scores), key=lambda rate: statistics.mean(scores[rate]))


def table(found: Mapping[str, Mapping[float, Sequence[float]]], chosen: Mapping[str, float], name: str) -> str:
    """A Markdown table of the overall dev scores, and which rate is best.

    Args:
        found: by family and rate, the scores of the seeds.
        chosen: the protocol's rates.
        name: of the protocol.
    """
    lines = ["| family | row | rate | overall dev score |", "|---|---|---|---|"]
    for family, scores in found.items():
        for rate, of_seeds in scores.items():
            lines.append(f"| {family} | {FAMILIES[family][0]} | {rate:g} | {with_deviation(of_seeds)} |")
    lines.append("")
    for family, scores in found.items():
        rate = best(scores)
        has = "which the protocol has" if rate == chosen[family] else f"and the protocol {name} has {chosen[family]:g}"
        lines.append(f"- {family}: {rate:g} is best, {has}.")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    made = Parser("protocol_rates.py", (__doc__ or "").partition(":")[0], "runs/protocol-rates")
    made.add_argument("--protocol", default="small", help="of minbert reproduce (%(default)s)")
    made.set_defaults(seeds=[0])
    options = made.parse_args(arguments)
    require_distinct(options, "seeds")
    followed = protocol(options.protocol)

    def given(family: str, rate: float, seed: int) -> tuple[Path, list[str]]:
        recipe = FAMILIES[family][0]
        number, _, row = recipe.partition("/")
        directory = options.runs / family / f"{rate:g}" / f"seed-{seed}"
        own = followed.options(paper(number).row(row)) | {"lr": rate, "recipe": recipe, "seed": seed, "out": directory}
        return directory, command_line(options, {name.replace("_", "-"): value for name, value in own.items()})

    cases = [(family, rate) for family, (_, rates) in FAMILIES.items() for rate in rates]
    check([given(*case, seed)[1] for case in cases for seed in options.seeds], options.runs)
    found: dict[str, dict[float, list[float]]] = {family: {} for family in FAMILIES}
    with StopSignal():
        for family, rate in cases:
            for seed in options.seeds:
                print(f"{family}, rate {rate:g}, seed {seed}", flush=True)
                summary = train(*given(family, rate, seed)).summary()
                found[family].setdefault(rate, []).append(summary["dev"]["overall"])
    text = table(found, followed.rates, options.protocol)
    print(text, end="")
    rows = [
        {
            "benchmark": "protocol_rates",
            "case": f"{family}, {FAMILIES[family][0]}",
            "name": f"{rate:g}",
            "overall": statistics.mean(scores),
            "by_seed": scores,
        }
        for family, by_rate in found.items()
        for rate, scores in by_rate.items()
    ]
    first = Run(given(*cases[0], options.seeds[0])[0])
    command = ["python bench/protocol_rates.py", shlex.join(arguments)]
    write("Rates of a protocol", command, rows, text, first, options.results, protocol=options.protocol)
    return 0


if __name__ == "__main__":
    cli.run(main)
