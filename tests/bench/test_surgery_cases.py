"""What bench/surgery_cases.py asks of the surgeries comes out as theory says."""

from __future__ import annotations

import numpy as np
import pytest
from surgery_cases import QUESTIONS, SURGERIES, answers, main, valley_paths

from minbert.errors import UserError


@pytest.mark.parametrize("surgery", SURGERIES)
def test_every_answer_that_theory_gives_comes_out_so(surgery: str) -> None:
    assert [question.title for question, answer in zip(QUESTIONS, answers(surgery), strict=True) if not answer.ok] == []


def test_every_surgery_has_an_answer_that_theory_gives() -> None:
    known = {surgery for question in QUESTIONS for surgery in (*question.must, *question.cannot)}
    assert known == set(SURGERIES)


@pytest.mark.parametrize("surgery", ["sum", "pcgrad", "gradvac", "famo"])
def test_paths_on_the_valleys_are_finite_and_move(surgery: str) -> None:
    paths = valley_paths(surgery, steps=10, lr=0.02)
    assert paths.shape == (3, 11, 2)
    assert np.isfinite(paths).all()
    assert (abs(paths[:, -1] - paths[:, 0]).max(1) > 0.01).all()


def test_the_help_says_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "--plot FILE.png" in capsys.readouterr().out


def test_a_picture_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"--plot: must end in .png or .svg, got 'paths.jpg'"):
        main(["--plot", "paths.jpg"])
