"""Functions of a user that watch a run, and may stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minbert.distributed.process_group import ProcessGroup
from minbert.runs.scores import Scores
from minbert.training.stop_signal import Stopped


@dataclass(frozen=True)
class StepInfo:
    """A training step that is done.

    Attributes:
        step: steps so far, this one included.
        epoch: the one that the step belongs to, from 1.
        losses: of the tasks in the step's batch, by task; not finite for a step that was skipped.
        learning_rate: of the step.
        examples_per_second: so far, the scoring of epochs left out.
    """

    step: int
    epoch: int
    losses: dict[str, float]
    learning_rate: float
    examples_per_second: float


@dataclass(frozen=True)
class EpochInfo:
    """An epoch that is done, scored and saved.

    Attributes:
        epoch: from 1.
        step: steps so far.
        dev: the scores on the dev split, by task and metric.
        overall: the overall score of them, 0 to 1.
        train_losses: means over the epoch's steps, by task.
    """

    epoch: int
    step: int
    dev: Scores
    overall: float
    train_losses: dict[str, float]


@dataclass(frozen=True)
class Callbacks:
    """Called after each step and after each epoch; one that returns True stops the run."""

    on_step: Callable[[StepInfo], object] | None = None
    on_epoch: Callable[[EpochInfo], object] | None = None


GO_ON, STOP, FAILED = range(3)  # what the callbacks ask for


class CallbackCalls:
    """The calls of a run's callbacks. Rank 0 makes them, and all ranks end together by what they ask for.

    Attributes:
        callbacks: what this rank calls: on other ranks than the first, nothing.
        after_steps, after_epochs: whether rank 0 has a callback for steps, and for epochs.
        asked: what the callbacks of rank 0 ask for, on all ranks: GO_ON, STOP, or FAILED for an error.
        error: what a callback raised.
    """

    def __init__(self, callbacks: Callbacks, group: ProcessGroup) -> None:
        self.callbacks = callbacks if group.is_main else Callbacks()
        self.error: BaseException | None = None
        self.asked, self._group = GO_ON, group
        given = [self.callbacks.on_step is not None, self.callbacks.on_epoch is not None]
        self.after_steps, self.after_epochs = group.broadcast_object(given)

    def call(self, function: Callable[[Any], object] | None, info: StepInfo | EpochInfo) -> None:
        """Call one of the callbacks, and note its answer, or the error that it raised; all ranks call this together.

        Args:
            function: None on other ranks than the first.

        Raises:
            Stopped: a second signal came meanwhile.
        """
        asked = self.asked
        try:
            answer = function(info) if function is not None else None
        except Stopped:
            raise
        except BaseException as error:
            self.error, asked = error, FAILED
        else:
            if isinstance(answer, bool | np.bool_) and answer:
                asked = max(asked, STOP)
        self.asked = self._group.all_reduce_max(asked)

    def raise_error(self) -> None:
        """Raise what a callback raised; on other ranks than the first a RuntimeError."""
        raise self.error or RuntimeError("a callback of rank 0 raised an error, so this rank ends too")
