"""Losses: their formulas, what they leave out, and the predictions that go with them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minbert.methods.divergences import DIVERGENCES
from minbert.methods.losses import LOSSES, cosine_embedding, losses_for, multiple_negatives_ranking
from minbert.tasks import TASKS
from minbert.tasks.metrics import METRICS, predictions

LABELS = torch.tensor([1.0, 0, 1, 1, 0])


def test_cosine_embedding_is_pytorchs_with_a_threshold_of_half_the_scale():
    x, y = torch.randn(2, 6, 4, dtype=torch.float64)
    labels = torch.tensor([0.0, 2.4, 2.5, 2.6, 4.0, 5.0])
    signs = torch.tensor([-1, -1, -1, 1, 1, 1])
    torch.testing.assert_close(
        cosine_embedding(F.cosine_similarity(x, y), labels, 5), F.cosine_embedding_loss(x, y, signs)
    )


def test_ranking_is_the_papers_sum_over_the_positive_pairs():
    scores = torch.randn(5, 5, dtype=torch.float64)
    positive = [i for i, label in enumerate(LABELS) if label == 1]
    expected = -sum(scores[i, i] - torch.stack([scores[i, j] for j in positive]).logsumexp(0) for i in positive) / 3
    torch.testing.assert_close(multiple_negatives_ranking(scores, LABELS), expected)


def test_ranking_leaves_negative_pairs_out_gradient_included():
    scores = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(multiple_negatives_ranking(scores, LABELS), scores)
    positive = LABELS.bool()
    assert torch.equal(gradient != 0, positive[:, None] & positive[None, :])


def test_ranking_is_shifted_by_nothing_and_is_0_where_there_is_nothing_to_rank():
    scores = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    shifted = scores + torch.randn(5, 1, dtype=torch.float64)  # a softmax over each row
    torch.testing.assert_close(multiple_negatives_ranking(shifted, LABELS), multiple_negatives_ranking(scores, LABELS))
    for labels in (torch.zeros(5), torch.eye(5)[0]):
        loss = multiple_negatives_ranking(scores, labels)
        assert loss == 0
        assert not torch.autograd.grad(loss, scores)[0].any()


def test_a_score_may_be_a_soft_label():
    logits, labels = torch.randn(4), torch.tensor([0.0, 1.25, 4.0, 5.0])
    expected = F.binary_cross_entropy(logits.sigmoid(), labels / 5)
    torch.testing.assert_close(LOSSES["binary_cross_entropy"](logits, labels, 5), expected)


def test_every_loss_has_a_divergence_and_every_task_a_loss_that_fits():
    assert LOSSES.keys() == DIVERGENCES.keys()
    for task in TASKS.values():
        assert task.loss in losses_for(task)
    assert losses_for(TASKS["sst"]) == ["cross_entropy"]
    assert losses_for(TASKS["cfimdb"]) == ["binary_cross_entropy"]


@pytest.mark.parametrize(
    ("task", "loss", "best"),
    [
        ("qqp", "binary_cross_entropy", lambda labels: 8 * labels - 4),
        ("qqp", "cosine_embedding", lambda labels: labels),
        ("qqp", "multiple_negatives_ranking", lambda labels: 8 * labels - 4),
        ("sts", "mean_squared_error", lambda labels: labels),
        ("sts", "binary_cross_entropy", lambda labels: torch.logit(labels / 5, eps=1e-6)),
        ("sts", "cosine_embedding", lambda labels: labels / 5),
        ("sts", "multiple_negatives_ranking", lambda labels: labels),
    ],
)
def test_outputs_that_say_the_label_predict_it(task, loss, best):
    record = dataclasses.replace(TASKS[task], loss=loss)
    labels = torch.tensor([0.0, 1, 1, 0]) if task == "qqp" else torch.tensor([0.0, 0.5, 3.2, 5.0])
    predicted = predictions(record, best(labels).numpy())
    np.testing.assert_allclose(predicted, labels.numpy(), atol=1e-4)
    assert METRICS[record.metric](predicted, labels.numpy()) == pytest.approx(1.0)


def test_losses_are_means_over_the_batch():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    expected = (-math.log(3 / 4) + math.log(2)) / 2
    assert LOSSES["cross_entropy"](logits, torch.tensor([1.0, 0.0])).item() == pytest.approx(expected, rel=1e-6)
    one = LOSSES["binary_cross_entropy"](torch.tensor([math.log(3.0), 0.0]), torch.tensor([1.0, 0.0]))
    assert one.item() == pytest.approx(expected, rel=1e-6)
    assert LOSSES["mean_squared_error"](torch.tensor([1.0, 4.0]), torch.tensor([3.0, 4.0])).item() == 2.0


def test_losses_are_computed_in_float32():
    for name, shape in (("cross_entropy", (4, 3)), ("binary_cross_entropy", (4,)), ("mean_squared_error", (4,))):
        assert LOSSES[name](torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(4)).dtype == torch.float32
