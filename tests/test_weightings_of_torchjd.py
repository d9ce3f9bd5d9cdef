"""The rules agree with TorchJD's, in the weights or in the update where the weights are not unique."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from weighting_cases import conflicting, gram_of, independent, norms, weights_of

from minbert.methods.weightings import WEIGHTINGS, random_orders

aggregation = pytest.importorskip("torchjd.aggregation", reason="needs torchjd, of the extra [test]")
scalarization = pytest.importorskip("torchjd.scalarization", reason="needs torchjd 0.18 or newer, of the extra [test]")

pytestmark = pytest.mark.usefixtures("weights_backend")
TASKS = (1, 2, 3, 8, 16)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize(("rule", "theirs"), [("upgrad", "UPGradWeighting"), ("dualproj", "DualProjWeighting")])
def test_projections(rule: str, theirs: str, dependent: bool, tasks: int) -> None:
    pytest.importorskip("quadprog", reason="needs torchjd[quadprog-projector]")
    gram = gram_of(conflicting(tasks, 3) if dependent else independent(tasks))
    close(weights_of(rule, gram), getattr(aggregation, theirs)()(gram))


@pytest.mark.parametrize("tasks", TASKS)
def test_mgda_is_at_most_as_long_as_frank_wolfes(tasks: int) -> None:
    """TorchJD's converges as 1 / iterations, here at most 20,000: to 1e-3 in the update, and it is never shorter."""
    rows = conflicting(tasks, 2 * tasks + 1)
    theirs = aggregation.MGDAWeighting(epsilon=1e-9, max_iters=20000)(gram_of(rows)) @ rows
    ours = weights_of("mgda", gram_of(rows)) @ rows
    assert ours.norm() <= theirs.norm() + 1e-12
    assert (ours - theirs).norm() <= 1e-3 * norms(rows).max()


@pytest.mark.parametrize("tasks", TASKS)
def test_imtl_g(tasks: int) -> None:
    gram = gram_of(independent(tasks))
    close(weights_of("imtl-g", gram), aggregation.IMTLGWeighting()(gram))


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_aligned_mtl(tasks: int, mode: str) -> None:
    gram = gram_of(independent(tasks))
    close(weights_of("aligned-mtl", gram, mode=mode), aggregation.AlignedMTLWeighting(scale_mode=mode)(gram))


@pytest.mark.parametrize("tasks", TASKS)
def test_config(tasks: int) -> None:
    rows = independent(tasks)
    close(weights_of("config", gram_of(rows)) @ rows, aggregation.ConFIG()(rows))


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradvac_with_the_same_orders(tasks: int, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weighting, theirs = WEIGHTINGS["gradvac"](beta=beta), aggregation.GradVacWeighting(beta=beta, eps=0.0)
    state = weighting.state(tasks)
    for step in range(4):
        gram = gram_of(conflicting(tasks, 2 * tasks + 1, seed=step))
        ours = weighting.weights(gram, state=state, generator=torch.Generator().manual_seed(step))
        orders = random_orders(gram, torch.Generator().manual_seed(step)).tolist()
        # of each task's order without the task itself, the positions in the list of the others
        walks = iter([[j - (j > i) for j in order if j != i] for i, order in enumerate(orders)])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randperm", lambda n, walks=walks: torch.tensor(next(walks), dtype=torch.int64))
            close(ours, theirs(gram))


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_fairgrad(tasks: int, alpha: float) -> None:
    """scipy's least_squares stops at a relative change of 1e-8 of its cost; ours solves the equation to 1e-10."""
    gram = gram_of(independent(tasks))
    close(weights_of("fairgrad", gram, alpha=alpha), aggregation.FairGradWeighting(alpha=alpha)(gram), 1e-4)


@pytest.mark.parametrize("tasks", [2, 3, 8])
@pytest.mark.parametrize("c", [0.4, 2.0])
def test_cagrad(tasks: int, c: float) -> None:
    """Clarabel solves to a gap of 1e-8, of a cost that is quadratic around the solution: 1e-4 in the update."""
    pytest.importorskip("cvxpy", reason="needs cvxpy and clarabel, which no extra brings: they are large")
    rows = independent(tasks)
    theirs = aggregation.CAGradWeighting(c=c)(gram_of(rows)) @ rows
    close(weights_of("cagrad", gram_of(rows), c=c) @ rows, theirs, 1e-4)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_nash_mtl(tasks: int) -> None:
    """TorchJD iterates until the equation holds to 1e-3."""
    pytest.importorskip("ecos", reason="needs cvxpy and ecos, which no extra brings: they are large")
    rows = independent(tasks)
    theirs = aggregation.NashMTL(n_tasks=tasks, max_norm=1.0, optim_niter=100)(rows)
    close(weights_of("nash-mtl", gram_of(rows)) @ rows, theirs, 1e-2)


def losses_of(tasks: int, steps: int = 8) -> Tensor:
    rates = torch.linspace(0.8, 0.99, tasks, dtype=torch.float64)
    return torch.linspace(1, 3, tasks, dtype=torch.float64) * rates ** torch.arange(steps)[:, None]


def derivatives(scalarizer, losses: Tensor) -> Tensor:
    """The weights that a scalarizer gives the gradients of the losses."""
    losses = losses.detach().requires_grad_()
    return torch.autograd.grad(scalarizer(losses), losses)[0]


@pytest.mark.parametrize("tasks", TASKS)
def test_famo(tasks: int) -> None:
    """TorchJD's `update` is given the next step's losses, as there are no others here."""
    ours, theirs = WEIGHTINGS["famo"](), scalarization.FAMO(tasks).double()
    state, losses, gram = ours.state(tasks), losses_of(tasks), torch.eye(tasks, dtype=torch.float64)
    for step, loss in enumerate(losses):
        if step:
            theirs.update(loss)
        close(ours.weights(gram, loss, state), derivatives(theirs, loss))


@pytest.mark.parametrize("tasks", TASKS)
def test_uncertainty(tasks: int) -> None:
    ours, theirs = WEIGHTINGS["uncertainty"](lr=0.1), scalarization.UW(tasks).double()
    adam = torch.optim.Adam(theirs.parameters(), lr=0.1)
    state, gram = ours.state(tasks), torch.eye(tasks, dtype=torch.float64)
    for loss in losses_of(tasks):
        close(ours.weights(gram, loss, state), derivatives(theirs, loss))
        adam.zero_grad()
        theirs(loss).backward()
        adam.step()


@pytest.mark.parametrize("tasks", TASKS)
def test_dwa(tasks: int) -> None:
    ours, theirs = WEIGHTINGS["dwa"](every=2), scalarization.DWA()
    state, gram = ours.state(tasks), torch.eye(tasks, dtype=torch.float64)
    for step, loss in enumerate(losses_of(tasks)):
        close(ours.weights(gram, loss, state), derivatives(theirs, loss))
        if step % 2:
            theirs.step()


@pytest.mark.parametrize("tasks", TASKS)
def test_geometric_mean(tasks: int) -> None:
    loss = losses_of(tasks)[3]
    gram = torch.eye(tasks, dtype=torch.float64)
    close(weights_of("geometric-mean", gram, losses=loss), derivatives(scalarization.GeometricMean(), loss))
