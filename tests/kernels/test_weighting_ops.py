"""task_weights: native code gives the reference's weights and states, part by part, and the same bits each time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert.kernels import WEIGHTING_RULES, task_weights, use_backend, weighting_state_size

quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
RULES = pytest.mark.parametrize("rule", WEIGHTING_RULES)
OF_LOSSES = [rule for rule, known in WEIGHTING_RULES.items() if "losses" in known.needs]
PROGRAMS = ("upgrad", "dualproj", "mgda", "cagrad")
OPTIONS = {"upgrad": [1e-2], "cagrad": [0.9], "aligned-mtl": [1], "nash-mtl": [0.5, 2], "gradvac": [0.3],
           "fairgrad": [2.0], "famo": [0.1, 0.01], "dwa": [1.0, 1], "gradnorm": [0.5, 0.1]}  # fmt: skip


def rows(tasks: int, dimensions: int, seed: int, *parts: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*parts, tasks, dimensions, generator=generator, dtype=torch.float64)


def arguments(rule: str, tasks: int, seed: int, *parts: int) -> dict[str, Tensor]:
    """All that a rule takes besides the Gram matrix and its options; a state of zeros."""
    generator = torch.Generator().manual_seed(seed)
    numbers = {
        "losses": torch.randn(tasks, generator=generator, dtype=torch.float64).exp(),
        "noise": torch.randn(*parts, tasks, generator=generator, dtype=torch.float64),
        "orders": torch.rand(*parts, tasks, tasks, generator=generator).argsort(-1),
    }
    found = {name: numbers[name] for name in WEIGHTING_RULES[rule].needs}
    if size := weighting_state_size(rule, tasks):
        found["state"] = torch.zeros(*parts, size, dtype=torch.float64)
    return found


def defaults(rule: str) -> list[float]:
    return [option.default for option in WEIGHTING_RULES[rule].options]


def close(result: Tensor, expected: Tensor) -> bool:
    return bool((result - expected).norm() <= 1e-10 * expected.norm())


@RULES
@quick
@given(tasks=st.integers(1, 16), seed=st.integers(0, 999), usual=st.booleans())
def test_weights_and_states_are_those_of_the_reference(isa: str, rule: str, tasks: int, seed: int, usual: bool) -> None:
    options = defaults(rule) if usual else OPTIONS.get(rule, defaults(rule))
    own = arguments(rule, tasks, seed)
    theirs = {name: tensor.clone() for name, tensor in own.items()}
    for step in range(4):
        gradients = rows(tasks, tasks + 5, seed + step)
        for given_ in (own, theirs):
            if "losses" in given_:
                given_["losses"] *= 0.9 + 0.1 * gradients[:, 0].cos()
        weights = task_weights(gradients @ gradients.T, rule, options, **own)
        with use_backend("reference"):
            expected = task_weights(gradients @ gradients.T, rule, options, **theirs)
        assert close(weights, expected)
        if "state" in own:
            assert close(own["state"], theirs["state"])


@pytest.mark.parametrize("rule", PROGRAMS)
@quick
@given(tasks=st.integers(2, 16), seed=st.integers(0, 999), scaled=st.booleans())
def test_updates_of_dependent_gradients_are_those_of_the_reference(
    isa: str, rule: str, tasks: int, seed: int, scaled: bool
) -> None:
    """Several weights may give the same update."""
    gradients = rows(tasks, tasks // 2 + 1, seed)
    gradients[-1] = -gradients[0] if seed % 3 else gradients[0]
    gradients[seed % tasks] *= 1e-3 if scaled else 0
    gram = gradients @ gradients.T
    weights = task_weights(gram, rule, defaults(rule))
    with use_backend("reference"):
        expected = task_weights(gram, rule, defaults(rule))
    assert ((weights - expected) @ gradients).norm() <= 1e-7 * gradients.norm()


@RULES
@pytest.mark.parametrize("tasks", [1, 3, 8, 16])
def test_parts_have_the_bits_of_calls_of_their_own(isa: str, rule: str, tasks: int) -> None:
    gradients = rows(tasks, 2 * tasks, 5, 4)
    gradients[1] = 0
    gram, together = gradients @ gradients.mT, arguments(rule, tasks, 6, 4)
    alone = [
        {name: tensor.clone() if name == "losses" else tensor[part].clone() for name, tensor in together.items()}
        for part in range(4)
    ]
    for _ in range(3):
        weights = task_weights(gram, rule, defaults(rule), **together)
        expected = [task_weights(gram[part], rule, defaults(rule), **alone[part]) for part in range(4)]
        assert torch.equal(weights, torch.stack(expected))
        if "state" in together:
            assert torch.equal(together["state"], torch.stack([each["state"] for each in alone]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@RULES
@pytest.mark.parametrize("tasks", [1, 3, 8, 16])
def test_weights_of_a_gpu_are_those_of_a_cpu(rule: str, tasks: int) -> None:
    own = arguments(rule, tasks, 6, 4)
    on_gpu = {name: tensor.cuda() for name, tensor in own.items()}
    for step in range(3):
        gradients = rows(tasks, 2 * tasks, step, 4)
        gram = gradients @ gradients.mT
        weights = task_weights(gram.cuda(), rule, defaults(rule), **on_gpu)
        assert close(weights.cpu(), task_weights(gram, rule, defaults(rule), **own))
    if "state" in own:
        assert close(on_gpu["state"].cpu(), own["state"])


@RULES
def test_every_call_gives_the_same_bits(isa: str, rule: str) -> None:
    gradients = rows(9, 6, 8)  # dependent

    def results() -> list[Tensor]:
        own = arguments(rule, 9, 9)
        weights = [task_weights(gradients @ gradients.T, rule, defaults(rule), **own) for _ in range(3)]
        return [*weights, *own.values()]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


@RULES
def test_the_chosen_backend_runs(record, needs_native: None, rule: str) -> None:
    with record() as ops:
        task_weights(torch.eye(2, dtype=torch.float64), rule, defaults(rule), **arguments(rule, 2, 0))
    assert [op for op in ops if op.startswith("minbert::")] == ["minbert::task_weights"]


@RULES
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e308])
def test_what_is_not_finite_changes_no_part(isa: str, rule: str, poison: float) -> None:
    """Of a trace too: 1e308 occurs twice."""
    gram, own = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1), arguments(rule, 3, 1, 2)
    gram[1, [0, 2], [0, 2]] = poison
    assert torch.equal(task_weights(gram, rule, defaults(rule), **own), torch.ones(2, 3, dtype=torch.float64))
    assert not own.get("state", torch.zeros(1)).any()


@pytest.mark.parametrize("rule", OF_LOSSES)
@pytest.mark.parametrize("poison", [float("nan"), float("-inf")])
def test_a_loss_that_is_not_finite_changes_no_state(isa: str, rule: str, poison: float) -> None:
    own = arguments(rule, 3, 1)
    own["losses"][1] = poison
    weights = task_weights(torch.eye(3, dtype=torch.float64), rule, defaults(rule), **own)
    assert torch.equal(weights, torch.ones(3, dtype=torch.float64))
    assert not own.get("state", torch.zeros(1)).any()
