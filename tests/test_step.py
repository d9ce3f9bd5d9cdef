"""A training step hands its work to the device without waiting for it; the results are read later."""

from __future__ import annotations

import dataclasses
import math
import sys
from functools import partial

import pytest
import torch
from compare_runs import bf16_bound
from small_trainer import DATA, REGULARISERS, SIZES, TASKS, parts, trainer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from minbert import kernels
from minbert.data import pack_batches
from minbert.data.buckets import MULTIPLE, Buckets
from minbert.data.packing import pack
from minbert.kernels import checks
from minbert.methods.smart import BregmanConfig, SmartConfig
from minbert.methods.task_gradients import TaskGradients
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.training import optimizer
from minbert.training import trainer as training_trainer
from minbert.training.batches import make_batch
from minbert.training.host_device_copy import Readback
from minbert.training.loop import training_step
from minbert.training.objective import Objective
from minbert.training.step_result import PendingUpdate

STEP_OPS = {
    *("embedding", "linear", "attention", "first_token_attention"),
    *("dropout_add_layer_norm", "bias_gelu", "dropout"),
    *("smart_init", "smart_ascend", "task_weights", "surgery_weights"),
}
UPDATE_OPS = {"gram_of": training_trainer, "combine_adamw_of_": optimizer}  # by the module that calls them


class Waits(TorchDispatchMode):
    """Refuses every op that would have the host wait for a GPU's numbers, except those at some addresses."""

    def __init__(self, addresses=()):
        super().__init__()
        self.addresses = addresses

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "aten::_local_scalar_dense" and args[0].data_ptr() in self.addresses:
            return func(*args)
        assert func.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


def unwatched(function):
    def run(*arguments):
        with _disable_current_modes():
            return function(*arguments)

    return run


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"surgery": "sum"}, {"surgery": "gse", "mu": 0.5}, {"low_memory": True}),
        *REGULARISERS.values(),
        *({"surgery": name} for name in kernels.WEIGHTING_RULES),
        {"surgery": "constant(values=[1, 2, 3])"},
    ],
)
def test_a_step_is_handed_over_without_looking_at_a_number(options, monkeypatch):
    steps = trainer(**options)
    training_step(steps, 0, 0.0).result()
    monkeypatch.setattr(PendingUpdate, "result", unwatched(PendingUpdate.result))  # waits, for the update before
    monkeypatch.setattr(Encoder, "check", lambda self, packed: None)  # looks at ids, on CPUs only
    for check in ("ids", "cu_seqlens_values", "permutations"):  # likewise
        monkeypatch.setattr(checks, check, lambda *arguments: None)
    counts = [state["step"].data_ptr() for state in steps.optimizer.state.values()]  # always on the host
    with Waits(counts):
        pending = training_step(steps, 1, 0.5)
    assert pending.result().updated


def test_no_head_and_no_loss_looks_at_a_number(monkeypatch):
    """With rankings, normalised batches, L2 norms and SMART on sequences of pairs."""
    heads = {"sst": "layers", "qqp": "difference", "sts": "layers-cosine"}
    tasks = [dataclasses.replace(task, head=heads[task.name]) for task in TASKS]
    tasks[1] = dataclasses.replace(tasks[1], loss="multiple_negatives_ranking")
    model = MultitaskModel(Encoder(EncoderConfig(**SIZES)), tasks, shared_layer="transform").train()
    gradients = TaskGradients(model.trunk, len(tasks))
    objective = Objective(model, SmartConfig(lambda_s=1.0), BregmanConfig(), l2={"qqp": 0.1})
    packed = pack([[1, 2, 3]] * 24).by_task([4, 8, 12])
    batch = make_batch(
        packed, {task.name: torch.tensor([0.0, 1, 1, 0]) for task in tasks}, SmartConfig(lambda_s=1.0), seed=0
    )
    monkeypatch.setattr(Encoder, "check", lambda self, packed: None)  # look at ids, on CPUs only
    for check in ("ids", "cu_seqlens_values"):
        monkeypatch.setattr(checks, check, lambda *arguments: None)
    with Waits():
        losses = objective(batch, gradients.attached)
        losses.total.backward()
    assert losses.total.isfinite()


def test_the_watch_for_waiting_sees_them():
    with Waits(), pytest.raises(AssertionError):
        torch.ones(()).item()


def test_a_step_that_is_not_finite_changes_nothing_and_counts_for_nothing():
    steps = trainer("gse")
    training_step(steps, 0, 0.0).result()
    with torch.no_grad():
        for param in steps.model.heads["sst"].parameters():
            param.fill_(math.inf)
    before = {name: param.clone() for name, param in steps.model.named_parameters()}
    assert not training_step(steps, 1, 0.5).result().updated
    for name, param in steps.model.named_parameters():
        assert torch.equal(param, before[name]), name
        assert steps.optimizer.state[param]["step"] == 2  # both updates of the first step


def test_results_can_be_asked_for_after_the_next_step_was_handed_over(monkeypatch):
    """As on a GPU, whose host must then not wait for the next step."""
    steps, alike, read = trainer(), trainer(), []
    read_back = Readback.read
    monkeypatch.setattr(Readback, "read", lambda self: read.append(self) or read_back(self))
    pending = [training_step(steps, i, 0.0) for i in range(3)]
    assert len(read) == 2  # each before the update after it
    pending[1].result()
    assert len(read) == 2
    monkeypatch.undo()
    for i in range(3):
        assert training_step(alike, i, 0.0).result().loss == pending[i].result().loss


def test_between_the_step_and_an_op_lie_at_most_six_frames(monkeypatch):
    """Of minbert's own functions, the op's among them; torch's calls of modules are not counted."""
    found = set()

    def noting(name, op):
        def call(*arguments, **options):
            frame, frames = sys._getframe(1), [name]
            while frame is not None and frame.f_code is not training_step.__code__:
                frames += [frame.f_code.co_name] if frame.f_globals["__name__"].startswith("minbert.") else []
                frame = frame.f_back
            if frame is not None:
                found.add(tuple(reversed(frames)))
            return op(*arguments, **options)

        return call

    for name, module in {**dict.fromkeys(STEP_OPS, kernels), **UPDATE_OPS}.items():
        monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    for surgery in ("gse", "famo"):
        training_step(trainer(surgery, mu=0.5), 0, 0.0).result()
    assert {frames[-1] for frames in found} == {*STEP_OPS, *UPDATE_OPS}
    assert max(map(len, found)) == 6


# Buckets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surgery", ["sum", "pcgrad"])
def test_padding_changes_no_loss_and_no_gradient(surgery):
    found = []
    for pad in (None, partial(Buckets(DATA, 64).pad, tasks=list(DATA), segments=[1] * len(DATA))):
        steps = trainer(surgery, weight=0.0, dropout=0.0)
        packed = pack_batches([(DATA[task.name], indices) for task, indices in parts()], pad)
        assert pad is None or len(packed.token_ids) % MULTIPLE == 0
        if surgery != "sum":
            packed = packed.by_task([len(indices) + packed.padding for _, indices in parts()])
        labels = {task.name: torch.from_numpy(DATA[task.name].labels[indices]) for task, indices in parts()}
        losses = steps.objective(make_batch(packed, labels, steps.objective.smart, seed=0), steps.gradients.attached)
        losses.total.backward()
        found.append(([losses.total.detach()], *steps.gradients.rows))
    for padded, plain in zip(*found, strict=True):
        for one, other in zip(padded, plain, strict=True):
            torch.testing.assert_close(one.to_dense(), other.to_dense(), rtol=1e-4, atol=1e-6)


# Sparse gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"surgery": "sum", "weight": 0.0},
        {"surgery": "pcgrad"},
        {"surgery": "gse", "weight": 0.0},
        {"surgery": "pcgrad", "weight": 0.0, "low_memory": True},
        {"surgery": "sum", "sample": lambda step: [parts(n=4, step=step), parts(n=4, step=step + 1)]},
    ],
    ids=["plain", "SMART + PCGrad", "GSE", "low memory", "accumulated"],
)
def test_sparse_gradients_of_the_word_table_train_as_dense_ones(options):
    """To the rounding of the Gram matrix, whose sums are taken in another order; the moments' rows all decay."""
    one, other = (trainer(sparse=sparse, **options) for sparse in (True, False))
    for param_group in (*one.optimizer.param_groups, *other.optimizer.param_groups):
        param_group["eps"] = 1e-3  # else a gradient that is 0 but for rounding is divided by itself
    for step in range(3):
        got, wanted = (training_step(each, step, 0.5).result() for each in (one, other))
        assert got.loss == pytest.approx(wanted.loss, rel=1e-5)
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            moments = one.optimizer.state[mine][name], other.optimizer.state[theirs][name]
            torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-8)
    words = [row[0] for row in one.gradients.rows]
    assert words[0].shape == one.model.encoder.embeddings.word.shape
    assert all(grad.is_sparse and 0 < grad._nnz() < len(grad) for grad in words)
    assert not any(row[0].is_sparse for row in other.gradients.rows)


# Copies in half precision -----------------------------------------------------------------------------------------


def test_copies_in_half_precision_train_like_weights_that_are_cast_at_use():
    cast, copied = (trainer(dropout=0.0, dtype=torch.bfloat16, copied=copies) for copies in (False, True))
    assert len(copied.parameters.copies) == 4 * SIZES["num_hidden_layers"]
    for step in range(3):
        wanted, got = (training_step(each, step, 0.0).result() for each in (cast, copied))
        assert got.loss == pytest.approx(wanted.loss, rel=2e-2)
    assert {grad.dtype for grad in copied.gradients.rows[0]} == {torch.float32, torch.bfloat16}
    for param, copy in copied.optimizer.copies.items():
        assert torch.equal(copy, param.bfloat16())


def gradients_of(dtype: torch.dtype, batches, **options) -> dict[tuple[str, int], torch.Tensor]:
    """A step's gradients by parameter and row of task gradients, with weights that let products keep their scale."""
    steps = trainer(weight=0.0, dropout=0.0, sample=lambda step: batches, **options)
    for param in steps.model.parameters():
        if param.ndim == 2:
            torch.nn.init.normal_(param, std=param.shape[1] ** -0.5)
    if dtype == torch.float64:
        steps.model.double()
    else:
        steps.model.encoder.compute_dtype = dtype
    names, found = {param: name for name, param in steps.model.named_parameters()}, {}
    wait = steps.parameters.wait_for_gradients

    def stop():
        shared, _ = wait()
        of_params = [names[param] for param in shared.columns.params]
        rows = [
            ((name, i), grad) for i, row in enumerate(shared.rows) for name, grad in zip(of_params, row, strict=True)
        ]
        found.update({place: grad.double() for place, grad in rows if grad is not None})
        found.update({(names[param], -1): param.grad.double() for param in steps.model.heads.parameters()})
        raise StopIteration

    steps.parameters.wait_for_gradients = stop
    with pytest.raises(StopIteration):
        training_step(steps, 0, 1.0)
    return found


def apart(found, truth) -> float:
    """The distance of all gradients, as a share of the true ones' length."""
    assert found.keys() == truth.keys()
    distance, length = (
        torch.stack([x.norm() for x in of]).norm()
        for of in ([found[place] - truth[place] for place in truth], list(truth.values()))
    )
    return float(distance / length)


@pytest.mark.parametrize("surgery", ["sum", "pcgrad"])
def test_gradients_in_bf16_are_as_near_to_float64_as_its_roundings_are_many(surgery):
    """In one stream, task after task and of two half batches; a half batch left out is five times as far."""
    halves = [[(task, half) for task, half in parts(n=4, step=step)] for step in (0, 1)]
    with kernels.use_backend("reference"):
        truth = gradients_of(torch.float64, [parts()], surgery=surgery)
    within = bf16_bound(SIZES["num_hidden_layers"]) / math.sqrt(2)  # of one gradient, not of two
    for batches, options in (([parts()], {}), ([parts()], {"low_memory": True}), (halves, {})):
        assert apart(gradients_of(torch.bfloat16, batches, surgery=surgery, **options), truth) < within
    left_out = gradients_of(torch.bfloat16, halves[:1], surgery=surgery)
    assert apart(left_out, truth) > 5 * within


def test_batches_of_one_bucket_have_as_many_tiles():
    shapes, pad = set(), partial(Buckets(DATA, 64).pad, tasks=list(DATA), segments=[1] * len(DATA))
    for step in range(4):
        packed = pack_batches([(DATA[task.name], indices) for task, indices in parts(step=step)], pad)
        tile_bounds = packed.attention_plan.tile_bounds
        first, last = tile_bounds.T
        filled = first < last
        assert (last - first).max() <= 64
        assert torch.equal(first[filled][1:], last[filled][:-1])  # tile after tile, to the end
        assert last.max() == len(packed.token_ids)
        assert set(first[filled].tolist()) <= set(packed.cu_seqlens.tolist())
        shapes.add((len(packed.token_ids), len(tile_bounds)))
    assert len(shapes) == len({tokens for tokens, _ in shapes})
