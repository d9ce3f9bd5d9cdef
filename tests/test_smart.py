"""SMART's regulariser: where the perturbation lies, what it raises, and what gets a gradient."""

import dataclasses
import math

import pytest
import torch

from minbert.config import TrainConfig
from minbert.data.packing import pack
from minbert.errors import UserError
from minbert.methods.divergences import symmetrised_binary_kl, symmetrised_kl
from minbert.methods.losses import mean_squared_error
from minbert.methods.smart import BregmanConfig, SmartConfig, divergences, embedding_scale, perturb, rounds_away
from minbert.methods.task_gradients import substituted
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.tasks import find_tasks
from minbert.training.batches import Batch, make_batch
from minbert.training.objective import Objective

TASKS = find_tasks(["sst", "qqp", "sts"])
COUNTS = {"sst": 3, "qqp": 1, "sts": 2}
SEED, NOISE = torch.tensor(7), torch.tensor(8)
OFF, NO_TEACHER = SmartConfig(lambda_s=0.0), BregmanConfig()
ACTING = SmartConfig(lambda_s=1.0, epsilon=0.1, sigma=0.05, eta=0.1, relative=False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    ).with_dropout(0.1)
    encoder = Encoder(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = MultitaskModel(encoder, TASKS).train()
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, std=0.5)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    packed = pack([torch.randint(1, 50, (n,), generator=generator).tolist() for n in (7, 1, 40, 33, 2, 13)])
    labels = {"sst": torch.tensor([0.0, 4, 2]), "qqp": torch.ones(1), "sts": torch.tensor([1.0, 4.5])}
    return Batch(packed, labels, torch.arange(3), torch.ones(3))


def search(model, batch, config):
    """The clean embeddings and outputs, and the perturbed embeddings."""
    embedded = model.embed(batch.packed, SEED)
    outputs = model.from_embedded(embedded, batch.packed, batch.counts, seed=SEED)

    def forward(perturbed):
        with substituted(model, torch.Tensor.detach):
            return model.from_embedded(perturbed, batch.packed, batch.counts, seed=SEED)

    scale = embedding_scale(model) if config.relative else None
    options = {"noise_seed": NOISE, "scale": scale}
    found = perturb(forward, embedded, outputs, model.tasks, batch.packed.cu_seqlens, config, **options)
    return embedded.detach(), outputs, found


def divergence(model, batch, outputs, embedded):
    moved = model.from_embedded(embedded, batch.packed, batch.counts, seed=SEED)
    return divergences(model.tasks, moved, outputs)


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_perturbation_stays_in_the_ball(model, batch, norm, per, steps):
    config = dataclasses.replace(ACTING, norm=norm, per=per, steps=steps, sigma=1.0, eta=10.0)
    embedded, _, found = search(model, batch, config)
    offset = (found - embedded).double()
    sizes = offset.abs().amax(1) if norm == "inf" else offset.square().sum(1)
    if per == "sequence":
        groups = sizes.split(batch.packed.lengths.tolist())
        sizes = torch.stack([group.amax() if norm == "inf" else group.sum() for group in groups])
    sizes = sizes if norm == "inf" else sizes.sqrt()
    rounding = 4 * torch.finfo(torch.float32).eps * embedded.abs().max().item() * (1 if norm == "inf" else 32**0.5)
    assert sizes.max() <= config.epsilon + rounding * (1 if per == "token" else 40**0.5)
    assert sizes.min() > 0.5 * config.epsilon


def test_the_ascent_raises_the_divergence_of_every_task(model, batch):
    embedded, outputs, found = search(model, batch, ACTING)
    _, _, noise = search(model, batch, dataclasses.replace(ACTING, eta=0.0))
    _, _, further = search(model, batch, dataclasses.replace(ACTING, steps=4, eta=0.05))
    reached = divergence(model, batch, outputs, found)
    for name, value in divergence(model, batch, outputs, noise).items():
        assert 0 < value < reached[name], name
    assert sum(divergence(model, batch, outputs, further).values()) > sum(reached.values())
    assert all(value == 0 for value in divergence(model, batch, outputs, embedded).values())


def test_the_ascent_gives_no_parameter_a_gradient(model, batch):
    search(model, batch, ACTING)
    assert all(param.grad is None for param in model.parameters())


def test_a_perturbation_in_units_of_the_embeddings(model, batch):
    scale = embedding_scale(model)
    _, _, absolute = search(model, batch, ACTING)
    units = {name: getattr(ACTING, name) / scale for name in ("epsilon", "sigma", "eta")}
    _, _, relative = search(model, batch, dataclasses.replace(ACTING, relative=True, **units))
    torch.testing.assert_close(relative, absolute, rtol=1e-5, atol=1e-6)


def test_the_embeddings_scale_is_that_of_their_elements(model, batch):
    model.eval()
    assert embedding_scale(model) == pytest.approx(model.embed(batch.packed).square().mean().sqrt().item(), rel=0.2)


def losses(model, batch, smart=OFF, bregman=NO_TEACHER, teacher=None, seed=0):
    objective = Objective(model, smart, bregman, teacher)
    return objective(make_batch(batch.packed, batch.labels, smart, seed=seed))


def gradients(model, found):
    model.zero_grad()
    found.total.backward()
    return [param.grad for param in model.parameters()]


def test_without_sigma_and_eta_the_gradient_is_the_plain_one_to_the_bit(model, batch):
    plain = gradients(model, losses(model, batch))
    still = losses(model, batch, SmartConfig(sigma=0.0, eta=0.0, lambda_s=3.0))
    assert all(value == 0 for value in still.smart.values())
    for got, wanted in zip(gradients(model, still), plain, strict=True):
        assert (got is None and wanted is None) or torch.equal(got, wanted)


def test_a_weight_of_0_skips_the_search(model, batch, monkeypatch):
    monkeypatch.setattr("minbert.training.objective.perturb", lambda *a, **k: pytest.fail("searched"))
    assert losses(model, batch, OFF).smart == {}


def test_gradients_flow_through_both_passes_and_the_embeddings(model, batch, monkeypatch):
    """With the perturbation held fixed, as Danskin (1966) has it for a maximum; checked by finite differences."""
    model = model.double().eval()
    embedded, _, found = search(model, batch, ACTING)
    offset = found - embedded
    monkeypatch.setattr(
        "minbert.training.objective.perturb", lambda forward, embedded, *a, **k: embedded.detach() + offset
    )
    params = [model.encoder.embeddings.norm.weight, model.encoder.layers[1].qkv.bias, model.heads["sst"].bias]
    exact = torch.autograd.grad(losses(model, batch, ACTING).total, params)

    def value():
        clean = model.embed(batch.packed)
        outputs = [model.from_embedded(x, batch.packed, batch.counts) for x in (clean, clean + offset)]
        return sum(losses(model, batch).task.values()) + sum(divergences(model.tasks, outputs[1], outputs[0]).values())

    for param, gradient in zip(params, exact, strict=True):
        direction, step = torch.randn_like(param), 1e-6
        with torch.no_grad():
            param.add_(step * direction)
            above = value().item()
            param.sub_(2 * step * direction)
            below = value().item()
            param.add_(step * direction)
        assert (gradient * direction).sum().item() == pytest.approx((above - below) / (2 * step), rel=1e-5)


def test_each_task_has_its_weight(model, batch):
    found = losses(model, batch, dataclasses.replace(ACTING, lambda_s={"sst": 2.0, "sts": 0.5}))
    expected = sum(found.task.values()) + 2 * found.smart["sst"] + 0.5 * found.smart["sts"]
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.smart_term, (2 * found.smart["sst"] + 0.5 * found.smart["sts"]).detach())


def test_the_weight_rises_over_the_warm_up():
    config = SmartConfig(lambda_s=4.0, warmup=0.5)
    assert [config.weight("sst", done) for done in (0.0, 0.25, 0.5, 1.0)] == [0.0, 2.0, 4.0, 4.0]


def test_independent_masks_let_dropout_alone_diverge(model, batch):
    still = dataclasses.replace(ACTING, sigma=0.0, eta=0.0)
    shared = losses(model, batch, still)
    independent = losses(model, batch, dataclasses.replace(still, masks="independent"))
    assert all(value == 0 for value in shared.smart.values())
    assert all(value > 0 for value in independent.smart.values())


def test_a_frozen_encoder_still_has_a_regulariser_for_its_heads(model, batch):
    model.freeze_encoder()
    found = losses(model, batch, ACTING)
    assert all(value > 0 for value in found.smart.values())
    gradients(model, found)
    assert all(param.grad is None for param in model.encoder.parameters())
    assert all(head.weight.grad.abs().max() > 0 for head in model.heads.values())


def test_a_teacher_like_the_model_changes_nothing(model, batch):
    teacher = {param: param.detach().clone() for param in model.parameters()}
    plain = gradients(model, losses(model, batch))
    found = losses(model, batch, OFF, BregmanConfig(mu=1.0), teacher)
    assert all(value == 0 for value in found.bregman.values())
    for got, wanted in zip(gradients(model, found), plain, strict=True):
        assert (got is None and wanted is None) or torch.equal(got, wanted)


def test_a_teacher_pulls_and_gets_no_gradient(model, batch):
    teacher = {param: (param + 0.1 * torch.randn_like(param)).detach() for param in model.parameters()}
    found = losses(model, batch, OFF, BregmanConfig(mu=2.0), teacher)
    assert all(value > 0 for value in found.bregman.values())
    torch.testing.assert_close(found.total, sum(found.task.values()) + 2 * sum(found.bregman.values()))
    found.total.backward()
    assert all(average.grad is None for average in teacher.values())


@pytest.mark.parametrize(
    ("divergence", "shape"), [(symmetrised_kl, (4, 5)), (symmetrised_binary_kl, (4,)), (mean_squared_error, (4,))]
)
def test_divergences_are_symmetric_and_0_only_for_equal_outputs(divergence, shape):
    one, other = torch.randn(2, *shape, dtype=torch.float64)
    assert divergence(one, one) == 0
    assert divergence(one, other) > 0
    torch.testing.assert_close(divergence(one, other), divergence(other, one))


def test_divergences_are_those_of_the_distributions():
    one, other = torch.randn(2, 6, 5, dtype=torch.float64)
    p, q = torch.distributions.Categorical(logits=one), torch.distributions.Categorical(logits=other)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(symmetrised_kl(one, other), (kl(p, q) + kl(q, p)).mean())
    p, q = torch.distributions.Bernoulli(logits=one[:, 0]), torch.distributions.Bernoulli(logits=other[:, 0])
    torch.testing.assert_close(symmetrised_binary_kl(one[:, 0], other[:, 0]), (kl(p, q) + kl(q, p)).mean())


# Heads and losses of the papers -----------------------------------------------------------------------------------

PAIRS = [
    ("projected-cosine", "cosine_embedding"),
    ("difference", "multiple_negatives_ranking"),
    ("concatenated-layers-cosine", "mean_squared_error"),
    ("cosine-feature", "binary_cross_entropy"),
]


def pair_model_and_batch(head, loss):
    """sts with this head and loss: three examples of two sequences."""
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    ).with_dropout(0.1)
    task = dataclasses.replace(TASKS[2], head=head, loss=loss)
    model = MultitaskModel(Encoder(config), [task]).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(0)
    packed = pack([torch.randint(1, 50, (n,), generator=generator).tolist() for n in (7, 1, 20, 33, 2, 13)])
    return model, Batch(packed, {"sts": torch.tensor([1.0, 4.5, 3.0])}, torch.arange(3), torch.ones(1))


@pytest.mark.parametrize(("head", "loss"), PAIRS)
def test_both_sentences_of_a_pair_move_and_the_outputs_diverge(head, loss):
    model, batch = pair_model_and_batch(head, loss)
    embedded, outputs, found = search(model, batch, ACTING)
    assert all(part.abs().max() > 0 for part in (found - embedded).split(batch.packed.lengths.tolist()))
    assert divergence(model, batch, outputs, found)["sts"] > 0
    assert divergence(model, batch, outputs, embedded)["sts"] == 0


def test_only_clean_inputs_enter_the_running_statistics():
    def statistics(smart, bregman):
        model, batch = pair_model_and_batch("concatenated-layers-cosine", "mean_squared_error")
        teacher = {param: (param + 0.1).detach() for param in model.parameters()}
        losses(model, batch, smart, bregman, teacher)
        return list(model.buffers())

    plain = statistics(OFF, NO_TEACHER)
    assert any(buffer.abs().sum() > 0 for buffer in plain)
    for one, other in zip(plain, statistics(dataclasses.replace(ACTING, steps=2), BregmanConfig(mu=1.0)), strict=True):
        assert torch.equal(one, other)


def test_bf16_rounds_small_perturbations_away(model):
    scale = embedding_scale(model)
    small = SmartConfig(epsilon=1e-5, relative=False)
    assert rounds_away(model, small, torch.bfloat16)
    assert not rounds_away(model, small, torch.float32)
    assert not rounds_away(model, SmartConfig(epsilon=0.02), torch.bfloat16)
    assert rounds_away(model, SmartConfig(epsilon=0.9 * scale * 2**-24, relative=False), torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -1.0}, "--smart.epsilon must be 0 or more, got -1"),
        ({"sigma": math.nan}, "--smart.sigma must be 0 or more, got nan"),
        ({"steps": -1}, "--smart.steps must be 0 or more, got -1"),
        ({"lambda_s": -2.0}, "--smart.lambda-s must be 0 or more, got -2"),
        ({"lambda_s": {"sts": -1.0}}, "--smart.lambda-s must be 0 or more, got -1"),
        ({"warmup": 1.0}, "--smart.warmup must be at least 0 and below 1, got 1"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        SmartConfig(**options)


def test_nonsense_for_the_teacher_is_refused():
    with pytest.raises(UserError, match=r"--bregman.beta must be between 0 and 1, got 2"):
        BregmanConfig(beta=2)
    with pytest.raises(UserError, match=r"--bregman.mu must be 0 or more, got -1"):
        BregmanConfig(mu=-1)


def test_a_weight_for_a_task_that_is_not_known_is_refused():
    with pytest.raises(UserError, match=r"--smart.lambda-s: unknown task 'sts2' \(did you mean 'sts'\?\)"):
        TrainConfig(smart=SmartConfig(lambda_s={"sts2": 1.0}))
