"""The table of rules, their names and options as text, states, parts, and the op's messages."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from weighting_cases import GRAM_RULES, gram_of, independent, randn, weights_of

from minbert import kernels
from minbert.errors import UserError
from minbert.kernels import WEIGHTING_RULES, task_weights, weighting_state_size
from minbert.methods.weightings import WEIGHTINGS, Weighting, random_orders, weighting_from

RULES = list(WEIGHTING_RULES)
EYE = torch.eye(2, dtype=torch.float64)
PLAIN_OF_1 = ("nash-mtl", "config", "gradvac")


def options_of(rule: str) -> dict[str, object]:
    return {"values": [1.0, 2.0]} if rule == "constant" else {}


def test_every_rule_of_the_op_has_a_class_with_its_options() -> None:
    assert set(WEIGHTINGS) == {*RULES, "constant"}
    for name, rule in WEIGHTING_RULES.items():
        weighting = WEIGHTINGS[name]()
        assert [field.name for field in fields(weighting)] == [option.name for option in rule.options]
        assert weighting.options == [option.default for option in rule.options]
        needs = {"losses": weighting.needs_losses, "noise": weighting.needs_noise, "orders": weighting.needs_orders}
        assert tuple(need for need, needed in needs.items() if needed) == rule.needs


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_rule_is_read_from_its_text(name: str) -> None:
    weighting = WEIGHTINGS[name](**options_of(name))
    assert weighting_from(str(weighting)) == weighting
    if not options_of(name):
        assert weighting_from(name) == weighting_from(f" {name}() ") == weighting


def test_options_are_read_in_any_form_and_written_in_one() -> None:
    assert str(weighting_from("cagrad(c=1)")) == "cagrad(c=1.0)"
    assert str(weighting_from("nash-mtl( every = 3.0 )")) == "nash-mtl(max_norm=1.0, every=3)"
    assert str(weighting_from("aligned-mtl(mode='rmse')")) == "aligned-mtl(mode='rmse')"
    assert str(weighting_from("constant(values=[1, 0.5])")) == "constant(values=(1.0, 0.5))"
    assert str(weighting_from("mgda")) == "mgda"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cagard", r"--surgery cagard: unknown \(did you mean 'cagrad'\?\); expected one of upgrad, dualproj"),
        ("cagrad(d=1)", "--surgery cagrad(d=1): cagrad has no option d; expected c"),
        ("mgda(c=1)", "--surgery mgda(c=1): mgda has no option c; it has none"),
        ("nash-mtl(evry=1)", "has no option evry (did you mean 'every'?); expected max_norm, every"),
        ("cagrad(0.4)", "--surgery cagrad(0.4): expected cagrad(c=...)"),
        ("cagrad(c=0.4", "--surgery cagrad(c=0.4: expected cagrad(c=...)"),
        ("cagrad(c=0.4) + 1", "expected cagrad(c=...)"),
        ("cagrad(c=open('x'))", "expected cagrad(c=...)"),
        ("cagrad(**{'c': 1})", "cagrad has no option None"),
        ("mgda)", "unknown"),
        ("cagrad(c=-1)", "--surgery.c must be finite and at least 0, got -1"),
        ("cagrad(c=True)", "--surgery.c must be finite and at least 0, got True"),
        ("cagrad(c='1')", "--surgery.c must be finite and at least 0, got 1"),
        ("cagrad(c=1e999)", "--surgery.c must be finite and at least 0, got inf"),
        ("upgrad(eps=0)", "--surgery.eps must be finite and above 0, got 0"),
        ("gradvac(beta=1.5)", "--surgery.beta must be from 0 to 1, got 1.5"),
        ("nash-mtl(every=2.5)", "--surgery.every must be a whole number of at least 1, got 2.5"),
        ("dwa(every=0)", "--surgery.every must be a whole number of at least 1, got 0"),
        ("aligned-mtl(mode='max')", "--surgery.mode must be min, median or rmse, got max"),
        ("constant", "--surgery.values must be a list of a finite number for each task, got ()"),
        ("constant(values=[1, None])", "--surgery.values must be a list of a finite number for each task"),
        ("constant(values=[1, 1e999])", "--surgery.values must be a list of a finite number for each task"),
        ("constant(values=[1, True])", "--surgery.values must be a list of a finite number for each task"),
    ],
)
def test_messages_of_text(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        weighting_from(text)
    assert message.replace("\\", "") in str(error.value)
    assert "\n" not in str(error.value)


def test_constant_weights_are_for_as_many_tasks() -> None:
    weighting = weighting_from("constant(values=[1, 0.5])")
    assert weighting.state(2) is None
    assert weighting.weights(EYE).tolist() == [1.0, 0.5]
    assert weighting.weights(EYE.expand(3, 2, 2)).tolist() == [[1.0, 0.5]] * 3
    with pytest.raises(UserError, match=r"--surgery.values must be 3 numbers, got \[1.0, 0.5\]"):
        weighting.weights(torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES)
def test_one_task(weights_backend: str, rule: str) -> None:
    """The update is the gradient, but for the rules whose formula gives one task another length."""
    norm = 5.0
    expected = {"cagrad": 1.4, "nash-mtl": 1 / norm, "fairgrad": 1 / norm, "uncertainty": 0.5}.get(rule, 1.0)
    gram = torch.tensor([[norm**2]], dtype=torch.float64)
    assert weights_of(rule, gram).tolist() == [pytest.approx(expected, rel=1e-12)]


@pytest.mark.parametrize("tasks", [1, 2, 16])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_zero_have_plain_weights(weights_backend: str, rule: str, tasks: int) -> None:
    state = WEIGHTINGS[rule]().state(tasks)
    weights = weights_of(rule, torch.zeros(tasks, tasks, dtype=torch.float64), state=state)
    if rule in GRAM_RULES:
        assert weights.tolist() == [1.0 if rule in PLAIN_OF_1 else 1 / tasks] * tasks
        assert state is None or not state.any()
    else:
        assert weights.isfinite().all()
        assert state is None or state[0] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.7e308])
@pytest.mark.parametrize("rule", RULES)
def test_a_gram_matrix_that_is_not_finite_skips_the_step(weights_backend: str, rule: str, value: float) -> None:
    """1.7e308 twice on the diagonal: the trace overflows."""
    gram, state = gram_of(independent(3)), WEIGHTINGS[rule]().state(3, 2)
    weights_of(rule, torch.stack([gram, gram]), state=state)
    before = None if state is None else state.clone()
    bad = gram.clone()
    bad[1, 1] = bad[2, 2] = value
    assert weights_of(rule, torch.stack([gram, bad]), state=state).tolist() == [[1.0] * 3] * 2
    assert before is None or torch.equal(state, before)


@pytest.mark.parametrize("rule", RULES)
def test_parts_have_the_weights_of_each_alone(weights_backend: str, rule: str) -> None:
    tasks, weighting = 3, WEIGHTINGS[rule]()
    grams = torch.stack([gram_of(independent(tasks, seed)) for seed in range(4)])
    grams[2] = 0
    noise = randn(4, tasks) if weighting.needs_noise else None
    orders = random_orders(grams, torch.Generator().manual_seed(0)) if weighting.needs_orders else None
    losses = randn(tasks).abs() if weighting.needs_losses else None
    state = weighting.state(tasks, parts=4)
    apart = [weighting.state(tasks) for _ in range(4)]
    for _ in range(3):
        together = task_weights(grams, rule, weighting.options, losses=losses, noise=noise, orders=orders, state=state)
        for part in range(4):
            own = {"noise": noise, "orders": orders}
            own = {name: value if value is None else value[part] for name, value in own.items()}
            alone = task_weights(grams[part], rule, weighting.options, losses=losses, **own, state=apart[part])
            assert torch.equal(together[part], alone)
            assert state is None or torch.equal(state[part], apart[part])


@pytest.mark.parametrize("rule", RULES)
def test_a_generator_gives_the_random_numbers(rule: str) -> None:
    weighting: Weighting = WEIGHTINGS[rule]()
    gram, losses = gram_of(independent(6)), torch.ones(6, dtype=torch.float64)
    draw = lambda seed: weights_of(rule, gram, losses=losses, seed=seed)  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert torch.equal(draw(1), draw(2)) == (not weighting.needs_noise and not weighting.needs_orders)


def test_random_orders_are_pcgrads() -> None:
    gram, generator = torch.eye(5, dtype=torch.float64), torch.Generator().manual_seed(3)
    orders = random_orders(gram, generator)
    assert torch.equal(orders[0], torch.randperm(5, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(orders.sort(1).values, torch.arange(5).expand(5, 5))
    assert random_orders(gram.expand(2, 5, 5), generator).shape == (2, 5, 5)


def test_state_sizes() -> None:
    sizes = {rule: weighting_state_size(rule, 3) for rule in RULES if weighting_state_size(rule, 3)}
    assert sizes == {"nash-mtl": 4, "gradvac": 9, "famo": 13, "uncertainty": 10, "dwa": 10, "gradnorm": 13}
    assert WEIGHTINGS["famo"]().state(3, parts=2).shape == (2, 13)
    assert WEIGHTINGS["mgda"]().state(3) is None
    with pytest.raises(ValueError, match="weighting_state_size: rule must be one of 'upgrad'"):
        weighting_state_size("sum", 2)
    with pytest.raises(ValueError, match="weighting_state_size: tasks must be 1 to 16, got 17"):
        weighting_state_size("famo", 17)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3).double(), "mgda"), ValueError, r"gram must have shape \[3, 3\], got \[2, 3\]"),
        ((EYE.float(), "mgda"), TypeError, "gram must be float64, got float32"),
        ((EYE[0], "mgda"), ValueError, r"gram must have shape \[T, T\], got \[2\]"),
        ((EYE, "mdga"), ValueError, "rule must be one of 'upgrad'"),
        ((torch.eye(17).double(), "mgda"), ValueError, "gram must be of at most 16 tasks, got 17"),
        ((EYE, "cagrad"), ValueError, r"options of cagrad must be 1 \(c\), got 0"),
        ((EYE, "mgda", [1.0]), ValueError, r"options of mgda must be 0 \(none\), got 1"),
        ((EYE, "cagrad", [-1.0]), ValueError, "c of cagrad must be finite and at least 0, got -1.0"),
        ((EYE, "random"), ValueError, "random needs noise"),
        ((EYE, "gradvac", [0.5]), ValueError, "gradvac needs orders"),
        ((EYE, "geometric-mean"), ValueError, "geometric-mean needs losses"),
    ],
)
def test_messages_of_the_op(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^task_weights: {message}"):
        task_weights(*arguments)


@pytest.mark.parametrize(
    ("rule", "given", "error", "message"),
    [
        ("mgda", {"losses": EYE[0]}, ValueError, "mgda takes no losses"),
        ("mgda", {"state": EYE[0]}, ValueError, "mgda takes no state"),
        ("random", {"noise": EYE}, ValueError, r"noise must have shape \[2\], got \[2, 2\]"),
        ("geometric-mean", {"losses": EYE[0].float()}, TypeError, "losses must be float64, got float32"),
        ("uncertainty", {"losses": EYE[0]}, ValueError, "uncertainty needs state"),
        ("uncertainty", {"losses": EYE[0], "state": EYE[0]}, ValueError, r"state must have shape \[7\], got \[2\]"),
        ("gradvac", {"orders": EYE, "state": EYE.view(4)}, TypeError, "orders must be int64, got float64"),
        ("gradvac", {"orders": 0 * EYE.long(), "state": EYE.view(4)}, ValueError, r"orders\[0\] must be a permutation"),
    ],
)
def test_messages_of_what_a_rule_needs(rule: str, given: dict, error: type[Exception], message: str) -> None:
    options = [option.default for option in WEIGHTING_RULES[rule].options]
    with pytest.raises(error, match=f"^task_weights: {message}"):
        task_weights(EYE, rule, options, **given)


def test_the_reference_is_the_specification() -> None:
    with kernels.use_backend("reference"):
        assert torch.equal(weights_of("mgda", EYE), kernels.reference.task_weights(EYE, "mgda", [], *[None] * 4))
