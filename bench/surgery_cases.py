"""Small problems that tell the surgeries apart: `python bench/surgery_cases.py`, and `--plot FILE.png` for a picture.

Prints a table with a row for each surgery and a column for each question, such as whether any loss rises. Where the
theory of a surgery answers a question, the cell says whether it holds: "yes, as it must"; otherwise what happened.
The exit code is 1 if one answer is not what theory says.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from figures import picture, save
from numpy.typing import NDArray
from training_runs import OneLineErrors

from minbert import cli
from minbert.methods.surgery import mean_weights, pcgrad_weights, sum_weights
from minbert.methods.weightings import WEIGHTINGS, weighting_from

Array = NDArray[np.float64]
Problem = Callable[[Array], tuple[Array, Array]]  # parameters [D] -> losses [T], gradients [T, D]

PLAIN = {"sum": sum_weights, "mean": mean_weights}
SURGERIES = (*PLAIN, "pcgrad", *(name for name in WEIGHTINGS if name != "constant"))


class Weigher:
    """A surgery with its state and its random numbers: from losses [T] and gradients [T, D] to weights [T]."""

    def __init__(self, surgery: str, tasks: int) -> None:
        self.plain, self.generator = PLAIN.get(surgery), torch.Generator().manual_seed(0)
        self.rule = None if surgery in (*PLAIN, "pcgrad") else weighting_from(surgery)
        self.state = None if self.rule is None else self.rule.state(tasks)

    def __call__(self, losses: Array, gradients: Array) -> Array:
        gram = torch.from_numpy(gradients @ gradients.T)
        if self.plain is not None:
            return self.plain(gram).numpy()
        if self.rule is None:
            return pcgrad_weights(gram, self.generator).numpy()
        return self.rule.weights(gram, torch.from_numpy(losses), self.state, self.generator).numpy()


def descend(surgery: str, problem: Problem, start: Sequence[float], steps: int, lr: float, unit: bool = False) -> Array:
    """The path of gradient descent [steps + 1, D]; with `unit` each step is `lr` long."""
    parameters = np.array(start, dtype=np.float64)
    path, weigher = [parameters], Weigher(surgery, len(problem(parameters)[0]))
    for _ in range(steps):
        losses, gradients = problem(parameters)
        update = weigher(losses, gradients) @ gradients
        parameters = parameters - lr * update / (np.linalg.norm(update) if unit else 1)
        path.append(parameters)
    return np.array(path)


# Problems -----------------------------------------------------------------------------------------------------------


def quadratics(centres: Array, curvatures: Array) -> Problem:
    """l_i = sum over d of curvatures[i, d] (x_d - centres[i, d])^2 / 2."""

    def problem(x: Array) -> tuple[Array, Array]:
        gradients = curvatures * (x - centres)
        return (gradients * (x - centres)).sum(1) / 2, gradients

    return problem


def linear(gradients: Array, losses: Array) -> Problem:
    """Losses with constant gradients."""
    return lambda x: (losses + gradients @ x, gradients)


BOWLS = quadratics(np.array([[-1.0, 0.0], [1.0, 0.0]]), np.ones((2, 2)))  # best for the mean: between the centres
OVALS = (np.array([[-1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 4.0], [4.0, 1.0]]))
CONFLICTS = np.array([[2.0, -0.4, -1.5], [0.7, 0.1, 1.6], [-1.4, -0.6, -0.6]])
SHORT = 1e-3  # length of the short gradient, and its loss, next to a long one of 1
SHORT_AND_LONG = linear(np.diag([SHORT, 1.0]), np.array([SHORT, 1.0]))
SLOW_AND_FAST = quadratics(np.zeros((2, 2)), np.diag([0.1, 1.0]))


# Questions ----------------------------------------------------------------------------------------------------------


def turns_not(surgery: str) -> bool:
    """Is the path the same after one loss is multiplied by 100? Of steps of one length."""
    ends = []
    for factor in (1.0, 100.0):
        centres, curvatures = OVALS
        scaled = quadratics(centres, curvatures * np.array([[1.0], [factor]]))
        ends.append(descend(surgery, scaled, [-0.6, 1.5], 30, 0.02, unit=True))
    return bool(abs(ends[0] - ends[1]).max() < 1e-3)


def no_loss_rises(surgery: str) -> bool:
    """Does no loss of three conflicting ones rise?"""
    problem = linear(CONFLICTS, np.ones(3))
    path = descend(surgery, problem, [0.0] * 3, 20, 1e-3)
    return bool((problem(path[-1])[0] <= 1 + 3e-5).all())


def long_gradient_moves(surgery: str) -> bool:
    """Does the task with the long gradient learn at least a tenth as fast as with the mean?"""
    return bool(_last_update(surgery)[1] >= 0.1 * _last_update("mean")[1])


def short_gradient_counts(surgery: str) -> bool:
    """Is the cosine of the update with the short gradient at least 0.3?"""
    update = _last_update(surgery)
    return bool(update[0] >= 0.3 * np.linalg.norm(update))


@functools.cache
def _last_update(surgery: str) -> Array:
    """The last of 2,000 updates by a short and a long gradient."""
    path = descend(surgery, SHORT_AND_LONG, [0.0, 0.0], 2000, 1e-9)
    return (path[-2] - path[-1]) / 1e-9


def ends_at_the_mean(surgery: str) -> bool:
    """Does it end where the mean of two losses is least? All points between the two centres are Pareto-optimal."""
    path = descend(surgery, BOWLS, [-0.6, 1.0], 1500, 0.02)
    return bool(np.linalg.norm(path[-500:].mean(0)) < 0.05)


def favours_the_slow(surgery: str) -> bool:
    """Does the slow task's log loss fall by more, relative to the fast one's, than with equal weights?"""
    surgery = "dwa(every=5)" if surgery == "dwa" else surgery
    first, last = (SLOW_AND_FAST(x)[0] for x in descend(surgery, SLOW_AND_FAST, [1.0, 1.0], 60, 0.05)[[0, -1]])
    slow, fast = np.log(first / last)
    return bool(slow > 1.02 * 0.1 * fast)


class Question(NamedTuple):
    """What is asked of every surgery, and of whom theory knows the answer."""

    title: str
    holds: Callable[[str], bool]
    must: tuple[str, ...]
    cannot: tuple[str, ...]


QUESTIONS = (
    Question(
        "same path after a loss x 100",
        turns_not,
        ("imtl-g", "nash-mtl", "config", "fairgrad", "famo", "geometric-mean"),
        ("sum", "mean", "pcgrad", "upgrad", "dualproj", "mgda", "cagrad", "aligned-mtl", "gradvac", "random", "dwa"),
    ),
    Question(
        "no loss rises (T = 3)",
        no_loss_rises,
        ("upgrad", "dualproj", "mgda", "nash-mtl", "config", "fairgrad"),
        ("sum", "mean", "pcgrad"),
    ),
    Question(
        "long gradient still moves",
        long_gradient_moves,
        ("sum", "mean", "pcgrad", "upgrad", "dualproj", "cagrad", "nash-mtl", "config", "gradvac", "fairgrad", "dwa"),
        ("mgda", "imtl-g", "aligned-mtl", "famo"),
    ),
    Question(
        "short gradient still counts",
        short_gradient_counts,
        ("mgda", "imtl-g", "aligned-mtl", "nash-mtl", "config", "fairgrad", "famo", "uncertainty", "geometric-mean"),
        ("sum", "mean", "pcgrad", "upgrad", "dualproj", "gradvac", "dwa"),
    ),
    Question(
        "ends at the mean's minimum",
        ends_at_the_mean,
        ("sum", "mean", "cagrad", "random"),
        ("pcgrad", "upgrad", "dualproj", "mgda", "geometric-mean", "uncertainty"),
    ),
    Question("favours the slow task", favours_the_slow, ("famo", "dwa", "gradnorm"), ("sum", "mean")),
)


@dataclass(frozen=True)
class Answer:
    """What happened, and what theory says."""

    holds: bool
    predicted: bool | None

    @property
    def ok(self) -> bool:
        return self.predicted in (None, self.holds)

    def __str__(self) -> str:
        known = "" if self.predicted is None else (", as it must" if self.ok else ", AGAINST THEORY")
        return ("yes" if self.holds else "no") + known


def answers(surgery: str) -> list[Answer]:
    """The surgery's answers to all questions."""
    return [
        Answer(each.holds(surgery), True if surgery in each.must else False if surgery in each.cannot else None)
        for each in QUESTIONS
    ]


# The picture --------------------------------------------------------------------------------------------------------

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0))


def valleys(x: torch.Tensor) -> torch.Tensor:
    """The two losses of Liu et al. 2021 (CAGrad), appendix, at points [N, 2]: [2, N]."""
    a, b = x.unbind(1)
    upper = [
        ((0.5 * (-a - 7) - (-b).tanh()).abs().clamp(min=5e-6)).log() + 6,
        ((0.5 * (-a + 3) - (-b).tanh() + 2).abs().clamp(min=5e-6)).log() + 6,
    ]
    lower = [((-a + side) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20 for side in (7, -7)]
    above, below = (0.5 * b).tanh().clamp(min=0), (-0.5 * b).tanh().clamp(min=0)
    return torch.stack([above * up + below * down for up, down in zip(upper, lower, strict=True)])


def valley_paths(surgery: str, steps: int, lr: float) -> Array:
    """The paths of Adam from all starts [starts, steps + 1, 2]. FAMO's and others' losses are shifted to be above 0."""
    x = torch.tensor(STARTS, dtype=torch.float64, requires_grad=True)
    adam, weighers = torch.optim.Adam([x], lr=lr), [Weigher(surgery, 2) for _ in STARTS]
    path = [x.detach().numpy().copy()]
    for _ in range(steps):
        losses = valleys(x)
        gradients = torch.stack([torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in losses])
        shifted = losses.detach().numpy() + 21  # the least is about -20
        for start, weigher in enumerate(weighers):
            rows = gradients[:, start].numpy()
            gradients[0, start] = torch.from_numpy(weigher(shifted[:, start].copy(), rows) @ rows)
        x.grad = gradients[0]
        adam.step()
        path.append(x.detach().numpy().copy())
    return np.array(path).transpose(1, 0, 2)


def draw(path: Path, steps: int = 2500, lr: float = 0.02) -> None:
    """A panel for each surgery: the paths on the mean of the two losses, whose least point is a star."""
    from matplotlib.figure import Figure

    axis = np.linspace(-11, 11, 120)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    height = valleys(torch.from_numpy(grid)).mean(0).reshape(120, 120).numpy()
    figure = Figure(figsize=(12, 9.6), layout="constrained")
    panels = figure.subplots(4, 5, sharex=True, sharey=True).ravel()
    for panel, surgery in zip(panels, SURGERIES, strict=False):
        panel.contour(axis, axis, height, levels=12, colors="0.8", linewidths=0.6)
        panel.plot([-7, 7], [-8, -8], color="0.5", linewidth=3)  # the Pareto set
        for points in valley_paths(surgery, steps, lr):
            panel.plot(*points[::10].T, linewidth=1.2)
            panel.plot(*points[-1], "o", color="black", markersize=3)
        panel.plot(0, -8, "*", color="tab:red", markersize=8)
        panel.set_title(surgery, fontsize=10)
    for panel in panels[len(SURGERIES) :]:
        panel.set_axis_off()
    save(figure, path, dpi=75)


def main(arguments: Sequence[str]) -> int:
    """Print the table; the exit code."""
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=picture, help="a .png or .svg file to draw paths on two valleys to")
    options = parser.parse_args(arguments)
    if options.plot is not None:
        draw(options.plot)
    table = {surgery: answers(surgery) for surgery in SURGERIES}
    print("| surgery |", " | ".join(question.title for question in QUESTIONS), "|")
    print("|---" * (len(QUESTIONS) + 1) + "|")
    for surgery, row in table.items():
        print(f"| `{surgery}` |", " | ".join(map(str, row)), "|")
    known = [answer for row in table.values() for answer in row if answer.predicted is not None]
    print(f"\n{sum(answer.ok for answer in known)} of the {len(known)} answers that theory gives came out so.")
    return 0 if all(answer.ok for answer in known) else 1


if __name__ == "__main__":
    cli.run(main)
