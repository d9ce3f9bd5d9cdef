"""The seconds of a step's phases are read from a GPU only once it has reached their marks."""

from __future__ import annotations

import pytest
import torch

from minbert.training.step_result import PhaseTimer


class FakeEvent:
    """An event of a stream that reaches nothing until somebody waits; reading the time of one not reached raises."""

    def __init__(self, recorded, **_):
        self.recorded, self.reached = recorded, False

    def record(self, stream):
        self.number = len(self.recorded)
        self.recorded.append(self)

    def synchronize(self):
        for event in self.recorded[: self.number + 1]:
            event.reached = True

    def elapsed_time(self, end):
        if not (self.reached and end.reached):
            raise RuntimeError("device not ready")
        return 1000.0 * (end.number - self.number)


@pytest.fixture
def recorded(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: FakeEvent(events, **options))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    return events


def test_the_last_mark_is_waited_for(recorded):
    timer = PhaseTimer(torch.device("cuda", 1), FakeEvent.synchronize)
    for phase in ("batch", "backward", "update", "batch"):
        timer.end(phase)
    recorded[-2].synchronize()  # as the readback of the last update's numbers does
    assert timer.seconds() == {"batch": 2.0, "backward": 1.0, "update": 1.0}


def test_a_cpu_has_no_events():
    timer = PhaseTimer(torch.device("cpu"), lambda event: pytest.fail("waits"))
    timer.end("batch")
    assert timer.seconds()["batch"] >= 0
