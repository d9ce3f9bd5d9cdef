"""Training steps of own tasks: several labels, any number of classes, class weights and label smoothing."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from small_trainer import examples, parts, trainer
from test_cuda_graphs import Captures
from test_step import Waits

from minbert.data.buckets import Buckets
from minbert.methods.divergences import DIVERGENCES
from minbert.methods.losses import LOSSES
from minbert.tasks import Task
from minbert.training.loop import training_step
from minbert.training.loss_options import loss_options

TOPICS = Task("topics", ("text",), "topic", classes=("a", "b", "c"), class_weights="balanced")
YES = Task("yes", ("text",), "yes", classes=(False, True), class_weights={"true": 3.0})
TAGS = Task("tags", ("text",), "tags", "multilabel", ("p", "q", "r", "s"), class_weights="balanced")
STARS = Task("stars", ("text",), "stars", "regression", scale=(1.0, 5.0))
TASKS = [TOPICS, TAGS, YES, STARS]


def labelled(task: Task, seed: int, n: int = 40):
    rng = np.random.default_rng(seed)
    if task.is_multilabel:
        labels = (rng.random((n, task.num_classes)) < 0.3).astype(np.float32)
    elif task.is_regression:
        labels = rng.uniform(0, 5, n).astype(np.float32)
    else:
        labels = rng.integers(0, task.num_classes, n).astype(np.float32)
    return dataclasses.replace(examples(n, seed), labels=labels)


DATA = {task.name: labelled(task, seed) for seed, task in enumerate(TASKS)}
OPTIONS = loss_options(TASKS, DATA, 0.1, torch.device("cpu"))
steps_of = partial(trainer, tasks=TASKS, data=DATA, loss_options=OPTIONS)


def sampled(step: int):
    return [parts(step=step, tasks=TASKS)]


def twice(step: int):
    return sampled(step) * 2


METHODS = {
    "sum": {"surgery": "sum", "weight": 0.0},
    "smart-pcgrad": {},
    "gse": {"surgery": "gse", "mu": 0.5},
    "low memory": {"low_memory": True},
    "low memory, accumulated": {"low_memory": True, "sample": twice},
    "bf16": {"dtype": torch.bfloat16, "copied": True},
}


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_train_own_tasks(method):
    steps = steps_of(**{"sample": sampled, **METHODS[method]})
    before = {name: param.clone() for name, param in steps.model.named_parameters()}
    for step in range(3):
        result = training_step(steps, step % 2, step / 3).result()
        assert result.updated
        assert result.loss.keys() == DATA.keys()
        assert all(value > 0 for value in result.loss.values())
        if method != "sum":
            assert all(value >= 0 for value in result.smart.values())
            assert result.smart["tags"] > 0
        if method == "gse":
            assert result.bregman.keys() == DATA.keys()
    assert not any(torch.equal(param, before[name]) for name, param in steps.model.named_parameters())


def test_a_step_reports_the_losses_of_the_formulas():
    steps = steps_of(surgery="sum", weight=0.0, dropout=0.0, sample=sampled)
    batch = steps.batches.pack(steps.batches.streams(sampled(0), 0, 0)[0])
    outputs = steps.model(batch.packed, batch.counts)
    expected = {
        task.name: LOSSES[task.loss](
            outputs[task.name], torch.from_numpy(DATA[task.name].labels[:8]), task.max_label, **OPTIONS[task.name]
        ).item()
        for task in TASKS
    }
    assert training_step(steps, 0, 0.0).result().loss == pytest.approx(expected, rel=1e-6)
    assert [sorted(OPTIONS[task.name]) for task in TASKS] == [["class_weights", "label_smoothing"]] * 3 + [[]]


@pytest.mark.parametrize("name", ["class_weights", "label_smoothing"])
def test_what_is_set_changes_the_step(name):
    """A negative control of the tests above."""
    left_out = {task: {key: value for key, value in of.items() if key != name} for task, of in OPTIONS.items()}
    one, other = steps_of(sample=sampled), steps_of(sample=sampled, loss_options=left_out)
    with_it, without = (training_step(steps, 0, 0.0).result().loss for steps in (one, other))
    assert [task for task in with_it if with_it[task] != without[task]] == ["topics", "tags", "yes"]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_no_loss_waits_for_a_number(task):
    outputs = torch.randn((8, task.num_outputs) if task.num_outputs > 1 else 8, requires_grad=True)
    labels = torch.from_numpy(DATA[task.name].labels[:8])
    with Waits():
        loss = LOSSES[task.loss](outputs, labels, task.max_label, **OPTIONS[task.name])
        divergence = DIVERGENCES[task.loss](outputs, outputs.detach() + 1)
        (loss + divergence).backward()
    assert outputs.grad.abs().sum() > 0


def gradients(**options) -> list[torch.Tensor]:
    """Of all tasks after a step without dropout, and of the heads."""
    steps = steps_of(**{"dropout": 0.0, "weight": 0.0, "sample": sampled, **options})
    training_step(steps, 0, 0.0).result()
    rows = [grad for row in steps.gradients.rows for grad in row]
    return [grad for grad in [*rows, *(param.grad for param in steps.model.heads.parameters())] if grad is not None]


def test_low_memory_has_the_gradients_of_one_stream():
    for one, other in zip(gradients(), gradients(low_memory=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_batch_that_is_accumulated_twice_has_its_own_gradients():
    for one, other in zip(gradients(), gradients(sample=twice), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_replayed_steps_read_the_labels_of_their_batch():
    captures = Captures()
    options = {"buckets": Buckets(DATA, 64), "sparse": False, "sample": lambda step: sampled(0 if step < 3 else 1)}
    straight, replayed = steps_of(**options), steps_of(**options, capture=captures)
    for step in range(5):
        wanted, got = (training_step(steps, step, step / 5).result() for steps in (straight, replayed))
        assert got.loss == pytest.approx(wanted.loss)
    assert captures


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_ten_thousand_classes_are_trained(kind):
    many = Task("many", ("text",), "label", kind, tuple(range(10_000)), class_weights="balanced")
    data = {"many": labelled(many, 0)}
    options = loss_options([many], data, 0.1, torch.device("cpu"))
    steps = trainer(
        mu=0.5, tasks=[many], data=data, loss_options=options, sample=lambda step: [parts(step=step, tasks=[many])]
    )
    result = training_step(steps, 0, 0.5).result()
    assert result.updated
    assert np.isfinite([result.loss["many"], result.smart["many"], result.bregman["many"]]).all()
