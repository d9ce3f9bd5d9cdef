"""The weights of the tasks by each rule, against PCGrad's and TorchJD's.

The goal is 1 ms a call for 8 tasks: at least 1,000 items/s.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from bench_surgery import conflicting_gradients
from bench_update import MAX_NORM, OPTIONS, Ours, shapes  # noqa: F401  a fixture
from peers import seeded
from torch import Tensor

from minbert.kernels import WEIGHTING_RULES, combine_adamw_, gram, surgery_weights
from minbert.methods.weightings import WEIGHTINGS, random_orders

CALLS = 20  # at once
PCGRAD = "PCGrad"


def gram_of(tasks: int) -> Tensor:
    """Of random gradients in 2 T dimensions: about half of the pairs conflict."""
    rows = torch.randn(tasks, 2 * tasks, generator=seeded(), dtype=torch.float64)
    return rows @ rows.T


def rules(tasks: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, each rule with its default options as a function of the Gram matrix, with what it draws and keeps."""
    losses = torch.rand(tasks, generator=seeded(), dtype=torch.float64) + 0.1

    def of(name: str) -> Callable[[Tensor], Tensor]:
        rule, generator = WEIGHTINGS[name](), seeded()
        state = rule.state(tasks)
        return lambda matrix: rule.weights(matrix, losses, state, generator)

    return {name: of(name) for name in WEIGHTING_RULES}


def pcgrad(matrix: Tensor) -> Tensor:
    return surgery_weights(matrix, orders=random_orders(matrix, None))[0]


def torchjd_weightings() -> dict[str, Callable[[Tensor], Tensor]]:
    """By minbert's names, TorchJD's weightings of a Gram matrix; those of which all dependencies are installed."""
    if importlib.util.find_spec("torchjd") is None:
        return {}
    from torchjd import aggregation

    makers: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "upgrad": aggregation.UPGradWeighting,
        "dualproj": aggregation.DualProjWeighting,
        "mgda": aggregation.MGDAWeighting,
        "cagrad": lambda: aggregation.CAGradWeighting(0.4),
        "imtl-g": aggregation.IMTLGWeighting,
        "aligned-mtl": aggregation.AlignedMTLWeighting,
        "gradvac": aggregation.GradVacWeighting,
        "fairgrad": lambda: aggregation.FairGradWeighting(1.0),
    }
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError:  # of a solver
            continue
    return found


def repeated(rule: Callable[[Tensor], Tensor], matrix: Tensor) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(CALLS):
            rule(matrix)

    return calls


@pytest.mark.parametrize("tasks", [3, 8, 16])
def test_weights(race, tasks: int) -> None:
    matrix, ours, peers = gram_of(tasks), rules(tasks), torchjd_weightings()
    for name in {"upgrad", "dualproj", "imtl-g", "aligned-mtl"} & set(peers):
        torch.testing.assert_close(ours[name](matrix), peers[name](matrix), rtol=1e-7, atol=1e-7)
    functions = {PCGRAD: repeated(pcgrad, matrix)}
    for name, rule in ours.items():
        functions[name] = repeated(rule, matrix)
        if name in peers:
            functions[f"{name}, TorchJD"] = repeated(peers[name], matrix)
    race(f"weights of {tasks} tasks, {CALLS} calls", functions, items=CALLS)


def test_update(race, shapes) -> None:  # noqa: F811
    """A whole update of 3 tasks by each rule: the weights are a small share of it."""
    grads, ours = conflicting_gradients(shapes, torch.float32), Ours(shapes)

    def update(rule: Callable[[Tensor], Tensor] | None) -> None:
        matrix = gram(grads)
        chosen = {"orders": random_orders(matrix, None)} if rule is None else {"weights": rule(matrix)}
        weights, _ = surgery_weights(matrix, **chosen, max_norm=MAX_NORM)
        combine_adamw_(ours.params, grads, weights, *ours.moments, step=1, **OPTIONS)

    by_rule = {PCGRAD: None, **rules(len(grads))}
    functions = {name: lambda rule=rule: update(rule) for name, rule in by_rule.items()}
    elements = sum(param.numel() for param in ours.params)
    race(f"update by each rule, {len(grads)} x {elements / 1e6:.1f}M float32", functions)
