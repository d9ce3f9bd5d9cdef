"""Surgery in Gram space against Yu et al.'s algorithm on the gradients themselves, and its invariants."""

import itertools

import pytest
import torch

from minbert import kernels
from minbert.methods.surgery import Conflicts, mean_weights, pcgrad_weights, sum_weights

NAN, INF = float("nan"), float("inf")


def gradients(tasks, size=64, seed=0):
    return torch.randn(tasks, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_of(rows):
    return rows @ rows.T


def orders_of(tasks, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(tasks, generator=generator).tolist() for _ in range(tasks)]


def projected(rows, orders):
    """Algorithm 1 of Yu et al. 2020 on vectors: each task's gradient after its walk."""
    result = rows.clone()
    for i, order in enumerate(orders):
        for j in order:
            product = result[i] @ rows[j]
            if i != j and product < 0:
                result[i] -= product / (rows[j] @ rows[j]) * rows[j]
    return result


@pytest.mark.parametrize("tasks", range(1, 9))
def test_weights_are_the_projection_of_vectors(tasks):
    for seed in range(20):
        rows = gradients(tasks, size=tasks + 2, seed=seed)
        weights = pcgrad_weights(gram_of(rows), torch.Generator().manual_seed(seed))
        expected = projected(rows, orders_of(tasks, seed)).sum(0)
        torch.testing.assert_close(weights @ rows, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_weights_are_the_projection_under_every_order(tasks, monkeypatch):
    rows = gradients(tasks, size=tasks, seed=3)
    rows[1] -= 2 * rows[0]
    for permutations in itertools.product(itertools.permutations(range(tasks)), repeat=min(tasks, 6 - tasks)):
        orders = [list(permutations[i % len(permutations)]) for i in range(tasks)]
        drawn = iter(orders)
        monkeypatch.setattr(torch, "randperm", lambda n, generator=None, drawn=drawn: torch.tensor(next(drawn)))
        weights = pcgrad_weights(gram_of(rows))
        torch.testing.assert_close(weights @ rows, projected(rows, orders).sum(0), rtol=1e-10, atol=1e-10)


def test_no_conflict_is_the_plain_sum_to_the_bit():
    rows = gradients(4).abs()
    assert torch.equal(pcgrad_weights(gram_of(rows)), sum_weights(gram_of(rows)))
    assert torch.equal(pcgrad_weights(gram_of(rows), reduction="mean"), mean_weights(gram_of(rows)))


def test_with_two_tasks_the_result_conflicts_with_neither():
    for seed in range(50):
        rows = gradients(2, size=3, seed=seed)
        result = pcgrad_weights(gram_of(rows)) @ rows
        assert (rows @ result >= -1e-12 * rows.norm(dim=1) * result.norm()).all()


def test_one_task_keeps_its_gradient():
    assert pcgrad_weights(torch.tensor([[4.0]], dtype=torch.float64)).tolist() == [1.0]


def test_parallel_and_opposing_gradients():
    row = gradients(1)
    assert pcgrad_weights(gram_of(torch.cat([row, 3 * row]))).tolist() == [1.0, 1.0]
    opposed = torch.cat([row, -3 * row])
    torch.testing.assert_close(pcgrad_weights(gram_of(opposed)) @ opposed, torch.zeros_like(row[0]), rtol=0, atol=1e-12)


def test_a_gradient_of_zero_changes_nothing():
    rows = gradients(3, size=4, seed=1)
    rows[1] = 0
    without = rows[[0, 2]]
    expected = projected(without, [[0, 1], [1, 0]]).sum(0)  # any order: two tasks are left
    torch.testing.assert_close(pcgrad_weights(gram_of(rows)) @ rows, expected)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_tiny_and_huge_gradients_project_as_others_do(scale):
    rows = gradients(3, seed=2)
    rows[1] -= rows[0]
    expected = pcgrad_weights(gram_of(rows), torch.Generator().manual_seed(0))
    weights = pcgrad_weights(gram_of(rows * scale), torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights, expected)


def test_gradients_of_very_different_sizes():
    rows = gradients(2, seed=2)
    rows[1] = -1e-12 * (rows[0] + 0.1 * rows[1])
    result = pcgrad_weights(gram_of(rows)) @ rows
    expected = projected(rows, [[0, 1], [0, 1]]).sum(0)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_gram_that_is_not_finite_projects_nothing(value):
    gram = gram_of(gradients(3))
    gram[0, 1] = gram[1, 0] = value
    assert pcgrad_weights(gram).tolist() == [1.0, 1.0, 1.0]


def test_a_seed_gives_the_order():
    rows = gradients(6, size=4)
    draw = lambda seed: pcgrad_weights(gram_of(rows), torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(5)
    first = pcgrad_weights(gram_of(rows))
    torch.manual_seed(5)
    assert torch.equal(first, pcgrad_weights(gram_of(rows)))


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_torchjd_agrees_under_its_order(tasks):
    aggregation = pytest.importorskip("torchjd.aggregation", reason="needs torchjd, of the extra [bench]")
    rows = gradients(tasks, size=tasks + 1, seed=4)
    for seed in range(10):
        torch.manual_seed(seed)
        theirs = aggregation.PCGrad()(rows)
        torch.manual_seed(seed)
        torch.testing.assert_close(pcgrad_weights(gram_of(rows)) @ rows, theirs, rtol=1e-9, atol=1e-9)


def test_messages():
    with pytest.raises(ValueError, match=r"gram must be \[T, T\], got \[2, 3\]"):
        pcgrad_weights(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'max'"):
        pcgrad_weights(torch.eye(2), reduction="max")


def test_conflicts_are_the_cosines_and_sizes_of_the_gradients():
    rows = gradients(3, seed=5)
    rows[1] = -2 * rows[0] + 0.1 * rows[1]
    gram = gram_of(rows)
    weights = pcgrad_weights(gram)
    _, stats = kernels.surgery_weights(gram, weights=weights)
    conflicts = Conflicts.of(gram, stats[3].item())
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    torch.testing.assert_close(conflicts.cosine, cosine)
    norms = rows.norm(dim=1)
    assert conflicts.magnitude_similarity[0, 1].item() == pytest.approx(
        (2 * norms[0] * norms[1] / (norms[0] ** 2 + norms[1] ** 2)).item()
    )
    plain, total = rows.sum(0), weights @ rows
    assert conflicts.projected_share == pytest.approx(((total - plain).norm() / plain.norm()).item())


def test_conflicts_without_surgery_project_nothing():
    gram = gram_of(gradients(3))
    assert kernels.surgery_weights(gram)[1][3] == 0
