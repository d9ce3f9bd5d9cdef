"""Losses: their formulas, what they leave out, and the predictions that go with them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minbert.methods.divergences import DIVERGENCES
from minbert.methods.losses import LOSSES, accepts, cosine_embedding, losses_for, multiple_negatives_ranking
from minbert.tasks import TASKS, Task
from minbert.tasks.metrics import predictions, score

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


def test_the_losses_of_own_tasks():
    of_pairs = ["cosine_embedding", "multiple_negatives_ranking"]
    pair = Task("own", ("a", "b"), "label")
    assert losses_for(pair) == ["cross_entropy", "binary_cross_entropy", *of_pairs]  # its classes are not known
    assert losses_for(dataclasses.replace(pair, classes=("no", "yes"))) == ["binary_cross_entropy", *of_pairs]
    assert losses_for(dataclasses.replace(pair, classes=("no", "yes", "so"))) == ["cross_entropy"]
    for classes in (None, ("x", "y"), ("x", "y", "z")):
        assert losses_for(Task("tags", ("a", "b"), "label", "multilabel", classes)) == ["binary_cross_entropy"]


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
    assert score(record, predicted, labels.numpy())[record.metric] == pytest.approx(1.0)


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


# Class weights, label smoothing and several labels --------------------------------------------------------------------

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0], [2.0, 2.0, 2.0], [-1.0, 0.5, 0.0]], dtype=torch.float64)
ROWS = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])  # of three classes


def test_the_loss_of_several_labels_is_the_mean_over_examples_and_classes():
    p = LOGITS.sigmoid()
    expected = -sum(math.log(p[i, c] if ROWS[i, c] else 1 - p[i, c]) for i in range(4) for c in range(3)) / 12
    assert LOSSES["binary_cross_entropy"](LOGITS, ROWS, 1).item() == pytest.approx(expected)


def test_weights_of_several_labels_multiply_the_examples_that_have_the_class():
    weights = torch.tensor([3.0, 0.5, 1.0], dtype=torch.float64)
    p = LOGITS.sigmoid()
    expected = (
        -sum(
            weights[c] * math.log(p[i, c]) if ROWS[i, c] else math.log(1 - p[i, c]) for i in range(4) for c in range(3)
        )
        / 12
    )
    found = LOSSES["binary_cross_entropy"](LOGITS, ROWS, 1, class_weights=weights)
    torch.testing.assert_close(found, expected)


def test_the_mean_is_weighted_by_the_weights_of_the_labels():
    weights, labels = torch.tensor([2.0, 0.5, 4.0], dtype=torch.float64), torch.tensor([2.0, 0, 1, 1])
    each = F.cross_entropy(LOGITS, labels.long(), reduction="none")
    of_labels = weights[labels.long()]
    found = LOSSES["cross_entropy"](LOGITS, labels, 2, class_weights=weights)
    torch.testing.assert_close(found, (of_labels * each).sum() / of_labels.sum())


@pytest.mark.parametrize("weights", [None, [0.25, 3.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_logit_has_the_loss_of_two_classes(weights, smoothing):
    logits, labels = LOGITS[:, 0], torch.tensor([1.0, 0, 0, 1])
    options = {"class_weights": torch.tensor(weights, dtype=torch.float64)} if weights else {}
    options |= {"label_smoothing": smoothing} if smoothing else {}
    both = torch.stack([torch.zeros_like(logits), logits], -1)
    expected = LOSSES["cross_entropy"](both, labels, 1, **options)
    torch.testing.assert_close(LOSSES["binary_cross_entropy"](logits, labels, 1, **options), expected)


def test_smoothing_moves_targets_towards_even_ones():
    s, labels = 0.3, torch.tensor([2.0, 0, 1, 1])
    targets = (1 - s) * F.one_hot(labels.long(), 3) + s / 3
    expected = -(targets * LOGITS.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(LOSSES["cross_entropy"](LOGITS, labels, 2, label_smoothing=s), expected)
    expected = F.binary_cross_entropy(LOGITS.sigmoid(), ROWS.double() * (1 - s) + s / 2)
    torch.testing.assert_close(LOSSES["binary_cross_entropy"](LOGITS, ROWS, 1, label_smoothing=s), expected)


def test_without_weights_and_smoothing_a_loss_is_the_same_to_the_bit():
    for logits, labels in ((LOGITS.float(), ROWS), (LOGITS[:, 0].float(), ROWS[:, 0])):
        expected = F.binary_cross_entropy_with_logits(logits, labels)
        assert torch.equal(LOSSES["binary_cross_entropy"](logits, labels, 1), expected)


def test_the_divergence_of_several_labels_is_the_mean_over_classes():
    other = LOGITS.flip(0)
    apart = [DIVERGENCES["binary_cross_entropy"](LOGITS[:, c], other[:, c]) for c in range(3)]
    torch.testing.assert_close(DIVERGENCES["binary_cross_entropy"](LOGITS, other), torch.stack(apart).mean())
    assert DIVERGENCES["binary_cross_entropy"](LOGITS, LOGITS) == 0


def test_only_losses_of_classes_take_weights_and_smoothing():
    assert [loss for loss in LOSSES if accepts(loss, "class_weights")] == ["cross_entropy", "binary_cross_entropy"]
    assert [loss for loss in LOSSES if accepts(loss, "label_smoothing")] == ["cross_entropy", "binary_cross_entropy"]
