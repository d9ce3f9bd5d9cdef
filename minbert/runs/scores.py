"""Scores by task and metric, and summary.json, which may come from anywhere: every value is checked before its use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minbert.errors import UserError, require_known
from minbert.files.json_yaml import read_json, short
from minbert.files.schema_checks import checked, without_format
from minbert.tasks.task import METRICS

Scores = dict[str, dict[str, float]]
ScoresAndOverall = dict[str, float | dict[str, float]]

SUMMARY: dict[str, Any] = {
    **dict.fromkeys(("best_epoch", "steps", "steps_per_epoch", "skipped_steps", "examples"), int),
    "parameters": int,
    "peak_memory_bytes": int | None,  # None: the system keeps no count
    **dict.fromkeys(("seconds", "examples_per_second"), float),
    **dict.fromkeys(("device", "precision"), str),
    **dict.fromkeys(("backends", "versions"), dict[str, str]),
}
SINCE: dict[str, Any] = {"stopped_early": bool, "processor": str}  # what summaries of earlier releases do not have


def read_summary(path: Path) -> dict[str, Any]:
    """What summary.json holds, checked.

    Raises:
        UserError: it is damaged, or a later minbert wrote it.
    """
    remedy = "--resume of the run writes it again"
    summary = without_format(read_json(path, remedy=remedy), str(path))
    try:
        for name, kind in SUMMARY.items():
            if name not in summary:
                raise UserError(f"no {name}")
            checked(summary[name], kind, name)
        for name in SINCE.keys() & summary.keys():
            checked(summary[name], SINCE[name], name)
        for name in ("dev", "test"):
            if name == "dev" or name in summary:
                check_scores_and_overall(summary.get(name), name)
        for name in ("best_epoch", "steps", "steps_per_epoch"):
            expect(summary[name] >= 1, name, "1 or more", summary[name])
        for name in ("skipped_steps", "examples", "peak_memory_bytes", "parameters", "examples_per_second"):
            expect((summary[name] or 0) >= 0, name, "0 or more", summary[name])
        expect(summary["seconds"] > 0, "seconds", "more than 0", summary["seconds"])
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None
    return summary


def check_scores_and_overall(scores: Any, where: str) -> None:
    """Check `{task: {metric: score}, "overall": score}`; raises a UserError that starts with `where`."""
    checked(scores, ScoresAndOverall, where)
    checked(scores.get("overall"), float, f"{where}.overall")
    check_scores({name: each for name, each in scores.items() if name != "overall"}, where)


def check_scores(scores: Any, where: str) -> None:
    """Check `{task: {metric: score}}` of at least one task; raises a UserError that starts with `where`."""
    checked(scores, Scores, where)
    expect(bool(scores), where, "the scores of a task", scores)
    for name, each in scores.items():
        expect(bool(each), f"{where}.{name}", "a score", each)
        for metric in each:
            require_known(f"{where}.{name}: unknown metric", metric, METRICS)


def expect(ok: bool, name: str, expected: str, got: object) -> None:
    """Refuse a value of a file unless it is ok.

    Raises:
        UserError: it is not.
    """
    if not ok:
        raise UserError(f"{name}: expected {expected}, got {short(got)}")
