"""Results of runs that were not trained."""

from __future__ import annotations

from minbert.report.run_result import RunResult


def result(
    seed: int,
    overall: float,
    *,
    step_seconds: float = 0.5,
    steps: int = 100,
    rate: float | None = None,
    machine: str = "Some processor",
) -> RunResult:
    """What a run with these dev scores came to; sst has the overall score, and sts 0.8."""
    return RunResult(
        seed=seed,
        scores={"dev sst": overall, "dev sts": 0.8, "dev overall": overall},
        steps=steps,
        steps_per_epoch=steps,
        examples=96 * steps,
        seconds=1000.0,  # of a busy machine: the median step counts
        step_seconds=step_seconds,
        conflict_rate=rate,
        projected_share=rate,
        peak_memory_bytes=2**30,
        device="CPU (x86_64), 1 thread, fp32, torch 2.13.0+cpu",
        processor=machine,
        commit="779aba2",
        options={},
    )
