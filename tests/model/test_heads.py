"""Heads: their formulas, what they see of a pair, and what batch normalisation keeps."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from minbert.data.packing import Packed
from minbert.errors import UserError
from minbert.methods.losses import LOSSES, losses_for
from minbert.model import HEADS, Encoder, EncoderConfig, MultitaskModel, load_heads, save_heads, statistics_kept
from minbert.model.heads import Head, sequences_of
from minbert.model.layers import BatchNorm
from minbert.options_by_task import with_head_and_loss
from minbert.tasks import TASKS, Task

D, N = 6, 5
STREAM_IDS = range(10, 14)
PAIR_HEADS = [name for name, head in HEADS.items() if head.pair_encoding != "cross-encoder"]
SYMMETRIC = ["cosine", "projected-cosine", "scaled-cosine"]


def task_with(head: str, task: str = "sts", loss: str | None = None) -> Task:
    return dataclasses.replace(TASKS[task], head=head, loss=loss or TASKS[task].loss)


def head_of(head: str, task: str = "sts", loss: str | None = None, dropout_p: float = 0.0) -> Head:
    """In float64, with weights large enough for every part to matter."""
    made = HEADS[head](task_with(head, task, loss), D, dropout_p).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def outputs(head: Head, pooled: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return head(*head.split(pooled), drop=head.dropouts(torch.tensor(seed), STREAM_IDS))


def vectors(head: Head, n: int = N) -> torch.Tensor:
    """What a head reads for n examples: [n * width, D]."""
    return torch.randn(n * head.width, D, dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_gives_what_its_losses_take(name: str, training: bool) -> None:
    tasks = ["qqp", "sts"] if HEADS[name].pair_encoding != "cross-encoder" else ["sst", "qqp", "sts"]
    for task in tasks:
        for loss in set(losses_for(TASKS[task])) & set(HEADS[name].losses):
            head = head_of(name, task, loss, dropout_p=0.1).train(training)
            pooled = vectors(head).requires_grad_()
            found = outputs(head, pooled)
            group = loss == "multiple_negatives_ranking" and training
            assert found.shape == ((N, N) if group else (N, 5) if task == "sst" else (N,))
            if training:
                LOSSES[loss](
                    found, torch.tensor([0.0, 1, 0, 1, 1]) * head.task.max_label, head.task.max_label
                ).backward()
                assert pooled.grad.abs().sum() > 0
                assert all(parameter.grad is not None for parameter in head.parameters())


OWN = {
    "classes": Task("own", ("a", "b"), "label", classes=("x", "y", "z")),
    "tags": Task("own", ("a", "b"), "label", "multilabel", ("x", "y", "z")),
}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_an_own_task_has_an_output_of_each_class_or_does_not_fit(name: str, kind: str) -> None:
    task = dataclasses.replace(OWN[kind], head=name)
    fits = task.loss in HEADS[name].losses_for(task)
    assert fits == ("cosine" not in name or name == "cosine-feature")
    if not fits:
        with pytest.raises(
            UserError, match=rf"does not fit the outputs of head {name}; expected --heads.own linear or"
        ):
            with_head_and_loss(task, {}, {})
        return
    head = HEADS[name](with_head_and_loss(task, {}, {}), D).double()
    pooled = vectors(head)
    found = outputs(head, pooled)
    assert found.shape == (N, 3)
    labels = torch.tensor([0.0, 1, 2, 1, 0]) if kind == "classes" else (torch.arange(15).view(N, 3) % 2).float()
    LOSSES[task.loss](found, labels, task.max_label).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_what_depends_on_the_classes_is_checked_once_they_are_known() -> None:
    unknown = Task("own", ("a", "b"), "label")
    task = with_head_and_loss(unknown, {"own": "cosine"}, {})
    assert (task.head, task.loss) == ("cosine", "")
    two, three = (dataclasses.replace(task, classes=classes) for classes in (("x", "y"), ("x", "y", "z")))
    assert with_head_and_loss(two, {"own": "cosine"}, {}).loss == "binary_cross_entropy"
    with pytest.raises(UserError, match=r"task own: loss cross_entropy: does not fit the outputs of head cosine"):
        with_head_and_loss(three, {"own": "cosine"}, {})
    chosen = {"own": "binary_cross_entropy"}
    assert with_head_and_loss(unknown, {}, chosen).loss == "binary_cross_entropy"
    with pytest.raises(UserError, match="does not fit the labels of own; expected cross_entropy"):
        with_head_and_loss(three, {}, chosen)
    for heads, losses in (({"own": "linaer"}, {}), ({}, {"own": "mean_squared_error"}), ({}, {"own": "none"})):
        with pytest.raises(UserError, match=r"--(heads|losses).own"):
            with_head_and_loss(unknown, heads, losses)
    single = dataclasses.replace(unknown, text=("a",))
    with pytest.raises(UserError, match=r"expected linear or layers$"):
        with_head_and_loss(single, {"own": "cosine"}, {})


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("training", [False, True])
def test_no_examples_give_no_outputs(name: str, training: bool) -> None:
    head = head_of(name).train(training)
    assert outputs(head, vectors(head, 0)).shape == (0,)


@pytest.mark.parametrize("name", HEADS)
def test_in_evaluation_an_example_does_not_depend_on_the_others(name: str) -> None:
    head = head_of(name, dropout_p=0.5).eval()
    pooled = vectors(head)
    alone = torch.cat([outputs(head, rows) for rows in pooled.split(head.width)])
    torch.testing.assert_close(outputs(head, pooled), alone)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_a_cosine_knows_no_order_and_no_length(name: str) -> None:
    head = head_of(name)
    u, v = torch.randn(2, N, D, dtype=torch.float64)
    pairs = torch.stack([u, v], 1).flatten(0, 1)
    swapped = torch.stack([v, u], 1).flatten(0, 1)
    torch.testing.assert_close(outputs(head, pairs), outputs(head, swapped))
    if name == "cosine":
        torch.testing.assert_close(outputs(head, 7 * pairs), outputs(head, pairs))


def test_heads_are_the_papers_formulas() -> None:
    u, v = torch.randn(2, N, D, dtype=torch.float64)
    pooled, cosine = torch.stack([u, v], 1).flatten(0, 1), F.cosine_similarity(u, v)

    def linear(head: torch.nn.Module, *parts: torch.Tensor) -> torch.Tensor:
        return (torch.cat(parts, 1) @ head.weight.T + head.bias)[:, 0]

    concatenated, difference, feature = (head_of(name) for name in ("concatenated", "difference", "cosine-feature"))
    torch.testing.assert_close(outputs(concatenated, pooled), linear(concatenated, u, v))
    torch.testing.assert_close(outputs(feature, pooled), linear(feature, u, v, cosine[:, None]))
    assert feature.weight.shape == (1, 2 * D + 1)
    p, q = difference.projection(u), difference.projection(v)
    torch.testing.assert_close(outputs(difference, pooled), linear(difference, p, q, (p - q).abs()))

    half = head_of("half-cosine")
    torch.testing.assert_close(outputs(half, pooled), 0.5 * linear(half.network, u, v) + 0.5 * 5 * cosine)
    torch.testing.assert_close(outputs(head_of("cosine"), pooled), 5 * cosine)
    torch.testing.assert_close(outputs(head_of("cosine", loss="cosine_embedding"), pooled), cosine)
    scaled = head_of("scaled-cosine")
    p, q = scaled.projection(u), scaled.projection(v)
    torch.testing.assert_close(outputs(scaled, pooled), 5 * (20 * F.cosine_similarity(p, q)).sigmoid())


@pytest.mark.parametrize("name", ["layers-cosine", "concatenated-layers-cosine"])
def test_a_learned_share_starts_as_a_half_and_may_leave_either_part(name: str) -> None:
    head = head_of(name).eval()
    pooled = vectors(head)
    *_, u, v = pooled.view(N, head.width, D).unbind(1)
    network = outputs(head.network, pooled.view(N, head.width, D)[:, : head.network.width].flatten(0, 1))
    for balance, share in ((0.0, 0.5), (-math.inf, 0.0), (math.inf, 1.0)):
        torch.nn.init.constant_(head.balance, balance)
        torch.testing.assert_close(outputs(head, pooled), share * network + (1 - share) * 5 * F.cosine_similarity(u, v))
    assert HEADS[name](task_with(name), D, 0.0).balance.item() == 0


@pytest.mark.parametrize("name", ["concatenated", "difference", "cosine", "projected-cosine", "cosine-feature"])
def test_ranking_scores_are_those_of_every_pair(name: str) -> None:
    head = head_of(name, "qqp", "multiple_negatives_ranking").train()
    pooled = vectors(head)
    u, v = pooled.view(N, 2, D).unbind(1)
    matrix = outputs(head, pooled)
    head.eval()
    for i in range(N):
        row = outputs(head, torch.stack([u[i].expand_as(v), v], 1).flatten(0, 1))
        torch.testing.assert_close(matrix[i], row)


@pytest.mark.parametrize("name", ["linear", "concatenated", "cosine-feature", "layers", "layers-cosine"])
def test_dropout_follows_the_seed(name: str) -> None:
    head = head_of(name, dropout_p=0.5).train()
    pooled = vectors(head)
    assert torch.equal(outputs(head, pooled, 1), outputs(head, pooled, 1))
    assert not torch.equal(outputs(head, pooled, 1), outputs(head, pooled, 2))


# Batch normalisation ----------------------------------------------------------------------------------------------


def test_batch_normalisation_is_pytorchs() -> None:
    ours, theirs = BatchNorm(D).double(), torch.nn.BatchNorm1d(D).double()
    for _ in range(3):
        x = 3 * torch.randn(7, D, dtype=torch.float64) + 1
        torch.testing.assert_close(ours(x), theirs(x))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_statistics_are_kept_when_told_and_when_a_batch_is_not_finite() -> None:
    norm = BatchNorm(D)
    before = norm.running_mean.clone()
    x = torch.randn(7, D) + 1
    with statistics_kept(norm):
        normalised = norm(x)
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(norm(x), normalised)
    after = norm.running_mean.clone()
    assert not torch.equal(after, before)
    norm(x * math.nan)
    assert torch.equal(norm.running_mean, after)


def test_a_batch_of_one_has_no_variance() -> None:
    with pytest.raises(ValueError, match="more than 1 value"):
        BatchNorm(D)(torch.ones(1, D))


# In the model -----------------------------------------------------------------------------------------------------


def model_with(config: EncoderConfig, heads: dict[str, str], **options: object) -> MultitaskModel:
    tasks = [task_with(head, task) for task, head in heads.items()]
    return MultitaskModel(Encoder(config), tasks, **options)


def test_an_example_has_as_many_sequences_as_its_head_reads(tiny_config: EncoderConfig, packed: Packed) -> None:
    model = model_with(tiny_config, {"sst": "linear", "qqp": "concatenated", "sts": "linear"}).eval()
    found = model(packed, {"sst": 1, "qqp": 1, "sts": 2})
    assert {name: len(rows) for name, rows in found.items()} == {"sst": 1, "qqp": 1, "sts": 2}
    pooled = model.encoder.pool(model.encoder(packed), packed)
    head = model.heads["qqp"]
    torch.testing.assert_close(found["qqp"], head(*head.split(pooled[1:3]), drop=head.dropouts(None, STREAM_IDS)))
    with pytest.raises(ValueError, match=r"add up to the 5 sequences of the packed stream; an example of qqp has 2"):
        model(packed, {"qqp": 5})


def test_each_task_has_its_pooling(tiny_config: EncoderConfig, packed: Packed) -> None:
    ways, counts = {"qqp": "mean", "sts": "max"}, {"sst": 2, "qqp": 1, "sts": 2}
    model = model_with(tiny_config, dict.fromkeys(counts, "linear"), pooling=ways).eval()
    found = model(packed, counts)
    for name, how in {"sst": "cls", **ways}.items():
        model.pooling = how
        assert torch.equal(found[name], model(packed, counts)[name])


@pytest.mark.parametrize("shared", [None, "linear", "transform"])
def test_all_that_was_added_survives_a_file(tiny_config: EncoderConfig, packed: Packed, tmp_path, shared) -> None:
    heads = {"sst": "layers", "sts": "concatenated-layers-cosine"}
    model, other = (model_with(tiny_config, heads, shared_layer=shared) for _ in range(2))
    other.encoder.load_state_dict(model.encoder.state_dict())
    counts = {"sst": 3, "sts": 1}
    with torch.no_grad():
        for norm in (part for part in model.modules() if isinstance(part, BatchNorm)):
            norm.running_mean.normal_()
    save_heads(model, tmp_path / "heads.safetensors")
    load_heads(other, tmp_path / "heads.safetensors")
    for name, rows in model.eval()(packed, counts).items():
        assert torch.equal(other.eval()(packed, counts)[name], rows)


def test_a_shared_layer_is_in_the_trunk_and_starts_anew_with_the_heads(tiny_config: EncoderConfig) -> None:
    model = model_with(tiny_config, {"sst": "linear"}, shared_layer="transform")
    added = list(model.shared.parameters())
    assert {id(param) for param in model.trunk.parameters()} == {
        id(param) for param in (*model.encoder.parameters(), *added)
    }
    group_of = {param: group["name"] for group in model.parameter_groups(0.1) for param in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    assert {group_of[param] for param in added} == {"heads.decay", "heads.no_decay"}
    with pytest.raises(ValueError, match=r"unknown shared layer 'liner' \(did you mean 'linear'\?\)"):
        model_with(tiny_config, {"sst": "linear"}, shared_layer="liner")


@pytest.mark.parametrize("name", PAIR_HEADS)
def test_every_pair_head_trains_on_a_packed_stream(tiny_config: EncoderConfig, packed: Packed, name: str) -> None:
    model = model_with(tiny_config, {"sts": name, "sst": "linear"}).train()
    width = sequences_of(model.tasks["sts"])
    counts = {"sts": 4 // width, "sst": 5 - (4 // width) * width}
    if HEADS[name].normalises and counts["sts"] < 2:
        counts = {"sts": 0, "sst": 5}
    found = model(packed, counts)
    assert {name: len(rows) for name, rows in found.items()} == counts
