"""Task gradients from one backward equal those of a backward for each task."""

import contextlib
import dataclasses

import pytest
import torch

from minbert import kernels
from minbert.data.packing import pack
from minbert.methods.losses import LOSSES
from minbert.methods.smart import BregmanConfig, SmartConfig
from minbert.methods.task_gradients import TaskGradients, substituted
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.tasks import find_tasks
from minbert.training.batches import make_batch
from minbert.training.objective import Objective

TASKS = find_tasks(["sst", "qqp", "sts"])
COUNTS = {"sst": 3, "qqp": 1, "sts": 2}
SEED = torch.tensor(7)


def model_of(dtype, dropout=0.1, pooling="cls", tasks=TASKS, shared_layer=None):
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    ).with_dropout(dropout)
    encoder = Encoder(config, pooler=pooling == "pooler")
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = MultitaskModel(encoder, tasks, pooling=pooling, head_dropout=dropout, shared_layer=shared_layer)
    return model.to(dtype).train()


def batch():
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 1, 40, 33, 2, 13]
    packed = pack([torch.randint(1, 50, (n,), generator=generator).tolist() for n in lengths])
    return packed.by_task(list(COUNTS.values())), {
        "sst": torch.tensor([0.0, 4, 2]),
        "qqp": torch.ones(1),
        "sts": torch.tensor([1.0, 4.5]),
    }


def losses_of(model, packed, labels):
    outputs = model(packed, COUNTS, seed=SEED)
    return {task.name: LOSSES[task.loss](outputs[task.name], labels[task.name]) for task in TASKS}


def separate_gradients(model):
    """The gradients of a backward for each task, through the parameters themselves."""
    rows = []
    for task in TASKS:
        losses = losses_of(model, *batch())
        rows.append(torch.autograd.grad(losses[task.name], list(model.encoder.parameters()), allow_unused=True))
    return rows


def joint_gradients(model):
    gradients = TaskGradients(model.encoder, len(TASKS))
    with gradients.attached():
        losses = losses_of(model, *batch())
    torch.stack(list(losses.values())).sum().backward()
    return gradients


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "pooler"])
def test_one_backward_gives_the_gradient_of_every_task(pooling):
    """In float64, with dropout; to rounding, for sums are taken in other orders."""
    model = model_of(torch.float64, pooling=pooling)
    with kernels.use_backend("reference"):
        expected, gradients = separate_gradients(model), joint_gradients(model)
    for row, reference in zip(gradients.rows, expected, strict=True):
        for got, wanted in zip(row, reference, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_compiled_kernels_give_the_gradient_of_every_task():
    exact, model = model_of(torch.float64), model_of(torch.float32)
    with kernels.use_backend("reference"):
        truth, reference = separate_gradients(exact), separate_gradients(model)
    gradients = joint_gradients(model)
    for row, plain, wanted in zip(gradients.rows, reference, truth, strict=True):
        for got, theirs, best in zip(row, plain, wanted, strict=True):
            own_error = (theirs - best).norm()
            assert (got - best).norm() <= 2 * own_error + 1e-6 * best.norm()


def test_heads_keep_their_own_gradient_and_parameters_get_none():
    model = model_of(torch.float32)
    joint_gradients(model)
    assert all(param.grad is None for param in model.encoder.parameters())
    grads = {name: head.weight.grad.clone() for name, head in model.heads.items()}
    model.zero_grad()
    torch.stack(list(losses_of(model, *batch()).values())).sum().backward()
    for name, head in model.heads.items():
        assert torch.equal(grads[name], head.weight.grad)


def test_a_parameter_that_no_loss_reached_has_no_gradient():
    model = model_of(torch.float32, pooling="pooler")
    model.pooling = "cls"
    gradients = joint_gradients(model)
    missing = [param is model.encoder.pooler.weight or param is model.encoder.pooler.bias for param in gradients.params]
    assert any(missing)
    for row in gradients.rows:
        assert [grad is None for grad in row] == missing


def test_a_row_on_its_own_adds_to_that_row_only():
    model = model_of(torch.float32)
    gradients = TaskGradients(model.encoder, 2)
    packed, labels = batch()
    for _ in range(2):
        with gradients.attached(1):
            loss = torch.stack(list(losses_of(model, packed, labels).values())).sum()
        loss.backward()
    assert all(grad is None for grad in gradients.rows[0])
    model.zero_grad()
    torch.stack(list(losses_of(model, packed, labels).values())).sum().backward()
    for grad, param in zip(gradients.rows[1], gradients.params, strict=True):
        torch.testing.assert_close(grad, 2 * param.grad)
    gradients.clear()
    assert all(grad is None for row in gradients.rows for grad in row)


@pytest.mark.parametrize("mixed", [False, True])
def test_sparse_gradients_of_the_word_table_add_up_as_dense_ones(mixed):
    """Over two backwards of other tokens; where one task's loss has the table's norm in it, all are dense."""
    model, found = model_of(torch.float32), []
    (number,) = (i for i, param in enumerate(model.encoder.parameters()) if param is model.encoder.embeddings.word)
    for sparse in (False, True):
        model.encoder.embeddings.sparse_gradient = sparse
        gradients = TaskGradients(model.encoder, 2)
        for task, shift in ((0, 0), (1, 0), (1, 7)):
            packed, labels = batch()
            packed.token_ids.add_(shift).remainder_(model.encoder.config.vocab_size)
            with gradients.attached(task):
                loss = torch.stack(list(losses_of(model, packed, labels).values())).sum()
                if mixed and task == 1:
                    loss = loss + torch.linalg.vector_norm(model.encoder.embeddings.word)
            loss.backward()
            tokens = len(packed.token_ids)
        words = [row[number] for row in gradients.rows]
        assert [grad.is_sparse for grad in words] == [sparse and not mixed] * 2
        assert not sparse or mixed or (words[0].is_coalesced() and words[0]._nnz() <= tokens)
        found.append([[grad.to_dense() for grad in row] for row in gradients.rows])
    for one, other in zip(*found, strict=True):
        for dense, sparse in zip(one, other, strict=True):
            torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-9)


def test_views_follow_the_parameters():
    """An update in place is what the next forward reads."""
    model = model_of(torch.float32)
    gradients = TaskGradients(model.encoder, 3)
    with torch.no_grad():
        model.encoder.embeddings.norm.bias += 1
    with gradients.attached():
        moved = losses_of(model, *batch())
    plain = losses_of(model, *batch())
    assert all(torch.equal(moved[name], plain[name]) for name in plain)


def test_parameters_are_back_after_an_error():
    model = model_of(torch.float32)
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="stop"), TaskGradients(model.encoder, 3).attached():
        raise RuntimeError("stop")
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_detached_parameters_get_no_gradient():
    model = model_of(torch.float32)
    with substituted(model, torch.Tensor.detach):
        losses = losses_of(model, *batch())
    assert not any(loss.requires_grad for loss in losses.values())


def test_a_frozen_module_has_no_rows_to_fill():
    model = model_of(torch.float32)
    model.freeze_encoder()
    gradients = joint_gradients(model)
    assert gradients.rows == [[], [], []]
    assert kernels.gram(gradients.rows).tolist() == [[0.0] * 3] * 3


def test_bounds_follow_the_sequences():
    packed, _ = batch()
    assert packed.sequence_bounds == (0, 3, 4, 6)
    assert packed.token_bounds == (0, 48, 81, 96)
    with pytest.raises(ValueError, match=r"counts \[1, 2\] must add up to the stream's 6 sequences"):
        packed.by_task([1, 2])


# What all tasks share besides the encoder, and what reads every parameter -----------------------------------------

PAIRS = [dataclasses.replace(TASKS[1], head="difference"), dataclasses.replace(TASKS[2], head="layers-cosine")]
PAIR_COUNTS = {"qqp": 3, "sts": 2}


def pair_batch():
    generator = torch.Generator().manual_seed(0)
    packed = pack([torch.randint(1, 50, (n,), generator=generator).tolist() for n in (7, 1, 40, 33, 2, 13, *[5] * 6)])
    labels = {"qqp": torch.tensor([1.0, 0, 1]), "sts": torch.tensor([1.0, 4.5])}
    return packed.by_task([6, 6]), labels


@pytest.mark.parametrize("l2", [{}, {"qqp": 0.3, "sts": 2.0}])
@pytest.mark.parametrize("shared_layer", [None, "linear", "transform"])
def test_one_backward_gives_every_task_its_gradient_of_all_that_is_shared(shared_layer, l2):
    """Of each loss by itself, L2 norm and normalised batches included; in float64, with dropout."""
    model = model_of(torch.float64, tasks=PAIRS, shared_layer=shared_layer)
    packed, labels = pair_batch()

    def losses(context):
        objective = Objective(model, SmartConfig(lambda_s=0.0), BregmanConfig(), l2=l2)
        return objective(make_batch(packed, labels, SmartConfig(lambda_s=0.0), seed=0), context)

    with kernels.use_backend("reference"):
        rows = []
        for task in PAIRS:
            found = losses(contextlib.nullcontext).task[task.name]
            params = model.parameters_of(task.name)
            norm = torch.cat([param.flatten() for param in params]).norm()
            loss = found + l2.get(task.name, 0.0) * norm
            rows.append(torch.autograd.grad(loss, list(model.trunk.parameters()), allow_unused=True))
        gradients = TaskGradients(model.trunk, 2)
        losses(gradients.attached).total.backward()
    for row, reference in zip(gradients.rows, rows, strict=True):
        for got, wanted in zip(row, reference, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert all(param.grad is None for param in model.trunk.parameters())


def test_a_norm_pulls_every_parameter_towards_0_by_as_much():
    """The gradient of lambda |theta| is lambda theta / |theta|: of length lambda, whatever theta is."""
    model = model_of(torch.float64, tasks=PAIRS, shared_layer="linear")
    packed, labels = pair_batch()
    objective = Objective(model, SmartConfig(lambda_s=0.0), BregmanConfig(), l2={"sts": 0.25})
    losses = objective(make_batch(packed, labels, SmartConfig(lambda_s=0.0), seed=0), contextlib.nullcontext)
    params = model.parameters_of("sts")
    gradients = torch.autograd.grad(losses.total - sum(losses.task.values()), params)
    flat, theta = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (gradients, params))
    assert flat.norm().item() == pytest.approx(0.25)
    torch.testing.assert_close(flat, 0.25 * theta / theta.norm())
